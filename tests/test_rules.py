"""Every rule, run: an op on operands with indices removed must give what the rule's line says it gives.

Each case is a call of PyTorch that is recorded as one op of one rule. Its operands' axes are cut at random, and the call is made again on the
cut operands. Where the line sums over an axis, the removed indices are zero in the dense call; where it says that the op mixes
an axis, that axis stays whole, and cutting it must indeed change what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

import coppice
from coppice.axes import Axis, atoms
from coppice.cost import width
from coppice.coupling import Coupling, Mask, keep_mask
from coppice.movement import SHAPE_RULES
from coppice.rules import LINES
from coppice.torch.apply import sliced
from coppice.torch.capture import capture

Sizes = Callable[[str], int]  # a letter's planned size


@dataclass(frozen=True)
class Case:
    """``call(operands, size, out)``: ``size`` gives the width of a letter, ``out`` the shapes the results must have."""

    rule: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[[list[Tensor], Sizes, list[tuple[int, ...]]], Tensor | tuple[Tensor, ...]]
    cut: bool = True  # whether the rule leaves anything to cut
    mixed: bool = False


CASES: dict[str, Case] = {}
aten = torch.ops.aten


def case(name: str, rule: str, *shapes: tuple[int, ...], cut: bool = True, mixed: bool = False):
    def enter(call: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        CASES[name] = Case(rule, shapes, call, cut, mixed)

    return enter


PAIRS = torch.tensor([[0, 2], [1, 1]])
GRID = torch.linspace(-1, 1, 2 * 3 * 3 * 2, dtype=torch.float64).view(2, 3, 3, 2)
BOX = torch.tensor([[0.0, 0, 0, 3, 3], [1, 1, 1, 4, 4]], dtype=torch.float64)

case("conv", "conv", (2, 6, 5, 5), (8, 6, 3, 3), (8,))(lambda t, n, out: F.conv2d(*t))
case("group conv", "conv", (2, 6, 5, 5), (8, 3, 3, 3), (8,))(lambda t, n, out: F.conv2d(*t, groups=n("g")))
case("depthwise conv", "conv", (2, 6, 5), (12, 1, 3), (12,))(lambda t, n, out: F.conv1d(*t, groups=n("g")))
case("transposed conv", "conv_transpose", (2, 6, 4, 4), (6, 4, 3, 3), (8,))(lambda t, n, out: F.conv_transpose2d(*t, groups=n("g")))
case("mm", "mm", (3, 4), (4, 8))(lambda t, n, out: torch.mm(*t))
case("addmm", "mm", (8,), (3, 4), (4, 8))(lambda t, n, out: torch.addmm(*t))
case("bmm", "bmm", (2, 3, 4), (2, 4, 5))(lambda t, n, out: torch.bmm(*t))
case("baddbmm", "bmm", (2, 3, 5), (2, 3, 4), (2, 4, 5))(lambda t, n, out: torch.baddbmm(*t))
case("mv", "mv", (5, 4), (4,))(lambda t, n, out: torch.mv(*t))
case("dot", "dot", (6,), (6,))(lambda t, n, out: torch.dot(*t))
case("weight norm", "weight_norm", (6, 4, 3), (6, 1, 1), mixed=True)(lambda t, n, out: aten._weight_norm_interface(*t, 0))
case("weight norm of dim 1", "weight_norm", (6, 4, 3), (1, 4, 1), mixed=True)(lambda t, n, out: F_weight_norm(*t))
case("batch norm", "batch_norm", (2, 6, 3), (6,), (6,), (6,), (6,))(lambda t, n, out: F.batch_norm(t[0], t[3], t[4].abs(), t[1], t[2]))
case("layer norm", "layer_norm", (2, 3, 6), (6,), (6,), mixed=True)(lambda t, n, out: F.layer_norm(t[0], t[1].shape, t[1], t[2]))
case("layer norm of two dims", "layer_norm", (2, 4, 6), (4, 6), (4, 6), mixed=True)(
    lambda t, n, out: F.layer_norm(t[0], t[1].shape, t[1], t[2])
)
case("group norm", "group_norm", (2, 12, 3), (12,), (12,), mixed=True)(lambda t, n, out: F.group_norm(t[0], n("g", 3), t[1], t[2]))
case("attention", "attention", (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 8), mixed=True)(
    lambda t, n, out: F.scaled_dot_product_attention(*t, scale=0.4)
)
case("attention, default scale", "attention", (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 8), mixed=True)(
    lambda t, n, out: F.scaled_dot_product_attention(*t)
)
case("masked attention", "attention", (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 8), (2, 3, 5, 6), mixed=True)(
    lambda t, n, out: F.scaled_dot_product_attention(*t[:3], attn_mask=t[3], scale=0.4)
)
case("pixel shuffle", "pixel_shuffle", (2, 12, 3, 3))(lambda t, n, out: F.pixel_shuffle(t[0], 2))
case("pixel unshuffle", "pixel_unshuffle", (2, 5, 4, 4))(lambda t, n, out: F.pixel_unshuffle(t[0], 2))
case("unfold", "im2col", (2, 5, 4, 4))(lambda t, n, out: F.unfold(t[0], 2))
case("fold", "col2im", (2, 20, 9))(lambda t, n, out: F.fold(t[0], (4, 4), 2))
case("embedding", "embedding", (5, 6))(lambda t, n, out: F.embedding(PAIRS, t[0]))
case("reflection pad", "spatial1d", (2, 6, 4))(lambda t, n, out: F.pad(t[0], (1, 1), mode="reflect"))
case("max pool", "spatial2d", (2, 6, 4, 4))(lambda t, n, out: F.max_pool2d(t[0], 2))
case("bilinear", "spatial2d", (2, 6, 4, 4))(lambda t, n, out: F.interpolate(t[0], scale_factor=2.0, mode="bilinear"))
case("average pool 3d", "spatial3d", (2, 6, 4, 4, 4))(lambda t, n, out: F.avg_pool3d(t[0], 2))
case("grid sample", "grid_sample", (2, 6, 4, 4))(lambda t, n, out: F.grid_sample(t[0], GRID, align_corners=False))
case("roi align", "roi_align", (2, 6, 5, 5))(lambda t, n, out: roi_align(t[0], BOX, 2))

case("broadcast product", "pointwise", (2, 6, 4), (6, 1), (1,))(lambda t, n, out: torch.where(t[0] > 0, t[1], t[2]))
case("gelu", "pointwise", (2, 6))(lambda t, n, out: F.gelu(t[0]))
case("view that merges", "view", (2, 3, 4))(lambda t, n, out: t[0].view(out[0][0], out[0][1]) if out else t[0].view(2, 12))
case("view that cuts", "view", (12, 5))(lambda t, n, out: t[0].view(out[0] if out else (3, 4, 5)))
case("view across", "view", (6, 4))(lambda t, n, out: t[0].view(out[0] if out else (2, 12)))
case("permute", "permute", (2, 3, 4))(lambda t, n, out: t[0].permute(2, 0, 1))
case("expand", "expand", (5, 1))(lambda t, n, out: t[0].expand(2, -1, 3))
case("concat", "concat", (2, 3, 4), (2, 5, 4), (2, 3, 4))(lambda t, n, out: torch.cat(t, 1))
case("stack", "stack", (3, 4), (3, 4))(lambda t, n, out: torch.stack(t, 1))
case("split", "take_apart", (9, 2))(lambda t, n, out: torch.split(t[0], [o[0] for o in out] if out else [2, 4, 3]))
case("slice", "take_apart", (3, 9))(
    lambda t, n, out: t[0].narrow(1, n("start"), out[0][1]) if out else aten.slice(t[0], 1, 2, 7)  # type: ignore[no-any-return]
)
case("pad", "pad", (4, 5))(lambda t, n, out: F.pad(t[0], (2, 1, 0, 3)))
case("negative pad", "pad", (4, 8))(lambda t, n, out: F.pad(t[0], (-2, 1)))
case("sum", "along", (3, 4, 5))(lambda t, n, out: t[0].sum(1))
case("mean", "along", (3, 4, 5), mixed=True)(lambda t, n, out: t[0].mean((0, 2), keepdim=True))
case("softmax", "along", (3, 4), mixed=True)(lambda t, n, out: t[0].softmax(1))
case("flip", "along", (3, 4))(lambda t, n, out: t[0].flip(1))
case("roll", "along", (3, 4))(lambda t, n, out: t[0].roll(1, 0))
case("select", "along", (3, 4))(lambda t, n, out: t[0].select(0, 1))
case("unbind", "along", (3, 4))(lambda t, n, out: t[0].unbind(0))
case("index", "along", (4, 5))(lambda t, n, out: t[0][PAIRS[0]])
case("index between", "along", (3, 4, 5))(lambda t, n, out: t[0][:, PAIRS])
case("indices apart", "along", (3, 4, 5))(lambda t, n, out: t[0][PAIRS[0], :, PAIRS[1]])
case("zeros", "fresh", (3,), cut=False)(lambda t, n, out: torch.zeros(4, 5, dtype=torch.float64))
case("inverse", "unknown", (4, 4), cut=False)(lambda t, n, out: torch.linalg.inv_ex(t[0]))


def F_weight_norm(v: Tensor, g: Tensor) -> tuple[Tensor, ...]:  # noqa: N802
    """PyTorch's own kernel takes the first or the last dim only, so the last one is brought there by hand."""
    return aten._weight_norm_interface(v.transpose(1, 2).contiguous(), g.transpose(1, 2).contiguous(), 2)


class Operands(nn.Module):
    """The call as a model whose parameters are its operands."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.operands = nn.ParameterList(torch.randn(s, generator=generator, dtype=torch.float64) for s in case.shapes)
        self.case = case

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        return self.case.call(list(self.operands), dense_size, [])


def dense_size(letter: str, size: int = 2) -> int:
    """The groups of the dense call."""
    return size


def coupled(case: Case) -> Coupling:
    """The axes of a call alone: its result is no output, which would be pinned, and nothing but its operands gives sizes."""
    graph = capture(Operands(case), ())
    return coppice.couple(replace(graph, outputs=(), origin=None)), graph.outputs  # type: ignore[return-value]


def test_every_rule_is_run() -> None:
    assert {c.rule for c in CASES.values()} == LINES.keys() | SHAPE_RULES.keys()
