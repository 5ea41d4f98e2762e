"""What `coppice inspect --modules` shows: the modules that can go, what each would save, and what would be lost with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from coppice.errors import CoppiceError

if TYPE_CHECKING:
    from torch import nn

    from coppice.config import RunConfig
    from coppice.coupling import Coupling

IMAGES, BATCH = 256, 32  # that a score looks at
ONLY_FULL = 2**31  # no width below this: ops are timed as they are


def scored(network: nn.Module, coupling: Coupling, settings: RunConfig, by: str | None) -> dict[str, float | None]:
    """The score of every candidate on training images of the data."""
    import torch.nn.functional as F

    from coppice.data import load_data, sample_batches
    from coppice.progress import Terminal
    from coppice.torch.module_scores import module_scores

    if not settings.data:
        raise CoppiceError("--score needs images: name the data with --data")
    data = load_data(settings.data, preprocess=settings.preprocess, val_fraction=settings.val_fraction, seed=settings.seed)
    images = sample_batches(data.train, data.preprocess, images=IMAGES, seed=settings.seed, batch_size=BATCH)
    with Terminal().bar("scoring the modules") as advance:
        return module_scores(network, coupling, by or "loss", images, loss=F.cross_entropy, progress=advance)


def timed(network: nn.Module, coupling: Coupling, runtime: str, shape: tuple[int, ...]) -> dict[str, float]:
    """The seconds that each candidate takes of one run, by the ops that go."""
    from coppice.deadline import feasible_prices
    from coppice.depth_search import saved
    from coppice.modules import removable
    from coppice.timing import Setting

    _, predictor = feasible_prices(network, coupling, Setting(runtime, 1, 1), shape, ONLY_FULL)
    return {candidate.name: saved(candidate, coupling, predictor)["latency"] for candidate in removable(coupling)}


def show(coupling: Coupling, model: str, scores: Mapping[str, float | None], times: Mapping[str, float], as_json: bool) -> None:
    """Print every candidate, in the order of the forward pass."""
    from coppice.modules import removable

    total = coupling.cost()
    rows = [
        {"name": c.name, "kind": c.kind, "macs": c.macs, "params": c.params, "edits": [e.path for e in c.edits]}
        | ({"score": scores.get(c.name)} if scores else {})
        | ({"seconds": times[c.name]} if times else {})
        for c in removable(coupling)
    ]
    if as_json:
        typer.echo(json.dumps({"model": model, "macs": total.macs, "params": total.params, "modules": rows}, indent=1))
    else:
        _print(rows, total.macs, total.params)


def _print(rows: list[dict[str, object]], macs: int, params: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from coppice.removals import KINDS

    table = Table(box=None, header_style="bold")
    table.add_column("module", overflow="fold")
    table.add_column("kind")
    extra = [(key, title, scale) for key, title, scale in (("seconds", "ms", 1e3), ("score", "score", 1.0)) if rows and key in rows[0]]
    for column in ("MACs", "params", *(title for _, title, _ in extra)):
        table.add_column(column, justify="right")
    for row in rows:
        shares = [f"{100 * float(str(row[key])) / max(whole, 1):.1f} %" for key, whole in (("macs", macs), ("params", params))]
        more = ["" if row[key] is None else f"{scale * float(str(row[key])):.3g}" for key, _, scale in extra]
        table.add_row(str(row["name"]), str(row["kind"]), *shares, *more)
    console = Console(highlight=False)
    console.print(table)
    for kind in dict.fromkeys(str(row["kind"]) for row in rows):
        console.print(f"{kind}: {KINDS[kind]}", markup=False)
    console.print(f"{len(rows)} modules can go, each by itself; shares are of what the whole model has.", markup=False)
