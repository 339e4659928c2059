"""Figures as panels of SVG, whose series have names and whose points have their values.

The data, the limits and the ticks are those of the matplotlib figure; nothing is laid out, so that
this takes milliseconds. The name of a series is the label of its artists. A leading underscore
keeps a label out of matplotlib's legend, and what follows " · " says what else of the series is
drawn: `_dpo · raw`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

WIDTH, HEIGHT = 460, 270  # units of a panel
LEFT, RIGHT, TOP, BOTTOM = 56, 438, 8, 244  # the box of its data
MAX_POINTS = 600  # of a line; longer ones keep the lowest and the highest of each stretch

DASHES = {"-": "", "--": "7 4", ":": "2 4", "-.": "8 4 2 4"}
MARKERS = {  # paths around (0, 0)
    ".": "m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0",
    "o": "m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0",
    "s": "m-3-3h6v6h-6z",
    "^": "m0-3.8l3.6 6.4h-7.2z",
    "v": "m0 3.8l3.6-6.4h-7.2z",
    "D": "m0-4l4 4l-4 4l-4-4z",
    "P": "m-1.3-3.8h2.6v2.5h2.5v2.6h-2.5v2.5h-2.6v-2.5h-2.5v-2.6h2.5z",
    "x": "m-3-3l6 6m0-6l-6 6",
}
OPEN_MARKERS = "x"


@dataclass
class Series:
    """A named series of a figure, and how its key looks."""

    name: str
    color: str
    dash: str | None = None  # None: there is no line
    marker: str = ""


@dataclass
class Chart:
    """A figure of the page: panels with their titles, axis labels and SVG, and the series."""

    title: str
    panels: list[dict[str, Any]] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)

    def keys(self) -> list[dict[str, Any]]:
        """The legend: names with a picture of their line. A single series needs none."""
        named = [series for series in self.series.values() if series.name]
        return [{"name": of.name, "svg": _key(of)} for of in named] if len(named) > 1 else []


def chart_of(title: str, figure: Figure) -> Chart:
    """The panels of a figure, from its visible axes."""
    chart = Chart(title)
    for ax in figure.axes:
        if ax.get_visible():
            ax.get_xlim(), ax.get_ylim()  # scales the axes to what was drawn last
            parts = [_svg(part, chart) for part in _parts(ax)]
            chart.panels.append(
                {
                    "title": ax.get_title(loc="left"),
                    "x": ax.get_xlabel(),
                    "y": ax.get_ylabel(),
                    "svg": Markup("").join([_grid(ax), *parts, *map(_note, _notes(ax))]),
                }
            )
    return chart


def dark(color: str) -> str:
    """A color for a dark page: the same hue, lighter; gray for black."""
    rgb = np.array(to_rgb(color))
    weight = 0.88 if rgb.max() < 0.1 else 0.45
    return to_hex(rgb + (1 - rgb) * weight)


def _style(color: str) -> str:
    return f"--c:light-dark({color},{dark(color)})"


# -------------------------------------------------------------------------------- what axes contain


@dataclass
class Part:
    """One artist: its points in units of the panel, with their values. outline: a closed shape
    instead of a line. bars: vertical segments (x, low, high) in units."""

    label: str
    color: str
    alpha: float
    points: np.ndarray
    values: np.ndarray
    dash: str | None = None
    marker: str = ""
    width: float = 1.5
    outline: np.ndarray | None = None
    bars: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.label.lstrip("_").partition(" · ")[0]


def _parts(ax: Axes) -> Iterator[Part]:
    bars, labels, hidden = _error_bars(ax)
    for shape in (*ax.collections, *ax.patches):
        yield from _shape(ax, shape)
    for line in ax.lines:
        if line not in hidden and len(line.get_xdata()):
            yield _line(ax, line, labels.get(line, line.get_label()), bars.get(line, []))


def _error_bars(ax: Axes) -> tuple[dict, dict, set]:
    """Of each line with error bars its bars and its label, and the lines of caps."""
    bars, labels, hidden = {}, {}, set()
    for container in ax.containers:
        if isinstance(container, ErrorbarContainer):
            line, caps, segments = container.lines
            hidden |= set(caps)
            labels[line] = container.get_label()
            bars[line] = [s for of in segments for s in of.get_segments() if len(s) == 2]
    return bars, labels, hidden


def _line(ax: Axes, line: Line2D, label: str, bars: Sequence[np.ndarray]) -> Part:
    values = np.array([(x, y) for x, y in zip(*line.get_data(), strict=True)], float)
    values = _thinned(values[np.isfinite(values).all(1)])
    style = line.get_linestyle()
    ends = [_units(ax, segment) for segment in bars]
    return Part(
        label=_public(label),
        color=to_hex(line.get_color()),
        alpha=line.get_alpha() or 1.0,
        points=_units(ax, values),
        values=values,
        dash=DASHES.get(style) if style not in ("None", "", " ") else None,
        marker=_marker(line.get_marker()),
        width=line.get_linewidth(),
        bars=[(a[0], a[1], b[1]) for a, b in ends if np.isfinite([*a, *b]).all()],
    )


def _marker(marker: Any) -> str:
    """A marker of MARKERS, "o" for another one, and "" for none."""
    return "" if marker in (None, "None", "none", " ", "") else marker if marker in MARKERS else "o"


def _shape(ax: Axes, shape: Any) -> Iterator[Part]:
    """A band around a line, or a histogram."""
    if getattr(shape, "get_segments", None) or shape is ax.patch:  # error bars are with their line
        return
    paths = shape.get_paths() if hasattr(shape, "get_paths") else [shape.get_path()]
    is_filled = getattr(shape, "get_fill", lambda: True)()
    colors = np.atleast_2d(shape.get_facecolor() if is_filled else shape.get_edgecolor())
    for path in paths:
        vertices = path.vertices[np.isfinite(path.vertices).all(1)]
        if len(vertices) < 2 or not len(colors):
            continue
        steps = getattr(shape, "get_data", None)
        values = np.empty((0, 2))
        if steps is not None and hasattr(steps(), "edges"):
            edges, heights = np.asarray(steps().edges), np.asarray(steps().values)
            values = np.column_stack([(edges[1:] + edges[:-1]) / 2, heights])
        yield Part(
            label=_public(shape.get_label()),
            color=to_hex(colors[0][:3]),
            alpha=(shape.get_alpha() or 1.0) * (0.6 if is_filled and len(values) else 1.0),
            points=_units(ax, values),
            values=values,
            dash=None if is_filled else "",
            outline=_units(ax, _thinned(vertices)),
        )


def _public(label: Any) -> str:
    """Empty for the labels that matplotlib makes itself."""
    text = str(label)
    return "" if text.startswith(("_child", "_nolegend_")) else text


def _units(ax: Axes, values: np.ndarray) -> np.ndarray:
    """Values in units of the panel, whatever the scale of the axes."""
    if not len(values):
        return np.empty((0, 2))
    shares = (ax.transScale + ax.transLimits).transform(values)
    return np.column_stack(
        [LEFT + shares[:, 0] * (RIGHT - LEFT), BOTTOM - shares[:, 1] * (BOTTOM - TOP)]
    )


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most MAX_POINTS points: of each stretch of a longer line its first, lowest, highest and
    last."""
    if len(values) <= MAX_POINTS:
        return values
    kept = []
    for stretch in np.array_split(np.arange(len(values)), MAX_POINTS // 4):
        y = values[stretch, 1]
        kept += sorted({stretch[0], stretch[y.argmin()], stretch[y.argmax()], stretch[-1]})
    return values[kept]


def _notes(ax: Axes) -> Iterator[tuple[float, float, str]]:
    for text in ax.texts:
        [(x, y)] = _units(ax, np.array([text.xy], float)) if hasattr(text, "xy") else [(0, 0)]
        yield x, y, text.get_text()


# ---------------------------------------------------------------------------------------------- SVG


def _grid(ax: Axes) -> Markup:
    """The axes, their ticks with numbers, and the lines of the grid."""
    (left, right), (low, high) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    xs = [x for x in ax.get_xticks() if left <= x <= right]
    ys = [y for y in ax.get_yticks() if low <= y <= high]
    x_units = [x for x, _ in _units(ax, np.array([(x, low) for x in xs], float))]
    y_units = [y for _, y in _units(ax, np.array([(left, y) for y in ys], float))]
    path = "".join(f"M{x:.1f} {TOP}V{BOTTOM}" for x in x_units)
    path += "".join(f"M{LEFT} {y:.1f}H{RIGHT}" for y in y_units)
    texts = [
        _text(x, BOTTOM + 18, text, "middle")
        for x, text in zip(x_units, ax.xaxis.get_major_formatter().format_ticks(xs), strict=True)
    ]
    texts += [
        _text(LEFT - 7, y + 4, text, "end")
        for y, text in zip(y_units, ax.yaxis.get_major_formatter().format_ticks(ys), strict=True)
    ]
    lines = Markup('<path class="grid" d="{}"/><path class="axis" d="M{} {}V{}H{}"/>')
    return lines.format(path, LEFT, TOP, BOTTOM, RIGHT) + Markup("").join(texts)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    shown = text.replace("$\\mathdefault{", "").replace("}$", "")
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, escape(shown)
    )


def _note(note: tuple[float, float, str]) -> Markup:
    x, y, text = note
    is_right = x > (LEFT + RIGHT) / 2
    return _text(x - 7 if is_right else x + 7, y + 15, text, "end" if is_right else "start")


def _svg(part: Part, chart: Chart) -> Markup:
    """An artist, and its series in the chart."""
    name = part.name
    of = chart.series.setdefault(name, Series(name, part.color))
    of.dash = part.dash if of.dash is None else of.dash
    of.marker = of.marker or part.marker
    marks = []
    if part.outline is not None:
        filled = part.dash is None
        marks.append(
            Markup('<path class="{}" d="{}"/>').format(
                "area" if filled else "line", _path(part.outline) + ("z" if filled else "")
            )
        )
    bars = "".join(
        f"M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6M{x:.1f} {low:.1f}V{high:.1f}"
        for x, low, high in part.bars
    )
    marks += [Markup('<path class="line" d="{}"/>').format(bars)] if bars else []
    is_line = part.dash is not None and part.outline is None
    if len(part.points):
        marks.append(
            Markup('<polyline class="{}" points="{}" stroke-width="{:.2g}"{}/>').format(
                "line" if is_line else "hidden",
                " ".join(f"{x:.2f},{y:.2f}" for x, y in part.points),
                part.width,
                Markup(' stroke-dasharray="{}"').format(part.dash) if part.dash else "",
            )
        )
    if part.marker:
        path = "".join(f"M{x:.1f} {y:.1f}{MARKERS[part.marker]}" for x, y in part.points)
        marks.append(
            Markup('<path class="{}" d="{}"/>').format(
                "line" if part.marker in OPEN_MARKERS else "dots", path
            )
        )
    label = part.label.lstrip("_")
    return Markup(
        '<g class="series" data-series="{}" data-label="{}" data-x="{}" data-y="{}"'
        ' style="{}" opacity="{:.2g}">{}</g>'
    ).format(
        name,
        label,
        _numbers(part.values[:, 0]),
        _numbers(part.values[:, 1]),
        _style(part.color),
        max(part.alpha, 0.4) if is_line else part.alpha,
        Markup("").join(marks),
    )


def _path(points: Iterable[Sequence[float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _key(series: Series) -> Markup:
    """A picture of a series for the legend."""
    line = Markup("")
    if series.dash is not None or not series.marker:
        line = Markup('<path class="line" stroke-width="2" d="M1 7H29"{}/>').format(
            Markup(' stroke-dasharray="{}"').format(series.dash) if series.dash else ""
        )
    marker = MARKERS.get(series.marker, "")
    dots = Markup('<path class="{}" d="M15 7{}"/>').format(
        "line" if series.marker in OPEN_MARKERS else "dots", marker
    )
    return Markup('<svg width="30" height="14" aria-hidden="true" style="{}">{}</svg>').format(
        _style(series.color), line + (dots if marker else Markup(""))
    )
