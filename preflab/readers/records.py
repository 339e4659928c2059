"""From rows to records: what a reader is, prompts that several rows share, splits without leaks,
pairs of scored responses.

*Score* is a number that came with the data or from an oracle; it has nothing to do with the
policy's implicit reward. Rows are read twice, first to check every one and to note which share a
prompt, then prompt by prompt: memory holds row numbers, not text.
"""

import hashlib
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from preflab.readers.fields import text
from preflab.readers.files import Rows
from utils import DataError, content_hash

READER_VERSION = "2"  # raise it whenever a reader would turn the same rows into other records


PAIRINGS = ("first_two", "all", "best_worst", "random")


@dataclass
class Record:
    """One prompt with its responses.

    prompt: text, or chat messages that the tokenizer's template renders. pairs: (chosen, rejected)
    indices into `responses`; empty for data without preferences. sft_target: index of the response
    to imitate. scores: one a response, or None. columns: further numbers, one a pair. source: file
    and line it starts at, for messages.
    """

    prompt: str | list[dict]
    responses: list[str]
    pairs: list[tuple[int, int]]
    sft_target: int
    scores: list[float] | None
    columns: dict[str, list[float]]
    source: str


@dataclass(frozen=True)
class Options:
    """How to read; the keys of config.yaml of the same names."""

    data_dir: str = "data"
    pairing: str | None = None
    min_gap: float = 0.0
    seed: int = 0
    test_fraction: float = 0.05
    columns: dict = field(default_factory=dict)


class Skip(Exception):
    """Raised by a reader for a row or a prompt that is left out; its text says why and is
    counted."""


class Reader:
    """What a dataset says about itself. `truncation`: which end of a long prompt is kept.
    `provides`: of pairs, scores.

    `pairing`: the dataset's published way to pair scored responses, None where pairs come with the
    data. `merges`: rows of one prompt make one record; else each makes its own, as for SFT data,
    where every row is a target.
    """

    merges = True
    only_prompts = False  # for sampling: what stands for the response is empty
    truncation = "keep_start"
    provides = frozenset()
    pairing: str | None = None

    def rows(self, split: str, options: Options) -> Rows:
        """Open the rows of a split; raises DataError where there are none."""
        raise DataError(f"{type(self).__name__} reads no rows")

    def prompt(self, row: dict, where: str):
        """The prompt of a row, which is checked in full here; raises Skip or DataError."""
        return text(row, "prompt", where)

    def record(self, prompt, rows: list[dict], source: str, pair: "Pairing") -> Record:
        """All rows of a prompt as one record."""
        raise DataError(f"{type(self).__name__} makes no records")


class Source:
    """An opened dataset split. `records()` streams it; `counts` are complete when it is
    exhausted."""

    def __init__(self, name: str, split: str, reader: Reader, options: Options):
        self.name, self.split, self.reader, self.options = name, split, reader, options
        self.rows = reader.rows(split, options)
        if self.rows.n == 0:
            raise DataError(f"datasets=[{name}] ({split}): {self.rows.where(0)} holds no row")
        self.truncation, self.provides, self.only_prompts = (
            reader.truncation,
            reader.provides,
            reader.only_prompts,
        )
        self.counts: dict = {}

    def fingerprint(self) -> str:
        """Changes with the content of the files and with every option that shapes the records."""
        o = self.options
        told = [
            *_own_code(self.reader),
            READER_VERSION,
            self.name,
            self.split,
            o.pairing,
            o.min_gap,
            o.seed,
            o.test_fraction,
            sorted(o.columns.items()),
        ]
        return content_hash(json.dumps(told), self.rows.fingerprint)

    def records(self) -> Iterator[Record]:
        skipped: Counter = Counter()
        counts = {
            "rows": 0,
            "prompts": 0,
            "responses": 0,
            "empty_responses": 0,
            "pairs": 0,
            "skipped": skipped,
        }
        pair = Pairing(self.reader.pairing, self.options, skipped)
        groups, notes = self._groups(skipped)
        if self.options.pairing and self.reader.pairing is None and "pairs" in self.provides:
            notes.append(
                f"pairing={self.options.pairing} does not apply, the pairs came with the data"
            )
        for indices in groups:
            counts["rows"] += len(indices)
            rows = [self.rows.read(i) for i in indices]
            where = self.rows.where(indices[0])
            try:
                record = self.reader.record(self.reader.prompt(rows[0], where), rows, where, pair)
            except Skip as reason:
                skipped[str(reason)] += 1
                continue
            if "pairs" in self.provides and not record.pairs:
                skipped["prompts without a pair"] += 1
            counts["prompts"] += 1
            counts["responses"] += len(record.responses)
            counts["empty_responses"] += sum(not response.strip() for response in record.responses)
            counts["pairs"] += len(record.pairs)
            yield record
        self.counts = (
            counts
            | {"skipped": {why: n for why, n in skipped.items() if n}}
            | ({"note": "; ".join(notes)} if notes else {})
        )

    def _groups(self, skipped: Counter) -> tuple[list[list[int]], list[str]]:
        """Row numbers by prompt, in the order of first appearance, and what is to be said of how
        the split was made."""
        groups: dict[bytes, list[int]] = {}
        for i in range(self.rows.n):
            try:
                prompt = self.reader.prompt(self.rows.read(i), self.rows.where(i))
            except Skip as reason:
                skipped[str(reason)] += 1
                continue
            groups.setdefault(_digest(prompt), []).append(i)
        notes = [self.rows.note] if self.rows.note else []
        if self.rows.whole and groups:
            test = self._test_prompts(groups)
            notes.append(
                f"no test split: {len(test)} of {len(groups)} prompts held out by seed"
                f" {self.options.seed}"
            )
            groups = {
                key: rows for key, rows in groups.items() if (key in test) == (self.split == "test")
            }
        if self.reader.merges:
            return list(groups.values()), notes
        return [[i] for i in sorted(i for rows in groups.values() for i in rows)], notes

    def _test_prompts(self, groups) -> set[bytes]:
        """Which prompts are held out: a function of (seed, prompt), so that none is ever on both
        sides."""
        place = {key: _uniform(self.options.seed, key) for key in groups}
        test = {key for key, u in place.items() if u < self.options.test_fraction}
        if len(groups) < 2:
            raise DataError(
                f"datasets=[{self.name}] holds one prompt only, which cannot be split into train"
                " and test"
            )
        if not test or len(test) == len(groups):
            test = {min(place, key=place.get)}
        return test


def _own_code(reader: Reader) -> list[str]:
    """The content of the file that a user's own reader is in; `READER_VERSION` is that of ours."""
    module = type(reader).__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module.split(".")[0] in ("preflab", "preference_datasets"):
        return []
    return [content_hash(Path(file))]


def _digest(prompt) -> bytes:
    told = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _uniform(seed: int, key: bytes) -> float:
    return (
        int.from_bytes(
            hashlib.blake2b(key, digest_size=8, salt=str(seed).encode()[:16]).digest(), "big"
        )
        / 2**64
    )


class Pairing:
    """Scored responses to pairs. Equal scores, and gaps below `min_gap`, never form one."""

    def __init__(self, published: str | None, options: Options, skipped: Counter):
        self.policy = options.pairing or published
        self.min_gap, self.seed, self.skipped = options.min_gap, options.seed, skipped

    def __call__(self, prompt, responses: list[str], scores: list[float]) -> list[tuple[int, int]]:
        n = len(scores)
        if self.policy == "first_two":
            candidates = [(0, 1)] if n > 1 else []
        elif self.policy == "best_worst":
            best, worst = (
                max(range(n), key=lambda i: scores[i]),
                min(range(n), key=lambda i: scores[i]),
            )
            candidates = [(best, worst)] if n > 1 else []
        else:
            candidates = list(itertools.combinations(range(n), 2))
        pairs = [
            (a, b) if scores[a] > scores[b] else (b, a)
            for a, b in candidates
            if self._differ(scores[a], scores[b])
        ]
        self.skipped["pairs of equal score or a gap below min_gap"] += len(candidates) - len(pairs)
        if self.policy == "random" and pairs:
            pairs.sort(
                key=lambda pair: (responses[pair[0]], responses[pair[1]])
            )  # whatever the order in the file
            pairs = [random.Random(f"{self.seed} {_digest(prompt).hex()}").choice(pairs)]
        return pairs

    def _differ(self, a: float, b: float) -> bool:
        return a != b and abs(a - b) >= self.min_gap


class Responses:
    """Collects the responses of a prompt, each text once (or once a score, if they have one), and
    the pairs among them."""

    def __init__(self):
        self.texts: list[str] = []
        self.scores: list[float] = []
        self.pairs: list[tuple[int, int]] = []
        self._index: dict[tuple, int] = {}

    def add(self, response: str, score: float | None = None) -> int:
        if (response, score) not in self._index:
            self._index[response, score] = len(self.texts)
            self.texts.append(response)
            self.scores.append(score)
        return self._index[response, score]

    def prefer(self, chosen: str, rejected: str) -> None:
        self.pairs.append((self.add(chosen), self.add(rejected)))


def scored_record(
    prompt, responses: list[str], scores: list[float], source: str, pair: Pairing
) -> Record:
    """A record of scored responses, paired by the policy in force; the best is the SFT target.

    With `first_two` the others are left out altogether, as the published experiments did.
    """
    if pair.policy == "first_two" and len(responses) > 2:
        pair.skipped["responses beyond the first two of a prompt"] += len(responses) - 2
        responses, scores = responses[:2], scores[:2]
    best = max(range(len(scores)), key=lambda i: scores[i])
    return Record(prompt, responses, pair(prompt, responses, scores), best, scores, {}, source)


def pairs_record(
    prompt, pairs: list[tuple[str, str]], source: str, columns: dict | None = None
) -> Record:
    """A record of preferred and dispreferred texts, several pairs of a prompt merged."""
    responses = Responses()
    for chosen, rejected in pairs:
        responses.prefer(chosen, rejected)
    return Record(
        prompt, responses.texts, responses.pairs, responses.pairs[0][0], None, columns or {}, source
    )
