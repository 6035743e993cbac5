"""Figures of a report as inline SVG. They are drawn in names of colours, which the page gives values for light and dark.

A figure is 360 units wide, which is a column of the page on a telephone; text is text, so that it can be read, searched and copied.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from svdbank.reporting.document import visible
from svdbank.reporting.figures import load_matplotlib

WIDTH = 5.0
#: Levels of a ramp of colours.
LEVELS = 9
#: Series that can be told apart by colour, dash and marker together.
SERIES = 8

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
#: matplotlib draws in these; the page's variables take their place. Two digits for the kind, two for the number.
_KINDS = {"ink": 1, "muted": 2, "grid": 3, "card": 4, "s": 5, "q": 6, "d": 7, "l": 8}
_NAMES = {number: name for name, number in _KINDS.items()}
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))


@dataclass(frozen=True)
class Line:
    """A series of (x, y). ``tint`` from 0 to 1 makes it one of many of a ramp; else it has the colour and marks of its ``number``."""

    name: str
    points: Sequence[tuple[float, float]]
    number: int = 0
    tint: float | None = None


@dataclass(frozen=True)
class ColourScale:
    """Values ``low`` to ``high`` on a ramp of colours; ``diverging`` ones have their middle between. ``label`` says what they are."""

    low: float
    high: float
    label: str
    diverging: bool = False
    exponents: bool = False


def colour(name: str, number: int = 0) -> str:
    """What to draw in so that the page's variable ``--name`` or ``--name<number>`` shows."""
    return f"#{_KINDS[name]:02x}{number:02x}fe"


def line_chart(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    limits: tuple[float, float] | None = None,
    legend: bool = True,
    whole_x: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    zero: bool = False,
) -> str:
    """Lines in one frame. ``marks`` are vertical ones with a word beside them; ``whole_x`` has ticks at integers alone."""
    with _drawn(2.9) as (figure, axes):
        for line in lines:
            xs, ys = zip(*line.points, strict=True) if line.points else ((), ())
            if line.tint is not None:
                axes.plot(xs, ys, color=colour("l", round(line.tint * (LEVELS - 1))), linewidth=1.1)
                continue
            number = line.number % SERIES
            few = len(xs) <= 40
            axes.plot(
                xs,
                ys,
                color=colour("s", number),
                linestyle=_DASHES[number],
                marker=_MARKERS[number] if few else None,
                markersize=4,
                linewidth=1.5,
                label=visible(line.name),
            )
        if log_x:
            axes.set_xscale("log", base=2)
            _powers_of_two(axes.xaxis)
        if log_y:
            axes.set_yscale("log")
        if limits is not None:
            axes.set_ylim(*limits)
        if log_y:
            axes.yaxis.set_major_formatter(_power)
            _no_minor_ticks(axes.yaxis)
        if zero:
            axes.axhline(0, color=colour("muted"), linewidth=0.8)
        if whole_x:
            _whole(axes.xaxis)
        for at, word in marks:
            axes.axvline(at, color=colour("muted"), linewidth=1, linestyle=":")
            axes.annotate(
                word, (at, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points", ha="center"
            )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        named = [line for line in lines if line.tint is None]
        if legend and named and any(line.name for line in named):
            figure.legend(loc="outside upper left", ncols=min(3, len(named)), frameon=False, handlelength=2.4, columnspacing=1)
        return _svg(figure)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    scale: ColourScale,
    *,
    across: str,
    apart: bool = False,
) -> str:
    """Cells coloured by value; what is None stays empty. ``apart`` sets the first column off, as that of a sum."""
    load_matplotlib()
    import numpy as np
    from matplotlib.colors import BoundaryNorm, ListedColormap

    kind = "d" if scale.diverging else "q"
    span = scale.high - scale.low or 1.0
    bounds = [scale.low + span * i / LEVELS for i in range(LEVELS + 1)]
    colours = ListedColormap([colour(kind, i) for i in range(LEVELS)])
    with _drawn(1.15 + 0.2 * max(len(rows), 2)) as (figure, axes):
        grid = [[math.nan if value is None else min(max(value, scale.low), scale.high) for value in row] for row in values]
        shown = axes.pcolormesh(
            np.ma.masked_invalid(np.array(grid, dtype=float)),
            cmap=colours,
            norm=BoundaryNorm(bounds, LEVELS),
            edgecolor=colour("card"),
            linewidth=0.4 if len(columns) <= 48 else 0.0,
        )
        shown.set_clip_on(False)  # what would be cut off is not there, and each cell would say so
        axes.invert_yaxis()
        axes.grid(False)
        axes.tick_params(length=0)
        step = max(1, math.ceil(len(columns) / 14))
        places = list(range(0, len(columns), step))
        axes.set_xticks([i + 0.5 for i in places], [visible(columns[i]) for i in places])
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [visible(row) for row in rows])
        if apart:
            axes.axvline(1, color=colour("ink"), linewidth=1.2)
        axes.set_xlabel(across)
        bar = figure.colorbar(shown, label=scale.label, orientation="horizontal", aspect=40, pad=0.04, spacing="proportional")
        bar.set_ticks([bounds[0], bounds[3], bounds[6], bounds[9]])
        bar.ax.set_xticklabels(
            [
                _power(b) if scale.exponents else f"{b:.2g}".replace("-", "−")
                for b in (bounds[0], bounds[3], bounds[6], bounds[9])
            ]
        )
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
        return _svg(figure)


def bar_chart(labels: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]], *, x: str, texts: Sequence[str] = ()) -> str:
    """Horizontal bars of parts put side by side, each with a text at its end."""
    with _drawn(0.95 + 0.26 * max(len(labels), 2)) as (figure, axes):
        left = [0.0] * len(labels)
        places = range(len(labels))
        for number, (name, values) in enumerate(parts):
            axes.barh(places, values, left=left, height=0.66, color=colour("s", number), edgecolor=colour("card"), label=name)
            left = [one + more for one, more in zip(left, values, strict=True)]
        for place, end, text in zip(places, left, texts, strict=False):
            axes.annotate(text, (end, place), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(places, [visible(label) for label in labels])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, (max(left, default=0.0) or 1.0) * (1.22 if texts else 1.02))
        axes.set_xlabel(x)
        if len(parts) > 1:
            figure.legend(loc="outside upper left", ncols=len(parts), frameon=False, columnspacing=1)
        return _svg(figure)


def dot_chart(
    labels: Sequence[str], values: Sequence[float], errors: Sequence[float | None], *, x: str, numbers: Sequence[int] = ()
) -> str:
    """A dot a row with a bar of two standard errors each way, and a line at 0."""
    with _drawn(0.8 + 0.26 * max(len(labels), 2)) as (figure, axes):
        axes.axvline(0, color=colour("muted"), linewidth=1)
        for place, (value, error) in enumerate(zip(values, errors, strict=True)):
            number = (numbers[place] if numbers else 0) % SERIES
            tint = colour("s", number)
            if error is not None and error == error:
                axes.plot([value - 2 * error, value + 2 * error], [place, place], color=tint, linewidth=2)
            axes.plot([value], [place], marker=_MARKERS[number], color=tint, markersize=6, linestyle="none")
        axes.set_yticks(range(len(labels)), [visible(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(x)
        return _svg(figure)


def span_chart(labels: Sequence[str], spans: Sequence[Sequence[tuple[int, int, float]]], *, x: str) -> str:
    """Rows of spans (start, stop, weight from 0 to 1) on an axis of whole numbers; the heavier, the stronger the colour."""
    with _drawn(0.9 + 0.28 * max(len(labels), 2)) as (figure, axes):
        for place, row in enumerate(spans):
            for start, stop, weight in row:
                level = 2 + round(weight * 4)
                axes.barh(
                    place,
                    stop - start,
                    left=start,
                    height=0.62,
                    color=colour("q", level),
                    edgecolor=colour("ink"),
                    linewidth=0.6,
                )
        axes.set_yticks(range(len(labels)), [visible(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, max((stop for row in spans for _, stop, _ in row), default=1))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        _whole(axes.xaxis)
        axes.set_xlabel(x)
        return _svg(figure)


@contextmanager
def _drawn(height: float) -> Iterator[tuple[Any, Any]]:
    matplotlib = load_matplotlib()
    from matplotlib.figure import Figure

    ink, muted = colour("ink"), colour("muted")
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "svdbank",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "axes.labelsize": 10,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "legend.fontsize": 9.5,
        "text.color": ink,
        "axes.labelcolor": ink,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "axes.edgecolor": muted,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colour("grid"),
        "grid.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.labelcolor": ink,
        "figure.constrained_layout.h_pad": 0.05,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts have it
        figure = Figure(figsize=(WIDTH, min(height, 14)), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    """What matplotlib draws, without its own header and names, in the page's colours; hidden from screen readers, who get the table."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    # Not savefig, which lays out and draws twice.
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(buffer.getvalue())
    for element in list(root):
        if element.tag == f"{{{_SVG}}}metadata":
            root.remove(element)
    used = {name for element in root.iter() for value in element.attrib.values() for name in _references(value)}
    prefix = f"f{hashlib.sha256(buffer.getvalue()).hexdigest()[:10]}-"  # many figures share a page
    for element in root.iter():
        if "id" in element.attrib:
            own = element.attrib.pop("id")
            if own in used:
                element.set("id", prefix + own)
        for key, value in list(element.attrib.items()):
            if key == _XLINK:
                del element.attrib[key]
                element.set("href", f"#{prefix}{value[1:]}")
            elif key == "transform" and value.startswith("rotate(-0 "):
                del element.attrib[key]
            elif key != "id":
                shorter = _LONG.sub(_two_decimals, value) if key in ("d", "x", "y", "transform") else value.replace(_FONT, "")
                element.set(key, _COLOUR.sub(_variable, _URL.sub(rf"url(#{prefix}\1)", shorter)))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    text = re.sub(r"\s*\n\s*", "\n", ElementTree.tostring(root, encoding="unicode"))
    return re.sub(r"(<g />\n?)+", "", text)


#: The page says which font; hundredths of a unit are below what a screen shows.
_FONT = "font-family: 'DejaVu Sans', sans-serif; "
_LONG = re.compile(r"-?\d+\.\d{3,}")
_URL = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile(r"#0([1-8])0([0-9a-f])fe")


def _two_decimals(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}"


def _references(value: str) -> list[str]:
    return [value[1:]] if value.startswith("#") else _URL.findall(value)


def _variable(found: re.Match[str]) -> str:
    name = _NAMES[int(found[1])]
    return f"var(--{name}{int(found[2], 16)})" if len(name) == 1 else f"var(--{name})"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(value: float, _: object = None) -> str:
    """10⁻³ for a power of ten."""
    if value <= 0:
        return "0"
    exponent = math.log10(value)
    if abs(exponent - round(exponent)) > 1e-6:
        return f"{value:.0e}" if value < 0.01 or value >= 1000 else f"{value:.2g}"
    return f"{value:g}" if -3 < exponent < 4 else "10" + str(round(exponent)).translate(_RAISED)


def _powers_of_two(axis: Any) -> None:
    low, high = axis.get_view_interval()
    ticks = [1 << power for power in range(40) if low <= 1 << power <= high]
    ticks = ticks[:: max(1, math.ceil(len(ticks) / 8))]
    axis.set_ticks(ticks, [str(tick) for tick in ticks])
    _no_minor_ticks(axis)


def _no_minor_ticks(axis: Any) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_minor_locator(NullLocator())


def _whole(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
