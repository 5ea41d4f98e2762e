"""What the accuracy benchmark makes of its rows: intervals, a table, a picture, and which rows there are."""

import json
from pathlib import Path
from typing import Any

import pytest

import accuracy
import pareto
import peer


def row(method: str, top1: float, seed: int = 0, cut: float = 2.0, **changes: Any) -> accuracy.Row:
    known = {"model": "Net", "method": method, "cut": cut, "epochs": 0, "seed": seed, "top1": top1, "n": 1000, "macs_ratio": 1 / cut}
    return known | {"seconds": 3.0} | changes


FAILED = {"model": "Net", "method": "Torch-Pruning, OBD-C, global", "cut": 2.0, "epochs": 0, "seed": 0, "error": "KeyError:\n Conv2d"}
ROWS = [
    row("dense", 90.0, cut=1.0), row("ours, obs", 85.0), row("ours, obs", 70.0, cut=3.0),
    row("Torch-Pruning, L1, global", 40.0), row("Torch-Pruning, L1, global, BatchNorm re-estimated", 75.0),
    row("ours, random", 50.0, 0), row("ours, random", 52.0, 1), row("ours, random", 54.0, 2), FAILED,
]  # fmt: skip


def test_intervals_are_wilsons_for_one_seed_and_wider_for_seeds_that_differ() -> None:
    alone = accuracy.interval([row("a", 52.0)])
    assert alone[0] == 52.0
    assert alone[2] - alone[1] == pytest.approx(2 * 1.96 * (52 * 48 / 1000) ** 0.5, rel=0.01)
    same = accuracy.interval([row("a", 52.0, seed) for seed in range(3)])
    apart = accuracy.interval([row("a", top1, seed) for seed, top1 in enumerate((48.0, 52.0, 56.0))])
    assert apart[0] == pytest.approx(52.0)
    assert apart[2] - apart[1] > same[2] - same[1]


def test_the_table_has_the_best_first_the_seeds_together_and_says_why_a_peer_fails() -> None:
    lines = accuracy.table(ROWS).splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines if line.startswith("| Net | 2 ")] == [
        "ours, obs", "Torch-Pruning, L1, global, BatchNorm re-estimated", "ours, random", "Torch-Pruning, L1, global",
        "Torch-Pruning, OBD-C, global",
    ]  # fmt: skip
    assert "| 52.00 (" in lines[3]
    assert lines[-2].endswith("fails: KeyError: Conv2d | 1 | |")


def test_the_picture_has_the_families_and_the_dense_model(tmp_path: Path) -> None:
    assert [pareto.family(method).label.partition(",")[0] for method in ("ours, obs", "ours, random", "Torch-Pruning, L1, global")] == [
        "ours", "random", "Torch-Pruning's best",
    ]  # fmt: skip
    pareto.draw(accuracy.points(ROWS), tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    for text in ("Net, no training", "dense", "ours, default", "Torch-Pruning's best, BatchNorm re-estimated"):
        assert text in svg


def test_every_row_that_the_comparison_needs_is_there() -> None:
    untrained = [(key["method"], key["seed"]) for key, _ in accuracy.work(0, (2.0,), [])]
    names = {name for name, _ in untrained}
    for criterion in (*peer.CRITERIA, "random"):
        for setting in ("global", "isomorphic", "uniform"):
            assert {f"Torch-Pruning, {criterion}, {setting}{norms}" for norms in ("", ", BatchNorm re-estimated")} <= names
    assert {"dense", "ours, obs", "ours, auto", "ours, l1", "ours, obs, layers not refitted"} <= names
    assert [seed for name, seed in untrained if name == "ours, obs"] == [0, 1, 2]
    trained = [(key["method"], key["seed"]) for key, _ in accuracy.work(5, (2.0,), ["ours, obs", "smaller"])]
    assert [seed for name, seed in trained if name == "ours, obs"] == [0, 1, 2]
    assert accuracy.SCRATCH in {name for name, _ in trained}
    assert "ours, l1" not in {name for name, _ in trained}


def test_rows_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    settings = accuracy.Settings(1, 512)
    accuracy.write(tmp_path / "a.json", ROWS, settings)
    assert accuracy.read(tmp_path / "a.json", settings) == json.loads(json.dumps(ROWS))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".svg"]
    with pytest.raises(SystemExit, match="other settings"):
        accuracy.read(tmp_path / "a.json", accuracy.Settings(8, 512))
