"""Killed with SIGKILL at random moments and resumed: the same plan, metrics and weights as an undisturbed run."""

import random
from pathlib import Path

from kill_resume import disturbed, prepare, undisturbed


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    job = prepare(tmp_path, epochs=3)
    expected = tmp_path / "undisturbed"
    span = undisturbed(job, expected)
    outcome = disturbed(job, tmp_path / "killed", 3, span, random.Random(20), expected)
    assert outcome.killed_after, "no kill hit the run"
    assert outcome.same, outcome
