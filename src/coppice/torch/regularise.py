"""Regularised training of a PyTorch model (`coppice.shrinking`): where its weights lie, on whatever device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coppice.coupling import Coupling
from coppice.planning import Plan
from coppice.saliency import Array
from coppice.shrinking import NEAR_ZERO, Shrinking, nothing_to_scale, places, prepared, starts
from coppice.torch.trees import named_tensors

__all__ = ["NEAR_ZERO", "Regulariser", "regulariser"]


@dataclass(frozen=True, slots=True)
class _Site:
    """A dim of a parameter, and for each of its positions the group (an index of an axis) that lies there, -1 for none."""

    parameter: nn.Parameter
    dim: int
    groups: Tensor
    valid: Tensor
    makes: bool

    def sums(self, elements: Tensor, into: Tensor) -> None:
        """Add up `elements`, of the parameter's shape, by group."""
        into.index_add_(0, self.groups[self.valid], self._line(elements)[self.valid].to(into.dtype))

    def sizes(self) -> Tensor:
        """The norm at each position of the dim."""
        return self._line(self.parameter.detach().square()).sqrt()

    def cap(self, sizes: Tensor) -> None:
        """No position's norm above its size."""
        now = self.sizes()
        line = torch.where(self.valid & (now > sizes), sizes / now, 1.0)
        self.parameter.mul_(self._shaped(line))

    def scale(self, factors: Tensor) -> None:
        self.parameter.mul_(self._along(factors, 1.0))

    def soften(self, limits: Tensor) -> None:
        """Every weight nearer to zero by the limit of its group."""
        self.parameter.copy_(self.parameter.sign() * (self.parameter.abs() - self._along(limits, 0.0)).clamp_min(0))

    def _along(self, by_group: Tensor, otherwise: float) -> Tensor:
        line = torch.where(self.valid, by_group[self.groups.clamp_min(0)], otherwise).to(self.parameter.dtype)
        return self._shaped(line)

    def _line(self, elements: Tensor) -> Tensor:
        others = [d for d in range(elements.dim()) if d != self.dim]
        return elements.sum(others) if others else elements

    def _shaped(self, line: Tensor) -> Tensor:
        return line.view([-1 if d == self.dim else 1 for d in range(self.parameter.dim())])


class _Weights:
    """`coppice.shrinking.Weights` of a module."""

    def __init__(self, model: nn.Module, coupling: Coupling, kind: str) -> None:
        tensors = named_tensors(model)
        self._sites = []
        for place in places(coupling, kind):
            parameter = tensors.get(place.name)
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                where = torch.from_numpy(place.groups).to(parameter.device)
                self._sites.append(_Site(parameter, place.dim, where, where >= 0, place.makes))
        if not self._sites:
            raise nothing_to_scale(kind)
        self._groups = int(starts(coupling)[-1])
        self._began = [(site, site.sizes()) for site in self._sites if site.makes]
        self._means = {id(s.parameter): float(s.parameter.detach().abs().mean()) for s in self._sites}

    def count(self) -> Array:
        return self._by_group(torch.ones_like)

    def squares(self) -> Array:
        return self._by_group(lambda p: p.double().square())

    @torch.no_grad()
    def scale(self, factors: Array) -> None:
        for site in self._sites:
            site.scale(self._of(factors))

    @torch.no_grad()
    def scale_filters(self, factors: Array) -> None:
        for site in self._sites:
            if site.makes:
                site.scale(self._of(factors))

    @torch.no_grad()
    def cap_filters(self) -> None:
        for site, sizes in self._began:
            site.cap(sizes)

    @torch.no_grad()
    def soften(self, limits: Array) -> None:
        for site in self._sites:
            site.soften(self._of(limits) * self._means[id(site.parameter)])

    def _of(self, groups: Array) -> Tensor:
        return torch.from_numpy(groups).to(self._sites[0].parameter.device)

    def _by_group(self, elements: Callable[[Tensor], Tensor]) -> Array:
        total = torch.zeros(self._groups, dtype=torch.float64, device=self._sites[0].parameter.device)
        for site in self._sites:
            site.sums(elements(site.parameter.detach()), total)
        return total.cpu().numpy()


class Regulariser(Shrinking):
    """Call `step()` after every `optimizer.step()`; `said()` says how far it is, `plan(...)` makes a plan of what it shrank.

    Made by :func:`regulariser`. It goes along with `coppice.train.fine_tune` as it is.
    """

    def __init__(
        self, model: nn.Module, coupling: Coupling, kind: str, strength: float | None, steps: int, target: Plan | None = None
    ) -> None:
        super().__init__(_Weights(model, coupling, kind), coupling, kind, strength, steps, target)
        self._done = torch.zeros((), dtype=torch.int64)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What has to be remembered to go on: where it began is found again from the model that it was made for."""
        return {"done": self._done}

    def after_step(self, done: int, total: int) -> None:
        self._steps = total
        self.step()

    def step(self) -> None:
        """One proximal step."""
        self.shrink(int(self._done))
        self._done += 1


def regulariser(
    model: nn.Module,
    coupling: Coupling,
    kind: str = "group-lasso",
    *,
    steps: int,
    target: Mapping[str, float] | None = None,
    strength: float | str = "auto",
    round_to: int = 8,
    min_width: int = 8,
) -> Regulariser:
    """A regulariser for a training of `steps` steps, in a loop of your own: `reg.step()` after every `optimizer.step()`.

    `target`: absolute budgets as for `coppice.plan` (`{"macs": 0.5 * coupling.cost().macs}`), on whose grid it is worked out how many
    indices have to go, and an automatic `strength`. CoppiceError for an unknown kind, a strength that is none, or nothing to regularise.
    """

    def make(given: float | None, plan: Plan | None) -> Regulariser:
        return Regulariser(model, coupling, kind, given, steps, plan)

    return prepared(make, coupling, kind, steps, target, strength, round_to, min_width)
