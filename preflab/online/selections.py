"""The selections of the project: which pairs of the pool get a gold label.

Methods that were published for choosing among the responses to one prompt rank prompts here as
well, since a purchase has fewer labels than the pool has prompts; each docstring says how.
"""

from typing import Annotated

import numpy as np

from preflab.objective.ranges import Between, NonNegative, Positive
from preflab.online.heads import sigmoid
from preflab.online.selection import Pool, register_selection

Heads = Annotated[int, Between(2, 1000, "[]")]
Prior = Annotated[float, Positive]
ALL = ("responses", "features")


@register_selection("conf")
def conf(pool: Pool, n: int, rng: np.random.Generator) -> np.ndarray:
    """The smallest gaps, where the discriminator is least confident (D2PO, arXiv:2405.01511)."""
    return np.argsort(np.abs(pool.gaps), kind="stable")


@register_selection("rand")
def rand(pool: Pool, n: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs drawn uniformly."""
    return np.sort(rng.permutation(len(pool.pairs))[:n])


@register_selection("delta_ucb", reads=ALL)
def delta_ucb(
    pool: Pool,
    n: int,
    rng: np.random.Generator,
    *,
    width: Annotated[float, NonNegative] = 1.0,
    heads: Heads = 16,
    prior: Prior = 1.0,
) -> np.ndarray:
    """The largest upper confidence bounds of the gap (DeltaUCB, arXiv:2603.09692): the mean over
    heads plus `width` standard deviations, whichever response is the better one.

    The paper takes a pair of each prompt by the bounds of the two responses; comparisons say
    nothing of a response alone, so the bound is that of the gap. Prompts are ranked by it, too.
    """
    gaps = pool.of_pairs(pool.heads(heads, prior, rng))
    bounds = np.abs(gaps.mean(1)) + width * gaps.std(1, ddof=1)
    return np.argsort(-bounds, kind="stable")


@register_selection("double_thompson", reads=ALL)
def double_thompson(
    pool: Pool,
    n: int,
    rng: np.random.Generator,
    *,
    reverse: bool = False,
    tries: Annotated[int, Between(1, 1000, "[]")] = 30,
    heads: Heads = 16,
    prior: Prior = 1.0,
) -> list[int]:
    """Double Thompson sampling (arXiv:1604.07101; with heads of a reward model arXiv:2402.00396):
    the best response under a head drawn at random, against the best one under further draws.

    reverse: the worst one under further draws instead, so that gaps are large (double reverse
    Thompson sampling, arXiv:2603.09692). tries: further draws until the two responses differ; after
    that the second one is any other. Prompts whose draws differ early come first, the others in
    random order: with two responses to a prompt, those about whose order the heads disagree.
    """
    scores = pool.heads(heads, prior, rng)
    numbers = {frozenset(pair): i for i, pair in enumerate(pool.pairs.tolist())}
    chosen, n_draws = [], []
    for prompt in range(pool.prompts.max() + 1):
        responses = np.flatnonzero(pool.prompts == prompt)
        draws = scores[np.ix_(responses, rng.integers(heads, size=tries + 1))]  # (K, tries + 1)
        first = int(draws[:, 0].argmax())
        second = draws[:, 1:].argmin(0) if reverse else draws[:, 1:].argmax(0)
        different = np.flatnonzero(second != first)
        others = np.delete(np.arange(len(responses)), first)
        fallback = int(rng.choice(others))
        other = int(second[different[0]]) if len(different) else fallback
        chosen.append(numbers[frozenset(responses[[first, other]].tolist())])
        n_draws.append(different[0] if len(different) else tries)
    order = np.lexsort((rng.permutation(len(chosen)), n_draws))
    return [chosen[i] for i in order]


@register_selection("d_optimal", reads=ALL)
def d_optimal(pool: Pool, n: int, rng: np.random.Generator, *, prior: Prior = 1.0) -> list[int]:
    """The pairs that add most to the log-determinant of the Fisher information of the last layer,
    with that of all labels bought before (past-aware D-optimal design, arXiv:2502.04354), one after
    the other (greedy, as in arXiv:2503.01076).

    A pair adds p (1 - p) x x', x the difference of its features and p the discriminator's
    probability of its order. prior: as of heads; the information starts at that of the prior.
    """
    scale = pool.typical_distance()
    every = np.concatenate([pool.past.features, pool.of_pairs(pool.features)]) / scale
    gaps = np.concatenate([pool.past.gaps, pool.gaps])
    basis, _ = np.linalg.qr(every.T)
    rows = (every @ basis) * np.sqrt(sigmoid(gaps) * sigmoid(-gaps))[:, None]
    past, rows = np.split(rows, [len(pool.past.gaps)])
    covariance = np.linalg.inv(past.T @ past + np.eye(rows.shape[1]) / prior**2)
    prompts, free = pool.prompts_of_pairs, np.ones(len(rows), bool)
    chosen: list[int] = []
    while len(chosen) < n and free.any():
        gains = ((rows @ covariance) * rows).sum(1)  # log det grows by log(1 + gain)
        best = int(np.where(free, gains, -np.inf).argmax())
        chosen.append(best)
        free &= prompts != prompts[best]
        direction = covariance @ rows[best]
        covariance -= np.outer(direction, direction) / (1 + gains[best])
    return chosen


@register_selection("sharpe", reads=lambda settings: ALL if settings["heads"] else ["responses"])
def sharpe(
    pool: Pool,
    n: int,
    rng: np.random.Generator,
    *,
    weighted: bool = True,
    heads: Annotated[int, Between(0, 1000, "[]")] = 0,
    prior: Prior = 1.0,
) -> np.ndarray:
    """The largest Sharpe ratios of the gradient's norm over the two answers that gold may give
    (arXiv:2503.22137): mean over standard deviation.

    weighted: the answers have their predicted probabilities (W-SHARP), else 1/2 each (SHARP). By
    the discriminator alone (heads=0) the ratios of a gap x are 1 / sinh(|x|/2) and coth(|x|/2), so
    that both order pairs as `conf` does. With heads the norm is that of the gradients of all heads
    and the probability their mean, which is not in the paper.
    """
    gaps = pool.gaps[:, None]
    if heads:
        gaps = pool.of_pairs(pool.heads(heads, prior, rng))
    # norms of the gradient where the first response is better, and where the second is
    first = np.sqrt((sigmoid(-gaps) ** 2).mean(1))
    second = np.sqrt((sigmoid(gaps) ** 2).mean(1))
    # the chance of the second answer is no 1 - p, which is 0 for a gap of 40
    p, q = sigmoid(gaps).mean(1), sigmoid(-gaps).mean(1)
    if not weighted:
        p = q = np.full(len(gaps), 0.5)
    mean, spread = p * first + q * second, np.sqrt(p * q) * np.abs(first - second)
    with np.errstate(divide="ignore"):
        return np.argsort(-mean / spread, kind="stable")
