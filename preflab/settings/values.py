"""Checks of single values."""

from pathlib import Path

from omegaconf import OmegaConf


def exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name too long for a file
        return False


def changed(settings, **values):
    """A copy of a group of settings with other values of some keys."""
    return OmegaConf.merge(settings, values)


def temperatures(settings) -> list[float]:
    """`temperature` as a list."""
    if isinstance(settings.temperature, (int, float)):
        return [settings.temperature]
    return list(settings.temperature)
