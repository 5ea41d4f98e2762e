"""The distance between a pruned network's features and the dense one's at the channels that stay."""

import numpy as np
import pytest
import torch
from torch import nn

import coppice
from coppice.distillation import Features, prediction_loss
from coppice.errors import CoppiceError
from coppice.planning import make_plan

HIDDEN, KEPT = 12, [0, 3, 4, 7, 9, 11]


def net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm2d(HIDDEN) if norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(3, HIDDEN, 3), middle, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(HIDDEN, 5)
    )


def cut(dense: nn.Module):
    coupling = coppice.couple(coppice.capture(dense.eval(), torch.randn(2, 3, 8, 8)))
    plan = make_plan(coupling, {coupling.prunable[0].id: np.isin(np.arange(HIDDEN), KEPT)})
    return coppice.apply(dense, plan).eval(), plan


def test_a_sliced_network_has_the_dense_features():
    dense = net()
    pruned, plan = cut(dense)
    x = torch.randn(4, 3, 8, 8)
    with Features(pruned, dense, plan) as features:
        pruned(x), dense(x)
        assert float(features.loss().detach()) < 1e-10


def test_the_loss_is_the_error_relative_to_the_variance_of_the_features():
    dense = net()
    pruned, plan = cut(dense)
    with torch.no_grad():
        pruned[1].bias += 0.5  # reaches the loss through the ReLU that works in place
    x = torch.randn(4, 3, 8, 8)
    with Features(pruned, dense, plan) as features:
        pruned(x), dense(x)
        found = features.loss()
    with torch.no_grad():
        ours, theirs = pruned[:3](x), dense[:3](x)[:, KEPT]
    torch.testing.assert_close(found, ((ours - theirs) ** 2).mean() / theirs.var())
    torch.autograd.backward(found)
    assert pruned[0].weight.grad.abs().sum() > 0
    assert dense[0].weight.grad is None


def test_without_normalisation_the_layers_are_compared():
    dense = net(norm=False)
    pruned, plan = cut(dense)
    with torch.no_grad():
        pruned[5].bias += 1.0
    x = torch.randn(4, 3, 8, 8)
    with Features(pruned, dense, plan) as features:
        pruned(x), dense(x)
        assert float(features.loss().detach()) > 0


def test_nothing_is_watched_afterwards():
    dense = net()
    pruned, plan = cut(dense)
    with Features(pruned, dense, plan):
        pass
    assert not any(module._forward_hooks for model in (dense, pruned) for module in model.modules())


def test_networks_that_share_no_layer():
    with pytest.raises(CoppiceError, match="no layers whose features"):
        Features(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU()), None)
    dense = net()
    with Features(net(), dense, None) as features, pytest.raises(CoppiceError, match="no layer of the pruned model"):
        features.loss()


def test_predictions_that_agree_cost_nothing():
    logits = torch.randn(6, 10, dtype=torch.float64)
    assert abs(float(prediction_loss(logits, logits + 3, 4.0))) < 1e-12
    assert float(prediction_loss(logits, -logits, 4.0)) > 0
