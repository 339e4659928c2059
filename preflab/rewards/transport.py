"""One HTTP request, with limits for the time and the size of the whole answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # httpx takes a while to import, and checking a config needs none of it
    import httpx

MAX_WAIT = 60.0  # seconds; a Retry-After above it is cut to it
RETRIED_STATUS = (408, 409, 429)  # and 5xx


class RequestFailedError(Exception):
    """A request got no answer. retriable: another attempt may succeed; wait: the seconds that the
    server asked for before one."""

    def __init__(self, message: str, *, retriable: bool = True, wait: float = 0.0):
        super().__init__(message)
        self.retriable, self.wait = retriable, wait


def is_transient(status: int) -> bool:
    """Whether another attempt may get another status than this one."""
    return status in RETRIED_STATUS or status >= 500


def send(
    client: httpx.Client,
    method: str,
    address: str,
    payload: dict | None = None,
    *,
    timeout: float,
    max_bytes: int,
) -> tuple[httpx.Response, bytes]:
    """The response and its body. It is streamed, because httpx's own timeout starts again with each
    piece. Raises RequestFailedError, and httpx.InvalidURL."""
    import httpx

    body, deadline = b"", time.monotonic() + timeout
    try:
        with client.stream(method, address, json=payload) as response:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > max_bytes or time.monotonic() > deadline:
                    raise RequestFailedError("the answer does not end")
    except httpx.RequestError as error:
        raise RequestFailedError(f"{type(error).__name__}: {error}") from error
    return response, body


def retry_after(response: httpx.Response) -> float:
    """Seconds of a Retry-After header; 0 without one, or for a date."""
    value = response.headers.get("retry-after", "")
    return min(float(value), MAX_WAIT) if value.replace(".", "", 1).isdecimal() else 0.0
