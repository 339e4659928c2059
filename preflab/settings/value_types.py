"""Types of settings: each parses a value of a config, or refuses it, and says what it accepts.

`parse` takes a plain value (None, bool, int, float, str, list or dict) and returns it in the
setting's type. It raises `Refused` for any other. `str(type)` is the phrase that completes "KEY
must be ...".
"""

import datetime
import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

TRUE = ("true", "yes", "on", "1")
PATH_ENTRIES = ("module", "path")  # of the settings of a loss or a reward
FALSE = ("false", "no", "off", "0")


class Refused(Exception):  # noqa: N818  not an error yet: the caller knows the key
    """A value that a type does not accept. hint: what to type instead, where that is known."""

    def __init__(self, hint: str = ""):
        super().__init__(hint)
        self.hint = hint


class ValueType(Protocol):
    def parse(self, value: Any) -> Any: ...


@dataclass(frozen=True)
class Integer:
    """An integer from `least` to `most`. 64.0 and 1e3 are integers."""

    least: int
    most: int = 2**63 - 1

    def __str__(self) -> str:
        if self.most == Integer.most:
            return f"an integer of at least {self.least}"
        return f"an integer from {self.least} to {self.most}"

    def parse(self, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not self.least <= value <= self.most:
            raise Refused
        return value


@dataclass(frozen=True)
class Number:
    """A finite number. `above` and `below` are bounds that it does not reach."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __str__(self) -> str:
        low, high = max(self.least, self.above), min(self.most, self.below)
        if high < math.inf:
            opening = "[" if self.least > self.above else "("
            closing = "]" if self.most < self.below else ")"
            return f"a number in {opening}{low:g}, {high:g}{closing}"
        if self.least > self.above:
            return f"a number of at least {low:g}"
        return f"a number above {low:g}" if low > -math.inf else "a finite number"

    def parse(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Refused
        try:
            value = float(value)
        except OverflowError:  # an integer beyond 1.8e308
            raise Refused from None
        inside = self.least <= value <= self.most and self.above < value < self.below
        if not inside or not math.isfinite(value):
            raise Refused
        return value


@dataclass(frozen=True)
class Flag:
    """true or false; also yes and no, on and off, 1 and 0, in any case."""

    def __str__(self) -> str:
        return "true or false"

    def parse(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        word = str(value).lower() if isinstance(value, (int, str)) else ""
        if word in TRUE:
            return True
        if word in FALSE:
            return False
        close = difflib.get_close_matches(word, ("true", "false", "yes", "no", "on", "off"), n=1)
        raise Refused(f"did you mean {close[0]}?" if close else "")


@dataclass(frozen=True)
class Text:
    """A string. Numbers are taken as strings: exp_name=7."""

    def __str__(self) -> str:
        return "a string"

    def parse(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float, os.PathLike)):
            raise Refused
        text = str(value)
        if "\0" in text:
            raise Refused("it holds a NUL character")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise Refused("it holds half of a character")
        return text


def from_home(value: Any) -> Any:
    """A text with a leading ~ or ~USER replaced by the home folder, as a shell does."""
    if isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)
    return value


@dataclass(frozen=True)
class PathText(Text):
    """A path, or a name where a setting accepts both."""

    def parse(self, value: Any) -> str:
        path = from_home(super().parse(value))
        if "\n" in path:
            raise Refused("it holds a line break")
        return path


@dataclass(frozen=True)
class Module:
    """A Python module, by its name or its file."""

    def __str__(self) -> str:
        return "the name of a module or a path ending in .py"

    def parse(self, value: Any) -> str:
        if not isinstance(value, str) or (value.startswith(".") and not value.endswith(".py")):
            raise Refused
        return from_home(value)


@dataclass(frozen=True)
class Choice:
    """One of a few words; true and false may be among them."""

    options: tuple[str | bool, ...]

    def __str__(self) -> str:
        return "one of " + ", ".join(shown(option) for option in self.options)

    def parse(self, value: Any) -> str | bool:
        if isinstance(value, str) and value in self.options:
            return value
        if True in self.options:
            try:
                return Flag().parse(value)
            except Refused:
                pass
        names = [option for option in self.options if isinstance(option, str)]
        close = difflib.get_close_matches(str(value), names, n=1)
        raise Refused(f"did you mean {close[0]}?" if close else "")


@dataclass(frozen=True)
class ListOf:
    """A list in brackets, with entries of one type."""

    entry: ValueType
    may_be_empty: bool = True

    def __str__(self) -> str:
        empty = "" if self.may_be_empty else "not empty, "
        return f"a list in brackets, {empty}each entry {self.entry}"

    def parse(self, value: Any) -> list:
        if not isinstance(value, list) or not (value or self.may_be_empty):
            raise Refused
        return [self._parse_entry(entry) for entry in value]

    def _parse_entry(self, entry: Any) -> Any:
        try:
            return self.entry.parse(entry)
        except Refused:
            raise Refused(f"the entry {shown(entry)} is not {self.entry}") from None


@dataclass(frozen=True)
class Mapping:
    """{key: value, ...}, whose keys another check knows. null_is_empty: whether null is {}: hydra
    adds keys to null, and not to {}."""

    null_is_empty: bool = False

    def __str__(self) -> str:
        return "settings {key: value}"

    def parse(self, value: Any) -> dict[str, Any]:
        if value is None and self.null_is_empty:
            return {}
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise Refused
        return {
            key: from_home(entry) if key in PATH_ENTRIES else entry for key, entry in value.items()
        }


@dataclass(frozen=True)
class Weighted:
    """{name: NAME, weight: NUMBER}: a name with its share of a mixture."""

    name: ValueType

    def __str__(self) -> str:
        return "{name: NAME, weight: NUMBER} with a weight above 0"

    def parse(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or set(value) != {"name", "weight"}:
            raise Refused
        weight = Number(above=0).parse(value["weight"])
        return {"name": self.name.parse(value["name"]), "weight": weight}


@dataclass(frozen=True)
class Day:
    """A date as YYYY-MM-DD."""

    def __str__(self) -> str:
        return "a date YYYY-MM-DD"

    def parse(self, value: Any) -> str:
        try:
            return datetime.date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise Refused from None


@dataclass(frozen=True)
class Either:
    """The first type of several that accepts the value."""

    types: tuple[ValueType, ...]

    def __str__(self) -> str:
        return ", or ".join(str(accepted) for accepted in self.types)

    def parse(self, value: Any) -> Any:
        hints = []
        for accepted in self.types:
            try:
                return accepted.parse(value)
            except Refused as refused:
                hints.append(refused.hint)
        raise Refused(next(filter(None, hints), ""))


@dataclass(frozen=True)
class Null:
    """null: the setting is not given."""

    def __str__(self) -> str:
        return "null"

    def parse(self, value: Any) -> None:
        if value is not None:
            raise Refused


def nullable(accepted: ValueType) -> Either:
    return Either((accepted, Null()))


def shown(value: Any) -> str:
    """A value as it is typed in YAML, in one line of at most 200 characters."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {shown(entry)}" for key, entry in value.items()) + "}"
    elif isinstance(value, Iterable) and not isinstance(value, str):
        text = "[" + ", ".join(shown(entry) for entry in value) + "]"
    elif isinstance(value, str) and _reads_as_another_type(value):
        text = f"'{value}'"
    else:
        text = str(value)
    text = text.replace("\n", "\\n").replace("\0", "\\0")
    return text if len(text) <= 200 else text[:200] + "..."


def _reads_as_another_type(text: str) -> bool:
    """Whether a text looks like a number, null or nothing, so that quotes tell it apart."""
    if text in ("", "null", "None"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
