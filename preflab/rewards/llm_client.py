"""Requests to a language model behind an OpenAI-compatible endpoint: concurrent, retried, capped in
number, and cached on disk."""

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from random import random

import httpx

from preflab.rewards.transport import RequestFailedError, is_transient, retry_after, send
from utils import ConfigError, PrefLabError, Progress, content_hash

logger = logging.getLogger(__name__)

DEFAULTS = {"temperature": 0.0, "max_tokens": 256}  # fields of a request

MAX_ANSWER_BYTES = 2**20  # a server that sends more is not answering the question
MAX_CONSECUTIVE_FAILURES = 8  # then the server counts as down
REJECTED_STATUS = (400, 413, 422)  # about one question, such as one that is too long


# Primary codes of SQLite where nothing is wrong with the file itself.
IN_THE_WAY = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
}


class EndpointError(PrefLabError):
    """The endpoint refuses the requests, or has stopped answering."""


class _CapReachedError(Exception):
    """`max_requests` requests were sent."""


@dataclass
class Answers:
    """The outcome of `Endpoint.ask`; the counts are of questions, where nothing else is said."""

    answers: list  # what `read` returned; None where there is no answer
    requests: int = 0  # requests that the endpoint was sent so far, retries included
    from_cache: int = 0
    unreadable: int = 0  # `read` returned None for the answer
    failed: int = 0  # no answer after the last retry
    unsent: int = 0  # not sent because of max_requests
    errors: list[str] = field(default_factory=list)


class Endpoint:
    """Chat completions at `url`, such as http://127.0.0.1:8000/v1, by `model`.

    key_env: environment variable that holds the key; it may be unset for a local server.
    cache: sqlite file that stores accepted answers by the hash of url, model, messages and
        settings.
    max_requests: hard cap on the requests that this object sends, retries included.
    timeout: seconds per attempt, until the whole answer has arrived.
    body: further fields of a request, in place of DEFAULTS; None leaves a field out. Where the
        model refuses `max_tokens`, the number is sent as `max_completion_tokens`.
    retries: further attempts after a timeout, a lost connection, a status 408, 409, 429 or 5xx, or
        a body that is not a completion. The waits between them start at `backoff` seconds and
        double.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        cache: Path,
        key_env: str = "OPENAI_API_KEY",
        max_requests: int = 1000,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        body: dict | None = None,
    ):
        self.url, self.model = url.rstrip("/"), model
        self.max_requests, self.concurrency = max_requests, concurrency
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.settings = _settings(body or {})
        self._sent_settings = dict(self.settings)  # `_use_new_name` may change it
        key = os.environ.get(key_env)
        self._client = httpx.Client(
            timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        self._lock = threading.Lock()  # guards the cache and the count of requests
        self._sent, self._stopped = 0, False
        cache.parent.mkdir(parents=True, exist_ok=True)
        with self._damage_named(cache):
            self._cache = sqlite3.connect(cache, timeout=60.0, check_same_thread=False)
            self._cache.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
            )
        self._cache_path = cache

    @staticmethod
    @contextlib.contextmanager
    def _damage_named(cache: Path) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF in IN_THE_WAY:
                raise ConfigError(
                    f"{cache}: the cache of answers cannot be used now ({error}); the answers in it"
                    " are kept: end other commands that use it, or make room, and run this again"
                ) from error
            raise ConfigError(
                f"{cache}: no cache of answers that can be used ({error}); name another file, or"
                " delete this one"
            ) from error

    def ask(
        self, questions: list[list[dict]], read: Callable[[str], object], description: str = "ask"
    ) -> Answers:
        """Send every question (a list of chat messages); equal questions are sent once.

        read: parses the text of an answer, and returns None for an invalid one. Such an answer is
            counted, and not cached.
        Raises EndpointError where the endpoint refuses (a wrong key, path or model), or when it no
        longer answers anything.
        """
        result = Answers([None] * len(questions))
        positions: dict[str, list[int]] = {}
        for i, question in enumerate(questions):
            content = json.dumps([question, self.settings], sort_keys=True)
            positions.setdefault(content_hash(self.url, self.model, content), []).append(i)
        self._stopped = False
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = {
                pool.submit(self._answer, key, questions[members[0]], read): members
                for key, members in positions.items()
            }
            try:
                with self._damage_named(self._cache_path):
                    self._collect(futures, result, description)
            except BaseException:
                self._stopped = True  # threads that wait for a retry send nothing more
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        result.requests = self._sent
        return result

    def _collect(self, futures: dict[Future, list[int]], result: Answers, description: str) -> None:
        """Enter each answer into `result` at the positions of its question, as they arrive."""
        consecutive_failures = 0
        done = as_completed(futures)
        for future in Progress(done, total=len(futures), desc=description, leave=False, delay=1.0):
            members = futures[future]
            try:
                value, cached = future.result()
            except _CapReachedError:
                result.unsent += len(members)
                continue
            except RequestFailedError as error:
                result.failed += len(members)
                result.errors.append(str(error))
                consecutive_failures += 1
                if consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
                    raise EndpointError(
                        f"{self.url}: {consecutive_failures} questions in a row had no answer,"
                        f" the last: {error}; the answers so far are cached"
                    ) from error
                continue
            consecutive_failures = 0
            result.from_cache += cached * len(members)
            result.unreadable += (value is None) * len(members)
            for i in members:
                result.answers[i] = value

    def _answer(
        self, key: str, messages: list[dict], read: Callable[[str], object]
    ) -> tuple[object, bool]:
        """What `read` makes of the answer, and whether it came from the cache."""
        with self._lock:
            row = self._cache.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        if row and isinstance(row[0], str) and (value := read(row[0])) is not None:
            return value, True
        text = self._post_with_retries(messages)
        value = read(text)
        if value is not None:
            with self._lock, self._cache:
                self._cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))
        return value, False

    def _post_with_retries(self, messages: list[dict]) -> str:
        for attempt in range(self.retries):
            try:
                return self._post(messages)
            except RequestFailedError as error:
                if not error.retriable:
                    raise
                time.sleep(max(error.wait, self.backoff * 2**attempt * (0.5 + random() / 2)))
        return self._post(messages)

    def _post(self, messages: list[dict]) -> str:
        """The text of one completion."""
        with self._lock:
            if self._stopped or self._sent >= self.max_requests:
                raise _CapReachedError
            self._sent += 1
        settings = dict(self._sent_settings)
        response, body = self._send({"model": self.model, "messages": messages, **settings})
        status, start = response.status_code, body[:200].decode(errors="replace")
        message = f"status {status}: {start}"
        if is_transient(status):
            raise RequestFailedError(message, wait=retry_after(response))
        if (
            status == 400
            and "max_tokens" in settings
            and b"max_completion_tokens" in body
            and b"too large" not in body
        ):
            self._use_new_name()
            return self._post(messages)
        if status == 400 and (name := _refused(body, settings)):
            self._stopped = True
            raise EndpointError(
                f"{self.url}: {self.model} refuses {name}={json.dumps(settings[name])}: {start};"
                f" give it another value in the body of the requests, or leave it out: judge.py"
                f" --body {name}=null, or reward.body={{{name}: null}}"
            )
        if status in REJECTED_STATUS:
            raise RequestFailedError(message, retriable=False)
        if status != 200:
            self._stopped = True
            raise EndpointError(f"{self.url}/chat/completions answered {message}")
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise RequestFailedError(f"no chat completion: {start}") from error
        return text if isinstance(text, str) else ""

    def _use_new_name(self) -> None:
        """Send the limit of an answer as `max_completion_tokens` from now on."""
        with self._lock:
            if "max_tokens" not in self._sent_settings:
                return
            limit = self._sent_settings.pop("max_tokens")
            self._sent_settings["max_completion_tokens"] = limit
        logger.warning(
            "%s refuses max_tokens; max_completion_tokens=%s is sent instead", self.model, limit
        )

    def _send(self, payload: dict) -> tuple[httpx.Response, bytes]:
        address = f"{self.url}/chat/completions"
        try:
            return send(
                self._client,
                "POST",
                address,
                payload,
                timeout=self.timeout,
                max_bytes=MAX_ANSWER_BYTES,
            )
        except httpx.InvalidURL as error:
            raise EndpointError(f"{self.url} is not a URL: {error}") from error


def _settings(body: dict) -> dict:
    """The fields of a request beside its model and messages. Raises ConfigError for a field that
    is set elsewhere, or that changes the form of the answer."""
    if taken := sorted(body.keys() & {"model", "messages", "stream", "n"}):
        raise ConfigError(f"body: {taken[0]} cannot be set; each request is one chat, to the model")
    defaults = dict(DEFAULTS)
    if "max_completion_tokens" in body:
        del defaults["max_tokens"]
    return {key: value for key, value in (defaults | body).items() if value is not None}


def _refused(body: bytes, settings: dict) -> str | None:
    """The field of the request that the answer to it calls unsupported."""
    try:
        error = json.loads(body)["error"]
        name = error["param"] if str(error["code"]).startswith("unsupported") else None
    except (ValueError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) and name in settings else None
