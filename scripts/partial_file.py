"""A file of rows that grows while a script works, and from which the same command continues."""

import contextlib
import fcntl
import json
import os
from pathlib import Path

from utils import DataError, check_writable


class PartialFile:
    """Rows of JSON in `path`, behind a line that says which command wrote them.

    settings: what determines the rows. Raises DataError where the file is of other settings, is
    damaged, or is being written by another process.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.rows = path, []
        check_writable(path.parent, "--output")
        self._lock = self._locked("ab") if path.is_file() else None
        header = json.dumps({"settings": settings}, sort_keys=True, default=str)
        lines = self._complete_lines()
        if lines and lines[0] != header:
            raise DataError(
                f"{path} was begun with other settings or other prompts; delete it to start again,"
                " or give the settings of before to continue"
            )
        self.rows = [self._row(number, line) for number, line in enumerate(lines[1:], 2)]
        self._header = None if lines else header

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
