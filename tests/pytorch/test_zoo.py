"""Real architectures, pruned to half of their MACs with no hints: verified, and as cheap as PyTorch's own counter says.

Weights are random and images small; VGG's classifier is narrower and the transformers have fewer layers, for the memory and the time.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as zoo
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import coppice
from coppice.torch.capture import quiet_eval
from known_nets import TRAPS


def narrow_vgg() -> nn.Module:
    model = zoo.VGG(zoo.vgg.make_layers(zoo.vgg.cfgs["A"], batch_norm=True), num_classes=10, init_weights=False)
    model.classifier[0], model.classifier[3], model.classifier[6] = nn.Linear(512 * 49, 256), nn.Linear(256, 256), nn.Linear(256, 10)
    return model


def short_vit() -> nn.Module:
    return VisionTransformer(image_size=64, patch_size=16, num_layers=3, num_heads=12, hidden_dim=768, mlp_dim=3072, num_classes=10)


def short_swin() -> nn.Module:
    return SwinTransformer([4, 4], embed_dim=96, depths=[2, 2, 2, 2], num_heads=[3, 6, 12, 24], window_size=[7, 7], num_classes=10)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": zoo.resnet18,
    "resnet50": zoo.resnet50,
    "resnext50": zoo.resnext50_32x4d,
    "densenet121": zoo.densenet121,
    "mobilenet_v2": zoo.mobilenet_v2,
    "mobilenet_v3_small": zoo.mobilenet_v3_small,
    "efficientnet_b0": zoo.efficientnet_b0,
    "shufflenet_v2": zoo.shufflenet_v2_x1_0,
    "googlenet": lambda: zoo.googlenet(init_weights=False),
    "vgg11_bn": narrow_vgg,
    "squeezenet1_1": zoo.squeezenet1_1,
    "regnet_y_400mf": zoo.regnet_y_400mf,
    "convnext_tiny": zoo.convnext_tiny,
    "vit_b_16": short_vit,
    "swin_t": short_swin,
}


def counted(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """MACs of one sample, by PyTorch's counter, which knows nothing of coppice; attention as plain matrix products, which it counts."""
    with quiet_eval(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2 // inputs[0].shape[0]


def prune_by_half(model: nn.Module, inputs: tuple[Tensor, ...], round_to: int = 8) -> None:
    coupling = coppice.couple(coppice.capture(model, inputs))
    dense = coupling.cost()
    plan = coppice.plan(coupling, coppice.score(model, coupling, "l2"), {"macs": 0.5 * dense.macs}, round_to=round_to, min_width=round_to)
    pruned = coppice.apply(model, plan)
    found = coppice.verify(model, pruned, coupling, plan)
    assert found.max_error < 1e-10
    assert found.detour is None
    assert type(pruned) is type(model)
    ids = {a.name: a.id for a in coupling.axes}
    cost = coupling.cost({ids[a.name]: len(a.keep) for a in plan.axes})
    assert cost.macs <= 0.5 * dense.macs
    assert (cost.macs, dense.macs) == (counted(pruned, inputs), counted(model, inputs))
    assert cost.params == sum(p.numel() for p in pruned.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in pruned.state_dict().values())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_macs(name: str) -> None:
    torch.manual_seed(0)
    prune_by_half(MODELS[name]().eval(), (torch.randn(1, 3, 64, 64),))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["concat_pool_flatten", "pixel_shuffle_between_convs"])
def test_where_the_best_known_peer_goes_wrong(name: str) -> None:
    prune_by_half(*TRAPS[name](), round_to=1)
