"""Why log-probs moved as they did: pushes of the loss, displacement, entropy and length of a run.

A push is minus dL/dlogp, the mean over pairs; see `preflab.objective.pushes`.
"""

from collections.abc import Sequence
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from preflab.reports.plot_style import COLORS, label_axes, panel_grid, smooth, unlisted
from preflab.reports.runs import Group, Run
from preflab.reports.tables import Table, plus_minus

SIDES = ("chosen", "rejected")
EQUAL = 0.05  # pushes whose ratio is this close to 1 are called equal
STILL = 0.05  # nats; a change within it is called none

Series = tuple[list, list]  # (examples, values)

FROM_ZERO = ("ratio of sizes", "share")  # axes of the figure

# What a side of a report's rows is measured by: the first that a run has, with its name. Log-ratios
# are those to the reference; the others are changes since the first evaluation.
DISPLACEMENT = (
    ("logratios_eval", "log-ratio", False),
    ("logps_eval", "log-prob", True),
    ("rewards_eval", "reward", True),
)

METRICS = {  # row of the table -> (split, metric)
    "push on the chosen response": ("train", "push_train/chosen"),
    "push on the rejected response": ("train", "push_train/rejected"),
    "push on a response": ("train", "push_train/all"),
    "size of the rejected push over the chosen one": ("train", "push_train/ratio"),
    "share of the examples that carry it": ("train", "push_train/share"),
    "entropy at a chosen token (nats)": ("eval", "entropy_eval/chosen"),
    "entropy at a rejected token (nats)": ("eval", "entropy_eval/rejected"),
    "entropy at a token of the samples (nats)": ("eval", "samples_eval/entropy"),
    "tokens of a sample": ("eval", "samples_eval/policy_length"),
}

NOTE = (
    "Push: minus dL/dlogp, the mean over the examples of a step; above 0 it raises a log-prob."
    " Share: 1 where all examples are pushed alike, k/n where k of n are. First and last: means"
    " over a tenth of the steps, or one evaluation."
)


def displacement(run: Run) -> tuple[str, dict[str, Series]]:
    """What the sides are measured by, such as `log-ratio`, and its series in evaluations by side.

    A loss without a reference has the change of its log-probs since the first evaluation, over the
    same examples: the log-ratio to the policy at that time.
    """
    for metric, name, is_change in DISPLACEMENT:
        series = {side: run.series("eval", f"{metric}/{side}") for side in SIDES}
        series = {side: of_side for side, of_side in series.items() if of_side[0]}
        if is_change:
            series = {
                side: (examples, [value - values[0] for value in values])
                for side, (examples, values) in series.items()
                if len(values) > 1
            }
        if series:
            return name, series
    return "", {}


def _first_and_last(split: str, values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    n = max(1, len(values) // 10) if split == "train" else 1
    return fmean(values[:n]), fmean(values[-n:])


def _ends(run: Run, label: str) -> tuple[float, float] | None:
    split, metric = METRICS[label]
    return _first_and_last(split, run.series(split, metric)[1])


# --------------------------------------------------------------------------------- in a sentence


def why(run: Run) -> str | None:
    """A sentence on how the two sides moved and what the loss did to them; None where a run has no
    pushes, or no two sides."""
    pushes = {side: run.series("train", f"push_train/{side}")[1] for side in SIDES}
    name, series = displacement(run)
    if not pushes["chosen"] or "chosen" not in series:
        return None
    moved = {side: values[-1] for side, (_, values) in series.items()}
    push = {side: fmean(values) for side, values in pushes.items() if values}
    ratios = run.series("train", "push_train/ratio")[1]
    # The median, because a step with a tiny chosen push has a huge ratio.
    reason = _reason(moved, push, median(ratios) if ratios else None)
    return f"{_movement(name, moved)}: {reason}{_remaining(run)}."


def _movement(name: str, moved: dict[str, float]) -> str:
    unit = "" if name == "reward" else " nats"
    words = {
        side: "hardly moves" if abs(value) < STILL else "rises" if value > 0 else "falls"
        for side, value in moved.items()
    }
    if len(moved) == 1:
        return f"The {name} of chosen responses {words['chosen']} ({moved['chosen']:+.2f}{unit})"
    both = f"chosen {moved['chosen']:+.2f}, rejected {moved['rejected']:+.2f}{unit}"
    if len(set(words.values())) == 1:
        verb = {"rises": "rise", "falls": "fall"}.get(words["chosen"], "hardly move")
        return f"Both {name}s {verb} ({both})"
    return f"The chosen {name} {words['chosen']} and the rejected one {words['rejected']} ({both})"


def _reason(moved: dict[str, float], push: dict[str, float], ratio: float | None) -> str:
    """What the loss does to the two sides, by their mean pushes over the steps."""
    if len(push) == 1 or not push["rejected"]:
        return f"the loss pushes chosen responses {_direction(push['chosen'])} and no others"
    directions = {side: _direction(value) for side, value in push.items()}
    if ratio is None:
        return f"the loss pushes rejected responses {directions['rejected']} and no others"
    if abs(ratio - 1) <= EQUAL:
        size = "both sides get the same push"
    elif ratio > 1:
        size = f"the rejected side gets {ratio:.3g} times the push"
    elif ratio:
        size = f"the chosen side gets {1 / ratio:.3g} times the push"
    else:
        size = "in most steps the chosen side alone is pushed"
    if directions["chosen"] == directions["rejected"]:
        size += f", and both are pushed {directions['chosen']}"
    against = [
        side
        for side, value in moved.items()
        if abs(value) >= STILL and (value > 0) != (push[side] > 0)
    ]
    if against:
        size += f", and {' and '.join(against)} responses move against theirs"
        size += " because they share tokens and weights with the others"
    return size


def _direction(push: float) -> str:
    return "up" if push > 0 else "down"


def _remaining(run: Run) -> str:
    """How much push is there at the end, and how many examples carry it."""
    share = _ends(run, "share of the examples that carry it")
    sizes = [_ends(run, f"push on the {side} response") for side in SIDES]
    first, last = (sum(abs(ends[i]) for ends in sizes if ends) for i in (0, 1))
    if share is None or not first:
        return ""
    return f"; at the end {last / first:.0%} of the first push is there, on {share[1]:.0%} of pairs"


# --------------------------------------------------------------------------------- as a table


def why_table(run: Run) -> Table | None:
    """First and last values of what `why` is about, with its sentence; None without pushes."""
    if not any(run.series("train", f"push_train/{side}")[0] for side in (*SIDES, "all")):
        return None
    rows = [
        [label, *(plus_minus(value) for value in ends)]
        for label in METRICS
        if (ends := _ends(run, label))
    ]
    name, series = displacement(run)
    moved = [
        [f"{side} {name}", *(plus_minus(value) for value in (values[0], values[-1]))]
        for side, (_, values) in series.items()
    ]
    return Table(
        title="Why",
        head=["", "first", "last"],
        rows=moved + rows,
        notes=[text for text in (why(run), NOTE) if text],
    )


def why_of_groups(groups: list[Group]) -> Table | None:
    """The last values by group, means over seeds; None where no run has pushes."""
    rows: list[list] = []
    names: set[str] = set()
    for group in groups:
        named = [displacement(run) for run in group.runs]
        names |= {name for name, _ in named if name}
        moved = [series for _, series in named]
        cells = [
            _mean([series[side][1][-1] for series in moved if side in series]) for side in SIDES
        ]
        ends = ([_ends(run, label) for run in group.runs] for label in METRICS)
        cells += [_mean([last[1] for last in of_runs if last]) for of_runs in ends]
        rows.append([group.name, *cells])
    unit = _unit(names)
    heads = ["", *(f"{side} displacement{unit and f' ({unit})'}" for side in SIDES), *METRICS]
    seen = [any(row[i] is not None for row in rows) for i in range(len(heads))]
    first_push = 1 + len(SIDES)
    if not any(seen[first_push : first_push + 3]):
        return None

    def shown(row: list) -> list:
        return [cell for cell, is_seen in zip(row, seen, strict=True) if is_seen]

    return Table(
        title="Why: at the end of training, means over seeds",
        head=shown(heads),
        rows=[
            shown([cell if isinstance(cell, str) else plus_minus(cell) for cell in row])
            for row in rows
        ],
        notes=[
            NOTE,
            "Displacement: of held-out responses, to the reference; for losses without one, since"
            " the first evaluation.",
        ],
    )


def _unit(names: set[str]) -> str:
    """The unit of displacements by these names: rewards of a scalar head have none."""
    return "" if "reward" in names else "nats"


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


# --------------------------------------------------------------------------------- as a figure


def why_figure(run: Run) -> Figure | None:
    """Pushes, their ratio and share, displacement, entropy and length over training examples."""
    name, moved = displacement(run)
    both = [*SIDES, "all"]
    panels = [
        ("push: minus dL/dlogp", "mean over pairs", _of(run, "push", both)),
        ("rejected push over chosen push", "ratio of sizes", _of(run, "push", ["ratio"])),
        ("share of the examples that carry the push", "share", _of(run, "push", ["share"])),
        (f"displacement: {name}", _unit({name}), {(side, "eval"): s for side, s in moved.items()}),
        ("entropy at the tokens of the data", "nats a token", _of(run, "entropy", both)),
        ("entropy of samples", "nats a token", _samples(run, "entropy")),
        ("length of samples", "tokens", _samples(run, "policy_length")),
    ]
    panels = [panel for panel in panels if any(examples for examples, _ in panel[2].values())]
    if not any(title.startswith("push") for title, *_ in panels):
        return None
    figure, axes = panel_grid(len(panels), row_height=2.8)
    for ax, (title, y_label, series) in zip(axes, panels, strict=True):
        for (role, split), (examples, values) in series.items():
            if examples:
                _draw(ax, role, split, examples, values)
        if y_label in FROM_ZERO:
            ax.set_ylim(bottom=0)
        label_axes(ax, title, "examples", y_label)
    return figure


def _of(run: Run, metric: str, roles: list[str]) -> dict[tuple[str, str], Series]:
    return {
        (role, split): run.series(split, f"{metric}_{split}/{role}")
        for role in roles
        for split in ("train", "eval")
    }


def _samples(run: Run, metric: str) -> dict[tuple[str, str], Series]:
    return {("policy", "eval"): run.series("eval", f"samples_eval/{metric}")}


def _draw(ax: Axes, role: str, split: str, examples: list, values: list) -> None:
    """Training steps pale under their moving average, evaluations as points."""
    color = COLORS.get(role, COLORS[split])
    label = f"{role} {split}" if role in COLORS else split
    if split == "train":
        raw = unlisted(label, "raw")
        ax.plot(examples, values, color=color, alpha=0.25, linewidth=0.8, label=raw)
        ax.plot(examples, smooth(values), color=color, linewidth=1.2, label=label)
    else:
        ax.plot(examples, values, color=color, marker="o", markersize=4, linewidth=1.5, label=label)
