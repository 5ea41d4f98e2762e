"""Run the recorded ops again on other tensors: in double precision, and along chosen axes at the planned sizes.

The oracle of verification. It runs the *dense* program, never the pruned model's code: wherever an op sums over an axis, the removed
indices are taken out of the sum; where an op mixes an axis (a norm, a softmax, a mean), that op alone runs on the kept indices and its
result is put back with NaN at the removed ones, so that anything that reads a removed index shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from coppice.axes import Axis, Form, atoms, chosen, find
from coppice.coupling import Coupling, Mask, keep_mask
from coppice.graph import Kind, Op
from coppice.torch.aten import Ref, base_name
from coppice.torch.capture import Replayable, default_double, in_double, quiet_eval
from coppice.torch.decisions import Decision, decide
from coppice.torch.trees import leaves, mapped_only, named_tensors, tensors_in


def _at_new_sizes(name: str, args: tuple[Any, ...], groups: int) -> tuple[Any, ...]:
    """The call's arguments for operands that got narrower: the ops that mix and are told a size have it set to what is there now."""
    if name in ("native_layer_norm", "_fused_rms_norm"):
        return (args[0], list(args[0].shape[-len(args[1]) :]), *args[2:])
    if name == "native_group_norm":
        x, weight, bias, n, _, hw, _, eps = args
        return (x, weight, bias, n, x.shape[1], hw, groups, eps)
    if name == "mkldnn_rnn_layer":
        return (*args[:10], args[5].shape[-1], *args[11:])
    return args


def _lstm_layer(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, h: Tensor, c: Tensor, reverse: bool, *_: Any) -> Any:
    """The fused kernel knows no double precision."""
    x = x.flip(0) if reverse else x
    out, h, c = torch._VF.lstm(x, (h[None], c[None]), (w_ih, w_hh, b_ih, b_hh), True, 1, 0.0, False, False, False)
    return out.flip(0) if reverse else out, h[0], c[0]


IN_DOUBLE: dict[str, Callable[..., Any]] = {"mkldnn_rnn_layer": _lstm_layer}


class Replay:
    """One run of the dense program with the indices outside ``keep`` (atom -> mask) out of effect. ``run`` answers every output.

    ``numbers`` replace constants (value id -> tensor) that the code made of sizes. ``model`` must be a copy that may be written to, as the
    program's own in-place ops do.
    """

    def __init__(
        self,
        coupling: Coupling,
        model: nn.Module,
        inputs: tuple[Any, ...],
        keep: Mapping[Axis, Mask],
        numbers: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.coupling, self.keep = coupling, keep
        self.env: dict[int, Tensor] = {}
        graph = coupling.graph
        named = named_tensors(model)
        for value in graph.weights():
            self.env[value.id] = in_double(named[value.names[0]])
        self.env.update({k: in_double(v).clone() for k, v in {**graph.origin.constants, **(numbers or {})}.items()})
        for k, tensor in zip(graph.inputs, (t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)), strict=True):
            self.env[k] = in_double(tensor).clone()
        self._last_use = self._lifetimes()

    def _lifetimes(self) -> dict[int, list[int]]:
        last: dict[int, int] = {}
        for k, op in enumerate(self.coupling.graph.ops):
            last.update({ref.id: k for ref in leaves(Ref, (op.call.args, op.call.kwargs))})
        keep = set(self.coupling.graph.outputs)
        ends: dict[int, list[int]] = {}
        for value, k in last.items():
            if value not in keep and self.coupling.graph.values[value].kind is Kind.INTERMEDIATE:
                ends.setdefault(k, []).append(value)
        return ends

    def run(
        self, scalars: Mapping[int, Replayable] | None = None, watch: Callable[[int, list[Tensor]], None] | None = None
    ) -> list[Tensor]:
        """The graph's outputs. ``scalars``: calls of the pruned model whose numbers (a mean's divisor, an attention's scale) replace the
        dense ones; ``watch(op index, results)`` sees every op's results, restricted to the kept indices.
        """
        with quiet_eval(self.coupling.graph.origin.model), default_double():
            for k, op in enumerate(self.coupling.graph.ops):
                call = (scalars or {}).get(k, op.call)
                outs = self._step(op, k, op.call if call is op.call else _with_numbers(op.call, call))
                if watch is not None:
                    watch(k, [self.kept(v, t) for v, t in zip(op.outputs, outs, strict=True)])
                for value in self._last_use.get(k, ()):
                    self.env.pop(value, None)
        return [self.env[v] for v in self.coupling.graph.outputs]

    def _step(self, op: Op, index: int, call: Replayable) -> list[Tensor]:
        info = self.coupling.ops[index]
        if any(self._cut(a) for axis in info.mixes for a in atoms(axis)):
            outs = self._on_kept(op, index, call)
        else:
            masked: dict[int | None, list[int]] = {}
            for k, dim in info.contracted:
                masked.setdefault(op.inputs[k], []).append(dim)
            outs = tensors_in(self._call(call, lambda ref: self._masked(ref, masked)))
        for value, tensor in zip(op.outputs, outs, strict=True):
            self.env[value] = tensor
        return outs

    def _call(self, call: Replayable, get: Callable[[Ref], Tensor]) -> Any:
        args, kwargs = mapped_only(Ref, get, (in_double(call.args), in_double(call.kwargs)))
        if call.decision is not None:
            given = Decision(call.decision.op, in_double(call.decision.answer))
            return decide(call.func, args, kwargs, given)[0]
        func = (
            torch.ops.aten.reshape.default if call.func is torch.ops.aten.view.default else call.func
        )  # a masked operand may have other strides
        return IN_DOUBLE.get(base_name(func), func)(*args, **kwargs)

    def _masked(self, ref: Ref, masked: Mapping[int | None, list[int]]) -> Tensor:
        tensor = self.env[ref.id]
        for dim in masked.get(ref.id, ()):
            mask = keep_mask(self.coupling.dims[ref.id][dim], self.keep)
            if not mask.all():
                shape = [1] * tensor.dim()
                shape[dim] = -1
                tensor = torch.where(torch.from_numpy(mask).view(shape), tensor, torch.zeros((), dtype=tensor.dtype))
        return tensor

    def _on_kept(self, op: Op, index: int, call: Replayable) -> list[Tensor]:
        """Run the op on the kept indices only, at the sizes that these have, and put the result back among NaN."""
        args, kwargs = mapped_only(Ref, lambda r: self.kept(r.id, self.env[r.id]), (in_double(call.args), in_double(call.kwargs)))
        groups = self.coupling.ops[index].letters.get("g")
        args = _at_new_sizes(base_name(call.func), args, 0 if groups is None else int(keep_mask(groups, self.keep).sum()))
        small = tensors_in(IN_DOUBLE.get(base_name(call.func), call.func)(*args, **kwargs))
        return [self._scatter(v, t) for v, t in zip(op.outputs, small, strict=True)]

    def _cut(self, atom: Axis) -> bool:
        mask = self.keep.get(find(atom))
        return mask is not None and not mask.all()

    def kept(self, value: int, tensor: Tensor) -> Tensor:
        """``tensor`` (dense value ``value``) restricted to the indices that stay."""
        return self._kept(self.coupling.dims[value], tensor)

    def _kept(self, dims: Sequence[Axis], tensor: Tensor) -> Tensor:
        chooser = next((found.chooser for found in map(find, dims) if found.form is Form.CHOICE), None)
        if chooser is not None:  # index by index of the dim that chooses
            at = next(k for k, axis in enumerate(dims) if axis is chooser)
            rest = [[chosen(axis, k) for axis in (*dims[:at], *dims[at + 1 :])] for k in range(tensor.shape[at])]
            return torch.stack([self._kept(own, part) for own, part in zip(rest, tensor.unbind(at), strict=True)], at)
        for dim, axis in enumerate(dims):
            mask = keep_mask(axis, self.keep)
            if not mask.all():
                tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(mask)))
        return tensor

    def _scatter(self, value: int, small: Tensor) -> Tensor:
        dims = self.coupling.dims[value]
        shape = [find(a).size for a in dims]
        blank = float("nan") if small.is_floating_point() else 0
        out = torch.full(shape, blank, dtype=small.dtype)
        if list(small.shape) != [int(keep_mask(a, self.keep).sum()) for a in dims]:
            return small  # statistics for the backward pass, of which the rule says nothing
        places = [torch.from_numpy(np.flatnonzero(keep_mask(a, self.keep))) for a in dims]
        return out.index_put(torch.meshgrid(*places, indexing="ij"), small) if places else small


def _with_numbers(dense: Replayable, sliced: Replayable) -> Replayable:
    """``dense`` with the plain floats of ``sliced``: what the code computed from the new sizes."""

    def merge(a: Any, b: Any) -> Any:
        if isinstance(a, float) and isinstance(b, float):
            return b
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            return type(a)(merge(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict):
            return {k: merge(v, b.get(k, v)) for k, v in a.items()}
        return a

    return Replayable(dense.func, merge(dense.args, sliced.args), merge(dense.kwargs, sliced.kwargs), dense.decision)
