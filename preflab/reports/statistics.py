"""Intervals over seeds, prompts and samples, and reward-KL envelopes.

docs/evaluation.md says in words what each interval generalises over.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preflab.reports.distributions import t_cdf, t_quantile
from utils import mean_and_error

CONFIDENCE = 0.95
Z = 1.959963984540054  # of the normal distribution, two-sided 95%

# With fewer seeds there is no interval: two leave a t interval 13 times the standard error.
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Spread:
    """Variances of a value: between seeds, between prompts, and of a prompt within a seed."""

    seed: float
    prompt: float = 0.0
    rest: float = 0.0

    def error(self, seeds: int, prompts: int) -> tuple[float, float]:
        """The standard error of a mean over so many seeds and prompts, and the degrees of freedom
        with which it would be estimated. prompts: 0 for means over seeds alone."""
        if not prompts:
            return math.sqrt(self.seed / seeds), seeds - 1.0
        of_seeds = self.seed / seeds + self.rest / (seeds * prompts)
        of_prompts = self.prompt / prompts
        total = of_seeds**2 + of_prompts**2
        share = np.array(of_prompts**2 / total if total else 0.0)
        return math.sqrt(of_seeds + of_prompts), float(_mixed_df(share, seeds - 1.0, prompts - 1.0))


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval.

    se, df: its standard error and the degrees of freedom of that; None for one value. low, high:
    None for two seeds, whose `least` and `greatest` value are given instead. seeds, prompts: how
    many; `prompts` is 0 where the interval is over seeds alone, which holds the prompts fixed.
    spread: estimated from two seeds or more.
    """

    mean: float
    se: float | None
    df: float | None
    low: float | None
    high: float | None
    seeds: int
    prompts: int
    least: float
    greatest: float
    spread: Spread | None = None

    @property
    def over(self) -> str:
        """What the interval, or the range, is over."""
        parts = ["seeds"] * (self.seeds > 1) + ["prompts"] * bool(self.prompts)
        return " and ".join(parts)


def over_seeds(values: Iterable[float]) -> Estimate | None:
    """The mean of one value for each seed, with Student's t interval; None without values."""
    values = [float(value) for value in values]
    if not values:
        return None
    mean, se = mean_and_error(values)
    n = len(values)
    df = n - 1.0 if n >= FEWEST_SEEDS else None
    spread = Spread(n * se**2) if se is not None else None
    return _estimate(mean, se, df, n, 0, values, spread)


def over_seeds_and_prompts(values: Sequence[Sequence[float]]) -> Estimate:
    """The mean of a table, (seeds, prompts), of seeds that share their prompts.

    Its interval is over both (`crossed`). With one seed it is over prompts, with two there is none.
    """
    table = np.asarray(values, float)
    n_seeds, n_prompts = table.shape
    of_seeds = table.mean(1).tolist()
    if n_prompts < 2:
        return over_seeds(of_seeds)
    if n_seeds == 1:
        mean, se = mean_and_error(table[0].tolist())
        return _estimate(mean, se, n_prompts - 1.0, 1, n_prompts, of_seeds)
    mean, se, df = (float(value) for value in crossed(table))
    df = df if n_seeds >= FEWEST_SEEDS else None
    seed, prompt, rest = (float(square) for square in components(table))
    spread = Spread(
        max(seed - rest, 0.0) / n_prompts, max(prompt - rest, 0.0) / n_seeds, max(rest, 0.0)
    )
    return _estimate(mean, se, df, n_seeds, n_prompts, of_seeds, spread)


def intervals_of(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The ends of the 95% intervals of the means of many tables, (..., seeds, prompts), each as
    `over_seeds_and_prompts` has it, or over seeds for a single prompt; None for two seeds and for a
    single value."""
    n_seeds, n_prompts = tables.shape[-2:]
    if n_seeds == 2 or n_seeds == n_prompts == 1:
        return None
    if n_seeds > 1 and n_prompts > 1:
        mean, se, df = crossed(tables)
        quantile = np.interp(1 / df, *_quantile_curve(n_seeds - 1.0, n_prompts - 1.0))
    else:
        n = n_seeds * n_prompts
        mean, se = tables.mean((-2, -1)), tables.std((-2, -1), ddof=1) / math.sqrt(n)
        quantile = t_quantile(0.5 + CONFIDENCE / 2, n - 1.0)
    return mean - quantile * se, mean + quantile * se


def _estimate(
    mean: float,
    se: float | None,
    df: float | None,
    seeds: int,
    prompts: int,
    of_seeds: list[float],
    spread: Spread | None = None,
) -> Estimate:
    half = None
    if se is not None and df is not None:
        half = float(t_quantile(0.5 + CONFIDENCE / 2, df)) * se
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Estimate(mean, se, df, low, high, seeds, prompts, min(of_seeds), max(of_seeds), spread)


def components(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean squares of seeds, of prompts, and of what is left, of tables (..., seeds, prompts).

    In a model with independent effects of seed and prompt they estimate P v_seed + v,
    S v_prompt + v, and v, which is the variance of a single value beside both effects.
    """
    n_seeds, n_prompts = table.shape[-2:]
    mean = table.mean((-2, -1), keepdims=True)
    seeds, prompts = table.mean(-1, keepdims=True), table.mean(-2, keepdims=True)
    of_seeds = n_prompts * ((seeds - mean) ** 2).sum((-2, -1)) / (n_seeds - 1)
    of_prompts = n_seeds * ((prompts - mean) ** 2).sum((-2, -1)) / (n_prompts - 1)
    rest = ((table - seeds - prompts + mean) ** 2).sum((-2, -1))
    return of_seeds, of_prompts, rest / ((n_seeds - 1) * (n_prompts - 1))


def crossed(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard error and degrees of freedom of tables (..., seeds, prompts), where both the
    seeds and the prompts are a sample.

    The variance of the mean is estimated from the mean squares (`components`) as that of seeds plus
    what prompts add, max(MS_prompts - MS_rest, 0), over S P. Its quantile is the mean of the t
    quantiles with S - 1 and P - 1 degrees of freedom, weighted by the squares of the two parts. It
    was chosen by simulation: with three seeds, Satterthwaite's degrees of freedom hold the truth in
    92% where seeds and prompts vary about equally, Cochran and Cox's weights in up to 97.5%, and
    these in 94.5 to 96.6%.
    """
    n_seeds, n_prompts = table.shape[-2:]
    of_seeds, of_prompts, rest = components(table)
    added = np.maximum(of_prompts - rest, 0.0)
    se = np.sqrt((of_seeds + added) / (n_seeds * n_prompts))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.nan_to_num(added**2 / (of_seeds**2 + added**2))
    return table.mean((-2, -1)), se, _mixed_df(share, n_seeds - 1.0, n_prompts - 1.0)


def _mixed_df(share: np.ndarray, few: float, many: float) -> np.ndarray:
    """The degrees of freedom whose t quantile is a mean of those of `few` and of `many`, with the
    weight `share` on the latter."""
    inverse, quantiles = _quantile_curve(few, many)
    of_few, of_many = quantiles[[-1, 0]] if few <= many else quantiles[[0, -1]]
    wanted = of_few + share * (of_many - of_few)
    return 1 / np.interp(wanted, quantiles, inverse)


@functools.lru_cache(maxsize=64)
def _quantile_curve(few: float, many: float) -> tuple[np.ndarray, np.ndarray]:
    """1 / df between two degrees of freedom, and the t quantiles, which are almost linear in it."""
    inverse = np.linspace(1 / max(few, many), 1 / min(few, many), 201)
    quantiles = t_quantile(0.5 + CONFIDENCE / 2, 1 / inverse)
    return inverse, quantiles


def p_value(estimate: Estimate, value: float = 0.0) -> float | None:
    """Of the two-sided t test of a mean against `value`; None where there is no interval."""
    if estimate.df is None or estimate.se is None:
        return None
    if estimate.se == 0:
        return 0.0 if estimate.mean != value else 1.0
    t = abs(estimate.mean - value) / estimate.se
    return float(2 * t_cdf(-t, estimate.df))


def paired_difference(ours: dict[str, float], theirs: dict[str, float]) -> dict | None:
    """The difference `ours - theirs` over the seeds that both have: its mean, standard error, 95% t
    interval (None for one seed or two), and number of seeds. None if they share no seed.

    Both map a seed to a value. Pairing removes the variance that the two share through the seed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    estimate = over_seeds(ours[seed] - theirs[seed] for seed in seeds)
    if estimate is None:
        return None
    numbers = {key: getattr(estimate, key) for key in ("mean", "se", "low", "high")}
    return numbers | {"seeds": len(seeds)}


BySeedAndPrompt = Mapping[str, Mapping[str, float]]


def table_of(*values: BySeedAndPrompt) -> list[np.ndarray] | None:
    """{seed: {prompt: value}} of several methods as tables (seeds, prompts) over the seeds that all
    have; None without such seeds, and where these seeds do not share their prompts."""
    seeds = sorted(set.intersection(*(set(of) for of in values)))
    prompts = {tuple(sorted(of[seed])) for of in values for seed in seeds}
    if len(prompts) != 1 or not seeds:
        return None
    [shared] = prompts
    return [np.array([[of[s][p] for p in shared] for s in seeds], float) for of in values]


def difference(ours: BySeedAndPrompt, theirs: BySeedAndPrompt) -> Estimate | None:
    """The difference `ours - theirs`, paired by seed and, where the seeds share their prompts, by
    prompt; then its interval is over both, and else over seeds. None if they share no seed."""
    if tables := table_of(ours, theirs):
        return over_seeds_and_prompts(tables[0] - tables[1])
    seeds = sorted(ours.keys() & theirs.keys())
    return over_seeds(_mean(ours[seed]) - _mean(theirs[seed]) for seed in seeds)


def _mean(by_prompt: Mapping[str, float]) -> float:
    return math.fsum(by_prompt.values()) / len(by_prompt)


# ------------------------------------------------------------------------------------------- shares


def share_interval(by_prompt: Iterable[Sequence[float]]) -> tuple[float, float]:
    """The 95% interval of a share over prompts, each with the results (0, 1/2 or 1) of its samples.

    One result for each prompt and no tie: Wilson's interval. Else prompts are clusters: Wilson's
    interval of as many trials as have the variance that the prompts show, with Student's t instead
    of the normal quantile (`variance_df`). Prompts without any difference count as one trial each.
    For rates of 0.5 to 0.9 and 50 prompts with 3 or 10 samples each, it holds the truth in 94 to
    97% of the cases; with 20 prompts in 93 to 98%, and with one sample each in 93 to 98%, because
    few results are possible. For rates of 0.05 to 0.95 and 20 to 150 prompts it does in 92 to 99%;
    with P - 1 degrees of freedom, or on the logit scale, in 88 to 99%, and on the arcsine scale in
    85 to 100%.
    """
    prompts = [np.asarray(of_prompt, float) for of_prompt in by_prompt]
    results = np.concatenate(prompts)
    rate, n = float(results.mean()), len(prompts)
    if len(results) == n and not np.any(results == 0.5):
        return wilson(rate, n)
    residuals = [math.fsum(of_prompt - rate) for of_prompt in prompts]
    variance = math.fsum(r * r for r in residuals) / len(results) ** 2
    if n < 2 or variance == 0:
        return wilson(rate, n)
    trials = rate * (1 - rate) / variance * (n - 1) / n
    df = variance_df(np.array(residuals))
    return wilson(rate, trials, float(t_quantile(0.5 + CONFIDENCE / 2, df)))


def variance_df(residuals: np.ndarray) -> float:
    """The degrees of freedom of the variance s^2 of residuals, 2 s^4 / Var(s^2), by their fourth
    moment, from 1 to n - 1. Where a few prompts have all of the wins, s^2 is known badly."""
    n = len(residuals)
    variance = float((residuals**2).sum()) / (n - 1)
    fourth = float((residuals**4).mean())
    uncertainty = (fourth - (n - 3) / (n - 1) * variance**2) / n
    return min(n - 1.0, max(1.0, 2 * variance**2 / uncertainty)) if uncertainty > 0 else n - 1.0


def wilson(rate: float, n: float, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval for a share `rate` of n trials (Wilson 1927; 95% by default)."""
    center = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


# ---------------------------------------------------------------------------------------- envelopes


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
