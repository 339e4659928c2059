"""The server that holds a model: concurrent requests with retries, until the first that fails."""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from random import random
from typing import Any

from preflab.rewards.transport import MAX_WAIT, RequestFailedError, is_transient, retry_after, send
from preflab.serving.protocol import WrongAnswerError
from preflab.settings.schema import SamplerSettings
from utils import PrefLabError

MAX_ANSWER_BYTES = 2**24  # ids and log-probs of a long response
LOOK_SECONDS = 0.5  # between two looks at the signals that ask the run to stop


class SamplerError(PrefLabError):
    """The server of `sampler.url` does not give the samples that it is asked for."""

    everywhere = True


class Server:
    """An OpenAI-compatible server at `sampler.url`, such as http://127.0.0.1:8000/v1."""

    def __init__(self, settings: SamplerSettings):
        import httpx  # here, so that checking a config stays light

        logging.getLogger("httpx").setLevel(logging.WARNING)  # else one line per request
        self.settings, self.url = settings, settings.url.rstrip("/")
        self._token = os.environ.get(settings.token_env) or ""
        self._client = httpx.Client(
            timeout=settings.timeout,
            limits=httpx.Limits(max_connections=settings.concurrency),
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
        )

    def models(self, look: Callable[[], None]) -> list[str]:
        """The names of the models that it serves. look: as of `complete`."""
        [(_, answer)] = self._in_threads([partial(self._ask, "GET", "models", None)], look)
        try:
            return [str(model["id"]) for model in answer["data"]]
        except (LookupError, TypeError) as error:
            raise SamplerError(
                f"sampler.url={self.url}: {self.url}/models names no models; give the address of an"
                " OpenAI-compatible server up to /v1, such as http://127.0.0.1:8000/v1"
            ) from error

    def complete(
        self, bodies: list[dict], read: Callable[[int, Any], Any], look: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """The number of each request and `read` of its number and answer, as they arrive.

        read: raises WrongAnswerError. look: called at least every half second; what it raises
        ends the requests. Raises SamplerError at the first request that fails for
        good, once all answers that have arrived are given.
        """
        calls = [partial(self._completed, body, i, read) for i, body in enumerate(bodies)]
        return self._in_threads(calls, look)

    def _in_threads(
        self, calls: Sequence[Callable[[threading.Event], Any]], look: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """The number and the result of each call, as `complete` gives them. A call gets the event
        that is set when nobody waits for it any more."""
        todo: SimpleQueue = SimpleQueue()
        done: SimpleQueue = SimpleQueue()
        stopped = threading.Event()
        for numbered in enumerate(calls):
            todo.put(numbered)
        # Daemons: the process can end while a slow server still owes answers.
        for _ in range(min(self.settings.concurrency, len(calls))):
            threading.Thread(target=_work, args=(todo, done, stopped), daemon=True).start()
        error, n_waiting = None, len(calls)
        try:
            while n_waiting and (error is None or not done.empty()):
                look()
                with contextlib.suppress(Empty):
                    number, value, failure = done.get(timeout=LOOK_SECONDS)
                    n_waiting -= 1
                    if failure is None:
                        yield number, value
                    error = error or failure
        finally:
            stopped.set()
        if error is not None:
            raise error

    def _completed(
        self,
        body: dict,
        number: int,
        read: Callable[[int, Any], Any],
        stopped: threading.Event,
    ) -> Any:
        try:
            return read(number, self._ask("POST", "completions", body, stopped))
        except WrongAnswerError as error:
            raise SamplerError(f"sampler.url={self.url} answered {error}") from error

    def _ask(self, method: str, path: str, body: dict | None, stopped: threading.Event) -> Any:
        """The JSON of an answer. Raises SamplerError after the last attempt, at once for a status
        that no other attempt would change, and when it would wait though `stopped` is set."""
        attempts = self.settings.retries + 1
        for attempt in range(attempts):
            try:
                return self._attempt(method, path, body)
            except RequestFailedError as error:
                last = error
                if not error.retriable:
                    break
                backoff = self.settings.backoff * 2**attempt * (0.5 + random() / 2)
                if attempt + 1 == attempts or stopped.wait(min(max(error.wait, backoff), MAX_WAIT)):
                    break
        tried = f" in {attempt + 1} attempts" if last.retriable else ""
        raise SamplerError(
            f"sampler.url={self.url} gave no samples{tried}, the last answer: {last}; the responses"
            " so far are kept, and the same command continues"
        )

    def _attempt(self, method: str, path: str, body: dict | None) -> Any:
        import httpx

        address, seconds = f"{self.url}/{path}", self.settings.timeout
        try:
            response, content = send(
                self._client, method, address, body, timeout=seconds, max_bytes=MAX_ANSWER_BYTES
            )
        except httpx.InvalidURL as error:
            raise SamplerError(f"sampler.url={self.url} is not a URL: {error}") from error
        start = self._shown(content)
        if response.status_code != 200:
            raise RequestFailedError(
                f"status {response.status_code}: {start}{_hint(response.status_code)}",
                retriable=is_transient(response.status_code),
                wait=retry_after(response),
            )
        try:
            return _joined(content) if content.startswith(b"data:") else json.loads(content)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise RequestFailedError(f"no whole JSON: {start}") from error

    def _shown(self, content: bytes) -> str:
        """The start of an answer in one line, without the token of the run."""
        text = " ".join(content[:300].decode(errors="replace").split())
        return text.replace(self._token, "***") if self._token else text


def _work(todo: SimpleQueue, done: SimpleQueue, stopped: threading.Event) -> None:
    """Make calls of `todo` until there are none, or until one of any thread has failed."""
    while not stopped.is_set():
        try:
            number, call = todo.get_nowait()
        except Empty:
            return
        try:
            done.put((number, call(stopped), None))
        except Exception as error:
            done.put((number, None, error))


def _joined(stream: bytes) -> dict:
    """The completion of server-sent events, with the texts of all but the last as `pieces`. Raises
    ValueError, LookupError or TypeError for a stream that was cut, or has an error."""
    lines = stream.decode().split("\n")
    events = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
    parts = [json.loads(event) for event in events if event != "[DONE]"]
    pieces = [part["choices"][0]["text"] for part in parts[:-1]]
    [last] = parts[-1]["choices"]
    whole = {"text": "".join(pieces) + last["text"], "pieces": pieces}
    return parts[-1] | {"choices": [last | whole | {"finish_reason": last["finish_reason"]}]}


def _hint(status: int) -> str:
    """What may be wrong with a request that gets this status."""
    hints = {
        401: " (is the variable of sampler.token_env set?)",
        403: " (is the variable of sampler.token_env set?)",
        404: " (does the address end in /v1, and is sampler.model one that it serves?)",
        422: " (does sampler.server name its type?)",
    }
    return hints.get(status, "")
