"""The verdict before any training, and what the command says. No test asserts how long anything takes."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coppice.cli import run
from coppice.errors import CoppiceError
from coppice.microbench import PROFILERS, OpShape
from coppice.targets import parse_target
from coppice.verdict import predict

pytestmark = pytest.mark.usefixtures("busy_machine")
SHAPE = (3, 32, 32)


class Lopsided(nn.Module):
    """Nearly all of its time is in one convolution; the last layers take none worth speaking of."""

    def __init__(self) -> None:
        super().__init__()
        self.heavy = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())
        self.light = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.light(self.heavy(x).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Lopsided().eval()


def test_the_verdict_is_of_a_model_that_was_made_and_timed(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = predict(model, SHAPE, parse_target("latency=0.5@torch"))
    assert found.reached is not None
    low, high = found.reached.timed.comparison.interval
    assert low <= found.reached.timed.comparison.ratio <= high
    assert found.asked == pytest.approx(0.5 * found.dense)
    assert found.least < found.dense
    assert sum(seconds for _, seconds in found.layers) == pytest.approx(found.dense)
    assert "heavy.2" in dict(found.layers)
    assert [seconds for _, seconds in found.layers] == sorted((seconds for _, seconds in found.layers), reverse=True)
    assert str(found).endswith("can be met." if found.met else "can't be met.")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    json.dumps(found.to_dict())


def test_it_says_which_cuts_buy_nothing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_size(ops: Sequence[OpShape], threads: int) -> list[float]:
        del threads
        return [1e-9 * (op.elements if op.kind == "conv" else 1) for op in ops]

    monkeypatch.setitem(PROFILERS, "torch", by_size)
    found = predict(model, SHAPE, parse_target("latency=0.5@torch"))
    buys = {cut.axes[0]: cut for cut in found.buys}
    assert next(iter(buys)) in ("heavy.0.weight:0", "heavy.2.weight:0")
    assert buys["heavy.2.weight:0"].anything
    assert buys["heavy.2.weight:0"].halved == 64
    assert not buys["light.0.weight:0"].anything


def test_a_target_that_can_not_be_met_is_said_with_the_least_that_can(model: nn.Module) -> None:
    found = predict(model, SHAPE, parse_target("latency=1us@torch"))
    assert found.reached is None
    assert not found.met
    assert "can't be met" in str(found)
    assert found.least > found.asked


def test_a_target_without_a_latency_is_refused(model: nn.Module) -> None:
    with pytest.raises(CoppiceError, match=r"latency=0\.5@onnxruntime"):
        predict(model, SHAPE, parse_target("macs=0.5"))


def factory(folder: Path) -> str:
    path = folder / "lopsided.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_verdict import Lopsided\n")
    return f"{path}:Lopsided"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["predict", factory(tmp_path), "--input", "1,3,32,32", "--target"]
    status = run([*given, "latency=0.7@torch"])
    said = capsys.readouterr()
    assert "heavy.2" in said.out
    assert "what halving an axis buys" in said.out
    assert (status, "can be met" in said.out, "can't be met" in said.err) in ((0, True, False), (2, False, True))
    assert run([*given, "latency=1us@torch", "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["met"] is False
    assert said.err.startswith("coppice: ")
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--target", "latency=0.5@torch"], "--input"),
        (["--target", "macs=0.5", "--input", "1,3,32,32"], "latency=0.5@onnxruntime"),
        (["--target", "latency=0.5@torch", "--input", "1"], "--input 1"),
        (["--target", "latency=0.5", "--input", "1,3,32,32"], "say where"),
    ],
    ids=str,
)
def test_bad_input(changes: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["predict", factory(tmp_path), *changes]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert says in said[0]
