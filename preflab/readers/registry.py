"""The registry of named datasets, and the opening of a name, a path or a hub id."""

import copy
from collections.abc import Callable
from pathlib import Path

from preflab.readers.columns import UserPairs
from preflab.readers.fields import type_and_value
from preflab.readers.files import FILE_TYPES, readable
from preflab.readers.hub import is_local_path
from preflab.readers.records import CHOICES, PAIRINGS, Options, Reader, Source
from utils import ConfigError, nearest

DATASETS: dict[str, Reader] = {}


def register_dataset(name: str) -> Callable:
    """Register a `Reader` under `datasets=[name]`."""

    def decorate(cls):
        DATASETS[name] = cls()
        return cls

    return decorate


def open_dataset(name: str, split: str, **options) -> Source:
    """A dataset split by registered name, path or hub id; raises at once where there is nothing to
    read.

    split: "train" or "test". options: see `Options`.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split={split!r}; accepted: train, test")
    if not isinstance(name, str):
        raise ConfigError(
            f"datasets=[{name}] is {type_and_value(name)}, expected a name, a path or a hub id;"
            f" write it as a path: ./{name}"
        )
    settings = Options(**options)
    if settings.pairing is not None and settings.pairing not in PAIRINGS:
        raise ConfigError(f"pairing={settings.pairing!r}; {nearest(settings.pairing, PAIRINGS)}")
    if (choice := settings.choose_responses) not in CHOICES:
        raise ConfigError(f"choose_responses={choice!r}; {nearest(choice, CHOICES)}")
    with readable(f"datasets=[{name}]"):
        reader = _reader_of(name)
        if (settings.train_split or settings.test_split) and not reader.chooses_splits:
            raise ConfigError(
                f"datasets=[{name}] has its published splits, and train_split and test_split choose"
                " among those of a path or a hub id; set them to null"
            )
        return Source(name, split, reader, settings)


def _reader_of(name: str) -> Reader:
    if name in DATASETS:
        # A reader may store what it learns of one file, which must not reach the next.
        return copy.copy(DATASETS[name])
    is_path = is_local_path(name) or name.lower().endswith(FILE_TYPES) or Path(name).exists()
    if not is_path and "/" not in name:
        raise ConfigError(
            f"datasets=[{name}]: no dataset of this name, and no path or hub id;"
            f" {nearest(name, DATASETS)}"
        )
    return UserPairs(name)
