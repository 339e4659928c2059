"""Rows of JSON, JSON-lines, CSV and Parquet files.

Every error is a DataError that names the file, the line or row, what was received and what is
accepted.
"""

import codecs
import contextlib
import csv
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from preflab.readers.fields import type_and_value
from utils import DataError, content_hash

FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")
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
    """The rows of a .json, .jsonl, .csv or .parquet file."""
    readers = {
        ".json": _json_rows,
        ".jsonl": _jsonl_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    check_file(path)
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise DataError(f"{path}: unknown type of file; accepted: {', '.join(FILE_TYPES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return readers[suffix](path)


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
    offsets, line_numbers, position = [], [], 0
    with open(path, "rb") as f:
        for line_number, line in enumerate(f, 1):
            bom = len(UTF8_BOM) if position == 0 and line.startswith(UTF8_BOM) else 0
            if line[bom:].strip():
                offsets.append(position + bom)
                line_numbers.append(line_number)
            position += len(line)

    def where(i: int) -> str:
        return f"{path}:{line_numbers[i]}" if line_numbers else str(path)

    def read(i: int) -> dict:
        with readable(where(i)), open(path, "rb") as f:
            f.seek(offsets[i])
            line = f.readline()
        return as_object(parse_json(decode(line, where(i)), where(i)), where(i))

    return Rows(len(offsets), read, where, content_hash(path))


def _json_rows(path: Path) -> Rows:
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: {type_and_value(content)}, expected a list of objects")

    def where(i: int) -> str:
        return f"{path}: row {i + 1}"

    return Rows(len(content), lambda i: as_object(content[i], where(i)), where, content_hash(path))


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
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    # ValueError and OverflowError: values that Python has no type for.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: no readable parquet file: {error}") from error
    return Rows(len(rows), lambda i: rows[i], lambda i: f"{path}: row {i + 1}", content_hash(path))


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
        return json.loads(content, parse_constant=float if whole_file else _refuse_constant)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if whole_file else where
        raise DataError(f"{place}: not JSON: {error}") from error
    except InvalidConstantError as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:  # too many digits, too deeply nested
        raise DataError(f"{where}: not JSON: {error}") from error


class InvalidConstantError(ValueError):
    """NaN or Infinity, which Python's JSON parser accepts although JSON has neither."""


def _refuse_constant(constant: str) -> None:
    raise InvalidConstantError(f"{constant} is not a JSON number, expected a finite number")


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
    for line_number, line in enumerate(iter(f.readline, b""), 1):
        if line.strip():
            where = f"{path}:{line_number}"
            yield as_object(parse_json(decode(line, where), where), where), where


def _streamed_list(f: BinaryIO, path: Path) -> Iterator[tuple[dict, str]]:
    """The elements of a list whose opening bracket was read.

    An element that does not parse may be incomplete: more of the file is read, and it is parsed
    again, until the file ends.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    parse = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode
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
