"""How every picture is drawn: plain axes in four colours, as an element of a page that follows its theme, or as a file of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coppice.errors import CoppiceError
from coppice.targets import humanise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED_ROWS = 48  # rows of more axes than this are drawn without their names
_DPI = 160


class Palette(NamedTuple):
    """The colours of a picture."""

    ink: str
    muted: str
    accent: str
    warn: str


# Stand-ins drawn by matplotlib, replaced by the page's own colours so that the pictures follow the light or dark theme.
PAGE = Palette("#010203", "#040506", "#070809", "#0a0b0c")
_CSS = Palette("currentColor", "var(--line)", "var(--accent)", "var(--warn)")
PAPER = Palette("#1c2321", "#b9c1ba", "#2f7d4f", "#b4531f")  # for files of their own, on white


def check_renderer() -> None:
    """Raise CoppiceError if a package that draws is missing: to be asked before a long run, not after it."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CoppiceError(f"pages and pictures need {error.name}: pip install 'coppice[cli]'") from None


def page(template: str, pictures: Mapping[str, str], **values: Any) -> str:
    """A page from one of the templates beside this file; `pictures` are <svg> elements, everything else is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("coppice", "."), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": humanise, "count": lambda n: f"{n:,}".replace(",", "\u2009")}
    safe = {name: jinja2.utils.markupsafe.Markup(svg) for name, svg in pictures.items()}  # type: ignore[attr-defined]
    return environment.get_template(template).render(pictures=safe, **values)


def figure(width: float, height: float, panels: int = 1, palette: Palette = PAGE) -> tuple[Figure, list[Any]]:
    """A figure of `panels` side by side, with nothing in them yet."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    drawn.patch.set_alpha(0)
    found = list(drawn.subplots(1, panels, squeeze=False)[0])
    for axes in found:
        axes.patch.set_alpha(0)
        axes.tick_params(which="both", colors=palette.ink, length=0, labelsize=9)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(palette.muted)
    return drawn, found


def legend(axes: Any, palette: Palette = PAGE) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=palette.ink, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)


def inline(drawn: Figure, name: str, label: str) -> str:
    """A figure drawn in `PAGE` as an <svg> element: text stays text, ids are made unique to the page, colours become the page's."""
    svg = _svg(drawn, name)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)
    for stand_in, css in zip(PAGE, _CSS, strict=True):
        svg = svg.replace(stand_in, css)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def save(drawn: Figure, path: Path) -> None:
    """A figure drawn in `PAPER` as a .svg or .png file."""
    drawn.patch.set(facecolor="white", alpha=1)
    if path.suffix == ".svg":
        path.write_text(_svg(drawn, "picture"), encoding="utf-8")
    else:
        drawn.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def _svg(drawn: Figure, name: str) -> str:
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        drawn.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return stream.getvalue()
