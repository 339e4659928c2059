"""Figures of a run: training curves, reward and KL, data, online rounds, evaluated checkpoints.

A function returns None when the run has nothing to draw.
"""

from collections import defaultdict
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from preflab.reports.evaluation_tables import place_in, trained
from preflab.reports.plot_style import (
    COLORS,
    KL_LABEL,
    kl_label,
    label_axes,
    legend_below,
    marker,
    new_axes,
    panel_grid,
    smooth,
    style,
    unlisted,
)
from preflab.reports.run_files import is_number
from preflab.reports.runs import Run, left_out, other_sampler
from preflab.reports.tables import shorten
from utils import mean_and_error


class Curve(NamedTuple):
    """A metric in a panel; `{}` in its name stands for the split, train or eval."""

    metric: str
    color: str
    role: str = ""  # in the legend, before "train" or "eval"


class Panel(NamedTuple):
    title: str
    y_label: str
    curves: list[Curve]


def _chosen_and_rejected(metric: str) -> list[Curve]:
    return [Curve(f"{metric}/{role}", role, role) for role in ("chosen", "rejected")]


TRAINING_PANELS = [
    Panel("loss", "loss per example", [Curve("loss/{}", "eval")]),
    Panel(
        "accuracy of the implicit reward",
        "share of pairs",
        [Curve("rewards_{}/accuracies", "eval")],
    ),
    Panel(
        "order of the responses of a list",
        "agreement with the scores",
        [
            Curve("ranking_{}/kendall_tau", "chosen", "Kendall's tau"),
            Curve("ranking_{}/ndcg", "rejected", "NDCG"),
        ],
    ),
    Panel("implicit rewards", "beta x log-ratio", _chosen_and_rejected("rewards_{}")),
    Panel("log-ratios", "log pi - log ref (nats)", _chosen_and_rejected("logratios_{}")),
    Panel("KL along the data's responses", "nats", _chosen_and_rejected("kl_{}")),
    Panel("gradient norm, before clipping", "norm", [Curve("grad_norm", "train")]),
]


def training_figure(run: Run) -> Figure | None:
    """Loss, accuracy, rewards, log-ratios, KL and gradient norm over training examples."""
    panels = [
        panel
        for panel in TRAINING_PANELS
        if any(
            run.series(split, curve.metric.format(split))[0]
            for curve in panel.curves
            for split in ("train", "eval")
        )
    ]
    if not panels:
        return None
    figure, axes = panel_grid(len(panels), row_height=3.1)
    for ax, panel in zip(axes, panels, strict=True):
        for curve in panel.curves:
            _draw_curve(ax, run, curve)
        label_axes(ax, panel.title, "examples", panel.y_label)
    return figure


def _draw_curve(ax: Axes, run: Run, curve: Curve) -> None:
    """Training steps pale under their moving average, and evaluations as points."""
    examples, values = run.series("train", curve.metric.format("train"))
    color = COLORS[curve.color if curve.role else "train"]
    name = f"{curve.role} train".strip()
    ax.plot(examples, values, color=color, alpha=0.25, linewidth=0.8, label=unlisted(name, "raw"))
    ax.plot(
        examples,
        smooth(values),
        color=color,
        linewidth=1.2,
        label=name if examples else None,
    )
    if "{}" not in curve.metric:  # a metric of training alone
        return
    examples, values = run.series("eval", curve.metric.format("eval"))
    if examples:
        ax.plot(
            examples,
            values,
            color=COLORS[curve.color],
            marker="o",
            markersize=4,
            linewidth=1.5,
            label=f"{curve.role} eval".strip(),
        )


def reward_figure(run: Run) -> Figure | None:
    """Reward of the samples over training, and against their KL: the run's frontier."""
    if not run.series("eval", "samples_eval/policy_reward")[0]:
        return None
    reward_name = run.reward or "reward"
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = new_axes(figure, 1, 2)
    for model in ("policy", "reference"):
        _draw_rewards(left, run, model)
    label_axes(left, "reward of samples (bars: 95%)", "examples", reward_name)
    points = run.frontier()
    if points:
        _draw_frontier(right, points)
        title = "reward against KL, labelled by examples"
        label_axes(right, _with_note(title, run.n_beside_frontier()), KL_LABEL, reward_name)
    else:
        right.set_visible(False)
    return figure


def _with_note(title: str, n_left_out: int) -> str:
    """A title, and below it the number of evaluations that a frontier leaves out."""
    return "\n".join(filter(None, [title, left_out(n_left_out)]))


def _draw_rewards(ax: Axes, run: Run, model: str) -> None:
    examples, rewards = run.series("eval", f"samples_eval/{model}_reward")
    errors = run.series("eval", f"samples_eval/{model}_reward_se")[1]
    if not examples:
        return
    ax.errorbar(
        examples,
        rewards,
        yerr=[1.96 * error for error in errors] if len(errors) == len(examples) else None,
        color=COLORS[model],
        marker="o",
        markersize=4,
        capsize=2,
        linewidth=1.5,
        label=model,
    )


def _draw_frontier(ax: Axes, points: list[tuple[float, float, float]]) -> None:
    """Points (KL, reward, examples); the first and the last are labelled with their examples."""
    ax.plot(
        [kl for kl, _, _ in points],
        [reward for _, reward, _ in points],
        color=COLORS["policy"],
        marker="o",
        markersize=4,
        linewidth=1.2,
        label=unlisted("policy"),
    )
    for kl, reward, examples in (points[0], points[-1]):
        ax.annotate(
            f"{examples:,}",
            (kl, reward),
            textcoords="offset points",
            xytext=(6, -10),
            fontsize=8,
        )


HISTOGRAMS = {  # of data.json, with their axis labels
    "prompt_tokens": "tokens of a prompt",
    "response_tokens": "tokens of a response",
    "score_gap": "score gap of a pair",
}


def data_figure(run: Run) -> Figure | None:
    """Histograms of prompt lengths, response lengths and score gaps, train and test."""
    histograms = {
        split: run.data.get(split, {}).get("histograms", {}) for split in ("train", "test")
    }
    names = [name for name in HISTOGRAMS if any(name in of for of in histograms.values())]
    if not names:
        return None
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for ax, name in zip(new_axes(figure, 1, len(names)), names, strict=True):
        for split, color in (("train", "train"), ("test", "eval")):
            histogram = histograms[split].get(name)
            if histogram:
                total = sum(histogram["counts"]) or 1
                ax.stairs(
                    [count / total for count in histogram["counts"]],
                    histogram["edges"],
                    color=COLORS[color],
                    label=split,
                    fill=split == "train",
                    alpha=0.7,
                )
        label_axes(ax, HISTOGRAMS[name], HISTOGRAMS[name], "share")
    return figure


class OnlinePanel(NamedTuple):
    x: str
    y: str
    title: str
    x_label: str
    y_label: str


ONLINE_PANELS = [
    OnlinePanel(
        "round", "online/gold_reward", "gold reward of the rollouts", "round", "gold reward"
    ),
    OnlinePanel(
        "online/labels_bought",
        "online/gold_reward",
        "gold reward against labels bought",
        "gold labels bought",
        "gold reward",
    ),
    OnlinePanel(
        "online/kl", "online/gold_reward", "gold reward against KL", KL_LABEL, "gold reward"
    ),
    OnlinePanel(
        "round",
        "online/label_accuracy",
        "label accuracy against gold, on the round's pairs",
        "round",
        "share of pairs",
    ),
]


def online_figure(runs_by_name: dict[str, list[Run]]) -> Figure | None:
    """Rounds of online runs: one line for each name, the mean of its runs at each round, pale
    under its moving average over about ten rounds."""
    means = {name: _round_means(runs) for name, runs in runs_by_name.items()}
    panels = [
        panel
        for panel in ONLINE_PANELS
        if any({panel.x, panel.y} <= of_name.keys() for of_name in means.values())
    ]
    if not panels:
        return None
    figure, axes = panel_grid(len(panels), row_height=3.3)
    for ax, panel in zip(axes, panels, strict=True):
        for i, (name, of_name) in enumerate(means.items()):
            points = [
                (x, y)
                # One of the two is missing where no run of this name logged it.
                for x, y in zip(of_name.get(panel.x, ()), of_name.get(panel.y, ()), strict=False)
                if x is not None and y is not None
            ]
            if panel.x == "online/labels_bought" and len({x for x, _ in points}) == 1:
                points = points[-1:]  # all labels were bought before the first round
            xs, ys = [x for x, _ in points], [y for _, y in points]
            raw = unlisted(name, "raw")
            ax.plot(xs, ys, color=style(i)["color"], alpha=0.3, linewidth=0.8, label=raw)
            ax.plot(
                xs,
                smooth(ys),
                **style(i),
                linewidth=1.4,
                marker=marker(i) if len(points) == 1 else None,
                label=unlisted(name),
            )
        x_label = panel.x_label
        if panel.x == "online/kl":
            x_label = kl_label(run.rollout_sampler() for of in runs_by_name.values() for run in of)
        label_axes(ax, panel.title, x_label, panel.y_label)
    if len(means) > 1:
        legend_below(figure, list(means))
    return figure


def _round_means(runs: list[Run]) -> dict[str, list[float | None]]:
    """For each metric of ONLINE_PANELS its mean over runs at each round; None where no run has a
    number."""
    metrics = {metric for panel in ONLINE_PANELS for metric in (panel.x, panel.y)}
    values = defaultdict(lambda: defaultdict(list))  # round -> metric -> one value for each run
    for run in runs:
        for row in run.rows:
            if row.get("split") == "online" and is_number(row.get("round")):
                for metric in metrics:
                    if is_number(row.get(metric)):
                        values[row["round"]][metric].append(row[metric])
    logged = {metric for of_round in values.values() for metric in of_round}
    return {
        metric: [mean_and_error(values[number][metric])[0] for number in sorted(values)]
        for metric in logged
    }


class TemperaturePanel(NamedTuple):
    title: str
    y_label: str
    points: list[tuple[str, float, float]]  # (title of a group, temperature, value)


def temperature_figure(evaluations: list[dict], winrates: list[dict]) -> Figure | None:
    """Win rate, reward and length against temperature: one line for each group of the tables, its
    mean over seeds with standard errors.

    evaluations: rows of eval.jsonl; winrates: entries of winrates.json.
    """
    panels = [*_winrate_panels(evaluations, winrates), *_sample_panels(evaluations)]
    panels = [p for p in panels if len({temperature for _, temperature, _ in p.points}) > 1]
    if not panels:
        return None
    figure, axes = panel_grid(len(panels), row_height=3.4, n_columns=min(2, len(panels)))
    names = list(dict.fromkeys(name for panel in panels for name, _, _ in panel.points))
    for ax, panel in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            line_style = style(i) | {"marker": marker(i), "label": unlisted(name)}
            _draw_over_temperature(ax, panel.points, name, line_style)
        label_axes(ax, panel.title, "temperature", panel.y_label)
    legend_below(figure, names)
    return figure


def _winrate_panels(evaluations: list[dict], winrates: list[dict]) -> list[TemperaturePanel]:
    """One panel for each opponent and judge, the last of winrates.json first."""
    groups = zip(map(place_in, evaluations), trained(evaluations), strict=True)
    titles = {place: group.title for place, group in groups}
    points = defaultdict(list)
    for rate in winrates:
        of_comparison = points[rate["against"], rate["by"]]
        if is_number(rate.get("win_rate")) and is_number(rate.get("temperature")):
            title = titles.get(place_in(rate), str(rate.get("checkpoint")))
            of_comparison.append((title, rate["temperature"], rate["win_rate"]))
    panels = [
        TemperaturePanel(
            f"win rate against {shorten(against)}", f"by {by}; a tie counts 1/2", of_comparison
        )
        for (against, by), of_comparison in points.items()
    ]
    return panels[::-1]


def _sample_panels(evaluations: list[dict]) -> list[TemperaturePanel]:
    panels = []
    for title, y_label, metric in (
        ("reward of samples", "reward", "samples_eval/policy_reward"),
        ("length of samples", "tokens", "samples_eval/policy_length"),
    ):
        points = [
            (group.title, row["temperature"], row[metric])
            for group, row in zip(trained(evaluations), evaluations, strict=True)
            if is_number(row.get(metric))
        ]
        panels.append(TemperaturePanel(title, y_label, points))
    return panels


def _draw_over_temperature(
    ax: Axes, points: list[tuple[str, float, float]], name: str, line_style: dict
) -> None:
    values = defaultdict(list)
    for other, temperature, value in points:
        if other == name:
            values[temperature].append(value)
    if not values:
        return
    temperatures = sorted(values)
    means, errors = zip(*(mean_and_error(values[t]) for t in temperatures), strict=True)
    ax.errorbar(
        temperatures,
        means,
        yerr=[error or 0 for error in errors],
        **line_style,
        markersize=4,
        capsize=2,
    )


def checkpoints_figure(evaluations: list[dict]) -> Figure | None:
    """Reward of evaluated checkpoints over training steps, one line for each temperature, and
    against the KL of the policy's samples. evaluations: rows of eval.jsonl."""
    rows = [row for row in evaluations if is_number(row.get("samples_eval/policy_reward"))]
    if not rows:
        return None
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = new_axes(figure, 1, 2)
    lines = defaultdict(list)
    for row, group in zip(rows, trained(rows), strict=True):
        name = group._replace(step=None).title
        lines[name, row.get("run"), row["temperature"]].append(row)
    several_temperatures = len({temperature for _, _, temperature in lines}) > 1
    names = [
        f"{name}, T={temperature:g}" if several_temperatures else name
        for name, _, temperature in lines
    ]
    legend = list(dict.fromkeys(names))
    for name, checkpoints in zip(names, lines.values(), strict=True):
        i = legend.index(name)
        line_style = style(i) | {"marker": marker(i), "markersize": 4, "label": unlisted(name)}
        checkpoints = sorted(checkpoints, key=lambda row: row.get("step") or 0)
        rewards = [row["samples_eval/policy_reward"] for row in checkpoints]
        if all("step" in row for row in checkpoints):
            left.plot([row.get("step") for row in checkpoints], rewards, **line_style)
        if not any(other_sampler(row) for row in checkpoints):
            right.plot([row.get("samples_eval/kl") for row in checkpoints], rewards, **line_style)
    label_axes(left, "reward over training", "steps", "reward of samples")
    n_left_out = sum(bool(other_sampler(row)) for row in rows)
    title = _with_note("reward against KL", n_left_out)
    label_axes(right, title, KL_LABEL, "reward of samples")
    right.set_visible(n_left_out < len(rows))
    several_steps = any(len({row.get("step") for row in of}) > 1 for of in lines.values())
    left.set_visible(several_steps or not right.get_visible())
    legend_below(figure, legend)
    return figure
