"""Fixtures that more than one test module uses."""

import math
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and weights beside the project: skipped where it is absent, an error on CI."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        message = "the shared data folder is not there (../shared, beside the project)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture
def one_thread():
    """Sums in a fixed order, for tests that compare bits."""
    import torch  # not where only Keras is tested

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def busy_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that really time something, and assert nothing of how long it took: no noise is too much. Times are kept in `tmp_path`."""
    from coppice import latency, timing

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "interruptions", lambda: 0)
    monkeypatch.setattr(timing, "TOO_NOISY", math.inf)
    monkeypatch.setattr(latency, "IMPLAUSIBLE", math.inf)
