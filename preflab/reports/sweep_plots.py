"""Pictures of several runs."""

import math
from collections import defaultdict

from matplotlib.figure import Figure

from preflab.reports.plot_style import KL_LABEL, label_line, legend_below, new_axes, short, style
from preflab.reports.runs import Group, Run, is_number, label
from preflab.reports.statistics import envelopes
from utils import mean_and_error


def frontier_picture(groups: list[Group]) -> Figure | None:
    """Reward against KL: every sampled evaluation as a point, and for each loss its envelope, mean
    and range over seeds."""
    families: dict[str, list[Run]] = defaultdict(list)
    for group in groups:
        families[group.family] += [run for run in group.runs if run.frontier()]
    families = {name: runs for name, runs in families.items() if runs}
    if not families:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    (ax,) = new_axes(figure, 1, 1)
    furthest = max(p[0] for runs in families.values() for run in runs for p in run.frontier())
    grid = [furthest * i / 100 for i in range(101)]
    for i, (name, runs) in enumerate(families.items()):
        points = [p for run in runs for p in run.frontier()]
        ax.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            ".",
            color=style(i)["color"],
            alpha=0.35,
            markersize=5,
        )
        seeds = ((kl, best) for kl, *best in zip(grid, *envelopes(runs, grid).values()))
        at = [
            (kl, best) for kl, best in seeds if None not in best
        ]  # as far as all seeds go, or the mean would jump
        ax.plot(
            [kl for kl, _ in at],
            [mean_and_error(best)[0] for _, best in at],
            **style(i),
            linewidth=1.8,
            label=name,
        )
        ax.fill_between(
            [kl for kl, _ in at],
            [min(best) for _, best in at],
            [max(best) for _, best in at],
            color=style(i)["color"],
            alpha=0.15,
            linewidth=0,
        )
    label_line(
        ax,
        "reward against KL; lines: best reward within a KL, mean over seeds",
        KL_LABEL,
        "reward of samples",
    )
    return figure


OVER_TIME = [  # title, unit, split, metric
    ("reward of samples", "reward", "eval", "samples_eval/policy_reward"),
    ("KL of samples", "nats", "eval", "samples_eval/kl"),
    ("held-out accuracy", "share of pairs", "eval", "rewards_eval/accuracies"),
    ("length of samples", "tokens", "eval", "samples_eval/policy_length"),
    ("log-ratio of chosen", "log pi - log ref (nats)", "eval", "logratios_eval/chosen"),
    ("log-ratio of rejected", "log pi - log ref (nats)", "eval", "logratios_eval/rejected"),
]


def bands_picture(groups: list[Group]) -> Figure | None:
    """Evaluations over time: a line a group, its mean over seeds, with a band of one standard
    error."""
    panels = [
        panel
        for panel in OVER_TIME
        if any(run.series(*panel[2:])[0] for group in groups for run in group.runs)
    ]
    if not panels:
        return None
    n_rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 3.1 * n_rows), layout="constrained")
    axes = new_axes(figure, n_rows, 2)
    for ax, (title, unit, split, name) in zip(axes, panels):
        for i, group in enumerate(groups):
            values = defaultdict(list)
            for run in group.runs:
                for x, y in zip(*run.series(split, name)):
                    values[x].append(y)
            points = [(x, *mean_and_error(values[x])) for x in sorted(values)]
            ax.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                **style(i),
                marker=".",
                linewidth=1.4,
            )
            ax.fill_between(
                [p[0] for p in points],
                [p[1] - (p[2] or 0) for p in points],
                [p[1] + (p[2] or 0) for p in points],
                color=style(i)["color"],
                alpha=0.15,
                linewidth=0,
            )
        label_line(ax, title, "examples", unit)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    legend_below(figure, [group.name for group in groups])
    return figure


def length_picture(groups: list[Group]) -> Figure | None:
    """Sample length against reward, a point a sample, with the mean of each sixth of the
    samples."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    (ax,) = new_axes(figure, 1, 1)
    drawn = []
    for i, group in enumerate(groups):
        points = sorted(
            (row["policy_tokens"], next(iter(row["policy_reward"].values())))
            for run in group.runs
            for row in run.samples()
            if row.get("policy_reward") and is_number(row.get("policy_tokens"))
        )
        if len(points) < 2:
            continue
        drawn.append(group.name)
        shown = points[:: max(1, len(points) // 300)]
        ax.plot(
            [p[0] for p in shown],
            [p[1] for p in shown],
            ".",
            color=style(i)["color"],
            alpha=0.2,
            markersize=4,
        )
        sixths = [
            part
            for part in (
                points[len(points) * k // 6 : len(points) * (k + 1) // 6] for k in range(6)
            )
            if part
        ]
        ax.plot(
            *zip(*([mean_and_error(column)[0] for column in zip(*part)] for part in sixths)),
            **style(i),
            marker="o",
            markersize=4,
            label=group.name,
        )
    label_line(
        ax, "reward of samples against their length; lines: means of sixths", "tokens", "reward"
    )
    return figure if drawn else None


def training_name(row: dict) -> str:
    """What a row of eval.jsonl is of: the loss it was trained with, or where it lies."""
    loss = (row.get("training") or {}).get("loss") or {}
    if not loss.get("name"):
        return str(row.get("name"))
    return label(
        {
            "loss.name": loss["name"],
            **({"loss.beta": str(loss["beta"])} if loss.get("beta") is not None else {}),
        }
    )


def temperature_picture(evaluations: list[dict], winrates: list[dict]) -> Figure | None:
    """Reward, KL and win rate against temperature: a line for each trained loss, its mean over
    checkpoints with standard errors."""
    names = {row["checkpoint"]: training_name(row) for row in evaluations}
    panels = []
    for title, unit, key in (
        ("reward of samples", "reward", "samples_eval/policy_reward"),
        ("length of samples", "tokens", "samples_eval/policy_length"),
    ):
        panels.append(
            (
                title,
                unit,
                [
                    (training_name(row), row["temperature"], row[key])
                    for row in evaluations
                    if is_number(row.get(key))
                ],
            )
        )
    for against in dict.fromkeys((rate["against"], rate["by"]) for rate in winrates):
        points = [
            (
                names.get(rate.get("checkpoint"), str(rate.get("checkpoint"))),
                rate["temperature"],
                rate["win_rate"],
            )
            for rate in winrates
            if (rate["against"], rate["by"]) == against and is_number(rate.get("win_rate"))
        ]
        panels.insert(
            0, (f"win rate against {short(against[0])}", f"by {against[1]}; a tie is 1/2", points)
        )
    panels = [panel for panel in panels if len({t for _, t, _ in panel[2]}) > 1]
    if not panels:
        return None
    figure = Figure(
        figsize=(5 * min(2, len(panels)), 3.4 * math.ceil(len(panels) / 2)), layout="constrained"
    )
    axes = new_axes(figure, math.ceil(len(panels) / 2), min(2, len(panels)))
    families = list(dict.fromkeys(name for *_, points in panels for name, *_ in points))
    for ax, (title, unit, points) in zip(axes, panels):
        for i, name in enumerate(families):
            at = defaultdict(list)
            for family, t, value in points:
                if family == name:
                    at[t].append(value)
            line = [(t, *mean_and_error(at[t])) for t in sorted(at)]
            if line:
                ax.errorbar(
                    [p[0] for p in line],
                    [p[1] for p in line],
                    yerr=[p[2] or 0 for p in line],
                    **style(i),
                    marker="o",
                    markersize=4,
                    capsize=2,
                )
        label_line(ax, title, "temperature", unit)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    legend_below(figure, families)
    return figure


def checkpoints_picture(evaluations: list[dict]) -> Figure | None:
    """Of an evaluation of checkpoints, at each temperature: reward over steps, and against KL."""
    rows = [row for row in evaluations if is_number(row.get("samples_eval/policy_reward"))]
    if not rows:
        return None
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = new_axes(figure, 1, 2)
    families = defaultdict(list)
    for row in rows:
        families[training_name(row), row.get("run"), row["temperature"]].append(row)
    several = len({t for *_, t in families}) > 1
    names = [f"{name}, T={t:g}" if several else name for name, _, t in families]
    shown = list(dict.fromkeys(names))
    for name, members in zip(names, families.values()):
        look = style(shown.index(name)) | {"marker": "o", "markersize": 4}
        members = sorted(members, key=lambda row: row.get("step") or 0)
        if all("step" in row for row in members):
            left.plot(
                [row["step"] for row in members],
                [row["samples_eval/policy_reward"] for row in members],
                **look,
            )
        right.plot(
            [row.get("samples_eval/kl") for row in members],
            [row["samples_eval/policy_reward"] for row in members],
            **look,
        )
    label_line(left, "reward over training", "steps", "reward of samples")
    label_line(right, "reward against KL", KL_LABEL, "reward of samples")
    legend_below(figure, shown)
    return figure
