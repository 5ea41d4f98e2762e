"""Verification of a pruned Keras model: proof that it computes what the plan promises. A mismatch is an error, never a saved file.

Checked, in this order: every weight is the kept part of the dense one, bit for bit; every op gives the planned shapes; what was recorded of
the two models computes what they do; and the pruned model equals the oracle (``coppice.keras.replay``) op by op, in double precision where
the backend has it (TensorFlow lacks 3D pooling in it). The last two with the model's own weights and with random ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import dtypes
from numpy.typing import NDArray

from coppice.axes import Axis, atoms
from coppice.cost import width
from coppice.coupling import Coupling, Mask, OpDims
from coppice.errors import CoppiceError, VerificationError
from coppice.graph import Graph, Op
from coppice.keras.apply import build, kept_weights, rebuilt, sliced, weights_in, zeroed
from coppice.keras.capture import capture
from coppice.keras.replay import Replay
from coppice.keras.walk import assign, function_of, variables_of
from coppice.masking import places_in_dense
from coppice.packed import PackedMask
from coppice.planning import Plan, masks_by_atom
from coppice.verification import Verification, largest_error

DOUBLE, SINGLE = "float64", "float32"
ROUNDED = 1e-5  # where Keras itself goes through single precision: the softmax of its attention
TOLERANCE = {DOUBLE: 1e-7, SINGLE: 1e-3}  # of the largest output: in double precision nine more orders for a real mistake to show
Array = NDArray[Any]


def verify(model: Any, pruned: Any, coupling: Coupling, plan: Plan) -> Verification:
    """Compare ``pruned`` with what ``plan`` makes of ``model``, before any fine-tuning. VerificationError names the op, layer and axes."""
    start = time.perf_counter()
    if plan.weight_masks:
        model, plan = _masked(model, plan)
    keep = masks_by_atom(coupling, plan)
    checked = [_check_weights(model, pruned, plan), _check_shapes(coupling, pruned, keep)]
    with in_double_precision():
        inputs = _inputs(coupling.graph)
        precision = DOUBLE if _runs(in_precision(model, DOUBLE), inputs) else SINGLE
        dense, small = in_precision(model, precision), in_precision(pruned, precision)
        graphs = capture(dense, coupling.graph.origin.shapes), capture(small, coupling.graph.origin.shapes)
        worst = 0.0
        for weights in ("its own", "random"):
            if weights == "random":
                _randomise(dense, small, plan)
            error = _Comparison(dense, small, coupling, *graphs, _cast(inputs, precision), keep, TOLERANCE[precision]).error()
            worst = max(worst, error)
            checked.append(f"with {weights} weights, sliced equals the oracle in {precision} (relative error {error:.1e})")
    return Verification(worst, tuple(checked), time.perf_counter() - start)


def _masked(model: Any, plan: Plan) -> tuple[Any, Plan]:
    """The dense model with the plan's zeros at the places that they have in it, and the plan without its masks."""
    weights = weights_in(model)
    places = {name: PackedMask.of(places_in_dense(plan, name, weights[name].shape)) for name in plan.weight_masks}
    return build(model, None, zeroed(weights, replace(plan, weight_masks=places))), replace(plan, weight_masks={})


@contextmanager
def in_double_precision() -> Iterator[None]:
    """On every backend but TensorFlow's, Keras brings float64 down to float32 wherever precisions meet, and JAX has it only if asked."""
    narrowing = dtypes.BIT64_TO_BIT32_DTYPE
    before = narrowing["float64"]
    with ExitStack() as stack:
        if keras.backend.backend() == "jax":
            import jax

            stack.callback(jax.config.update, "jax_enable_x64", jax.config.jax_enable_x64)
            jax.config.update("jax_enable_x64", True)
        stack.callback(narrowing.__setitem__, "float64", before)
        narrowing["float64"] = "float64"
        yield


def in_precision(model: Any, precision: str) -> Any:
    """The same model with every floating tensor in that precision."""

    def change(config: Any) -> None:
        for key, entry in list(config.items() if isinstance(config, dict) else enumerate(config)):
            if isinstance(entry, (dict, list)):
                change(entry)
            elif key in ("dtype", "name") and isinstance(entry, str) and entry in _FLOATING:
                config[key] = precision

    copied = rebuilt(model, {}, change)
    assign(copied, {name: x.astype(precision) if x.dtype.kind not in "biu" else x for name, x in weights_in(model).items()})
    return copied


_FLOATING = ("float64", "float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


def _runs(model: Any, inputs: Sequence[Array]) -> bool:
    """Whether the backend has all of the model's kernels in its precision."""
    try:
        _answers(model, inputs)
    except Exception:  # the backends' own kinds
        return False
    return True


def _cast(inputs: Sequence[Array], precision: str) -> list[Array]:
    return [x.astype(precision) if x.dtype.kind == "f" else x for x in inputs]


def _inputs(graph: Graph) -> list[Array]:
    """Random ones; whole numbers where the model takes such."""
    generator = np.random.default_rng(0)
    found = []
    for symbol, shape in zip(graph.origin.model.inputs, graph.origin.shapes, strict=True):
        if "int" in str(symbol.dtype):
            found.append(generator.integers(0, 2, shape).astype(str(symbol.dtype)))
        else:
            found.append(generator.standard_normal(shape))
    return found


def _randomise(dense: Any, small: Any, plan: Plan) -> None:
    """The same random weights in both: scaled by fan-in, positive where there is one a channel (a variance must be)."""
    generator = np.random.default_rng(0)
    changed, drawn = plan.changed(), {}
    for name, variable in variables_of(dense).items():
        if "float" not in str(variable.dtype):
            continue
        noise = generator.random(tuple(variable.shape))
        fan_in = noise.size / noise.shape[-1] if noise.ndim > 1 else 0
        drawn[name] = (noise - 0.45) * (3.0 / fan_in) ** 0.5 if fan_in else 0.5 + noise
    assign(dense, drawn)
    kept = weights_in(dense)  # a weight of several names has the numbers that it got last
    assign(small, {name: sliced(kept[name], changed[name]) if name in changed else kept[name] for name in drawn})


def _check_weights(model: Any, pruned: Any, plan: Plan) -> str:
    """Every weight is the dense one's kept part, bit for bit."""
    want, have = kept_weights(model, plan), weights_in(pruned)
    if want.keys() != have.keys():
        raise VerificationError(f"the pruned model has other weights than the dense one: {min(want.keys() ^ have.keys())}")
    for name, array in want.items():
        if array.shape != have[name].shape:
            raise VerificationError(f"{name} has shape {have[name].shape}, the plan says {array.shape} (axes {plan.tensors.get(name)})")
        if array.tobytes() != have[name].tobytes():
            raise VerificationError(f"{name} does not hold the dense model's kept values; verify right after apply, before any training")
    return f"{len(want)} tensors hold the dense model's kept values"


def _check_shapes(coupling: Coupling, pruned: Any, keep: Mapping[Axis, Mask]) -> str:
    """Every op of the pruned model has the planned shapes."""
    graph, widths = coupling.graph, {a: int(m.sum()) for a, m in keep.items()}
    try:
        small = capture(pruned, graph.origin.shapes)
    except CoppiceError:
        raise
    except Exception as error:  # whatever Keras raises where shapes don't fit
        raise VerificationError(f"the pruned model can't run: {error}") from error
    if [op.rule for op in graph.ops] != [op.rule for op in small.ops]:
        raise VerificationError("the pruned model is made of other ops than the dense one")
    for op, other in zip(graph.ops, small.ops, strict=True):
        for v, w in zip(op.outputs, other.outputs, strict=True):
            want = tuple(width(a, widths) for a in coupling.dims[v])
            if want != small.shape(w):
                raise VerificationError(f"{op.name} in {op.module} gives {small.shape(w)}, the plan says {want}{_axes_of(coupling, op)}")
    return f"{len(graph.ops)} recorded ops, each with the planned shapes"


@dataclass(slots=True)
class _Comparison:
    """The pruned model ``small`` against the oracle of ``dense``, both in one precision.

    ``recorded`` and ``recorded_small`` are what was recorded of these two.
    """

    dense: Any
    small: Any
    coupling: Coupling
    recorded: Graph
    recorded_small: Graph
    inputs: list[Array]
    keep: Mapping[Axis, Mask]
    tolerance: float

    def error(self) -> float:
        """The largest relative error of any op and of the outputs; VerificationError names the first op that differs."""
        dense = Replay(self.coupling, self.recorded.ops, self.recorded.origin.constants, weights_in(self.dense), {})
        self._check("the dense model", _worst(_answers(self.dense, self.inputs), dense.run(self.inputs)))
        graph = self.recorded_small
        alone = Coupling(graph, [()] * len(graph.values), [OpDims() for _ in graph.ops], [])
        small = Replay(alone, graph.ops, graph.origin.constants, weights_in(self.small), {})
        oracle = Replay(self.coupling, self.recorded.ops, self.recorded.origin.constants, weights_in(self.dense), self.keep)
        worst = self._in_lockstep(small, oracle)
        found = _answers(self.small, self.inputs)
        self._check("the pruned model", _worst(found, small.outputs()))
        error = _worst(found, oracle.outputs())
        if not error <= self._of_outputs():
            raise VerificationError(f"the pruned model's output is off by {error:.1e} of its scale")
        return max(worst, error)

    def _of_outputs(self) -> float:
        rounded = any(op.rule == "attention_heads" for op in self.recorded.ops)
        return max(self.tolerance, ROUNDED) if rounded else self.tolerance

    def _check(self, what: str, error: float) -> None:
        if not error <= self._of_outputs():
            raise VerificationError(f"the recording of {what} is off by {error:.1e} of its output: a layer computes something else")

    def _in_lockstep(self, small: Replay, oracle: Replay) -> float:
        """Every op's results, since what an output shows of a mistake may be little (a softmax that is sure of itself)."""
        worst = 0.0
        pairs = zip(small.steps(self.inputs), oracle.steps(self.inputs), strict=True)
        for k, (have, want) in enumerate(pairs):
            error = largest_error(relative_error(a, b, small.scale(k)) for a, b in zip(have, want, strict=True))
            if not error <= self.tolerance:
                op = self.coupling.graph.ops[k]
                where = f"{op.name} in {op.module}{_axes_of(self.coupling, op)}"
                raise VerificationError(f"the pruned model is off by {error:.1e} at {where}, the first op that differs")
            worst = max(worst, error)
        return worst


def _answers(model: Any, inputs: Sequence[Array]) -> list[Array]:
    given = [keras.ops.convert_to_tensor(x) for x in inputs]
    structure = keras.tree.pack_sequence_as(function_of(model)._inputs_struct, given)
    return [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(model(structure, training=False))]


def _worst(have: Sequence[Array], want: Sequence[Array]) -> float:
    return largest_error(relative_error(a, b) for a, b in zip(have, want, strict=True))


def relative_error(a: Array, b: Array, scale: float = 0.0) -> float:
    """max |a - b| over max |b|, or over a larger ``scale``; equal infinities and NaN count as equal."""
    if a.shape != b.shape:
        return float("inf")
    if a.size == 0:
        return 0.0
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = float(np.where(same, 0.0, np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b))).max())
    finite = np.isfinite(b)
    return gap / max(float(np.abs(b[finite]).max()) if finite.any() else 0.0, scale, 1e-300)


def _axes_of(coupling: Coupling, op: Op) -> str:
    names = {a.atom: a.name for a in coupling.prunable}
    found = dict.fromkeys(names[atom] for v in op.outputs for d in coupling.dims[v] for atom in atoms(d) if atom in names)
    return f" (axes {', '.join(found)})" if found else ""
