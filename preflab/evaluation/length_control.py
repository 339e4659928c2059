"""Win rates as they would be if both responses had the same length (Dubois et al. 2024,
arXiv:2404.04475)."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from preflab.batching.chat import prompt_key
from preflab.reports.distributions import t_quantile
from preflab.reports.statistics import CONFIDENCE

FEWEST_PROMPTS = 10
PRIOR = 3.0  # standard deviation of the length's coefficient, in log-odds
STEPS = 100  # of Newton's method; it takes about ten


def length_controlled(pairs: Sequence[dict]) -> dict[str, float | None]:
    """The length-controlled win rate of judged pairs, its 95% interval over prompts, and the
    effect of the length. All are None for fewer than ten prompts, where every verdict is the same,
    and where every pair has the same difference in length, so that nothing tells its effect.

    With D the length of the policy's response minus that of the opponent's, in characters, and sd
    the standard deviation of D over the pairs,

        P(policy wins) = sigmoid(theta + phi tanh(D / sd)),

    and the rate is sigmoid(theta), which is P where D = 0. A tie counts 1/2. This is equation 2 of
    the paper for one model and one baseline, without its term for the difficulty of an instruction,
    which is estimated from a whole leaderboard. phi has a normal prior N(0, 3^2), so that it stays
    finite where the longer response always wins; the paper's code has an L1 penalty, chosen by
    cross-validation, and made-up models. The interval is sigmoid(theta +- t se), with the sandwich
    variance of prompts as clusters, or that of the prior and the pairs where it is larger.
    """
    judged = [pair for pair in pairs if pair["verdict"] is not None]
    by_prompt = defaultdict(list)
    for i, pair in enumerate(judged):
        by_prompt[prompt_key(pair["prompt"])].append(i)
    none = dict.fromkeys(("rate", "low", "high", "effect"))
    wins = np.array([pair["verdict"] for pair in judged], float)
    lengths = [len(pair["policy"]) - len(pair["opponent"]) for pair in judged]
    if len(by_prompt) < FEWEST_PROMPTS or len(set(lengths)) < 2 or len(set(wins.tolist())) < 2:
        return none
    longer = np.tanh(np.array(lengths) / np.std(lengths, ddof=1))
    design = np.column_stack([np.ones_like(longer), longer])
    coefficients, bread = _fit(design, wins)
    scores = design * (wins - _sigmoid(design @ coefficients))[:, None]
    clusters = np.array([scores[members].sum(0) for members in by_prompt.values()])
    n = len(clusters)
    variance = bread @ (clusters.T @ clusters) @ bread * n / (n - 1)
    # Where one side is nearly always longer, the prior decides what holds at equal lengths, and the
    # sandwich knows nothing of its width; the inverse information does.
    error = math.sqrt(max(variance[0, 0], bread[0, 0]))
    half = float(t_quantile(0.5 + CONFIDENCE / 2, n - 1.0)) * error
    theta, phi = (float(value) for value in coefficients)
    low, rate, high = (float(_sigmoid(np.array(theta + shift))) for shift in (-half, 0.0, half))
    return {"rate": rate, "low": low, "high": high, "effect": phi}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _fit(design: np.ndarray, wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of the logistic regression, and the inverse of its information matrix."""
    prior = np.diag([0.0, 1 / PRIOR**2])
    coefficients = np.zeros(design.shape[1])
    for _ in range(STEPS):
        p = _sigmoid(design @ coefficients)
        information = (design * (p * (1 - p))[:, None]).T @ design + prior
        step = np.linalg.solve(information, design.T @ (wins - p) - prior @ coefficients)
        # A step of at most one keeps Newton's method from overshooting.
        coefficients = coefficients + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-12:
            break
    return coefficients, np.linalg.inv(information)
