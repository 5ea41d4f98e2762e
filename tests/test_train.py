"""Fine-tuning learns, is decided by the seed, and resumes bit for bit."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from coppice.checkpoint import load_facts, write_atomic
from coppice.data import Loaders, load_data
from coppice.errors import CoppiceError
from coppice.evaluate import evaluate
from coppice.forward import PRECISIONS, training_layout
from coppice.recipe import Recipe
from coppice.train import _train_batches, fine_tune, fitting, make_optimizer, pick_precision

SHORT = Recipe(epochs=3, batch_size=64, precision="fp32", crop_pad=1, lr=0.05)

pytestmark = pytest.mark.usefixtures("one_thread")


class InterruptError(Exception):
    pass


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1), nn.Flatten(), nn.Linear(256, 10)
    )


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.contiguous().numpy().tobytes() for name, value in model.state_dict().items()}


def untimed(history) -> list:
    return [replace(result, seconds=0.0) for result in history]


def loaders(digits, shuffle: bool = True, workers: int = 0) -> Loaders:
    def loader(part, shuffle):
        images = torch.stack([part[k][0] for k in range(len(part))]).float() / 255
        return DataLoader(TensorDataset(images, part.labels), batch_size=64, shuffle=shuffle, num_workers=workers)

    return Loaders(loader(digits.train, shuffle), loader(digits.val, False), loader(digits.test, False))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_it_learns(digits, optimizer, schedule):
    model = small_net()
    before = evaluate(model, digits.test, digits.preprocess).top1
    recipe = replace(SHORT, optimizer=optimizer, schedule=schedule, lr=0.05 if optimizer == "sgd" else 5e-3)
    history = fine_tune(model, digits, recipe)
    after = evaluate(model, digits.test, digits.preprocess)
    assert before < 30
    assert after.top1 > 80
    assert [result.epoch for result in history] == [1, 2, 3]
    assert history[-1].train_loss < history[0].train_loss
    assert history[-1].val_top1 == evaluate(model, digits.val, digits.preprocess).top1


def test_bf16_learns_too(digits):
    model = small_net()
    fine_tune(model, digits, replace(SHORT, precision="bf16"))
    assert evaluate(model, digits.test, digits.preprocess).top1 > 80
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_result_is_decided_by_the_seed_alone(digits):
    def trained(seed, global_seed):
        model = small_net()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        fine_tune(model, digits, replace(SHORT, epochs=1), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return bits(model)

    assert trained(0, 1) == trained(0, 2)
    assert trained(0, 1) != trained(1, 1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_run_resumes_bit_for_bit(digits, tmp_path, optimizer, stop_after):
    recipe = replace(SHORT, optimizer=optimizer, lr=0.01, label_smoothing=0.1, grad_clip=1.0, distill=0.3, features=0.2, ema=0.9)
    teacher = small_net()
    undisturbed = small_net()
    expected = fine_tune(undisturbed, digits, recipe, teacher=teacher, seed=3)

    def stop(result):
        if result.epoch == stop_after:
            raise InterruptError

    path = tmp_path / "fine-tune.safetensors"
    with pytest.raises(InterruptError):
        fine_tune(small_net(), digits, recipe, teacher=teacher, seed=3, checkpoint=path, on_epoch=stop)
    resumed = small_net()
    nn.init.zeros_(resumed[0].weight)  # what it starts from is in the checkpoint
    torch.manual_seed(77)
    repeated = []
    history = fine_tune(resumed, digits, recipe, teacher=teacher, seed=3, checkpoint=path, on_epoch=repeated.append)
    assert [result.epoch for result in repeated] == list(range(stop_after + 1, 4))
    assert bits(resumed) == bits(undisturbed)
    assert untimed(history) == untimed(expected)


def test_an_interruption_within_an_epoch_loses_that_epoch_only(digits, tmp_path):
    expected = small_net()
    fine_tune(expected, digits, SHORT)
    path = tmp_path / "fine-tune.safetensors"

    def stop(done, total):
        if done == total // 2:
            raise InterruptError

    interrupted = small_net()
    with pytest.raises(InterruptError):
        fine_tune(interrupted, digits, SHORT, checkpoint=path, progress=stop)
    assert len(load_facts(path)["history"]) == 1
    assert interrupted[0].weight.is_contiguous()
    resumed = small_net()
    fine_tune(resumed, digits, SHORT, checkpoint=path)
    assert bits(resumed) == bits(expected)


@pytest.mark.parametrize("kind", ["images", "loaders"])
@pytest.mark.parametrize("stop_after", [1, 25])
def test_a_run_killed_within_an_epoch_goes_on_at_the_step_it_was_at(digits, tmp_path, kind, stop_after):
    """Dropout, an average, a teacher and shuffled loaders included."""
    recipe = replace(SHORT, epochs=2, lr=0.01, distill=0.3, ema=0.9, augment="crop+mixup" if kind == "images" else "light")
    data = digits if kind == "images" else loaders(digits)
    undisturbed, teacher = small_net(), small_net()
    expected = fine_tune(undisturbed, data, recipe, teacher=teacher)
    path = tmp_path / "fine-tune.safetensors"

    def stop(done, total):
        if done == stop_after:
            raise InterruptError

    with pytest.raises(InterruptError):
        fine_tune(small_net(), data, recipe, teacher=teacher, checkpoint=path, checkpoint_every=0, progress=stop)
    resumed, steps = small_net(), []
    nn.init.zeros_(resumed[0].weight)
    torch.manual_seed(77)
    history = fine_tune(resumed, data, recipe, teacher=teacher, checkpoint=path, progress=lambda done, total: steps.append(done))
    assert steps[0] == stop_after + 1
    assert bits(resumed) == bits(undisturbed)
    assert untimed(history) == untimed(expected)


def test_a_finished_run_is_not_repeated(digits, tmp_path):
    path = tmp_path / "fine-tune.safetensors"
    first, again = small_net(), small_net()
    expected = fine_tune(first, digits, SHORT, checkpoint=path)
    steps = []
    assert fine_tune(again, digits, SHORT, checkpoint=path, progress=lambda *step: steps.append(step)) == expected
    assert steps == []
    assert bits(again) == bits(first)


def test_a_checkpoint_of_another_run_is_refused(digits, tmp_path):
    path = tmp_path / "fine-tune.safetensors"
    fine_tune(small_net(), digits, replace(SHORT, epochs=1), checkpoint=path)
    with pytest.raises(CoppiceError, match=r"other settings \(epochs, seed\)"):
        fine_tune(small_net(), digits, SHORT, seed=9, checkpoint=path)
    with pytest.raises(CoppiceError, match="state of another model"):
        fine_tune(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, replace(SHORT, epochs=1), checkpoint=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CoppiceError, match="not a checkpoint"):
        fine_tune(small_net(), digits, replace(SHORT, epochs=1), checkpoint=path)


def test_the_measured_precision_is_kept_by_a_resumed_run(digits, tmp_path, monkeypatch):
    path = tmp_path / "fine-tune.safetensors"
    recipe = replace(SHORT, epochs=2, precision="auto")

    def stop(result):
        raise InterruptError

    monkeypatch.setattr("coppice.train.pick_precision", lambda model, batch: "bf16")
    expected = small_net()
    fine_tune(expected, digits, recipe)
    with pytest.raises(InterruptError):
        fine_tune(small_net(), digits, recipe, checkpoint=path, on_epoch=stop)
    monkeypatch.setattr("coppice.train.pick_precision", lambda model, batch: "fp32")
    resumed = small_net()
    fine_tune(resumed, digits, recipe, checkpoint=path)
    assert load_facts(path)["precision"] == "bf16"
    assert bits(resumed) == bits(expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # what PyTorch says of two processes on one core
def test_users_own_loaders(digits):
    def trained(workers):
        model = small_net()
        history = fine_tune(model, loaders(digits, workers=workers), SHORT)
        assert evaluate(model, digits.test, digits.preprocess).top1 > 80
        return bits(model), untimed(history)

    assert trained(0) == trained(0) == trained(2)  # shuffled, by the epoch's seed


@pytest.mark.parametrize(("train", "words"), [(iter([]), "has no length"), ([], "is empty")])
def test_loaders_without_batches(train, words):
    with pytest.raises(CoppiceError, match=words):
        fine_tune(small_net(), Loaders(train, [], []), SHORT)


def test_distillation_pulls_towards_the_teacher(digits):
    teacher = small_net()
    fine_tune(teacher, digits, SHORT)
    before, flags = bits(teacher), [module.training for module in teacher.modules()]

    def distance(weight):
        student = small_net()
        fine_tune(student, digits, replace(SHORT, epochs=1, distill=weight), teacher=teacher, seed=1)
        x = torch.stack([digits.test[k][0] for k in range(200)]).float() / 255
        with torch.no_grad():
            p, q = (torch.log_softmax(model.eval()(x), 1) for model in (student, copy.deepcopy(teacher)))
        return float(nn.functional.kl_div(p, q, reduction="batchmean", log_target=True))

    assert distance(1.0) < distance(0.0)
    assert bits(teacher) == before
    assert [module.training for module in teacher.modules()] == flags


@pytest.mark.parametrize("weight", ["distill", "features"])
def test_distillation_needs_a_teacher(digits, weight):
    with pytest.raises(CoppiceError, match="needs the dense model"):
        fine_tune(small_net(), digits, replace(SHORT, **{weight: 0.5}))


def test_an_average_of_the_weights_is_what_is_kept(digits):
    """A decay so small that the average is the weights themselves, and one so large that it hardly moves."""
    start, plain, quick, slow = (small_net() for _ in range(4))
    fine_tune(plain, digits, SHORT)
    fine_tune(quick, digits, replace(SHORT, ema=1e-12))
    history = fine_tune(slow, digits, replace(SHORT, ema=0.9999))
    torch.testing.assert_close(quick.state_dict()["0.weight"], plain.state_dict()["0.weight"])

    def moved(model):
        return float((model[0].weight - start[0].weight).detach().norm())

    assert 0 < moved(slow) < 0.1 * moved(plain)
    assert history[-1].val_top1 == evaluate(slow, digits.val, digits.preprocess).top1


def test_training_ends_when_it_is_enough(digits, tmp_path):
    path = tmp_path / "checkpoint"
    history = fine_tune(small_net(), digits, SHORT, checkpoint=path, enough=lambda result: result.epoch == 2)
    assert [result.epoch for result in history] == [1, 2]
    assert fine_tune(small_net(), digits, SHORT, checkpoint=path, enough=lambda result: result.epoch == 2) == history


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(digits):
    model = small_net()
    with torch.no_grad():
        model[6].bias[0] = math.nan
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(CoppiceError) as error:
        fine_tune(model, digits, SHORT)
    assert "the training loss became nan at epoch 1, step 1" in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) or name == "6.bias" for name, value in model.named_parameters())


def test_divergence_is_noticed(digits):
    with pytest.raises(CoppiceError, match=r"not finite|became"):
        fine_tune(small_net(), digits, replace(SHORT, lr=1e3, momentum=0.99))


def test_biases_and_normalisation_are_not_decayed():
    model = small_net()
    groups = make_optimizer(model, Recipe(optimizer="sgd", weight_decay=0.1)).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in decayed} == {"0.weight", "6.weight"}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_frozen_parameters_stay(digits):
    model = small_net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    fine_tune(model, digits, replace(SHORT, epochs=1))
    assert torch.equal(model[0].weight, before)
    model.requires_grad_(False)
    with pytest.raises(CoppiceError, match="no parameters to train"):
        fine_tune(model, digits, replace(SHORT, epochs=1))


def test_frozen_norms_keep_their_statistics_and_train_their_weights(digits):
    model = small_net()
    statistics, weight = model[1].running_var.clone(), model[1].weight.clone()
    fine_tune(model, digits, replace(SHORT, epochs=1, freeze_norm=True))
    assert torch.equal(model[1].running_var, statistics)
    assert not torch.equal(model[1].weight, weight)
    assert all(module.training == model.training for module in model.modules())


def test_a_batch_larger_than_the_data_trains_at_the_rate_of_all_of_it(digits):
    larger, whole = small_net(), small_net()
    recipe = replace(SHORT, epochs=1, lr=None)
    fine_tune(larger, digits, replace(recipe, batch_size=100 * len(digits.train)))
    fine_tune(whole, digits, replace(recipe, batch_size=len(digits.train)))
    assert bits(larger) == bits(whole)


def test_no_epochs_change_nothing(digits):
    model = small_net()
    before = bits(model)
    assert fine_tune(model, digits, replace(SHORT, epochs=0)) == []
    assert bits(model) == before


def test_precision_is_picked_without_a_trace(digits):
    model = small_net()
    batch = (torch.rand(16, 1, 8, 8), torch.arange(16) % 10)
    before, state = bits(model), torch.get_rng_state()
    assert pick_precision(model, batch) in PRECISIONS
    assert bits(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_schedules_rise_to_the_peak_and_fall(schedule):
    recipe = Recipe(schedule=schedule, lr=0.1, warmup=0.2)
    rates = [recipe.lr_at(step, 100) for step in range(100)]
    assert rates.index(max(rates)) == 20
    assert max(rates) == pytest.approx(0.1)
    assert all(a < b for a, b in pairwise(rates[:21]))
    assert all(a > b for a, b in pairwise(rates[20:]))
    assert 0 < rates[-1] < 1e-4


def test_the_default_learning_rate_grows_with_the_batch():
    assert Recipe(optimizer="sgd", batch_size=256).peak_lr() == 2 * Recipe(optimizer="sgd").peak_lr()
    assert Recipe(optimizer="adamw").peak_lr() < Recipe(optimizer="sgd").peak_lr()
    assert Recipe(lr=0.3).peak_lr() == 0.3


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": -1},
        {"optimizer": "lion"},
        {"schedule": "step"},
        {"precision": "fp8"},
        {"augment": "heavy"},
        {"batch_size": 1},
        {"lr": math.nan},
        {"lr": -0.1},
        {"label_smoothing": 1.0},
        {"distill": 1.5},
        {"features": -1.0},
        {"ema": 1.0},
        {"temperature": 0},
        {"warmup": 1.0},
        {"grad_clip": -1},
        {"crop_pad": -1},
    ],
)
def test_settings_out_of_range_are_one_sentence(setting):
    with pytest.raises(CoppiceError) as error:
        Recipe(**setting)
    assert next(iter(setting)) in str(error.value)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_views_a_feature_map_can_be_trained(digits):
    class ViewNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
            self.linear = nn.Linear(8 * 8 * 8, 10)

        def forward(self, x):
            return self.linear(self.features(x).view(x.size(0), -1))

    torch.manual_seed(0)
    model = ViewNet()
    assert training_layout(model, torch.rand(4, 1, 8, 8), torch.arange(4)) is torch.contiguous_format
    fine_tune(model, digits, replace(SHORT, lr=0.1, augment="none"))
    assert evaluate(model, digits.test, digits.preprocess).top1 > 80


class ScaledWhenEvaluated(nn.Module):
    """Has a normalisation that only evaluation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = small_net(), nn.BatchNorm1d(10)

    def forward(self, x):
        return self.body(x) if self.training else self.scale(self.body(x))


def test_features_of_a_validation_pass_are_not_compared_with_those_of_a_step(digits, monkeypatch):
    student, teacher = ScaledWhenEvaluated(), ScaledWhenEvaluated()
    compared = []

    def loss(self, variance):
        compared.append(sorted(self._seen[0]))
        return torch.zeros(())

    monkeypatch.setattr("coppice.distillation.Features.loss", loss)
    fine_tune(student, digits, replace(SHORT, epochs=2, features=0.5), teacher=teacher)
    assert len(compared) > 2
    assert all(names == ["body.1"] for names in compared)


@pytest.mark.parametrize("augment", ["crop+mixup+cutmix+repeat2", "auto"])
def test_mixed_and_repeated_images_train_and_repeat_bit_for_bit(digits, augment):
    def trained():
        model = small_net()
        history = fine_tune(model, digits, replace(SHORT, augment=augment, distill=0.5), teacher=small_net())
        return bits(model), untimed(history)

    first = trained()
    assert first == trained()
    assert first[1][-1].train_loss < first[1][0].train_loss


def test_a_repeated_image_is_augmented_anew_each_time(digits):
    recipe = fitting(digits, replace(SHORT, augment="crop+repeat2"))
    batch = next(_train_batches(digits, recipe, 0, 1, torch.device("cpu")))
    x, y = batch.x, batch.y
    assert len(x) == 64
    assert torch.equal(y[::2], y[1::2])
    assert not torch.equal(x[::2], x[1::2])
