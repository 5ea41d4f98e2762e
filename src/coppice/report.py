"""report.html: one static file that says what was cut, what it cost, and why the rest could not be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coppice.pictures import NAMED_ROWS, PAGE, figure, inline, legend, page
from coppice.targets import humanise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYERS = 32  # layers drawn: the slowest ones
_CLASSES = 24  # classes drawn: the most damaged ones


@dataclass(frozen=True)
class AxisWidth:
    """A prunable axis before and after."""

    name: str
    before: int
    after: int


def render_report(
    *, title: str, metrics: Mapping[str, Any], widths: Sequence[AxisWidth], pins: Mapping[str, Sequence[str]], config: str
) -> str:
    """The page. `metrics` as in metrics.json, `pins` maps a reason to the names pinned for it, `config` is the text of config.toml."""
    pictures = {
        "widths": inline(_widths_picture(widths), "widths", "Width of every prunable axis before and after"),
        "steps": inline(_steps_picture(metrics), "steps", "Validation top-1 against MACs over the steps of the loop"),
        "epochs": inline(_epochs_picture(metrics), "epochs", "Training loss and validation top-1 epoch by epoch"),
        "classes": inline(_classes_picture(metrics), "classes", "Change of test accuracy by class"),
    }
    if metrics["latency"]:
        if "layers" in metrics["latency"]:
            pictures["latency"] = inline(
                _layers_picture(metrics["latency"]["layers"]), "latency", "Milliseconds of each layer, before and after"
            )
        pictures["pareto"] = inline(_pareto_picture(metrics), "pareto", "Validation top-1 against milliseconds over the steps of the loop")
    return page(
        "report.html.j2", pictures, title=title, m=metrics, rows=table_rows(metrics), widths=widths, pins=_sorted_pins(pins), config=config,
        untouched=sum(w.before == w.after for w in widths),
    )  # fmt: skip


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The before/after table: what, dense, pruned, change."""
    dense, pruned = metrics["dense"], metrics["pruned"]
    rows = [_accuracy_row("top-1, test", dense, pruned, "top1"), _accuracy_row("top-5, test", dense, pruned, "top5")]
    rows += [_accuracy_row("top-1, validation", dense["val"], pruned["val"], "top1")]
    for key, label in (("macs", "MACs"), ("params", "parameters"), ("bytes", "bytes"), ("latency", "latency")):
        if key not in dense:
            continue
        ratio = pruned[key] / (dense[key] or 1)
        rows.append((label, humanise(dense[key], key), humanise(pruned[key], key), f"× {ratio:.3f}"))
    if metrics["masks"]:
        rows += _mask_rows(metrics["masks"], dense["bytes"], dense["macs"])
    if metrics["int8"]:
        rows.append(_accuracy_row("top-1, test, INT8", dense, metrics["int8"], "top1"))
        small = metrics["int8"]["bytes"]
        rows.append(("INT8 file", humanise(dense["bytes"], "bytes"), humanise(small, "bytes"), f"× {small / dense['bytes']:.3f}"))
    return rows


def _mask_rows(masks: Mapping[str, Any], dense_bytes: float, dense_macs: float) -> list[tuple[str, str, str, str]]:
    """What zeros come to: the share of them, the file, and the MACs that would be left if a runtime skipped them."""
    small, left = masks["file_bytes"], masks["macs"]
    return [
        ("zero weights", "", f"{100 * masks['share']:.1f} %", f"of {humanise(masks['weights'], 'params')}"),
        ("sparse file", humanise(dense_bytes, "bytes"), humanise(small, "bytes"), f"× {small / dense_bytes:.3f}"),
        ("MACs in theory", humanise(dense_macs, "macs"), humanise(left, "macs"), f"× {left / dense_macs:.3f}"),
    ]


def _accuracy_row(label: str, dense: Mapping[str, Any], pruned: Mapping[str, Any], key: str) -> tuple[str, str, str, str]:
    return label, f"{dense[key]:.2f} %", f"{pruned[key]:.2f} %", _points(pruned[key] - dense[key])


def _points(change: float) -> str:
    return f"{change:+.2f} points".replace("-", "−")


def _sorted_pins(pins: Mapping[str, Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    return sorted(pins.items(), key=lambda item: (-len(item[1]), item[0]))


def _widths_picture(widths: Sequence[AxisWidth]) -> Figure:
    named = len(widths) <= NAMED_ROWS
    positions = range(len(widths))
    drawn, (axes,) = figure(8, 0.9 + 0.24 * len(widths) if named else 3.2)
    before, after = [w.before for w in widths], [w.after for w in widths]
    draw, thickness = (axes.barh, "height") if named else (axes.bar, "width")
    draw(positions, before, color=PAGE.muted, label="before", **{thickness: 0.8})
    draw(positions, after, color=PAGE.accent, label="after", **{thickness: 0.5})
    if named:
        axes.set_yticks(positions, [w.name for w in widths])
        axes.invert_yaxis()
        axes.set_xlabel("channels", color=PAGE.ink)
        for position, width in zip(positions, widths, strict=True):
            axes.text(width.before, position, f" {width.after} of {width.before}", va="center", fontsize=8, color=PAGE.ink)
        axes.margins(x=0.14, y=0.01)
    else:
        axes.set_xlabel("axes, in the order of the network", color=PAGE.ink)
        axes.set_ylabel("channels", color=PAGE.ink)
        axes.margins(x=0.01)
    legend(axes)
    return drawn


def _steps_picture(metrics: Mapping[str, Any]) -> Figure:
    drawn, (axes,) = figure(8, 3.6)
    history = metrics["history"]
    fraction = [step["macs"] / max(metrics["dense"]["macs"], 1) for step in history]
    accuracy = [step["val_top1"] for step in history]
    axes.plot(fraction, accuracy, color=PAGE.muted, linewidth=1.2, zorder=1)
    axes.scatter(fraction, accuracy, color=PAGE.accent, s=36, zorder=2)
    stages = [str(step["stage"]) for step in history]
    for place in dict.fromkeys(zip(fraction, accuracy, strict=True)):  # several steps may lie on one point: a training that was not taken
        here = [name for name, x, y in zip(stages, fraction, accuracy, strict=True) if (x, y) == place]
        axes.annotate(", ".join(here), place, textcoords="offset points", xytext=(6, 5), fontsize=8, color=PAGE.ink)
    if metrics["target"].get("max_drop") is not None:
        floor = metrics["dense"]["val"]["top1"] - metrics["target"]["max_drop"]
        axes.axhline(floor, color=PAGE.warn, linewidth=1, linestyle="--")
        axes.annotate("floor", (1, floor), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color=PAGE.warn)
    axes.set_xlabel("MACs, as a fraction of the dense model", color=PAGE.ink)
    axes.set_ylabel("top-1 on validation, %", color=PAGE.ink)
    axes.margins(x=0.12, y=0.15)
    return drawn


def _layers_picture(layers: Sequence[tuple[str, float, float]]) -> Figure:
    """The layers that took most of the time, before and after."""
    shown = sorted(layers, key=lambda layer: -layer[1])[:_LAYERS]
    drawn, (axes,) = figure(8, 0.9 + 0.24 * len(shown))
    positions = range(len(shown))
    axes.barh(positions, [1e3 * before for _, before, _ in shown], height=0.8, color=PAGE.muted, label="before")
    axes.barh(positions, [1e3 * after for _, _, after in shown], height=0.5, color=PAGE.accent, label="after")
    axes.set_yticks(positions, [name for name, _, _ in shown])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds", color=PAGE.ink)
    axes.margins(x=0.02, y=0.01)
    legend(axes)
    return drawn


def _pareto_picture(metrics: Mapping[str, Any]) -> Figure:
    drawn, (axes,) = figure(8, 3.2)
    steps = [step for step in metrics["history"] if "latency" in step]
    axes.scatter([1e3 * step["latency"] for step in steps], [step["val_top1"] for step in steps], color=PAGE.accent, s=36)
    for step in steps:
        place = (1e3 * step["latency"], step["val_top1"])
        axes.annotate(step["stage"], place, textcoords="offset points", xytext=(6, 5), fontsize=8, color=PAGE.ink)
    axes.set_xlabel("milliseconds", color=PAGE.ink)
    axes.set_ylabel("top-1 on validation, %", color=PAGE.ink)
    axes.margins(x=0.12, y=0.15)
    return drawn


def _epochs_picture(metrics: Mapping[str, Any]) -> Figure:
    """Every epoch of every fine-tuning, one after the other: the loss trained on, and the accuracy that it led to."""
    drawn, panels = figure(8, 2.8, 2)
    began = 0
    for step in metrics["history"]:
        results = step["training"]
        epochs = [began + result["epoch"] for result in results]
        for axes, key, colour in zip(panels, ("train_loss", "val_top1"), (PAGE.warn, PAGE.accent), strict=True):
            axes.plot(epochs, [result[key] for result in results], color=colour, marker="o", markersize=3.5, linewidth=1.4)
            if began and results:
                axes.axvline(began + 0.5, color=PAGE.muted, linewidth=1)
        began += len(results)
    for axes, label in zip(panels, ("training loss", "top-1 on validation, %"), strict=True):
        axes.set_xlabel("epoch", color=PAGE.ink)
        axes.set_ylabel(label, color=PAGE.ink)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.05, y=0.12)
    return drawn


def _classes_picture(metrics: Mapping[str, Any]) -> Figure:
    pairs = zip(metrics["classes"], metrics["dense"]["per_class"], metrics["pruned"]["per_class"], strict=True)
    known = [(name, before, after) for name, before, after in pairs if before is not None and after is not None]  # None: no test image
    changes = sorted((after - before, str(name)) for name, before, after in known)[:_CLASSES]
    drawn, (axes,) = figure(8, 0.9 + 0.24 * len(changes))
    values = [change for change, _ in changes]
    axes.barh(range(len(changes)), values, height=0.6, color=[PAGE.warn if value < 0 else PAGE.accent for value in values])
    axes.set_yticks(range(len(changes)), [name for _, name in changes])
    axes.invert_yaxis()
    axes.axvline(0, color=PAGE.muted, linewidth=1)
    axes.set_xlabel("change of accuracy on the test split, points", color=PAGE.ink)
    return drawn
