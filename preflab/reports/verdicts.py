"""Better, worse, equal within d, or undecided: several methods against a baseline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preflab.reports.distributions import power_to_differ, power_to_equal, t_cdf
from preflab.reports.statistics import (
    FEWEST_SEEDS,
    Estimate,
    Spread,
    over_seeds_and_prompts,
    p_value,
)

ALPHA = 0.05
POWER = 0.8
BETTER, WORSE, EQUAL, UNDECIDED = "better", "worse", "equal", "undecided"
MOST_SEEDS, MOST_PROMPTS = 1000, 1_000_000


@dataclass(frozen=True)
class Verdict:
    """What is known of the difference from a baseline.

    p_differs: of the two-sided test of no difference. p_equal: of the two one-sided tests of a
    difference of at least the margin. Both are corrected by Holm's method; None for fewer than
    three seeds. seeds, prompts: how many would decide with a probability of 80%, the other number
    as it is; None where no number would.
    """

    word: str
    estimate: Estimate | None
    p_differs: float | None = None
    p_equal: float | None = None
    seeds: int | None = None
    prompts: int | None = None


def decide(
    differences: Mapping[str, Estimate | None],
    margin: float,
    alpha: float = ALPHA,
    *,
    plans: bool = True,
) -> dict[str, Verdict]:
    """The verdict on each difference from one baseline. plans: whether to compute the seeds and
    prompts that would decide.

    margin: the smallest difference that matters (d), set beforehand. *equal*: smaller than the
    margin, by two one-sided t tests (Schuirmann 1987). *better* and *worse*: different from 0, by a
    two-sided t test, and not equal. Each family of tests is corrected over the methods (Holm 1979),
    so that the probability of any false *better* or *worse*, and that of any false *equal*, is at
    most alpha.
    """
    # The interval of a single seed is over prompts, and says nothing about another seed.
    enough = {n: of if of and of.seeds >= FEWEST_SEEDS else None for n, of in differences.items()}
    differ = holm({name: p_value(of) if of else None for name, of in enough.items()})
    equal = holm({name: p_equal(of, margin) if of else None for name, of in enough.items()})
    verdicts = {}
    for name, of in differences.items():
        word = UNDECIDED
        if of is not None and differ[name] is not None:
            if equal[name] < alpha:
                word = EQUAL
            elif differ[name] < alpha:
                word = BETTER if of.mean > 0 else WORSE
        needed: tuple[int | None, int | None] = (None, None)
        if plans and of is not None:
            needed = needed_to_decide(of, margin, alpha / len(differences))
        verdicts[name] = Verdict(word, of, differ[name], equal[name], *needed)
    return verdicts


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's adjusted p-values: of m, the i-th smallest times m - i + 1, and at least those before
    it. None stays None, and counts in m: a test that could not be made yet is one of the family."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted


def p_equal(estimate: Estimate, margin: float) -> float | None:
    """Of the two one-sided tests that a difference is at least `margin`; None without an
    interval."""
    if estimate.df is None or estimate.se is None:
        return None
    if estimate.se == 0:
        return 0.0 if abs(estimate.mean) < margin else 1.0
    return float(t_cdf((abs(estimate.mean) - margin) / estimate.se, estimate.df))


def needed_to_decide(
    estimate: Estimate, margin: float, alpha: float = ALPHA
) -> tuple[int | None, int | None]:
    """The least number of seeds, with the prompts as they are, and of prompts, with the seeds as
    they are, that decide (`power_of`) with 80%; None where no number does, and where the spread is
    not known."""
    if estimate.spread is None:
        return None, None
    spread, n_prompts = estimate.spread, estimate.prompts
    seeds = _least(
        lambda n: power_of(spread, n, n_prompts, margin, alpha), FEWEST_SEEDS, MOST_SEEDS
    )
    prompts = None
    if n_prompts and estimate.seeds >= FEWEST_SEEDS:
        prompts = _least(
            lambda n: power_of(spread, estimate.seeds, n, margin, alpha), 2, MOST_PROMPTS
        )
    return seeds, prompts


def power_of(
    spread: Spread, seeds: int, prompts: int, margin: float, alpha: float = ALPHA
) -> float:
    """The probability that a comparison decides rightly: that it finds a true difference of
    `margin`, or that it calls a true difference of 0 equal, whichever is less likely.

    prompts: 0 where each seed has prompts of its own, or they do not matter.
    """
    error, df = spread.error(seeds, prompts)
    if error == 0:
        return 1.0
    return min(power_to_differ(margin, error, df, alpha), power_to_equal(margin, error, df, alpha))


def _least(power, low: int, high: int) -> int | None:
    """The least n between two numbers with enough power, which grows with n."""
    if power(high) < POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low


@dataclass(frozen=True)
class Check:
    """How often simulated comparisons are called different, of those of a method with itself and of
    those with a planted difference of the margin."""

    comparisons: int
    same_called_different: float
    planted_found: float


def check(
    spreads: Sequence[Spread],
    seeds: int,
    prompts: int,
    margin: float,
    comparisons: int = 200,
    seed: int = 0,
) -> Check:
    """Simulate a study of as many methods as there are `spreads`, again and again, until there are
    `comparisons`; once with methods that equal the baseline, once with a difference of `margin`."""
    rng = np.random.default_rng(seed)
    studies = math.ceil(comparisons / len(spreads))
    shares = []
    for planted in (0.0, margin):
        words = []
        for _ in range(studies):
            estimates = {
                str(i): over_seeds_and_prompts(planted + _draw(spread, seeds, prompts, rng))
                for i, spread in enumerate(spreads)
            }
            words += [verdict.word for verdict in decide(estimates, margin, plans=False).values()]
        words = words[:comparisons]
        found = (BETTER,) if planted else (BETTER, WORSE)
        shares.append(sum(word in found for word in words) / len(words))
    return Check(comparisons, *shares)


def _draw(spread: Spread, seeds: int, prompts: int, rng: np.random.Generator) -> np.ndarray:
    """Differences of each seed and prompt, (seeds, prompts); (seeds, 1) without prompts."""
    shape = (seeds, max(prompts, 1))
    of_seeds = math.sqrt(spread.seed) * rng.normal(size=(seeds, 1))
    of_prompts = math.sqrt(spread.prompt) * rng.normal(size=(1, shape[1]))
    return of_seeds + of_prompts + math.sqrt(spread.rest) * rng.normal(size=shape)
