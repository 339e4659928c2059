"""Checks of single values."""

import dataclasses
from pathlib import Path
from typing import Any


def exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name too long for a file
        return False


def changed(settings: Any, **values: Any) -> Any:
    """A copy of a group of settings with other values of some keys; a dict changes keys of a group
    inside it."""
    for name, value in values.items():
        before = getattr(settings, name)
        if dataclasses.is_dataclass(before) and isinstance(value, dict):
            values[name] = changed(before, **value)
    return dataclasses.replace(settings, **values)


def temperatures(settings) -> list[float]:
    """`temperature` as a list."""
    if isinstance(settings.temperature, (int, float)):
        return [settings.temperature]
    return list(settings.temperature)
