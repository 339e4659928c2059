"""The best evaluation of a run by a named number, and the end of a run that no longer improves.

Dev prompts choose, so that the numbers of test prompts are those of a policy that they did not
choose.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass

from preflab.reports.selection import DEV, TEST, number_on
from preflab.settings.schema import Settings
from utils import ConfigError, nearest

logger = logging.getLogger(__name__)

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
ALL = "all"


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

    def keys(self, prompts: str) -> list[str]:
        """The names of the number, and of the KL where that counts, in an evaluation. prompts:
        `dev`, `test` or `all`."""
        keys = [(self.name, self.key)] + [("kl", KL)] * (self.largest_kl is not None)
        return [key if prompts == ALL else number_on(prompts, name) for name, key in keys]

    def of(self, values: dict, prompts: str = ALL) -> float | None:
        """The number of an evaluation on some prompts, where more is better; None for one that does
        not count.

        Raises ConfigError where the evaluation has no such number.
        """
        keys = self.keys(prompts)
        for key in keys:
            if key not in values:
                has = ", ".join(name for name, (own, _) in NUMBERS.items() if own in values)
                raise ConfigError(
                    f"best_metric={self}: the evaluations of this run have no {key}; they have"
                    f" {has or 'none of the numbers that it accepts'}"
                )
        value = values[keys[0]] if NUMBERS[self.name][1] else -values[keys[0]]
        if self.largest_kl is not None and not values[keys[1]] <= self.largest_kl:
            return None
        return value if math.isfinite(value) else None

    def __str__(self) -> str:
        return self.name if self.largest_kl is None else f"{self.name}@kl<={self.largest_kl:g}"


def parse_metric(text: str) -> Metric:
    """NAME or NAME@kl<=NUMBER. Raises ConfigError for anything else."""
    name, at, limit = text.partition("@")
    if name not in NUMBERS:
        raise ConfigError(f"best_metric={text!r}; {nearest(name, NUMBERS)}")
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


# What a checkpoint keeps of `Best`.
STATE = ("prompts", "value", "test_value", "examples", "misses")


class Best:
    """The best evaluation so far.

    prompts: those that choose, `dev`, or `all` where an evaluation has no prompts on one side; None
    before the first. value: the number on them, None before there is one. test_value: that on the
    test prompts, which choose nothing. examples: how many the policy had learned from. misses:
    evaluations since. is_unsaved: whether its weights are in no checkpoint yet.
    """

    def __init__(self, metric: Metric | None, patience: int | None):
        self.metric, self.patience = metric, patience
        self.prompts: str | None = None
        self.value: float | None = None
        self.test_value: float | None = None
        self.examples = 0
        self.misses = 0
        self.is_unsaved = False

    def after(self, values: dict, examples: int) -> Best:
        """This object, after comparing an evaluation; of equal ones the first stays. The policy
        before its first step, examples=0, does not count: there is no checkpoint of it."""
        if self.metric is None or not examples:
            return self
        if self.prompts is None:
            self.prompts = self._prompts_that_choose(values)
        value = self.metric.of(values, self.prompts)
        if value is not None and (self.value is None or value > self.value):
            self.value, self.examples, self.misses, self.is_unsaved = value, examples, 0, True
            self.test_value = values.get(self.metric.keys(TEST)[0])
        else:
            self.misses += 1
        return self

    def _prompts_that_choose(self, values: dict) -> str:
        """Which prompts choose in this run, which is said once."""
        self.metric.of(values)  # raises where there is no such number
        counted = "prompts" if self.metric.samples else "examples"
        numbers = [values.get(number_on(side, counted)) for side in (DEV, TEST)]
        if all(key in values for key in self.metric.keys(DEV)):
            logger.info(
                f"best_metric={self.metric}: {numbers[0]:,} dev {counted} choose BEST, and"
                f" {numbers[1]:,} test {counted} do not"
            )
            return DEV
        logger.warning(
            f"best_metric={self.metric}: all {counted} of an evaluation choose BEST, because none"
            " of them is on one of the sides dev and test; the best value is biased upwards. Raise"
            " n_eval_model_samples or n_eval_examples"
        )
        return ALL

    def reason_to_stop(self) -> str | None:
        """Why the run ends before its last step; None while it continues."""
        if self.patience is None or self.misses < self.patience:
            return None
        return (
            f"{self.misses} evaluations without a better {self.metric} than after"
            f" {self.examples:,} examples"
        )

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict) -> None:
        """A run of an earlier version, which knew no dev prompts, continues to choose on all."""
        for name in STATE:
            setattr(self, name, state.get(name))
        if self.prompts is None and self.value is not None:
            self.prompts = ALL

    def summary(self) -> dict:
        """What summary.json says of it."""
        if self.metric is None or self.value is None:
            return {}
        value = self.value if NUMBERS[self.metric.name][1] else -self.value
        return {
            "best_metric": str(self.metric),
            "best_value": value,
            "best_prompts": self.prompts,
            "best_test_value": self.test_value,
            "best_examples": self.examples,
        }
