"""A reward behind an HTTP service."""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from typing import TypeVar

from preflab.batching.chat import PromptText, chat_of_prompt
from preflab.rewards.registry import RewardError, Score, register_reward
from utils import content_hash

T = TypeVar("T")

EXPECTED_SCORES = '{"scores": [one number per response]}'
EXPECTED_LABELS = (
    '{"scores": [[one finite number per response], ...], "pairs": [[better, worse] or null, ...],'
    ' "labels_bought": whole number, "room": whole number or null}'
)


@register_reward("http", gold=False)
def http(
    *,
    url: str,
    token_env: str = "REWARD_TOKEN",
    batch_size: int = 64,
    timeout: float = 60.0,
    retries: int = 8,
    backoff: float = 0.5,
) -> Score:
    """A scoring service: POST {"prompts": [...], "responses": [...]} to URL/predict returns
    {"scores": [...]}.

    Online learning sends one request per round to URL/train instead: the prompts, a list of
    responses per prompt, the `round`, an `id`, and "ranks": true where it learns from the order of
    all responses. The answer is {"scores": [[...]], "pairs": [[better, worse] or null],
    "labels_bought": n, "room": for how many more prompts there can be labels, or null for no
    limit}. A service that learns returns the same answer for an `id` that it has seen before, so a
    request may be repeated.

    Prompts that are conversations are text in "prompts"; "messages", and where there are any
    "tools" and "chat_template_kwargs", hold them as they are, an entry for each prompt.

    token_env: environment variable with a bearer token, if the service needs one.
    timeout: seconds per attempt.
    retries: further attempts after a timeout, a lost connection or a status 408, 429 or 5xx; the
        waits between them start at `backoff` seconds and double. After the last one, or on any
        other invalid answer, RewardError is raised.
    """
    return _ScoringClient(url, token_env, batch_size, timeout, retries, backoff)


class _ScoringClient:
    """The `Score` of a service; `learn` asks it for the labels of a round."""

    def __init__(
        self,
        url: str,
        token_env: str,
        batch_size: int,
        timeout: float,
        retries: int,
        backoff: float,
    ):
        import httpx  # here, so that checking a config stays light

        logging.getLogger("httpx").setLevel(logging.WARNING)  # else one line per request
        self.url, self.batch_size = url, batch_size
        self.retries, self.backoff = retries, backoff
        token = os.environ.get(token_env)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url.rstrip("/"), timeout=timeout, headers=headers)

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        values = []
        for begin in range(0, len(responses), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            payload = {"prompts": prompts[part], "responses": responses[part]}
            payload |= conversation_fields(prompts[part])
            scores = self._ask("/predict", payload, _read_scores, EXPECTED_SCORES)
            if len(scores) != len(responses[part]):
                raise RewardError(
                    f"reward.url={self.url} answered {len(scores)} scores for"
                    f" {len(responses[part])} responses"
                )
            values += scores
        return values

    def learn(
        self,
        run: str,
        number: int,
        prompts: list[str],
        responses: list[list[str]],
        *,
        ranks: bool = False,
    ) -> dict:
        """The labels of the responses, (prompts, K), of round `number` of a run. ranks: of all, not
        of the best and the worst only."""
        payload = {"round": number, "prompts": prompts, "responses": responses}
        payload |= {"ranks": True} if ranks else {}
        payload |= conversation_fields(prompts)
        payload["id"] = content_hash(run, json.dumps(payload))
        return self._ask(
            "/train", payload, lambda answer: _read_labels(answer, responses), EXPECTED_LABELS
        )

    def _ask(self, path: str, payload: dict, read: Callable[[dict], T], expected: str) -> T:
        """What `read` makes of the answer; it raises ValueError, LookupError or TypeError on an
        invalid one."""
        response = self._post(path, payload)
        try:
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code}")
            return read(response.json())
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise RewardError(
                f"reward.url={self.url}{path} answered {_summary(response)}; expected {expected}"
            ) from error

    def _post(self, path: str, payload: dict):
        """The first response that no retry would change."""
        import httpx

        try:
            content = json.dumps(payload, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except ValueError as error:
            raise RewardError(f"reward.url={self.url} cannot be sent the texts: {error}") from error
        headers = {"Content-Type": "application/json"}
        outcome = "not sent"
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                response = self._client.post(path, content=content, headers=headers)
            except httpx.RequestError as error:
                outcome = f"{type(error).__name__}: {error}"
                continue
            if response.status_code not in (408, 429) and response.status_code < 500:
                return response
            outcome = _summary(response)
        raise RewardError(
            f"reward.url={self.url} gave no scores in {self.retries + 1} attempts,"
            f" the last: {outcome}"
        )


def conversation_fields(prompts: list[str]) -> dict:
    """The fields of a request that hold conversations, one entry for each prompt: the messages
    where some prompt is a conversation, tools and options of the template where some has any."""
    if not any(isinstance(prompt, PromptText) for prompt in prompts):
        return {}
    chats = list(map(chat_of_prompt, prompts))
    fields = {"messages": [chat.messages for chat in chats]}
    if any(chat.tools for chat in chats):
        fields["tools"] = [chat.tools for chat in chats]
    if any(chat.options for chat in chats):
        fields["chat_template_kwargs"] = [chat.options for chat in chats]
    return fields


def _summary(response) -> str:
    return f"status {response.status_code}: {response.text[:200]}"


def _read_scores(answer: dict) -> list[float]:
    return _numbers(answer["scores"])


def _read_labels(answer: dict, responses: list[list[str]]) -> dict:
    """The answer of URL/train, checked against what was sent; raises as `_ask` expects."""
    scores, pairs = answer["scores"], answer["pairs"]
    if not isinstance(scores, list) or not isinstance(pairs, list):
        raise TypeError("scores and pairs must be lists")
    sizes = [len(of_prompt) for of_prompt in responses]
    if [len(_numbers(of_prompt)) for of_prompt in scores] != sizes or len(pairs) != len(sizes):
        raise ValueError("the numbers of scores and of pairs must be those of the request")
    if not all(math.isfinite(score) for of_prompt in scores for score in of_prompt):
        raise ValueError("scores must be finite")
    if not all(_is_pair(pair, size) for pair, size in zip(pairs, sizes, strict=True)):
        raise ValueError("a pair must be two different positions of responses, or null")
    if not _is_count(answer["labels_bought"]):
        raise ValueError("labels_bought must be a whole number")
    if answer["room"] is not None and not _is_count(answer["room"]):
        raise ValueError("room must be a whole number or null")
    return answer


def _numbers(values: list) -> list[float]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{value!r} is not a number")
    return values


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_pair(pair, n_responses: int) -> bool:
    if pair is None:
        return True
    if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
        return False
    return all(_is_count(member) and member < n_responses for member in pair)
