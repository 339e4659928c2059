"""What a setting accepts, from its annotation: `beta: Annotated[float, Positive]`."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from utils import ConfigError


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`. ends: as intervals are written, "[)" includes `low` alone.

    reason: said behind the range in the error message, where the range is not the usual one.
    """

    low: float
    high: float
    ends: str = "[)"
    reason: str = ""

    def __post_init__(self):
        if self.ends not in ("[]", "[)", "(]", "()"):
            raise ValueError(f"Between(ends={self.ends!r}); accepted: '[]', '[)', '(]', '()'")

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.ends[0] == "(" else self.low <= value
        below = value < self.high if self.ends[1] == ")" else value <= self.high
        return above and below

    def __str__(self) -> str:
        if math.isinf(self.high):
            text = f"{'greater than' if self.ends[0] == '(' else 'at least'} {self.low}"
        else:
            text = f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"
        return f"{text}: {self.reason}" if self.reason else text


Positive = Between(0, math.inf, "()")
NonNegative = Between(0, math.inf)


@dataclass(frozen=True)
class Prepare:
    """The function gets `prepare(key, value)` of what is set; key names it in messages."""

    prepare: Callable[[str, Any], Any]


def settings_of(function: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function, which are its settings, by name."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def annotations_of(function: Callable) -> dict[str, Any]:
    """What the settings of a function are annotated with, by name, ranges included.

    Text, as under `from __future__ import annotations`, is evaluated in the function's module.
    Raises ConfigError where that fails.
    """
    written = {
        name: parameter.annotation
        for name, parameter in settings_of(function).items()
        if parameter.annotation is not parameter.empty
    }
    try:
        return typing.get_type_hints(
            SimpleNamespace(__annotations__=written),
            inspect.unwrap(function).__globals__,
            include_extras=True,
        )
    except (NameError, SyntaxError, TypeError) as error:
        raise ConfigError(
            f"the settings of {function.__qualname__} in {function.__code__.co_filename} have an"
            f" annotation that cannot be evaluated ({error}); import what it names at the top of"
            " the file, outside of `if TYPE_CHECKING`"
        ) from error


def prepared(function: Callable, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings of a loss that are annotated with `Prepare`, prepared."""
    return {
        key: extra.prepare(f"loss.{key}", settings[key])
        for key, annotation in annotations_of(function).items()
        for extra in getattr(annotation, "__metadata__", ())
        if isinstance(extra, Prepare) and key in settings
    }


def expected(annotation: Any, value: Any) -> str | None:
    """What an annotation asks for, as the end of "must be ..."; None where it accepts `value`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        ranges = [extra for extra in arguments[1:] if isinstance(extra, Between)]
        outside = (str(extra) for extra in ranges if value is not None and value not in extra)
        return expected(arguments[0], value) or next(outside, None)
    if origin is Literal:
        return None if value in arguments else f"one of {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        alternatives = [expected(argument, value) for argument in arguments]
        return None if None in alternatives else " or ".join(alternatives)
    if annotation in CHECKS:
        accepts, text = CHECKS[annotation]
        return None if accepts(value) else text
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


CHECKS: dict[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: isinstance(value, int) and _is_number(value), "a whole number"),
    float: (_is_number, "a finite number"),
    str: (lambda value: isinstance(value, str), "text"),
    type(None): (lambda value: value is None, "null"),
}
