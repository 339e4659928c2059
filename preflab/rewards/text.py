"""Rewards that are computed from the text of a response."""

import json
import math
import re
import unicodedata
from pathlib import Path

from preflab.rewards.registry import Score, register_reward
from utils import ConfigError

# The word lists of D2PO (arXiv:2405.01511).
COLLECTED = frozenset(
    {
        *("data", "hope", "information", "provide", "example", "your", "however", "first", "have"),
        *("help", "additionally", "important", "include", "finally", "following", "happy", "code"),
        *("two", "create", "question", "possible", "understand", "generate", "contains"),
        *("appropriate", "best", "respectful", "ensure", "experience", "safe"),
    }
)
AVOIDED = frozenset({"the", "to", "and", "of", "in", "is", "that", "this", "with"})

TOKEN = re.compile(r"\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*|[^\w\s]", re.IGNORECASE)
RIGHT_QUOTE = "\u2019"  # the typographic apostrophe
SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*(?:\s|$)")
VOWEL_GROUP = re.compile("[aeiouy][aeiouy\u0300-\u036f]*")
SILENT_ENDING = re.compile(r"[^aeiouyl]e$|[aeiouy]le$|[^aeiouydt]ed$|[^aeiouyscxzg]es$")


@register_reward("lexicon")
def lexicon(*, path: str, scale: float = 0.5) -> Score:
    """2 sigmoid(scale (positive - negative)), where positive and negative count the sentiment words
    of the response. In (0, 2); 1 is neutral.

    path: JSON {"positive": [...], "negative": [...]} of lower-case words.
    """
    if not Path(path).is_file():
        raise ConfigError(
            f"reward.path={path}: no such file;"
            " reward=lexicon needs a JSON file of positive and negative words"
        )
    lists = json.loads(Path(path).read_text(encoding="utf-8"))
    positive, negative = frozenset(lists["positive"]), frozenset(lists["negative"])

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        values = []
        for response in responses:
            words = re.findall(r"[a-z']+", response.lower())
            balance = sum(w in positive for w in words) - sum(w in negative for w in words)
            values.append(2 / (1 + math.exp(-scale * balance)))
        return values

    return score


@register_reward("vader")
def vader() -> Score:
    """The compound score of VADER (Hutto and Gilbert 2014), in [-1, 1]: negative to positive
    sentiment of the response."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError("reward=vader needs a package: pip install vaderSentiment") from error
    analyzer = SentimentIntensityAnalyzer()
    return lambda prompts, responses: [
        analyzer.polarity_scores(response)["compound"] for response in responses
    ]


@register_reward("length")
def length(*, unit: str = "words") -> Score:
    """The length of the response, in unit "words" (runs of non-space) or "characters"."""
    units = {"words": lambda text: len(text.split()), "characters": len}
    if unit not in units:
        raise ConfigError(f"reward.unit={unit!r}; accepted: {', '.join(units)}")
    measure = units[unit]
    return lambda prompts, responses: [float(measure(response)) for response in responses]


def tokens(text: str) -> list[str]:
    """Words and single punctuation marks, in order. Combining accents are composed with their
    letters first (NFC), and a typographic apostrophe counts as '."""
    return TOKEN.findall(unicodedata.normalize("NFC", text).replace(RIGHT_QUOTE, "'"))


@register_reward("bagofwords")
def bagofwords() -> Score:
    """How many of 30 lower-case words are tokens of the response, each counted once: 0 to 30, and 0
    for an empty response. `Data` is not `data`."""

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(len(COLLECTED.intersection(tokens(response)))) for response in responses]

    return score


@register_reward("reversebow")
def reversebow() -> Score:
    """3 minus how many of nine function words are tokens of the response: -6 to 3, and 3 for an
    empty response. Case matters, as in bagofwords."""

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        return [3.0 - len(AVOIDED.intersection(tokens(response))) for response in responses]

    return score


@register_reward("tokdense")
def tokdense() -> Score:
    """10 times the number of distinct tokens over the number of tokens, in (0, 10]; -5 for 20
    tokens or fewer, hence also for an empty response."""

    def density(response: str) -> float:
        words = tokens(response)
        return 10 * len(set(words)) / len(words) if len(words) > 20 else -5.0

    return lambda prompts, responses: [density(response) for response in responses]


@register_reward("readinggrade")
def readinggrade() -> Score:
    """Flesch-Kincaid grade of English, 0.39 words / sentences + 11.8 syllables / words - 15.59
    (Kincaid et al. 1975).

    -10 for 20 tokens or fewer, hence also for an empty response, and where there is no word. A word
    is a run of non-space with a letter or a digit. A sentence ends at . ! or ? before a space or
    the end, quotes and brackets aside. Syllables are counted by `syllables`.
    """
    return lambda prompts, responses: [_grade(response) for response in responses]


def _grade(text: str) -> float:
    words = [word for word in text.split() if _has_letter_or_digit(word)]
    if len(tokens(text)) <= 20 or not words:
        return -10.0
    sentences = sum(map(_has_letter_or_digit, SENTENCE_END.split(text)))
    n_syllables = sum(map(syllables, words))
    return 0.39 * len(words) / sentences + 11.8 * n_syllables / len(words) - 15.59


def syllables(word: str) -> int:
    """The number of vowel groups, without a silent e at the end (`-e`, `-ed`, `-es`), and at least
    1. The parts of a hyphenated word are counted separately.

    Correct for 97% of the words of running English text, by the CMU pronouncing dictionary.
    """
    return sum(_part_syllables(part) for part in word.split("-") if _has_letter_or_digit(part))


def _part_syllables(part: str) -> int:
    letters = "".join(
        c
        for c in unicodedata.normalize("NFD", part.lower())
        if c.isalpha() or unicodedata.combining(c)
    )
    groups = len(VOWEL_GROUP.findall(letters))
    silent = SILENT_ENDING.search(letters) is not None
    return max(groups - silent, 1)


def _has_letter_or_digit(text: str) -> bool:
    return any(map(str.isalnum, text))
