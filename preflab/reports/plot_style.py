"""Colors, axes and file formats that all figures share."""

import io
import math
from collections.abc import Iterable

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# The Okabe-Ito palette, which color-blind readers can tell apart.
COLORS = {
    "policy": "#0072B2",
    "reference": "#7F7F7F",
    "chosen": "#009E73",
    "rejected": "#D55E00",
    "train": "#56B4E9",
    "eval": "#CC3311",
}

COLOR_CYCLE = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999933",
]

LINE_STYLES = ["-", "--", ":", "-."]

# Seven, so that with eight colors 56 series differ in color or marker, and neighbors in both.
MARKERS = ["o", "s", "^", "D", "v", "P", "x"]

KL_LABEL = "KL(policy || reference) of samples (nats)"


def kl_label(samplers: Iterable[str]) -> str:
    """The label of a KL axis. samplers: `other_sampler` of what is drawn. Along samples of another
    sampler it is the KL neither of the policy nor of that sampler."""
    others = sorted({sampler for sampler in samplers if sampler})
    if not others:
        return KL_LABEL
    return f"KL(policy || reference) along samples at {' or '.join(others)} (nats)"


def style(i: int) -> dict[str, str]:
    """Color and line style of the i-th line of a figure: all colors, then the next line style."""
    return {
        "color": COLOR_CYCLE[i % len(COLOR_CYCLE)],
        "linestyle": LINE_STYLES[i // len(COLOR_CYCLE) % len(LINE_STYLES)],
    }


def marker(i: int) -> str:
    """The marker of the i-th series of a figure."""
    return MARKERS[i % len(MARKERS)]


def unlisted(name: str, what: str = "") -> str:
    """A label that puts an artist into a series of the page, and in no legend of a figure.

    what: which part of the series it is, such as its raw values.
    """
    return f"_{name} · {what}" if what else f"_{name}"


def new_axes(figure: Figure, n_rows: int, n_columns: int) -> list[Axes]:
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.tick_params(labelsize=9)
    return axes


def panel_grid(n_panels: int, row_height: float, n_columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure with one axes for each panel, row by row; a column is 5 inches wide."""
    n_rows = math.ceil(n_panels / n_columns)
    figure = Figure(figsize=(5 * n_columns, row_height * n_rows), layout="constrained")
    axes = new_axes(figure, n_rows, n_columns)
    for ax in axes[n_panels:]:
        ax.set_visible(False)
    return figure, axes[:n_panels]


def label_axes(ax: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, axis labels, and a legend if a line has a label."""
    ax.set_title(title, fontsize=11, loc="left")
    ax.set_xlabel(x_label, fontsize=9)
    ax.set_ylabel(y_label, fontsize=9)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8, frameon=False)


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start like the moments of Adam."""
    mean, total = 0.0, 0.0
    smoothed = []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed


def legend_below(figure: Figure, names: list[str]) -> None:
    """One legend for all axes of a figure; the i-th name has `style(i)`."""
    handles = [
        Line2D([], [], **style(i), marker=marker(i), markersize=4, linewidth=1.6, label=name)
        for i, name in enumerate(names)
    ]
    longest = max(len(name) for name in names)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, min(4, 100 // longest)),
        fontsize=8,
        frameon=False,
    )


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    # The layout is computed now. Computing it again for the SVG takes as long as drawing does.
    figure.set_layout_engine("none")
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure: the file has no date, and its ids do not change."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "preflab", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()
