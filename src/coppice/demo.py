"""`make demo`: train a small network on scikit-learn's handwritten digits, then prune it as any other user's model.

The network has what makes pruning interesting: BatchNorm, a residual connection and a concat.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coppice.config import RunConfig
from coppice.data import load_data
from coppice.errors import CoppiceError
from coppice.preprocess import Preprocess
from coppice.progress import Progress
from coppice.run import CONFIG, write_tensors
from coppice.seeding import seeded
from coppice.targets import parse_target
from coppice.train import Recipe, fine_tune

if TYPE_CHECKING:
    from coppice.result import Result


class DigitsNet(nn.Module):
    """A stem, a residual block, two branches that are concatenated, a classifier. Input: 1 x 8 x 8."""

    def __init__(self, width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv_bn(1, width, 3)
        self.block1, self.block2 = _conv_bn(width, width, 3), _conv_bn(width, width, 3)
        self.narrow, self.wide = _conv_bn(width, width, 1), _conv_bn(width, width, 3)
        self.join = _conv_bn(2 * width, 2 * width, 3)
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.block2(F.relu(self.block1(x))))
        x = F.max_pool2d(torch.cat([F.relu(self.narrow(x)), F.relu(self.wide(x))], 1), 2)
        scores: Tensor = self.classifier(F.relu(self.join(x)).mean((2, 3)))
        return scores


def _conv_bn(cin: int, cout: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(cout))


def digits_net(num_classes: int = 10) -> DigitsNet:
    return DigitsNet(num_classes=num_classes)


def demo_config(folder: Path) -> RunConfig:
    """Half the MACs, at most two points of top-1; fp32 and one thread, so that it gives the same numbers on every run of one machine."""
    return RunConfig(
        model=f"{Path(__file__).resolve()}:digits_net", weights=str(folder / "dense.safetensors"), data="digits", val_fraction=0.2,
        preprocess=Preprocess(mean=(0.3,), std=(0.38,)), target=parse_target("macs=0.5"), max_drop=2.0, threads=1, device="cpu",
        recipe=Recipe(epochs=6, lr=0.02, batch_size=64, precision="fp32"),
    )  # fmt: skip


def train_dense(config: RunConfig, progress: Progress) -> None:
    """Train the network from scratch and write it to where the configuration expects its weights."""
    torch.set_num_threads(config.threads)
    data = load_data(config.data, preprocess=config.preprocess, val_fraction=config.val_fraction, seed=config.seed)
    with seeded(config.seed, "demo"):
        model = digits_net()
    progress.say("training a small network on the digits")
    with progress.bar("training") as advance:
        recipe = replace(config.recipe, epochs=12, lr=0.1)
        fine_tune(model, data, recipe, teacher=None, seed=config.seed, checkpoint=None, progress=advance, on_epoch=None)
    write_tensors(Path(config.weights), model.state_dict())


def run_demo(out: Path, *, fresh: bool, progress: Progress) -> Result[nn.Module]:
    """Train if that has not been done yet, then prune. `fresh` starts over what an earlier demo left in `out`."""
    from coppice.loop import prune_run

    if fresh and (out / "pruned" / CONFIG).exists():  # nothing but a run is ever removed
        shutil.rmtree(out / "pruned")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CoppiceError(f"--out {out} can't be made ({error.strerror}), name another folder") from error
    config = demo_config(out.resolve())
    if fresh or not Path(config.weights).exists():
        train_dense(config, progress)
    return prune_run(config, out / "pruned", progress=progress)
