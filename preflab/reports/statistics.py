"""Confidence intervals and reward-KL envelopes over seeds."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from preflab.reports.runs import Run
from utils import mean_and_error

N_RESAMPLES = 10_000


def bootstrap(values: Iterable[float], seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """95% percentile bootstrap interval of the mean; (None, None) for fewer than two values.

    The interval is coarse, and too narrow, for a handful of seeds.
    """
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        return None, None
    picks = np.random.default_rng(seed).integers(0, len(values), (N_RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def paired_difference(ours: dict[str, float], theirs: dict[str, float]) -> dict | None:
    """The difference `ours - theirs` over the seeds that both have: its mean, standard error,
    bootstrap interval and number of seeds. None if they have no seed in common.

    Both map a seed to a value. Pairing removes the variance that the two share through the seed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if not differences:
        return None
    mean, error = mean_and_error(differences)
    low, high = bootstrap(differences)
    return {"mean": mean, "se": error, "low": low, "high": high, "seeds": len(seeds)}


def envelope(points: Iterable[tuple[float, float]], kls: Iterable[float]) -> list[float | None]:
    """The best reward within each KL of `kls`, from (KL, reward) points.

    It is the running maximum of the reward over KL, linear between points, and None outside the KL
    range of the points.
    """
    points = sorted(points)
    if not points:
        return [None for _ in kls]
    kl = np.array([x for x, _ in points])
    best = np.maximum.accumulate([reward for _, reward in points])
    return [float(np.interp(x, kl, best)) if kl[0] <= x <= kl[-1] else None for x in kls]


def envelopes(runs: list[Run], kls: Iterable[float]) -> dict[str, list[float | None]]:
    """The envelope of each seed over all evaluations of all its runs."""
    kls = list(kls)
    points = defaultdict(list)
    for run in runs:
        points[str(run.seed)] += [(kl, reward) for kl, reward, _ in run.frontier()]
    return {seed: envelope(of_seed, kls) for seed, of_seed in points.items() if of_seed}
