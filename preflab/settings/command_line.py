"""The command line of an entry point: hydra's flags, `--help`, and the overrides.

Nothing here imports torch, so that a question or a slip is answered in about a second.
"""

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException

from preflab.settings.help_text import help_text
from preflab.settings.keys import CONFIG_DIR, ROOT
from preflab.settings.other_words import translate
from preflab.settings.overrides import Sources, check_overrides, fail
from preflab.settings.refused import check_temporary_folder, errors_in_one_line
from preflab.settings.schema import RULES
from preflab.settings.sweep_words import for_hydra, settings_in
from utils import ConfigError, PrefLabError


def check_command_line(argv: Sequence[str], program: str = "train.py") -> bool:
    """Answer `--help`, or check the command line; returns whether a run follows.

    False: hydra answers by itself (`--cfg job`, `--info`, `-sc install=bash`) and runs nothing. A
    wrong command line ends the process with exit code 2 and one line that says what to type.
    """
    try:
        given = parse_flags(argv)
        if given.help:
            print(help_text(program, given.overrides, sources_of(given)))
            raise SystemExit(0)
        check_arguments(argv)
        runs = not (given.cfg or given.info or given.shell_completion or given.hydra_help)
        if runs:
            check_temporary_folder()
        return runs
    except PrefLabError as error:
        fail(error)


def run_config(run: Callable[[], None]) -> None:
    """Call a function of `hydra.main`. What hydra or the machine refuses ends the process with exit
    code 2 and one line; any other error has its whole traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra raises errors, and prints none
    with errors_in_one_line():
        try:
            run()
        except HydraException as error:
            causes = (str(cause).splitlines()[0] for cause in (error, error.__cause__) if cause)
            raise ConfigError("; ".join(causes)) from error


def check_arguments(argv: Sequence[str]) -> None:
    """Refuse flags and overrides that hydra or the schema does not accept. Raises ConfigError."""
    given = parse_flags(argv)
    if not (given.shell_completion or given.hydra_help or given.experimental_rerun):
        words = given.overrides
        if given.multirun:
            words = [setting for word in words for setting in settings_in(word)]
        check_overrides(words, sources_of(given))


def words_for_hydra(argv: Sequence[str]) -> list[str]:
    """A checked command line as hydra takes it: the grids of a sweep go to its sweeper."""
    given = parse_flags(argv)
    if not given.multirun:
        return list(argv)
    flags = [word for word in argv if word not in given.overrides]
    return [*flags, *for_hydra(given.overrides)]


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """hydra's flags, and the remaining words as `overrides`. Raises ConfigError for other flags."""
    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise ConfigError(f"{message}; python train.py --help and --hydra-help say what there is")

    parser.error = refuse
    given, unknown = parser.parse_known_args(list(argv))
    for word in unknown:
        if word.startswith("-"):
            raise ConfigError(_unknown_flag(word))
    given.overrides += unknown  # argparse does not join words before a flag with those behind it
    return given


def _unknown_flag(word: str) -> str:
    name, _, value = word.lstrip("-").partition("=")
    key = name.replace("-", "_")
    ours = key if key in RULES else None
    advice = f"{ours}={value or 'VALUE'}" if ours else translate(key, set(RULES))
    rule = f"{word}: settings are typed KEY=VALUE, without dashes"
    return f"{rule}; {advice}" if advice else rule


def sources_of(given: argparse.Namespace) -> Sources:
    """Where hydra will look for yaml files. Raises ConfigError for a folder that is not there."""
    own = {"--config-path": given.config_path, "--config-dir": given.config_dir}
    folders = {
        flag: (ROOT if flag == "--config-path" else Path.cwd()) / folder
        for flag, folder in own.items()
        if folder
    }
    for flag, folder in folders.items():
        if not folder.is_dir():
            raise ConfigError(f"{flag} {folder}: no such folder")
    first = folders.pop("--config-path", CONFIG_DIR)
    return Sources((first, *folders.values()), given.config_name or "config")


@contextlib.contextmanager
def large_imports() -> Iterator[None]:
    """Import torch, transformers and what needs them, for the rest of the process.

    Python looks through all objects again and again for some that nothing reaches. What these
    packages make stays, so it is left out of every such search, now and later: about a second of
    the start of a command, and a third of a second of each search. Nothing happens where they are
    imported already, because garbage of an earlier run would stay too.
    """
    if "transformers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
