"""Pictures from run folders, for report.html and as PNG and SVG."""

import io
import math
from collections import defaultdict

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from runs import Group, Run, envelopes, is_number, label
from utils import mean_and_error

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


def _axes(figure: Figure, rows: int, columns: int) -> list:
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.tick_params(labelsize=9)
    return axes


def _label(ax, title: str, x: str, y: str) -> None:
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
    axes = _axes(figure, n_rows, 2)
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
        _label(ax, title, "examples", unit)
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
    left, right = _axes(figure, 1, 2)
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
    _label(left, "reward of samples (bars: 95%)", "examples", name)
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
        _label(
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
    for ax, name in zip(_axes(figure, 1, len(names)), names):
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
        _label(ax, units[name], units[name], "share")
    return figure


# ------------------------------------------------------------------------------------- several runs


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
    (ax,) = _axes(figure, 1, 1)
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
    _label(
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
    axes = _axes(figure, n_rows, 2)
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
        _label(ax, title, "examples", unit)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    _legend_below(figure, [group.name for group in groups])
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
    axes = _axes(figure, n_rows, 2)
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
        _label(ax, title, x_label, y_label)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    if len(means) > 1:
        _legend_below(figure, list(means))
    return figure


def length_picture(groups: list[Group]) -> Figure | None:
    """Sample length against reward, a point a sample, with the mean of each sixth of the
    samples."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    (ax,) = _axes(figure, 1, 1)
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
    _label(ax, "reward of samples against their length; lines: means of sixths", "tokens", "reward")
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
            0, (f"win rate against {_short(against[0])}", f"by {against[1]}; a tie is 1/2", points)
        )
    panels = [panel for panel in panels if len({t for _, t, _ in panel[2]}) > 1]
    if not panels:
        return None
    figure = Figure(
        figsize=(5 * min(2, len(panels)), 3.4 * math.ceil(len(panels) / 2)), layout="constrained"
    )
    axes = _axes(figure, math.ceil(len(panels) / 2), min(2, len(panels)))
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
        _label(ax, title, "temperature", unit)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    _legend_below(figure, families)
    return figure


def checkpoints_picture(evaluations: list[dict]) -> Figure | None:
    """Of an evaluation of checkpoints, at each temperature: reward over steps, and against KL."""
    rows = [row for row in evaluations if is_number(row.get("samples_eval/policy_reward"))]
    if not rows:
        return None
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = _axes(figure, 1, 2)
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
    _label(left, "reward over training", "steps", "reward of samples")
    _label(right, "reward against KL", KL_LABEL, "reward of samples")
    _legend_below(figure, shown)
    return figure


def _short(text: str, n: int = 40) -> str:
    return text if len(text) <= n else "…" + text[1 - n :]


def _legend_below(figure: Figure, names: list[str]) -> None:
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
