"""JSON: bytes to objects, and the elements of a list without the list in memory.

Every error is a DataError that names the file, the line or row, what was received and what is
accepted.
"""

import codecs
import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from preflab.readers.fields import type_and_value
from utils import DataError

LONGEST_LINE = 50_000_000  # bytes; a longer line is no row of text but a file without line breaks
UTF8_BOM = codecs.BOM_UTF8
CHUNK = 1 << 20  # bytes read at a time
WHITESPACE = re.compile(r"\s*")


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


def parse_json(content: str, where: str, *, whole_file: bool = False, constants: bool = False):
    """A JSON value. whole_file: `where` is a path, and errors add the line. constants, and
    whole_file: NaN and Infinity become floats, which `number` refuses with their field."""
    try:
        return json.loads(
            content,
            parse_constant=float if whole_file or constants else _refuse_constant,
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


def lines_of(f: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line); at most LONGEST_LINE bytes are in memory."""
    read = functools.partial(f.readline, LONGEST_LINE + 1)
    for line_number, line in enumerate(iter(read, b""), 1):
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}:{line_number}: a line of more than {LONGEST_LINE / 1e6:g} MB, expected one"
                " row on each line; end each row with a line break, or save one list as .json"
            )
        yield line_number, line


def holds_json_lines(path: Path) -> bool:
    """Whether the first line that is not blank is an object, and another line follows it."""
    with open(path, "rb") as f:
        if first_byte(f) != b"{":
            return False
        f.seek(0)
        lines = (f.readline(LONGEST_LINE) for _ in itertools.count())
        filled = (line for line in itertools.takewhile(bool, lines) if line.strip())
        first, second = next(filled, b""), next(filled, b"")
    if not second:
        return False
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def streamed_rows(f: BinaryIO, path: Path) -> Iterator[tuple[dict, str]]:
    """(row, its place) of JSON lines or of one JSON list, whichever the file holds.

    One row is in memory at a time, so files larger than memory can be converted.
    """
    first = first_byte(f)
    if not first:
        raise DataError(f"{path}: the file is empty")
    if first == b"[":
        for row_number, (row, _, _) in enumerate(list_elements(f, path), 1):
            where = f"{path}: row {row_number}"
            yield as_object(row, where), where
        return
    f.seek(0)
    for line_number, line in lines_of(f, path):
        if line.strip():
            where = f"{path}:{line_number}"
            yield as_object(parse_json(decode(line, where), where), where), where


def first_byte(f: BinaryIO) -> bytes:
    """The first byte that is not white space, b"[" for a list; empty if there is none. It is the
    last byte that was read."""
    f.seek(len(UTF8_BOM) if f.read(len(UTF8_BOM)) == UTF8_BOM else 0)
    while (first := f.read(1)).isspace():
        pass
    return first


def list_elements(
    f: BinaryIO, path: Path, *, constants: bool = False
) -> Iterator[tuple[object, int, int]]:
    """(element, its offset in the file, its bytes) of a list whose opening bracket was read.

    An element that does not parse may be incomplete: more of the file is read, and it is parsed
    again, until the file ends. constants: as in `parse_json`.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    parse = json.JSONDecoder(
        parse_constant=float if constants else _refuse_constant,
        object_pairs_hook=_without_repeated_keys,
    ).raw_decode
    buffer, position = "", 0  # text up to `position` was yielded
    offset = f.tell()  # of `position` in the file
    for row_number in itertools.count(1):
        where, size = f"{path}: row {row_number}", CHUNK
        while True:
            try:
                begin = _next_element(buffer, position, first=row_number == 1)
                if begin is None:
                    _check_end(f, buffer[position:], path)
                    return
                row, end = parse(buffer, begin)
                break
            except json.JSONDecodeError as error:
                more = _read_more(f, utf8, size, where, error)
                buffer, position = buffer[position:] + more, 0
                size *= 2  # doubling bounds how often a long row is parsed again
            except RepeatedKeyError as error:
                raise DataError(f"{where}: {error}") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}") from error
        offset += len(buffer[position:begin].encode())
        n_bytes = len(buffer[begin:end].encode())
        yield row, offset, n_bytes
        position, offset = end, offset + n_bytes


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
