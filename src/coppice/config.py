"""Every setting of a run, and its file: `config.toml` is enough to repeat the run.

The settings live in one frozen dataclass; the file adds what is not a setting but explains a result: versions, the machine, and the
SHA-256 of the model file and the weights that the run began with. `resume` compares those; `--config` only reads the settings.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import coppice
from coppice.allocate import ALLOCATIONS
from coppice.criteria import AUTO, CRITERIA, TRIED, check_options
from coppice.errors import CoppiceError
from coppice.frameworks import names_keras
from coppice.machine import machine, usable_cores, versions
from coppice.masks import MaskRecipe
from coppice.parallel import local_processes
from coppice.preprocess import Preprocess
from coppice.recipe import Recipe
from coppice.targets import Target, parse_target

REGULARISATIONS = ("group-lasso", "slimming", "l1", "l2", "growing", "soft")
DEVICES = ("auto", "cpu", "cuda")
MEASURED = "measured"  # how many indices of each axis go is decided by what each cut does to the outputs, whatever the criterion
_MOST_THREADS = 1024  # not what this machine has: a run is repeated with the threads it was made with, and far more crash PyTorch
DISTILL = 0.9  # a loop always has the dense model at hand, and its soft labels are worth more than they cost


@dataclass(frozen=True)
class RunConfig:
    """One pruning run. Paths are absolute, so that a run folder can be loaded from any working directory."""

    model: str = ""  # FILE.py:factory, torchvision:NAME, timm:NAME, FILE.keras, FILE.json; "" for a module handed over in Python
    code: str = ""  # of a .keras file: a Python file with the classes that it needs beside Keras's own
    weights: str = ""  # .safetensors, .pth or .pt, .weights.h5 of a Keras model; "" for the factory's own
    num_classes: int = 0  # 0: the factory's own
    data: str = ""  # a folder, a parquet or arrow file, "digits"; "" for loaders handed over in Python
    splits: Mapping[str, str] = field(default_factory=dict)  # "train", "val", "test" -> the name used by the data
    val_fraction: float = 0.1
    input: tuple[int, ...] = ()  # shape of the example input; (): one image as the data has it
    preprocess: Preprocess = Preprocess()
    target: Target = Target()
    max_drop: float | None = None  # points of top-1: decided on validation, judged on test (coppice.floor)
    criterion: str = "obs"
    aggregation: str = "sum"  # of what a criterion says of single weights, over all that goes with an index
    normalization: str = "own"  # what the scores of axes are weighed against each other by, with the global allocation
    allocation: str = MEASURED
    round_to: int = 8
    min_width: int = 8
    steps: int = 1  # cuts to the target
    rounds: int = 2  # fine-tunings after the last cut, as long as the floor is not held
    trials: int = 5  # probes of the bisection, when only max_drop is given
    calibration: int = 512  # training images for the scores and the repair
    depth: bool = False  # whole modules may go too
    repair: bool = True  # refit the layers after a cut
    stop_early: bool = False  # end fine-tuning after the epoch that holds max_drop on validation
    cut_after: tuple[float, ...] = ()  # shares of the epochs: train the model by the recipe, and cut it after these on the way
    regularise: str = ""  # coppice.torch.regularise: shrink before the cut, for the first half of the epochs; "": don't
    strength: str = "auto"  # of it: "auto" or a number
    masks: MaskRecipe = MaskRecipe()  # single weights that become zero after the structured cuts; by itself: instead of them
    int8: bool = False  # quantise the exported model at the end
    recipe: Recipe = field(default_factory=lambda: Recipe(distill=DISTILL))
    seed: int = 0
    device: str = "auto"  # what trains and evaluates: "cpu", "cuda" (under torchrun one GPU a process), or "auto": GPUs where there are
    threads: int = 0  # of a process; 0: one a core; stored as the number used

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data without empty entries; `from_dict` is the inverse."""
        plain: dict[str, Any] = _prune_empty(asdict(self) | {"target": self.target.to_dict(), "splits": dict(self.splits)})
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RunConfig:
        """Raises CoppiceError naming a setting that is unknown, of the wrong kind or out of bounds."""
        _check_types(plain, cls(), "")
        readers: dict[str, Callable[[Any], Any]] = {
            "target": parse_target, "preprocess": Preprocess.from_dict, "input": tuple, "cut_after": tuple, "splits": dict,
            "recipe": lambda recipe: Recipe(**_check_types(recipe, Recipe(), "recipe.")),
            "masks": lambda masks: MaskRecipe(**_check_types(masks, MaskRecipe(), "masks.")),
        }  # fmt: skip
        return cls(**{key: readers[key](value) if key in readers else value for key, value in plain.items()})

    def absolute(self) -> RunConfig:
        """The same with every path absolute and the number of threads settled."""
        file, colon, factory = self.model.rpartition(":")
        model = f"{Path(file).resolve()}{colon}{factory}" if file.endswith(".py") else self.model
        if names_keras(self.model):
            model = str(Path(self.model).resolve())
        code = str(Path(self.code).resolve()) if self.code else ""
        weights = str(Path(self.weights).resolve()) if self.weights else ""
        data = str(Path(self.data).resolve()) if self.data and Path(self.data).exists() else self.data
        return replace(
            self, model=model, code=code, weights=weights, data=data, threads=self.threads or max(1, usable_cores() // local_processes())
        )

    @property
    def is_keras(self) -> bool:
        """Whether the model is one of Keras's."""
        return names_keras(self.model, self.weights)

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the files that decide the dense model: they must not change under a run."""
        file = self.model.rpartition(":")[0]
        model = Path(self.model) if names_keras(self.model) else Path(file) if file.endswith(".py") else None
        paths = {"model": model, "code": Path(self.code) if self.code else None, "weights": Path(self.weights) if self.weights else None}
        return {name: sha256(path) for name, path in paths.items() if path and path.is_file()}


def _check(config: RunConfig) -> None:
    bounds: list[tuple[bool, str]] = [
        (0 < config.val_fraction < 1, f"--val-fraction {config.val_fraction}: it lies between 0 and 1"),
        (config.max_drop is None or 0 <= config.max_drop <= 100, f"--max-drop {config.max_drop}: give points of top-1, 0 to 100"),
        (config.criterion in (*CRITERIA, AUTO), f"--criterion {config.criterion}: choose one of {', '.join((*CRITERIA, AUTO))}"),
        (
            config.allocation in (MEASURED, *ALLOCATIONS),
            f"--allocation {config.allocation}: choose one of {', '.join((MEASURED, *ALLOCATIONS))}",
        ),
        (all(size > 0 for size in config.input), f"--input {config.input}: every size must be 1 or more"),
        (config.num_classes >= 0, f"--num-classes {config.num_classes}: it must be 1 or more"),
        (config.device in DEVICES, f"--device {config.device}: choose one of {', '.join(DEVICES)}"),
        (0 <= config.threads <= _MOST_THREADS, f"--threads {config.threads}: it must be 1 to {_MOST_THREADS}"),
        (0 <= config.seed < 2**63, f"--seed {config.seed}: it must be 0 or more, and less than 2^63"),
    ]
    bounds += [
        (getattr(config, name) >= 1, f"--{name.replace('_', '-')} {getattr(config, name)}: it must be 1 or more")
        for name in ("round_to", "min_width", "steps", "rounds", "trials", "calibration")
    ]
    bounds += [
        (not config.stop_early or config.max_drop is not None, "--stop-early ends when the floor holds: give one with --max-drop"),
        (
            config.regularise in ("", *REGULARISATIONS),
            f"--regularise {config.regularise}: choose one of {', '.join(REGULARISATIONS)}",
        ),
        (
            all(0 < share < 1 for share in config.cut_after),
            f"--cut-after {_listed(config.cut_after)}: shares of the epochs, between 0 and 1",
        ),
        (
            not config.cut_after or (bool(config.target) and config.target.setting is None),
            f"--cut-after {_listed(config.cut_after)}: give the MACs, parameters or bytes to cut to, as in --target macs=0.5",
        ),
        (
            not config.cut_after or (config.criterion != AUTO and not config.regularise and config.steps == 1),
            f"--cut-after {_listed(config.cut_after)}: it goes with one criterion, and without --regularise and --steps",
        ),
        (not config.regularise or bool(config.target), f"--regularise {config.regularise}: it shrinks towards a --target, give one"),
        (not config.regularise or config.recipe.epochs > 0, f"--regularise {config.regularise}: it needs --epochs to work in"),
        (config.strength == "auto" or bool(config.regularise), f"--strength {config.strength}: say of what with --regularise"),
        (_is_strength(config.strength), f"--strength {config.strength}: write auto, or a number above 0"),
        (
            config.aggregation == "sum" or config.criterion != AUTO,
            f"--aggregation {config.aggregation}: it goes with one criterion, name it with --criterion",
        ),
        (
            config.normalization == "own" or config.allocation == "global",
            f"--normalization {config.normalization}: only --allocation global weighs the scores of axes against each other, add it",
        ),
    ]
    for holds, message in bounds:
        if not holds:
            raise CoppiceError(message)
    check_options(TRIED[0] if config.criterion == AUTO else config.criterion, config.aggregation, config.normalization)


def _listed(shares: tuple[float, ...]) -> str:
    return ",".join(f"{share:g}" for share in shares)


def _is_strength(text: str) -> bool:
    try:
        return text == "auto" or 0 < float(text) < 1e6
    except ValueError:
        return False


def _check_types(given: Mapping[str, Any], default: Any, where: str) -> Mapping[str, Any]:
    """`given` itself, if it names fields of the dataclass `default` and its values are of their kinds."""
    known = {f.name: getattr(default, f.name) for f in fields(default)}
    for name, value in given.items():
        if name not in known:
            raise CoppiceError(f"configuration: unknown setting {where}{name}, known are {', '.join(sorted(known))}")
        kinds, wanted = _kinds(known[name])
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CoppiceError(f"configuration: {where}{name} is {value!r}, it must be {wanted}")
    if not all(isinstance(size, int) for size in given.get("input", ())):
        raise CoppiceError(f"configuration: input is {given['input']!r}, it must be a list of whole numbers")
    return given


def _kinds(default: Any) -> tuple[tuple[type, ...], str]:
    if isinstance(default, str):
        return (str,), "text"
    if isinstance(default, bool):
        return (bool,), "true or false"
    if isinstance(default, int):
        return (int,), "a whole number"
    if default is None or isinstance(default, float):
        return (int, float), "a number"
    if isinstance(default, tuple):
        return (list, tuple), "a list"
    return (Mapping,), "a table"


def _prune_empty(value: Any) -> Any:
    """TOML has no null: what is None, and an empty table or list, is left out. Tuples become lists."""
    if isinstance(value, Mapping):
        kept = {key: _prune_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None and item not in ({}, [], "")}
    return [_prune_empty(item) for item in value] if isinstance(value, list | tuple) else value


def dump_config(config: RunConfig) -> str:
    """The text of config.toml: the settings, then `versions`, `machine` and `inputs`, which are records and not settings."""
    tomli_w = _tomli_w()
    records = {"versions": versions(), "machine": machine(config.threads), "inputs": config.fingerprints()}
    settings = config.to_dict()
    header = f"# Written by coppice {coppice.__version__}. To repeat: coppice prune --config config.toml --out AGAIN\n\n"
    return header + str(tomli_w.dumps(settings | {k: v for k, v in records.items() if v}))


def load_config(path: Path) -> tuple[RunConfig, dict[str, dict[str, Any]]]:
    """Settings and records of a config.toml. Raises CoppiceError if it is missing, not TOML, or has an unknown setting."""
    try:
        plain = _tomllib().loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CoppiceError(f"no configuration at {path}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:  # TOMLDecodeError is a ValueError
        raise CoppiceError(f"{path} can't be read as TOML: {error}") from error
    records = {name: plain.pop(name, {}) for name in ("versions", "machine", "inputs")}
    return RunConfig.from_dict(plain), records


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _tomllib() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib


def _tomli_w() -> Any:
    try:
        import tomli_w
    except ImportError:
        raise CoppiceError("config.toml can't be written without tomli-w: pip install 'coppice[cli]'") from None
    return tomli_w
