"""Fields of a row that are what they should be; every error is a DataError with the place."""

import math

from utils import DataError


def text(row: dict, key: str, where: str, *, may_be_empty: bool = False) -> str:
    """A string field; `may_be_empty` is for samples, since a policy may end at once and be scored
    for it."""
    value = present(row, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {kind_of(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {key!r} holds half a surrogate pair, which is no text; mend how the file was"
            " written"
        ) from error
    if not value.strip() and not may_be_empty:
        raise DataError(f"{where}: {key!r} is empty, expected text")
    return value


def number(row: dict, key: str, where: str) -> float:
    """A finite number field."""
    value = present(row, key, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where}: {key!r} is {kind_of(value)}, expected a number")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise DataError(f"{where}: {key!r} is {value}, expected a finite number")
    return value


def items(row: dict, key: str, where: str) -> list:
    value = present(row, key, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: {key!r} is {kind_of(value)}, expected a list")
    return value


def present(row: dict, key: str, where: str):
    if key not in row or row[key] is None:
        raise DataError(f"{where}: no {key!r}; it has {', '.join(map(str, row)) or 'nothing'}")
    return row[key]


def kind_of(value) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
