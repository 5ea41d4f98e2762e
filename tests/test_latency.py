"""The latency model: which ops are timed, at which widths, and what their sum says. No test asserts how long anything takes."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice import microbench
from coppice.errors import CoppiceError
from coppice.latency import latency_model
from coppice.microbench import PROFILERS, OpShape, time_ops
from coppice.optable import OpTable, Surface, levels_of, surfaces
from coppice.planning import Plan, kept_widths
from coppice.timing import Setting
from coppice.torch.timed import timed

HERE = Setting("torch", 1, 1)
OPS = (
    OpShape("conv", (2, 1, 8, 16), (9, 9), (3, 3), (1, 1), (1, 1), (1, 1), "Relu"),
    OpShape("conv", (1, 16, 1, 1), (9, 9), (3, 3), (2, 2), (1, 1), (1, 1), "Clip"),
    OpShape("conv", (1, 2, 4, 8), (9,), (1,), (1,), (0,), (1,)),
    OpShape("conv_transpose", (1, 1, 8, 4), (5, 5), (2, 2), (2, 2), (0, 0), (1, 1)),
    OpShape("linear", (3, 16, 8)),
    OpShape("product", (2, 3, 4, 5)),
    OpShape("attention", (4, 9, 9, 8, 8)),
)


class Mixed(nn.Module):
    """Convolutions of every kind, a flatten that multiplies widths, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.BatchNorm2d(32), nn.ReLU())
        self.point = nn.Conv2d(32, 48, 1)
        self.up = nn.ConvTranspose2d(48, 32, 2, 2)
        self.down = nn.Conv2d(32, 32, 4, 4)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.up(nn.functional.gelu(self.point(self.depthwise(self.stem(x))))))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.head(x.flatten(1))


def mixed() -> tuple[nn.Module, coppice.coupling.Coupling]:  # type: ignore[name-defined]
    torch.manual_seed(0)
    model = Mixed().eval()
    return model, coppice.couple(coppice.capture(model, torch.zeros(1, 3, 8, 8)))


def halved(coupling: coppice.coupling.Coupling, model: nn.Module) -> Plan:  # type: ignore[name-defined]
    return coppice.plan(coupling, coppice.score(model, coupling, "l2"), {"macs": 0.5 * coupling.cost().macs})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def by_elements(monkeypatch: pytest.MonkeyPatch) -> list[OpShape]:
    """A runtime whose ops take a nanosecond an element, and what it was asked for."""
    asked: list[OpShape] = []

    def profile(ops: Sequence[OpShape], threads: int) -> list[float]:
        del threads
        asked.extend(ops)
        return [1e-9 * op.elements for op in ops]

    monkeypatch.setitem(PROFILERS, "torch", profile)
    return asked


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_every_kind_of_op_is_timed(runtime: str) -> None:
    pytest.importorskip(runtime)
    assert all(seconds > 0 for seconds in time_ops(runtime, 1, OPS))


def test_an_op_faster_than_the_clock_is_timed_all_the_same() -> None:
    assert microbench._by_op({"op0_a": [2e-6, 1e-6], "op0_b": [3e-6], "op1_a": [1e-6, 0.0]}, 2) == [4e-6, microbench.HALF_A_TICK]


def test_an_op_that_the_runtime_is_silent_about_is_an_error() -> None:
    with pytest.raises(CoppiceError, match="does not tell what each single op takes"):
        microbench._by_op({"op0_a": [1e-6], "other": [1e-6]}, 2)


def test_ops_that_differ_have_different_keys() -> None:
    assert len({op.key() for op in OPS}) == len(OPS)
    assert OPS[0].key() == OPS[0].at(OPS[0].sizes).key() != OPS[0].at((2, 1, 8, 8)).key()


def test_large_ops_are_timed_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbench, "AT_ONCE", 2000)
    assert len(list(microbench._portions(OPS))) > 1
    assert all(seconds > 0 for seconds in time_ops("onnxruntime", 1, OPS))


def test_what_is_timed_is_what_the_model_runs() -> None:
    _, coupling = mixed()
    found = timed(coupling)
    kinds = [op.shape.kind for op in found.ops]
    assert kinds.count("conv") == 4
    assert kinds.count("conv_transpose") == 1
    assert kinds.count("linear") >= 2
    by_name = {op.name: op.shape for op in found.ops}
    assert by_name["stem.0"] == OpShape("conv", (1, 1, 3, 32), (8, 8), (3, 3), (2, 2), (1, 1), (1, 1), "Clip")
    assert by_name["depthwise.0"].sizes == (1, 32, 1, 1)
    assert by_name["depthwise.0"].activation == "Relu"
    assert by_name["point"].activation == ""
    assert by_name["head"].sizes == (1, 128, 5)
    assert len(found.inside) == 4  # two norms and two activations


def test_sizes_after_a_cut_are_those_of_the_pruned_model(by_elements: list[OpShape]) -> None:
    model, coupling = mixed()
    plan = halved(coupling, model)
    pruned = coppice.couple(coppice.capture(coppice.apply(model, plan), torch.zeros(1, 3, 8, 8)))
    predicted = latency_model(coupling, HERE, 1.0)
    widths = coupling.widths(kept_widths(coupling, plan))
    assert [price.sizes(widths) for price in predicted.ops] == [op.shape.sizes for op in timed(pruned).ops]


def test_the_sum_is_calibrated_to_the_whole(by_elements: list[OpShape]) -> None:
    model, coupling = mixed()
    ops = sum(1e-9 * op.shape.elements for op in timed(coupling).ops)
    for dense in (0.9 * ops, 2 * ops):
        found = latency_model(coupling, HERE, dense)
        assert found.predict() == pytest.approx(dense)
        assert found.table == pytest.approx(ops)
        half = found.predict(kept_widths(coupling, halved(coupling, model)))
        assert 0.3 * dense < half < 0.95 * dense
    assert latency_model(coupling, HERE, 2 * ops).unexplained == pytest.approx(0.5)


def test_a_batch_multiplies_the_first_size(by_elements: list[OpShape]) -> None:
    _, coupling = mixed()
    found = latency_model(coupling, Setting("torch", 1, 8), 1.0)
    assert [p.sizes({})[0] for p in found.ops] == [8 * op.shape.sizes[0] for op in timed(coupling).ops]


def test_ops_slower_than_their_model_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROFILERS, "torch", lambda ops, threads: [1e-3] * len(ops))
    _, coupling = mixed()
    latency_model(coupling, HERE, 1e-3 * len(timed(coupling).ops))
    with pytest.raises(CoppiceError, match="was busy meanwhile"):
        latency_model(coupling, HERE, 0.5e-3 * len(timed(coupling).ops))


def test_nothing_is_timed_twice(by_elements: list[OpShape]) -> None:
    _, coupling = mixed()
    first = latency_model(coupling, HERE, 1.0)
    count = len(by_elements)
    assert latency_model(coupling, HERE, 1.0).predict() == first.predict()
    assert len(by_elements) == count > 0
    OpTable.of_this_machine("torch", 1).path.write_text("{")
    latency_model(coupling, HERE, 1.0)
    assert len(by_elements) == 2 * count


def test_a_runtime_that_tells_nothing_of_its_ops_is_one_sentence() -> None:
    _, coupling = mixed()
    with pytest.raises(CoppiceError, match=r"torch\.compile does not tell what single ops take"):
        latency_model(coupling, Setting("torch.compile", 1, 1), 1.0)


@pytest.mark.parametrize("grid", [1, 8, 16])
def test_the_grid_is_found_by_measurement(grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def staircase(ops: Sequence[OpShape], threads: int) -> list[float]:
        del threads
        return [1e-6 * np.prod([-(-size // grid) * grid if size > 8 else size for size in op.sizes[1:]]) for op in ops]

    monkeypatch.setitem(PROFILERS, "torch", staircase)
    assert OpTable.of_this_machine("torch", 1).grid() == grid


def test_levels_are_on_the_grid_but_for_the_full_width() -> None:
    assert levels_of(8, 24, 16, 1) == (16, 24)
    assert levels_of(100, 100, 16, 1) == (100,)
    assert levels_of(16, 256, 16, 2) == (16, 80, 128, 192, 256)
    for least, full, grid in itertools.product((8, 16), (24, 100, 960), (8, 16)):
        levels = levels_of(least, full, grid, 1)
        assert list(levels) == sorted(set(levels))
        assert levels[-1] == full
        assert all(level % grid == 0 for level in levels[:-1])


def test_between_levels_runs_a_straight_line() -> None:
    surface = Surface(((8, 16), (5,), (10, 20, 40)), np.array([[[1.0, 2.0, 4.0]], [[2.0, 4.0, 8.0]]]))
    assert surface.at((8, 5, 20)) == 2
    assert surface.at((12, 5, 30)) == pytest.approx(4.5)
    assert surface.at((4, 5, 10)) == 1


def test_a_wider_op_is_never_cheaper(tmp_path: Path) -> None:
    op = OpShape("linear", (4, 16, 32))
    table = OpTable("torch", 1, tmp_path / "table.json")
    table.known = {op.at((4, 16, w)).key(): seconds for w, seconds in ((16, 3.0), (32, 2.0))}
    assert surfaces(table, {op: (4, 16, 16)}, 16)[op].seconds.ravel().tolist() == [3.0, 3.0]
