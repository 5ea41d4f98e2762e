"""Options that several commands share, and how settings are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coppice import cli_masks
from coppice.errors import CoppiceError

if TYPE_CHECKING:
    from coppice.config import RunConfig

# None means "not given": the defaults live in RunConfig.
Text = str | None  # a module-level alias, evaluated when typer reads the annotations
Model = Annotated[
    str, typer.Option("--model", help="FILE.py:factory, torchvision:NAME, timm:NAME, FILE.keras or FILE.json", metavar="SPEC")
]
Weights = Annotated[Text, typer.Option("--weights", help=".safetensors, .pth/.pt holding only tensors, or X.weights.h5", metavar="FILE")]
NumClasses = Annotated[int | None, typer.Option("--num-classes", help="passed to the factory")]
Code = Annotated[Text, typer.Option("--code", help="of a .keras file: Python with the classes it needs; it is run", metavar="FILE")]
Input = Annotated[Text, typer.Option("--input", help="shape of an example input, such as 1,3,224,224", metavar="N,C,H,W")]
DataSpec = Annotated[Text, typer.Option("--data", help="a folder, a parquet or arrow file, or digits", metavar="PATH")]
Mean = Annotated[Text, typer.Option("--mean", help="per channel, for pixels in 0..1", metavar="R,G,B")]
Std = Annotated[Text, typer.Option("--std", help="per channel, for pixels in 0..1", metavar="R,G,B")]
Size = Annotated[int | None, typer.Option("--size", help="centre crop, pixels")]
Resize = Annotated[int | None, typer.Option("--resize", help="shorter side before the crop, pixels")]
Split = Annotated[
    list[str] | None, typer.Option("--split", help="what the data calls a split, such as train=training", metavar="ROLE=NAME")
]
ValFraction = Annotated[float | None, typer.Option("--val-fraction", help="part of train that decisions are taken on [0.1]")]
Seed = Annotated[int | None, typer.Option("--seed", help="everything random derives from it [0]")]
Device = Annotated[Text, typer.Option("--device", help="to train on: cpu, cuda (one GPU a process), or auto [auto]")]
Threads = Annotated[int | None, typer.Option("--threads", help="PyTorch threads of a process [one a core]")]
Criterion = Annotated[Text, typer.Option("--criterion", help="obs, taylor, fisher, l1, ..., random, or auto (tries several) [obs]")]
Aggregation = Annotated[Text, typer.Option("--aggregation", help="over all that goes with an index: sum, mean or max [sum]")]
RoundTo = Annotated[int | None, typer.Option("--round-to", help="widths are multiples of this [8]")]
MinWidth = Annotated[int | None, typer.Option("--min-width", help="no axis gets narrower [8]")]
Calibration = Annotated[int | None, typer.Option("--calibration", help="training images for the scores and the repair [512]")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable, on stdout")]


_PREPROCESS, _RECIPE = ("size", "resize", "mean", "std"), (
    "epochs", "optimizer", "lr", "weight_decay", "batch_size", "schedule", "warmup", "label_smoothing", "distill", "precision", "augment",
    "freeze_norm", "features", "ema",
)  # fmt: skip


def settings_of(given: Mapping[str, Any], config: Path | None) -> RunConfig:
    """The settings of a config.toml, or the defaults, with the options given on top."""
    from coppice.config import RunConfig, load_config
    from coppice.targets import parse_target

    base = load_config(config)[0] if config else RunConfig()
    readers: dict[str, Callable[[Any], Any]] = {
        "mean": lambda text: tuple(numbers("--mean", text, float)),
        "std": lambda text: tuple(numbers("--std", text, float)),
        "input": lambda text: tuple(numbers("--input", text, int)),
        "cut_after": lambda text: tuple(numbers("--cut-after", text, float)),
        "target": parse_target,
        "split": _splits,
    }
    read = {name: readers[name](value) if name in readers else value for name, value in given.items()}
    if "split" in read:
        read["splits"] = read.pop("split")
    preprocess = replace(base.preprocess, **{k: read.pop(k) for k in _PREPROCESS if k in read})
    recipe = replace(base.recipe, **{k: read.pop(k) for k in _RECIPE if k in read})
    masks = replace(base.masks, **cli_masks.taken_from(read))
    return replace(base, **read, preprocess=preprocess, recipe=recipe, masks=masks)


def numbers(flag: str, text: str, kind: type) -> list[Any]:
    """The numbers of `text`, which has commas between them. Raises CoppiceError that names the option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise CoppiceError(f"{flag} {text}: write numbers with commas between them") from None


def _splits(given: Sequence[str]) -> dict[str, str]:
    pairs = [entry.partition("=") for text in given for entry in text.split(",")]
    wrong = [role for role, equals, name in pairs if role not in ("train", "val", "test") or not name]
    if wrong:
        raise CoppiceError(f"--split {wrong[0]}: write ROLE=NAME with a role of train, val or test")
    return {role: name for role, _, name in pairs}


def flag_of(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")
