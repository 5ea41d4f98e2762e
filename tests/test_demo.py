"""`make demo`: ends with the target met and a report, and starts over only what is its own."""

from pathlib import Path

import pytest

import coppice
from coppice.cli import run


def test_the_demo_meets_its_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    report = tmp_path / "demo" / "pruned" / "report.html"
    assert said.splitlines()[-1] == f"report: {report}"
    assert report.stat().st_size > 10_000
    result = coppice.load(tmp_path / "demo" / "pruned")
    assert sum(p.numel() for p in result.parameters()) < 50_000
    assert run(["demo", "--out", str(tmp_path / "demo")]) == 0, "a finished demo is shown again"


def test_fresh_removes_nothing_but_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "roses.txt").write_text("mine")
    monkeypatch.setattr("coppice.demo.train_dense", lambda *_: None)
    assert run(["demo", "--out", str(tmp_path), "--fresh"]) == 2
    assert "coppice: " in capsys.readouterr().err
    assert (tmp_path / "pruned" / "roses.txt").read_text() == "mine"
