"""Every rule, run: an op on operands with indices removed must give what the rule's line says it gives.

Each case is a call of PyTorch that is recorded as one op of one rule. Its operands' axes are cut at random, and the call is made again on
the cut operands. Where the line sums over an axis, the removed indices are zero in the dense call; where it says that the op mixes
an axis, that axis stays whole, and cutting it must indeed change what is kept.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from coppice.axes import atoms
from coppice.movement import SHAPE_RULES
from coppice.rules import LINES
from cutting import Case, Told, coupled, run, some

aten = torch.ops.aten


PAIRS = torch.tensor([[0, 2], [1, 1]])
MASK = torch.tensor([True, False, True, True])
GRID = torch.linspace(-1, 1, 2 * 3 * 3 * 2, dtype=torch.float64).view(2, 3, 3, 2)
BOX = torch.tensor([[0.0, 0, 0, 3, 3], [1, 1, 1, 4, 4]], dtype=torch.float64)

CASES = [
    Case("conv", "conv", ((2, 6, 5, 5), (8, 6, 3, 3), (8,)), lambda t, _: F.conv2d(*t)),
    Case("pointwise conv", "pointwise_conv", ((2, 6, 5), (8, 3, 1), (8,)), lambda t, told: F.conv1d(*t, groups=told.groups), Told(2)),
    Case("group conv", "conv", ((2, 6, 5, 5), (8, 3, 3, 3), (8,)), lambda t, told: F.conv2d(*t, groups=told.groups), Told(2)),
    Case("depthwise conv", "conv", ((2, 6, 5), (12, 1, 3), (12,)), lambda t, told: F.conv1d(*t, groups=told.groups), Told(6)),
    Case(
        "transposed conv",
        "conv_transpose",
        ((2, 6, 4, 4), (6, 4, 3, 3), (8,)),
        lambda t, told: F.conv_transpose2d(*t, groups=told.groups),
        Told(2),
    ),
    Case("mm", "mm", ((3, 4), (4, 8)), lambda t, _: torch.mm(*t)),
    Case("addmm", "mm", ((8,), (3, 4), (4, 8)), lambda t, _: torch.addmm(*t)),
    Case("bmm", "bmm", ((2, 3, 4), (2, 4, 5)), lambda t, _: torch.bmm(*t)),
    Case("baddbmm", "bmm", ((2, 3, 5), (2, 3, 4), (2, 4, 5)), lambda t, _: torch.baddbmm(*t)),
    Case("mv", "mv", ((5, 4), (4,)), lambda t, _: torch.mv(*t)),
    Case("dot", "dot", ((6,), (6,)), lambda t, _: torch.dot(*t)),
    Case("weight norm", "weight_norm", ((6, 4, 3), (6, 1, 1)), lambda t, _: aten._weight_norm_interface(*t, 0)[0], mixed=True),
    Case("weight norm, last dim", "weight_norm", ((6, 4, 3), (1, 1, 3)), lambda t, _: aten._weight_norm_interface(*t, 2)[0], mixed=True),
    Case("lstm", "lstm", ((3, 2, 6), (16, 6), (16, 4), (16,), (16,), (2, 4), (2, 4)), lambda t, _: lstm_layer(*t), mixed=True),
    Case("batch norm", "batch_norm", ((2, 6, 3), (6,), (6,), (6,), (6,)), lambda t, _: F.batch_norm(*t)),
    Case(
        "norm by the batch",
        "batch_statistics",
        ((2, 6, 3), (6,), (6,)),
        lambda t, _: F.batch_norm(t[0], None, None, t[1], t[2], training=True),
        mixed=True,
    ),
    Case("layer norm", "layer_norm", ((2, 3, 6), (6,), (6,)), lambda t, _: F.layer_norm(t[0], t[1].shape, *t[1:]), mixed=True),
    Case(
        "layer norm, two dims", "layer_norm", ((2, 4, 6), (4, 6), (4, 6)), lambda t, _: F.layer_norm(t[0], t[1].shape, *t[1:]), mixed=True
    ),
    Case(
        "group norm", "group_norm", ((2, 12, 3), (12,), (12,)), lambda t, told: F.group_norm(t[0], told.groups, *t[1:]), Told(3), mixed=True
    ),
    Case(
        "attention",
        "attention",
        ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4)),
        lambda t, _: F.scaled_dot_product_attention(*t, scale=0.4),
        mixed=True,
    ),
    Case(
        "scaled attention",
        "attention",
        ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4)),
        lambda t, _: F.scaled_dot_product_attention(*t),
        mixed=True,
    ),
    Case(
        "masked attention",
        "attention",
        ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), (2, 3, 5, 6)),
        lambda t, _: masked_attention(t),
        mixed=True,
    ),
    Case("channel shuffle", "channel_shuffle", ((2, 12, 3),), lambda t, told: F.channel_shuffle(t[0], told.groups), Told(3)),
    Case("glu", "halves", ((3, 8),), lambda t, _: F.glu(t[0], 1)),
    Case("pixel shuffle", "pixel_shuffle", ((2, 12, 3, 3),), lambda t, _: F.pixel_shuffle(t[0], 2)),
    Case("pixel unshuffle", "pixel_unshuffle", ((2, 5, 4, 4),), lambda t, _: F.pixel_unshuffle(t[0], 2)),
    Case("unfold", "im2col", ((2, 5, 4, 4),), lambda t, _: F.unfold(t[0], 2)),
    Case("fold", "col2im", ((2, 20, 9),), lambda t, _: F.fold(t[0], (4, 4), 2)),
    Case("embedding", "embedding", ((5, 6),), lambda t, _: F.embedding(PAIRS, t[0])),
    Case("reflection pad", "spatial1d", ((2, 6, 4),), lambda t, _: F.pad(t[0], (1, 1), mode="reflect")),
    Case("max pool", "spatial2d", ((2, 6, 4, 4),), lambda t, _: F.max_pool2d(t[0], 2)),
    Case("bilinear", "spatial2d", ((2, 6, 4, 4),), lambda t, _: F.interpolate(t[0], scale_factor=2.0, mode="bilinear")),
    Case("average pool", "spatial3d", ((2, 6, 4, 4, 4),), lambda t, _: F.avg_pool3d(t[0], 2)),
    Case("grid sample", "grid_sample", ((2, 6, 4, 4),), lambda t, _: F.grid_sample(t[0], GRID, align_corners=False)),
    Case("roi align", "roi_align", ((2, 6, 5, 5),), lambda t, _: roi_align(t[0], BOX, 2)),
    Case("where", "pointwise", ((2, 6, 4), (6, 1), (1,)), lambda t, _: torch.lerp(*t)),
    Case("gelu", "pointwise", ((2, 6),), lambda t, _: F.gelu(t[0])),
    Case("view that merges", "view", ((2, 3, 4),), lambda t, told: t[0].view(told.shapes[0]), Told(shapes=((2, 12),))),
    Case("view that cuts", "view", ((12, 5),), lambda t, told: t[0].view(told.shapes[0]), Told(shapes=((3, 4, 5),))),
    Case("view across", "view", ((6, 4),), lambda t, told: t[0].view(told.shapes[0]), Told(shapes=((2, 12),))),
    Case("permute", "permute", ((2, 3, 4),), lambda t, _: t[0].permute(2, 0, 1)),
    Case("expand", "expand", ((5, 1),), lambda t, _: t[0].expand(2, -1, 3)),
    Case("repeat", "repeat", ((5, 3, 1),), lambda t, _: t[0].repeat(2, 1, 3, 4)),
    Case("concat", "concat", ((2, 3, 4), (2, 5, 4), (2, 3, 4)), lambda t, _: torch.cat(t, 1)),
    Case("stack", "stack", ((3, 4), (3, 4)), lambda t, _: torch.stack(t, 1)),
    Case(
        "split",
        "take_apart",
        ((9, 2),),
        lambda t, told: torch.split(t[0], [s[0] for s in told.shapes]),
        Told(shapes=((2, 2), (4, 2), (3, 2))),
    ),
    Case("slice", "take_apart", ((3, 9),), lambda t, told: t[0].narrow(1, told.start, told.shapes[0][1]), Told(start=2, shapes=((3, 5),))),
    Case("slice with a step", "take_apart", ((3, 9),), lambda t, _: t[0][:, ::2]),
    Case("pad", "pad", ((4, 5),), lambda t, _: F.pad(t[0], (2, 1, 0, 3))),
    Case("negative pad", "pad", ((4, 8),), lambda t, _: F.pad(t[0], (-2, 1))),
    Case("sum", "along", ((3, 4, 5),), lambda t, _: t[0].sum(1)),
    Case("mean", "along", ((3, 4, 5),), lambda t, _: t[0].mean((0, 2), keepdim=True), mixed=True),
    Case("softmax", "along", ((3, 4),), lambda t, _: t[0].softmax(1), mixed=True),
    Case("flip", "along", ((3, 4),), lambda t, _: t[0].flip(1)),
    Case("roll", "along", ((3, 4),), lambda t, _: t[0].roll(1, 0)),
    Case("select", "along", ((3, 4),), lambda t, _: t[0].select(0, 1)),
    Case("unbind", "along", ((3, 4),), lambda t, _: t[0].unbind(0)),
    Case("index", "along", ((4, 5),), lambda t, _: t[0][PAIRS[0]]),
    Case("index in between", "along", ((3, 4, 5),), lambda t, _: t[0][:, PAIRS]),
    Case("indices apart", "along", ((3, 4, 5),), lambda t, _: t[0][PAIRS[0], :, PAIRS[1]]),
    Case("boolean mask", "along", ((3, 4, 5),), lambda t, _: t[0][:, MASK]),
    Case("index put", "put", ((4, 5), (2, 5)), lambda t, _: torch.index_put(t[0], [PAIRS[0]], t[1])),
    Case("boolean mask put", "put", ((3, 4, 5), (5,)), lambda t, _: masked_put(*t)),
    Case("top k", "along", ((3, 4),), lambda t, _: t[0].topk(2, 1)[0]),
    Case("zeros", "filled", ((4, 5),), lambda t, told: t[0] + torch.zeros(told.shapes[0], dtype=torch.float64), Told(shapes=((4, 5),))),
    Case("gather", "gather", ((3, 4, 5), (3, 2, 5)), lambda t, _: t[0].gather(1, (t[1] > 0.7).long())),
    Case("gather a part", "gather", ((3, 4, 5), (2, 2, 5)), lambda t, _: t[0].gather(1, (t[1] > 0.7).long())),
    Case("arange", "fresh", (), lambda t, _: torch.arange(4, dtype=torch.float64), cut=False),
    Case("inverse", "unknown", ((4, 4),), lambda t, _: torch.linalg.inv_ex(t[0])[0], cut=False),
]


def masked_attention(t: list[Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(*t[:3], attn_mask=t[3].detach(), scale=0.4)


def lstm_layer(*t: Tensor) -> Tensor:
    """The fused kernel is there in single precision only; what it answers is rounded to what that can tell apart."""
    t = tuple(x.float() for x in t)
    out = aten.mkldnn_rnn_layer(*t, False, [], 2, t[5].shape[1], 1, True, False, False, False)[0]
    return (out.double() * 1e4).round()


def masked_put(x: Tensor, values: Tensor) -> Tensor:
    x = x.clone()
    x[:, MASK] = values
    return x


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_cut_operands_give_the_cut_result(case: Case) -> None:
    coupling, graph = coupled(case)
    assert case.rule in [op.rule for op in graph.ops]
    rng = np.random.default_rng(0)
    removed = False
    for _ in range(8):
        masks = some(coupling, lambda a: not a.mixed, rng)
        removed = removed or bool(masks)
        for made, wanted in zip(*run(case, coupling, graph, masks), strict=True):
            assert made.shape == wanted.shape
            torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)
    assert removed == case.cut


@pytest.mark.parametrize("case", [c for c in CASES if c.mixed], ids=lambda c: c.name)
def test_cutting_a_mixed_axis_changes_what_is_kept(case: Case) -> None:
    coupling, graph = coupled(case)
    masks = some(coupling, lambda a: a.mixed, np.random.default_rng(0))
    assert masks
    made, wanted = run(case, coupling, graph, masks)
    assert made[0].shape == wanted[0].shape
    assert (made[0] - wanted[0]).abs().max() > 1e-6


KERAS = {
    "conv_kernel_first",
    "conv_transpose_kernel_first",
    "depthwise_conv",
    "dense",
    "einsum",
    "attention_heads",
    "spatial_first",
    "spatial_last",
}


def test_every_rule_is_run() -> None:
    assert {c.rule for c in CASES} == (LINES.keys() | SHAPE_RULES.keys()) - KERAS  # those are run in tests/keras3/test_layers.py


def test_no_case_mixes_unsaid() -> None:
    for case in CASES:
        coupling, _ = coupled(case)
        assert case.mixed == any(a.mixed for d in coupling.dims for axis in d for a in atoms(axis)), case.name
