"""Checks of single values."""

import dataclasses
from pathlib import Path
from typing import Any

from utils import ConfigError


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


def dataset_names(settings) -> list[str]:
    """The names in `datasets`."""
    return [entry if isinstance(entry, str) else entry["name"] for entry in settings.datasets]


def dataset_weights(settings) -> list[float] | None:
    """The weights in `datasets`, one for each name; None where they have none. Raises ConfigError
    where some have one."""
    entries = settings.datasets
    plain = [entry for entry in entries if isinstance(entry, str)]
    if not plain:
        return [entry["weight"] for entry in entries]
    if len(plain) < len(entries):
        raise ConfigError(
            f"datasets: {', '.join(plain)} without a weight beside data sets with one; give all of"
            f" them a weight, such as {{name: {plain[0]}, weight: 1.0}}, or none"
        )
    return None


def truncation(settings) -> dict[str, float | int | None]:
    """What limits the tokens that are drawn, as `sample` takes it."""
    return {"top_p": settings.topp, "top_k": settings.top_k, "min_p": settings.min_p}


def truncation_columns(settings) -> dict[str, float | int]:
    """What limits the tokens that are drawn, as rows show it: top_p, and the others if set."""
    return {name: value for name, value in truncation(settings).items() if value is not None}


def temperatures(settings) -> list[float]:
    """`temperature` as a list."""
    if isinstance(settings.temperature, (int, float)):
        return [settings.temperature]
    return list(settings.temperature)
