"""What pulls a pruned network towards the dense one while it trains: its softened predictions, and its features at the channels that stay.

Predictions: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015. Features: Romero et al., FitNets, ICLR 2015; no
adaptor is needed here, since a pruned layer's channels are some of the dense layer's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coppice.errors import CoppiceError
from coppice.planning import Plan
from coppice.torch.apply import masks_of

_TINY = 1e-12


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of the predictions (N, classes), both softened, times temperature squared so that gradients keep their size."""
    left, right = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(left, right, reduction="batchmean", log_target=True)


class Features:
    """A context in which two models' forward passes are watched at the outputs of the layers that both have; `loss` compares them.

    The layers are the normalisations that have weights; in a model without any, the convolutions and linear layers. `plan` is what made
    `student` from `teacher` (None: nothing was removed). Raises CoppiceError if there is no such layer.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, plan: Plan | None) -> None:
        masks = {} if plan is None else masks_of(teacher, plan)
        names = [n for n in _compared(student, teacher) if plan is None or plan.stays(f"{n}.weight")]
        if not names:
            raise CoppiceError("the model has no layers whose features can be compared with the dense model's: set features to 0")
        self._models = (student, teacher)
        self._keep = {n: torch.from_numpy(masks[f"{n}.weight"][0].nonzero()[0]) for n in names if f"{n}.weight" in masks}
        self._names = names
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._hooks = ExitStack()

    def __enter__(self) -> Features:
        for model, seen in zip(self._models, self._seen, strict=True):
            for name in self._names:
                handle = model.get_submodule(name).register_forward_hook(_noting(seen, name))
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.close()
        self.clear()

    def clear(self) -> None:
        """Forget the last batch."""
        for seen in self._seen:
            seen.clear()

    def loss(self, variance: Callable[[Tensor], Tensor] = torch.var) -> Tensor:
        """Squared error relative to the variance of the teacher's features, mean over the layers that ran; then the batch is forgotten.

        `variance` is that of a whole batch, of which only a part may be here.
        """
        student, teacher = self._seen
        terms = []
        for name, ours in student.items():
            theirs = _kept(teacher[name], ours.shape, self._keep.get(name)) if name in teacher else None
            if theirs is not None:
                terms.append((ours.float() - theirs).square().mean() / variance(theirs).clamp_min(_TINY))
        self.clear()
        if not terms:
            raise CoppiceError("no layer of the pruned model gives features of the dense layer's shape: set features to 0")
        return torch.stack(terms).mean()


def _compared(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The layers of both models, by name."""
    ours = dict(student.named_modules())
    both = {name: _vector(module) for name, module in teacher.named_modules() if name in ours and type(ours[name]) is type(module)}
    return [n for n, vector in both.items() if vector] or [n for n, vector in both.items() if vector is False]


def _vector(module: nn.Module) -> bool | None:
    """Whether the weight of a leaf with a weight is a vector, as a normalisation's is; None for any other module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or next(module.children(), None) is not None or isinstance(module, nn.Embedding):
        return None
    return weight.dim() == 1


def _noting(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[name] = output

    return hook


def _kept(teacher: Tensor, shape: torch.Size, keep: Tensor | None) -> Tensor | None:
    """The teacher's features at the indices that the student has; None where it can't be told which these are."""
    differing = (
        [dim for dim, (a, b) in enumerate(zip(teacher.shape, shape, strict=True)) if a != b] if teacher.dim() == len(shape) else None
    )
    if differing == []:
        return teacher.detach().float()
    if keep is None or differing is None or len(differing) != 1 or shape[differing[0]] != len(keep):
        return None
    return teacher.detach().float().index_select(differing[0], keep.to(teacher.device))
