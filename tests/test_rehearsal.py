"""An open recipe takes the optimiser that a rehearsal finds best, decided by the seed and kept over a resumption."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from coppice.candidates import CANDIDATES, LEAST, MOST, rehearsal_steps
from coppice.checkpoint import load_facts
from coppice.errors import CoppiceError, DivergedError
from coppice.recipe import Recipe
from coppice.rehearsal import rehearse
from coppice.train import choose, fine_tune
from test_train import InterruptError, bits, digits, loaders, small_net, untimed  # noqa: F401  # digits is a fixture

OPEN = Recipe(epochs=2, batch_size=64, precision="fp32", crop_pad=1)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_best_of_all_candidates_is_what_trains(digits):  # noqa: F811
    model = small_net()
    before = bits(model)
    tried = choose(model, digits, OPEN, teacher=None, plan=None, seed=0)
    assert bits(model) == before
    assert len(tried) == len(CANDIDATES)
    assert [r.loss for r in tried] == sorted(r.loss for r in tried)
    assert tried[0].loss < tried[-1].loss

    left, right = small_net(), small_net()
    assert untimed(fine_tune(left, digits, OPEN)) == untimed(fine_tune(right, digits, tried[0].recipe))
    assert bits(left) == bits(right)


def test_a_rate_that_breaks_the_training_is_not_taken(digits):  # noqa: F811
    def train(model, part, recipe):
        assert len(part.train) == 20 * 64
        if recipe.optimizer == "sgd":
            raise DivergedError("the training loss became nan")
        return float(recipe.freeze_norm)

    found = rehearse(small_net(), digits, OPEN, 20, 0, train)
    assert found[0].recipe == replace(OPEN, optimizer="adamw", lr=replace(OPEN, optimizer="adamw").peak_lr())
    assert [r.loss for r in found] == [0.0, 1.0, math.inf, math.inf]


@pytest.mark.parametrize(("steps", "loss", "first"), [(LEAST, 1.1, "adamw"), (MOST, 1.1, "sgd"), (MOST, 1.2, "adamw")])
def test_a_long_run_has_patience_with_the_usual_rate(digits, steps, loss, first):  # noqa: F811
    usual = replace(OPEN, optimizer="sgd").peak_lr()
    found = rehearse(
        small_net(), digits, OPEN, steps, 0, lambda model, part, recipe: loss if recipe.lr == usual else 1.0 + (recipe.lr > 1e-3)
    )
    assert found[0].recipe.optimizer == first


def test_what_never_trains_says_why(digits):  # noqa: F811
    model = small_net()
    torch.nn.init.constant_(model[-1].bias, math.inf)
    with pytest.raises(CoppiceError, match="loss became nan"):
        fine_tune(model, digits, OPEN)


def test_users_own_loaders(digits):  # noqa: F811
    found = choose(small_net(), loaders(digits, shuffle=False), OPEN, teacher=None, plan=None, seed=0)
    assert all(math.isfinite(r.loss) for r in found)


def test_resumed_with_the_optimiser_that_was_chosen(digits, tmp_path, monkeypatch):  # noqa: F811
    undisturbed, model, checkpoint = small_net(), small_net(), tmp_path / "checkpoint"
    fine_tune(undisturbed, digits, OPEN)

    def stop(result):
        raise InterruptError

    with pytest.raises(InterruptError):
        fine_tune(model, digits, OPEN, checkpoint=checkpoint, on_epoch=stop)
    assert Recipe(**load_facts(checkpoint)["chosen"]).optimizer in ("sgd", "adamw")
    monkeypatch.setattr("coppice.train.choose", None)  # nothing is rehearsed again
    resumed = small_net()
    fine_tune(resumed, digits, OPEN, checkpoint=checkpoint)
    assert bits(resumed) == bits(undisturbed)


@pytest.mark.parametrize(("total", "steps"), [(10, LEAST), (1000, MOST), (500, 20)])
def test_a_rehearsal_is_a_small_part_of_the_run(total, steps):
    assert rehearsal_steps(total) == steps


def test_a_rate_without_an_optimiser_is_of_sgd():
    recipe = Recipe(lr=0.1)
    assert not recipe.open
    assert recipe.peak_lr() == 0.1
    assert OPEN.open
    with pytest.raises(CoppiceError, match="rehearsal"):
        OPEN.peak_lr()
    assert asdict(recipe)["optimizer"] == "auto"
