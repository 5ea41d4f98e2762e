"""Recurrent layers: the hidden width goes with the four gates, in both directions and every layer that the module's one number is for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import coppice
from coppice.testing import random_plan


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn, self.fc = nn.Linear(5, 12), nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(torch.relu(self.stem(x)))[0].mean(1))


def test_an_lstm_loses_hidden_units_and_inputs() -> None:
    torch.manual_seed(0)
    model, x = Rows().eval(), torch.randn(2, 7, 5)
    coupling = coppice.couple(coppice.capture(model, x))
    assert {a.name: a.width for a in coupling.prunable} == {"stem.weight:0": 12, "rnn.weight_ih_l0:0.2": 8}
    for seed in range(4):
        plan = random_plan(coupling, seed)
        pruned = coppice.apply(model, plan)
        coppice.verify(model, pruned, coupling, plan)
        kept = {a.name: len(a.keep) for a in plan.axes}
        assert (pruned.rnn.input_size, pruned.rnn.hidden_size) == (kept["stem.weight:0"], kept["rnn.weight_ih_l0:0.2"])
        pruned.train()(x).sum().backward()
        assert all(p.grad is not None for p in pruned.parameters())


def test_a_norm_without_parameters_is_told_its_width() -> None:
    """An instance norm has nothing to slice, but warns of a width that is not its own."""
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.InstanceNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 3)).eval()
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 3, 8, 8)))
    plan = random_plan(coupling, 1)
    pruned = coppice.apply(model, plan)
    coppice.verify(model, pruned, coupling, plan)
    assert pruned[1].num_features == len(plan.axes[0].keep) < 12
