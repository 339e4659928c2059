"""Figures that compare groups of runs, where the runs of a group differ in their seeds only.

A function returns None when the groups have nothing to draw.
"""

import math
from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from preflab.reports.ceiling import best_of_n, ceiling
from preflab.reports.overoptimization import Fit
from preflab.reports.overoptimization_table import fitted_curves
from preflab.reports.plot_style import (
    KL_LABEL,
    kl_label,
    label_axes,
    legend_below,
    marker,
    new_axes,
    panel_grid,
    style,
    unlisted,
)
from preflab.reports.run_files import is_number
from preflab.reports.runs import Group, Run, left_out
from preflab.reports.selection import envelopes
from utils import mean_and_error

MAX_DRAWN_SAMPLES = 300  # about as many points of a group; all samples count in the line
N_LENGTH_BINS = 6
MOST_DETAILED = 12  # losses of a frontier that is drawn with all evaluations and ranges
SPACING = 19  # steps of the grid between two markers of a line
MOST_LISTED = 8  # losses of a legend inside of the axes
N_GRID = 100  # steps along the KL axis at which envelopes are averaged


def frontier_figure(
    groups: list[Group], rewards: np.ndarray | None = None, largest_kl: float = math.inf
) -> Figure | None:
    """Reward against KL: every sampled evaluation as a point, and for each loss its envelope, mean
    and range over seeds. With more than `MOST_DETAILED` losses the means alone.

    rewards: (prompts, samples) of the reference's samples, from which the highest possible reward
    is drawn. largest_kl: where the axis ends.
    """
    families: dict[str, list[Run]] = defaultdict(list)
    for group in groups:
        families[group.family] += [run for run in group.runs if run.frontier()]
    families = {name: runs for name, runs in families.items() if runs}
    if not families:
        return None
    is_long = len(families) > MOST_LISTED
    below = 0.05 * len(families) * is_long  # inches of the legend
    figure = Figure(figsize=(8, 5 + below), layout="constrained")
    (ax,) = new_axes(figure, 1, 1)
    reached = max(kl for runs in families.values() for run in runs for kl, _, _ in run.frontier())
    max_kl = min(reached, largest_kl)
    grid = [max_kl * (i / N_GRID) for i in range(N_GRID + 1)]
    curves = fitted_curves(families)
    for i, (name, runs) in enumerate(families.items()):
        detailed = len(families) <= MOST_DETAILED
        _draw_envelope(ax, name, runs, grid, i, detailed=detailed)
        if name in curves and detailed:
            _draw_fit(ax, *curves[name], name, style(i)["color"])
    if rewards is not None:
        _draw_ceiling(ax, rewards, max_kl)
    title = "reward against KL; lines: best reward within a KL, mean over seeds"
    if max_kl < reached:
        title += f"; cut at KL {max_kl:g}"
    if curves and len(families) <= MOST_DETAILED:
        title += "; dotted: fit to all points"
    note = left_out(sum(run.n_beside_frontier() for group in groups for run in group.runs))
    label_axes(ax, "\n".join(filter(None, [title, note])), KL_LABEL, "reward of samples")
    if is_long:
        ax.get_legend().remove()
        legend_below(figure, list(families))
    return figure


def _draw_envelope(
    ax: Axes, name: str, runs: list[Run], grid: list[float], i: int, *, detailed: bool
) -> None:
    """The envelope of a loss. detailed: with its evaluations and its range over seeds; without
    them, a few markers on the line tell it from others of its color."""
    line_style = style(i)
    points = [p for run in runs for p in run.frontier() if p[0] <= grid[-1]] if detailed else []
    ax.plot(
        [kl for kl, _, _ in points],
        [reward for _, reward, _ in points],
        marker(i),
        color=line_style["color"],
        alpha=0.35,
        markersize=3,
        label=unlisted(name, "an evaluation"),
    )
    by_kl = zip(grid, *envelopes(runs, grid).values(), strict=True)
    # Only where every seed has a value: the mean jumps where a seed drops out.
    complete = [(kl, rewards) for kl, *rewards in by_kl if None not in rewards]
    kls = [kl for kl, _ in complete]
    ax.plot(
        kls,
        [mean_and_error(rewards)[0] for _, rewards in complete],
        **line_style,
        linewidth=1.8 if detailed else 1.2,
        label=name,
    )
    if not detailed:
        begin = min(5 + i % SPACING, len(complete) // 2)
        marked = complete[begin::SPACING]
        heights = [mean_and_error(rewards)[0] for _, rewards in marked]
        marks = {"color": line_style["color"], "markersize": 4, "label": unlisted(name, "mark")}
        ax.plot([kl for kl, _ in marked], heights, marker(i), **marks)
        return
    ax.fill_between(
        kls,
        [min(rewards) for _, rewards in complete],
        [max(rewards) for _, rewards in complete],
        color=line_style["color"],
        alpha=0.15,
        linewidth=0,
        label=unlisted(name, "range over seeds"),
    )


def _draw_fit(ax: Axes, start: float, fitted: Fit, name: str, color: str) -> None:
    """The fit of over-optimisation to all points of a loss, where there are some."""
    kls = np.linspace(fitted.low, fitted.high, N_GRID)
    label = unlisted(name, "fit")
    ax.plot(kls, start + fitted.gain(kls), ":", color=color, linewidth=1.2, label=label)


def _draw_ceiling(ax: Axes, rewards: np.ndarray, max_kl: float) -> None:
    """The highest possible reward, as far as its estimate is to be trusted, and the best of n."""
    highest = ceiling(rewards)
    if highest is None:
        return
    shown = highest.kls <= 1.1 * max_kl
    label = f"highest possible ({highest.n_samples} samples a prompt)"
    ax.plot(highest.kls[shown], highest.start + highest.gains[shown], "k--", lw=1.2, label=label)
    points = [point for point in best_of_n(rewards, (1, 2, 4, 8, 16, 32)) if point[1] <= max_kl]
    gains = [highest.start + gain for _, _, gain in points]
    ax.plot([kl for _, kl, _ in points], gains, "kx", markersize=5, label="best of 1, 2, 4, ...")


class Panel(NamedTuple):
    title: str
    y_label: str
    metric: str


EVALUATION_PANELS = [
    Panel("reward of samples", "reward", "samples_eval/policy_reward"),
    Panel("KL along samples", "", "samples_eval/kl"),
    Panel("held-out accuracy", "share of pairs", "rewards_eval/accuracies"),
    Panel("length of samples", "tokens", "samples_eval/policy_length"),
    Panel("log-ratio of chosen", "log pi - log ref (nats)", "logratios_eval/chosen"),
    Panel("log-ratio of rejected", "log pi - log ref (nats)", "logratios_eval/rejected"),
]


def bands_figure(groups: list[Group]) -> Figure | None:
    """Evaluations over training: one line for each group, its mean over seeds, with a band of one
    standard error."""
    panels = [
        panel
        for panel in EVALUATION_PANELS
        if any(run.series("eval", panel.metric)[0] for group in groups for run in group.runs)
    ]
    if not panels:
        return None
    figure, axes = panel_grid(len(panels), row_height=3.1)
    for ax, panel in zip(axes, panels, strict=True):
        for i, group in enumerate(groups):
            _draw_band(ax, group, panel.metric, i)
        samplers = (run.sampler() for group in groups for run in group.runs)
        label_axes(ax, panel.title, "examples", panel.y_label or kl_label(samplers))
    legend_below(figure, [group.name for group in groups])
    return figure


def _draw_band(ax: Axes, group: Group, metric: str, i: int) -> None:
    line_style = style(i) | {"label": unlisted(group.name)}
    values = defaultdict(list)
    for run in group.runs:
        for examples, value in zip(*run.series("eval", metric), strict=True):
            values[examples].append(value)
    points = [(examples, *mean_and_error(values[examples])) for examples in sorted(values)]
    examples = [x for x, _, _ in points]
    means = [mean for _, mean, _ in points]
    ax.plot(examples, means, **line_style, marker=marker(i), markersize=3, linewidth=1.4)
    ax.fill_between(
        examples,
        [mean - (error or 0) for _, mean, error in points],
        [mean + (error or 0) for _, mean, error in points],
        color=line_style["color"],
        alpha=0.15,
        linewidth=0,
        label=unlisted(group.name, "± standard error"),
    )


def length_figure(groups: list[Group]) -> Figure | None:
    """Reward of samples against their length: samples as points, and the mean of each sixth of the
    samples, by length, as a line."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    (ax,) = new_axes(figure, 1, 1)
    is_empty = True
    for i, group in enumerate(groups):
        points = sorted(
            (row["policy_tokens"], next(iter(row["policy_reward"].values())))
            for run in group.runs
            for row in run.samples()
            if row.get("policy_reward") and is_number(row.get("policy_tokens"))
        )
        if len(points) >= 2:
            is_empty = False
            _draw_lengths(ax, group.name, points, i)
    label_axes(
        ax, "reward of samples against their length; lines: means of sixths", "tokens", "reward"
    )
    return None if is_empty else figure


def _draw_lengths(ax: Axes, name: str, points: list[tuple[float, float]], i: int) -> None:
    """points: (tokens, reward), sorted by tokens."""
    line_style = style(i)
    thinned = points[:: max(1, len(points) // MAX_DRAWN_SAMPLES)]
    ax.plot(
        [tokens for tokens, _ in thinned],
        [reward for _, reward in thinned],
        ".",
        color=line_style["color"],
        alpha=0.2,
        markersize=4,
        label=unlisted(name, "a sample"),
    )
    n = len(points)
    bounds = [n * i // N_LENGTH_BINS for i in range(N_LENGTH_BINS + 1)]
    bins = [points[low:high] for low, high in pairwise(bounds) if low < high]
    ax.plot(
        [mean_and_error(tokens for tokens, _ in members)[0] for members in bins],
        [mean_and_error(reward for _, reward in members)[0] for members in bins],
        **line_style,
        marker=marker(i),
        markersize=4,
        label=name,
    )
