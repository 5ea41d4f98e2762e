"""The command line: `coppice inspect | sensitivity | prune | eval | measure | predict | export | demo`.

Exit status: 0 done, 1 a fault of ours, 2 bad input or a target or floor that does not hold (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import coppice
from coppice import cli_export, cli_keras, cli_latency, cli_modules, cli_print
from coppice.cli_masks import CutAfter, Int8, MaskCriterion, MaskSchedule, MaskScope, MaskSteps, NofM, Regularise, Sparsity, Strength
from coppice.cli_options import (
    Aggregation,
    AsJson,
    Calibration,
    Code,
    Criterion,
    DataSpec,
    Device,
    Input,
    Mean,
    MinWidth,
    Model,
    NumClasses,
    Resize,
    RoundTo,
    Seed,
    Size,
    Split,
    Std,
    Text,
    Threads,
    ValFraction,
    Weights,
    flag_of,
    numbers,
    settings_of,
)
from coppice.errors import CoppiceError
from coppice.frameworks import names_keras
from coppice.parallel import explained, joined, launched, leads, local_processes, meet, not_shared, says_it

if TYPE_CHECKING:
    from coppice.config import RunConfig
    from coppice.result import Result

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Prune a trained network, and prove it right.",
)

_SHARED = ("prune", "eval")  # the commands that several processes do together

app.command()(cli_latency.measure)
app.command()(cli_latency.predict)
app.command()(cli_export.export)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"coppice {coppice.__version__}")
        raise typer.Exit


@app.callback()
def main(context: typer.Context, version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    del version
    if context.invoked_subcommand not in _SHARED:
        not_shared(f"coppice {context.invoked_subcommand}")


@app.command()
def inspect(
    model: Model,
    weights: Weights = None,
    input: Input = None,
    num_classes: NumClasses = None,
    code: Code = None,
    axis: Annotated[Text, typer.Option("--axis", help="show what goes with this one", metavar="NAME")] = None,
    modules: Annotated[bool, typer.Option("--modules", help="list the modules that can go as a whole")] = False,
    data: Annotated[Text, typer.Option("--data", help="with --modules: score them on its training images", metavar="PATH")] = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    score: Annotated[Text, typer.Option("--score", help="with --data: loss, error, cosine or taylor [loss]")] = None,
    runtime: Annotated[Text, typer.Option("--runtime", help="with --modules: milliseconds on it, such as onnxruntime")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the axes of a model: what is coupled, what each share of the cost is, what moves together, what is pinned and why."""
    if names_keras(model, weights or ""):
        named = {"model": model, "weights": weights, "code": code, "num_classes": num_classes, "input": input}
        coupling, found = cli_keras.coupled(settings_of({key: value for key, value in named.items() if value is not None}, None))
        cli_print.show_axes(coupling, model, found, axis, as_json)
        return
    import torch

    from coppice.coupling import couple
    from coppice.models import load_model
    from coppice.torch.capture import capture

    if input is None:
        raise CoppiceError("inspect needs the shape of an input: --input 1,3,224,224")
    shape = tuple(numbers("--input", input, int))
    if any(size < 1 for size in shape):
        raise CoppiceError(f"--input {input}: every size must be 1 or more")
    try:
        example = torch.zeros(shape)
    except RuntimeError:
        raise CoppiceError(f"--input {input}: an input of that size does not fit in memory") from None
    network = load_model(model, Path(weights) if weights else None, num_classes).eval()
    coupling = couple(capture(network, (example,)))
    if modules:
        given = {"data": data, "mean": mean, "std": std, "size": size, "resize": resize}
        settings = settings_of({key: value for key, value in given.items() if value is not None}, None)
        scores = cli_modules.scored(network, coupling, settings, score) if data or score else {}
        times = cli_modules.timed(network, coupling, runtime, shape[1:]) if runtime else {}
        cli_modules.show(coupling, model, scores, times, as_json)
        return
    if data or score or runtime:
        raise CoppiceError("--data, --score and --runtime go with --modules: add it")
    cli_print.show_axes(coupling, model, shape, axis, as_json)


@app.command()
def sensitivity(
    model: Model,
    weights: Weights = None,
    data: DataSpec = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    num_classes: NumClasses = None,
    split: Split = None,
    val_fraction: ValFraction = None,
    criterion: Annotated[Text, typer.Option("--criterion", help="says which indices stay: obs, taylor, l1, ..., random [obs]")] = None,
    aggregation: Aggregation = None,
    round_to: RoundTo = None,
    min_width: MinWidth = None,
    calibration: Calibration = None,
    images: Annotated[int, typer.Option("--images", help="validation images that each cut is judged on")] = 512,
    parts: Annotated[str, typer.Option("--parts", help="how much of an axis stays", metavar="PART,PART")] = "0.75,0.5,0.25",
    limit: Annotated[float | None, typer.Option("--limit", help="the divergence that is little [the median of all]")] = None,
    repair: Annotated[bool | None, typer.Option("--repair/--no-repair", help="refit what reads the axis first [yes]")] = None,
    seed: Seed = None,
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option("--out", help="a page or a picture: .html, .svg or .png", metavar="FILE")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what each axis alone loses as it gets narrower, and what that saves: where a model can be cut, and where it can't."""
    given = {k: v for k, v in locals().items() if v is not None and k not in ("images", "parts", "limit", "out", "as_json")}
    from coppice.curves_report import check_out, write
    from coppice.loop import measure_sensitivity
    from coppice.pictures import check_renderer

    settings = settings_of(given, None)
    if not settings.data:
        raise CoppiceError("name the data with --data")
    shares = numbers("--parts", parts, float)
    if images < 1:
        raise CoppiceError(f"--images {images}: it must be 1 or more")
    if out is not None:
        check_renderer()
        check_out(out)
    with _guarded(None):
        found = measure_sensitivity(settings, shares, images, limit, progress=_terminal())
    if out is not None:
        write(found, out, f"{model.rpartition(':')[2]}: sensitivity, by {settings.criterion}")
    if as_json:
        typer.echo(json.dumps({"model": model, "criterion": settings.criterion, "repair": settings.repair, **found.to_dict()}, indent=1))
    else:
        cli_print.print_curves(found)


@app.command()
def prune(
    model: Annotated[
        Text, typer.Option("--model", help="FILE.py:factory, torchvision:NAME, timm:NAME, FILE.keras or FILE.json", metavar="SPEC")
    ] = None,
    weights: Weights = None,
    code: Code = None,
    data: DataSpec = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="macs=0.5, params=2M, latency=4ms@onnxruntime, ...", metavar="KEY=VALUE"),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="points of top-1 that may be lost; alone: the smallest such model")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="the run folder", metavar="DIR")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="start from the settings of a config.toml", metavar="FILE")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="go on with an interrupted run", metavar="DIR")] = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    input: Input = None,
    num_classes: NumClasses = None,
    split: Split = None,
    val_fraction: ValFraction = None,
    criterion: Criterion = None,
    aggregation: Aggregation = None,
    normalization: Annotated[
        Text, typer.Option("--normalization", help="of axes against each other: own, axis, isomorphic or none [own]")
    ] = None,
    allocation: Annotated[Text, typer.Option("--allocation", help="measured, global or uniform [measured]")] = None,
    round_to: RoundTo = None,
    min_width: MinWidth = None,
    steps: Annotated[int | None, typer.Option("--steps", help="cuts on the way to the target [1]")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="fine-tunings while the floor does not hold [2]")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="probes of the bisection with --max-drop alone [5]")] = None,
    calibration: Calibration = None,
    depth: Annotated[bool | None, typer.Option("--depth/--width-only", help="whole modules may go too [widths only]")] = None,
    repair: Annotated[bool | None, typer.Option("--repair/--no-repair", help="refit the layers after a cut [yes]")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="epochs of each fine-tuning, over all --steps [3]")] = None,
    optimizer: Annotated[Text, typer.Option("--optimizer", help="sgd, adamw, or auto: what a few steps of each say [auto]")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="peak learning rate; of SGD, if no optimiser is named")] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="[128]")] = None,
    schedule: Annotated[Text, typer.Option("--schedule", help="cosine or onecycle [cosine]")] = None,
    warmup: Annotated[float | None, typer.Option("--warmup", help="part of the steps spent warming up")] = None,
    label_smoothing: Annotated[float | None, typer.Option("--label-smoothing", help="[0]")] = None,
    distill: Annotated[float | None, typer.Option("--distill", help="weight of the dense model's predictions, 0: off [0.9]")] = None,
    features: Annotated[float | None, typer.Option("--features", help="weight of the dense model's features in the loss [0]")] = None,
    ema: Annotated[float | None, typer.Option("--ema", help="decay of an average of the weights, such as 0.99 [0: none]")] = None,
    stop_early: Annotated[
        bool | None, typer.Option("--stop-early/--all-epochs", help="stop when --max-drop holds on validation [all epochs]")
    ] = None,
    precision: Annotated[Text, typer.Option("--precision", help="auto, fp32 or bf16 [auto]")] = None,
    freeze_norm: Annotated[
        bool | None, typer.Option("--freeze-norm/--train-norm", help="BatchNorm keeps its statistics while fine-tuning [train]")
    ] = None,
    augment: Annotated[
        Text,
        typer.Option("--augment", help="none, light, standard, strong, auto (by the data's size), or steps such as crop+mixup [light]"),
    ] = None,
    cut_after: CutAfter = None,
    regularise: Regularise = None,
    strength: Strength = None,
    sparsity: Sparsity = None,
    nm: NofM = None,
    mask_criterion: MaskCriterion = None,
    mask_scope: MaskScope = None,
    mask_schedule: MaskSchedule = None,
    mask_steps: MaskSteps = None,
    int8: Int8 = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Cut a model to a target, verify, fine-tune, evaluate, export, report."""
    given = {k: v for k, v in locals().items() if v is not None and k not in ("out", "config", "resume")}
    if resume is not None:
        if given or out or config:
            raise CoppiceError(
                f"--resume goes on with the run's own settings: drop {flag_of(next(iter([*given, 'out' if out else 'config'])))}"
            )
        _finish(resume, lambda: _resume(resume))
        return
    if out is None:
        raise CoppiceError("name the run folder with --out")
    settings = settings_of(given, config)
    _finish(out, lambda: _prune(settings, out))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Option("--model", help="a run folder, or a model as for prune", metavar="RUN|SPEC")],
    data: DataSpec = None,
    weights: Weights = None,
    code: Code = None,
    num_classes: NumClasses = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    split: Split = None,
    val_fraction: ValFraction = None,
    part: Annotated[str, typer.Option("--part", help="test, val or train")] = "test",
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy of a run's pruned model, or of any model, on a data set."""
    given = {k: v for k, v in locals().items() if v is not None and k not in ("part", "as_json", "model")}
    if part not in ("test", "val", "train"):
        raise CoppiceError(f"--part {part}: choose test, val or train")
    folder = Path(model)
    is_run = folder.is_dir()
    if is_run and (weights or num_classes):
        raise CoppiceError("a run folder has its own weights: drop --weights and --num-classes")
    config = settings_of(given, folder / "config.toml") if is_run else settings_of(given | {"model": model}, None)
    if config.is_keras:
        not_shared("evaluating a Keras model")
        with _terminal().bar("measuring") as advance:
            cli_print.print_metrics(part, *cli_keras.measured(folder, config, part, advance), as_json)
        return
    from coppice.data import check_classes, load_data
    from coppice.evaluate import evaluate as measure
    from coppice.forward import placed
    from coppice.loop import count_outputs
    from coppice.machine import usable_cores
    from coppice.models import load_model
    from coppice.run import load
    from coppice.stages import threads as fixed_threads

    if not config.data:
        raise CoppiceError("name the data with --data")
    cores = max(1, usable_cores() // local_processes())
    with _guarded(None), joined(config.device), fixed_threads(config.threads or cores), _terminal().bar("measuring") as advance:
        network = load(folder) if is_run else load_model(model, Path(weights) if weights else None, num_classes).eval()
        images = load_data(
            config.data, preprocess=config.preprocess, val_fraction=config.val_fraction, seed=config.seed, split_names=config.splits
        )
        check_classes(images, count_outputs(network, images))
        found = measure(network.to(placed(config.device)), getattr(images, part), images.preprocess, progress=advance)
    cli_print.print_metrics(part, found, images.classes, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="where to put it", metavar="DIR")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="start over what an earlier demo left there")] = False,
) -> None:
    """Train a small network on the embedded digits and prune it to half its MACs: two minutes, no download."""
    from coppice.demo import run_demo

    _finish(out / "pruned", lambda: run_demo(out, fresh=fresh, progress=_terminal()))


# --- doing and saying -----------------------------------------------------------------------------------------------


def _prune(settings: RunConfig, out: Path) -> Result[Any]:
    for flag, value in (("--model", settings.model), ("--data", settings.data)):
        if not value:
            raise CoppiceError(f"{flag} is missing")
    if settings.is_keras:
        not_shared("pruning a Keras model")
        return cli_keras.prune(settings, out, _terminal())
    from coppice.loop import prune_run

    return prune_run(settings, out, progress=_terminal())


def _resume(run: Path) -> Result[Any]:
    if cli_keras.is_run(run):
        not_shared("pruning a Keras model")
        return cli_keras.resume(run, _terminal())
    from coppice.loop import resume

    return resume(run, progress=_terminal())


def _finish(folder: Path, work: Callable[[], Result[Any]]) -> None:
    """Do the work, print what came of it, and leave with the exit status that says whether the target holds."""
    with _guarded(folder):
        result = work()
    cli_print.print_result(result.metrics)
    if result.met:
        typer.echo(result.statement)
    else:
        _complain(result.statement)
    typer.echo(f"report: {folder / 'report.html'}")
    meet()
    raise typer.Exit(0 if result.met else 2)


@contextmanager
def _guarded(folder: Path | None) -> Iterator[None]:
    """Say how to go on after Ctrl-C (with a run in `folder`), and put the traceback of a fault of ours in a file, not on the terminal."""
    try:
        yield
    except KeyboardInterrupt:
        started = folder is not None and (folder / "config.toml").exists()
        _complain(f"stopped; go on with: coppice prune --resume {folder}" if started else "stopped before anything was written")
        raise typer.Exit(130) from None
    except (CoppiceError, typer.Exit, ModuleNotFoundError):
        raise
    except Exception as error:
        if isinstance(meant := explained(error), CoppiceError):
            raise meant from error
        _complain(_fault(error, folder if folder and folder.is_dir() else Path(tempfile.gettempdir())))
        raise typer.Exit(1) from None


def _fault(error: Exception, folder: Path) -> str:
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix="fault-", suffix=".txt", delete=False, encoding="utf-8") as stream:
        stream.write("".join(traceback.format_exception(error)))
    reason = str(error).strip().splitlines()
    return f"unexpected {type(error).__name__}{': ' + reason[0] if reason else ''} (traceback in {stream.name})"


def _complain(sentence: str) -> None:
    """Say what ended the command; of several processes that it ended, one does."""
    if says_it():
        print(f"coppice: {' '.join(sentence.split())}", file=sys.stderr)


def _terminal() -> Any:
    from coppice.progress import Silent, Terminal

    return Terminal() if leads() else Silent()


def run(arguments: Sequence[str]) -> int:
    """Run the command line and answer its exit status: every failure is one sentence on stderr. Of several processes one speaks."""
    if launched():  # before PyTorch is imported: gradients that not every step needs are waited for, and it notes that each time
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if leads():
        return _run(arguments)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        status = app(args=list(arguments), standalone_mode=False)
        return status if isinstance(status, int) else 0
    except CoppiceError as error:
        _complain(str(error))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped")
        return 130
    except typer.Exit as leave:
        return leave.exit_code
    except ModuleNotFoundError as error:
        if error.name != "torch":
            _complain(_fault(error, Path(tempfile.gettempdir())))
            return 1
        _complain("this needs PyTorch: pip install 'coppice[torch]' (a Keras model is a file that ends in .keras)")
        return 2
    except Exception as error:
        if _is_usage(error):
            if said := error.format_message():  # type: ignore[attr-defined]  # empty where no command was named: that printed the help
                _complain(f"{said} (see coppice --help)")
            return 2
        _complain(_fault(error, Path(tempfile.gettempdir())))
        return 1


def _is_usage(error: Exception) -> bool:
    """Typer carries its own copy of click in some versions: the base class is found through an exception that it exports."""
    base = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    return isinstance(error, base)
