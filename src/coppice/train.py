"""Fine-tune a pruned network: a short schedule from trained weights, resumable bit for bit.

Everything random (order, augmentation, dropout) derives from (seed, epoch, step), and the learning rate from the step alone: so what was
killed within an epoch goes on at the step that its checkpoint has.

Several processes (`coppice.parallel`) each take their part of every batch; all that a batch means as a whole (the gradient, BatchNorm's
statistics, the loss) is that of all parts, and their models stay alike.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from coppice.along import Along
from coppice.augment import augment_batch, make_augmentation, make_mix
from coppice.candidates import Rehearsed, rehearsal_steps
from coppice.checkpoint import load_facts, load_state, save_checkpoint
from coppice.data import ImageData, Loaders, raw_batches, sample_batches
from coppice.distillation import Features, prediction_loss
from coppice.errors import CoppiceError, DivergedError
from coppice.evaluate import evaluate
from coppice.forward import device_of, forward, norms_with_statistics, pick_precision, training_layout, training_mode, weights_in
from coppice.loaders import Batch, loader_batches
from coppice.parallel import World, current, joined
from coppice.planning import Plan
from coppice.recipe import Recipe, augmentations, repeats
from coppice.rehearsal import rehearse
from coppice.seeding import generator, seeded
from coppice.torch.whole_batch import WholeBatch, check_alike, variance

__all__ = ["EpochResult", "Recipe", "fine_tune", "pick_precision"]


@dataclass(frozen=True)
class EpochResult:
    epoch: int  # from 1
    train_loss: float  # mean over the epoch's steps
    val_top1: float  # percent
    val_loss: float
    lr: float  # of the last step
    seconds: float


def fine_tune(
    model: nn.Module,
    data: ImageData | Loaders,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    plan: Plan | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
    enough: Callable[[EpochResult], bool] | None = None,
    along: Along | None = None,
    span: tuple[int, int] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[EpochResult]:
    """Train `model` in place on data.train, judging each epoch on data.val; returns what every epoch gave.

    `teacher` is the dense model, needed if `recipe.distill` or `recipe.features` is above zero, and `plan` what made `model` from it (None:
    nothing was removed); the teacher is not changed.
    `checkpoint`: written after every epoch (before `on_epoch`) and within one after as many seconds as `checkpoint_every`; if it exists,
    the steps it holds are not repeated, and on a CPU in fp32 with the same number of threads the result equals an undisturbed run's bit for
    bit.
    `progress` is told the steps done and in all, `on_epoch` each epoch's result; an epoch that is `enough` is the last.
    `along` goes with every step (masks, a regulariser); it must have been made for `model`.
    `span`: only the epochs after the first number up to the second, of all that the recipe has; with `optimizer` as it was then.
    Under torchrun all processes call this with the same model and data, and the functions that are told are called in each.
    Raises CoppiceError if the loss is not finite, the recipe needs a teacher, or the checkpoint is of another run.
    """
    if recipe.taught and teacher is None:
        raise CoppiceError("distillation needs the dense model as the teacher: pass it, or set distill and features to 0")
    with ExitStack() as stack:
        world = stack.enter_context(joined(device_of(model).type))
        recipe = fitting(data, recipe)
        steps = _agreed_steps(data, recipe, world)
        facts = world.first(lambda: _resume_facts(checkpoint, recipe, seed, steps))
        recipe, layout = _settled(model, data, recipe, facts, world)
        if recipe.open:
            chosen = facts["chosen"] or asdict(choose(model, data, recipe, teacher=teacher, plan=plan, seed=seed)[0].recipe)
            facts |= {"chosen": chosen}
            recipe = Recipe(**chosen)
        model.to(memory_format=layout)
        optimizer = optimizer or make_optimizer(model, recipe)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True) if recipe.ema > 0 else None
        history = [EpochResult(**result) for result in facts["history"]]
        if checkpoint is not None and facts["precision"]:
            load_state(checkpoint, model, optimizer, average, along.tensors if along else {})
        stack.callback(model.to, memory_format=torch.contiguous_format)
        stack.callback(optimizer.zero_grad)
        teacher = teacher if recipe.taught else None
        if teacher is not None:
            stack.enter_context(weights_in(teacher, layout))
        features = stack.enter_context(Features(model, teacher, plan)) if teacher is not None and recipe.features > 0 else None

        def save(within: _Within | None) -> None:
            known = {"precision": recipe.precision, "history": [asdict(result) for result in history]}
            facts.update(known, within=asdict(within) if within else None)
            if checkpoint is not None and world.rank == 0:
                save_checkpoint(checkpoint, model, optimizer, facts, average, along.tensors if along else {})

        within = _Within(**facts["within"]) if facts["within"] else _Within()
        keeping = (save, checkpoint_every) if checkpoint is not None else None
        run = _Run(model, average, teacher, features, data, recipe, optimizer, layout, seed, steps, progress, along, keeping, world)
        first, last = span or (0, recipe.epochs)
        for epoch in range(first + len(history) + 1, last + 1):
            if history and enough is not None and enough(history[-1]):
                break
            history.append(run.epoch(epoch, within))
            within = _Within()
            save(None)
            if on_epoch is not None:
                on_epoch(history[-1])
        if average is not None and history:
            model.load_state_dict(average.module.state_dict())
    return history


def _settled(
    model: nn.Module, data: ImageData | Loaders, recipe: Recipe, facts: dict[str, Any], world: World
) -> tuple[Recipe, torch.memory_format]:
    """The recipe with its precision, and the memory layout: what trials say, in the first process."""
    x, y = _first_batch(data, recipe, device_of(model))
    if recipe.precision == "auto":
        part = world.part(len(y))
        precision = facts["precision"] or world.first(lambda: pick_precision(model, (x[part], y[part])))
        recipe = replace(recipe, precision=precision)
    return recipe, world.first(lambda: training_layout(model, x, y))


def fitting(data: ImageData | Loaders, recipe: Recipe) -> Recipe:
    """The recipe with a batch no larger than the data (the learning rate goes with the images that really are in one) and the augmentation
    that suits its size. A user's own loaders batch and augment by themselves.
    """
    if not isinstance(data, ImageData):
        return recipe
    steps = "+".join(augmentations(recipe.augment, len(data.train))) or "none"
    return replace(recipe, batch_size=max(2, min(recipe.batch_size, len(data.train))), augment=steps)


def choose(
    model: nn.Module, data: ImageData | Loaders, recipe: Recipe, *, teacher: nn.Module | None, plan: Plan | None, seed: int
) -> list[Rehearsed]:
    """`recipe` with each optimiser that `coppice.rehearsal` tries, the best first; `model` is left as it is."""
    recipe = fitting(data, recipe)

    def train(copied: nn.Module, part: ImageData | Loaders, tried: Recipe) -> float:
        return fine_tune(copied, part, tried, teacher=teacher, plan=plan, seed=seed)[-1].val_loss

    return rehearse(model, data, recipe, rehearsal_steps(steps_per_epoch(data, recipe) * recipe.epochs), seed, train)


def freeze_norms(model: nn.Module) -> None:
    """Put every BatchNorm that has running statistics in evaluation mode: it uses them and leaves them alone. Its weights still train."""
    for norm in norms_with_statistics(model):
        norm.training = False


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Nesterov SGD or AdamW at the recipe's peak rate; biases and normalisation parameters (all vectors) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise CoppiceError("the model has no parameters to train")
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.peak_lr(), betas=(recipe.momentum, 0.999))
    return torch.optim.SGD(groups, lr=recipe.peak_lr(), momentum=recipe.momentum, nesterov=recipe.momentum > 0)


@dataclass(frozen=True)
class _Within:
    """How far an epoch is: steps done, the sum of their losses, and seconds."""

    steps: int = 0
    losses: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Run:
    """What stays the same over the epochs of one fine-tune."""

    model: nn.Module
    average: AveragedModel | None  # what is evaluated, where there is one
    teacher: nn.Module | None
    features: Features | None
    data: ImageData | Loaders
    recipe: Recipe
    optimizer: torch.optim.Optimizer
    layout: torch.memory_format
    seed: int
    steps: int  # an epoch
    progress: Callable[[int, int], None] | None
    along: Along | None
    keeping: tuple[Callable[[_Within], None], float] | None  # how to write a checkpoint within an epoch, and after how many seconds
    world: World

    @cached_property
    def objective(self) -> nn.Module:
        return self.world.wrap(_Objective(self.model, self._loss))

    def epoch(self, epoch: int, within: _Within) -> EpochResult:
        """The epoch of this number, from where it was left."""
        saved = time.perf_counter()
        started = saved - within.seconds
        device = device_of(self.model)
        total = self.steps * self.recipe.epochs
        losses, lr = within.losses, self.recipe.lr_at(epoch * self.steps - 1, total)
        with seeded(self.seed, "epoch", epoch, device=device):
            with training_mode(self.model, True):
                if self.recipe.freeze_norm:
                    freeze_norms(self.model)
                rest = _train_batches(self.data, self.recipe, self.seed, epoch, device, within.steps)
                for index, batch in enumerate(rest, within.steps):
                    done = (epoch - 1) * self.steps + index
                    with seeded(self.seed, "step", epoch, index, device=device):
                        losses += self._step(batch, self.recipe.lr_at(done, total), f"epoch {epoch}, step {index + 1}")
                        self._beside(done + 1, total)
                    if self.keeping is not None and self._clock(saved) >= self.keeping[1]:
                        self.keeping[0](_Within(index + 1, losses, time.perf_counter() - started))
                        saved = time.perf_counter()
                    if self.progress is not None:
                        self.progress(done + 1, total)
                    if index + 1 in (within.steps + 1, self.steps):
                        check_alike(self.world, self.model, f"epoch {epoch}, step {index + 1}")
            preprocess = self.data.preprocess if isinstance(self.data, ImageData) else None
            val = evaluate(
                self.model if self.average is None else self.average.module, self.data.val, preprocess, precision=self.recipe.precision
            )
        return EpochResult(epoch, losses / self.steps, val.top1, val.loss, lr, self._clock(started))

    def _clock(self, since: float) -> float:
        """Seconds by the first process's clock."""
        return self.world.numbers([time.perf_counter() - since])[0][0]

    def _step(self, batch: Batch, lr: float, where: str) -> float:
        """One step of the optimiser; returns the loss. A loss that is not finite is an error before it reaches the weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.objective(batch.x, batch.y, batch.part, batch.count)
        value = sum(part for (part,) in self.world.numbers([float(loss.detach()) * batch.share]))
        if not math.isfinite(value):
            raise DivergedError(
                f"the training loss became {value} at {where} (learning rate {lr:.3g}): lower the learning rate, clip gradients or use fp32"
            )
        self.optimizer.zero_grad()
        torch.autograd.backward(loss * (batch.share * self.world.size))  # gradients are averaged over the processes, parts may differ
        if self.recipe.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        return value

    def _beside(self, done: int, total: int) -> None:
        """What goes along with the step, then the average of what that left."""
        if self.along is not None:
            self.along.after_step(done, total)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _loss(self, x: Tensor, y: Tensor, part: slice, count: int) -> Tensor:
        """The mean loss of `x`, which is this part of a batch of so many."""
        if self.world.size == 1:
            return self._loss_of(x, y, torch.var)
        with WholeBatch(part, count):
            return self._loss_of(x, y, variance)

    def _loss_of(self, x: Tensor, y: Tensor, variance_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Cross-entropy, mixed with the divergence from the teacher's predictions, plus the distance from its features."""
        recipe = self.recipe
        if self.features is not None:
            self.features.clear()  # a validation pass was watched too, and may have run other layers
        z = forward(self.model, x, recipe.precision, self.layout)
        loss = F.cross_entropy(z, y, label_smoothing=recipe.label_smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad(), training_mode(self.teacher, False):
            target = forward(self.teacher, x, recipe.precision, self.layout)
        loss = (1 - recipe.distill) * loss + recipe.distill * prediction_loss(z, target, recipe.temperature)
        return loss if self.features is None else loss + recipe.features * self.features.loss(variance_of)


class _Objective(nn.Module):
    """The loss, as a module with the model's parameters: wrapped as a whole, so that the gradients waited for are those of the loss."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor, slice, int], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, x: Tensor, y: Tensor, part: slice, count: int) -> Tensor:
        return self._loss(x, y, part, count)


# --- data -----------------------------------------------------------------------------------------------------------


def steps_per_epoch(data: ImageData | Loaders, recipe: Recipe) -> int:
    """Raises CoppiceError where a user's loader has no length, or no batch."""
    if isinstance(data, ImageData):
        return max(1, len(data.train) // recipe.batch_size)  # a last, smaller batch is left out: the next epoch has another order
    try:
        steps = len(data.train)  # type: ignore[arg-type]  # an iterable in general
    except TypeError as error:
        raise CoppiceError("the training loader has no length: the learning-rate schedule needs the number of its batches") from error
    if steps < 1:
        raise CoppiceError("the training loader is empty")
    return steps


def _agreed_steps(data: ImageData | Loaders, recipe: Recipe, world: World) -> int:
    """Steps of an epoch. Raises CoppiceError where the processes' loaders differ in it, or a batch has no image for each process."""
    steps = steps_per_epoch(data, recipe)
    if any(other != steps for (other,) in world.numbers([steps])):
        raise CoppiceError("the training loader has another length in each process: give all of them the same data")
    if isinstance(data, ImageData) and recipe.batch_size < world.size:
        raise CoppiceError(f"a batch of {recipe.batch_size} images can't be shared by {world.size} processes: give larger batches")
    return steps


def _train_batches(
    data: ImageData | Loaders, recipe: Recipe, seed: int, epoch: int, device: torch.device, skipped: int = 0
) -> Iterator[Batch]:
    """The batches of an epoch after the first `skipped`, which a user's own loader makes all the same; of each this process's part."""
    world = current()
    if isinstance(data, Loaders):
        yield from islice(loader_batches(data.train, world, epoch, device), skipped, None)
        return
    transform = make_augmentation(recipe.augment, data.input_shape, pad=recipe.crop_pad, mirror=data.mirror)
    mix = make_mix(recipe.augment, len(data.classes))
    size, part = recipe.batch_size, world.part(recipe.batch_size)
    rows = None if world.size == 1 else _rows(part, size, mix is not None)
    drawn: Sequence[int] = generator(seed, "order", epoch).permutation(len(data.train)).tolist()
    order = [index for index in drawn for _ in range(repeats(recipe.augment))][: steps_per_epoch(data, recipe) * size]
    rest = order[skipped * size :]
    if rows is not None:
        rest = [rest[start + row] for start in range(0, len(rest), size) for row in rows]
    for step, (images, labels) in enumerate(raw_batches(data.train, rest, size if rows is None else len(rows)), skipped):
        images = augment_batch(images, transform, seed, epoch, step, rows, size)
        x, y = data.preprocess.normalise(images.to(device)), labels.to(device)
        if mix is not None:
            with seeded(seed, "mix", epoch, step, device=device):
                x, y = mix(x, y)
        own = part.stop - part.start
        yield Batch(x[-own:], y[-own:], part, size)


def _rows(part: slice, size: int, mixed: bool) -> list[int]:
    """The images of a batch that a process needs: its own, and with MixUp and CutMix the one before, as each is mixed with that."""
    return [row % size for row in range(part.start - mixed, part.stop)]


def _first_batch(data: ImageData | Loaders, recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    """A training batch to try things on."""
    preprocess = data.preprocess if isinstance(data, ImageData) else None
    with seeded(0, "first batch"):  # a user's loader may draw from the global generator
        return next(sample_batches(data.train, preprocess, images=recipe.batch_size, seed=0, batch_size=recipe.batch_size, device=device))


# --- resuming -------------------------------------------------------------------------------------------------------


def _resume_facts(checkpoint: Path | None, recipe: Recipe, seed: int, steps: int) -> dict[str, Any]:
    """What the header of this fine-tune's checkpoint says, or will say. Raises CoppiceError if the checkpoint is of another run."""
    known = {"recipe": asdict(recipe), "seed": seed, "steps": steps}
    fresh: dict[str, Any] = {**known, "precision": None, "chosen": None, "history": [], "within": None}
    if checkpoint is None or not checkpoint.exists():
        return fresh
    stored = load_facts(checkpoint)
    differing = [name for name, value in fresh["recipe"].items() if stored.get("recipe", {}).get(name) != value]
    differing += [name for name in ("seed", "steps") if stored.get(name) != fresh[name]]
    if differing or not isinstance(stored.get("history"), list):
        raise CoppiceError(f"{checkpoint} is of a fine-tune with other settings ({', '.join(differing)}): delete it to start again")
    return fresh | stored
