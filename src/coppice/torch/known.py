"""The attributes of PyTorch's own modules that hold sizes, one line an attribute: which dim of which parameter it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from coppice.axes import Axis, find, product_of
from coppice.coupling import Coupling
from coppice.torch.trees import modules_of


def bind_known_modules(model: nn.Module, coupling: Coupling) -> None:
    """PyTorch's own modules: which attribute is which dim of which parameter."""
    dims = {name: coupling.dims[v.id] for v in coupling.graph.weights() for name in v.names}
    graph_ops = (*coupling.graph.ops, *coupling.graph.training)
    ran = zip(graph_ops, (*coupling.ops, *coupling.training), strict=True)
    first_input: dict[str, tuple[Axis, ...]] = {}
    for op in graph_ops:
        if op.inputs and op.inputs[0] is not None:
            first_input.setdefault(op.module, coupling.dims[op.inputs[0]])
    groups = {op.module: info.letters.get("g") for op, info in ran if "g" in info.letters}
    for path, module in modules_of(model):
        bind = next((bind for kind, bind in KNOWN if isinstance(module, kind)), None)
        if bind is not None:
            prefix = f"{path}." if path else ""
            names = ("weight", "running_mean", "in_proj_weight", "weight_ih_l0", "weight_hh_l0")
            own = {name: dims[prefix + name] for name in names if prefix + name in dims}
            own["input"] = first_input.get(path, ())
            for attribute, axis in bind(own, groups.get(path)):
                _bind(coupling, module, path, attribute, axis)


def _bind(coupling: Coupling, module: nn.Module, path: str, attribute: str, axis: Axis) -> None:
    name, _, index = attribute.partition("[")
    value = getattr(module, name, None)
    if index and isinstance(value, (tuple, list)):
        k = int(index[:-1]) % len(value)
        coupling.sequences[path, name] = tuple(value)
        coupling.bindings[path, name, k] = axis
    elif value == find(axis).size:
        coupling.bindings[path, name, None] = axis


Known = Iterator[tuple[str, Axis]]
Dims = dict[str, tuple[Axis, ...]]


def _of_conv(dims: Dims, groups: Axis | None) -> Known:
    if groups is not None and "weight" in dims:
        yield "groups", groups
        yield "out_channels", dims["weight"][0]
        yield "in_channels", product_of([groups, dims["weight"][1]])


def _of_transposed_conv(dims: Dims, groups: Axis | None) -> Known:
    if groups is not None and "weight" in dims:
        yield "groups", groups
        yield "in_channels", dims["weight"][0]
        yield "out_channels", product_of([groups, dims["weight"][1]])


def _of_linear(dims: Dims, groups: Axis | None) -> Known:
    if "weight" in dims:
        yield "out_features", dims["weight"][0]
        yield "in_features", dims["weight"][1]


def _of_batch_norm(dims: Dims, groups: Axis | None) -> Known:
    for axis in dims.get("weight", dims.get("running_mean", dims["input"][1:]))[:1]:
        yield "num_features", axis


def _of_layer_norm(dims: Dims, groups: Axis | None) -> Known:
    for k, axis in enumerate(dims.get("weight", ())):
        yield f"normalized_shape[{k}]", axis


def _of_group_norm(dims: Dims, groups: Axis | None) -> Known:
    if "weight" in dims:
        yield "num_channels", dims["weight"][0]
    if groups is not None:
        yield "num_groups", groups


def _of_embedding(dims: Dims, groups: Axis | None) -> Known:
    if "weight" in dims:
        yield "embedding_dim", dims["weight"][1]


def _of_attention(dims: Dims, groups: Axis | None) -> Known:
    if "in_proj_weight" in dims:
        for attribute in ("embed_dim", "kdim", "vdim"):
            yield attribute, dims["in_proj_weight"][1]


def _of_recurrent(dims: Dims, groups: Axis | None) -> Known:
    if "weight_ih_l0" in dims:
        yield "input_size", dims["weight_ih_l0"][1]
        yield "hidden_size", dims["weight_hh_l0"][1]


KNOWN: tuple[tuple[type[nn.Module], Callable[[Dims, Axis | None], Known]], ...] = (
    (nn.modules.conv._ConvTransposeNd, _of_transposed_conv),
    (nn.modules.conv._ConvNd, _of_conv),
    (nn.Linear, _of_linear),
    (nn.modules.batchnorm._NormBase, _of_batch_norm),
    (nn.LayerNorm, _of_layer_norm),
    (nn.RMSNorm, _of_layer_norm),
    (nn.GroupNorm, _of_group_norm),
    (nn.Embedding, _of_embedding),
    (nn.MultiheadAttention, _of_attention),
    (nn.RNNBase, _of_recurrent),
)
