"""What the user or the machine has to change, as the last line of a command."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from utils import ConfigError, PrefLabError, check_writable, machine_error

# The variables that Python's tempfile and most libraries look at, in their order.
TEMPORARY = ("TMPDIR", "TEMP", "TMP")


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Inside, an error that PrefLab knows, one of the operating system, or what a library makes of
    one ends the process with exit code 2 and one line. Any other error has its whole traceback."""
    try:
        with machine_errors_named():
            yield
    except (PrefLabError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def machine_errors_named() -> Iterator[None]:
    """Inside, what the machine refuses (no space, no permission, ...) becomes a ConfigError with
    what to do, also where a library has wrapped it in an error of its own."""
    try:
        yield
    except (PrefLabError, SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # an error of torch's checkpoints is no Exception
        if not (refused := machine_error(error)):
            raise
        raise ConfigError(refused) from error


def check_temporary_folder() -> None:
    """Raise ConfigError where the folder that the environment names for temporary files cannot be
    used: Python would take another one in silence, which may be small, or slow."""
    for name in TEMPORARY:
        if folder := os.environ.get(name):
            if not Path(folder).is_dir():
                raise ConfigError(
                    f"{name}={folder}: no such folder; make it, or set {name} to another one"
                )
            check_writable(Path(folder), name)
            return
