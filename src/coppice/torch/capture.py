"""Record the concrete ATen ops of one forward pass, with ``TorchDispatchMode``. Works on any eager model; the model is not changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.graph import Graph, Kind, ModuleCall, Op, Value
from coppice.linear import Model
from coppice.torch import shapes
from coppice.torch.aten import Call, Ref, by_name, translate
from coppice.torch.decisions import Decision, decide, decides
from coppice.torch.shapes import ShapeTensor, without_values
from coppice.torch.timed import Timed, timed
from coppice.torch.tracking import run_aside, shows, tracking_modules
from coppice.torch.trees import (
    PLAIN,
    buffers_of,
    hears_of_its_mode,
    mapped,
    mapped_only,
    modules_of,
    parameters_of,
    tensors_in,
    without_collection,
)

OTHER_WITHOUT_VALUES = {"aten::mkldnn_rnn_layer"}  # PyTorch answers more results on tensors without values

LOW = (torch.float16, torch.bfloat16, torch.float32)
OnOp = Callable[[Op, list[Tensor]], None]


class NoValuesError(Exception):
    """The code looks at values, of tensors that have none."""


@dataclass(slots=True)
class Origin:
    """The front-end's handle on a graph: the user's model, the inputs and the constants that it was recorded with."""

    model: nn.Module
    inputs: tuple[Any, ...]
    constants: dict[int, Tensor]
    ran: nn.Module  # the model as that pass left it: itself, or a copy without values
    again: bool = False  # recorded a second time, since the first forward pass was not like those after it

    @property
    def with_values(self) -> bool:
        """Whether the ops were computed, not only their shapes."""
        return self.ran is self.model

    def bind_sizes(self, coupling: Coupling) -> Graph | None:
        """Find out which attributes of the user's modules hold a width, and which widths the code ties or freezes.

        Where the recorded pass was not like those after it (modules that set something up when first called, code that goes another way on
        tensors without values), answers a new recording, with values.
        """
        from coppice.torch.known import bind_known_modules
        from coppice.torch.probes import agrees_at_once
        from coppice.torch.sizes import bind_sizes, check_training
        from coppice.torch.trial import Trials

        with without_collection():
            trials = Trials(coupling)
            bind_known_modules(self.model, coupling)
            if agrees_at_once(trials, coupling):
                check_training(trials, coupling)
                return None
            if trials.at_rest is not None and not self.again:
                graph = capture(self.model, self.inputs, values=True)
                graph.origin.again = self.with_values
                return graph
            bind_sizes(self.ran, trials, coupling)
        return None

    def parameters(self, model: nn.Module) -> dict[str, NDArray[Any]]:
        """Every parameter as a NumPy array."""
        return {name: p.detach().float().cpu().numpy() for name, p in parameters_of(modules_of(model)) if p.is_floating_point()}

    def gradients(
        self, model: nn.Module, batches: Iterable[Any], loss: Callable[..., Tensor] | None
    ) -> Iterator[dict[str, tuple[NDArray[Any], NDArray[Any]]]]:
        """For each batch, (weight, gradient) of every parameter that got one."""
        from coppice.torch.gradients import gradients

        return gradients(model, batches, loss)

    def synaptic_flow(self, model: nn.Module) -> dict[str, NDArray[Any]]:
        """SynFlow's saliency of every element, on inputs of ones in the shape of the example's."""
        from coppice.torch.gradients import synaptic_flow

        return synaptic_flow(model, self.inputs)

    def timed(self, coupling: Coupling) -> Timed:
        """The ops of the model that a latency table times."""
        return timed(coupling)

    def recorded(self, model: nn.Module, batches: Sequence[Any]) -> Model:
        """``model`` on these inputs, as the framework-free code sees it."""
        from coppice.torch.linear import Recorded

        return Recorded(model, batches)

    def activation_scores(self, model: nn.Module, coupling: Coupling, batches: Iterable[Tensor], statistic: str) -> dict[int, NDArray[Any]]:
        """A statistic (``coppice.activations``) of each index of each prunable axis."""
        from coppice.activations import activation_scores
        from coppice.torch.linear import recorded

        return activation_scores(*recorded(model, coupling, batches), coupling, statistic)

    def removal_losses(
        self,
        model: nn.Module,
        coupling: Coupling,
        batches: Iterable[Tensor],
        seed: int,
        orders: Mapping[int, Sequence[int]] | None = None,
    ) -> dict[int, NDArray[np.float64]]:
        """The loss that each index of each prunable axis adds when it goes, along the axis's path (``coppice.elimination``)."""
        from coppice.torch.elimination import removal_losses

        return removal_losses(model, coupling, batches, seed, orders)


@dataclass(slots=True)
class Replayable:
    """One ATen call with its tensors as :class:`Ref`, for running it again on other tensors."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    decision: Decision | None = None


class Recorder(TorchDispatchMode):
    """Writes down every op that runs inside the ``with`` block; ``on_op(op, results)`` is called after each.

    Given the ``decisions`` of an earlier run, what the code decides on values comes out as it did there. ``double``: where the code asks
    for a lower precision by name, it gets float64.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        on_op: OnOp | None = None,
        decisions: Sequence[Decision] | None = None,
        double: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.calls: list[ModuleCall] = []
        self.constants: dict[int, Tensor] = {}
        self.stack: list[str] = [""]
        known: dict[int, _Known] = {}
        self._known = known
        self._forget = lambda gone: known.pop(gone.key, None)
        self._keep: list[Tensor] = []
        self._on_op = on_op
        self._decisions = None if decisions is None else list(decisions)[::-1]
        self._double = double
        self.read: set[int] = set()  # the values that an op has read
        self.needs_values = False  # whether the code looked at values of tensors that have none
        modules = modules_of(model)
        for kind, named in ((Kind.PARAMETER, parameters_of(modules)), (Kind.BUFFER, buffers_of(modules))):
            for name, tensor in named:
                self._name(tensor, kind, name)
        self.weights = len(self.values)
        self.input_ids = tuple(self._new(t, Kind.INPUT).id for t in tree_flatten(inputs)[0] if isinstance(t, Tensor))
        self._from_data = {v.id for v in self.values if v.kind is not Kind.BUFFER}  # values that are no mere consequence of sizes

    def _new(self, tensor: Tensor, kind: Kind, names: tuple[str, ...] = ()) -> Ref:
        shape = tuple(tensor.shape)
        ref = Ref(len(self.values), shape, tensor.dtype in (torch.bool, torch.uint8))
        self.values.append(Value(ref.id, shape, kind, tensor.element_size(), names))
        known = self._known[id(tensor)] = _Known(tensor, self._forget)
        known.key, known.ref = id(tensor), ref
        return ref

    def _seen(self, tensor: Tensor) -> Ref | None:
        known = self._known.get(id(tensor))
        if known is None:
            return None
        ref = known.ref
        if ref.shape != tensor.shape:  # changed in place
            ref = known.ref = Ref(ref.id, tuple(tensor.shape), ref.boolean)
        return ref

    def _name(self, tensor: Tensor, kind: Kind, name: str) -> None:
        known = self._seen(tensor)
        if known is None:
            self._new(tensor, kind, (name,))
        else:
            self.values[known.id].names += (name,)

    def ref(self, tensor: Tensor) -> Ref:
        """The ref of ``tensor``; one never seen before is a constant that the code made outside any op."""
        known = self._seen(tensor)
        if known is None:
            known = self._new(tensor, Kind.CONSTANT)
            self.constants[known.id] = tensor.detach().clone()
            self._keep.append(tensor)
        return known

    def note_call(self, path: str, args: tuple[Any, ...], output: Any, first: int) -> None:
        """A module has run, from op ``first`` on."""
        returned = tuple(output) if isinstance(output, (tuple, list)) else (output,)
        inputs, outputs = (tuple([self._id(leaf) for leaf in some]) for some in (args, returned))
        self.calls.append(ModuleCall(path, inputs, outputs, isinstance(output, Tensor), first, len(self.ops)))

    def _id(self, leaf: Any) -> int | None:
        known = self._seen(leaf) if isinstance(leaf, Tensor) else None
        return None if known is None else known.id

    def _refs(self, leaf: Any, read: list[int]) -> Any:
        """``mapped(self.ref, leaf)``, which leaves what is no tensor; the values' ids are added to ``read``."""
        if isinstance(leaf, Tensor):
            ref = self.ref(leaf)
            read.append(ref.id)
            return ref
        if isinstance(leaf, (list, tuple)):
            if PLAIN.issuperset(map(type, leaf)):
                return leaf
            refs = [self._refs(item, read) for item in leaf]
            return refs if isinstance(leaf, list) else tuple(refs)
        return mapped(lambda item: self._refs(item, read), leaf) if isinstance(leaf, dict) else leaf

    def _need_values(self, name: str) -> NoReturn:
        """The recording says nothing, even if the user's code catches this."""
        self.needs_values = True
        raise NoValuesError(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not shows(func) and (result := run_aside(self, func, args, kwargs)) is not NotImplemented:
            return result
        name = func._schema.name
        if self._double:
            args, kwargs = mapped_only(torch.dtype, raised, (args, kwargs))
        ids: list[int] = []
        ref_args = tuple([self._refs(arg, ids) for arg in args])
        ref_kwargs = {key: self._refs(arg, ids) for key, arg in kwargs.items()} if kwargs else {}
        read = dict.fromkeys(ids)
        self.read.update(ids)
        from_data = not self._from_data.isdisjoint(read)
        without_values = ShapeTensor in types and self._decisions is None
        decision = None
        if from_data and decides(func, args):
            if without_values:
                self._need_values(name)
            given = self._decisions.pop() if self._decisions else None
            result, decision = decide(func, args, kwargs, given)
        elif without_values:
            try:
                result = ShapeTensor.__torch_dispatch__(func, types, args, kwargs)  # what PyTorch would come to, by a detour
            except Exception:
                self._need_values(name)
        else:
            result = func(*args, **kwargs)
        if self._double and name == "aten::lift_fresh":
            result = in_double(result)
        tensors = [result] if isinstance(result, Tensor) else tensors_in(result)
        if without_values and (name in OTHER_WITHOUT_VALUES or any(type(t) is not ShapeTensor for t in tensors)):
            self._need_values(name)  # else a tensor that has values would be written to, and not hold what it should
        outs = [self._seen(tensor) or self._new(tensor, Kind.INTERMEDIATE) for tensor in tensors]
        if from_data:
            self._from_data.update([o.id for o in outs])
        call = Call(by_name(func, ref_args, ref_kwargs), outs)
        rule, operands, attrs = translate(func, call)
        op = Op(
            rule,
            name.replace("::", "."),
            tuple(None if r is None else r.id for r in operands),
            tuple(o.id for o in outs),
            self.stack[-1],
            attrs,
            () if rule in ("fresh", "filled") else tuple(read.keys() - {r.id for r in operands if r is not None}),
            Replayable(func, ref_args, ref_kwargs, decision),
        )
        self.ops.append(op)
        if self._on_op is not None:
            self._on_op(op, tensors)
        return result


class _Known(weakref.ref[Tensor]):
    """The ref of a tensor, in a dict by the tensors' ``key`` that forgets those that die."""

    __slots__ = ("key", "ref")
    key: int
    ref: Ref


def raised(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in LOW else dtype


def in_double(tree: Any) -> Any:
    """Every floating tensor of ``tree`` in float64, every floating dtype as float64."""

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().double() if leaf.dtype in LOW else leaf.detach()
        return raised(leaf) if isinstance(leaf, torch.dtype) else leaf

    return mapped(change, tree)


@contextmanager
def default_double() -> Iterator[None]:
    """Tensors that the code makes without naming a precision are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def quiet_eval(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Eval mode without gradients and without attention's fused fast path (one opaque op); the model's flags are restored.

    ``training``: the user's own classes take their training branches; PyTorch's modules, and BatchNorms, do as in evaluation.
    """
    modules = modules_of(model)
    flags = [(m, m.training) for _, m in modules]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if hears_of_its_mode(modules) or any(was for _, was in flags):
        model.eval()
    for module, _ in flags if training else ():
        module.training = not (type(module).__module__.startswith("torch.") or isinstance(module, nn.modules.batchnorm._BatchNorm))
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, was in flags:
            if module.training != was:
                module.training = was


def record(
    model: nn.Module,
    inputs: tuple[Any, ...],
    on_op: OnOp | None = None,
    decisions: Sequence[Decision] | None = None,
    double: bool = False,
    training: bool = False,
) -> tuple[Recorder, Any, Exception | None]:
    """Run ``model(*inputs)`` under a :class:`Recorder`; answers the recorder, the model's output, and what the code raised, if it did."""
    with quiet_eval(model, training), default_double() if double else nullcontext():
        recorder = Recorder(model, inputs, on_op, decisions, double)
        try:
            with tracking_modules(model, recorder.stack, recorder), recorder:
                return recorder, model(*inputs), None
        except Exception as error:  # user code may raise anything at all; every caller looks at what came back
            return recorder, None, error


def decisions_of(graph: Graph) -> list[Decision]:
    """What the recorded pass decided on values, in order."""
    return [op.call.decision for op in graph.ops if op.call.decision is not None]


def capture(model: nn.Module, inputs: Tensor | tuple[Any, ...], values: bool = False) -> Graph:
    """Record one forward pass of ``model`` on ``inputs`` (a tensor, or the tuple of the forward's arguments).

    The first dim of the first input tensor is taken as the batch; costs are counted per sample. Nothing is computed where the code does
    not look at values, as the ops' shapes say all that is needed; with ``values`` it is.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    with without_collection():
        on_shapes = None if values or not shapes.USED else _recorded_on_shapes(model, inputs)
        ran, recorder, output = on_shapes or _recorded(model, inputs)
    outputs = tuple(dict.fromkeys(recorder.ref(t).id for t in tree_flatten(output)[0] if isinstance(t, Tensor)))
    first = next((t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)), None)
    batch = int(first.shape[0]) if first is not None and first.dim() > 3 else 1
    origin = Origin(model, inputs, recorder.constants, ran)
    graph = Graph(recorder.values, recorder.ops, recorder.input_ids, outputs, batch, origin, calls=recorder.calls)
    if any(v.kind is Kind.PARAMETER and v.id not in recorder.read for v in graph.values):
        add_training(graph, model, inputs)
    return graph


def _recorded(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, Recorder, Any]:
    recorder, output, error = record(model, inputs)
    if error is not None:
        raise CoppiceError(
            f"the model's forward pass fails on the example inputs ({type(error).__name__}: {error}); "
            "check their shapes, and that their dtype is the model's"
        ) from error
    return model, recorder, output


def _recorded_on_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, Recorder, Any] | None:
    """The pass of a copy of the model on tensors without values; None where that can't be had."""
    try:
        copied, given = without_values(model, inputs)
    except Exception:  # a user's class may refuse to be copied with anything at all
        return None
    with torch.random.fork_rng(devices=[]):
        recorder, output, error = record(copied, given)
    return None if error is not None or recorder.needs_values else (copied, recorder, output)


def add_training(graph: Graph, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Record a pass in training mode on a copy without values, and add it to ``graph``; nothing where the code does not run so."""
    copied, given = without_values(model, inputs)
    recorder, output, error = record(copied, given, training=True)
    if error is not None:
        return
    shared = recorder.weights + len(graph.inputs)
    moved = len(graph.values) - shared

    def there(value: int) -> int:
        return value if value < shared else value + moved

    outputs = dict.fromkeys(there(recorder.ref(t).id) for t in tree_flatten(output)[0] if isinstance(t, Tensor))
    graph.values += [replace(v, id=there(v.id)) for v in recorder.values[shared:]]
    graph.training_outputs = tuple(outputs)
    graph.training = [
        replace(
            op,
            inputs=tuple(None if v is None else there(v) for v in op.inputs),
            outputs=tuple(map(there, op.outputs)),
            others=tuple(map(there, op.others)),
        )
        for op in recorder.ops
    ]
