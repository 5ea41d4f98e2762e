"""What each process does in test_processes: run by torchrun, or as one process. Writes what it finds to OUT."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from coppice.data import ImageData, Loaders, load_data
from coppice.demo import DigitsNet
from coppice.errors import CoppiceError
from coppice.evaluate import evaluate
from coppice.parallel import current, joined
from coppice.preprocess import Preprocess
from coppice.recipe import Recipe
from coppice.run import write_tensors
from coppice.seeding import seeded
from coppice.torch.masking import Held
from coppice.torch.whole_batch import WholeBatch
from coppice.train import fine_tune

# 33 images don't divide by two; every kind of loss, and what goes beside the steps
RECIPE = Recipe(
    epochs=2, lr=0.05, batch_size=33, precision="fp32", augment="crop+flip+colour+erasing+randaugment+mixup+cutmix",
    distill=0.5, features=0.1, ema=0.9, grad_clip=1.0, label_smoothing=0.1,
)  # fmt: skip
ONCE = replace(RECIPE, epochs=1)
STEPS = 6


class Net(DigitsNet):
    """With dropout, BatchNorm called as a function, and a layer that no step needs."""

    def __init__(self) -> None:
        super().__init__(8)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.stem[1]
        x = self.stem[0](x)
        x = F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps))
        x = F.dropout2d(x, 0.1, self.training)
        x = F.relu(x + self.block2(F.relu(self.block1(x))))
        x = F.max_pool2d(torch.cat([F.relu(self.narrow(x)), F.relu(self.wide(x))], 1), 2)
        scores: Tensor = self.classifier(F.dropout(F.relu(self.join(x)).mean((2, 3)), 0.2, self.training))
        return scores


def digits() -> ImageData:
    data = load_data("digits", preprocess=Preprocess(mean=(0.3,), std=(0.38,)), val_fraction=0.2)
    return replace(data, train=data.train.subset(range(STEPS * RECIPE.batch_size)), val=data.val.subset(range(150)))


def trained(data: ImageData | Loaders, recipe: Recipe, **options: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A network after the recipe, with a masked weight and a teacher."""
    with seeded(0, "test"):
        model, teacher = Net(), Net().eval()
    mask = (torch.arange(model.block1[0].weight.numel()).reshape(model.block1[0].weight.shape) % 3 > 0).numpy()
    along = Held(model, {"block1.0.weight": mask})
    history = fine_tune(model, data, recipe, teacher=teacher, seed=3, along=along, **options)
    return model, [asdict(result) | {"seconds": 0} for result in history]


def killing(after: int) -> Callable[[int, int], None]:
    """Every process is gone after so many steps."""

    def told(done: int, total: int) -> None:
        if done == after:
            os.kill(os.getpid(), signal.SIGKILL)

    return told


def train_and_die(out: Path) -> None:
    trained(digits(), RECIPE, checkpoint=out / "checkpoint", checkpoint_every=0.0, progress=killing(STEPS + 2))


def resume_and_more(out: Path) -> None:
    """Go on with what was killed; train undisturbed; then layers, loaders and failures."""
    data = digits()
    for name, options in {"resumed": {"checkpoint": out / "checkpoint"}, "undisturbed": {}}.items():
        model, history = trained(data, RECIPE, **options)
        write(out, name, model, history)
    write(out, "loaders", *trained(loaders(data, None), ONCE))
    write(out, "bf16", *trained(data, replace(ONCE, precision="bf16")))
    with joined():
        if current().size > 1:
            told = {"layers": layers(), "sampled": sampled(data), "refused": refusals(data)}
            if current().rank == 0:
                (out / "told.json").write_text(json.dumps(told))


def write(out: Path, name: str, model: nn.Module, history: list[dict[str, Any]]) -> None:
    assert type(model) is Net
    with joined():
        if current().rank == 0:
            write_tensors(out / f"{name}.safetensors", model.state_dict())
            (out / f"{name}.json").write_text(json.dumps(history))


def loaders(data: ImageData, sampler: Any, shuffle: bool = True, seed: int | None = None) -> Loaders:
    images = [data.preprocess.normalise(torch.stack([part[k][0] for k in range(len(part))])) for part in (data.train, data.val)]
    train, val = (TensorDataset(x, part.labels) for x, part in zip(images, (data.train, data.val), strict=True))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    own = DataLoader(train, RECIPE.batch_size, shuffle=shuffle and sampler is None, sampler=sampler, drop_last=True, generator=generator)
    return Loaders(own, DataLoader(val, 32), DataLoader(val, 32))


def layers() -> dict[str, float]:
    """The largest difference of BatchNorm over processes from BatchNorm of the whole batch, which each process can make for itself."""
    world = current()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, 4, 4, generator=generator, dtype=torch.float64) * 3 + 50
    slope = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    part, worst = world.part(len(x)), {}
    for momentum in (0.1, None):
        whole, shared = (nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            for norm in (whole, shared):
                norm.weight.copy_(torch.linspace(-1, 2, 5))
        ours, theirs = x[part].clone().requires_grad_(), x.clone().requires_grad_()
        with WholeBatch(part, len(x)):
            y = shared(ours)
        y.backward(slope[part])
        expected = whole(theirs)
        expected.backward(slope)
        assert theirs.grad is not None
        assert ours.grad is not None
        assert shared.weight.grad is not None
        assert shared.bias.grad is not None
        gradients = torch.stack([shared.weight.grad, shared.bias.grad])
        summed = torch.tensor(world.numbers(gradients.flatten().tolist()), dtype=torch.float64).sum(0).view(2, -1)
        pairs = {
            "output": (y, expected[part]), "input": (ours.grad, theirs.grad[part]), "mean": (shared.running_mean, whole.running_mean),
            "var": (shared.running_var, whole.running_var), "weight": (summed[0], whole.weight.grad), "bias": (summed[1], whole.bias.grad),
        }  # fmt: skip
        worst |= {f"{name}, momentum {momentum}": float((left - right).abs().max()) for name, (left, right) in pairs.items()}  # type: ignore[operator]
    for name, drop in {
        "dropout": F.dropout, "dropout in place": lambda x, p: F.dropout(x, p, inplace=True),
        "torch.dropout": lambda x, p: torch.dropout(x, p, train=True), "dropout2d": F.dropout2d,
    }.items():  # fmt: skip
        with seeded(0, name):
            expected = drop(x.clone(), 0.5)
        with seeded(0, name), WholeBatch(part, len(x)):
            worst[name] = float((drop(x[part].clone(), 0.5) - expected[part]).abs().max())
    line = torch.linspace(1, 2, 5, dtype=torch.float64)
    told = {"weight": line, "bias": line, "training": True, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": False}
    with WholeBatch(part, len(x)):
        y = torch.batch_norm(x[part], running_mean=None, running_var=None, **told)
    worst["torch.batch_norm"] = float((y - F.batch_norm(x, None, None, line, line, True)[part]).abs().max())
    return worst


def sampled(data: ImageData) -> dict[str, Any]:
    """A loader with a DistributedSampler: every image is seen once an epoch, each by one process."""
    whole = loaders(data, None).train.dataset
    sampler = DistributedSampler(whole, shuffle=True)
    part = loaders(data, sampler)
    model = fine_tune_plain(part)
    return {"parts": [sorted(own) for own in current().together(lambda: list(iter(sampler)))], "top1": evaluate(model, part.val, None).top1}


def fine_tune_plain(data: Loaders) -> nn.Module:
    with seeded(0, "test"):
        model = Net()
    fine_tune(model, data, Recipe(epochs=1, lr=0.01, precision="fp32"))
    return model


def refusals(data: ImageData) -> dict[str, str]:
    """What is said of loaders that don't fit together."""
    rank = current().rank
    whole = loaders(data, None)
    own = torch.Generator().manual_seed(rank)
    wrong = {
        "other order": loaders(data, None, seed=rank),
        "other sampler": loaders(data, DistributedSampler(whole.train.dataset, num_replicas=3, rank=rank)),
        "other length": replace(whole, train=DataLoader(whole.train.dataset, 10 + rank)),
        "sampled validation": replace(whole, val=DataLoader(whole.val.dataset, 32, sampler=DistributedSampler(whole.val.dataset))),
        "shuffled validation": replace(whole, val=DataLoader(whole.val.dataset, 32, shuffle=True, generator=own)),
        "too small": replace(whole, train=DataLoader(TensorDataset(*whole.train.dataset[:34]), 33)),
    }  # fmt: skip
    said = {}
    for name, given in wrong.items():
        try:
            fine_tune_plain(given)
            said[name] = ""
        except CoppiceError as error:
            said[name] = str(error)
    with seeded(rank, "other"):
        model = Counting()
    try:
        fine_tune(model, data, Recipe(epochs=1, lr=0.01, batch_size=32, precision="fp32"))
        said["statistics of its own"] = ""
    except CoppiceError as error:
        said["statistics of its own"] = str(error)
    return said


class Counting(Net):
    """Keeps a mean of what it sees that is no BatchNorm's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("brightness", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.brightness.copy_(x.mean())
        return super().forward(x)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"die": train_and_die, "resume": resume_and_more}[sys.argv[1]](Path(sys.argv[2]))
