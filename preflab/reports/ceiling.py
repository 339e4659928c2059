"""The highest reward that any policy can have at a KL from the reference.

Among the policies with the same mean KL(pi || ref) over prompts, the mean reward is highest for
pi* = ref exp(r / lambda) / Z (DPO, arXiv:2305.18290 eq. 4) with one lambda for all prompts. It is
estimated from N samples of the reference for each prompt, whose weights are w_i = exp(r_i /
lambda), divided by their sum:

    gain = sum_i w_i r_i - mean_i r_i            KL = log N + sum_i w_i log w_i

Both are low by terms of order 1/N, which a jackknife over the N samples removes. Where a few
samples have all the weight no estimate is good, so curves end at an effective sample size
1 / sum_i w_i^2 of `LEAST_EFFECTIVE`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from preflab.reports.run_files import is_number
from preflab.reports.runs import SAMPLER, Run

LEAST_SAMPLES = 16  # for each prompt
LEAST_PROMPTS = 8
# Simulated on languages that can be enumerated, the bias is below a third of the standard error.
LEAST_EFFECTIVE = 10
N_LAMBDAS = 120
SMALL, LARGE = 0.02, 50  # lambda, in standard deviations of the reward


@dataclass(frozen=True)
class Ceiling:
    """The highest gain in reward at each KL.

    kls, gains, effective: (points,) KL in nats, rising from 0; gain over the reference's mean
    reward; mean effective sample size over prompts. by_prompt: (2, points, prompts) KL and gain of
    each prompt at the same lambdas. start: the reference's mean reward. n_samples: for each prompt.
    """

    kls: np.ndarray
    gains: np.ndarray
    effective: np.ndarray
    by_prompt: np.ndarray
    start: float
    n_samples: int

    def at(self, kl: float) -> tuple[float, float] | None:
        """The highest gain at `kl` and its standard error over prompts; None for a KL that the
        samples do not reach."""
        if not 0 <= kl <= self.kls[-1]:
            return None
        gain = float(np.interp(kl, self.kls, self.gains))
        n = self.by_prompt.shape[2]
        without = (self.by_prompt.sum(2, keepdims=True) - self.by_prompt) / (n - 1)
        gains = [
            float(np.interp(kl, np.maximum.accumulate(kls), gains))
            for kls, gains in zip(without[0].T, without[1].T, strict=True)
        ]
        return gain, float(np.sqrt((n - 1) * np.var(gains)))  # a jackknife over prompts


def ceiling(rewards: np.ndarray) -> Ceiling | None:
    """The highest gain at a KL; rewards: (prompts, samples) of the reference's samples, in any
    order.

    None if there are too few prompts or samples, or the rewards of every prompt are equal.
    """
    rewards = np.asarray(rewards, dtype=float)
    n_prompts, n_samples = rewards.shape
    spread = rewards.std(1).mean()
    if n_prompts < LEAST_PROMPTS or n_samples < LEAST_SAMPLES or not spread > 0:
        return None
    points = [_tilted(rewards, spread * scale) for scale in np.geomspace(LARGE, SMALL, N_LAMBDAS)]
    kls, gains, effective = (np.stack(values) for values in zip(*points, strict=True))
    mean_kl = kls.mean(1)
    trusted = effective.mean(1) >= LEAST_EFFECTIVE
    # Up to the first point that is not, and from the first at which the KL rises.
    end = len(trusted) if trusted.all() else int(np.argmin(trusted))
    chosen = [i for i in range(end) if mean_kl[i] > mean_kl[:i].max(initial=0)]
    if not chosen:
        return None
    zero = np.zeros((2, 1, n_prompts))
    by_prompt = np.concatenate([zero, np.stack([kls[chosen], gains[chosen]])], axis=1)
    return Ceiling(
        kls=by_prompt[0].mean(1),
        gains=by_prompt[1].mean(1),
        effective=np.concatenate([[float(n_samples)], effective[chosen].mean(1)]),
        by_prompt=by_prompt,
        start=float(rewards.mean()),
        n_samples=n_samples,
    )


def _tilted(rewards: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL, gain and effective sample size of each prompt, (prompts,) each, at one lambda."""
    n = rewards.shape[1]
    largest = rewards.max(1, keepdims=True)
    weights = np.exp((rewards - largest) / temperature)
    effective = weights.sum(1) ** 2 / (weights**2).sum(1)

    def estimate(total, weighted, plain, count):
        """KL and gain from the sums of w, w r and r over `count` samples."""
        mean = weighted / total
        kl = (mean - largest) / temperature - np.log(total / count)
        return kl, mean - plain / count

    sums = [values.sum(1, keepdims=True) for values in (weights, weights * rewards, rewards)]
    whole = estimate(*sums, n)
    without = [
        total - values
        for total, values in zip(sums, (weights, weights * rewards, rewards), strict=True)
    ]
    without[0] = np.maximum(without[0], np.finfo(float).tiny)
    kl, gain = (
        n * of_all[:, 0] - (n - 1) * of_others.mean(1)
        for of_all, of_others in zip(whole, estimate(*without, n - 1), strict=True)
    )
    return kl, gain, effective


def best_of_n(rewards: np.ndarray, counts: Sequence[int]) -> list[tuple[int, float, float]]:
    """(n, KL, gain) of the best of n samples, for each n of `counts` up to half of the samples.

    The KL is its bound log n - (n - 1) / n, exact where no two samples are equal (arXiv:2401.01879
    Theorem 1); the reward is the unbiased mean of the largest of n by order statistics.
    """
    ordered = np.sort(np.asarray(rewards, dtype=float), axis=1)
    n_samples = ordered.shape[1]
    points = []
    for n in (n for n in counts if 1 <= n <= n_samples // 2):
        # the share of subsets of n whose largest is the i-th: C(i, n - 1) / C(N, n)
        share = np.zeros(n_samples)
        share[-1] = n / n_samples
        for i in range(n_samples - 1, n - 1, -1):
            share[i - 1] = share[i] * (i - n + 1) / i
        gain = float((ordered @ share - ordered.mean(1)).mean())
        points.append((n, float(np.log(n) - (n - 1) / n), gain))
    return points


def reference_rewards(runs: Iterable[Run]) -> np.ndarray | None:
    """(prompts, samples) rewards of the reference's samples, of the run with the most samples of a
    prompt; None if no run has `LEAST_SAMPLES`.

    Only samples at temperature 1 without top-p, top-k or min-p are the reference's.
    """
    found = [rewards for run in runs if (rewards := _rewards_of(run)) is not None]
    return max(found, key=lambda rewards: rewards.shape[1], default=None)


def _rewards_of(run: Run) -> np.ndarray | None:
    by_prompt: dict[str, dict[int, float]] = defaultdict(dict)
    for row in run.samples():
        rewards = row.get("reference_reward")
        value = next(iter(rewards.values())) if rewards else None
        as_it_is = all(row.get(name) in (None, plain) for name, plain in SAMPLER.items())
        if as_it_is and is_number(
            value
        ):  # checkpoints of an evaluation share the reference's samples
            by_prompt[row["prompt"]][row.get("sample", 0)] = value
    most = max(map(len, by_prompt.values()), default=0)
    if most < LEAST_SAMPLES:
        return None
    return np.array([list(values.values()) for values in by_prompt.values() if len(values) == most])
