"""Two processes, started by torchrun, against one: the same training up to the order of sums, through the API and the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import processes
from coppice.augment import augment_batch, make_augmentation
from coppice.config import load_config
from coppice.loop import prune_run
from coppice.parallel import share
from coppice.progress import Silent
from coppice.recipe import AUGMENTATIONS
from coppice.run import read_json, read_tensors
from kill_resume import prepare

if find_spec("lightning_fabric") is None:
    pytest.skip("several processes need lightning-fabric", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("one_thread")

# Sums over 33 images in another order differ in the last of fp32's 24 bits (6e-8); steps with momentum let that grow
ROUNDING = 1e-4


def start(arguments: Sequence[str], **env: str) -> subprocess.Popen[str]:
    """Two processes by torchrun, in a group of their own."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == status, err
    return out, err


def said_by(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("coppice: ")]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes trained: killed within the second epoch and resumed, and undisturbed."""
    out = tmp_path_factory.mktemp("two")
    finish(start([processes.__file__, "die", str(out)]), 1)
    assert (out / "checkpoint").exists()
    assert not (out / "resumed.json").exists()
    finish(start([processes.__file__, "resume", str(out)]))
    return out


def test_killed_and_resumed_is_undisturbed(two: Path) -> None:
    assert (two / "resumed.safetensors").read_bytes() == (two / "undisturbed.safetensors").read_bytes()
    assert (two / "resumed.json").read_text() == (two / "undisturbed.json").read_text()


def test_two_processes_train_as_one(two: Path) -> None:
    data = processes.digits()
    for name, given, recipe in (("undisturbed", data, processes.RECIPE), ("loaders", processes.loaders(data, None), processes.ONCE)):
        model, history = processes.trained(given, recipe)
        theirs, expected = read_tensors(two / f"{name}.safetensors"), model.state_dict()
        assert theirs.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(theirs[key], value, rtol=ROUNDING, atol=ROUNDING * float(value.abs().max()))
        for ours, other in zip(history, json.loads((two / f"{name}.json").read_text()), strict=True):
            assert other == pytest.approx(ours, rel=ROUNDING)
        assert not expected["block1.0.weight"].flatten()[::3].any()
        assert not theirs["block1.0.weight"].flatten()[::3].any()
    assert "lightning_fabric" not in sys.modules, "one process needs no Fabric"


def test_two_processes_train_as_one_in_mixed_precision(two: Path) -> None:
    (ours,) = processes.trained(processes.digits(), replace(processes.ONCE, precision="bf16"))[1]
    (theirs,) = json.loads((two / "bf16.json").read_text())
    assert theirs["train_loss"] == pytest.approx(ours["train_loss"], rel=2**-8)  # the last of bf16's 8 bits


def test_layers_over_processes_are_those_of_the_whole_batch(two: Path) -> None:
    for what, difference in json.loads((two / "told.json").read_text())["layers"].items():
        assert difference < 1e-12, what


def test_a_distributed_sampler_shares_the_images(two: Path) -> None:
    left, right = json.loads((two / "told.json").read_text())["sampled"]["parts"]
    assert sorted(left + right) == list(range(processes.STEPS * processes.RECIPE.batch_size))


def test_loaders_that_do_not_fit_together_are_refused(two: Path) -> None:
    said = json.loads((two / "told.json").read_text())["refused"]
    expected = {
        "other order": "gives each process other batches",
        "other sampler": "is for process 0 of 3, this is 0 of 2",
        "other length": "another length in each process",
        "sampled validation": "DistributedSampler repeats images",
        "shuffled validation": "it must not shuffle",
        "too small": "a batch of 1 can't be shared by 2 processes",
        "statistics of its own": "brightness has become another in each process (epoch 1, step 1)",
    }
    for name, sentence in expected.items():
        assert sentence in said[name], name


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 100, 120)])
def test_a_part_of_a_batch_is_augmented_as_in_the_whole(name: str, shape: tuple[int, int, int]) -> None:
    images = torch.randint(0, 256, (7, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = make_augmentation(name, shape)
    whole = augment_batch(images, transform, 1, 2, 3)
    for rows in ([2, 3, 4], [6, 0, 1]):
        assert augment_batch(images[rows], transform, 1, 2, 3, rows, 7).equal(whole[rows])


def test_parts_are_all_of_it() -> None:
    for count in (2, 7, 33):
        parts = [share(count, rank, 2) for rank in range(2)]
        assert [k for part in parts for k in range(count)[part]] == list(range(count))


# --- the command line -----------------------------------------------------------------------------------------------


def test_a_whole_run_by_two_processes_is_that_of_one_even_if_killed(tmp_path: Path) -> None:
    job, run = prepare(tmp_path, epochs=2), tmp_path / "two"
    killed = start(["-m", "coppice", "prune", "--config", str(job), "--out", str(run)])
    while killed.poll() is None and not ((run / "journal.json").exists() and "cut 1" in read_json(run / "journal.json")):
        time.sleep(0.05)
    assert killed.poll() is None, finish(killed)
    os.kill(int((run / "lock").read_text()), signal.SIGKILL)
    said = "coppice: another process of the run has ended or can't be reached: go on with the same command, or with --resume"
    assert said_by(finish(killed, 1)[1]) in ([said], [])  # nothing where torchrun was quicker to end the other one
    resumed = start(["-m", "coppice", "prune", "--resume", str(run)])
    prune_run(load_config(job)[0], tmp_path / "one", progress=Silent())
    out, err = finish(resumed)
    assert out.count("report: ") == 1
    assert err.count("tuned 2: fine-tuning") == 1
    assert (tmp_path / "one/plan.json").read_bytes() == (run / "plan.json").read_bytes()
    one, two = (read_json(folder / "metrics.json") for folder in (tmp_path / "one", run))
    assert two["dense"] == one["dense"]  # nothing was trained: bit for bit
    assert two["pruned"]["top1"] == pytest.approx(one["pruned"]["top1"], abs=100 / one["pruned"]["n"])  # an image on the fence


FAILING = """
import os
from coppice.demo import DigitsNet
from coppice.errors import CoppiceError

class Failing(DigitsNet):
    def forward(self, x):
        if self.training and len(x) > 2 and os.environ.get("RANK") == "1":
            raise CoppiceError("only one process meets this")
        return super().forward(x)

def failing(num_classes=10):
    return Failing()
"""


def test_what_fails_in_one_process_ends_all_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FAILING)
    options = "--data digits --mean 0.3 --std 0.38 --target macs=0.6 --criterion l1 --allocation global --no-repair --epochs 1 --lr 0.02"
    model, where = f"{tmp_path}/net.py:failing", f"--precision fp32 --device cpu --out {tmp_path}/run"
    process = start(["-m", "coppice", "prune", "--model", model, *options.split(), *where.split()])
    _, err = finish(process, 1)  # torchrun's own status
    assert said_by(err) == ["coppice: only one process meets this"]
    assert not list((tmp_path / "run").glob("fault*"))
