"""The commands about time: `coppice measure` and `coppice predict`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coppice.errors import CoppiceError

if TYPE_CHECKING:
    from coppice.timing import Measurement
    from coppice.verdict import Verdict

SHOWN = 12  # rows of a table
Models = Annotated[
    list[str],
    typer.Argument(
        help="a run folder, an .onnx, .tflite or .keras file, FILE.py:factory, torchvision:NAME or timm:NAME", metavar="MODEL..."
    ),
]
Input = Annotated[str | None, typer.Option("--input", help="shape of an example input, such as 1,3,224,224", metavar="N,C,H,W")]
NumClasses = Annotated[int | None, typer.Option("--num-classes", help="passed to the factory")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable, on stdout")]


def measure(
    models: Models,
    against: Annotated[
        str | None, typer.Option("--against", help="the model to compare with [a run's dense model, else the first]", metavar="MODEL")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="torch, onnxruntime, openvino, keras, litert, ... [the model's own]", metavar="NAME,...")
    ] = None,
    threads: Annotated[str, typer.Option("--threads", metavar="N,...")] = "1",
    batch: Annotated[str, typer.Option("--batch", metavar="N,...")] = "1",
    input: Input = None,
    num_classes: NumClasses = None,
    rounds: Annotated[int, typer.Option("--rounds", help="turns that each model takes in each setting")] = 15,
    out: Annotated[Path | None, typer.Option("--out", help="write all that was found as JSON", metavar="FILE")] = None,
    as_json: AsJson = False,
) -> None:
    """Time models where they will run, turn by turn, and say which differences are more than noise."""
    from coppice.progress import Terminal
    from coppice.run import check_new_file, write_text
    from coppice.subjects import open_subjects, own_runtime
    from coppice.timing import measure as time_them

    if out is not None:
        check_new_file(out)
    subjects, reference, shape = open_subjects(models, against, _listed("--input", input, int) if input else None, num_classes)
    with Terminal().bar("measuring") as advance:
        found = time_them(
            subjects,
            shape,
            (runtime or own_runtime(subjects)).split(","),
            _listed("--threads", threads, int),
            _listed("--batch", batch, int),
            against=reference,
            rounds=rounds,
            progress=advance,
        )
    text = json.dumps(found.to_dict(), indent=1)
    if out is not None:
        write_text(out, text + "\n")
    if as_json:
        typer.echo(text)
    else:
        _print(found)


def predict(
    model: Annotated[str, typer.Argument(help="FILE.py:factory, torchvision:NAME or timm:NAME", metavar="MODEL")],
    target: Annotated[list[str], typer.Option("--target", help="latency=0.5@onnxruntime, and others with it", metavar="KEY=VALUE")],
    input: Input = None,
    num_classes: NumClasses = None,
    round_to: Annotated[int, typer.Option("--round-to", help="widths are multiples of this and of the runtime's grid", min=1)] = 8,
    min_width: Annotated[int, typer.Option("--min-width", help="no axis gets narrower", min=1)] = 8,
    as_json: AsJson = False,
) -> None:
    """Say before any training what a latency target will buy: the speed-up, where the time goes, and which cuts buy nothing."""
    from coppice.models import load_model
    from coppice.progress import Terminal
    from coppice.targets import parse_target
    from coppice.verdict import predict as judge

    wanted = parse_target(target)
    if input is None:
        raise CoppiceError("predict needs the shape of an input: --input 1,3,224,224")
    shape = _listed("--input", input, int)[1:]
    if not shape or min(shape) < 1:
        raise CoppiceError(f"--input {input}: give the batch and then the shape of one input, as in 1,3,224,224")
    network = load_model(model, None, num_classes)
    with Terminal().bar("timing") as advance:
        found = judge(network, shape, wanted, round_to=round_to, min_width=min_width, progress=advance)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _print_verdict(found)
    if not found.met:
        raise CoppiceError(str(found))
    if not as_json:
        typer.echo(str(found))


def _print_verdict(found: Verdict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("where the time goes", box=None, header_style="bold")
    for column in ("ms", "share"):
        table.add_column(column, justify="right")
    for name, seconds in found.layers[:SHOWN]:
        table.add_row(name, f"{1e3 * seconds:.3g}", f"{100 * seconds / found.dense:.1f} %")
    console.print(table)
    table = Table("what halving an axis buys", box=None, header_style="bold")
    for column in ("width", "ms saved", "of the time", "of the MACs"):
        table.add_column(column, justify="right")
    for cut in [cut for cut in found.buys if cut.anything][:SHOWN]:
        width = f"{cut.width} → {cut.halved}"
        table.add_row(cut.axes[0], width, f"{1e3 * cut.seconds:.3g}", f"{100 * cut.time:.1f} %", f"{100 * cut.macs:.1f} %")
    console.print(table)
    nothing = [cut.axes[0] for cut in found.buys if not cut.anything]
    if nothing:
        more = f" and {len(nothing) - SHOWN} more" if len(nothing) > SHOWN else ""
        console.print(f"These cuts buy no time worth speaking of: {', '.join(nothing[:SHOWN])}{more}.", markup=False)


def _listed(flag: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise CoppiceError(f"{flag} {text}: write numbers with commas between them") from None


def _print(found: Measurement) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "runtime", box=None, header_style="bold")
    for column in ("threads", "batch", "p50 ms", "p90", "p99", "samples/s", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for t in found.timings:
        times = [f"{1e3 * seconds:.3g}" for seconds in (t.p50, t.p90, t.p99)]
        memory = "" if t.memory is None else f"{t.memory / 1e6:.0f} MB"
        place = [t.setting.runtime, str(t.setting.threads), str(t.setting.batch)]
        table.add_row(t.model, *place, *times, f"{t.throughput:,.0f}", memory)
    Console(highlight=False).print(table)
    for c in found.comparisons:
        typer.echo(f"{c.model} ({c.setting}): {c}")
    disturbed = sum(t.disturbed for t in found.timings)
    if disturbed:
        typer.echo(f"{disturbed} runs were not counted: other programs took the core while they ran.")
