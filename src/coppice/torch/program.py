"""Run a recorded forward pass op by op over several batches at once, stopping anywhere: what repair needs, with bounded memory.

A model called from outside shows one layer a pass; a :class:`Program` walks through the ops once, and whatever a later op reads is there.
Weights are read from the model when their op runs, so a layer that was mended is mended for everything after it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from coppice.coupling import Coupling, couple
from coppice.errors import CoppiceError
from coppice.graph import Kind, Op, Value
from coppice.torch.aten import Ref
from coppice.torch.capture import capture, quiet_eval, record
from coppice.torch.trees import leaves, mapped_only, named_tensors, tensors_in

_HELD_OUT = 4  # one calibration batch in so many judges, the others are fitted to
MEMORY = 3 * 2**30  # bytes of intermediate values that are held at a time


class Program:
    """``model`` recorded on ``batches[0]`` and run on ``batches`` (inputs of one shape) in step; ``at`` is the next op.

    Early on, where maps are large, only as many batches run as fit in ``memory`` bytes; more join in as the maps get smaller. ``active``
    is how many there are now. CoppiceError where the model fails on the batch.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], memory: int = MEMORY) -> None:
        recorder, output, error = record(model, (batches[0],))
        if error is not None:
            raise CoppiceError(f"the model's forward pass fails on the calibration images ({type(error).__name__}: {error})") from error
        self.model = model
        self.ops: list[Op] = recorder.ops
        self.values: list[Value] = recorder.values
        self.outputs = [recorder.ref(t).id for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
        self.at = 0
        self._input = recorder.input_ids[0]
        self._batches = batches
        self._constants = recorder.constants
        self._weights = {v.id: v.names[0] for v in recorder.values[: recorder.weights]}
        self._env: list[dict[int, Tensor]] = []
        self._ends = self._lifetimes()
        self._room = self._batches_that_fit(memory)
        self._tensors = named_tensors(model)

    @property
    def active(self) -> int:
        return len(self._env)

    def room(self, at: int) -> int:
        """How many batches may be active before op ``at``."""
        return self._room[min(at, len(self._room) - 1)]

    def _lifetimes(self) -> dict[int, list[int]]:
        """Op -> the intermediate values that nothing reads after it."""
        last: dict[int, int] = {}
        for k, op in enumerate(self.ops):
            last.update(dict.fromkeys((*(r.id for r in leaves(Ref, (op.call.args, op.call.kwargs))), *op.outputs), k))
        ends: dict[int, list[int]] = {}
        for value, k in last.items():
            if value not in self.outputs and self.values[value].kind is Kind.INTERMEDIATE:
                ends.setdefault(k, []).append(value)
        return ends

    def _batches_that_fit(self, memory: int) -> list[int]:
        """For each op, the batches whose live values fit in ``memory`` from there to the end; at least one to fit to, one to judge by."""
        size = {v.id: math.prod(v.shape) * v.itemsize for v in self.values}
        live, held = [], {self._input: size[self._input]}
        for k, op in enumerate(self.ops):
            held.update({v: size[v] for v in op.outputs})
            live.append(sum(held.values()))
            for value in self._ends.get(k, ()):
                held.pop(value, None)
        peaks = list(itertools.accumulate(reversed(live), max))[::-1]
        return [min(len(self._batches), max(2, memory // peak)) for peak in peaks] or [len(self._batches)]

    def advance(self, upto: int, active: int | None = None) -> None:
        """Run the ops before ``upto``, and forget what no later op reads. ``active``: how many batches take part (None: all that fit)."""
        want = self.room(upto) if active is None else active
        with quiet_eval(self.model):
            for env in self._env:
                self._run(env, self.at, upto)
            for k in range(len(self._env), want):
                self._env.append({self._input: self._batches[k]})
                self._run(self._env[-1], 0, upto)
        self.at = upto

    def finish(self) -> list[Tensor]:
        """The model's first output for every active batch, with the weights as they are now; the program stays where it is."""
        found = []
        with quiet_eval(self.model):
            for env in self._env:
                ahead = {value: tensor.clone() for value, tensor in env.items()}  # an op may write in place
                self._run(ahead, self.at, len(self.ops))
                found.append(self._read(self.outputs[0], ahead))
        return found

    def _run(self, env: dict[int, Tensor], start: int, stop: int) -> None:
        def read(ref: Ref) -> Tensor:
            return self._read(ref.id, env)

        for k in range(start, stop):
            op = self.ops[k]
            args, kwargs = mapped_only(Ref, read, (op.call.args, op.call.kwargs))
            results = tensors_in(op.call.func(*args, **kwargs))
            env.update(zip(op.outputs, results, strict=True))
            for value in self._ends.get(k, ()):
                env.pop(value, None)

    def _read(self, value: int, env: dict[int, Tensor]) -> Tensor:
        if value in self._weights:
            return self._tensors[self._weights[value]].detach()
        found = self._constants.get(value)
        return env[value] if found is None else found.clone()

    def value(self, value: int, batch: int) -> Tensor:
        """What ``value`` is now for one of the active batches."""
        return self._read(value, self._env[batch])


def is_held_out(batch: int) -> bool:
    """Whether the calibration batch of this number (from 0) judges what was fitted to the others. The second of two does."""
    return batch % _HELD_OUT == 1


def coupled_on(model: nn.Module, coupling: Coupling, batch: Tensor) -> Coupling:
    """``coupling`` as it is when ``model`` runs on ``batch``: its ops and values are those of a :class:`Program`, its axes' names the same.

    PyTorch runs other ops for other batch sizes: a reshape of one sample is a view where that of many is a copy. Some ops give other
    numbers of results on tensors without values.
    CoppiceError where other axes are prunable then.
    """
    origin = coupling.graph.origin
    if origin.with_values and len(origin.inputs) == 1 and isinstance(origin.inputs[0], Tensor) and origin.inputs[0].shape == batch.shape:
        return coupling
    here = couple(capture(model, batch, values=True))
    if {a.name: a.width for a in here.prunable} != {a.name: a.width for a in coupling.prunable}:
        raise CoppiceError(
            f"on batches of {len(batch)} images the model has other axes than on the example input; capture it with such a batch"
        )
    return here


def of_one_shape(batches: Iterable[Tensor]) -> list[Tensor]:
    """The batches that have the first one's shape: a program runs all in step. CoppiceError where there is none."""
    found = list(batches)
    if not found:
        raise CoppiceError("there are no calibration batches; give at least one image")
    return [batch for batch in found if batch.shape == found[0].shape]
