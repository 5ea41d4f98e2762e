"""ATen ops in the vocabulary of ``coppice.rules``: the one table that knows PyTorch's op names.

Each line maps an op (without its overload and in-place underscore) to a function of the call's arguments by schema name; it answers
``(rule, operands, attributes)``. Pointwise ops come by PyTorch's own tag. Whatever is in neither is ``unknown`` and gets pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from coppice.movement import PICKED

Operands = list["Ref | None"]
Translation = tuple[str, Operands, dict[str, Any]]


@dataclass(slots=True)  # a frozen one takes three times as long to make, and an op makes several
class Ref:
    """Stands for a tensor among the recorded arguments: the id of its value, and its shape. Not to be changed."""

    id: int
    shape: tuple[int, ...]
    boolean: bool = False


@dataclass(slots=True)
class Call:
    """One recorded call: ``args`` by schema name (defaults filled in), tensors as :class:`Ref`; ``outs`` are its results."""

    args: dict[str, Any]
    outs: list[Ref]

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def x(self) -> Ref:
        return next(refs_in(list(self.args.values())))


def refs_in(tree: Any) -> Iterator[Ref]:
    """The refs in nested arguments, in order."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from refs_in(item)
    elif isinstance(tree, dict):
        yield from refs_in(list(tree.values()))


def _dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _dims(dims: Any, rank: int) -> list[int]:
    if dims is None or dims == []:
        return list(range(rank))
    return [_dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims)]


def _on_all(rule: str, **attrs: Any) -> Callable[[Call], Translation]:
    return lambda c: (rule, list(refs_in(list(c.args.values()))), attrs)


def _on(rule: str, *names: str) -> Callable[[Call], Translation]:
    return lambda c: (rule, [c[n] for n in names], {})


def _conv(c: Call) -> Translation:
    kernel = c["weight"].shape[2:]
    pointwise = {*kernel, *c["stride"]} == {1} and set(c["padding"]) == {0}  # each place for itself
    rule = "conv_transpose" if c["transposed"] else "pointwise_conv" if pointwise else "conv"
    window = {name: _each_dim(c[name], len(kernel)) for name in ("stride", "padding", "dilation")}
    return rule, [c["input"], c["weight"], c["bias"]], {"sizes": {"g": c["groups"]}, "window": window}


def _each_dim(sizes: Any, dims: int) -> tuple[int, ...]:
    return tuple(sizes) * (dims if len(sizes) == 1 else 1)


def _pool(c: Call) -> Translation:
    """``window`` as of a convolution; ``picks``: each result is one of the inputs."""
    kernel = _each_dim(c["kernel_size"], 2)
    window = {
        "kernel": kernel, "stride": _each_dim(c["stride"] or kernel, 2), "padding": _each_dim(c["padding"], 2),
        "dilation": _each_dim(c.args.get("dilation") or [1], 2),
    }  # fmt: skip
    return "spatial2d", [c["self"]], {"function": "pool", "window": window, "picks": "count_include_pad" not in c.args}


def _addmm(c: Call) -> Translation:
    bias = c["self"]
    if any(size != 1 for size in bias.shape[:-1]):
        return "unknown", list(refs_in(list(c.args.values()))), {"reason": "addmm with a matrix as bias"}
    return "mm", [c["mat1"], c["mat2"], bias], {}


def _layer_norm(c: Call) -> Translation:
    return "layer_norm", [c["input"], c["weight"], c["bias"]], {"dims": len(c["normalized_shape"])}


def _rms_norm(c: Call) -> Translation:
    return "layer_norm", [c["input"], c["weight"]], {"dims": len(c["normalized_shape"])}


def _group_norm(c: Call) -> Translation:
    return "group_norm", [c["input"], c["weight"], c["bias"]], {"sizes": {"g": c["group"]}}


def _attention(mask: str) -> Callable[[Call], Translation]:
    def translate(c: Call) -> Translation:
        operands = [c["query"], c["key"], c["value"], c.args.get(mask)]
        return "attention", operands, {"scaled": c["scale"] is not None}

    return translate


def _identity_map(c: Call) -> list[int]:
    return list(range(len(c.x.shape)))


def _mixing(name: str = "dim") -> Callable[[Call], Translation]:
    """Same shape in and out, mixing along one dim: softmax, cumsum, sort."""
    return lambda c: ("along", [c.x], {"map": _identity_map(c), "mixed": _dims(c[name], len(c.x.shape))})


def _reordering(name: str) -> Callable[[Call], Translation]:
    """Same shape in and out, indices moved along some dims: flip, roll."""

    def translate(c: Call) -> Translation:
        moved = _dims(c[name], len(c.x.shape))
        mapping = [None if k in moved else k for k in _identity_map(c)]
        return "along", [c.x], {"map": mapping, "reason": "its indices are reordered"}

    return translate


def _reduction(kind: str, name: str = "dim") -> Callable[[Call], Translation]:
    """``kind`` "summed": the removed index just drops out of the sum; "mixed": mean, max, var, ..."""

    def translate(c: Call) -> Translation:
        rank = len(c.x.shape)
        gone = _dims(c.args.get(name), rank)
        keep = bool(c.args.get("keepdim", False))
        mapping = [None if k in gone else k for k in range(rank) if keep or k not in gone]
        return "along", [c.x], {"map": mapping, kind: gone}

    return translate


def _picked(dim: int, shape: tuple[int, ...], indices: list[int]) -> dict[str, Any]:
    return {"map": [k for k in range(len(shape)) if k != dim], "picked": indices, "dim": dim, "reason": PICKED}


def _select(c: Call) -> Translation:
    dim = _dim(c["dim"], len(c.x.shape))
    return "along", [c.x], _picked(dim, c.x.shape, [c["index"] % c.x.shape[dim]])


def _unbind(c: Call) -> Translation:
    dim = _dim(c["dim"], len(c.x.shape))
    return "along", [c.x], _picked(dim, c.x.shape, list(range(c.x.shape[dim])))


def _take_apart(c: Call) -> Translation:
    rank = len(c.x.shape)
    start = c.args.get("start") or 0
    dim = _dim(c["dim"], rank)
    start = min(max(start + c.x.shape[dim] if start < 0 else start, 0), c.x.shape[dim])
    return "take_apart", [c.x], {"dim": dim, "start": start, "step": c.args.get("step", 1)}


def _cat(rule: str, extra: int) -> Callable[[Call], Translation]:
    def translate(c: Call) -> Translation:
        tensors = list(c["tensors"])
        rank = max(len(t.shape) for t in tensors) + extra
        return rule, tensors, {"dim": _dim(c["dim"], rank)}

    return translate


def _permute(order: Callable[[Call], list[int]]) -> Callable[[Call], Translation]:
    return lambda c: ("permute", [c.x], {"order": order(c)})


def _swap(c: Call) -> list[int]:
    order = _identity_map(c)
    if order:
        a, b = _dim(c["dim0"], len(order)), _dim(c["dim1"], len(order))
        order[a], order[b] = order[b], order[a]
    return order


def _pad(c: Call) -> Translation:
    amounts, rank = list(c["pad"]), len(c.x.shape)
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]
    return "pad", [c.x], {"pads": [(0, 0)] * (rank - len(pairs)) + pairs}


def _indexed(c: Call) -> list[int | None]:
    """For each dim of ``x[indices]`` the dim of x that it is, or None where the indices' own shape stands (in front, if not neighbours)."""
    rank = len(c.x.shape)
    used: list[int] = []
    dim = 0
    for index in c["indices"]:
        width = len(index.shape) if index is not None and index.boolean else 1
        if index is not None:
            used += range(dim, dim + width)
        dim += width
    if not used:
        return list(range(rank))
    new = max(1 if i.boolean else len(i.shape) for i in c["indices"] if i is not None)
    untouched = [k for k in range(rank) if k not in used]
    neighbours = used == list(range(used[0], used[-1] + 1))
    at = sum(k < used[0] for k in untouched) if neighbours else 0
    return [*untouched[:at], *[None] * new, *untouched[at:]]


def _index(c: Call) -> Translation:
    """Indexing by tensors: the dims indexed are replaced by the indices' own shape."""
    return "along", [c.x], {"map": _indexed(c), "reason": "picked from by an index tensor"}


def _index_put(c: Call) -> Translation:
    return "put", [c["self"], c["values"]], {"map": _indexed(c)}


def _index_select(c: Call) -> Translation:
    dim = _dim(c["dim"], len(c.x.shape))
    mapping = [None if k == dim else k for k in _identity_map(c)]
    return "along", [c.x], {"map": mapping, "reason": "picked from by an index tensor"}


def _unfold(c: Call) -> Translation:
    """Windows of one dim: how many there are, and, as the last dim, how long they are."""
    dim = _dim(c["dimension"], len(c.x.shape))
    mapping = [*(None if k == dim else k for k in _identity_map(c)), None]
    return "along", [c.x], {"map": mapping, "reason": "cut into windows"}


def _shuffle(rule: str, factor: str) -> Callable[[Call], Translation]:
    return lambda c: (rule, [c["self"]], {"factor": c[factor]})


def _lstm(c: Call) -> Translation:
    """One layer, one direction, of an LSTM: its four gates lie in its weights one after the other."""
    if c["mode"] != LSTM_MODE or c["batch_sizes"]:
        return "unknown", list(refs_in(list(c.args.values()))), {"reason": "a recurrent layer that is no plain LSTM"}
    operands = [c[name] for name in ("input", "weight0", "weight1", "weight2", "weight3", "hx_", "cx_")]
    return "lstm", operands, {"sizes": {"h": c["hidden_size"]}, "fixed": {"q": 4}}


def _batch_norm(c: Call) -> Translation:
    operands = [c["input"], c["weight"], c["bias"], c.args.get("running_mean"), c.args.get("running_var")]
    if c.args.get("training", False):
        return "batch_statistics", operands, {"rank": len(c.x.shape)}
    return "batch_norm", operands, {"eps": c.args.get("eps", c.args.get("epsilon"))}


LSTM_MODE = 2  # of cuDNN's numbering
Table = dict[str, Callable[[Call], Translation]]


def _each(names: str, translate: Callable[[Call], Translation]) -> Table:
    return dict.fromkeys(names.split(), translate)


TABLE: Table = {
    **_each("convolution _convolution", _conv),
    **_each("mm", _on("mm", "self", "mat2")),
    **_each("addmm", _addmm),
    **_each("bmm", _on("bmm", "self", "mat2")),
    **_each("mv", _on("mv", "self", "vec")),
    **_each("dot vdot", _on_all("dot")),
    **_each("_weight_norm_interface", lambda c: ("weight_norm", [c["v"], c["g"]], {"rank": len(c["v"].shape), "dim": c["dim"]})),
    **_each("baddbmm", _on("bmm", "batch1", "batch2", "self")),
    **_each(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm",
        _batch_norm,
    ),
    **_each("native_layer_norm", _layer_norm),
    **_each("_fused_rms_norm", _rms_norm),
    **_each("native_group_norm", _group_norm),
    **_each("_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable", _attention("attn_mask")),
    **_each("_scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention", _attention("attn_bias")),
    **_each("_scaled_dot_product_efficient_attention", _attention("attn_bias")),
    **_each("mkldnn_rnn_layer", _lstm),
    **_each("pixel_shuffle", _shuffle("pixel_shuffle", "upscale_factor")),
    **_each("pixel_unshuffle", _shuffle("pixel_unshuffle", "downscale_factor")),
    **_each("channel_shuffle native_channel_shuffle", lambda c: ("channel_shuffle", [c["self"]], {"sizes": {"g": c["groups"]}})),
    **_each("glu", lambda c: ("halves", [c["self"]], {"dim": _dim(c["dim"], len(c.x.shape))})),
    **_each("im2col", _on("im2col", "self")),
    **_each("col2im", _on("col2im", "self")),
    **_each("embedding", _on("embedding", "weight", "indices")),
    **_each("grid_sampler_2d grid_sampler_3d", _on("grid_sample", "input", "grid")),
    **_each("roi_align", _on("roi_align", "input", "rois")),
    **_each(
        "_adaptive_avg_pool2d adaptive_max_pool2d",
        lambda c: ("spatial2d", [c.x], {"function": "to a size"}),
    ),
    **_each(
        " upsample_nearest2d upsample_bilinear2d "
        "upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d",
        lambda c: ("spatial2d", [c.x], {}),
    ),
    **_each("max_pool2d_with_indices avg_pool2d", _pool),
    **_each(
        "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d",
        lambda c: ("spatial3d", [c.x], {}),
    ),
    **_each("upsample_nearest1d upsample_linear1d reflection_pad1d replication_pad1d", lambda c: ("spatial1d", [c.x], {})),
    **_each(
        "view _unsafe_view _reshape_alias unsqueeze squeeze view_copy _reshape_copy",
        lambda c: ("view", [c.x], {}),
    ),
    **_each("permute", _permute(lambda c: _dims(c["dims"], len(c.x.shape)))),
    **_each("transpose", _permute(_swap)),
    **_each("t", _permute(lambda c: _identity_map(c)[::-1])),
    **_each("expand", lambda c: ("expand", [c.x], {})),
    **_each("repeat", lambda c: ("repeat", [c.x], {}) if all(c.outs[0].shape) else ("unknown", [c.x], {"reason": "repeated no times"})),
    **_each("cat", _cat("concat", 0)),
    **_each("stack", _cat("stack", 1)),
    **_each("split split_with_sizes slice unsafe_split unsafe_split_with_sizes", _take_apart),
    **_each("select", _select),
    **_each("unbind", _unbind),
    **_each("constant_pad_nd", _pad),
    **_each("index _unsafe_index", _index),
    **_each("index_put _unsafe_index_put _index_put_impl", _index_put),
    **_each("index_select", _index_select),
    **_each("gather", lambda c: ("gather", [c["self"], c["index"]], {"dim": _dim(c["dim"], len(c.x.shape))})),
    **_each("unfold", _unfold),
    **_each("_softmax _log_softmax _safe_softmax cumsum cumprod", _mixing()),
    **_each("flip roll", _reordering("dims")),
    **_each("sort argsort topk", _reordering("dim")),
    **_each("sum", _reduction("summed")),
    **_each("mean amax amin max min var std var_mean std_mean logsumexp prod any all linalg_vector_norm norm", _reduction("mixed")),
    **_each(
        "zeros ones full empty scalar_tensor new_zeros new_ones new_full new_empty empty_strided",
        lambda c: ("filled", [], {}),
    ),
    **_each("arange rand randn randint randperm linspace eye", lambda c: ("fresh", [], {})),
    **_each("zeros_like ones_like full_like empty_like rand_like randn_like", lambda c: ("pointwise", [c.x], {})),
    **_each(
        "clone alias detach _to_copy lift_fresh lift copy native_dropout where masked_fill fill fill_ zero bernoulli "
        "_prelu_kernel hardswish rsub normal uniform _conj is_same_size heaviside clamp_min clamp_max lerp",
        _on_all("pointwise"),
    ),
}


@cache
def is_pointwise(func: Any) -> bool:
    """Whether PyTorch itself tags ``func``, or the functional form of an in-place op, as pointwise."""
    if torch.Tag.pointwise in func.tags:
        return True
    namespace, _, name = func._schema.name.partition("::")
    twin = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    return twin is not None and any(torch.Tag.pointwise in getattr(twin, o).tags for o in twin.overloads())


@cache
def is_made_of_others(func: Any) -> bool:
    """Whether PyTorch writes ``func`` in other ops (``linear``, ``reshape``). These show in inference mode; else they come taken apart."""
    composite: bool = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return composite and base_name(func) not in TABLE


@cache
def base_name(func: Any) -> str:
    """``aten.add_.Tensor`` -> ``add``; ``torchvision.roi_align.default`` -> ``roi_align``."""
    return str(func._schema.name.partition("::")[2].removesuffix("_"))


def _function(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """What the core knows of a pointwise op beyond its shape: ``clip`` is one that changes nothing when applied again."""
    if name == "add" and args.get("alpha", 1) == 1 and isinstance(args.get("other"), Ref):
        return {"function": "add"}
    if name == "mul" and isinstance(args.get("other"), Ref):
        return {"function": "multiply"}
    if name in ("relu", "hardtanh", "clamp"):
        return {"function": "clip", "bounds": (name, *(args.get(k) for k in ("min_val", "max_val", "min", "max")))}
    return {"function": "gate"} if name in ("sigmoid", "hardsigmoid") else {}


@cache
def _signature(func: Any) -> tuple[tuple[str, Any], ...]:
    """The arguments' names and defaults (None where there is none)."""
    return tuple((a.name, a.default_value if a.has_default_value() else None) for a in func._schema.arguments)


def by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What ``func`` was called with, by the names of its schema, defaults filled in."""
    signature, given = _signature(func), len(args)
    return {name: args[k] if k < given else kwargs.get(name, default) for k, (name, default) in enumerate(signature)}


def translate(func: Any, call: Call) -> Translation:
    """What ``call`` of ``func`` is in the vocabulary of the rules."""
    line = TABLE.get(base_name(func))
    if line is not None:
        return line(call)
    operands = list(refs_in(list(call.args.values())))
    if is_pointwise(func):
        return "pointwise", list(operands), _function(base_name(func), call.args)
    return "unknown", list(operands), {"reason": f"no rule for {func._schema.name.replace('::', '.')}"}
