"""After a cut, before any training: what brings accuracy back in seconds, without labels. The best on held-out images is kept.

The candidates are the cut model with its BatchNorm statistics re-estimated, with its layers refitted (`coppice.torch.repair`), and both.
A refit by least squares leaves responses a little too small, which re-estimated statistics undo, at the price of their own noise: so
halfway between is a candidate too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.forward import logits, norms_with_statistics, training_mode
from coppice.mending import AS_CUT, BOTH, HALFWAY, REESTIMATED, REFITTED, Recovery, nearest
from coppice.planning import Plan
from coppice.stepwise import is_held_out
from coppice.torch.elimination import divergence
from coppice.torch.repair import repair


def recover(
    dense: nn.Module,
    pruned: nn.Module,
    coupling: Coupling,
    plan: Plan,
    batches: Sequence[Tensor],
    reestimate: Callable[[nn.Module], None],
    *,
    refit: bool = True,
    seed: int = 0,
) -> tuple[nn.Module, Recovery]:
    """The best of `pruned` and what can be made of it; `pruned` is left as it is.

    `plan` made `pruned` from `dense`, whose coupling is given; `batches` are model inputs; `reestimate` re-estimates BatchNorm in place.
    """
    has_norms = bool(norms_with_statistics(pruned))
    candidates = {AS_CUT: pruned}
    if has_norms:
        candidates[REESTIMATED] = _after(reestimate, pruned)
    refitted, refused = 0, None
    if refit:
        mended = copy.deepcopy(pruned)
        try:
            refitted = sum(r.after < r.before for r in repair(dense, mended, coupling, plan, batches, seed))
        except CoppiceError as error:
            refused = str(error)
        else:
            candidates[REFITTED] = mended
            if has_norms:
                both = _after(reestimate, mended)
                candidates[HALFWAY] = _halfway(mended, both)
                candidates[BOTH] = both
    judge = [batch for k, batch in enumerate(batches) if is_held_out(k)] or batches
    goal = outputs(dense, judge)
    return nearest(candidates, lambda model: divergence(outputs(model, judge), goal), refitted, refused)


def _after(edit: Callable[[nn.Module], None], model: nn.Module) -> nn.Module:
    edited = copy.deepcopy(model)
    edit(edited)
    return edited


def _halfway(left: nn.Module, right: nn.Module) -> nn.Module:
    """A copy of `left` with BatchNorm statistics halfway to those of `right`."""
    between = copy.deepcopy(left)
    for ours, theirs in zip(norms_with_statistics(between), norms_with_statistics(right), strict=True):
        for mine, other in ((ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)):
            if mine is not None and other is not None:
                mine.lerp_(other, 0.5)
    return between


def outputs(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Logits of all batches, in evaluation mode."""
    with torch.no_grad(), training_mode(model, False):
        return torch.cat([logits(model(batch)) for batch in batches])
