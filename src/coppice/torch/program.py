"""A PyTorch model's recorded forward pass, run op by op (`coppice.stepwise`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from coppice.coupling import Coupling, couple
from coppice.errors import CoppiceError
from coppice.graph import Op
from coppice.stepwise import MEMORY, Stepwise, is_held_out, of_one_shape
from coppice.torch.aten import Ref
from coppice.torch.capture import capture, quiet_eval, record
from coppice.torch.trees import leaves, mapped_only, named_tensors, tensors_in

__all__ = ["Program", "coupled_on", "is_held_out", "of_one_shape"]


class Program(Stepwise):
    """``model`` recorded on ``batches[0]``. CoppiceError where it fails on the batch."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], memory: int = MEMORY) -> None:
        recorder, output, error = record(model, (batches[0],))
        if error is not None:
            raise CoppiceError(f"the model's forward pass fails on the calibration images ({type(error).__name__}: {error})") from error
        self.model = model
        self._constants = recorder.constants
        self._weights = {v.id: v.names[0] for v in recorder.values[: recorder.weights]}
        self._tensors = named_tensors(model)
        outputs = [recorder.ref(t).id for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
        super().__init__(recorder.ops, recorder.values, outputs, recorder.input_ids[0], batches, memory)

    def _reads(self, op: Op) -> Iterable[int]:
        return (ref.id for ref in leaves(Ref, (op.call.args, op.call.kwargs)))

    def _results(self, op: Op, read: Callable[[int], Any]) -> Sequence[Any]:
        args, kwargs = mapped_only(Ref, lambda ref: read(ref.id), (op.call.args, op.call.kwargs))
        return tensors_in(op.call.func(*args, **kwargs))

    def _fixed(self, value: int) -> Tensor | None:
        if value in self._weights:
            return self._tensors[self._weights[value]].detach()
        found = self._constants.get(value)
        return None if found is None else found.clone()

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def _running(self) -> AbstractContextManager[Any]:
        return quiet_eval(self.model)


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
