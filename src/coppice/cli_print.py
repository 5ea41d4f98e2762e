"""What the commands print: tables on the terminal, or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from coppice.coupling import Coupling
    from coppice.curves import Sensitivity
    from coppice.metrics import Metrics
    from coppice.run import Json


def print_metrics(part: str, found: Metrics, names: Sequence[str], as_json: bool) -> None:
    low, high = found.top1_ci95
    if as_json:
        classes = dict(zip(names, found.per_class, strict=True))
        typer.echo(
            json.dumps(
                {
                    "part": part,
                    "images": found.n,
                    "top1": found.top1,
                    "top1_ci95": [low, high],
                    "top5": found.top5,
                    "loss": found.loss,
                    "per_class": classes,
                }
            )
        )
    else:
        typer.echo(
            f"{part}, {found.n} images: top-1 {found.top1:.2f} % (95 %: {low:.2f} - {high:.2f}), "
            f"top-5 {found.top5:.2f} %, loss {found.loss:.4f}"
        )


def show_axes(coupling: Coupling, model: str, shape: Sequence[int], axis: str | None, as_json: bool) -> None:
    from coppice.inspection import inspect_axes

    if axis is not None:
        _print_sites(coupling, axis, as_json)
        return
    found = {"model": model, "input": list(shape), **inspect_axes(coupling)}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print_axes(found)


def _print_axes(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from coppice.targets import humanise

    table = Table(box=None, header_style="bold")
    table.add_column("axis", overflow="fold")  # a name is there to be used
    for column in ("width", "sites", "MACs", "params"):
        table.add_column(column, justify="right")
    table.add_column("pinned, or tied to")
    for axis in found["axes"]:
        shares = [f"{100 * axis[key]:.1f} %" for key in ("macs_share", "params_share")]
        note = axis["pinned"] or ("~ " + ", ".join(axis["tied_to"]) if axis["tied_to"] else "")
        table.add_row(axis["name"], str(axis["width"]), str(len(axis["sites"])), *shares, note, style="dim" if axis["pinned"] else "")
    console = Console(highlight=False)
    console.print(table)
    free = [axis for axis in found["axes"] if not axis["pinned"]]
    totals = (
        f"{humanise(found['macs'], 'macs')} MACs, {humanise(found['params'], 'params')} parameters, {humanise(found['bytes'], 'bytes')}"
    )
    on_free = f"{100 * found['prunable_share']:.1f} % of the parameters lie on an axis that can be cut"
    console.print(f"{len(free)} axes can be cut, {len(found['axes']) - len(free)} are pinned; {on_free}. {totals}.", markup=False)


def print_curves(found: Sensitivity) -> None:
    from rich.console import Console
    from rich.table import Table

    from coppice.curves_report import cells

    most = max(len(curve.points) for curve in found.curves)
    table = Table(box=None, header_style="bold")
    table.add_column("axis", overflow="fold", min_width=20)
    for column in ("width", "gives MACs", *[""] * most):
        table.add_column(column, justify="right")
    for curve in found.curves:
        name = curve.axis + "".join(f" ~ {other}" for other in curve.tied)
        table.add_row(name, str(curve.width), f"{100 * curve.gives(found.limit):.1f} %", *cells(curve))
    console = Console(highlight=False)
    console.print(table)
    cell = "width that stays: divergence from the dense outputs" + (", points of top-1" if found.top1 is not None else "")
    dense = f" (dense top-1 {found.top1:.2f} %)" if found.top1 is not None else ""
    console.print(f"{cell}, on {found.images} images{dense}.", markup=False)
    console.print(f"gives MACs: what the axis alone saves of all MACs at a divergence of at most {found.limit:.3g}.", markup=False)


def _print_sites(coupling: Coupling, name: str, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from coppice.inspection import inspect_axis

    axis = coupling.axis(name)
    rows = inspect_axis(coupling, axis)
    if as_json:
        keys = ("tensor", "kind", "dim", "made_of")
        typer.echo(
            json.dumps({"axis": axis.name, "width": axis.width, "sites": [dict(zip(keys, row, strict=True)) for row in rows]}, indent=1)
        )
        return
    table = Table("tensor", "kind", "dim", "made of", box=None, header_style="bold")
    for tensor, kind, dim, made_of in rows:
        table.add_row(tensor, kind, str(dim), made_of.replace("[", "\\["))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{axis.name}: {axis.width} wide, {len(rows)} sites. {axis.pinned or 'It can be cut.'}", markup=False)


def print_result(metrics: Json) -> None:
    from rich.console import Console
    from rich.table import Table

    from coppice.report import table_rows

    table = Table("", box=None, header_style="bold")
    for column in ("dense", "pruned", "change"):
        table.add_column(column, justify="right")
    for row in table_rows(metrics):
        table.add_row(*row)
    Console(highlight=False).print(table)
