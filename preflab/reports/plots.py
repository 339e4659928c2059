"""Pictures of one run."""

import math
from collections import defaultdict

from matplotlib.figure import Figure

from preflab.reports.plot_style import (
    COLOURS,
    KL_LABEL,
    label_line,
    legend_below,
    new_axes,
    smooth,
    style,
)
from preflab.reports.runs import Run, is_number
from utils import mean_and_error


def curves(run: Run) -> Figure | None:
    """Loss, accuracy, rewards, log-ratios, and what else the run logged, against examples."""
    panels = [("loss", "loss per example", [("loss/{}", "eval", "")])]
    panels += [
        (
            "accuracy of the implicit reward",
            "share of pairs",
            [("rewards_{}/accuracies", "eval", "")],
        )
    ]
    pair = [("/chosen", "chosen"), ("/rejected", "rejected")]
    panels += [
        (
            "implicit rewards",
            "beta x log-ratio",
            [(f"rewards_{{}}{end}", role, role) for end, role in pair],
        )
    ]
    panels += [
        (
            "log-ratios",
            "log pi - log ref (nats)",
            [(f"logratios_{{}}{end}", role, role) for end, role in pair],
        )
    ]
    panels += [
        (
            "KL along the data's responses",
            "nats",
            [(f"kl_{{}}{end}", role, role) for end, role in pair],
        )
    ]
    panels += [("gradient norm, before clipping", "norm", [("grad_norm", "train", "")])]
    panels = [
        p
        for p in panels
        if any(
            run.series(split, name.format(split))[0]
            for name, *_ in p[2]
            for split in ("train", "eval")
        )
    ]
    if not panels:
        return None
    n_rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 3.1 * n_rows), layout="constrained")
    axes = new_axes(figure, n_rows, 2)
    for ax, (title, unit, lines) in zip(axes, panels):
        for name, colour, role in lines:
            x, y = run.series("train", name.format("train"))
            ax.plot(x, y, color=COLOURS["train" if not role else colour], alpha=0.25, linewidth=0.8)
            ax.plot(
                x,
                smooth(y),
                color=COLOURS["train" if not role else colour],
                linewidth=1.2,
                label=f"{role} train".strip() if x else None,
            )
            x, y = run.series("eval", name.format("eval"))
            if x and name != "grad_norm":
                ax.plot(
                    x,
                    y,
                    color=COLOURS[colour],
                    marker="o",
                    markersize=4,
                    linewidth=1.5,
                    label=f"{role} eval".strip(),
                )
        label_line(ax, title, "examples", unit)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def reward_kl(run: Run) -> Figure | None:
    """Reward of the samples against examples, and against KL: the run's own frontier."""
    points = run.frontier()
    x, y = run.series("eval", "samples_eval/policy_reward")
    if not x:
        return None
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = new_axes(figure, 1, 2)
    for who in ("policy", "reference"):
        x, y = run.series("eval", f"samples_eval/{who}_reward")
        errors = run.series("eval", f"samples_eval/{who}_reward_se")[1]
        if x:
            bars = [1.96 * e for e in errors] if len(errors) == len(x) else None
            left.errorbar(
                x,
                y,
                yerr=bars,
                color=COLOURS[who],
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=1.5,
                label=who,
            )
    name = run.config.get("reward", {}).get("name", "reward")
    label_line(left, "reward of samples (bars: 95%)", "examples", name)
    if points:
        right.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            color=COLOURS["policy"],
            marker="o",
            markersize=4,
            linewidth=1.2,
        )
        for kl, reward, examples in (points[0], points[-1]):
            right.annotate(
                f"{examples:,}",
                (kl, reward),
                textcoords="offset points",
                xytext=(6, -10),
                fontsize=8,
            )
        label_line(
            right,
            "reward against KL, labelled by examples",
            "KL(policy || reference) of samples (nats)",
            name,
        )
    else:
        right.set_visible(False)
    return figure


def data_picture(run: Run) -> Figure | None:
    """Histograms of prompt and response lengths and score gaps, train and test."""
    names = [
        n
        for n in ("prompt_tokens", "response_tokens", "score_gap")
        if any(n in s.get("histograms", {}) for s in run.data.values())
    ]
    if not names:
        return None
    units = {
        "prompt_tokens": "tokens of a prompt",
        "response_tokens": "tokens of a response",
        "score_gap": "score gap of a pair",
    }
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for ax, name in zip(new_axes(figure, 1, len(names)), names):
        for split, colour in (("train", "train"), ("test", "eval")):
            h = run.data.get(split, {}).get("histograms", {}).get(name)
            if h:
                total = sum(h["counts"]) or 1
                ax.stairs(
                    [c / total for c in h["counts"]],
                    h["edges"],
                    color=COLOURS[colour],
                    label=split,
                    fill=split == "train",
                    alpha=0.7,
                )
        label_line(ax, units[name], units[name], "share")
    return figure


ONLINE = [  # panels of online_picture: x, y, title and axes
    ("round", "online/gold_reward", "gold reward of the rollouts", "round", "gold reward"),
    (
        "online/labels_bought",
        "online/gold_reward",
        "gold reward against labels bought",
        "gold labels bought",
        "gold reward",
    ),
    ("online/kl", "online/gold_reward", "gold reward against KL", KL_LABEL, "gold reward"),
    (
        "round",
        "online/label_accuracy",
        "labels that gold agrees with, on the round's pairs",
        "round",
        "share of pairs",
    ),
]


def online_picture(named: dict[str, list[Run]]) -> Figure | None:
    """Rounds of online runs: a line a name, the mean of its runs at each round, smoothed over ten
    of them."""
    means: dict[str, dict[str, list[float]]] = {}
    for name, runs in named.items():
        rows = defaultdict(lambda: defaultdict(list))
        for row in (row for run in runs for row in run.rows if row.get("split") == "online"):
            for key in {x for x, *_ in ONLINE} | {y for _, y, *_ in ONLINE}:
                if is_number(row.get(key)):
                    rows[row["round"]][key].append(row[key])
        means[name] = {
            key: [mean_and_error(rows[r][key])[0] for r in sorted(rows)]
            for key in {key for of_round in rows.values() for key in of_round}
        }
    panels = [
        panel for panel in ONLINE if any({panel[0], panel[1]} <= of.keys() for of in means.values())
    ]
    if not panels:
        return None
    n_rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 3.3 * n_rows), layout="constrained")
    axes = new_axes(figure, n_rows, 2)
    for ax, (x, y, title, x_label, y_label) in zip(axes, panels):
        for i, of in enumerate(means.values()):
            points = [
                (a, b)
                for a, b in zip(of.get(x, ()), of.get(y, ()))
                if a is not None and b is not None
            ]
            if x == "online/labels_bought" and len({a for a, _ in points}) == 1:
                points = points[-1:]  # bought once, before all rounds
            values = smooth([b for _, b in points])
            ax.plot(
                [a for a, _ in points],
                values,
                **style(i),
                linewidth=1.4,
                marker="o" if len(points) == 1 else None,
            )
        label_line(ax, title, x_label, y_label)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    if len(means) > 1:
        legend_below(figure, list(means))
    return figure
