"""The search space in the words of a sweep, as hydra writes it. Knows no library that searches."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import Override

from preflab.settings.sweep_words import parse
from utils import ConfigError


@dataclass(frozen=True)
class Choice:
    """One of some values, each as its text on the command line."""

    values: tuple[str, ...]

    def corners(self) -> tuple[str, ...]:
        return self.values


@dataclass(frozen=True)
class Interval:
    """A number from `low` to `high`, both included: an integer where both are.

    step: the distance of two possible values; None for any. log: uniform in the logarithm.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def is_integer(self) -> bool:
        return all(isinstance(x, int) for x in (self.low, self.high, self.step or 1))

    def corners(self) -> tuple[str, ...]:
        return (repr(self.low), repr(self.high))


@dataclass(frozen=True)
class Space:
    """fixed: values of the settings that all runs share, by key. searched: the others' ranges."""

    fixed: dict[str, str]
    searched: dict[str, Choice | Interval]

    def words(self, values: dict[str, object]) -> list[str]:
        """The settings of a run with these values of what is searched."""
        own = {key: v if isinstance(v, str) else repr(v) for key, v in values.items()}
        return [f"{key}={value}" for key, value in (self.fixed | own).items()]

    def corners(self) -> list[list[str]]:
        """Runs in which each range and each choice occurs with its ends, to be checked before the
        search: one for each end, with the first end of all others."""
        first = {key: one.corners()[0] for key, one in self.searched.items()}
        varied = [{key: end} for key, one in self.searched.items() for end in one.corners()]
        return [self.words(first | values) for values in varied or [{}]]


def space_of(words: Sequence[str], config_loader=None) -> Space:
    """The space of some settings, of which a later one replaces an earlier one of the same key.

    `a,b` and `choice(a,b)` are choices, `range(1,9,2)` has the values of hydra's grids (the end is
    not one of them), `interval(low, high)` any number, and `tag(log, interval(low, high))` any on a
    logarithmic scale. Raises ConfigError for what cannot be searched.
    """
    fixed: dict[str, str] = {}
    searched: dict[str, Choice | Interval] = {}
    for override in parse(words, config_loader):
        key = override.get_key_element()
        fixed.pop(key, None)
        searched.pop(key, None)
        if override.is_sweep_override():
            searched[key] = _searched(override)
        else:
            fixed[key] = override.get_value_element_as_str()
    return Space(fixed, searched)


def _searched(override: Override) -> Choice | Interval:
    value, word = override.value(), override.input_line
    if override.is_interval_sweep():
        log = "log" in value.tags
        if not value.start < value.end:
            raise ConfigError(f"{word}: an interval goes from a smaller number to a larger one")
        if log and not value.start > 0:
            raise ConfigError(f"{word}: an interval on a logarithmic scale begins above 0")
        return Interval(value.start, value.end, log=log)
    if override.is_range_sweep() and not value.shuffle:
        numbers = list(value.range())
        if len(numbers) > 1:
            return Interval(min(numbers), max(numbers), step=abs(value.step))
    choices = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if not choices:
        raise ConfigError(f"{word}: nothing to choose from")
    return Choice(choices)
