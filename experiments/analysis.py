"""What the experiments compute from runs, and how they print it."""

from collections.abc import Iterable

from preflab.reports.runs import Run, differing_settings, group_runs
from preflab.reports.selection import envelopes
from preflab.reports.statistics import paired_difference
from utils import mean_and_error

AT_KL = (0.25, 0.5, 1.0, 1.5, 2.0)


def mean(values: Iterable[float]) -> float:
    return mean_and_error(values)[0]


def select_runs(runs: list[Run], **settings) -> dict[int, Run]:
    """The runs with these settings (loss.beta as loss_beta), by seed."""
    required = {key.replace("_", ".", 1): str(value) for key, value in settings.items()}
    return {
        run.seed: run
        for run in runs
        if all(run.setting(key) == value for key, value in required.items())
    }


def frontiers(runs: list[Run]) -> dict[int, list[float | None]]:
    """The envelope of each seed at `AT_KL`, over betas and evaluations, chosen on the dev prompts
    and read on the test prompts."""
    by_seed = envelopes(runs, AT_KL)
    return {seed: by_seed[str(seed)] for seed in sorted({run.seed for run in runs})}


def difference(ours: list[Run], theirs: list[Run], at=(0.5, 1.0, 1.5)) -> dict:
    """The difference between two envelopes, by seed and its mean. It is the mean over the KLs of
    `at`, of seeds in which both envelopes reach all of them."""
    a, b = frontiers(ours), frontiers(theirs)
    columns = [AT_KL.index(kl) for kl in at]
    by_seed = {}
    for seed in a.keys() & b.keys():
        both = [(a[seed][i], b[seed][i]) for i in columns]
        if not any(None in pair for pair in both):
            by_seed[str(seed)] = sum(x - y for x, y in both) / len(both)
    result = paired_difference(by_seed, dict.fromkeys(by_seed, 0.0))
    return (result or {"mean": float("nan"), "se": None}) | {"by_seed": by_seed}


def difference_text(d: dict) -> str:
    """Mean [95% t interval over seeds] (each seed)."""
    seeds = ", ".join(f"{value:+.3f}" for value in d["by_seed"].values())
    return f"{d['mean']:+.3f}{interval_text(d)} ({seeds})"


def interval_text(d: dict, digits: int = 3) -> str:
    """` [low, high]`, the 95% interval over seeds; empty where fewer than three leave none."""
    if d.get("low") is None:
        return ""
    return f" [{d['low']:+.{digits}f}, {d['high']:+.{digits}f}]"


def envelope_text(by_seed: dict[int, list]) -> str:
    """The mean over seeds of each column; - where no seed has a value."""
    cells = []
    for column in zip(*by_seed.values(), strict=True):
        values = [value for value in column if value is not None]
        cells.append(f"{mean(values):.3f}" if values else "-")
    return ", ".join(cells)


def picture_of(runs: list[Run], draw):
    """The picture that `draw` makes of the runs, grouped by the settings in which they differ."""
    return draw(group_runs(runs, differing_settings(runs)))
