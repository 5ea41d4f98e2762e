"""Timing: what is said of it, and what is refused. No test asserts how long anything takes."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import coppice
from coppice import runtimes
from coppice.cli import run
from coppice.errors import CoppiceError
from coppice.noise import bootstrap, speedup
from coppice.runtimes import RUNTIMES, Runtime
from coppice.timing import Setting

SHAPE = (3, 16, 16)


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.Flatten(), nn.LazyLinear(5))


def ready(width: int = 8) -> nn.Module:
    model = net(width).eval()
    with torch.no_grad():
        model(torch.zeros(1, *SHAPE))
    return model


def test_a_difference_within_the_noise_is_none() -> None:
    generator = np.random.default_rng(1)
    before, same = generator.normal(10, 1, 15), generator.normal(10, 1, 15)
    _, (low, high) = speedup(before.tolist(), same.tolist())
    assert low < 1 < high
    ratio, (low, high) = speedup(before.tolist(), (before / 2).tolist())
    assert ratio == pytest.approx(2)
    assert low == pytest.approx(2)
    assert high == pytest.approx(2)


def test_the_interval_is_of_the_median_and_narrows_with_rounds() -> None:
    generator = np.random.default_rng(1)
    few, many = generator.normal(10, 1, 8), generator.normal(10, 1, 800)
    assert bootstrap(few.tolist())[0] < np.median(few) < bootstrap(few.tolist())[1]
    assert np.ptp(bootstrap(many.tolist())) < np.ptp(bootstrap(few.tolist()))


@pytest.mark.usefixtures("busy_machine")
def test_measure_answers_every_model_in_every_setting() -> None:
    models = {"wide": ready(16), "thin": ready(8)}
    before = {name: value.clone() for name, value in models["wide"].state_dict().items()}
    found = coppice.measure(models, SHAPE, ("torch", "onnxruntime"), batches=(1, 2), rounds=5)
    assert {(t.model, t.setting) for t in found.timings} == {
        (name, Setting(runtime, 1, batch)) for name in models for runtime in ("torch", "onnxruntime") for batch in (1, 2)
    }
    for timing in found.timings:
        assert 0 < timing.p50 <= timing.p90 <= timing.p99
        assert len(timing.rounds) == 5
        assert timing.throughput == pytest.approx(timing.setting.batch / timing.p50)
    assert {(c.model, c.reference) for c in found.comparisons} == {("thin", "wide")}
    assert json.loads(json.dumps(found.to_dict()))["machine"]["cpu"]
    assert all(torch.equal(before[name], value) for name, value in models["wide"].state_dict().items())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_torch_compile_compiles_every_model_of_a_class(tmp_path: Path) -> None:
    for width in (4, 8):
        model = ready(width)
        subject = runtimes.Subject("net", SHAPE, tmp_path, module=model)
        with torch.no_grad():
            torch.testing.assert_close(RUNTIMES["torch.compile"].start(subject, 2, 1)(), model(torch.from_numpy(subject.input(2))))


@pytest.mark.usefixtures("busy_machine")
def test_int8_is_a_row_of_its_own(tmp_path: Path) -> None:
    subject = runtimes.Subject("net", SHAPE, tmp_path, module=ready())
    (whole,) = RUNTIMES["onnxruntime"].start(subject, 2, 1)()  # type: ignore[misc]
    (small,) = RUNTIMES["onnxruntime-int8"].start(subject, 2, 1)()  # type: ignore[misc]
    assert 0 < np.abs(whole - small).mean() < 0.1 * np.abs(whole).mean()
    found = coppice.measure({"net": ready()}, SHAPE, ("onnxruntime", "onnxruntime-int8"), rounds=5)
    assert [t.setting.runtime for t in found.timings] == ["onnxruntime", "onnxruntime-int8"]


def test_no_two_int8_products_overflow_16_bits(tmp_path: Path) -> None:
    graph = onnx.load(runtimes.Subject("net", SHAPE, tmp_path, module=ready()).int8).graph
    weights = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(weights) == 3
    assert all(2 * 255 * np.abs(weight.astype(int)).max() < 2**15 for weight in weights)


@pytest.mark.usefixtures("busy_machine")
def test_openvino() -> None:
    pytest.importorskip("openvino")
    found = coppice.measure({"net": ready()}, SHAPE, ("openvino",), batches=(3,), rounds=5)
    assert found.timings[0].runs > 0


def test_each_runtime_computes_what_the_model_does(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = ready()
    subject = runtimes.Subject("net", SHAPE, tmp_path, module=model)
    x = torch.from_numpy(subject.input(2))
    with torch.no_grad():
        want = model(x)
    eager = RUNTIMES["torch"].start(subject, 2, 1)()
    (onnx,) = RUNTIMES["onnxruntime"].start(subject, 2, 1)()  # type: ignore[misc]
    vino = next(iter(RUNTIMES["openvino"].start(subject, 2, 1)().values()))  # type: ignore[attr-defined]
    for got in (eager, torch.from_numpy(onnx), torch.from_numpy(vino)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def restless(subject: runtimes.Subject, batch: int, threads: int) -> runtimes.Run:
    """A machine whose speed changes all the time."""
    del subject, batch, threads
    seconds = np.random.default_rng(0).choice([0.0001, 0.001], 1000).repeat(41).tolist()

    def one() -> None:
        until = time.perf_counter() + seconds.pop()
        while time.perf_counter() < until:
            pass

    return one


def test_what_is_too_noisy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "restless", Runtime("numpy", "core", restless, reads=None))
    with pytest.raises(CoppiceError, match=r"too noisy to time \(restless, 1 thread, batch 1\)|too busy to time"):
        coppice.measure({"net": ready()}, SHAPE, ("restless",), rounds=9)


GROWS = """
import numpy as np
from coppice.machine import growth
with growth() as found:
    block = np.ones(20_000_000 // 8)
print(found.bytes)
"""


def test_memory_is_what_the_process_grew_by() -> None:
    # in a process of its own: this one may hold as much from tests before, and use it again
    said = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True).stdout.strip()
    assert said == "None" or 15e6 < int(said) < 60e6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["torchvision:resnet18"], "--input"),
        (["torchvision:resnet0", "--input", "1,3,32,32"], "resnet0"),
        (["nowhere.onnx"], "no file"),
        (["torchvision:resnet18", "--input", "1,3,32,32", "--runtime", "abacus"], "no runtime 'abacus'"),
        (["torchvision:resnet18", "--input", "1,3,32,32", "--threads", "4096"], "--threads 4096"),
        (["torchvision:resnet18", "--input", "1,3,32,32", "--threads", "two"], "--threads two"),
        (["torchvision:resnet18", "--input", "1,3,32,32", "--batch", "0"], "--batch 0"),
        (["torchvision:resnet18", "--input", "1,3,32,32", "--rounds", "1"], "--rounds 1"),
        (["torchvision:resnet18", "--input", "3"], "--input 3"),
        (["torchvision:resnet18", "--input", "1,3,32,32", "--runtime", "onnxruntime-cuda"], "CUDAExecutionProvider"),
    ],
    ids=str,
)
def test_bad_input(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measure", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert says in said[0]


def test_a_runtime_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(RUNTIMES, "openvino", Runtime("no_such_package_here", "openvino", RUNTIMES["openvino"].start))
    assert run(["measure", "torchvision:resnet18", "--input", "1,3,32,32", "--runtime", "openvino"]) == 2
    assert capsys.readouterr().err == (
        "coppice: the runtime openvino needs the package no_such_package_here: pip install 'coppice[openvino]'\n"
    )


def onnx_file(path: Path, op: str = "Relu", batch: int | str = "n") -> Path:
    from onnx import TensorProto, helper, save

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *SHAPE]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", values[:1], values[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.mark.usefixtures("busy_machine")
def test_an_onnx_file_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = onnx_file(tmp_path / "relu.onnx")
    arguments = ["measure", str(path), "--runtime", "onnxruntime", "--rounds", "5", "--json", "--out", str(tmp_path / "found.json")]
    assert run(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["timings"][0]["model"] == str(path)
    assert json.loads((tmp_path / "found.json").read_text()) == said


@pytest.mark.parametrize(
    ("make", "runtime", "says"),
    [
        (lambda path: onnx_file(path, op="NoSuchOp"), "onnxruntime", "ONNX Runtime can't run"),
        (lambda path: onnx_file(path, batch=3), "onnxruntime", "on a batch of 1"),
        (onnx_file, "torch", "is an ONNX file"),
        (lambda path: path.write_bytes(b"hello"), "onnxruntime", "no ONNX file"),
    ],
    ids=["op", "batch", "torch", "damaged"],
)
def test_onnx_files_that_can_not_be_timed(make, runtime: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.onnx"
    make(path)
    assert run(["measure", str(path), "--runtime", runtime, "--rounds", "5"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert says in said[0]
