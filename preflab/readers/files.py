"""Rows of JSON, JSON-lines, CSV and Parquet files.

Every error is a DataError that names the file, the line or row, what was received and what is
accepted.
"""

import array
import bisect
import contextlib
import csv
import functools
import gzip
import io
import itertools
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from preflab.readers.fields import type_and_value
from preflab.readers.json_text import (
    CHUNK,
    UTF8_BOM,
    RepeatedKeyError,
    as_object,
    decode,
    first_byte,
    holds_json_lines,
    lines_of,
    list_elements,
    parse_json,
    read_json,
)
from utils import DataError, content_hash, first_line

T = TypeVar("T")

FILE_TYPES = (".json", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet")


@dataclass
class Rows:
    """Rows of a dataset split.

    n: the number of rows. read: row i as a dict. where: the place of row i, for messages.
    fingerprint: changes with the content. whole: the dataset has no separate test split, so prompts
    are held out. note: a sentence for data.json. all_text: the format has no type but text (CSV),
    so a cell may stand for a number or a list.
    """

    n: int
    read: Callable[[int], dict]
    where: Callable[[int], str]
    fingerprint: str
    whole: bool = False
    note: str = ""
    all_text: bool = False


@contextlib.contextmanager
def readable(place: str) -> Iterator[None]:
    """Turn an OSError (no permission, a name that is too long, a file that was deleted) into a
    DataError that names the file, or `place` where the system names none."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error or type(error).__name__
        raise DataError(f"{error.filename or place}: {reason}") from error


def file_rows(path: Path) -> Rows:
    """The rows of a file of one of FILE_TYPES."""
    readers = {
        ".json": _json_rows,
        ".jsonl": _jsonl_rows,
        ".jsonl.gz": _compressed_rows,
        ".jsonl.zst": _compressed_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    check_file(path)
    file_type = next((end for end in readers if path.name.lower().endswith(end)), None)
    if file_type is None:
        raise DataError(f"{path}: unknown type of file; accepted: {', '.join(FILE_TYPES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return readers[file_type](path)


def check_file(path: Path) -> None:
    """Raise DataError unless `path` is a regular file, which can be read more than once."""
    if path.is_file():
        return
    if path.exists():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise DataError(f"{path}: {what}, expected a file")
    parent = path.parent
    listing = f"; in {parent}: {list_folder(parent)}" if parent.is_dir() else ""
    raise DataError(f"{path}: no such file{listing}")


def list_folder(folder: Path) -> str:
    """The first eight entries of a folder, for messages."""
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    return ", ".join(names[:8]) or "nothing"


# --------------------------------------------------------------------------- one function a format


def _jsonl_rows(path: Path) -> Rows:
    with open(path, "rb") as f:
        index = _index_lines(f, path)
    return _indexed_rows(path, index, functools.partial(_read_part, path))


def _compressed_rows(path: Path) -> Rows:
    """JSON lines in gzip or zstd. Rows are read in any order, so that the content is unpacked once,
    into a temporary file without a name."""
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115  closed with the last reference to the rows
    try:
        with _unpacking(path) as f:
            shutil.copyfileobj(f, unpacked, CHUNK)
    # What gzip, zlib and pyarrow raise for a file that is cut short or of another format.
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked: {first_line(error)}") from error
    unpacked.seek(0)
    index = _index_lines(unpacked, path)

    def read_bytes(offset: int, size: int) -> bytes:
        return os.pread(unpacked.fileno(), size, offset)

    return _indexed_rows(path, index, read_bytes)


def _unpacking(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


def _index_lines(f: BinaryIO, path: Path) -> list[tuple[int, int, int]]:
    """(line number, offset, bytes) of the lines that are not blank."""
    index, position = [], 0
    for line_number, line in lines_of(f, path):
        bom = len(UTF8_BOM) if position == 0 and line.startswith(UTF8_BOM) else 0
        if line[bom:].strip():
            index.append((line_number, position + bom, len(line) - bom))
        position += len(line)
    return index


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(size)


def _indexed_rows(
    path: Path, index: list[tuple[int, int, int]], read_bytes: Callable[[int, int], bytes]
) -> Rows:
    def where(i: int) -> str:
        return f"{path}:{index[i][0]}" if index else str(path)

    def read(i: int) -> dict:
        with readable(where(i)):
            line = read_bytes(*index[i][1:])
        return as_object(parse_json(decode(line, where(i)), where(i)), where(i))

    return Rows(len(index), read, where, content_hash(path))


def _json_rows(path: Path) -> Rows:
    """The rows of one list, which are indexed, or of JSON lines."""
    if holds_json_lines(path):
        return _jsonl_rows(path)
    offsets, sizes = array.array("q"), array.array("q")
    with open(path, "rb") as f:
        if first_byte(f) != b"[":
            content = read_json(path)
            raise DataError(f"{path}: {type_and_value(content)}, expected a list of objects")
        try:
            for _, offset, size in list_elements(f, path, constants=True):
                offsets.append(offset)
                sizes.append(size)
        except DataError as error:
            if not isinstance(error.__cause__, RepeatedKeyError):
                read_json(path)  # raises with the line and the column
            raise

    def where(i: int) -> str:
        return f"{path}: row {i + 1}"

    def read(i: int) -> dict:
        with readable(where(i)):
            text = decode(_read_part(path, offsets[i], sizes[i]), where(i))
        return as_object(parse_json(text, where(i), constants=True), where(i))

    return Rows(len(offsets), read, where, content_hash(path))


def _csv_rows(path: Path) -> Rows:
    rows = list(_csv_lines(path))
    if not rows:
        return Rows(0, rows.__getitem__, lambda i: str(path), content_hash(path))
    _, header = rows.pop(0)
    repeated = next((name for name in header if name and header.count(name) > 1), None)
    if repeated:
        raise DataError(
            f"{path}: the header names the column {repeated!r} {header.count(repeated)} times;"
            " expected each name once"
        )
    if not rows:
        raise DataError(f"{path} holds a header and no row; the header: {', '.join(header)}")
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{path}:{line}: {len(cells)} fields, the header has {len(header)}; put a text"
                " with commas, quotes or line breaks in quotes"
            )
    return Rows(
        len(rows),
        lambda i: dict(zip(header, rows[i][1], strict=True)),
        lambda i: f"{path}:{rows[i][0]}",
        content_hash(path),
        all_text=True,
    )


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, its cells) of each row that is not blank, header included."""
    csv.field_size_limit(2**31 - 1)  # the default of csv refuses texts over 128 KiB
    content = decode(path.read_bytes(), str(path), whole_file=True)
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: no readable CSV: {error}") from error
        if cells is None:
            return
        if cells:
            yield line, cells


def _parquet_rows(path: Path) -> Rows:
    file = _ParquetFile(path)
    return Rows(file.n, file.read, lambda i: f"{path}: row {i + 1}", content_hash(path))


def without_fillers(row: dict) -> dict:
    """A row of a columnar format, which gives every object in a column the fields of all others,
    without the empty ones inside of objects."""

    def part(value):
        if isinstance(value, dict):
            return {key: part(one) for key, one in value.items() if one is not None}
        return [part(one) for one in value] if isinstance(value, list) else value

    return {key: part(value) for key, value in row.items()}


class _ParquetFile:
    """The rows of a parquet file, of which memory holds a few: the columns of two row groups, and
    some pieces of them as Python objects."""

    PIECE = 512  # rows that are converted together

    def __init__(self, path: Path):
        import pyarrow.parquet

        self.path = path
        self._file = self._attempt(lambda: pyarrow.parquet.ParquetFile(path))
        groups = self._file.metadata
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        self.ends = list(itertools.accumulate(sizes))
        self.n = groups.num_rows
        self._group = functools.lru_cache(2)(self._file.read_row_group)
        self._piece = functools.lru_cache(16)(self._read_piece)

    def read(self, i: int) -> dict:
        group = bisect.bisect_right(self.ends, i)
        piece, place = divmod(i - (self.ends[group - 1] if group else 0), self.PIECE)
        return self._attempt(lambda: self._piece(group, piece))[place]

    def _read_piece(self, group: int, piece: int) -> list[dict]:
        rows = self._group(group).slice(piece * self.PIECE, self.PIECE).to_pylist()
        return [without_fillers(row) for row in rows]

    def _attempt(self, read: Callable[[], T]) -> T:
        import pyarrow

        try:
            return read()
        # ValueError and OverflowError: values that Python has no type for.
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(f"{self.path}: no readable parquet file: {error}") from error
