"""What `coppice sensitivity` shows: one picture, a row an axis, as a file of its own or in a page with the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.curves import Curve, Point, Sensitivity
from coppice.errors import CoppiceError
from coppice.pictures import PAGE, PAPER, Palette, figure, inline, page, save
from coppice.run import check_new_file, replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".svg", ".png")
_LEAST = 1e-6  # divergences below are drawn as this: the axis is logarithmic


def check_out(path: Path) -> None:
    """Raise CoppiceError unless a picture can be written to `path`: to be asked before the work."""
    if path.suffix not in SUFFIXES:
        raise CoppiceError(f"--out {path}: name a file that ends in {', '.join(SUFFIXES)}")
    check_new_file(path)


def write(found: Sensitivity, path: Path, title: str) -> None:
    """The page or the picture, whole or not at all."""
    if path.suffix == ".html":
        write_text(path, render(found, title))
        return
    with replacing(path) as temporary:
        save(picture(found, PAPER), temporary)


def render(found: Sensitivity, title: str) -> str:
    svg = inline(picture(found, PAGE), "sensitivity", "What each axis alone loses and saves at several widths")
    return page("sensitivity.html.j2", {"curves": svg}, title=title, found=found, cells=[cells(curve) for curve in found.curves])


def cells(curve: Curve) -> list[str]:
    """A cell of the table for each point."""
    return [cell(point) for point in curve.points]


def cell(point: Point) -> str:
    """`24: 0.027, −0.2`: the width, the divergence, and the change of top-1 in points."""
    change = "" if point.top1 is None else f", {point.top1:+.1f}".replace("-", "−")
    return f"{point.width}: {point.loss:.2g}{change}"


def picture(found: Sensitivity, palette: Palette) -> Figure:
    """A row an axis, those first that give most: divergence, change of top-1 where it is known, and MACs saved."""
    labelled = found.top1 is not None
    drawn, panels = figure(10 if labelled else 8, 1.1 + 0.27 * len(found.curves), 3 if labelled else 2, palette)
    for axes in panels:
        axes.set_yticks(range(len(found.curves)), [curve.axis for curve in found.curves] if axes is panels[0] else [])
        axes.set_ylim(len(found.curves) - 0.4, -0.6)
        axes.grid(axis="y", color=palette.muted, linewidth=0.3)
    _dots(panels[0], found, palette, [[max(p.loss, _LEAST) for p in curve.points] for curve in found.curves])
    for row, point in ((row, point) for row, curve in enumerate(found.curves) for point in curve.points):
        place = (max(point.loss, _LEAST), row)
        panels[0].annotate(str(point.width), place, textcoords="offset points", xytext=(0, 4), fontsize=6.5, ha="center", color=palette.ink)
    panels[0].set_xscale("log")
    panels[0].axvline(max(found.limit, _LEAST), color=palette.warn, linewidth=1, linestyle="--")
    panels[0].set_xlabel("divergence from the dense outputs", color=palette.ink)
    if labelled:
        _dots(panels[1], found, palette, [[p.top1 or 0.0 for p in curve.points] for curve in found.curves])
        panels[1].axvline(0, color=palette.muted, linewidth=1)
        panels[1].set_xlabel("change of top-1, points", color=palette.ink)
    _bars(panels[-1], found, palette)
    return drawn


def _dots(axes: Any, found: Sensitivity, palette: Palette, values: list[list[float]]) -> None:
    """Each width as a dot; those within the limit are filled."""
    for row, (curve, places) in enumerate(zip(found.curves, values, strict=True)):
        axes.plot(places, [row] * len(places), color=palette.muted, linewidth=1.2, zorder=1)
        inside = [palette.accent if point.loss <= found.limit else "none" for point in curve.points]
        axes.scatter(places, [row] * len(places), s=26, facecolors=inside, edgecolors=palette.accent, zorder=2)
    axes.margins(x=0.08)


def _bars(axes: Any, found: Sensitivity, palette: Palette) -> None:
    rows = range(len(found.curves))
    axes.barh(rows, [100 * max(p.saved for p in curve.points) for curve in found.curves], height=0.7, color=palette.muted)
    axes.barh(rows, [100 * curve.gives(found.limit) for curve in found.curves], height=0.4, color=palette.accent)
    axes.set_xlabel("MACs saved, % of the model's", color=palette.ink)
