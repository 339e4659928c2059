"""Questions to a language model behind an OpenAI-compatible endpoint: several at once, retried,
capped, kept on disk."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from random import random

import httpx
from tqdm import tqdm

from utils import PrefLabError, content_hash

LARGEST_ANSWER = 2**20  # bytes; a server that sends more is not answering the question


FAILURES_IN_A_ROW = 8  # after which the server is taken for dead


class EndpointError(PrefLabError):
    """The endpoint refuses the requests, or has stopped answering."""


class _Cap(Exception):
    """No request is left."""


class _Transient(Exception):
    """What another attempt may mend; `wait` is how long the server asked for."""

    def __init__(self, told: str, wait: float = 0.0):
        super().__init__(told)
        self.wait = wait


class _Rejected(_Transient):
    """What no attempt will mend, of this one question: too long for the model, say."""


@dataclass
class Asked:
    """What became of some questions. answers: None where there is none; requests: sent, retries
    included."""

    answers: list
    requests: int = 0
    from_cache: int = 0
    refused: int = 0  # answers that `read` could make nothing of
    failed: int = 0  # questions without an answer after the last retry
    unasked: int = 0  # questions that the cap left
    errors: list[str] = field(default_factory=list)


class Endpoint:
    """Chat completions at `url`, such as http://127.0.0.1:8000/v1, by `model`.

    key_env: environment variable that holds the key, which may be missing for a local server.
    cache: sqlite file in which accepted answers are kept under the hash of url, model, messages and
    settings. max_requests: hard cap on what is sent by this object, retries included. timeout:
    seconds until an attempt is given up, answer included. retries: further attempts after a
    timeout, a lost connection, a status 408, 409, 429 or 5xx, or a body that is no completion, with
    waits that double from `backoff` seconds.
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
        temperature: float = 0.0,
        max_tokens: int = 256,
    ):
        self.url, self.model, self.max_requests, self.concurrency = (
            url.rstrip("/"),
            model,
            max_requests,
            concurrency,
        )
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.settings = {"temperature": temperature, "max_tokens": max_tokens}
        key = os.environ.get(key_env)
        self._client = httpx.Client(
            timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        self._lock, self._sent, self._over = threading.Lock(), 0, False
        cache.parent.mkdir(parents=True, exist_ok=True)
        self._cache = sqlite3.connect(cache, timeout=60.0, check_same_thread=False)
        self._cache.execute(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
        )

    def ask(
        self, questions: list[list[dict]], read: Callable[[str], object], description: str = "ask"
    ) -> Asked:
        """Put every question (a list of chat messages), each distinct one once.

        read: makes of an answer what is wanted, None for an answer that is none; such an answer is
        counted, and not kept. Raises EndpointError where the endpoint refuses (a wrong key, path or
        model), or when nothing is answered any more.
        """
        asked = Asked([None] * len(questions))
        keys = [
            content_hash(self.url, self.model, json.dumps([q, self.settings], sort_keys=True))
            for q in questions
        ]
        places: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, []).append(i)
        in_a_row, self._over = 0, False
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = {
                pool.submit(self._answer, key, questions[i[0]], read): key
                for key, i in places.items()
            }
            try:
                for future in tqdm(
                    as_completed(futures),
                    total=len(futures),
                    desc=description,
                    leave=False,
                    delay=1.0,
                ):
                    where = places[futures[future]]
                    try:
                        value, cached = future.result()
                    except _Cap:
                        asked.unasked += len(where)
                        continue
                    except _Transient as error:
                        asked.failed += len(where)
                        asked.errors.append(str(error))
                        in_a_row += 1
                        if in_a_row >= FAILURES_IN_A_ROW:
                            raise EndpointError(
                                f"{self.url}: {in_a_row} questions in a row had no answer, the"
                                f" last: {error}; answers so far are kept"
                            ) from error
                        continue
                    in_a_row = 0
                    asked.from_cache += cached * len(where)
                    asked.refused += (value is None) * len(where)
                    for i in where:
                        asked.answers[i] = value
            except BaseException:
                self._over = True  # threads that wait to try again send nothing more
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        asked.requests = self._sent
        return asked

    def _answer(
        self, key: str, messages: list[dict], read: Callable[[str], object]
    ) -> tuple[object, bool]:
        with self._lock:
            kept = self._cache.execute(
                "SELECT answer FROM answers WHERE key = ?", (key,)
            ).fetchone()
        if kept and (value := read(kept[0])) is not None:
            return value, True
        for attempt in range(self.retries + 1):
            try:
                text = self._post(messages)
                break
            except _Transient as error:
                if attempt == self.retries or isinstance(error, _Rejected):
                    raise
                time.sleep(max(error.wait, self.backoff * 2**attempt * (0.5 + random() / 2)))
        value = read(text)
        if value is not None:
            with self._lock, self._cache:
                self._cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))
        return value, False

    def _post(self, messages: list[dict]) -> str:
        with self._lock:
            if self._over or self._sent >= self.max_requests:
                raise _Cap
            self._sent += 1
        body, deadline = b"", time.monotonic() + self.timeout
        try:
            with self._client.stream(
                "POST",
                f"{self.url}/chat/completions",
                json={"model": self.model, "messages": messages, **self.settings},
            ) as response:
                for piece in response.iter_bytes():
                    body += piece
                    if len(body) > LARGEST_ANSWER or time.monotonic() > deadline:
                        raise _Transient("an answer without an end")
        except httpx.RequestError as error:
            raise _Transient(f"{type(error).__name__}: {error}") from error
        except httpx.InvalidURL as error:
            raise EndpointError(f"{self.url} is no URL: {error}") from error
        told = f"status {response.status_code}: {body[:200].decode(errors='replace')}"
        if response.status_code in (408, 409, 429) or response.status_code >= 500:
            wait = response.headers.get("retry-after", "")
            raise _Transient(
                told, min(float(wait), 60.0) if wait.replace(".", "", 1).isdigit() else 0.0
            )
        if response.status_code in (400, 413, 422):
            raise _Rejected(told)
        if response.status_code != 200:
            self._over = True
            raise EndpointError(f"{self.url}/chat/completions answered {told}")
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise _Transient(
                f"no chat completion: {body[:200].decode(errors='replace')}"
            ) from error
        return text if isinstance(text, str) else ""
