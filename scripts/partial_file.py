"""A file of rows that grows while a script works, and from which the same command continues."""

import json
import os
from pathlib import Path

from utils import DataError


class PartialFile:
    """Rows of JSON in `path`, behind a line that says which command wrote them.

    settings: what determines the rows. Raises DataError where the file is of other settings.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.rows = path, []
        path.parent.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"settings": settings}, sort_keys=True, default=str)
        lines = self._complete_lines()
        if lines and lines[0] != header:
            raise DataError(
                f"{path} was begun with other settings or other prompts; delete it to start again,"
                " or give the settings of before to continue"
            )
        self.rows = [json.loads(line) for line in lines[1:]]
        self._header = None if lines else header

    def _complete_lines(self) -> list[str]:
        """The lines that were written whole; what a kill has left of the next is cut off."""
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self.path, len(whole))
        return whole.decode("utf-8").split("\n")[:-1]

    def add(self, rows: list[dict]) -> None:
        """Append rows, which are on the disk when this returns."""
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
