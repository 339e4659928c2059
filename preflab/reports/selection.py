"""Choosing on some evaluation prompts, and reporting the numbers of the others.

A prompt belongs to *dev* or *test* by a hash of its text, so it is on the same side in every run. A
maximum over noisy evaluations is biased upwards on the prompts that chose it, not on others.
"""

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from preflab.reports.run_files import is_number
from preflab.reports.runs import Run
from preflab.reports.statistics import envelope

DEV, TEST = "dev", "test"
DEV_SHARE = 0.5


def number_on(side: str, name: str) -> str:
    """The name of a number of summary.json on the prompts of one side, such as
    `dev/policy_reward`; rows of metrics.jsonl have it too."""
    return f"{side}/{name}"


@functools.lru_cache(maxsize=100_000)
def part_of(prompt: str, dev_share: float = DEV_SHARE) -> str:
    """The side of a prompt. dev_share: the share of all possible prompts that choose."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    return DEV if int.from_bytes(digest[:8], "big") < dev_share * 2**64 else TEST


@dataclass(eq=False)
class Evaluation:
    """One evaluation of a policy. row: that of metrics.jsonl. values: {metric: {prompt: mean over
    its samples}}."""

    row: dict
    values: dict[str, dict[str, float]]
    _means: dict[tuple, float] = field(default_factory=dict)

    def of(self, metric: str, part: str | None = None) -> dict[str, float]:
        """{prompt: value} of one side, or of both."""
        values = self.values.get(metric, {})
        return {p: v for p, v in values.items() if part is None or part_of(p) == part}

    def mean(self, metric: str, part: str | None = None) -> float:
        """The mean over the prompts of a side; NaN where it has none."""
        if (metric, part) not in self._means:
            values = self.of(metric, part).values()
            self._means[metric, part] = math.fsum(values) / len(values) if values else math.nan
        return self._means[metric, part]


def _reward(row: dict, model: str) -> float | None:
    rewards = row.get(f"{model}_reward") or {}
    return next(iter(rewards.values()), None)


def _win(row: dict) -> float | None:
    ours, theirs = _reward(row, "policy"), _reward(row, "reference")
    return None if ours is None or theirs is None else (1 + (ours > theirs) - (ours < theirs)) / 2


# What is measured on each sample: metric -> its value in a row of samples.jsonl.
OF_A_SAMPLE: dict[str, Callable[[dict], float | None]] = {
    "policy_reward": lambda row: _reward(row, "policy"),
    "kl": lambda row: row.get("kl"),
    "policy_length": lambda row: row.get("policy_tokens"),
    "win_rate": _win,
}


_SAMPLED: WeakKeyDictionary[Run, list[Evaluation]] = WeakKeyDictionary()


def sampled_evaluations(run: Run) -> list[Evaluation]:
    """The evaluations of a training run that sampled the policy as it is, with the values of each
    prompt; empty where samples.jsonl does not hold the samples of all of them."""
    if run not in _SAMPLED:
        _SAMPLED[run] = _read_evaluations(run)
    return _SAMPLED[run]


def _read_evaluations(run: Run) -> list[Evaluation]:
    samples: dict[float, list[dict]] = defaultdict(list)
    for row in run.all_samples():
        samples[row.get("examples")].append(row)
    rows = run.frontier_rows()
    evaluations = [Evaluation(row, by_prompt(samples[row["examples"]])) for row in rows]
    are_whole = all(
        math.isclose(e.mean("policy_reward"), e.row["samples_eval/policy_reward"], abs_tol=1e-6)
        for e in evaluations
    )
    return evaluations if are_whole else []


def gain_of(reward: str) -> str:
    """The name in `Evaluation.values` of a reward's gain over the reference's sample."""
    return f"gain[{reward}]"


def _gains(row: dict) -> dict[str, float | None]:
    """The gain of each reward over the reference's sample."""
    ours, theirs = row.get("policy_reward") or {}, row.get("reference_reward") or {}
    both = {name: (value, theirs.get(name)) for name, value in ours.items()}
    return {gain_of(name): a - b for name, (a, b) in both.items() if is_number(a) and is_number(b)}


def by_prompt(samples: Iterable[dict]) -> dict[str, dict[str, float]]:
    """{metric: {prompt: mean over its samples}} of rows of samples.jsonl, with the gain of each
    reward over the reference (`gain_of`)."""
    collected: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in samples:
        measured = {name: measure(row) for name, measure in OF_A_SAMPLE.items()} | _gains(row)
        for name, value in measured.items():
            if is_number(value):
                collected[name][row["prompt"]].append(value)
    return {
        name: {prompt: math.fsum(values) / len(values) for prompt, values in of.items()}
        for name, of in collected.items()
    }


def chosen_mixture(
    evaluations: Sequence[Evaluation], kl: float, part: str | None = DEV
) -> list[tuple[Evaluation, float]] | None:
    """The point of the reward-KL envelope at `kl` that the prompts of `part` choose.

    The envelope is the running maximum of the reward over KL, linear between evaluations, so its
    point is a mixture of one or two evaluations: [(evaluation, weight)]. None where `kl` is outside
    the KLs of the evaluations.
    """
    points = sorted(
        ((e.mean("kl", part), e.mean("policy_reward", part), e) for e in evaluations),
        key=lambda point: (point[0], -point[1]),
    )
    points = [point for point in points if not any(math.isnan(x) for x in point[:2])]
    if not points or not points[0][0] <= kl <= points[-1][0]:
        return None
    best = []  # the best evaluation up to each point
    for point in points:
        best.append(point if not best or point[1] > best[-1][1] else best[-1])
    right = int(np.searchsorted([x for x, _, _ in points], kl))
    if points[right][0] == kl:
        return [(best[right][2], 1.0)]
    left = right - 1
    weight = (kl - points[left][0]) / (points[right][0] - points[left][0])
    if best[left] is best[right]:
        return [(best[left][2], 1.0)]
    return [(best[left][2], 1 - weight), (best[right][2], weight)]


def best_within(
    evaluations: Sequence[Evaluation], largest_kl: float | None = None, part: str | None = DEV
) -> Evaluation | None:
    """The evaluation with the highest reward on the prompts of `part`, of those with at most this
    KL there; None if there is none."""
    rewards = {}
    for i, evaluation in enumerate(evaluations):
        reward = evaluation.mean("policy_reward", part)
        if math.isnan(reward):
            continue
        if largest_kl is None or evaluation.mean("kl", part) <= largest_kl:
            rewards[i] = reward
    return evaluations[max(rewards, key=rewards.__getitem__)] if rewards else None


def of_mixture(
    mixture: Sequence[tuple[Evaluation, float]], metric: str, part: str | None = TEST
) -> dict[str, float]:
    """{prompt: value} of a mixture on the prompts of a side."""
    tables = [(evaluation.of(metric, part), weight) for evaluation, weight in mixture]
    prompts = set.intersection(*(set(values) for values, _ in tables))
    return {p: sum(weight * values[p] for values, weight in tables) for p in sorted(prompts)}


def envelopes(runs: Sequence[Run], kls: Iterable[float]) -> dict[str, list[float | None]]:
    """The best reward within each KL of `kls`, by seed, over all evaluations of its runs.

    The dev prompts choose and the test prompts give the number, where `has_parts(runs)`; else the
    same numbers do both.
    """
    kls = list(kls)
    seeds: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.frontier():
            seeds[str(run.seed)].append(run)
    if has_parts(runs):
        return {seed: _on_test(of_seed, kls) for seed, of_seed in seeds.items()}
    points = {seed: [p[:2] for run in of for p in run.frontier()] for seed, of in seeds.items()}
    return {seed: envelope(of_seed, kls) for seed, of_seed in points.items()}


def has_parts(runs: Iterable[Run]) -> bool:
    """Whether every evaluation on the frontier has its samples, with prompts on both sides."""
    evaluations = [(run, sampled_evaluations(run)) for run in runs if run.frontier()]
    return bool(evaluations) and all(
        of_run and not any(math.isnan(e.mean("kl", part)) for e in of_run for part in (DEV, TEST))
        for _, of_run in evaluations
    )


def _on_test(runs: Sequence[Run], kls: Sequence[float]) -> list[float | None]:
    evaluations = [evaluation for run in runs for evaluation in sampled_evaluations(run)]
    rewards: list[float | None] = []
    for kl in kls:
        mixture = chosen_mixture(evaluations, kl)
        if mixture is None:
            rewards.append(None)
        else:
            rewards.append(sum(weight * e.mean("policy_reward", TEST) for e, weight in mixture))
    return rewards
