"""The gold rewards of the experiments."""

import json
from pathlib import Path

from experiments.words import NEUTRAL
from preflab.rewards.registry import register_reward

HALF = frozenset(NEUTRAL[::2])


@register_reward("two_sizes")
def two_sizes(*, path: str, least: int = 3, small: float = 0.05):
    """1 if there are at least `least` more positive than negative words, plus `small` times the
    share of the neutral words that come from a fixed half. Score gaps have two very different
    sizes.

    path: JSON {"positive": [...], "negative": [...]}.
    """
    words = json.loads(Path(path).read_text(encoding="utf-8"))
    sign = dict.fromkeys(words["positive"], 1) | dict.fromkeys(words["negative"], -1)

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        values = []
        for response in responses:
            tokens = response.split()
            neutral = [t for t in tokens if t not in sign]
            share = sum(t in HALF for t in neutral) / len(neutral) if neutral else 0.0
            values.append(float(sum(sign.get(t, 0) for t in tokens) >= least) + small * share)
        return values

    return score


@register_reward("collector")
def collector(*, path: str, mixed: bool = True):
    """How many different words of a list of twelve the response has: 0 to 12.

    path: JSON {"positive": [...], "negative": [...]}.
    mixed: the list is four positive, four negative and four neutral words, which do not occur
        together because of a text's sentiment; else it is the twelve positive ones, which do.
    """
    words = json.loads(Path(path).read_text(encoding="utf-8"))
    collected = frozenset(words["positive"])
    if mixed:
        collected = frozenset([*words["positive"][:4], *words["negative"][:4], *NEUTRAL[:4]])

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(len(collected & set(response.split()))) for response in responses]

    return score


@register_reward("short")
def short():
    """Minus the number of words of the response."""
    return lambda prompts, responses: [-float(len(response.split())) for response in responses]
