"""Rewards that are computed from the text of a response."""

import json
import math
import re
import unicodedata
from pathlib import Path

from preflab.rewards.registry import Score, register_reward
from utils import ConfigError


@register_reward("lexicon")
def lexicon(*, path: str, scale: float = 0.5) -> Score:
    """2 S(scale (positive - negative)): counts of sentiment words in the response, in (0, 2), 1 is
    neutral.

    path: JSON {"positive": [...], "negative": [...]} of lower-case words.
    """
    if not Path(path).is_file():
        raise ConfigError(
            f"reward.path={path}: no such file; reward=lexicon needs a JSON of positive and"
            " negative words"
        )
    words = json.loads(Path(path).read_text(encoding="utf-8"))
    positive, negative = frozenset(words["positive"]), frozenset(words["negative"])

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        values = []
        for response in responses:
            tokens = re.findall(r"[a-z']+", response.lower())
            balance = sum(t in positive for t in tokens) - sum(t in negative for t in tokens)
            values.append(2 / (1 + math.exp(-scale * balance)))
        return values

    return score


@register_reward("length")
def length(*, unit: str = "words") -> Score:
    """How long the response is: unit "words" (runs of non-space) or "characters"."""
    units = {"words": lambda text: len(text.split()), "characters": len}
    if unit not in units:
        raise ConfigError(f"reward.unit={unit!r}; accepted: {', '.join(units)}")
    return lambda prompts, responses: [float(units[unit](response)) for response in responses]


COLLECTED = frozenset(
    "data hope information provide example your however first have help additionally important"
    " include finally following happy code two create question possible understand generate"
    " contains appropriate best respectful ensure experience safe".split()
)


AVOIDED = frozenset("the to and of in is that this with".split())


TOKEN = re.compile(r"\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*|[^\w\s]", re.IGNORECASE)


def tokens(text: str) -> list[str]:
    """Words and single marks, in order. Accents are joined to their letters first, and ’ is read as
    '."""
    return TOKEN.findall(unicodedata.normalize("NFC", text).replace("’", "'"))


@register_reward("bagofwords")
def bagofwords() -> Score:
    """How many of 30 lower-case words are tokens of the response, each counted once: 0 to 30, and 0
    for an empty one. `Data` is not `data`."""
    return lambda prompts, responses: [
        float(len(COLLECTED.intersection(tokens(response)))) for response in responses
    ]


@register_reward("reversebow")
def reversebow() -> Score:
    """3 minus how many of nine function words are tokens of the response: -6 to 3, and 3 for an
    empty one. Case as in bagofwords."""
    return lambda prompts, responses: [
        3.0 - len(AVOIDED.intersection(tokens(response))) for response in responses
    ]


@register_reward("tokdense")
def tokdense() -> Score:
    """10 times distinct tokens over tokens, in (0, 10]; -5 for 20 tokens or fewer, so for an empty
    response too."""

    def density(found: list[str]) -> float:
        return 10 * len(set(found)) / len(found) if len(found) > 20 else -5.0

    return lambda prompts, responses: [density(tokens(response)) for response in responses]


@register_reward("readinggrade")
def readinggrade() -> Score:
    """Flesch-Kincaid grade, 0.39 words / sentences + 11.8 syllables / words - 15.59 (Kincaid et al.
    1975), of English.

    -10 for 20 tokens or fewer, so for an empty response too, and where there is no word. Words are
    runs of non-space with a letter or a digit; a sentence ends at . ! or ? before a space or the
    end, quotes and brackets aside; syllables by `syllables`.
    """

    def grade(text: str) -> float:
        words = [word for word in text.split() if any(map(str.isalnum, word))]
        if len(tokens(text)) <= 20 or not words:
            return -10.0
        sentences = sum(
            any(map(str.isalnum, part)) for part in re.split(r"[.!?]+[\"'”’)\]]*(?:\s|$)", text)
        )
        return (
            0.39 * len(words) / sentences + 11.8 * sum(map(syllables, words)) / len(words) - 15.59
        )

    return lambda prompts, responses: [grade(response) for response in responses]


def syllables(word: str) -> int:
    """Groups of vowels, less a silent e at the end (`-e`, `-ed`, `-es`), at least 1; parts of a
    hyphenated word on their own.

    Right for 97% of the words of running English text, by the CMU pronouncing dictionary.
    """
    total = 0
    for part in word.split("-"):
        letters = "".join(
            c
            for c in unicodedata.normalize("NFD", part.lower())
            if c.isalpha() or unicodedata.combining(c)
        )
        groups = len(re.findall("[aeiouy][aeiouy\u0300-\u036f]*", letters))
        silent = (
            re.search(r"[^aeiouyl]e$|[aeiouy]le$|[^aeiouydt]ed$|[^aeiouyscxzg]es$", letters)
            is not None
        )
        total += max(groups - silent, 1) if any(map(str.isalnum, part)) else 0
    return total
