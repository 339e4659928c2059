"""Rows of JSON, JSON-lines, CSV and Parquet files.

Every error is a DataError that names the file, the line or row, what was received and what is
accepted.
"""

import bisect
import codecs
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from preflab.readers.fields import type_and_value
from utils import DataError, content_hash, first_line

T = TypeVar("T")

FILE_TYPES = (".json", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet")
LONGEST_LINE = 50_000_000  # bytes; a longer line is no row of text but a file without line breaks
UTF8_BOM = codecs.BOM_UTF8


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

    def read_bytes(offset: int, size: int) -> bytes:
        with open(path, "rb") as f:
            f.seek(offset)
            return f.read(size)

    return _indexed_rows(path, index, read_bytes)


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
    for line_number, line in _lines(f, path):
        bom = len(UTF8_BOM) if position == 0 and line.startswith(UTF8_BOM) else 0
        if line[bom:].strip():
            index.append((line_number, position + bom, len(line) - bom))
        position += len(line)
    return index


def _lines(f: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line); at most LONGEST_LINE bytes are in memory."""
    read = functools.partial(f.readline, LONGEST_LINE + 1)
    for line_number, line in enumerate(iter(read, b""), 1):
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}:{line_number}: a line of more than {LONGEST_LINE / 1e6:g} MB, expected one"
                " row on each line; end each row with a line break, or save one list as .json"
            )
        yield line_number, line


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
    if _holds_json_lines(path):
        return _jsonl_rows(path)
    try:
        content = read_json(path)
    except DataError as error:
        if isinstance(error.__cause__, RepeatedKeyError):
            _name_the_row(path)
        raise
    if not isinstance(content, list):
        raise DataError(f"{path}: {type_and_value(content)}, expected a list of objects")

    def where(i: int) -> str:
        return f"{path}: row {i + 1}"

    return Rows(len(content), lambda i: as_object(content[i], where(i)), where, content_hash(path))


def _holds_json_lines(path: Path) -> bool:
    """Whether the first line that is not blank is an object, and another line follows it."""
    with open(path, "rb") as f:
        lines = (f.readline(LONGEST_LINE) for _ in itertools.count())
        filled = (line for line in itertools.takewhile(bool, lines) if line.strip())
        first, second = next(filled, b""), next(filled, b"")
    if not second or not first.removeprefix(UTF8_BOM).lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _name_the_row(path: Path) -> None:
    """Raise the error of a list with the row that has it; a parser of the whole knows no row."""
    with open(path, "rb") as f:
        for _ in streamed_rows(f, path):
            pass


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


# ------------------------------------------------------------------------------- bytes to objects


def read_json(path: Path):
    """The content of a whole JSON file; NaN and Infinity become floats, which `number` refuses with
    their row."""
    content = decode(path.read_bytes(), str(path), whole_file=True)
    return parse_json(content, str(path), whole_file=True)


def decode(raw: bytes, where: str, *, whole_file: bool = False) -> str:
    """UTF-8, with or without a byte order mark. whole_file: `where` is a path, and errors add the
    line."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if whole_file:
            line = raw.count(b"\n", 0, error.start) + 1
            where = f"{where}:{line}"
        raise DataError(
            f"{where}: byte {raw[error.start]:#x} is not UTF-8; save the file as UTF-8"
        ) from error


def parse_json(content: str, where: str, *, whole_file: bool = False):
    """A JSON value. whole_file: `where` is a path; errors add the line, and NaN and Infinity pass,
    because only who reads the field can name its row."""
    try:
        return json.loads(
            content,
            parse_constant=float if whole_file else _refuse_constant,
            object_pairs_hook=_without_repeated_keys,
        )
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if whole_file else where
        raise DataError(f"{place}: not JSON: {error}") from error
    except (InvalidConstantError, RepeatedKeyError) as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:  # too many digits, too deeply nested
        raise DataError(f"{where}: not JSON: {error}") from error


class InvalidConstantError(ValueError):
    """NaN or Infinity, which Python's JSON parser accepts although JSON has neither."""


def _refuse_constant(constant: str) -> None:
    raise InvalidConstantError(f"{constant} is not a JSON number, expected a finite number")


class RepeatedKeyError(ValueError):
    """A key that an object has twice, of which Python's JSON parser takes the last."""


def _without_repeated_keys(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in row if keys.count(key) > 1)
        raise RepeatedKeyError(
            f"an object has the key {repeated[:40]!r} {keys.count(repeated)} times, expected each"
            " key once"
        )
    return row


def as_object(row, where: str) -> dict:
    """A JSON object, or DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type_and_value(row)}, expected an object with named fields")
    return row


# ----------------------------------------------------------------------------- one row in memory

CHUNK = 1 << 20  # bytes read at a time
WHITESPACE = re.compile(r"\s*")


def streamed_rows(f: BinaryIO, path: Path) -> Iterator[tuple[dict, str]]:
    """(row, its place) of JSON lines or of one JSON list, whichever the file holds.

    One row is in memory at a time, so files larger than memory can be converted.
    """
    f.seek(len(UTF8_BOM) if f.read(len(UTF8_BOM)) == UTF8_BOM else 0)
    while (first := f.read(1)).isspace():
        pass
    if not first:
        raise DataError(f"{path}: the file is empty")
    if first == b"[":
        yield from _streamed_list(f, path)
        return
    f.seek(0)
    for line_number, line in _lines(f, path):
        if line.strip():
            where = f"{path}:{line_number}"
            yield as_object(parse_json(decode(line, where), where), where), where


def _streamed_list(f: BinaryIO, path: Path) -> Iterator[tuple[dict, str]]:
    """The elements of a list whose opening bracket was read.

    An element that does not parse may be incomplete: more of the file is read, and it is parsed
    again, until the file ends.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    parse = json.JSONDecoder(
        parse_constant=_refuse_constant, object_pairs_hook=_without_repeated_keys
    ).raw_decode
    buffer, position = "", 0  # text up to `position` was yielded
    for row_number in itertools.count(1):
        where, size = f"{path}: row {row_number}", CHUNK
        while True:
            try:
                begin = _next_element(buffer, position, first=row_number == 1)
                if begin is None:
                    _check_end(f, buffer[position:], path)
                    return
                row, position = parse(buffer, begin)
                break
            except json.JSONDecodeError as error:
                more = _read_more(f, utf8, size, where, error)
                buffer, position = buffer[position:] + more, 0
                size *= 2  # doubling bounds how often a long row is parsed again
            except RepeatedKeyError as error:
                raise DataError(f"{where}: {error}") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}") from error
        yield as_object(row, where), where


def _next_element(buffer: str, position: int, *, first: bool) -> int | None:
    """Where the next element begins; None at the end of the list."""
    position = WHITESPACE.match(buffer, position).end()
    if buffer.startswith("]", position):
        return None
    if first:
        return position
    if not buffer.startswith(",", position):
        raise json.JSONDecodeError("Expecting ',' delimiter", buffer, position)
    return WHITESPACE.match(buffer, position + 1).end()


def _read_more(
    f: BinaryIO, utf8: codecs.IncrementalDecoder, size: int, where: str, error: json.JSONDecodeError
) -> str:
    """The next `size` bytes as text; at the end of the file, `error` was a real one."""
    raw = f.read(size)
    if not raw:
        raise DataError(f"{where}: not JSON: {error.msg}") from error
    try:
        return utf8.decode(raw)
    except UnicodeDecodeError as invalid:
        if invalid.start == 0:
            raise DataError(
                f"{where}: byte {invalid.object[0]:#x} is not UTF-8; save the file as UTF-8"
            ) from invalid
        # Rows before the invalid byte are yielded first; it is read again after them.
        f.seek(invalid.start - len(invalid.object), 1)
        utf8.reset()
        return invalid.object[: invalid.start].decode("utf-8")


def _check_end(f: BinaryIO, buffer: str, path: Path) -> None:
    """Raise DataError unless only white space follows the closing bracket in `buffer`."""
    rest = buffer[buffer.index("]") + 1 :]
    chunks = iter(functools.partial(f.read, CHUNK), b"")
    if rest.strip() or any(chunk.strip() for chunk in chunks):
        raise DataError(
            f"{path}: something follows the end of the list; expected one list, or JSON lines"
        )
