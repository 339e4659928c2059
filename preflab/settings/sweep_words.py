"""The words of a sweep: its grids, its runs, and the names of their folders."""

import hashlib
import re
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from preflab.settings.keys import GROUPS
from preflab.settings.overrides import quoted

# A space in front of the next KEY= of a grid.
NEXT_SETTING = re.compile(r"\s+(?=[A-Za-z_][\w./@-]*=)")

# Settings of these exist with some options only. Hydra composes a sweep's own config with the
# default options, which may lack them.
OF_AN_OPTION = ("loss.", "reward.")

LONGEST_NAME = 150  # characters; file systems allow 255 bytes


def settings_in(word: str) -> list[str]:
    """The settings of a grid such as `loss=odpo loss.alpha=0.5,1.0`; `[word]` for any other word.

    Nothing that hydra can read as one setting is a grid: a text in quotes may hold `a=b`.
    """
    parts = NEXT_SETTING.split(word.strip())
    if len(parts) < 2 or _is_readable(word):
        return [word]
    return parts


def _is_readable(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def for_hydra(words: Sequence[str]) -> list[str]:
    """The words of a sweep as hydra takes them: those that it cannot compose before the options of
    a run are known go to its sweeper, as `hydra.sweeper.words`."""
    held = [w for w in words if w.startswith(OF_AN_OPTION) or len(settings_in(w)) > 1]
    if not held:
        return list(words)
    others = [word for word in words if word not in held]
    return [*others, f"hydra.sweeper.words=[{','.join(_as_text(word) for word in held)}]"]


def _as_text(word: str) -> str:
    """A word in quotes, whatever it holds."""
    text = quoted(word)
    return text if text.startswith("'") else f"'{word}'"


def grids_of(words: Sequence[str]) -> list[list[str]]:
    """The grids of a sweep, each as a list of settings.

    Words with one setting belong to every grid that does not set the same key. Where grids choose
    an option, such as loss=, the plain word that chooses others is a grid too.
    """
    grids = [parts for word in words if len(parts := settings_in(word)) > 1]
    plain = [word for word in words if len(settings_in(word)) == 1]
    if not grids:
        return [plain]
    chosen = {_key(setting) for grid in grids for setting in grid} & set(GROUPS)
    if options := [word for word in plain if _key(word) in chosen]:
        grids.insert(0, options)
    plain = [word for word in plain if word not in options]
    return [[*(w for w in plain if _key(w) not in set(map(_key, grid))), *grid] for grid in grids]


def _key(setting: str) -> str:
    return setting.split("=", 1)[0].lstrip("+")


def runs_of(grid: Sequence[str], config_loader=None) -> list[list[str]]:
    """The settings of each run of a grid: all combinations of what is swept."""
    [runs] = BasicSweeper.split_arguments(parse(grid, config_loader), None)
    return runs


def parse(words: Sequence[str], config_loader=None) -> list[Override]:
    """The overrides of some words. config_loader: hydra's, which glob(*) needs."""
    return OverridesParser.create(config_loader=config_loader).parse_overrides(list(words))


def folder_names(runs: Sequence[Sequence[str]]) -> list[str]:
    """A folder name for each run: its settings in which the runs differ, as KEY-VALUE_KEY-VALUE.

    Letters, digits and `_.+-` only, so that a name needs quotes neither in a shell nor for hydra. A
    sweep of one run is named by all settings.
    """
    tables = [dict(setting.split("=", 1) for setting in run) for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    varying = [key for key in keys if len({table.get(key) for table in tables}) > 1]
    shown = varying if len(runs) > 1 else keys
    names = [
        _safe("_".join(f"{key.lstrip('+')}-{table[key]}" for key in shown if key in table))
        for table in tables
    ]
    return [
        name if names.count(name) == 1 and len(name) <= LONGEST_NAME else _with_digest(name, run)
        for name, run in zip(names, runs, strict=True)
    ]


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII).strip("-.") or "default"


def _with_digest(name: str, run: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join(run).encode()).hexdigest()[:12]
    return f"{name[: LONGEST_NAME - 20]}-{digest}"
