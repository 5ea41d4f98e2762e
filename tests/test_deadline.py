"""Plans that meet a latency: planned, timed, corrected; and the whole loop with such a target. No test asserts how long anything takes."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import coppice
from coppice.cli import run
from coppice.deadline import CORRECTIONS, TimedModel, plan_on_time
from coppice.demo import DigitsNet
from coppice.errors import CoppiceError
from coppice.latency import LatencyModel, latency_model
from coppice.microbench import PROFILERS, OpShape
from coppice.planning import kept_widths
from coppice.recipe import Recipe
from coppice.timing import Measurement, Setting

pytestmark = pytest.mark.usefixtures("busy_machine")
HERE = Setting("torch", 1, 1)
GRID = 8


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """What is cut depends on the weights; with some a plan is still a fraction of a percent too slow when its corrections are used up."""
    torch.manual_seed(0)


@pytest.fixture
def staircase(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose ops cost what their channels, rounded up to the grid, cost."""

    def profile(ops: Sequence[OpShape], threads: int) -> list[float]:
        del threads
        return [1e-9 * math.prod(-(-size // GRID) * GRID if size > 4 else size for size in (*op.sizes[1:], *op.space)) for op in ops]

    monkeypatch.setitem(PROFILERS, "torch", profile)


class SlowClock:
    """Every model takes a fixed factor of what the latency model would say."""

    setting = HERE

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def time(self, model: nn.Module) -> TimedModel:
        coupling = coppice.couple(coppice.capture(model, torch.zeros(1, 1, 8, 8)))
        return TimedModel(self.factor * alone(coupling), Measurement((), (), {}, {}))


def alone(coupling: coppice.coupling.Coupling) -> float:  # type: ignore[name-defined]
    return latency_model(coupling, HERE, 1.0).table


def predicted(model: nn.Module) -> tuple[coppice.coupling.Coupling, LatencyModel]:  # type: ignore[name-defined]
    coupling = coppice.couple(coppice.capture(model, torch.zeros(1, 1, 8, 8)))
    return coupling, latency_model(coupling, HERE, alone(coupling))


def test_widths_stay_on_the_runtime_s_grid_and_within_the_budget(staircase: None) -> None:
    model = DigitsNet().eval()
    coupling, predictor = predicted(model)
    assert predictor.grid == GRID
    scores = coppice.score(model, coupling, "l2")
    found = plan_on_time(model, coupling, scores, {"latency": 0.5 * predictor.dense}, SlowClock(1.0), predictor, round_to=1, min_width=1)  # type: ignore[arg-type]
    assert len(found.tried) == 1
    assert 0.45 * predictor.dense < found.predicted <= 0.5 * predictor.dense
    assert found.timed.seconds == pytest.approx(found.predicted, rel=0.02)
    assert all(len(axis.keep) % GRID == 0 for axis in found.plan.axes)


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_a_plan_that_misses_is_corrected(factor: float, staircase: None) -> None:
    model = DigitsNet().eval()
    coupling, predictor = predicted(model)
    asked = 0.6 * predictor.dense
    scores = coppice.score(model, coupling, "l2")
    found = plan_on_time(model, coupling, scores, {"latency": asked}, SlowClock(factor), predictor, min_width=4, round_to=4)  # type: ignore[arg-type]
    assert 2 <= len(found.tried) <= 1 + CORRECTIONS
    assert 0.93 * asked <= found.timed.seconds <= asked
    assert (found.predicted, found.timed.seconds) in found.tried


class BlockClock(SlowClock):
    """Models with a stem of whole blocks of channels take half as long again as the sum of their ops."""

    def time(self, model: nn.Module) -> TimedModel:
        self.factor = 1.5 if model.stem[0].out_channels % GRID == 0 else 1.0  # type: ignore[index, union-attr]
        return super().time(model)


def test_widths_between_whole_blocks_are_tried_where_those_take_too_long(staircase: None) -> None:
    model = DigitsNet().eval()
    coupling, predictor = predicted(model)
    asked = 0.6 * predictor.dense
    scores = coppice.score(model, coupling, "l2")
    found = plan_on_time(model, coupling, scores, {"latency": asked}, BlockClock(1.0), predictor, min_width=4, round_to=4)  # type: ignore[arg-type]
    cut = [axis for axis in found.plan.axes if len(axis.keep) < axis.width]
    assert cut
    assert all(len(axis.keep) % GRID == GRID // 2 for axis in cut)
    assert found.timed.seconds <= asked


def test_budgets_are_met_together(staircase: None) -> None:
    model = DigitsNet().eval()
    coupling, predictor = predicted(model)
    budgets = {"latency": 0.7 * predictor.dense, "macs": 0.4 * coupling.cost().macs}
    plan = coppice.plan(coupling, coppice.score(model, coupling, "l2"), budgets, prices=predictor.prices)
    smaller = coppice.couple(coppice.capture(coppice.apply(model, plan), torch.zeros(1, 1, 8, 8)))
    assert smaller.cost().macs <= budgets["macs"]
    assert predictor.predict_plan(plan) <= budgets["latency"]


def test_what_can_not_be_reached_is_said_in_milliseconds(staircase: None) -> None:
    model = DigitsNet().eval()
    coupling, predictor = predicted(model)
    with pytest.raises(CoppiceError, match=r"latency=.* ms can't be reached: the smallest this model gets is .* ms"):
        coppice.plan(coupling, coppice.score(model, coupling, "l2"), {"latency": 1e-3 * predictor.dense}, prices=predictor.prices)


def test_layers_add_up(staircase: None) -> None:
    model = DigitsNet().eval()
    coupling, predictor = predicted(model)
    plan = coppice.plan(coupling, coppice.score(model, coupling, "l2"), {"latency": 0.5 * predictor.dense}, prices=predictor.prices)
    before, after = predictor.layers(), predictor.layers(kept_widths(coupling, plan))
    assert {"stem.0", "join.0", "classifier"} <= before.keys() == after.keys()
    assert sum(before.values()) == pytest.approx(predictor.dense)
    assert sum(after.values()) == pytest.approx(predictor.predict_plan(plan))


def test_the_loop_times_what_it_cuts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(64, 1, 16, 16), torch.randint(0, 10, (64,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=32)
    before = torch.get_num_threads()
    result = coppice.prune(
        DigitsNet(), (loader, loader, loader), "latency=0.7@onnxruntime,params=0.9", criterion="l2", allocation="global",
        recipe=Recipe(epochs=0), calibration=32, out=tmp_path / "run",
    )  # fmt: skip
    assert torch.get_num_threads() == before
    found = result.metrics["latency"]
    assert found["measured"] == result.metrics["pruned"]["latency"] == result.metrics["history"][-1]["latency"]
    assert found["dense"] == result.metrics["dense"]["latency"]
    assert found["setting"] == {"runtime": "onnxruntime", "threads": 1, "batch": 1}
    assert [found["predicted"], found["measured"]] in found["tried"]
    assert set(found["timings"]) == {"dense", "pruned"}
    assert "latency (onnxruntime, 1 thread, batch 1)" in result.statement
    assert "Latency</h2>" in (tmp_path / "run" / "report.html").read_text()
    assert result.metrics["pruned"]["params"] <= 0.9 * result.metrics["dense"]["params"]


def test_bad_targets_are_refused_before_the_run_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"{coppice.demo.__file__}:digits_net"
    for target, says in (
        ("latency=0.5@torch.compile", "does not tell what single ops take"),
        ("latency=0.5@torch:threads=4000", "threads 4000"),
        ("latency=10s@torch", "meets it already"),
    ):
        out = tmp_path / "run"
        assert (
            run(["prune", "--model", model, "--data", "digits", "--mean", "0.3", "--std", "0.38", "--target", target, "--out", str(out)])
            == 2
        )
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1, said
        assert says in said[0]
        assert not out.exists()
