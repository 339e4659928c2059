"""Rows of JSON, JSONL, CSV and parquet files, and fields that are what they should be.

Every error is a DataError that names the file, the line or row, what came and what was expected.
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

from preflab.readers.fields import kind_of
from utils import DataError, content_hash

FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass
class Rows:
    """Rows of a dataset split. `read(i)` is row i, `where(i)` names it.

    whole: there is no split of its own. all_text: the file knows no type but text (CSV), so a field
    may stand for something else.
    """

    n: int
    read: Callable[[int], dict]
    where: Callable[[int], str]
    fingerprint: str
    whole: bool = False
    note: str = ""
    all_text: bool = False


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """What the system refuses (no permission, a name that is too long, a file that is gone), as an
    error that names the file or else `what`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or what}: {error.strerror or error or type(error).__name__}"
        ) from error


def file_rows(path: Path) -> Rows:
    """The rows of a .json, .jsonl, .csv or .parquet file; every message names the file and the line
    or row."""
    check_file(path)
    if path.suffix.lower() not in FILE_TYPES:
        raise DataError(f"{path}: unknown type of file; accepted: {', '.join(FILE_TYPES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }[path.suffix.lower()](path)


def check_file(path: Path) -> None:
    """Raise DataError with what is there instead, where there is no file that can be read more than
    once."""
    if path.is_file():
        return
    if path.exists():
        raise DataError(
            f"{path}: {'a folder' if path.is_dir() else 'a pipe or a device'}, expected a file"
        )
    raise DataError(
        f"{path}: no such file"
        + (f"; in {path.parent}: {listed(path.parent)}" if path.parent.is_dir() else "")
    )


def listed(folder: Path) -> str:
    """What a folder holds, as far as a message has room."""
    return ", ".join(sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())[:8]) or "nothing"


def _jsonl_rows(path: Path) -> Rows:
    begins, lines, at = [], [], 0
    with open(path, "rb") as f:
        for line_number, line in enumerate(f, 1):
            begin = at + 3 if at == 0 and line.startswith(b"\xef\xbb\xbf") else at
            at += len(line)
            if line[begin - at + len(line) :].strip():
                begins.append(begin)
                lines.append(line_number)

    def where(i: int) -> str:
        return f"{path}:{lines[i]}" if lines else str(path)

    def read(i: int) -> dict:
        with readable(where(i)), open(path, "rb") as f:
            f.seek(begins[i])
            row = parse_json(decode(f.readline(), where(i)), where(i))
        return as_object(row, where(i))

    return Rows(len(begins), read, where, content_hash(path))


def _json_rows(path: Path) -> Rows:
    content = parse_json(decode(path.read_bytes(), str(path)), str(path))
    if not isinstance(content, list):
        raise DataError(f"{path}: {kind_of(content)}, expected a list of objects")

    def where(i: int) -> str:
        return f"{path}: row {i + 1}"

    return Rows(len(content), lambda i: as_object(content[i], where(i)), where, content_hash(path))


def _csv_rows(path: Path) -> Rows:
    rows = list(_csv_lines(path))
    if not rows:
        return Rows(0, rows.__getitem__, lambda i: str(path), content_hash(path))
    _, header = rows.pop(0)
    if twice := next((name for name in header if name and header.count(name) > 1), None):
        raise DataError(
            f"{path}: the header names the column {twice!r} {header.count(twice)} times; expected"
            " each name once"
        )
    if not rows:
        raise DataError(f"{path} holds a header and no row; the header: {', '.join(header)}")
    for line, fields in rows:
        if len(fields) != len(header):
            raise DataError(
                f"{path}:{line}: {len(fields)} fields, the header has {len(header)}; put a text"
                " with commas, quotes or ends of lines in quotes"
            )
    return Rows(
        len(rows),
        lambda i: dict(zip(header, rows[i][1])),
        lambda i: f"{path}:{rows[i][0]}",
        content_hash(path),
        all_text=True,
    )


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(the line it begins at, its fields) of each row that is not blank, the header included."""
    csv.field_size_limit(2**31 - 1)  # a long text is no mistake
    reader = csv.reader(io.StringIO(decode(path.read_bytes(), str(path)), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: no readable CSV: {error}") from error
        if fields is None:
            return
        if fields:
            yield line, fields


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # the last two: values that Python has no type for
        raise DataError(f"{path}: no readable parquet file: {error}") from error
    return Rows(len(rows), lambda i: rows[i], lambda i: f"{path}: row {i + 1}", content_hash(path))


def decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        at = where if ":" in where else f"{where}:{line}"
        raise DataError(
            f"{at}: byte {raw[error.start]:#x} is not UTF-8; save the file as UTF-8"
        ) from error


def parse_json(content: str, where: str):
    def refuse(constant: str):
        if ":" not in where:
            return float(
                constant
            )  # of a whole file: whoever reads this field can say in which row it is
        raise DataError(
            f"{where}: {constant} is no number that JSON knows, expected a finite number"
        )

    try:
        return json.loads(content, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError) as error:
        at = (
            f"{where}:{error.lineno}"
            if isinstance(error, json.JSONDecodeError) and ":" not in where
            else where
        )
        raise DataError(f"{at}: not JSON: {error}") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not JSON: {error}") from error


def as_object(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{where}: {kind_of(row)}, expected an object with named fields")
    return row


CHUNK = 1 << 20


GAP = re.compile(r"\s*")


def streamed_rows(f: BinaryIO, path: Path) -> Iterator[tuple[dict, str]]:
    """(row, where it is) of JSON lines or of one JSON list, whichever the content is; raises
    DataError."""
    f.seek(3 if f.read(3) == codecs.BOM_UTF8 else 0)
    while (first := f.read(1)).isspace():
        pass
    if not first:
        raise DataError(f"{path}: the file is empty")
    if first == b"[":
        yield from _rows_of_list(f, path)
        return
    f.seek(0)
    for line_number, line in enumerate(iter(f.readline, b""), 1):
        if line.strip():
            where = f"{path}:{line_number}"
            yield as_object(parse_json(decode(line, where), where), where), where


def _rows_of_list(f: BinaryIO, path: Path) -> Iterator[tuple[dict, str]]:
    """The elements of a list whose bracket was read; more of the file is read when one is not
    complete yet."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    parse = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode
    read, at = "", 0  # what is read and not used up begins at `at`
    for row_number in itertools.count(1):
        where, size = f"{path}: row {row_number}", CHUNK
        while True:
            try:
                if (begin := _next_element(read, at, row_number == 1)) is None:
                    return _check_end(f, read[at:], path)
                row, at = parse(read, begin)
                break
            except json.JSONDecodeError as error:
                read, at = read[at:] + _more(f, utf8, size, where, error), 0
                size *= 2  # so that a long row is not parsed all too often
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}") from error
        yield as_object(row, where), where


def _next_element(read: str, at: int, first: bool) -> int | None:
    """Where the next element begins; None at the end of the list."""
    at = GAP.match(read, at).end()
    if read.startswith("]", at):
        return None
    if first:
        return at
    if not read.startswith(",", at):
        raise json.JSONDecodeError("Expecting ',' delimiter", read, at)
    return GAP.match(read, at + 1).end()


def _more(
    f: BinaryIO, utf8: codecs.IncrementalDecoder, size: int, where: str, error: json.JSONDecodeError
) -> str:
    """Further text; raises DataError where there is none, so that `error` was one."""
    raw = f.read(size)
    if not raw:
        raise DataError(f"{where}: not JSON: {error.msg}") from error
    try:
        return utf8.decode(raw)
    except UnicodeDecodeError as bad:
        if bad.start == 0:
            raise DataError(
                f"{where}: byte {bad.object[0]:#x} is not UTF-8; save the file as UTF-8"
            ) from bad
        f.seek(
            bad.start - len(bad.object), 1
        )  # rows before the bad byte are fine; it is met again after them
        utf8.reset()
        return bad.object[: bad.start].decode("utf-8")


def _check_end(f: BinaryIO, read: str, path: Path) -> None:
    if read[read.index("]") + 1 :].strip() or any(
        raw.strip() for raw in iter(functools.partial(f.read, CHUNK), b"")
    ):
        raise DataError(
            f"{path}: something follows the end of the list; expected one list, or JSON lines"
        )


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number that JSON knows, expected a finite number")
