"""When to cut: in the midst of a training that goes on with the smaller model, and what to go on from after a cut.

`train_and_prune` cuts before the training is over, so that the rest of it is cheaper; the optimiser's state and the learning rate go on.
`rewind` puts back the values that the weights which stay had earlier: a lottery ticket. Learning-rate rewinding (Renda et al., ICLR 2020)
needs no function: it is `coppice.train.fine_tune` on the cut model with the recipe of the first training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from coppice.allocate import plan as make_plan
from coppice.coupling import couple
from coppice.criteria import batch_of, score
from coppice.data import ImageData, Loaders, sample_batches
from coppice.errors import CoppiceError
from coppice.forward import device_of
from coppice.parallel import current, joined
from coppice.planning import Plan, compose
from coppice.planning import make_plan as plan_that_keeps
from coppice.recipe import Recipe
from coppice.stages import example_input, preprocessing
from coppice.stretches import Trained, stretches
from coppice.targets import Target
from coppice.torch.apply import apply, load_exactly, slice_optimizer_state
from coppice.torch.capture import capture
from coppice.torch.verify import verify
from coppice.train import EpochResult, choose, fine_tune, fitting, make_optimizer
from coppice.verification import Verification


def train_and_prune(
    model: nn.Module,
    data: ImageData | Loaders,
    recipe: Recipe,
    target: str | Mapping[str, str | float] | Target,
    *,
    at: Sequence[float] = (1 / 3,),
    criterion: str = "l2",
    round_to: int = 8,
    min_width: int = 8,
    teacher: nn.Module | None = None,
    seed: int = 0,
    calibration: int = 512,
    on_epoch: Callable[[EpochResult], None] | None = None,
    checkpoint: Path | None = None,
) -> Trained:
    """Train a copy of `model` by `recipe` and cut it to `target` on the way, after the shares `at` of the epochs (several: in equal steps).

    Each cut is verified; momentum is cut as the weights are, and the learning rate goes on as if there had been none. An average of the
    weights (`recipe.ema`) begins anew after a cut. `checkpoint`: as for `fine_tune`, one file a part. CoppiceError where a share leaves no
    epoch before or after it, or a target can't be met.
    """
    now, history, checks, worst = copy.deepcopy(model), list[EpochResult](), list[str](), 0.0
    with joined(device_of(model).type):
        recipe = fitting(data, recipe)
        coupling = couple(capture(now.cpu().eval(), (example_input(data),)))
        whole = plan_that_keeps(coupling, {})
        parts = stretches(target, at, recipe.epochs, coupling.cost())
        now.to(device_of(model))
        if recipe.open:
            recipe = choose(now, data, recipe, teacher=teacher, plan=None, seed=seed)[0].recipe
        optimizer = make_optimizer(now, recipe)
        for k, stretch in enumerate(parts):
            part = checkpoint.with_name(f"{checkpoint.stem}.{k}{checkpoint.suffix}") if checkpoint else None
            history += fine_tune(
                now, data, recipe, teacher=teacher, plan=whole, seed=seed, on_epoch=on_epoch, span=(stretch.start, stretch.end),
                optimizer=optimizer, checkpoint=part,
            )  # fmt: skip
            if stretch.budgets is not None:
                smaller, step, found = _cut(now, data, stretch.budgets, criterion, round_to, min_width, seed, calibration)
                checks, worst = (
                    [*checks, *(f"cut after epoch {stretch.end}: {line}" for line in found.checked)],
                    max(worst, found.max_error),
                )
                fresh = make_optimizer(smaller.to(device_of(model)), recipe)
                fresh.load_state_dict(slice_optimizer_state(optimizer, now, smaller, step))
                now, optimizer, whole = smaller, fresh, compose(whole, step)
    return Trained(now, whole, tuple(history), tuple(checks), worst)


def _cut(
    model: nn.Module,
    data: ImageData | Loaders,
    budgets: Mapping[str, float],
    criterion: str,
    round_to: int,
    min_width: int,
    seed: int,
    calibration: int,
) -> tuple[nn.Module, Plan, Verification]:
    """A smaller copy of `model`, which goes to the CPU for it; the plan is the first process's, and so is the proof."""
    coupling = couple(capture(model.cpu().eval(), (example_input(data),)))

    def planned() -> Plan:
        batches = sample_batches(data.train, preprocessing(data), images=calibration, seed=seed, batch_size=batch_of(criterion))
        scores = score(model, coupling, criterion, batches, seed=seed)
        return make_plan(coupling, scores, budgets, round_to=round_to, min_width=min_width)

    step = current().first(planned)
    smaller = apply(model, step)
    return smaller, step, current().first(lambda: verify(model, smaller, coupling, step))


def rewind(pruned: nn.Module, plan: Plan, model: nn.Module, earlier: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `pruned` whose weights have the values that they had in `earlier`, a state dict of the dense `model`.

    What the plan removes stays removed and what it masks stays zero. Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019; early
    in training instead of before it: Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020.
    """
    before = copy.deepcopy(model)
    if wrong := load_exactly(before, earlier):
        raise CoppiceError(f"the earlier weights are not those of the dense model: {wrong}")
    ticket = copy.deepcopy(pruned)
    if wrong := load_exactly(ticket, apply(before, plan).state_dict()):
        raise CoppiceError(f"the plan is not what made the pruned model: {wrong}")
    return ticket
