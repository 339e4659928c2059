"""A gold function of the experiments: score gaps of two very different sizes."""

from experiments.words import NEUTRAL
from preflab.rewards.registry import register_reward

HALF = frozenset(NEUTRAL[::2])


@register_reward("two_sizes")
def two_sizes(*, path: str, least: int = 3, small: float = 0.05):
    """1 if there are at least `least` more positive than negative words, plus `small` times the
    share of neutral words from a fixed half.

    path: JSON {"positive": [...], "negative": [...]}.
    """
    import json
    from pathlib import Path

    words = json.loads(Path(path).read_text(encoding="utf-8"))
    sign = {word: 1 for word in words["positive"]} | {word: -1 for word in words["negative"]}

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
    """How many different words of twelve the response has: 0 to 12.

    path: JSON {"positive": [...], "negative": [...]}. mixed: four positive, four negative and four
    neutral words, which no text has much of by its sentiment; else the twelve positive ones, which
    come together.
    """
    import json
    from pathlib import Path

    words = json.loads(Path(path).read_text(encoding="utf-8"))
    wanted = frozenset(
        [*words["positive"][:4], *words["negative"][:4], *NEUTRAL[:4]]
        if mixed
        else words["positive"]
    )
    return lambda prompts, responses: [
        float(len(wanted & set(response.split()))) for response in responses
    ]
