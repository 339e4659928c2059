"""Checks of single values."""

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from utils import ConfigError, nearest


def exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name too long for a file
        return False


def check_choice(key: str, value, accepted: Iterable[str]) -> None:
    if value not in accepted:
        raise ConfigError(f"{key}={value}; {nearest(str(value), accepted)}")


def check_whole(config: DictConfig, smallest: dict[str, int], optional: Iterable[str]) -> None:
    """`optional` ones may be null."""
    for key, least in smallest.items():
        value = OmegaConf.select(config, key)
        if value is None and key in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{key}={value} must be a whole number of at least {least}")


def changed(settings, **values):
    """A copy of a group of settings with other values of some keys."""
    return OmegaConf.merge(settings, values)


def temperatures(settings) -> list[float]:
    """`temperature` as a list."""
    if isinstance(settings.temperature, (int, float)):
        return [settings.temperature]
    return list(settings.temperature)
