"""The run folder: journal, atomic writes, lock, manifest."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import coppice.demo
from coppice.cli import run as command
from coppice.config import RunConfig
from coppice.errors import CoppiceError
from coppice.run import (
    CONFIG,
    JOURNAL,
    LOCK,
    MANIFEST,
    STATE,
    Run,
    check_manifest,
    create_run,
    load,
    read_json,
    read_tensors,
    replacing,
    resume_run,
    write_tensors,
    write_text,
)
from coppice.targets import parse_target

CONFIG_A = RunConfig(model="torchvision:resnet18", data="digits", threads=1)


def test_a_stage_is_computed_once_and_survives_a_restart(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, object]:
        calls.append(1)
        return {"x": 0.1 + 0.2, "pair": (1, 2)}

    with create_run(tmp_path / "r", CONFIG_A) as run:
        first = run.stage("one", compute)
        assert run.stage("one", compute) == first
    with resume_run(tmp_path / "r") as run:
        assert run.stage("one", compute) == first == {"x": 0.1 + 0.2, "pair": [1, 2]}
        assert run.seconds().keys() == {"one"}
    assert len(calls) == 1


def test_a_stage_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    def fail() -> dict[str, object]:
        raise RuntimeError("half-way")

    with create_run(tmp_path / "r", CONFIG_A) as run:
        with pytest.raises(RuntimeError):
            run.stage("one", fail)
        assert run.stage("one", lambda: {"ok": 1}) == {"ok": 1}


def test_weights_between_stages_come_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    tensors = {
        "a": shared,
        "tied": shared,
        "view": shared.t(),
        "half": torch.randn(2).half(),
        "count": torch.tensor(7),
        "nan": torch.tensor([float("nan")]),
    }
    with create_run(tmp_path / "r", CONFIG_A) as run:
        reference = run.save_state("cut 1, tuned", tensors)
        again = run.load_state(reference)
        assert all(again[name].dtype == t.dtype and torch.equal(again[name].nan_to_num(9), t.nan_to_num(9)) for name, t in tensors.items())
        (run.path / STATE / reference["file"]).write_bytes(b"truncated")
        with pytest.raises(CoppiceError, match="missing or changed"):
            run.load_state(reference)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    write_text(path, "old")

    def interrupted_write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("full disk")

    with pytest.raises(RuntimeError):
        interrupted_write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f.txt"]


def test_one_process_at_a_time_and_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    code = (
        "import sys, time; from pathlib import Path; from coppice.run import resume_run\n"
        "run = resume_run(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    create_run(folder, CONFIG_A).__exit__(None, None, None)
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(CoppiceError, match=f"in use by process {holder.pid}"):
            resume_run(folder)
    finally:
        holder.kill()
        holder.communicate()
    with resume_run(folder) as run:
        assert (folder / LOCK).read_text() == str(os.getpid())
        assert not run.complete


@pytest.mark.parametrize("left", ["holiday.jpg", JOURNAL])
def test_a_folder_with_something_else_in_it_is_not_touched(left: str, tmp_path: Path) -> None:
    (tmp_path / left).write_text("{}")
    with pytest.raises(CoppiceError, match="not empty and holds no run"):
        create_run(tmp_path, CONFIG_A)
    assert os.listdir(tmp_path) == [left]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("mine")
    with pytest.raises(CoppiceError, match="is a file"):
        create_run(tmp_path / "r", CONFIG_A)
    assert (tmp_path / "r").read_text() == "mine"


def test_the_same_settings_go_on_and_others_are_refused(tmp_path: Path) -> None:
    with create_run(tmp_path / "r", CONFIG_A) as run:
        run.stage("one", lambda: {"x": 1})
    with create_run(tmp_path / "r", CONFIG_A) as run:
        assert run.stage("one", lambda: {"x": 2}) == {"x": 1}
    with pytest.raises(CoppiceError, match="other settings"):
        create_run(tmp_path / "r", replace(CONFIG_A, seed=1))


def test_killed_before_the_configuration_was_written(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    (tmp_path / ".tmp-abc.toml").write_text("[half")
    with create_run(tmp_path, CONFIG_A) as run:
        assert run.config == CONFIG_A
    with resume_run(tmp_path):
        assert not list(tmp_path.glob(".tmp-*"))


def test_resume_refuses_what_is_no_run_and_changed_weights(tmp_path: Path) -> None:
    with pytest.raises(CoppiceError, match="no run there"):
        resume_run(tmp_path)
    weights = tmp_path / "w.safetensors"
    write_tensors(weights, {"w": torch.zeros(1)})
    create_run(tmp_path / "r", replace(CONFIG_A, weights=str(weights))).__exit__(None, None, None)
    resume_run(tmp_path / "r").__exit__(None, None, None)
    write_tensors(weights, {"w": torch.ones(1)})
    with pytest.raises(CoppiceError, match=r"w\.safetensors is gone or has changed"):
        resume_run(tmp_path / "r")
    with pytest.raises(CoppiceError, match="gone or has changed"):  # the refusal gave the lock back
        resume_run(tmp_path / "r")


def finished(folder: Path) -> Run:
    with create_run(folder, CONFIG_A) as run:
        run.save_state("cut", {"w": torch.zeros(1)})
        for name in ("plan.json", "metrics.json"):
            write_text(folder / name, "{}")
        run.finish()
    return run


def test_the_manifest_seals_the_outputs_and_clears_the_state(tmp_path: Path) -> None:
    finished(tmp_path / "r")
    assert check_manifest(tmp_path / "r").keys() == {CONFIG, "plan.json", "metrics.json"}
    assert not (tmp_path / "r" / STATE).exists()


def test_the_manifest_names_what_is_not_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    finished(folder)
    (folder / "plan.json").write_text('{"format": 1}')
    (folder / "metrics.json").unlink()
    with pytest.raises(CoppiceError, match=r"metrics\.json missing; plan\.json changed or truncated"):
        check_manifest(folder)
    with pytest.raises(CoppiceError, match="changed or truncated"):
        load(folder)


def test_killed_between_the_manifest_and_clearing_up(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    finished(folder)
    (folder / STATE).mkdir()
    (folder / STATE / "x.safetensors").touch()
    with resume_run(folder) as run:
        assert run.complete
    assert not (folder / STATE).exists()


def test_an_unfinished_run_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(CoppiceError, match="no run folder"):
        load(tmp_path)
    create_run(tmp_path / "r", CONFIG_A).__exit__(None, None, None)
    assert not (tmp_path / "r" / MANIFEST).exists()
    with pytest.raises(CoppiceError, match="--resume"):
        load(tmp_path / "r")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_broken_json_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(CoppiceError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04}.", json.dumps({"a": 1}).encode()])
def test_what_is_no_safetensors_file_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CoppiceError, match="as safetensors"):
        read_tensors(path)


@pytest.mark.parametrize("journal", ['{"dense": 3}', '{"dense": {"result": {"accuracy": 1}, "seconds": 1}}'])
def test_a_journal_of_something_else(journal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Changed by hand, or of another version: one sentence, and the folder is left as it was."""
    model = f"{coppice.demo.__file__}:digits_net"
    with create_run(tmp_path / "r", RunConfig(model=model, data="digits", target=parse_target("macs=0.5"), threads=1)):
        pass
    (tmp_path / "r" / "journal.json").write_text(journal)
    assert command(["prune", "--resume", str(tmp_path / "r")]) == 2
    assert "start the run again in another folder" in capsys.readouterr().err
    assert (tmp_path / "r" / "journal.json").read_text() == journal


def test_a_configuration_without_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text("")
    assert command(["prune", "--resume", str(tmp_path)]) == 2
    assert "call coppice.prune again" in capsys.readouterr().err
