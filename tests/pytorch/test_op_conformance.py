"""Every line of the ATen table, run: an index removed on both sides of an op's rule changes nothing else, whatever the shapes.

A row of ``ROWS`` calls the ops it names on operands of random sizes (``"b g*i x, g*o i 3"``: letters are drawn, numbers are not). A name of
``TABLE`` without a row fails the suite. Ops of other devices are translated on fake tensors.
`tests/test_rules.py` says in detail what each rule couples and mixes; here it is the mapping of arguments that is proved, op by op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torchvision  # noqa: F401  registers its ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from coppice.axes import atoms
from coppice.torch.aten import TABLE, base_name, is_pointwise
from coppice.torch.capture import Recorder
from cutting import Case, Told, coupled, run, some

aten = torch.ops.aten
attention = torch.nn.functional.scaled_dot_product_attention  # takes another kernel where queries and values differ in width
Op = Callable[..., Any]
SEEDS = range(3)


@dataclass(frozen=True)
class Row:
    """``call(op, operands, told)`` runs each op of ``names``; ``out`` are the shapes that it is told, ``g`` is a letter, its groups.

    ``cut``: whether there is an axis that may be cut; ``values``: whether equal operands give equal results (random numbers don't);
    ``even``: the op is told one size for several pieces, so that each loses as much.
    """

    names: str
    spec: str
    call: Callable[[Op, list[Tensor], Told], Any]
    out: str = ""
    start: int = 0
    cut: bool = True
    values: bool = True
    even: bool = False


def same(op: Op, t: list[Tensor], told: Told) -> Any:
    return op(*t)


def with_sizes(op: Op, t: list[Tensor], told: Told) -> Any:
    return op(t[0], told.shapes[0])


def conv(transposed: bool, *more: bool) -> Callable[[Op, list[Tensor], Told], Any]:
    rank = 2
    return lambda op, t, told: op(*t, [1] * rank, [1] * rank, [1] * rank, transposed, [0] * rank, told.groups, *more)


def resampled(*rest: Any) -> Callable[[Op, list[Tensor], Told], Any]:
    return lambda op, t, told: op(t[0], *rest)


def in_place(op: Op, t: list[Tensor], *rest: Any) -> Any:
    return op(t[0].clone(), *rest)


INDEX = torch.tensor([0, 1, 1])
PLACES = torch.tensor([0, 3, 1])
GRID = torch.linspace(-1, 1, 2 * 3 * 3 * 2, dtype=torch.float64).view(2, 3, 3, 2)
GRID3D = torch.linspace(-1, 1, 2 * 2 * 2 * 2 * 3, dtype=torch.float64).view(2, 2, 2, 2, 3)
BOX = torch.tensor([[0.0, 0, 0, 3, 3], [1, 1, 1, 4, 4]], dtype=torch.float64)


def lstm(op: Op, t: list[Tensor], told: Told) -> Any:
    """The fused kernel is there in single precision only; what it answers is rounded to what that can tell apart."""
    out = op(*(x.float() for x in t), True, [], 2, t[5].shape[1], 1, True, False, False, False)[0]
    return (out.double() * 1e4).round()


ROWS = [
    Row("mkldnn_rnn_layer", "t n i, 4*h i, 4*h h, 4*h, 4*h, n h, n h", lstm),
    Row("convolution", "b g*i 5 5, g*o i 3 3, g*o", conv(False)),
    Row("convolution", "b g*i 5 5, g*i o 3 3, g*o", conv(True)),
    Row("_convolution", "b g*i 5 5, g*o i 3 3, g*o", conv(False, False, False, False)),
    Row("mm", "a b, b c", same),
    Row("addmm", "c, a b, b c", same),
    Row("bmm", "n a b, n b c", same),
    Row("baddbmm", "n a c, n a b, n b c", same),
    Row("mv", "a b, b", same),
    Row("dot vdot", "a, a", same),
    Row("_weight_norm_interface", "a b 3, a 1 1", lambda op, t, _: op(*t, 0)[0]),
    Row("native_batch_norm _native_batch_norm_legit", "n c 3, c, c, c, c", lambda op, t, _: op(*t, False, 0.1, 1e-5)[0]),
    Row("_native_batch_norm_legit_no_training", "n c 3, c, c, c, c", lambda op, t, _: op(*t, 0.1, 1e-5)[0]),
    Row("native_layer_norm", "n a c, c, c", lambda op, t, _: op(t[0], t[1].shape, *t[1:], 1e-5)[0]),
    Row("_fused_rms_norm", "n a c, c", lambda op, t, _: op(t[0], t[1].shape, t[1], 1e-5)[0]),
    Row(
        "native_group_norm",
        "n g*c 3, g*c, g*c",
        lambda op, t, told: op(*t, t[0].shape[0], t[0].shape[1], 3, told.groups, 1e-5)[0],
    ),
    Row("_scaled_dot_product_flash_attention_for_cpu", "n h q d, n h k d, n h k d", lambda op, t, _: attention(*t, scale=0.4)),
    Row("_scaled_dot_product_flash_attention_for_cpu", "n h q d, n h k d, n h k d", lambda op, t, _: attention(*t)),
    Row(
        "_scaled_dot_product_flash_attention_for_cpu",
        "n h q d, n h k d, n h k d, n h q k",
        lambda op, t, _: attention(*t[:3], attn_mask=t[3].detach(), scale=0.4),
    ),
    Row("pixel_shuffle", "n c*4 2 3", lambda op, t, _: op(t[0], 2)),
    Row("pixel_unshuffle", "n c 4 2", lambda op, t, _: op(t[0], 2)),
    Row("channel_shuffle native_channel_shuffle", "n g*c 2 3", lambda op, t, told: op(t[0], told.groups)),
    Row("glu", "n c*2 3", lambda op, t, _: op(t[0], 1)),
    Row("im2col", "n c 4 4", lambda op, t, _: op(t[0], [2, 2], [1, 1], [0, 0], [1, 1])),
    Row("col2im", "n c*4 9", lambda op, t, _: op(t[0], [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])),
    Row("embedding", "5 c", lambda op, t, _: op(t[0], INDEX)),
    Row("grid_sampler_2d", "2 c 4 4", lambda op, t, _: op(t[0], GRID, 0, 0, False)),
    Row("grid_sampler_3d", "2 c 4 4 4", lambda op, t, _: op(t[0], GRID3D, 0, 0, False)),
    Row("roi_align", "2 c 5 5", lambda op, t, _: op(t[0], BOX, 1.0, 2, 2, -1, False)),
    Row("max_pool2d_with_indices", "n c 4 4", lambda op, t, _: op(t[0], [2, 2])[0]),
    Row("avg_pool2d", "n c 4 4", resampled([2, 2])),
    Row("_adaptive_avg_pool2d", "n c 4 5", resampled([2, 3])),
    Row("adaptive_max_pool2d", "n c 4 5", lambda op, t, _: op(t[0], [2, 3])[0]),
    Row("upsample_nearest2d _upsample_nearest_exact2d", "n c 3 4", resampled([6, 8])),
    Row(
        "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        "n c 3 4",
        resampled([6, 8], False),
    ),
    Row("reflection_pad2d replication_pad2d", "n c 3 4", resampled([1, 1, 2, 1])),
    Row("max_pool3d_with_indices", "n c 4 4 4", lambda op, t, _: op(t[0], [2, 2, 2])[0]),
    Row("avg_pool3d", "n c 4 4 4", resampled([2, 2, 2])),
    Row("_adaptive_avg_pool3d", "n c 4 4 4", resampled([2, 3, 1])),
    Row("adaptive_max_pool3d", "n c 4 4 4", lambda op, t, _: op(t[0], [2, 3, 1])[0]),
    Row("upsample_nearest3d", "n c 2 3 2", resampled([4, 6, 4])),
    Row("upsample_trilinear3d", "n c 2 3 2", resampled([4, 6, 4], False)),
    Row("upsample_nearest1d", "n c 3", resampled([6])),
    Row("upsample_linear1d", "n c 3", resampled([6], False)),
    Row("reflection_pad1d replication_pad1d", "n c 4", resampled([1, 2])),
    Row("view _unsafe_view view_copy", "a b c", with_sizes, out="a b*c"),
    Row("view _unsafe_view view_copy", "a*b c", with_sizes, out="a b c"),
    Row("_reshape_alias", "a b c", lambda op, t, told: op(t[0], told.shapes[0], t[0].new_empty(told.shapes[0]).stride()), out="a b*c"),
    Row("_reshape_copy", "a b c", with_sizes, out="a*b c"),
    Row("unsqueeze", "a b", lambda op, t, _: op(t[0], 1)),
    Row("squeeze", "a 1 b", lambda op, t, _: op(t[0], 1)),
    Row("permute", "a b c", lambda op, t, _: op(t[0], [-1, 0, 1])),
    Row("transpose", "a b c", lambda op, t, _: op(t[0], 0, -1)),
    Row("t", "a b", same),
    Row("expand", "a 1 c", lambda op, t, _: op(t[0], [2, -1, 3, -1])),
    Row("repeat", "a 1 c", lambda op, t, _: op(t[0], [2, 1, 3, 2])),
    Row("cat", "a b, a c, a b", lambda op, t, _: op(t, -1)),
    Row("stack", "a b, a b", lambda op, t, _: op(t, -1)),
    Row("split unsafe_split", "a*3 b", lambda op, t, told: op(t[0], told.shapes[0][0]), out="a b, a b, a b", even=True),
    Row(
        "split_with_sizes unsafe_split_with_sizes",
        "2+a+b c",
        lambda op, t, told: op(t[0], [s[0] for s in told.shapes], 0),
        out="2 c, a c, b c",
    ),
    Row("slice", "c 4+a", lambda op, t, told: op(t[0], -1, told.start, told.start + told.shapes[0][1]), out="c 3", start=1),
    Row("slice", "c 4+a", lambda op, t, told: op(t[0], 1, 1, None, 2)),
    Row("select", "a b", lambda op, t, _: op(t[0], 1, 0)),
    Row("unbind", "a b", lambda op, t, _: op(t[0], 1)),
    Row("constant_pad_nd", "a b", lambda op, t, _: op(t[0], [1, 2])),
    Row("index _unsafe_index", "a 3 b", lambda op, t, _: op(t[0], [None, INDEX])),
    Row("index_put _unsafe_index_put _index_put_impl", "a 4 b, a 3 b", lambda op, t, _: op(t[0], [None, PLACES], t[1])),
    Row("gather", "a 3 b, a 2 b", lambda op, t, _: op(t[0], 1, (t[1] > 0.7).long())),
    Row("index_select", "a 3 b", lambda op, t, _: op(t[0], 1, INDEX)),
    Row("unfold", "a 5 b", lambda op, t, _: op(t[0], 1, 3, 2)),
    Row("_softmax _log_softmax", "a b c", lambda op, t, _: op(t[0], 1, False)),
    Row("_safe_softmax cumsum cumprod", "a b c", lambda op, t, _: op(t[0], 1)),
    Row("flip", "a b c", lambda op, t, _: op(t[0], [1])),
    Row("roll", "a b c", lambda op, t, _: op(t[0], [1], [1])),
    Row("sort", "a b c", lambda op, t, _: op(t[0], 1)[0]),
    Row("topk", "a b c", lambda op, t, _: op(t[0], 2, 1)[0]),
    Row("argsort", "a b c", lambda op, t, _: op(t[0], 1)),
    Row("sum mean amax amin var std logsumexp", "a b c", lambda op, t, _: op(t[0], [1])),
    Row("sum mean amax amin logsumexp", "a b c", lambda op, t, _: op(t[0], [0, -1], True)),
    Row("max min", "a b c", lambda op, t, _: op(t[0], 1)[0]),
    Row("prod any all", "a b c", lambda op, t, _: op(t[0], 1)),
    Row("var_mean std_mean", "a b c", lambda op, t, _: op(t[0], [1], correction=0)[0]),
    Row("linalg_vector_norm", "a b c", lambda op, t, _: op(t[0], 2, [1])),
    Row("norm", "a b c", lambda op, t, _: op(t[0], 2, [1])),
    Row("zeros ones empty rand randn", "", lambda op, t, _: op([3, 4]), cut=False, values=False),
    Row("full", "", lambda op, t, _: op([3, 4], 1.0), cut=False),
    Row("randint", "", lambda op, t, _: op(3, [3, 4]), cut=False, values=False),
    Row("randperm", "", lambda op, t, _: op(4), cut=False, values=False),
    Row("arange eye", "", lambda op, t, _: op(4), cut=False),
    Row("linspace", "", lambda op, t, _: op(0, 1, 4), cut=False),
    Row("scalar_tensor", "", lambda op, t, _: op(4.0), cut=False),
    Row("empty_strided", "", lambda op, t, _: op([3, 4], [4, 1]), cut=False, values=False),
    Row("new_zeros new_ones new_empty", "a b", lambda op, t, _: op(t[0], [3, 4]), cut=False, values=False),
    Row("new_full", "a b", lambda op, t, _: op(t[0], [3, 4], 2.0), cut=False),
    Row("zeros_like ones_like", "a b", same),
    Row("empty_like rand_like randn_like bernoulli", "a b", same, values=False),
    Row("full_like fill", "a b", lambda op, t, _: op(t[0], 2.0)),
    Row("fill_ zero", "a b", lambda op, t, _: in_place(aten.zero_, t) if op is aten.zero else in_place(op, t, 2.0)),
    Row("clone alias detach _to_copy lift_fresh lift hardswish", "a b", same),
    Row("copy", "a b, b", lambda op, t, _: in_place(aten.copy_, t, t[1])),
    Row("_conj", "a b", lambda op, t, _: op(t[0].to(torch.complex128))),
    Row("native_dropout", "a b", lambda op, t, _: op(t[0], 0.5, False)[0]),
    Row("where", "a b, b, a 1", lambda op, t, _: op(t[0] > 0.7, t[1], t[2])),
    Row("masked_fill", "a b, b", lambda op, t, _: op(t[0], t[1] > 0.7, -1.0)),
    Row("_prelu_kernel", "a b c, b 1", same),
    Row("rsub heaviside clamp_min clamp_max", "a b, a b", same),
    Row("is_same_size", "a b, a b", lambda op, t, _: (op(*t), t[0] * 2)[1]),
    Row("lerp", "a b c, b 1, 1", same),
    Row("normal uniform", "a b", lambda op, t, _: in_place(getattr(aten, op.__name__ + "_"), t), values=False),
]

# Ops that no CPU runs, on fake tensors of a device that does: their rule, their operands, and a call. Above is an op of the same rule.
QKV = ((2, 4, 8, 16),) * 3
ELSEWHERE: Mapping[str, tuple[str, tuple[tuple[int, ...], ...], Callable[[Op, list[Tensor]], Any]]] = {
    "cudnn_batch_norm": ("batch_norm", ((2, 6, 3, 3), (6,), (6,), (6,), (6,)), lambda op, t: op(*t, False, 0.1, 1e-5)),
    "_scaled_dot_product_flash_attention": ("attention", QKV, lambda op, t: op(*t)),
    "_scaled_dot_product_cudnn_attention": ("attention", QKV, lambda op, t: op(*t, None, False)),
    "_scaled_dot_product_efficient_attention": ("attention", QKV, lambda op, t: op(*t, None, False)),
    "_scaled_dot_product_fused_attention_overrideable": ("attention", QKV, lambda op, t: op(*t)),
}


def op_named(name: str) -> Op:
    """ATen's op of that name, the in-place one where there is no other, or torchvision's."""
    found = next((getattr(space, n) for space in (aten, torch.ops.torchvision) for n in (name, name + "_") if hasattr(space, n)), None)
    assert found is not None, f"PyTorch has no op {name}: its line of the table is dead"
    return found  # type: ignore[no-any-return]


def is_composite(op: Any) -> bool:
    """Whether any overload is written in other ops."""
    found = False
    for name in op.overloads():
        with suppress(RuntimeError):  # some overloads only exist in TorchScript
            found |= torch._C._dispatch_has_kernel_for_dispatch_key(getattr(op, name).name(), "CompositeImplicitAutograd")
    return found


def shapes_of(spec: str, sizes: dict[str, int], rng: np.random.Generator) -> tuple[tuple[int, ...], ...]:
    """``"a g*c 3, 2+a"`` with a size from 2 to 5 for each letter."""

    def size(text: str) -> int:
        if "+" in text:
            return sum(map(size, text.split("+")))
        if "*" in text:
            return math.prod(map(size, text.split("*")))
        return int(text) if text.isdigit() else sizes.setdefault(text, int(rng.integers(2, 6)))

    return tuple(tuple(size(part) for part in shape.split()) for shape in spec.split(",") if spec)


def case(row: Row, name: str, seed: int) -> Case:
    sizes: dict[str, int] = {}
    rng = np.random.default_rng(seed)
    shapes, out = shapes_of(row.spec, sizes, rng), shapes_of(row.out, sizes, rng)
    op = op_named(name)
    return Case(name, "", shapes, reaching(name, lambda t, told: row.call(op, t, told)), Told(sizes.get("g", 1), row.start, out))


def reaching(name: str, call: Callable[[list[Tensor], Told], Any]) -> Callable[[list[Tensor], Told], Any]:
    """``call`` such that the recorder meets the op itself: ops made of others are taken apart before, except in inference mode."""
    if not is_composite(op_named(name)):
        return call

    def within(t: list[Tensor], told: Told) -> Any:
        with torch.inference_mode():
            return call(t, told)

    return within


NAMED = [(name, row) for row in ROWS for name in row.names.split()]


@pytest.mark.parametrize(("name", "row"), NAMED, ids=[f"{name}-{k}" for k, (name, _) in enumerate(NAMED)])
def test_an_index_removed_on_both_sides(name: str, row: Row) -> None:
    removed = False
    for seed in SEEDS:
        given = case(row, name, seed)
        coupling, graph = coupled(given)
        assert name in {base_name(op.call.func) for op in graph.ops} | {f"{base_name(op.call.func)}_" for op in graph.ops}
        assert not {op.rule for op in graph.ops} & {"unknown"}
        rng = np.random.default_rng(seed)
        masks = some(coupling, lambda a: not a.mixed, rng)
        if row.even:
            masks = {a: np.arange(a.size) != rng.integers(a.size) for a in masks}
        removed = removed or bool(masks)
        for made, wanted in zip(*run(given, coupling, graph, masks), strict=True):
            assert made.shape == wanted.shape
            if row.values:
                torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)
    mixes = any(a.mixed for dims in coupling.dims for axis in dims for a in atoms(axis))
    assert removed or mixes or not row.cut


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_op_of_another_device_is_its_rule(name: str) -> None:
    rule, shapes, call = ELSEWHERE[name]
    with FakeTensorMode():
        tensors = [torch.empty(s, device="cuda", dtype=torch.float16) for s in shapes]
        with Recorder(torch.nn.Module(), tuple(tensors)) as recorder:
            call(op_named(name), tensors)
    (op,) = recorder.ops
    assert op.rule == rule
    assert op.inputs[: len(shapes)] == recorder.input_ids
    assert set(op.inputs[len(shapes) :]) <= {None}


def test_every_line_of_the_table_is_run() -> None:
    assert {name for name, _ in NAMED} | ELSEWHERE.keys() == TABLE.keys()
    assert not {name for name, _ in NAMED} & ELSEWHERE.keys()


UNARY = torch.rand(4, 6, dtype=torch.float64) * 0.8 + 0.1  # in the domain of acos, log and erfinv
BINARY = torch.rand(4, 6, dtype=torch.float64) + 0.5


def tagged() -> list[Any]:
    """Every op of one or two tensors, and no other argument to give, that PyTorch tags as pointwise."""
    found = []
    for name in dir(aten):
        for overload in getattr(aten, name).overloads() if hasattr(getattr(aten, name), "overloads") else ():
            with suppress(RuntimeError):
                op = getattr(getattr(aten, name), overload)
                kinds = [str(a.type) for a in op._schema.arguments if not a.has_default_value()]
                out = any(a.is_out for a in op._schema.arguments) or op._schema.is_mutable
                if is_pointwise(op) and not out and kinds in (["Tensor"], ["Tensor", "Tensor"]):
                    found.append(op)
    return found


def test_what_is_tagged_pointwise_is() -> None:
    """PyTorch's tag is taken at its word: an index of the result depends on that index of the operands alone."""
    keep, run_ops = torch.tensor([0, 2, 3, 5]), 0
    for op in tagged():
        operands = [UNARY, BINARY][: len([a for a in op._schema.arguments if not a.has_default_value()])]
        try:
            whole = op(*operands)
        except (RuntimeError, NotImplementedError):  # of integers, or of another layout
            continue
        if not isinstance(whole, Tensor):
            continue
        made = op(*(t[:, keep] for t in operands))
        torch.testing.assert_close(made, whole[:, keep], rtol=1e-13, atol=0, equal_nan=True, msg=str(op))
        run_ops += 1
    assert run_ops > 80
