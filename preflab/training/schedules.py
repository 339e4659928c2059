"""The learning rate of every step: a pure function of the step, so there is no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from preflab.settings.schema import Settings
from utils import ConfigError


def _constant(_: Schedule, step: int) -> float:
    return 1.0


def _linear(schedule: Schedule, step: int) -> float:
    return 1 - schedule.progress(step, begin=schedule.warmup)


def _cosine(schedule: Schedule, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * schedule.progress(step, begin=schedule.warmup)))


def _wsd(schedule: Schedule, step: int) -> float:
    begin = schedule.total - schedule.decay
    return 0.5 * (1 + math.cos(math.pi * schedule.progress(step, begin=begin)))


def _inverse_sqrt(schedule: Schedule, step: int) -> float:
    scale = schedule.warmup or 10_000
    return math.sqrt(scale / (scale + step - schedule.warmup))


# Of each `lr_schedule`, the share of the way from lr_min to lr at a step after the warm-up. Those
# that transformers has under the same or a similar name are equal to its own with its defaults.
SHAPES: dict[str, Callable[[Schedule, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}
# Those that end at lr_min with the last step.
DECAYING = ("linear", "cosine", "wsd")


@dataclass(frozen=True)
class Schedule:
    """The learning rates of a run.

    name: a key of SHAPES. lr: after the warm-up. lr_min: where the decay ends. warmup, decay: steps
    at the beginning and, of wsd, at the end. total: steps of the run; 0 where it is not known.
    """

    name: str
    lr: float
    lr_min: float = 0.0
    warmup: int = 0
    decay: int = 0
    total: int = 0

    def at(self, step: int) -> float:
        """The learning rate of a step, from 0 on.

        It rises linearly over the warm-up: the first step has lr/(warmup + 1), and step `warmup` is
        the first with all of lr.
        """
        if step < self.warmup:
            return self.lr * ((step + 1) / (self.warmup + 1))
        share = SHAPES[self.name](self, step)
        return self.lr * share if not self.lr_min else self.lr_min + (self.lr - self.lr_min) * share

    def progress(self, step: int, *, begin: int) -> float:
        """How far a step is on the way from `begin` to the end of the run, from 0 to 1."""
        return min(1.0, max(0, step - begin) / max(1, self.total - begin))


def schedule_of(settings: Settings, total: int | None) -> Schedule:
    """The schedule of a run. total: its optimizer steps, None where they are not known before.

    Raises ConfigError where the schedule needs that number, or does not fit into it.
    """
    name, warmup, lr_min = settings.lr_schedule, settings.warmup_steps, settings.lr_min
    needs_total = [f"lr_schedule={name}"] if name in DECAYING else []
    needs_total += [f"warmup_steps={warmup}, a share,"] if 0 < warmup < 1 else []
    if needs_total and total is None:
        raise ConfigError(
            f"{needs_total[0]} needs the number of steps of the run, and function="
            f"{settings.function} does not know it: a round has as many as it has pairs; take"
            " lr_schedule=constant or inverse_sqrt, and warmup_steps in steps"
        )
    if lr_min and name not in DECAYING:
        raise ConfigError(
            f"lr_min={lr_min:g}: lr_schedule={name} does not end at a learning rate; leave lr_min"
            f" out, or take one of {', '.join(DECAYING)}"
        )
    if lr_min > settings.lr:
        raise ConfigError(f"lr_min={lr_min:g} exceeds lr={settings.lr:g}; lower it")
    total = total or 0
    # A share is rounded up, as in transformers, and leaves a step to a run of few.
    steps = warmup if warmup >= 1 else min(math.ceil(warmup * total), max(0, total - 1))
    decay = math.ceil(settings.lr_decay_share * total) if name == "wsd" else 0
    if name in DECAYING and steps + max(1, decay) > total:
        of_decay = f" and {decay} of decay" if decay else ""
        raise ConfigError(
            f"lr_schedule={name}: {steps} steps of warm-up{of_decay} do not fit into the {total}"
            " steps of the run; lower warmup_steps (a number below 1 is a share of the steps)"
        )
    return Schedule(name, settings.lr, lr_min, int(steps), decay, total)


def check_continues(before: Schedule, now: Schedule, steps: int) -> None:
    """Raise ConfigError where the steps that a run has taken had other learning rates than `now`
    has for them, so that the whole would be no run of either schedule.

    steps: how many it has taken.
    """
    other = next((i for i in range(steps) if before.at(i) != now.at(i)), None)
    if other is None:
        return
    raise ConfigError(
        f"lr_schedule={now.name} over {now.total} steps gives step {other + 1} the learning rate"
        f" {now.at(other):.6g}; the run has taken it with {before.at(other):.6g}, on its way to"
        f" {before.total} steps. Leave n_epochs and n_examples as they were, or start another run,"
        " say from model.archive=RUN. lr_schedule=constant, inverse_sqrt and, before its decay,"
        " wsd can be extended, with warmup_steps in steps"
    )
