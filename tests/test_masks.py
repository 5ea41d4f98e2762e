"""Masks: the right weights, along the right dim, held through training, saved in the plan, verified."""

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import coppice
from coppice.cli import run
from coppice.coupling import Coupling
from coppice.data import load_data
from coppice.demo import digits_net
from coppice.errors import CoppiceError, VerificationError
from coppice.masking import plan_of, unpacked, weight_scores
from coppice.masks import MaskRecipe, Site, choose, cubic, erk, pattern, sites, sparsity
from coppice.planning import Plan, compose
from coppice.recipe import Recipe
from coppice.run import INT8, PLAN, SPARSE, read_json, read_tensors
from coppice.torch.masking import Growing, Held, semi_structured
from coppice.train import fine_tune

pytestmark = pytest.mark.usefixtures("one_thread")


class Many(nn.Module):
    """A weight of every kind: stem of three inputs, grouped, depthwise, transposed in groups, linear, matrix product, table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.grouped, self.depthwise = nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 32, 3, groups=32)
        self.up = nn.ConvTranspose2d(32, 24, 2, groups=2)
        self.fc = nn.Linear(24, 12)
        self.plain = nn.Parameter(torch.randn(12, 8))
        self.table = nn.Embedding(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.up(self.depthwise(self.grouped(x))).mean((2, 3))
        out: torch.Tensor = self.fc(x) @ self.plain + self.table(torch.zeros(1, dtype=torch.long))
        return out


def coupled(model: nn.Module, *shape: int) -> Coupling:
    return coppice.couple(coppice.capture(model.eval(), torch.randn(*shape)))


@pytest.fixture(scope="module")
def many() -> tuple[nn.Module, Coupling]:
    torch.manual_seed(0)
    model = Many()
    return model, coupled(model, 2, 3, 12, 12)


@pytest.fixture
def digits():  # type: ignore[no-untyped-def]
    data = load_data("digits")
    return replace(data, train=data.train.subset(range(512)), val=data.val.subset(range(64)))


def some_batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 12, 12, generator=generator), torch.arange(8)) for _ in range(count)]


def test_what_can_be_masked_and_along_which_dim(many: tuple[nn.Module, Coupling]) -> None:
    found, dense = sites(many[1])
    assert {s.name: (s.along, s.outputs, s.run) for s in found} == {
        "stem.weight": ((1,), (0,), 3), "grouped.weight": ((1,), (0,), 8), "depthwise.weight": ((1,), (0,), 1),
        "up.weight": ((0,), (1,), 16), "fc.weight": ((1,), (0,), 24), "plain": ((0,), (1,), 12),
    }  # fmt: skip
    assert dense["norm.weight"] == dense["fc.bias"] == "it is a vector"
    assert "embedding" in dense["table.weight"]
    assert sum(s.macs for s in found) == many[1].cost().macs


def test_macs_left_in_theory_are_those_of_the_weights_that_stay(many: tuple[nn.Module, Coupling]) -> None:
    found = next(s for s in sites(many[1])[0] if s.name == "fc.weight")
    gone = np.arange(found.size).reshape(found.shape) % 4 != 0
    left = sparsity(many[1], {"fc.weight": ~gone})
    assert left.zeros == gone.sum()
    assert left.dense_macs - left.macs == gone.sum()  # a linear layer multiplies once by each weight


def test_two_of_every_four_along_the_input(many: tuple[nn.Module, Coupling]) -> None:
    model, coupling = many
    masked, plan = coppice.mask(model, coupling, MaskRecipe(nm="2:4"))
    masks = unpacked(plan)
    assert masks.keys() == {"grouped.weight", "up.weight", "fc.weight", "plain"}  # 3 and 1 inputs don't divide by 4
    weights = dict(model.named_parameters())
    for site in sites(coupling)[0]:
        if site.name in masks:
            runs = np.moveaxis(masks[site.name], site.along[0], -1).reshape(-1, 4)
            size = np.moveaxis(weights[site.name].detach().abs().numpy(), site.along[0], -1).reshape(-1, 4)
            assert (runs.sum(1) == 2).all()
            assert (np.where(runs, size, np.inf).min(1) >= np.where(runs, -np.inf, size).max(1)).all()
    assert sparsity(coupling, masks, MaskRecipe(nm="2:4")).left_dense["stem.weight"] == "its 3 inputs don't divide by 2:4"
    assert all(bool((p == 0).eq(torch.from_numpy(~masks[n])).all()) for n, p in masked.named_parameters() if n in masks)


@pytest.mark.parametrize("scope", ["global", "layer", "row", "erk"])
def test_shares(scope: str) -> None:
    where = [Site("a", (64, 32, 3, 3), (1,), (0,), 32, 1), Site("b", (10, 64), (1,), (0,), 64, 1)]
    generator = np.random.default_rng(0)
    scores = {"a": generator.random(where[0].shape), "b": 100 + generator.random(where[1].shape)}
    masks = choose(scores, where, MaskRecipe(0.8, scope=scope))
    share = 1 - sum(m.sum() for m in masks.values()) / sum(s.size for s in where)
    assert share == pytest.approx(0.8, abs=0.01)
    if scope == "global":
        assert masks["b"].all()
        assert scores["a"][masks["a"]].min() > np.sort(scores["a"], axis=None)[len(scores["a"].ravel()) // 2]
    if scope == "row":
        assert {tuple(m.reshape(len(m), -1).sum(1)) for m in masks.values()} == {(58,) * 64, (13,) * 10}
    if scope == "erk":
        density = erk(where, 0.2)
        assert sum(density[s.name] * s.size for s in where) == pytest.approx(0.2 * sum(s.size for s in where))
        assert density["b"] > density["a"]


def test_no_layer_is_emptied() -> None:
    where = [Site("a", (64, 64), (1,), (0,), 64, 1), Site("b", (64, 64), (1,), (0,), 64, 1)]
    masks = choose({"a": np.zeros((64, 64)), "b": np.random.default_rng(0).random((64, 64))}, where, MaskRecipe(0.9))
    assert masks["a"].sum() >= 40
    assert masks["a"].sum() + masks["b"].sum() == round(0.1 * 2 * 64 * 64)


def test_the_cubic_curve() -> None:
    curve = [cubic(0.9, done, 300) for done in range(301)]
    assert curve[0] == 0
    assert curve[200:] == [0.9] * 101
    assert all(a <= b for a, b in pairwise(curve))
    assert curve[100] == pytest.approx(0.9 * (1 - 0.5**3))


def test_wanda_is_the_weight_times_the_norm_of_its_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    batches = [(torch.randn(16, 6), torch.zeros(16)) for _ in range(2)]
    coupling = coupled(model, 2, 6)
    scores = weight_scores(model, coupling, sites(coupling)[0], "wanda", batches, 0)
    x = torch.cat([x for x, _ in batches])
    hidden = torch.relu(model[1](x)).detach()
    for name, inputs, layer in (("1.weight", x, model[1]), ("3.weight", hidden, model[3])):
        assert np.allclose(scores[name], layer.weight.detach().abs() * inputs.square().mean(0).sqrt(), rtol=1e-5)


@pytest.mark.parametrize("recipe", [MaskRecipe(0.6, criterion="sparsegpt"), MaskRecipe(nm="2:4", criterion="sparsegpt")])
def test_obs_makes_good_what_goes(many: tuple[nn.Module, Coupling], recipe: MaskRecipe) -> None:
    model, coupling = many
    x, batches = torch.cat([x for x, _ in some_batches(6)]), some_batches(6)
    updated, plan = coppice.mask(model, coupling, recipe, batches)
    plain = coppice.apply(model, plan)  # the same masks, the weights that stay as they were
    with torch.no_grad():
        want = model(x)
        assert (updated(x) - want).square().mean() < 0.7 * (plain(x) - want).square().mean()
    weights = dict(updated.named_parameters())
    assert all(not weights[name].detach()[torch.from_numpy(~found)].any() for name, found in unpacked(plan).items())


@pytest.mark.parametrize("criterion", ["gradient", "taylor", "random"])
def test_criteria_mask_their_lowest_scores(many: tuple[nn.Module, Coupling], criterion: str) -> None:
    model, coupling = many
    where, _ = sites(coupling)
    scores = weight_scores(model, coupling, where, criterion, some_batches(), 3)
    masked, plan = coppice.mask(model, coupling, MaskRecipe(0.5, criterion=criterion, scope="layer"), some_batches(), 3)
    for name, found in unpacked(plan).items():
        assert scores[name][found].min() >= scores[name][~found].max()
    coppice.verify(model, masked, coupling, plan)


def test_masks_in_a_plan_with_a_structured_cut(many: tuple[nn.Module, Coupling]) -> None:
    model, coupling = many
    first = coppice.plan(coupling, coppice.score(model, coupling, "l1"), {"macs": 0.6 * coupling.cost().macs})
    smaller = coppice.apply(model, first)
    masked, step = coppice.mask(smaller, coupled(smaller, 2, 3, 12, 12), MaskRecipe(0.5))
    whole = Plan.from_json(compose(first, step).to_json())
    again = coppice.apply(model, whole)
    assert all(torch.equal(a, b) for a, b in zip(masked.state_dict().values(), again.state_dict().values(), strict=True))
    coppice.verify(model, again, coupling, whole)
    with torch.no_grad():
        again.fc.weight[unpacked(whole)["fc.weight"] == False] += 1  # noqa: E712
    with pytest.raises(VerificationError, match=r"fc\.weight"):
        coppice.verify(model, again, coupling, whole)


def test_a_cut_after_masks_cuts_the_masks(many: tuple[nn.Module, Coupling]) -> None:
    model, coupling = many
    masked, first = coppice.mask(model, coupling, MaskRecipe(0.5))
    second = coppice.plan(coupling, coppice.score(masked, coupling, "l2"), {"macs": 0.6 * coupling.cost().macs})
    whole = compose(first, second)
    want, found = coppice.apply(masked, second).state_dict(), coppice.apply(model, whole).state_dict()
    assert want["grouped.weight"].shape != (32, 8, 3, 3)
    assert all(torch.equal(want[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize(
    "broken", [{"shape": [2, 2]}, {"bits": "!!"}, {"shape": [-12, 24]}, {"shape": [10**9, 10**9]}, {"shape": [1.5, 2]}]
)
def test_a_plan_with_a_broken_mask(many: tuple[nn.Module, Coupling], broken: dict[str, object]) -> None:
    plan = plan_of(many[1], {"fc.weight": np.ones((12, 24), bool)})
    raw = json.loads(plan.to_json())
    raw["masks"]["fc.weight"] |= broken
    with pytest.raises(CoppiceError, match="not a pruning plan"):
        Plan.from_json(json.dumps(raw))


def test_masks_of_another_model_are_refused(many: tuple[nn.Module, Coupling]) -> None:
    with pytest.raises(CoppiceError, match=r"fc\.weight is of shape \(2, 2\)"):
        coppice.apply(many[0], plan_of(many[1], {"fc.weight": np.ones((2, 2), bool)}))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_masked_weights_stay_zero_in_a_loop_of_ones_own(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.01, **options)  # type: ignore[call-arg]
    gone = ~np.eye(8, dtype=bool)
    handle = coppice.hold_masks(model, {"0.weight": ~gone}, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
        assert bool((model[0].weight[torch.from_numpy(gone)] == 0).all())
    handle.remove()
    step()
    assert not bool((model[0].weight[torch.from_numpy(gone)] == 0).all())


def test_masks_are_held_by_fine_tuning_and_the_average_of_its_weights(digits) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = digits_net()
    masked, plan = coppice.mask(model, coupled(model, 2, 1, 8, 8), MaskRecipe(0.8))
    before = masked.stem[0].weight.clone()
    fine_tune(masked, digits, Recipe(epochs=1, precision="fp32", ema=0.9, lr=0.05), along=Held(masked, unpacked(plan)))
    weights = dict(masked.named_parameters())
    assert all(bool((weights[n].detach()[torch.from_numpy(~m)] == 0).all()) for n, m in unpacked(plan).items())
    assert not torch.equal(before, masked.stem[0].weight)


class InterruptError(Exception):
    pass


@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
def test_growing_masks_reach_their_share_and_resume_bit_for_bit(digits, tmp_path: Path, criterion: str) -> None:  # type: ignore[no-untyped-def]
    recipe = Recipe(epochs=3, precision="fp32", lr=0.05, ema=0.5)
    asked = MaskRecipe(0.9, criterion=criterion, schedule="cubic")

    def start() -> tuple[nn.Module, Growing]:
        torch.manual_seed(0)
        model = digits_net()
        return model, Growing(model, sites(coupled(model, 2, 1, 8, 8))[0], asked)

    def stop(result: object) -> None:
        raise InterruptError

    undisturbed, growing = start()
    fine_tune(undisturbed, digits, recipe, along=growing)
    masks = growing.finish()
    assert sum(int((~m).sum()) for m in masks.values()) / sum(m.size for m in masks.values()) == pytest.approx(0.9, abs=1e-3)
    assert growing.said() == "90.0 % of the weights are zero"
    model, again = start()
    with pytest.raises(InterruptError):
        fine_tune(model, digits, recipe, checkpoint=tmp_path / "c", on_epoch=stop, along=again)
    model, again = start()
    fine_tune(model, digits, recipe, checkpoint=tmp_path / "c", along=again)
    again.finish()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), undisturbed.state_dict().values(), strict=True))


def test_models_pruned_by_pytorch_are_taken_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    torch_prune.random_unstructured(model[3], "weight", amount=100)
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    plain, masks = coppice.take_in(model)
    assert torch.equal(plain(x), want)
    assert {n: int((~m).sum()) for n, m in masks.items()} == {"0.weight": 108, "3.weight": 100}
    assert sorted(plain.state_dict()) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    assert "0.weight_mask" not in dict(plain.named_buffers())
    assert hasattr(model[0], "weight_mask")  # the model given is as it was
    coupling = coupled(plain, 2, 3, 8, 8)
    coppice.verify(plain, plain, coupling, plan_of(coupling, masks))
    with pytest.raises(CoppiceError, match="nothing to take in"):
        coppice.take_in(plain)


def test_two_four_tensors_need_a_gpu_that_has_them() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(CoppiceError, match="compute capability"):
        semi_structured(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sparsity": 1.0}, "share of weights"),
        ({"sparsity": float("nan")}, "share of weights"),
        ({"nm": "4:4"}, "is no pattern"),
        ({"nm": "2of4"}, "is no pattern"),
        ({"nm": "2:4", "sparsity": 0.5}, "not both"),
        ({"nm": "2:4", "schedule": "iterative"}, "at once"),
        ({"criterion": "best"}, "choose one of"),
        ({"sparsity": 0.5, "criterion": "movement"}, "cubic"),
        ({"sparsity": 0.5, "criterion": "wanda", "schedule": "cubic"}, "drop the cubic"),
        ({"sparsity": 0.5, "criterion": "sparsegpt", "scope": "global"}, "layer by layer"),
        ({"sparsity": 0.5, "schedule": "iterative", "steps": 0}, "1 or more"),
    ],
)
def test_settings_that_can_not_be(given: dict[str, object], says: str) -> None:
    with pytest.raises(CoppiceError, match=says):
        MaskRecipe(**given)  # type: ignore[arg-type]
    assert pattern("2:4") == (2, 4)


def test_images_are_asked_for(many: tuple[nn.Module, Coupling]) -> None:
    with pytest.raises(CoppiceError, match="need calibration batches"):
        coppice.mask(*many, MaskRecipe(0.5, criterion="wanda"))


def test_structured_then_masks_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    torch.manual_seed(0)
    arguments = [
        "prune", "--model", f"{Path(coppice.__file__).parent / 'demo.py'}:digits_net", "--data", "digits", "--target", "macs=0.6",
        "--sparsity", "0.8", "--mask-schedule", "iterative", "--mask-steps", "2", "--epochs", "2", "--criterion", "l1",
        "--allocation", "global", "--no-repair", "--calibration", "64", "--threads", "1", "--precision", "fp32", "--int8",
        "--out", str(out),
    ]  # fmt: skip
    assert run(arguments) == 0, capsys.readouterr().err
    assert "80.0 % of" in capsys.readouterr().out
    metrics = read_json(out / "metrics.json")
    assert metrics["masks"]["share"] == pytest.approx(0.8, abs=1e-3)
    assert metrics["masks"]["file_bytes"] == (out / SPARSE).stat().st_size < 0.35 * metrics["masks"]["dense_file_bytes"]
    assert any("masks" in line for line in metrics["verification"]["checks"])
    plan = Plan.from_json((out / PLAN).read_text())
    assert any(len(axis.keep) < axis.width for axis in plan.axes)
    small, whole = coppice.load_sparse(out / SPARSE), read_tensors(out / "model.safetensors")
    assert all(torch.equal(small[name], tensor) for name, tensor in whole.items())
    model = coppice.load(out)
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if n in plan.weight_masks)
    assert zeros >= metrics["masks"]["zeros"]
    assert all(text in (out / "report.html").read_text() for text in ("Single weights that are zero", "<h2>INT8</h2>"))
    assert abs(metrics["int8"]["top1"] - metrics["pruned"]["top1"]) < 10
    assert metrics["int8"]["bytes"] == (out / INT8).stat().st_size < 0.6 * metrics["int8"]["onnx_bytes"]


def test_masks_alone_in_python_with_a_training_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    data = torch.utils.data.TensorDataset(torch.randn(24, 1, 8, 8), torch.arange(24) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=8)

    def train(network: nn.Module, epochs: int) -> None:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01)

    before = copy.deepcopy(model.state_dict())
    result = coppice.prune(model, (loader, loader, loader), masks=MaskRecipe(0.5), train=train, rounds=1, recipe=Recipe(epochs=1))
    assert result.met
    assert "50.0 % of" in result.statement
    held = unpacked(result.plan)
    assert all(bool((p.detach()[torch.from_numpy(~held[n])] == 0).all()) for n, p in result.model.named_parameters() if n in held)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with pytest.raises(CoppiceError, match="your own training function"):
        coppice.prune(model, (loader, loader, loader), masks=MaskRecipe(0.5, schedule="cubic"), train=train)


@pytest.mark.parametrize(("schedule", "said"), [("iterative", ["", "", "SGD at 0", "", "SGD at 0"]), ("cubic", ["", "SGD at 0"])])
def test_each_step_says_how_it_was_trained_itself(schedule: str, said: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    data = torch.utils.data.TensorDataset(torch.randn(24, 1, 8, 8), torch.arange(24) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    recipe = Recipe(epochs=4, lr=0.0, precision="fp32")
    masks = MaskRecipe(0.5, schedule=schedule, steps=2)
    history = coppice.prune(model, (loader, loader, loader), masks=masks, rounds=1, recipe=recipe, threads=1).metrics["history"]
    assert [step["optimizer"] for step in history] == said
    assert all(step["taken"] for step in history if not step["training"])
