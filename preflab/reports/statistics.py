"""Intervals and envelopes of numbers from several seeds."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from preflab.reports.runs import Run
from utils import mean_and_error

BOOTSTRAP = 10_000


def bootstrap(values: Iterable[float], seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """95% percentile interval of the mean, from 10,000 resamples; None for less than two values.
    Coarse for a few seeds."""
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        return None, None
    picks = np.random.default_rng(seed).integers(0, len(values), (BOOTSTRAP, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def paired_difference(ours: dict[str, float], theirs: dict[str, float]) -> dict | None:
    """Of two groups, over the seeds that both have: mean difference, its standard error, bootstrap
    interval and seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if not differences:
        return None
    mean, error = mean_and_error(differences)
    low, high = bootstrap(differences)
    return {"mean": mean, "se": error, "low": low, "high": high, "seeds": len(seeds)}


def envelope(points: Iterable[tuple[float, float]], at: Iterable[float]) -> list[float | None]:
    """The best reward reached at each KL of `at`, from (KL, reward) points.

    The running maximum of the reward over KL, linear between points; None outside of the points'
    KL.
    """
    points = sorted(points)
    if not points:
        return [None for _ in at]
    kl = np.array([p[0] for p in points])
    best = np.maximum.accumulate([p[1] for p in points])
    return [float(np.interp(x, kl, best)) if kl[0] <= x <= kl[-1] else None for x in at]


def envelopes(runs: list[Run], at: Iterable[float]) -> dict[str, list[float | None]]:
    """The envelope of each seed, over all checkpoints of all its runs."""
    at, points = list(at), defaultdict(list)
    for run in runs:
        points[str(run.seed)] += [p[:2] for p in run.frontier()]
    return {seed: envelope(found, at) for seed, found in points.items() if found}
