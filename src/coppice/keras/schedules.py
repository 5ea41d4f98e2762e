"""When to cut a Keras model: in the midst of a training that goes on with the smaller one, and what to go on from (`coppice.schedules`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coppice.allocate import plan as make_plan
from coppice.coupling import couple
from coppice.criteria import batch_of, score
from coppice.errors import CoppiceError
from coppice.keras.apply import apply, build, carry_state, weights_in
from coppice.keras.capture import capture
from coppice.keras.evaluate import evaluate, sample
from coppice.keras.rehearsal import choose
from coppice.keras.stages import Parts, example_shape
from coppice.keras.train import Epoch, check_recipe, fine_tune, fitting
from coppice.keras.verify import verify
from coppice.planning import Plan, compose
from coppice.planning import make_plan as plan_that_keeps
from coppice.recipe import Recipe
from coppice.stretches import Trained, stretches
from coppice.targets import Target
from coppice.verification import Verification


def train_and_prune(
    model: Any,
    data: Any,
    recipe: Recipe,
    target: str | Mapping[str, str | float] | Target,
    *,
    at: Sequence[float] = (1 / 3,),
    criterion: str = "l2",
    round_to: int = 8,
    min_width: int = 8,
    teacher: Any = None,
    seed: int = 0,
    calibration: int = 512,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    checkpoint: Path | None = None,
) -> Trained:
    """Train a copy of `model` by `recipe` and cut it to `target` on the way, after the shares `at` of the epochs (several: in equal steps).

    Each cut is verified; momentum is cut as the weights are, and the learning rate goes on as if there had been none. `data`: as for
    `coppice.prune`. `checkpoint`: written after every epoch, one file a stretch. CoppiceError where a share leaves no epoch before or after
    it, or a target can't be met.
    """
    parts = Parts.of(data)
    check_recipe(recipe)
    recipe = fitting(parts.train, recipe)
    shape = example_shape(parts)
    coupling = couple(capture(model, shape))
    now, whole, history, checks, worst = _copied(model), plan_that_keeps(coupling, {}), list[Epoch](), list[str](), 0.0
    planned = stretches(target, at, recipe.epochs, coupling.cost())
    if recipe.open:
        tried = choose(lambda: _copied(model), parts.train, parts.val, recipe, mirror=parts.mirror, teacher=teacher, seed=seed)
        recipe = tried[0].recipe
    hand_over = HandOver()
    for k, stretch in enumerate(planned):
        history += fine_tune(
            now, parts.train, recipe, mirror=parts.mirror, judge=_judge(now, parts), teacher=teacher, seed=seed,
            span=(stretch.start, stretch.end), begun=hand_over,
            checkpoint=checkpoint.with_name(f"{checkpoint.stem}.{k}{checkpoint.suffix}") if checkpoint else None, on_epoch=on_epoch,
        )  # fmt: skip
        if stretch.budgets is not None:
            smaller, step, found = _cut(now, parts, shape, stretch.budgets, criterion, round_to, min_width, seed, calibration)
            checks, worst = [*checks, *(f"cut after epoch {stretch.end}: {line}" for line in found.checked)], max(worst, found.max_error)
            hand_over.to_smaller(now, step)
            now, whole = smaller, compose(whole, step)
    return Trained(now, whole, tuple(history), tuple(checks), worst)


class HandOver:
    """The state of an optimiser, from that of each stretch (``optimizer``) to that of the smaller model's."""

    def __init__(self) -> None:
        self.optimizer: Any = None
        self._cut: tuple[Any, Plan] | None = None

    def __call__(self, optimizer: Any) -> None:
        if self._cut is not None:
            carry_state(self.optimizer, optimizer, *self._cut)
        self.optimizer = optimizer

    def to_smaller(self, model: Any, step: Plan) -> None:
        self._cut = model, step


def _copied(model: Any) -> Any:
    copied = build(model, None, weights_in(model))
    if model.compiled:
        copied.compile_from_config(model.get_compile_config())
    return copied


def _judge(model: Any, parts: Parts) -> Callable[[], tuple[float, float]]:
    def judge() -> tuple[float, float]:
        found = evaluate(model, parts.val)
        return found.top1, found.loss

    return judge


def _cut(
    model: Any,
    parts: Parts,
    shape: tuple[int, ...],
    budgets: Mapping[str, float],
    criterion: str,
    round_to: int,
    min_width: int,
    seed: int,
    calibration: int,
) -> tuple[Any, Plan, Verification]:
    coupling = couple(capture(model, shape))
    batch = batch_of(criterion)
    scores = score(model, coupling, criterion, sample(parts.train, calibration, seed, batch) if batch else None, seed=seed)
    step = make_plan(coupling, scores, budgets, round_to=round_to, min_width=min_width)
    smaller = apply(model, step)
    return smaller, step, verify(model, smaller, coupling, step)


def rewind(pruned: Any, plan: Plan, model: Any, earlier: Sequence[Any]) -> Any:
    """What `coppice.rewind` says. What the plan removes stays removed and what it masks stays zero."""
    before = _copied(model)
    try:
        before.set_weights(earlier)
    except (ValueError, TypeError) as error:
        raise CoppiceError(f"the earlier weights are not those of the dense model: {error}") from error
    ticket = apply(before, plan)
    have, want = ({name: array.shape for name, array in weights_in(one).items()} for one in (ticket, pruned))
    if have != want:
        raise CoppiceError("the plan is not what made the pruned model: its weights have other names or shapes")
    return ticket
