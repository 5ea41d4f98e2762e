"""The command line: bad input is one sentence and status 2, and nothing is written over."""

import json
import pickle
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import coppice.demo
from coppice.cli import run
from coppice.demo import digits_net
from coppice.seeding import seeded

MODEL = f"{coppice.demo.__file__}:digits_net"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    with seeded(0, "test"):
        save_file(digits_net().state_dict(), path)
    return path


@pytest.fixture
def arguments(weights: Path, tmp_path: Path) -> dict[str, str | None]:
    return {
        "--model": MODEL, "--weights": str(weights), "--data": "digits", "--target": "macs=0.5", "--epochs": "0", "--threads": "1",
        "--precision": "fp32", "--out": str(tmp_path / "run"),
    }  # fmt: skip


def prune(arguments: dict[str, str | None], **changes: str | None) -> int:
    given = arguments | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
    return run(["prune", *(part for key, value in given.items() if value is not None for part in (key, value))])


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: exactly one line."""
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line]
    assert len(lines) == 1, said.err
    assert lines[0].startswith("coppice: ")
    assert "Traceback" not in said.err
    assert said.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "resnet20"}, "names no model"),
        ({"model": "nowhere.py:net"}, "no model file"),
        ({"model": f"{coppice.demo.__file__}:no_such_net"}, "no_such_net"),
        ({"model": "torchvision:resnet0"}, "resnet0"),
        ({"model": None}, "--model is missing"),
        ({"data": None}, "--data is missing"),
        ({"weights": "nowhere.safetensors"}, "no weights file"),
        ({"target": "macs=1.5"}, "between 0 and 1"),
        ({"target": "macs=0"}, "zero"),
        ({"target": "speed=2"}, "KEY=VALUE"),
        ({"target": "macs=0.5,macs=0.4"}, "twice"),
        ({"target": "macs=900G"}, "meets it already"),
        ({"target": "macs=0.0001"}, "macs"),
        ({"target": None}, "--max-drop"),
        ({"max_drop": "-1"}, "--max-drop"),
        ({"max_drop": "two"}, "--max-drop"),
        ({"max_drop": "inf"}, "--max-drop inf"),
        ({"seed": "99999999999999999999"}, "--seed"),
        ({"threads": "100000"}, "--threads 100000"),
        ({"features": "inf"}, "features is inf"),
        ({"criterion": "magic"}, "--criterion magic"),
        ({"allocation": "fair"}, "--allocation fair"),
        ({"aggregation": "mean", "criterion": "random"}, "no elements to aggregate"),
        ({"aggregation": "mean", "criterion": "auto"}, "--aggregation mean"),
        ({"normalization": "isomorphic"}, "--allocation global"),
        ({"normalization": "fair", "allocation": "global"}, "unknown normalization 'fair'"),
        ({"steps": "0"}, "--steps 0"),
        ({"optimizer": "adam"}, "adam"),
        ({"mean": "a,b"}, "--mean a,b"),
        ({"mean": "0.1,0.2,0.3", "std": "1,1,1"}, "can't run on the data's images"),
        ({"std": "0"}, "std"),
        ({"std": "inf"}, "std is inf"),
        ({"mean": "nan"}, "mean is nan"),
        ({"size": "100000000"}, "size is 100000000"),
        ({"input": "1,3,224,224"}, "does not fit the data"),
        ({"split": "training"}, "ROLE=NAME"),
        ({"split": "train=nothing"}, "nothing"),
        ({"data": "nowhere"}, "nowhere"),
        ({"num_classes": "7", "weights": None}, "classes"),
        ({"out": None}, "--out"),
        ({"out": f"{__file__}/run"}, "can't be made"),
        ({"config": "nowhere.toml"}, "no configuration"),
        ({"resume": "runs/r20"}, "drop --"),
        ({"colour": "red"}, "--colour"),
    ],
    ids=str,
)
def test_bad_input(
    changes: dict[str, str | None], says: str, arguments: dict[str, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(arguments, **changes) == 2
    assert says in sentence(capsys)
    assert not (tmp_path / "run").exists()


def other_model(path: Path) -> Path:
    save_file({"fc.weight": torch.zeros(2, 2)}, path)
    return path


def truncated(path: Path) -> Path:
    save_file(digits_net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def no_safetensors(path: Path) -> Path:
    path.write_bytes(b"hello")
    return path


@pytest.mark.parametrize("make", [other_model, truncated, no_safetensors])
def test_bad_weights(make, arguments: dict[str, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    path = make(tmp_path / "bad.safetensors")
    assert prune(arguments, weights=str(path)) == 2
    assert str(path) in sentence(capsys)
    assert not (tmp_path / "run").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("archive", [True, False], ids=["torch.save", "pickle"])
def test_a_pickle_that_would_run_code_does_not(
    archive: bool, arguments: dict[str, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    evil = {"w": Evil(proof)}
    if archive:
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(evil))
    assert prune(arguments, weights=str(path)) == 2
    assert str(path) in sentence(capsys)
    assert not proof.exists()
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_and_an_image_that_is_none(
    arguments: dict[str, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert prune(arguments, data=str(tmp_path / "empty")) == 2
    assert "empty" in sentence(capsys)
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "images" / "train" / name / f"{number}.png").write_bytes(b"not a picture")
    assert prune(arguments, data=str(tmp_path / "images")) == 2
    assert "not a readable image" in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite(arguments: dict[str, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = digits_net().state_dict()
    state["classifier.bias"][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    assert prune(arguments, weights=str(tmp_path / "nan.safetensors")) == 2
    assert "not finite" in sentence(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("factory", "says"), [("half", "its weights are float16"), ("broken", "KeyError"), ("pair", "returned a tuple")])
def test_models_that_cant_be_used(
    factory: str, says: str, arguments: dict[str, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    assert prune(arguments, model=f"{tmp_path / 'nets.py'}:{factory}", weights=None) == 2
    assert says in sentence(capsys)
    assert not (tmp_path / "run").exists()


NETS = """
from torch import nn

class Broken(nn.Linear):
    def forward(self, x):
        raise KeyError("no such thing")

class Pair(nn.Linear):
    def forward(self, x):
        scores = super().forward(x.flatten(1))
        return scores, scores

def half(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).half()
def broken(): return Broken(64, 10)
def pair(): return Pair(64, 10)
"""


def test_a_folder_in_use_is_not_written_over(arguments: dict[str, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("ten years of work")
    assert prune(arguments) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_fault_of_ours_is_one_sentence_and_a_file(
    arguments: dict[str, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr("coppice.loop.dense_snapshot", broken)
    assert prune(arguments) == 1
    said = sentence(capsys)
    assert "unexpected ZeroDivisionError: one (traceback in " in said
    file = Path(said.rpartition("traceback in ")[2].rstrip(")"))
    assert file.parent == tmp_path / "run"
    assert "in broken" in file.read_text()


def test_ctrl_c_says_how_to_go_on(
    arguments: dict[str, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coppice.loop.dense_snapshot", interrupted)
    assert prune(arguments) == 130
    assert sentence(capsys).endswith(f"coppice prune --resume {tmp_path / 'run'}")
    monkeypatch.setattr("coppice.loop.load_data", interrupted)
    assert prune(arguments, out=str(tmp_path / "other")) == 130
    assert "before anything was written" in sentence(capsys)


def test_resume_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prune", "--resume", str(tmp_path)]) == 2
    assert "no run there" in sentence(capsys)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["inspect", "--model", "torchvision:resnet18"], "--input"),
        (["inspect", "--model", "torchvision:resnet18", "--input", "1,x"], "--input 1,x"),
        (["inspect", "--model", MODEL, "--input", "0,1,8,8"], "1 or more"),
        (["inspect", "--model", MODEL, "--input", "-1,1,8,8"], "1 or more"),
        (["inspect", "--model", MODEL, "--input", "99999,99999,9999,9999"], "memory"),
        (["inspect", "--model", MODEL, "--input", "1,1,8,8", "--num-classes", "0"], "--num-classes 0"),
        (["inspect"], "--model"),
        (["eval", "--model", "torchvision:resnet18"], "--data"),
        (["eval", "--model", "torchvision:resnet18", "--data", "digits", "--part", "some"], "--part some"),
        (["export", "nowhere"], "no run folder"),
        (["export", "nowhere", "--out", "no/such/file.onnx"], "there is no folder"),
        (["export", "nowhere", "--to", "tflite"], "choose one of onnx, openvino, pt2"),
        (["prune", "--steps", "many"], "--steps"),
        (["sensitivity", "--model", MODEL], "--data"),
        (["sensitivity", "--model", MODEL, "--data", "digits", "--out", "plot.jpeg"], ".html, .svg, .png"),
        (["sensitivity", "--model", MODEL, "--data", "digits", "--images", "0"], "--images 0"),
        (["sensitivity", "--model", MODEL, "--data", "digits", "--parts", "half"], "--parts half"),
        (["sensitivity", "--model", MODEL, "--data", "digits", "--criterion", "l1", "--limit", "nan"], "limit"),
        (["measure", MODEL, "--input", "1,1,8,8", "--out", "nowhere/times.json"], "no folder"),
        (["measure", MODEL, "--input", "1,1,8,8", "--out", __file__], "exists already"),
        (["demo", "--out", __file__], "can't be made"),
        (["sensitivity", "--model", MODEL, "--data", "digits", "--criterion", "auto"], "unknown criterion 'auto'"),
        (["shrink"], "shrink"),
    ],
    ids=" ".join,
)
def test_bad_lines(line: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 2
    assert says in sentence(capsys)


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--model", MODEL, "--input", "1,1,8,8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parameters = sum(p.numel() for p in digits_net().parameters())
    assert found["params"] == parameters
    axes = {axis["name"]: axis for axis in found["axes"]}
    stream = next(axis for axis in axes.values() if ["block2.0.weight", 0] in axis["sites"])
    assert ["stem.0.weight", 0] in stream["sites"], "the residual stream is one axis"
    assert stream["width"] == 32
    assert 0 < stream["macs_share"] < 1
    assert axes["classifier.weight:0"]["pinned"] == "model output"
    assert found["pins"]["model output"] == ["classifier.weight:0"]
    assert found["prunable_share"] > 0.99
    assert axes["classifier.weight:0"]["params_share"] == pytest.approx((65 * 10) / parameters)
    assert all(axis["tied_to"] == [] for axis in axes.values())


def test_what_goes_with_an_axis(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["inspect", "--model", MODEL, "--input", "1,1,8,8", "--axis", "block2.0.weight:0"]
    assert run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["width"] == 32
    assert {"tensor": "stem.0.weight", "kind": "parameter", "dim": 0, "made_of": "[32]"} in found["sites"]
    assert {"tensor": "stem.1.running_mean", "kind": "buffer", "dim": 0, "made_of": "[32]"} in found["sites"]
    assert run(line) == 0
    assert "It can be cut." in capsys.readouterr().out
    assert run([*line[:-1], "nowhere:0"]) == 2
    assert "nowhere" in sentence(capsys)


def test_inspect_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--model", MODEL, "--input", "1,1,8,8"]) == 0
    said = capsys.readouterr().out
    assert "model output" in said
    assert "axes can be cut" in said


def test_sensitivity_as_a_table_as_json_and_as_a_page(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sensitivity", "--model", MODEL, "--weights", str(weights), "--data", "digits", "--calibration", "64", "--images", "64"]
    line += ["--threads", "1", "--criterion", "l1"]
    page = tmp_path / "curves.html"
    assert run([*line, "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert "stem.0.weight:0" in said
    assert "dense top-1" in said
    assert "</html>" in page.read_text(encoding="utf-8")
    assert run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    gives = [curve["gives"] for curve in found["curves"]]
    assert gives == sorted(gives, reverse=True)
    assert all(0 < point["saved"] < 1 for curve in found["curves"] for point in curve["points"])
    assert run([*line, "--out", str(page)]) == 2
    assert "exists already" in sentence(capsys)


def test_ctrl_c_while_measuring_writes_nothing(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coppice.loop.sensitivity", interrupted)
    out = tmp_path / "curves.svg"
    assert (
        run(["sensitivity", "--model", MODEL, "--weights", str(weights), "--data", "digits", "--criterion", "l1", "--out", str(out)]) == 130
    )
    assert "before anything was written" in sentence(capsys)
    assert list(tmp_path.iterdir()) == []


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert coppice.__version__ in capsys.readouterr().out
    assert run(["prune", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--max-drop" in said
    assert "[obs]" in said, "the defaults are shown"
    assert run([]) == 2
    said = capsys.readouterr()
    assert "sensitivity" in said.out + said.err
    assert "coppice: " not in said.err, "the help is all there is to say"


def test_help_needs_no_framework() -> None:
    code = "import sys; from coppice.cli import run; run(['prune', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_sigint_to_a_working_run(arguments: dict[str, str | None], tmp_path: Path) -> None:
    line = [part for pair in (arguments | {"--epochs": "1000"}).items() for part in pair if part]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what was started in the background ignores it, and so do its children
    process = subprocess.Popen([sys.executable, "-m", "coppice", "prune", *line], stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    try:
        assert process.stderr is not None
        while "fine-tuning" not in process.stderr.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1] == f"coppice: stopped; go on with: coppice prune --resume {tmp_path / 'run'}"
    assert "Traceback" not in said


def test_stop_early_needs_a_floor(arguments: dict[str, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [part for pair in arguments.items() for part in pair if part]
    assert run(["prune", *line, "--stop-early"]) == 2
    assert "--max-drop" in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_modules_that_can_go_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--model", "torchvision:resnet18", "--input", "1,3,32,32", "--modules", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capfd.readouterr().out)["modules"]}
    assert found["layer1.0"]["kind"] == "residual"
    assert found["layer1.0"]["params"] == 2 * (64 * 64 * 9 + 2 * 64)
    assert run(["inspect", "--model", MODEL, "--input", "1,1,8,8", "--modules", "--data", "digits", "--score", "cosine"]) == 0
    said = capfd.readouterr().out
    assert "modules can go" in said
    assert "score" in said
    for wrong, sentence in (
        (["--data", "digits"], "--data, --score and --runtime go with --modules: add it"),
        (["--modules", "--score", "cosine"], "--score needs images: name the data with --data"),
        (["--modules", "--data", "digits", "--score", "size"], "unknown score 'size' of modules"),
        (["--modules", "--runtime", "abacus"], "abacus"),
    ):
        assert run(["inspect", "--model", MODEL, "--input", "1,1,8,8", *wrong]) == 2
        assert sentence in capfd.readouterr().err
