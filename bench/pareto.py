"""Accuracy against MACs, a panel a model: what `bench/accuracy.py` found, ours beside the peer's best."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from coppice.pictures import PAPER, figure, save

GREY = "#8a938c"


class Point(NamedTuple):
    """One method at one size (asked for: the ``cut``; reached: ``macs``, a share of the dense model's), top-1 and its interval."""

    model: str
    cut: float
    epochs: int
    method: str
    macs: float
    top1: float
    low: float
    high: float


class Family(NamedTuple):
    """Methods drawn alike: all as dots, the best at each size joined, with intervals."""

    label: str
    colour: str
    marker: str


DEFAULT = Family("ours, default", PAPER.accent, "o")
OTHERS = Family("ours, best other criterion", "#79b894", "s")
BARE = Family("ours, default, layers not refitted", "#5b7fa6", "D")
NORMS = Family("Torch-Pruning's best, BatchNorm re-estimated", PAPER.warn, "^")
RAW = Family("Torch-Pruning's best, raw", "#e0a98a", "v")
CONTROL = Family("random, or from scratch: the best", GREY, "x")


def family(method: str) -> Family:
    if method == "ours, obs":
        return DEFAULT
    if method == "ours, obs, layers not refitted":
        return BARE
    if "random" in method or "scratch" in method:
        return CONTROL
    if method.startswith("ours"):
        return OTHERS
    return NORMS if "BatchNorm" in method else RAW


def draw(points: list[Point], path: Path) -> None:
    """An .svg with a row of panels for each number of epochs."""
    panels = sorted({(p.epochs, p.model) for p in points if p.method != "dense"})
    if not panels:
        return
    drawn, found = figure(4.4 * len(panels), 4.2, len(panels), PAPER)
    for axes, (epochs, model) in zip(found, panels, strict=True):
        here = [p for p in points if p.model == model and p.epochs == epochs and p.method != "dense"]
        for kind in (CONTROL, RAW, NORMS, BARE, OTHERS, DEFAULT):
            _family(axes, [p for p in here if family(p.method) == kind], kind)
        for dense in (p for p in points if p.model == model and p.method == "dense"):
            axes.axhline(dense.top1, color=PAPER.ink, linewidth=0.8, linestyle="--")
            axes.annotate("dense", (1, dense.top1), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        trained = f"{epochs} epoch{'s' if epochs > 1 else ''}" if epochs else "no training"
        axes.set_title(f"{model}, {trained}", fontsize=10, color=PAPER.ink)
        axes.set_xlim(min(0.3, *(p.macs - 0.03 for p in here)), 1)
        axes.set_xlabel("MACs, of the dense model's", color=PAPER.ink)
    found[0].set_ylabel("top-1 on test, %", color=PAPER.ink)
    entries = {label: handle for axes in found for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(3, len(entries)), frameon=False, fontsize=8)
    save(drawn, path)


def _family(axes: Any, points: list[Point], kind: Family) -> None:
    if not points:
        return
    axes.scatter([p.macs for p in points], [p.top1 for p in points], s=9, color=kind.colour, alpha=0.45, linewidths=0)
    best = [max((p for p in points if p.cut == cut), key=lambda p: p.top1) for cut in sorted({p.cut for p in points})]
    errors = [[p.top1 - p.low for p in best], [p.high - p.top1 for p in best]]
    axes.errorbar(
        [p.macs for p in best], [p.top1 for p in best], errors, color=kind.colour, marker=kind.marker, markersize=5, capsize=2.5,
        linewidth=1.2, label=kind.label,
    )  # fmt: skip
