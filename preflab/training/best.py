"""The best evaluation of a run by a named number, and the end of a run that no longer improves."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from preflab.settings.schema import Settings
from utils import ConfigError, nearest

# The number of an evaluation by its name in summary.json, and whether more of it is better.
NUMBERS = {
    "eval_accuracy": ("rewards_eval/accuracies", True),
    "eval_loss": ("loss/eval", False),
    "kendall_tau": ("ranking_eval/kendall_tau", True),
    "ndcg": ("ranking_eval/ndcg", True),
    "policy_reward": ("samples_eval/policy_reward", True),
    "reward_gain": ("samples_eval/reward_gain", True),
}
KL = "samples_eval/kl"


@dataclass(frozen=True)
class Metric:
    """What `best_metric` names. largest_kl: evaluations beyond it, in nats, are not compared; None
    compares all."""

    name: str
    largest_kl: float | None = None

    @property
    def key(self) -> str:
        return NUMBERS[self.name][0]

    @property
    def samples(self) -> bool:
        """Whether it is measured on samples."""
        return self.key.startswith("samples_eval/") or self.largest_kl is not None

    def of(self, values: dict) -> float | None:
        """The number of an evaluation, where more is better; None for one that does not count.

        Raises ConfigError where the evaluation has no such number.
        """
        for key in (self.key, *([KL] if self.largest_kl is not None else [])):
            if key not in values:
                has = ", ".join(name for name, (own, _) in NUMBERS.items() if own in values)
                raise ConfigError(
                    f"best_metric={self}: the evaluations of this run have no {key}; they have"
                    f" {has or 'none of the numbers that it accepts'}"
                )
        value = values[self.key] if NUMBERS[self.name][1] else -values[self.key]
        if self.largest_kl is not None and not values[KL] <= self.largest_kl:
            return None
        return value if math.isfinite(value) else None

    def __str__(self) -> str:
        return self.name if self.largest_kl is None else f"{self.name}@kl<={self.largest_kl:g}"


def parse_metric(text: str) -> Metric:
    """NAME or NAME@kl<=NUMBER. Raises ConfigError for anything else."""
    name, at, limit = text.partition("@")
    if name not in NUMBERS:
        raise ConfigError(f"best_metric={text}; {nearest(name, NUMBERS)}")
    if not at:
        return Metric(name)
    found = re.fullmatch(r"kl<=(\d+\.?\d*|\.\d+)", limit.replace(" ", ""))
    if not found:
        raise ConfigError(
            f"best_metric={text}: {'@' + limit!r} must be a largest KL in nats, such as"
            f" {name}@kl<=5"
        )
    return Metric(name, float(found[1]))


def metric_of(settings: Settings, *, scalar: bool) -> Metric | None:
    """What chooses BEST: `best_metric`; without it, the accuracy of a reward model, and nothing for
    a policy. scalar: whether the model is a reward model."""
    if settings.best_metric is not None:
        return parse_metric(settings.best_metric)
    return Metric("eval_accuracy") if scalar else None


def check_best(settings: Settings, *, scalar: bool) -> None:
    """Raise ConfigError for a metric that the evaluations of a run cannot have."""
    if settings.best_metric is None:
        if settings.patience is not None and not scalar:
            raise ConfigError(
                f"patience={settings.patience} counts evaluations without a better best_metric,"
                f" which is null; set it to one of {', '.join(NUMBERS)}"
            )
        return
    metric = parse_metric(settings.best_metric)
    online = settings.function == "online"
    problem = ""
    if metric.samples and scalar:
        problem = "a reward model writes no samples"
    elif metric.samples and not settings.sample_during_eval:
        problem = "it is measured on samples, and sample_during_eval=false draws none"
    elif online and not metric.samples:
        problem = "function=online evaluates samples alone"
    if problem and settings.function in ("train", "online"):
        raise ConfigError(f"best_metric={metric}: {problem}; choose another one")


class Best:
    """The best evaluation so far.

    value: its number, None before there is one. examples: how many the policy had learned from.
    misses: evaluations since. is_unsaved: whether its weights are in no checkpoint yet.
    """

    def __init__(self, metric: Metric | None, patience: int | None):
        self.metric, self.patience = metric, patience
        self.value: float | None = None
        self.examples = 0
        self.misses = 0
        self.is_unsaved = False

    def after(self, values: dict, examples: int) -> Best:
        """This object, after comparing an evaluation; of equal ones the first stays. The policy
        before its first step, examples=0, does not count: there is no checkpoint of it."""
        if self.metric is None or not examples:
            return self
        value = self.metric.of(values)
        if value is not None and (self.value is None or value > self.value):
            self.value, self.examples, self.misses, self.is_unsaved = value, examples, 0, True
        else:
            self.misses += 1
        return self

    def reason_to_stop(self) -> str | None:
        """Why the run ends before its last step; None while it goes on."""
        if self.patience is None or self.misses < self.patience:
            return None
        return (
            f"{self.misses} evaluations without a better {self.metric} than after"
            f" {self.examples:,} examples"
        )

    def state_dict(self) -> dict:
        return {"value": self.value, "examples": self.examples, "misses": self.misses}

    def load_state_dict(self, state: dict) -> None:
        self.value, self.examples, self.misses = state["value"], state["examples"], state["misses"]

    def summary(self) -> dict:
        """What summary.json says of it."""
        if self.metric is None or self.value is None:
            return {}
        value = self.value if NUMBERS[self.metric.name][1] else -self.value
        return {
            "best_metric": str(self.metric),
            "best_value": value,
            "best_examples": self.examples,
        }
