"""The registry of named datasets, and how a name, a path or a hub id is opened."""

import copy
from collections.abc import Callable
from pathlib import Path

from preflab.readers.columns import UserPairs
from preflab.readers.fields import kind_of
from preflab.readers.files import FILE_TYPES, readable
from preflab.readers.records import PAIRINGS, Options, Reader, Source
from utils import ConfigError, nearest

DATASETS: dict[str, Reader] = {}


def register_dataset(name: str) -> Callable:
    """Register a `Reader` under `datasets=[name]`."""

    def decorate(reader):
        DATASETS[name] = reader()
        return reader

    return decorate


def open_dataset(name: str, split: str, **options) -> "Source":
    """A dataset split by registered name, path or hub id; raises at once if there is nothing to
    read.

    split: "train" or "test". options: see `Options`.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split={split!r}; accepted: train, test")
    if not isinstance(name, str):
        raise ConfigError(
            f"datasets=[{name}] is {kind_of(name)}, expected a name, a path or a hub id; write it"
            f" as a path: ./{name}"
        )
    settings = Options(**options)
    if settings.pairing is not None and settings.pairing not in PAIRINGS:
        raise ConfigError(f"pairing={settings.pairing!r}; {nearest(settings.pairing, PAIRINGS)}")
    reader = copy.copy(
        DATASETS.get(name)
    )  # what a reader learns of one file must not reach the next
    with readable(f"datasets=[{name}]"):
        if reader is None:
            if (
                "/" not in name
                and not name.lower().endswith(FILE_TYPES)
                and not Path(name).exists()
            ):
                told = nearest(name, DATASETS)
                raise ConfigError(
                    f"datasets=[{name}]: no dataset of this name, and no path or hub id; {told}"
                )
            reader = UserPairs(name)
        return Source(name, split, reader, settings)
