"""What `coppice inspect --modules` shows: the modules that can go, and what each would save."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from coppice.coupling import Coupling
    from coppice.removals import Removable


def show(coupling: Coupling, model: str, as_json: bool) -> None:
    """Print every candidate, in the order of the forward pass."""
    from coppice.modules import removable

    found, total = removable(coupling), coupling.cost()
    if as_json:
        rows = [{"name": c.name, "kind": c.kind, "macs": c.macs, "params": c.params, "edits": [e.path for e in c.edits]} for c in found]
        typer.echo(json.dumps({"model": model, "macs": total.macs, "params": total.params, "modules": rows}, indent=1))
    else:
        _print(found, total.macs, total.params)


def _print(found: list[Removable], macs: int, params: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from coppice.removals import KINDS

    table = Table(box=None, header_style="bold")
    table.add_column("module", overflow="fold")
    for column in ("kind", "MACs", "params"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for candidate in found:
        shares = [f"{100 * part / max(whole, 1):.1f} %" for part, whole in ((candidate.macs, macs), (candidate.params, params))]
        table.add_row(candidate.name, candidate.kind, *shares)
    console = Console(highlight=False)
    console.print(table)
    for kind in dict.fromkeys(candidate.kind for candidate in found):
        console.print(f"{kind}: {KINDS[kind]}", markup=False)
    console.print(f"{len(found)} modules can go, each by itself; shares are of what the whole model has.", markup=False)
