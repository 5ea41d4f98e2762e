"""report.html: one static file that says what was cut, what it cost, and why the rest could not be cut."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coppice.errors import CoppiceError
from coppice.targets import humanise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stand-ins drawn by matplotlib, replaced by the page's own colours so that the pictures follow the light or dark theme.
_INK, _MUTED, _ACCENT, _WARN = "#010203", "#040506", "#070809", "#0a0b0c"
_CSS = {_INK: "currentColor", _MUTED: "var(--line)", _ACCENT: "var(--accent)", _WARN: "var(--warn)"}
_NAMED_BARS = 48  # more axes than this are drawn without their names
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
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("coppice", "."), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": humanise, "count": lambda n: f"{n:,}".replace(",", "\u2009")}
    pictures = {
        "widths": _inline(_widths_picture(widths), "widths", "Width of every prunable axis before and after"),
        "steps": _inline(_steps_picture(metrics), "steps", "Validation top-1 against MACs over the steps of the loop"),
        "classes": _inline(_classes_picture(metrics), "classes", "Change of test accuracy by class"),
    }
    return environment.get_template("report.html.j2").render(
        title=title, m=metrics, rows=table_rows(metrics), widths=widths, pins=_sorted_pins(pins), config=config,
        pictures={name: jinja2.utils.markupsafe.Markup(svg) for name, svg in pictures.items()},  # type: ignore[attr-defined]
        untouched=sum(w.before == w.after for w in widths),
    )  # fmt: skip


def check_renderer() -> None:
    """Raise CoppiceError if a package that draws the report is missing: to be asked before a long run, not after it."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CoppiceError(f"the report needs {error.name}: pip install 'coppice[cli]'") from None


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The before/after table: what, dense, pruned, change."""
    dense, pruned = metrics["dense"], metrics["pruned"]
    rows = [_accuracy_row("top-1, test", dense, pruned, "top1"), _accuracy_row("top-5, test", dense, pruned, "top5")]
    rows += [_accuracy_row("top-1, validation", dense["val"], pruned["val"], "top1")]
    for key, label in (("macs", "MACs"), ("params", "parameters"), ("bytes", "bytes")):
        ratio = pruned[key] / max(dense[key], 1)
        rows.append((label, humanise(dense[key], key), humanise(pruned[key], key), f"× {ratio:.3f}"))
    return rows


def _accuracy_row(label: str, dense: Mapping[str, Any], pruned: Mapping[str, Any], key: str) -> tuple[str, str, str, str]:
    return label, f"{dense[key]:.2f} %", f"{pruned[key]:.2f} %", _points(pruned[key] - dense[key])


def _points(change: float) -> str:
    return f"{change:+.2f} points".replace("-", "−")


def _sorted_pins(pins: Mapping[str, Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    return sorted(pins.items(), key=lambda item: (-len(item[1]), item[0]))


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_MUTED)
    return figure, axes


def _widths_picture(widths: Sequence[AxisWidth]) -> Figure:
    named = len(widths) <= _NAMED_BARS
    positions = range(len(widths))
    figure, axes = _figure(8, 0.9 + 0.24 * len(widths) if named else 3.2)
    before, after = [w.before for w in widths], [w.after for w in widths]
    draw, thickness = (axes.barh, "height") if named else (axes.bar, "width")
    draw(positions, before, color=_MUTED, label="before", **{thickness: 0.8})
    draw(positions, after, color=_ACCENT, label="after", **{thickness: 0.5})
    if named:
        axes.set_yticks(positions, [w.name for w in widths])
        axes.invert_yaxis()
        axes.set_xlabel("channels", color=_INK)
        for position, width in zip(positions, widths, strict=True):
            axes.text(width.before, position, f" {width.after} of {width.before}", va="center", fontsize=8, color=_INK)
        axes.margins(x=0.14, y=0.01)
    else:
        axes.set_xlabel("axes, in the order of the network", color=_INK)
        axes.set_ylabel("channels", color=_INK)
        axes.margins(x=0.01)
    _legend(axes)
    return figure


def _steps_picture(metrics: Mapping[str, Any]) -> Figure:
    figure, axes = _figure(8, 3.6)
    history = metrics["history"]
    fraction = [step["macs"] / max(metrics["dense"]["macs"], 1) for step in history]
    accuracy = [step["val_top1"] for step in history]
    axes.plot(fraction, accuracy, color=_MUTED, linewidth=1.2, zorder=1)
    axes.scatter(fraction, accuracy, color=_ACCENT, s=36, zorder=2)
    for x, y, step in zip(fraction, accuracy, history, strict=True):
        axes.annotate(step["stage"], (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8, color=_INK)
    if metrics["target"].get("max_drop") is not None:
        floor = metrics["dense"]["val"]["top1"] - metrics["target"]["max_drop"]
        axes.axhline(floor, color=_WARN, linewidth=1, linestyle="--")
        axes.annotate("floor", (1, floor), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color=_WARN)
    axes.set_xlabel("MACs, as a fraction of the dense model", color=_INK)
    axes.set_ylabel("top-1 on validation, %", color=_INK)
    axes.margins(x=0.12, y=0.15)
    return figure


def _classes_picture(metrics: Mapping[str, Any]) -> Figure:
    pairs = zip(metrics["classes"], metrics["dense"]["per_class"], metrics["pruned"]["per_class"], strict=True)
    known = [(name, before, after) for name, before, after in pairs if before is not None and after is not None]  # None: no test image
    changes = sorted((after - before, str(name)) for name, before, after in known)[:_CLASSES]
    figure, axes = _figure(8, 0.9 + 0.24 * len(changes))
    values = [change for change, _ in changes]
    axes.barh(range(len(changes)), values, height=0.6, color=[_WARN if value < 0 else _ACCENT for value in values])
    axes.set_yticks(range(len(changes)), [name for _, name in changes])
    axes.invert_yaxis()
    axes.axvline(0, color=_MUTED, linewidth=1)
    axes.set_xlabel("change of accuracy on the test split, points", color=_INK)
    return figure


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def _inline(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element: text stays text, ids are made unique to the page, colours become the page's."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)
    for stand_in, css in _CSS.items():
        svg = svg.replace(stand_in, css)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
