"""What the benchmark of strategies makes of its rows, and which rows there are."""

import json
from pathlib import Path
from typing import Any

import pytest

import strategies
from coppice.config import REGULARISATIONS, RunConfig
from coppice.masks import CRITERIA, MaskRecipe
from coppice.targets import parse_target


def row(part: str, strategy: str, top1: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    known = {"part": part, "strategy": strategy, "seed": seed, "top1": top1, "n": 1000, "seconds": 3.0, "bytes": 1000, "macs_ratio": 0.5}
    return known | changes


def test_the_best_comes_first_and_the_control_last() -> None:
    rows = [row("masks", "a", 50.0), row("structured", strategies.RANDOM, 90.0), row("structured", "b", 40.0), row("structured", "c", 41.0)]
    rows.append(row("structured", "c", 45.0, 1, ms=0.5, speedup=1.2, speedup_interval=[1.1, 1.3]))
    lines = strategies.table(rows).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["c", "b", strategies.RANDOM, "a"]
    assert "| 43.00 (" in lines[0]
    assert lines[1].endswith("|  |  |")


def test_a_row_of_another_machine_has_no_seconds() -> None:
    one = row("masks", "a", 50.0)
    del one["seconds"]
    cells = strategies.table([one]).splitlines()[2].split(" | ")
    assert [cell.strip() for cell in cells[3:6]] == ["1", "", "1,000"]


def test_every_strategy_is_there_and_can_be_asked_for() -> None:
    found = list(strategies.strategies())
    assert len({(part, name) for part, name, _ in found}) == len(found)
    assert {part for part, *_ in found} == {"dense", "structured", "masks", "2:4", "combined", "scratch"}
    options = [getattr(strategy, "keywords", {}) for _, _, strategy in found]
    assert {given["regularise"] for given in options if "regularise" in given} == set(REGULARISATIONS)
    masks = [MaskRecipe(**given) for (part, *_), given in zip(found, options, strict=True) if part in ("masks", "2:4")]
    assert {recipe.criterion for recipe in masks} == set(CRITERIA)
    for (part, *_), given in zip(found, options, strict=True):
        if part == "structured":
            RunConfig(**{key: parse_target(value) if key == "target" else value for key, value in given.items()})


def test_rows_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    rows = [row("masks", "a", 50.0)]
    strategies.write(tmp_path / "a.json", rows, strategies.Settings())
    assert strategies.read(tmp_path / "a.json", strategies.Settings()) == json.loads(json.dumps(rows))
    with pytest.raises(SystemExit, match="other settings"):
        strategies.read(tmp_path / "a.json", strategies.Settings(epochs=9))
