"""Over-optimisation: how the gain in reward rises, and falls, with the distance from the start.

With d = sqrt(KL), Gao et al. 2022 (arXiv 2210.10760) describe the gain in gold reward over the
start as d (a - b log d) for a policy that was trained, and as d (a - b d) for the best of n
samples. Rafailov et al. 2024 (arXiv 2406.02900) find the first form for DPO, IPO and SLiC as well,
over all betas and checkpoints of a loss. It has its peak at d = exp(a/b - 1), the second at
d = a / (2 b), if b is above 0.

Both forms are linear in a and b. Least squares for each prompt and seed therefore give a table of
either, whose means are the fit to the means, and every interval is one over seeds and prompts. The
interval of the peak consists of the KLs at which the slope is neither above nor below 0 with a
confidence of 95% (Fieller's argument). It is open where the data do not reach far enough.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from preflab.reports.statistics import Estimate, intervals_of, over_seeds, over_seeds_and_prompts

FEWEST_POINTS = 3
N_GRID = 101  # KLs at which the slope is looked at


@dataclass(frozen=True)
class Form:
    """A form that is linear in a and b. basis: d -> what multiplies a and b in the gain. slope: the
    same of its derivative by d. peak: (a, b) -> the d of the peak, for b above 0."""

    text: str
    basis: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]
    peak: Callable[[float, float], float]


TRAINED = Form(
    "d (a - b log d)",
    basis=lambda d: np.stack([d, -d * np.log(d)], axis=-1),
    slope=lambda d: np.stack([np.ones_like(d), -1 - np.log(d)], axis=-1),
    peak=lambda a, b: math.exp(min(a / b - 1, 300.0)),
)
BEST_OF_N = Form(
    "d (a - b d)",
    basis=lambda d: np.stack([d, -d * d], axis=-1),
    slope=lambda d: np.stack([np.ones_like(d), -2 * d], axis=-1),
    peak=lambda a, b: a / (2 * b),
)


@dataclass(frozen=True)
class Points:
    """What one seed has measured. kls: (points,), in nats. gains: (points, prompts), over the
    start. prompts: their texts; a single one where only means are known."""

    kls: np.ndarray
    gains: np.ndarray
    prompts: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Fit:
    """A form with its coefficients, as tables (seeds, prompts); one column of means where the seeds
    have different prompts. low, high: the KLs between which something was measured. error: root
    mean square of the distance of the points from the curves of their seeds."""

    form: Form
    a: np.ndarray
    b: np.ndarray
    low: float
    high: float
    error: float

    def estimates(self) -> tuple[Estimate, Estimate]:
        """a and b, with their intervals."""
        return _estimate(self.a), _estimate(self.b)

    def gain(self, kls: np.ndarray | float) -> np.ndarray:
        """The fitted gain at some KLs above 0."""
        return self.form.basis(np.sqrt(np.asarray(kls, float))) @ [self.a.mean(), self.b.mean()]

    def slope(self, kl: float) -> Estimate:
        """The slope of the gain over d at a KL: below 0 behind the peak."""
        of_a, of_b = self.form.slope(np.sqrt(np.array(kl)))
        return _estimate(of_a * self.a + of_b * self.b)

    @property
    def peak(self) -> float | None:
        """The KL of the highest gain, wherever it is; None where b is not above 0."""
        a, b = float(self.a.mean()), float(self.b.mean())
        if b <= 0 or self.form.peak(a, b) <= 0:
            return None
        return self.form.peak(a, b) ** 2

    def peak_interval(self) -> tuple[float | None, float | None] | None:
        """The 95% interval of the KL of the peak. An end is None where the gain is not seen to rise
        before, or to fall behind: the interval is open there. Where the gain still rises at the
        largest KL, that is the lower end, and where it falls from the smallest on, that is the
        upper. None for two seeds, and where b is not above 0."""
        if self.peak is None:
            return None
        kls = np.geomspace(self.low, self.high, N_GRID)
        weights = self.form.slope(np.sqrt(kls))
        slopes = weights[:, :1, None] * self.a + weights[:, 1:, None] * self.b
        ends = intervals_of(slopes)
        if ends is None:
            return None
        rises, falls = np.flatnonzero(ends[0] > 0), np.flatnonzero(ends[1] < 0)
        low = _crossing(kls, ends[0], int(rises[-1])) if len(rises) else None
        high = _crossing(kls, ends[1], int(falls[0]) - 1) if len(falls) else None
        return low, high


def _crossing(kls: np.ndarray, values: np.ndarray, i: int) -> float:
    """Where values fall through 0 between point i and the next, or the first or last point."""
    if not 0 <= i < len(kls) - 1:
        return float(kls[max(i, 0)])
    share = values[i] / (values[i] - values[i + 1])
    return float(kls[i] + share * (kls[i + 1] - kls[i]))


def _estimate(table: np.ndarray) -> Estimate:
    if table.shape[1] == 1:
        return over_seeds(table[:, 0])
    return over_seeds_and_prompts(table)


def fit(form: Form, seeds: Sequence[Points]) -> Fit | None:
    """The fit to the points of all seeds; None where a seed has fewer than three with a KL above 0.

    Seeds that share their prompts are fitted prompt by prompt, others by their means.
    """
    seeds = [_moved(points) for points in seeds]
    if not seeds or any(len(np.unique(points.kls)) < FEWEST_POINTS for points in seeds):
        return None
    shared = len({points.prompts for points in seeds}) == 1
    tables, residuals = [], []
    for points in seeds:
        basis = form.basis(np.sqrt(points.kls))
        means = points.gains.mean(1, keepdims=True)
        inverse = np.linalg.pinv(basis)
        tables.append(inverse @ (points.gains if shared else means))
        residuals.append((means - basis @ (inverse @ means)).ravel())
    kls = np.concatenate([points.kls for points in seeds])
    return Fit(
        form,
        np.stack([table[0] for table in tables]),
        np.stack([table[1] for table in tables]),
        float(kls.min()),
        float(kls.max()),
        float(np.sqrt(np.mean(np.concatenate(residuals) ** 2))),
    )


def _moved(points: Points) -> Points:
    """The points that have left the start, where the gain is 0 by definition."""
    is_moved = points.kls > 0
    return Points(points.kls[is_moved], points.gains[is_moved], points.prompts)
