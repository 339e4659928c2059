"""Checked access to the fields of a row; every error is a DataError that names the place."""

import math

from utils import DataError


def text(row: dict, key: str, where: str, *, may_be_empty: bool = False) -> str:
    """A string field.

    may_be_empty: for samples of a policy, which may emit EOS at once and be scored for it.
    """
    value = present(row, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {type_and_value(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {key!r} holds half a surrogate pair, which UTF-8 cannot encode; write the"
            " file again with valid Unicode text"
        ) from error
    if not value.strip() and not may_be_empty:
        raise DataError(f"{where}: {key!r} is empty, expected text")
    return value


def number(row: dict, key: str, where: str) -> float:
    """A finite number field; booleans and numbers written as text are refused."""
    value = present(row, key, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where}: {key!r} is {type_and_value(value)}, expected a number")
    try:
        value = float(value)
    except OverflowError:  # an integer beyond the range of float
        value = math.inf
    if not math.isfinite(value):
        raise DataError(f"{where}: {key!r} is {value}, expected a finite number")
    return value


def items(row: dict, key: str, where: str) -> list:
    """A list field; its elements are not checked."""
    value = present(row, key, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: {key!r} is {type_and_value(value)}, expected a list")
    return value


def present(row: dict, key: str, where: str):
    """The value of a field that must be there and not null."""
    if key not in row or row[key] is None:
        raise DataError(f"{where}: no {key!r}; it has {', '.join(map(str, row)) or 'nothing'}")
    return row[key]


def type_and_value(value) -> str:
    """For messages: "int '3'", the value cut to 40 characters."""
    return f"{type(value).__name__} {str(value)[:40]!r}"
