"""A fused q, k, v: what the code picks apart by number keeps indices of its own, only as many."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coppice
from coppice.axes import Axis, Form, choice_of, decided, find, in_proportion, product_of, sum_of, unify
from coppice.coupling import Coupling, Mask
from coppice.testing import check_model
from coppice.torch.capture import record
from coppice.torch.replay import Replay
from coppice.torch.verify import relative_error

Pick = Callable[["Block", Tensor], tuple[Tensor, Tensor, Tensor]]


class Block(nn.Module):
    """Attention with a fused projection; ``pick`` makes q, k and v (batch, heads, tokens, head dim) of its result."""

    def __init__(self, pick: Pick) -> None:
        super().__init__()
        self.pick, self.heads, self.head_dim = pick, 2, 6
        self.embed, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)
        self.qkv, self.proj, self.fc = nn.Linear(16, 36), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.pick(self, self.qkv(self.norm(x)))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.fc(x + self.proj(y))


def unbound(block: Block, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, n, _ = qkv.shape
    return qkv.reshape(b, n, 3, block.heads, block.head_dim).permute(2, 0, 3, 1, 4).contiguous().unbind(0)


def picked(block: Block, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, n, _ = qkv.shape
    qkv = (qkv.view(b, n, 3, block.heads, -1) * 1.5).unsqueeze(0).transpose(2, 4).squeeze(0)
    return qkv[:, :, 0], qkv[:, :, 1], qkv.select(2, -1)


def inside_the_heads(block: Block, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, n, _ = qkv.shape
    return qkv.reshape(b, n, block.heads, 3, block.head_dim).permute(3, 0, 2, 1, 4).unbind(0)


def heads_later(block: Block, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, n, _ = qkv.shape
    q, k, v = (t.view(b, n, block.heads, -1).transpose(1, 2) for t in qkv.view(b, n, 3, -1).unbind(2))
    return q, k, v


def read_as_a_whole(block: Block, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, n, _ = qkv.shape
    whole = qkv.reshape(b, n, 3, block.heads, block.head_dim).permute(2, 0, 3, 1, 4)
    return (whole / (whole.square().sum(0, keepdim=True) + 1)).unbind(0)


SEPARATE = {"unbound": unbound, "picked": picked, "inside the heads": inside_the_heads, "heads later": heads_later}
TOGETHER = {"read as a whole": read_as_a_whole}


def coupled(pick: Pick) -> tuple[Block, Tensor, Coupling]:
    torch.manual_seed(0)
    model, x = Block(pick).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    return model, x, coppice.couple(coppice.capture(model, x))


@pytest.mark.parametrize("name", SEPARATE)
def test_values_keep_other_indices_than_queries_and_keys(name: str) -> None:
    model, x, coupling = coupled(SEPARATE[name])
    heads, value_dim = coupling.on("proj.weight", 1)
    (key_dim,) = (a for a in coupling.on("qkv.weight", 0) if a not in (heads, value_dim))
    assert (heads.width, key_dim.width, value_dim.width) == (2, 6, 6)
    assert coupling.tied_to(key_dim) == [value_dim]
    assert heads.pinned is key_dim.pinned is None
    plan = coppice.remove(coupling, {key_dim.name: [0, 1], value_dim.name: [3, 5], heads.name: [1]})
    pruned = coppice.apply(model, plan)
    assert pruned.qkv.weight.shape[0] == 12
    assert coppice.verify(model, pruned, coupling, plan).max_error < 1e-10
    for seed in range(4):
        check_model(model, (x,), seed)


@pytest.mark.parametrize("name", TOGETHER)
def test_what_meets_across_the_pick_is_one_axis(name: str) -> None:
    model, x, coupling = coupled(TOGETHER[name])
    assert len([a for a in coupling.on("qkv.weight", 0) if a.width == 6]) == 1
    for seed in range(4):
        check_model(model, (x,), seed)


@pytest.mark.parametrize("name", SEPARATE)
def test_every_result_of_the_oracle_is_that_of_the_pruned_model(name: str) -> None:
    """Also of the tensors that hold queries, keys and values at once, whose indices differ by place."""
    model, x, coupling = coupled(SEPARATE[name])
    value_dim = coupling.on("proj.weight", 1)[1]
    (key_dim,) = coupling.tied_to(value_dim)
    plan = coppice.remove(coupling, {key_dim.name: [0, 1], value_dim.name: [3, 5]})
    keep: dict[Axis, Mask] = {}
    for axis, planned in zip(coupling.prunable, plan.axes, strict=True):
        keep[axis.atom] = np.isin(np.arange(axis.width), planned.keep)
    have: list[list[Tensor]] = []
    recorder, _, error = record(coppice.apply(model, plan), (x,), lambda op, outs: have.append([t.clone() for t in outs]))
    assert error is None
    want: list[list[Tensor]] = []
    Replay(coupling, model, (x,), keep).run({k: op.call for k, op in enumerate(recorder.ops)}, lambda k, outs: want.append(outs))
    assert len(have) == len(want)
    assert max(relative_error(a[0], b[0]) for a, b in zip(have, want, strict=True) if a) < 1e-12


def test_a_choice_keeps_one_width() -> None:
    chooser, q, v = Axis(2), Axis(6), Axis(6)
    dim = choice_of([q, v], chooser)
    assert find(dim).form is Form.CHOICE
    assert in_proportion([q, v]) == [(q, v)]
    assert in_proportion([q, q]) == []
    heads = Axis(3)
    assert in_proportion([product_of([heads, q]), product_of([heads, v])]) == [(q, v)]
    assert in_proportion([q, sum_of([Axis(2), Axis(4)])]) is None


def test_what_meets_a_choice_meets_all_of_it() -> None:
    q, v, other = Axis(6), Axis(6), sum_of([Axis(2), Axis(4)])
    dim = choice_of([q, v], Axis(2))
    assert unify(dim, other)
    assert find(q) is find(v) is find(dim) is find(other)
    assert decided(dim) is find(q)
