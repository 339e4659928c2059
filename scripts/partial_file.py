"""A file of rows that grows while a script works, and from which the same command continues."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from utils import DataError, check_writable, content_hash, model_folder

# Settings that name no input: a registered name, and a file that grows while rewards are computed.
NO_INPUTS = ("name", "cache")


class PartialFile:
    """Rows of JSON in `path`, behind a line that says which command wrote them.

    settings: what determines the rows. The files and folders that they name count with their
    content. Raises DataError where the file is of other settings, is damaged, or is being written
    by another process.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.rows = path, []
        check_writable(path.parent, "--output")
        self._lock = self._locked("ab") if path.is_file() else None
        header = {"settings": settings, "contents": contents_of(settings)}
        header = json.loads(json.dumps(header, default=str))
        lines = self._complete_lines()
        if lines and (problem := _difference(lines[0], header)):
            raise DataError(
                f"{path} was begun with {problem}; delete it to start again, or give those of"
                " before to continue"
            )
        self.rows = [self._row(number, line) for number, line in enumerate(lines[1:], 2)]
        self._header = None if lines else json.dumps(header, sort_keys=True)

    def _locked(self, mode: str):
        """The file, open and locked as long as this object lives. mode: `xb` makes it."""
        try:
            file = open(self.path, mode)  # noqa: SIM115
            _lock(file.fileno())
        except (BlockingIOError, FileExistsError) as error:
            raise DataError(
                f"{self.path} is being written by another process; wait until it ends, or give"
                " another --output"
            ) from error
        return file

    def _row(self, number: int, line: str) -> dict:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                return row
        raise DataError(
            f"{self.path}:{number}: not a row that was written; delete the file to start again"
        )

    def _complete_lines(self) -> list[str]:
        """The lines that were written whole; what a kill has left of the next is cut off."""
        if self._lock is None:
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self.path, len(whole))
        return whole.decode("utf-8", errors="replace").split("\n")[:-1]

    def add(self, rows: list[dict]) -> None:
        """Append rows, which are on the disk when this returns."""
        self._lock = self._lock or self._locked("xb")
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        if self._header is not None:
            lines, self._header = [self._header, *lines], None
        with open(self.path, "ab") as f:
            f.write("".join(f"{line}\n" for line in lines).encode())
            f.flush()
            os.fsync(f.fileno())
        self.rows += rows

    def remove(self) -> None:
        """Delete the file, once its rows are elsewhere."""
        self.path.unlink(missing_ok=True)


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        pass


def _difference(line: str, now: dict) -> str:
    """In what the header in a line differs from that of now; empty where they are equal."""
    before = {}
    with contextlib.suppress(ValueError, RecursionError):
        before = json.loads(line)
    if not isinstance(before, dict) or before.get("settings") != now["settings"]:
        return "other settings or other prompts"
    known = before.get("contents", {})
    changed = [path for path, digest in now["contents"].items() if known.get(path) != digest]
    return f"other contents of {', '.join(changed)}" if changed else ""


def contents_of(settings: dict) -> dict[str, str]:
    """A hash of each file and folder that settings name, by its path. A run counts as the model
    that is read of it, and a folder as the files in it."""
    return {
        named: _content(Path(os.path.expanduser(named))) for named in sorted(set(_paths(settings)))
    }


def _paths(value, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _paths(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from _paths(entry, key)
    elif isinstance(value, str) and key not in NO_INPUTS and _names_a_file(value):
        yield value


def _names_a_file(value: str) -> bool:
    return bool(value) and os.path.exists(os.path.expanduser(value))


def _content(path: Path) -> str:
    path = Path(model_folder(path))
    if path.is_file():
        return content_hash(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    return content_hash(*(part for file in files for part in (file.name, file)))
