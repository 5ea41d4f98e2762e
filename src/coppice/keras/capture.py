"""Record a Keras model: its own graph, walked with the shapes of an example input; nothing is computed, the model is not changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import tree
from keras.src.ops.function import Function
from numpy.typing import NDArray

from coppice.axes import find, in_proportion, pin
from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.graph import Graph, Kind
from coppice.keras import layers, operations
from coppice.keras.apply import UNKNOWN
from coppice.keras.common_ops import NoRuleError, Translate
from coppice.keras.tape import Binding, Tape, Traced
from coppice.keras.walk import function_of, is_plain, layers_of, numbers, require_plain, variables_of
from coppice.linear import Model

Pairs = dict[str, tuple[NDArray[Any], NDArray[Any]]]


@dataclass(slots=True)
class Origin:
    """The front-end's handle on a graph: the model, the shapes of its inputs, what the code holds constant, where widths are configured."""

    model: Any
    shapes: tuple[tuple[int, ...], ...]
    constants: dict[int, Any] = field(default_factory=dict)
    bindings: Sequence[Binding] = ()
    ties: Sequence[tuple[tuple[int, int], tuple[int, int]]] = ()

    def bind_sizes(self, coupling: Coupling) -> None:
        """Say which fields of the configuration hold which axis, and which widths must be alike."""
        for binding in self.bindings:
            _bind(coupling, binding)
        for (a, dim), (b, other) in self.ties:
            pair = coupling.dims[a][dim], coupling.dims[b][other]
            ties = in_proportion(pair)
            if ties is None:
                for axis in pair:
                    pin(axis, "two widths that must be alike are made up in different ways")
            coupling.ties += ties or []
        coupling.refresh()

    def parameters(self, model: Any) -> dict[str, NDArray[Any]]:
        """Every parameter as a NumPy array, in single precision."""
        return {name: numbers(v).astype(np.float32) for name, v in variables_of(model).items()}

    def gradients(self, model: Any, batches: Iterable[Any], loss: Any) -> Iterator[Pairs]:
        """For each batch, (weight, gradient) of every parameter that got one."""
        from coppice.keras.gradients import gradients

        return gradients(model, batches, loss)

    def synaptic_flow(self, model: Any) -> dict[str, NDArray[Any]]:
        """SynFlow's saliency of every element, on inputs of ones."""
        from coppice.keras.gradients import synaptic_flow

        return synaptic_flow(model, self.shapes)

    def timed(self, coupling: Coupling) -> None:
        """A Keras model's ops are not timed one by one: its runtimes don't tell what they take."""

    def recorded(self, model: Any, batches: Sequence[Any]) -> Model:
        """``model`` on these inputs, as the framework-free code sees it."""
        from coppice.keras.linear import Recorded

        return Recorded(model, batches)

    def activation_scores(self, model: Any, coupling: Coupling, batches: Iterable[Any], statistic: str) -> dict[int, NDArray[Any]]:
        """A statistic (``coppice.activations``) of each index of each prunable axis."""
        from coppice.activations import activation_scores
        from coppice.keras.linear import recorded

        return activation_scores(*recorded(model, coupling, batches), coupling, statistic)

    def removal_losses(
        self, model: Any, coupling: Coupling, batches: Iterable[Any], seed: int, orders: Mapping[int, Sequence[int]] | None = None
    ) -> dict[int, NDArray[np.float64]]:
        """The loss that each index of each prunable axis adds when it goes, along the axis's path (``coppice.elimination``)."""
        from coppice.keras.elimination import removal_losses

        return removal_losses(model, coupling, batches, seed, orders)


def _bind(coupling: Coupling, binding: Binding) -> None:
    if binding.op is None:
        assert binding.value is not None
        axis = coupling.dims[binding.value][binding.dim]
    else:
        letters = coupling.ops[binding.op].letters
        if binding.letter not in letters:  # the op does not fit its rule, and is pinned
            return
        axis = letters[binding.letter]
    place = (binding.path, binding.key, binding.index)
    known = coupling.bindings.get(place)
    if known is not None and find(known) is not find(axis):  # one layer, used at several places
        ties = in_proportion((known, axis))
        for one in (known, axis) if ties is None else ():
            pin(one, f"{binding.path} is used in places that are not cut alike")
        coupling.ties += ties or []
    coupling.bindings[place] = axis
    if binding.index is not None:
        coupling.sequences[binding.path, binding.key] = binding.sequence


def capture(model: Any, example: Any) -> Graph:
    """The recorded graph of a Sequential or Functional model on inputs of the example's shapes (arrays, or shapes with the batch)."""
    require_plain(model)
    function = function_of(model)
    shapes = _shapes(example)
    if len(shapes) != len(function.inputs):
        raise CoppiceError(f"the model takes {len(function.inputs)} inputs, {len(shapes)} were given")
    tape = Tape()
    for path, layer in layers_of(model):
        tape.declare(path, layer)
    inputs = [_input(tape, x, shape) for x, shape in zip(function.inputs, shapes, strict=True)]
    outputs = tree.flatten(_run(tape, model, inputs, ""))
    origin = Origin(model, shapes, tape.constants, tape.bindings, tape.ties)
    ids = tuple(x.id for x in inputs), tuple(x.id for x in outputs)
    return Graph(tape.values, tape.ops, *ids, batch=shapes[0][0], origin=origin)


def _shapes(example: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes in an example: an array, a shape, or a list of these."""
    if hasattr(example, "shape"):
        return (tuple(int(n) for n in example.shape),)
    if isinstance(example, (list, tuple)) and example and all(isinstance(n, int) for n in example):
        return (tuple(example),)
    return tuple(shape for part in (example.values() if isinstance(example, dict) else example) for shape in _shapes(part))


def _input(tape: Tape, symbol: Any, shape: tuple[int, ...]) -> Traced:
    fits = len(symbol.shape) == len(shape) and all(have in (None, n) for have, n in zip(symbol.shape, shape, strict=True))
    if not fits:
        raise CoppiceError(f"the model's input {symbol.name} has the shape {tuple(symbol.shape)}, {shape} does not fit it")
    dtype = str(symbol.dtype)
    return Traced(tape.new(shape, Kind.INPUT, dtype), shape, dtype)


def _run(tape: Tape, model: Any, inputs: Any, prefix: str) -> Any:
    """The model's graph, op by op; nested models are gone through in place, and their inputs' shapes bound."""
    for symbol, x in zip(function_of(model).inputs, tree.flatten(inputs), strict=True) if prefix else ():
        tape.path = f"{prefix}{symbol._keras_history.operation.name}"
        dense = tuple(UNKNOWN if n is None else n for n in symbol.shape)
        tape.bind_all("batch_shape", x, [None if n is None else k for k, n in enumerate(symbol.shape)], dense)
    return Function._run_through_graph(function_of(model), inputs, operation_fn=partial(_step, tape, prefix))


def _step(tape: Tape, prefix: str, operation: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        path = f"{prefix}{operation.name}"
        if is_plain(operation):
            return _run(tape, operation, args[0] if args else kwargs["inputs"], f"{path}/")
        tape.path, tape.kind = path, type(operation).__name__
        reason = _reason(operation)
        if reason is None:
            try:
                return _rule_of(operation)(tape, operation, *args, **kwargs)  # type: ignore[misc]
            except NoRuleError as error:
                reason = f"no rule for {tape.kind} of this kind: {error}"
        return _unknown(tape, operation, args, kwargs, reason)

    return call


def _rule_of(operation: Any) -> Translate | None:
    """Only for Keras's own classes: what an heir of one computes is not known."""
    if not type(operation).__module__.startswith("keras.src."):
        return None
    table = layers.TABLE if isinstance(operation, keras.layers.Layer) else operations.TABLE
    return table.get(type(operation).__name__)


def _reason(operation: Any) -> str | None:
    """Why nothing is known of an operation."""
    if _rule_of(operation) is None:
        return f"no rule for {type(operation).__name__}"
    if getattr(operation, "quantization_mode", None) is not None:
        return f"{type(operation).__name__} is quantised"
    if getattr(operation, "lora_enabled", False):
        return f"{type(operation).__name__} has low-rank adapters"
    return None


def _unknown(tape: Tape, operation: Any, args: Any, kwargs: Any, reason: str) -> Any:
    """Pin everything that the operation touches."""
    given = [leaf for leaf in tree.flatten((args, kwargs)) if isinstance(leaf, Traced)]
    weights = [tape.weight(w) for w in getattr(operation, "weights", ())]
    spec = operation.compute_output_spec(*_symbols(args), **_symbols(kwargs))
    flat = tree.flatten(spec)

    def run(arrays: Sequence[Any], _: Any) -> Any:
        left = iter(arrays)
        filled = tree.map_structure(lambda leaf: next(left) if isinstance(leaf, Traced) else leaf, (args, kwargs))
        return tuple(tree.flatten(operation(*filled[0], **filled[1])))

    outs = tape.emit("unknown", [*given, *dict.fromkeys(weights)], flat, run, {"reason": reason})
    return tree.pack_sequence_as(spec, outs)


def _symbols(structure: Any) -> Any:
    return tree.map_structure(lambda leaf: leaf.symbol() if isinstance(leaf, Traced) else leaf, structure)
