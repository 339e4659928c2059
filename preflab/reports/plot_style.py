"""Colours, axes and files that all pictures share."""

import io

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# The Okabe-Ito palette, which colour-blind readers can tell apart.
COLOURS = {
    "policy": "#0072B2",
    "reference": "#7F7F7F",
    "chosen": "#009E73",
    "rejected": "#D55E00",
    "train": "#56B4E9",
    "eval": "#CC3311",
}


CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]


LINES = ["-", "--", ":", "-."]


KL_LABEL = "KL(policy || reference) of samples (nats)"


def style(i: int) -> dict:
    """Colour and line of the i-th thing of a picture."""
    return {"color": CYCLE[i % len(CYCLE)], "linestyle": LINES[i // len(CYCLE) % len(LINES)]}


def new_axes(figure: Figure, rows: int, columns: int) -> list:
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.tick_params(labelsize=9)
    return axes


def label_line(ax, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=11, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8, frameon=False)


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed


def short(text: str, n: int = 40) -> str:
    return text if len(text) <= n else "…" + text[1 - n :]


def legend_below(figure: Figure, names: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], **style(i), linewidth=1.6, label=name) for i, name in enumerate(names)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, min(4, 100 // max(map(len, names)))),
        fontsize=8,
        frameon=False,
    )


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    figure.set_layout_engine(
        "none"
    )  # all is in its place now; finding it again takes as long as drawing
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure: without a date, and with names that do not change."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "preflab", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()
