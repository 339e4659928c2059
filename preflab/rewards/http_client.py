"""A reward behind an HTTP service."""

import json
import math
import os
import time
from collections.abc import Callable

from preflab.rewards.registry import RewardError, Score, register_reward
from utils import content_hash


@register_reward("http", gold=False)
def http(
    *,
    url: str,
    token_env: str = "REWARD_TOKEN",
    batch_size: int = 64,
    timeout: float = 60.0,
    retries: int = 5,
    backoff: float = 0.5,
) -> Score:
    """A scoring service: POST {"prompts": [...], "responses": [...]} to URL/predict, which answers
    {"scores": [...]}.

    Online learning asks URL/train instead, once a round, with the responses of each prompt as a
    list of their own, the `round` and an `id`; the answer is {"scores": [[...]], "pairs": [[better,
    worse] or null], "labels_bought": n, "room": for how many prompts there can be labels from now
    on, or null}. A service that learns answers an `id` that it knows as it did before, so that an
    attempt may be repeated.

    token_env: environment variable with a bearer token, if the service wants one; timeout: seconds
    of an attempt; retries: further attempts after a timeout, a lost connection or a status 408, 429
    or 5xx, with waits that double from `backoff` seconds. Then, or on any other answer,
    RewardError.
    """
    import logging

    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request otherwise
    token = os.environ.get(token_env)
    client = httpx.Client(
        base_url=url.rstrip("/"),
        timeout=timeout,
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )

    def post(path: str, payload: dict, read: Callable[[dict], object]):
        for attempt in range(retries + 1):
            try:
                response = client.post(path, json=payload)
                told = f"status {response.status_code}: {response.text[:200]}"
                if response.status_code not in (408, 429) and response.status_code < 500:
                    break
            except httpx.RequestError as error:
                told = f"{type(error).__name__}: {error}"
            if attempt < retries:
                time.sleep(backoff * 2**attempt)
        else:
            raise RewardError(
                f"reward.url={url} gave no scores in {retries + 1} attempts, the last: {told}"
            )
        try:
            assert response.status_code == 200
            return read(response.json())
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            raise RewardError(
                f'reward.url={url}{path} answered {told}; expected {{"scores": [numbers]}}'
            ) from error

    def numbers(scores: list) -> list[float]:
        assert all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in scores)
        return scores

    def learn(run: str, number: int, prompts: list[str], responses: list[list[str]]) -> dict:
        """The labels of the responses, (prompts, K), of a round of a run."""
        payload = {"round": number, "prompts": prompts, "responses": responses}

        def read(answer: dict) -> dict:
            assert all(math.isfinite(s) for scores in answer["scores"] for s in numbers(scores))
            assert list(map(len, answer["scores"])) == list(map(len, responses)) and len(
                answer["pairs"]
            ) == len(prompts)
            assert all(
                pair is None or ({*pair} <= {*range(len(of))} and len({*pair}) == 2)
                for pair, of in zip(answer["pairs"], responses)
            )
            assert answer["room"] is None or answer["room"] >= 0
            return answer | {"labels_bought": int(answer["labels_bought"])}

        return post("/train", payload | {"id": content_hash(run, json.dumps(payload))}, read)

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        values = []
        for begin in range(0, len(responses), batch_size):
            part = slice(begin, begin + batch_size)
            scores = post(
                "/predict",
                {"prompts": prompts[part], "responses": responses[part]},
                lambda answer: numbers(answer["scores"]),
            )
            if len(scores) != len(responses[part]):
                raise RewardError(
                    f"reward.url={url} answered {len(scores)} scores for {len(responses[part])}"
                    " responses"
                )
            values += scores
        return values

    score.learn = learn
    return score
