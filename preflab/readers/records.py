"""From rows to records: readers, prompts that several rows share, train and test splits without
leaks, and pairs of scored responses.

A *score* is a number that came with the data or from an oracle; it is not the policy's implicit
reward. Rows are read twice, first to check each one and to note which share a prompt, then prompt
by prompt: memory holds row numbers, not text.
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

from preflab.readers.fields import text, type_and_value
from preflab.readers.files import Rows
from preflab.readers.messages import Chat, Turns, Unended
from utils import DataError, content_hash

READER_VERSION = "7"  # raise it when a reader would turn the same rows into other records
PAIRINGS = ("first_two", "all", "best_worst", "random")
CHOICES = ("best_worst", "stratified")
NO_PAIRS = "none"  # the pairing of lists
# Which prompts are held out, and which random pair of a test prompt is evaluated, does not follow
# the run's seed: runs with different seeds are compared on one test set.
HELD_OUT_SEED = 0


@dataclass
class Record:
    """One prompt with its responses.

    prompt: text, or a conversation for the tokenizer's chat template. pairs: (chosen, rejected)
    indices into `responses`; empty for data without preferences. sft_target: index of the response
    to imitate. scores: one for each response, or None. columns: further numbers, one for each pair.
    source: the file and line of the first row, for messages. token_weights: of each response, those
    of its tokens, or None.
    """

    prompt: str | Chat
    responses: list[str]
    pairs: list[tuple[int, int]]
    sft_target: int
    scores: list[float] | None
    columns: dict[str, list[float]]
    source: str
    token_weights: list[tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Options:
    """Reading options: the keys of config.yaml of the same names, `columns` is dataset_columns.

    numbers: further columns with a number of each pair, and which setting reads each.
    seed: draws the pairs of pairing=random, and the responses of a list, in the train split; the
    test split uses HELD_OUT_SEED. lists: whether a record is a list of scored responses, without
    pairs; then max_responses and choose_responses select among them. token_weights: whether the
    weights of the tokens of pairs are read.
    """

    data_dir: str = "data"
    pairing: str | None = None
    min_gap: float = 0.0
    seed: int = 0
    test_fraction: float = 0.05
    train_split: str | None = None
    test_split: str | None = None
    columns: dict = field(default_factory=dict)
    prompt_template: str | None = None
    train_on: str = "last"
    numbers: dict[str, str] = field(default_factory=dict)
    lists: bool = False
    max_responses: int | None = None
    choose_responses: str = "best_worst"
    token_weights: bool = False


class Skip(Exception):  # noqa: N818  control flow of readers, not an error
    """Raised by a reader to leave out a row or a prompt; its text is the reason, under which it is
    counted."""


class Reader:
    """One dataset format: subclasses define `rows`, `prompt` and `record`.

    truncation: the end of a long prompt that is kept, "keep_start" or "keep_end".
    provides: the fields a loss may ask for, of "pairs", "scores" and "token_weights".
    pairing: the dataset's published way to pair scored responses; None where pairs come with the
    data.
    merges: rows of one prompt make one record; else each makes its own, as for SFT data, where
    every row is a target.
    chooses_splits: `rows` obeys `options.train_split` and `options.test_split`; without it they are
    refused.
    only_prompts: the data are for sampling, and the response of a record is empty.
    """

    merges = True
    chooses_splits = False
    only_prompts = False
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
    """An opened dataset split. `records()` streams it; `counts` are complete once it is
    exhausted."""

    def __init__(self, name: str, split: str, reader: Reader, options: Options):
        self.name, self.split, self.reader, self.options = name, split, reader, options
        self.rows = reader.rows(split, options)
        if self.rows.n == 0:
            raise DataError(f"datasets=[{name}] ({split}): {self.rows.where(0)} holds no row")
        # Some readers know these only once their rows are open.
        self.truncation = reader.truncation
        self.provides = reader.provides
        self.only_prompts = reader.only_prompts
        self.counts: dict = {}

    @property
    def _drawing_seed(self) -> int:
        return self.options.seed if self.split == "train" else HELD_OUT_SEED

    def fingerprint(self) -> str:
        """Changes with the content of the files and with every option that shapes the records; the
        seed shapes them with random pairing only."""
        options = self.options
        is_random = (options.pairing or self.reader.pairing) == "random"
        shaping = [
            *_own_code(self.reader),
            READER_VERSION,
            self.name,
            self.split,
            options.pairing,
            options.min_gap,
            self._drawing_seed if is_random else 0,
            options.test_fraction,
            sorted(options.columns.items()),
        ]
        if options.prompt_template:
            shaping.append(options.prompt_template)
        if options.train_on != "last":
            shaping.append(options.train_on)
        if options.numbers:
            shaping.append(["numbers", *sorted(options.numbers)])
        if options.token_weights:
            shaping.append("token_weights")
        if options.lists:
            chosen = [options.choose_responses, self._drawing_seed]
            shaping.append(
                ["lists", options.max_responses, *(chosen if options.max_responses else ())]
            )
        if options.train_split or options.test_split:
            shaping.append([options.train_split, options.test_split])
        return content_hash(json.dumps(shaping), self.rows.fingerprint)

    def records(self) -> Iterator[Record]:
        skipped: Counter = Counter()
        counts = dict.fromkeys(("rows", "prompts", "responses", "empty_responses", "pairs"), 0)
        counts["skipped"] = skipped
        policy = self.options.pairing or self.reader.pairing
        if self.options.lists:
            policy = NO_PAIRS
        pair = Pairing(policy, self.options.min_gap, self._drawing_seed, skipped)
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
                if self.options.lists and not self.only_prompts:
                    record = list_record(record, self.options, self._drawing_seed, skipped)
            except Skip as reason:
                skipped[str(reason)] += 1
                continue
            if "pairs" in self.provides and not record.pairs and not self.options.lists:
                skipped["prompts without a pair"] += 1
            counts["prompts"] += 1
            counts["responses"] += len(record.responses)
            if not self.only_prompts:
                counts["empty_responses"] += sum(not text.strip() for text in record.responses)
            counts["pairs"] += len(record.pairs)
            yield record
        if self.options.lists:
            del counts["pairs"]
        counts["skipped"] = {reason: n for reason, n in skipped.items() if n}
        self.counts = counts | ({"note": "; ".join(notes)} if notes else {})

    def _groups(self, skipped: Counter) -> tuple[list[list[int]], list[str]]:
        """Row numbers by prompt, in the order of first appearance, and notes on how the split was
        made."""
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
            held_out = self._held_out_prompts(groups)
            notes.append(
                f"no test split: {len(held_out)} of {len(groups)} prompts are held out, the same"
                " for every seed"
            )
            groups = {
                prompt: rows
                for prompt, rows in groups.items()
                if (prompt in held_out) == (self.split == "test")
            }
        if self.reader.merges:
            return list(groups.values()), notes
        return [[i] for i in sorted(itertools.chain.from_iterable(groups.values()))], notes

    def _held_out_prompts(self, prompts) -> set[bytes]:
        """The digests of the prompts that make the test split.

        Each prompt has its place in [0, 1), a function of its text alone, and is held out below
        `test_fraction`: no prompt is ever on both sides.
        """
        if len(prompts) < 2:
            raise DataError(
                f"datasets=[{self.name}] holds one prompt only, which cannot be split into train"
                " and test"
            )
        places = {prompt: _uniform(HELD_OUT_SEED, prompt) for prompt in prompts}
        held_out = {prompt for prompt, u in places.items() if u < self.options.test_fraction}
        if not held_out or len(held_out) == len(prompts):
            return {min(places, key=places.get)}
        return held_out


def _own_code(reader: Reader) -> list[str]:
    """The content of the file that a user's own reader is in; `READER_VERSION` is that of ours."""
    module = type(reader).__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module.split(".")[0] in ("preflab", "preference_datasets"):
        return []
    return [content_hash(Path(file))]


def _digest(prompt) -> bytes:
    content = prompt if isinstance(prompt, str) else prompt.key()
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _uniform(seed: int, key: bytes) -> float:
    """A number in [0, 1), a pure function of (seed, key)."""
    salt = str(seed).encode()[:16]
    digest = hashlib.blake2b(key, digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "big") / 2**64


class Pairing:
    """Scored responses to pairs. Equal scores, and gaps below `min_gap`, never form one.

    policy: one of PAIRINGS, or NO_PAIRS; None pairs as "all" does. skipped: counts what is
    dropped, by reason.
    """

    def __init__(self, policy: str | None, min_gap: float, seed: int, skipped: Counter):
        self.policy, self.min_gap, self.seed, self.skipped = policy, min_gap, seed, skipped

    def __call__(self, prompt, responses: list[str], scores: list[float]) -> list[tuple[int, int]]:
        """(chosen, rejected) indices into `responses`."""
        candidates = self._candidates(scores)
        pairs = [
            (a, b) if scores[a] > scores[b] else (b, a)
            for a, b in candidates
            if self._differ(scores[a], scores[b])
        ]
        self.skipped["pairs of equal score or a gap below min_gap"] += len(candidates) - len(pairs)
        if self.policy == "random" and pairs:
            # Sorted, so that the draw does not depend on the order of rows in the file.
            pairs.sort(key=lambda pair: (responses[pair[0]], responses[pair[1]]))
            pairs = [random.Random(f"{self.seed} {_digest(prompt).hex()}").choice(pairs)]
        return pairs

    def _candidates(self, scores: list[float]) -> list[tuple[int, int]]:
        if self.policy == NO_PAIRS:
            return []
        indices = range(len(scores))
        if self.policy not in ("first_two", "best_worst"):
            return list(itertools.combinations(indices, 2))
        if len(scores) < 2:
            return []
        if self.policy == "first_two":
            return [(0, 1)]
        return [(max(indices, key=scores.__getitem__), min(indices, key=scores.__getitem__))]

    def _differ(self, a: float, b: float) -> bool:
        return a != b and abs(a - b) >= self.min_gap


class Responses:
    """Collects the responses of a prompt, each text once (or once for each score, where there are
    scores), and the pairs among them."""

    def __init__(self):
        self.texts: list[str] = []
        self.scores: list[float | None] = []
        self.pairs: list[tuple[int, int]] = []
        self._index: dict[tuple, int] = {}

    def add(self, response: str, score: float | None = None) -> int:
        """The index of a response, which is new or already there."""
        if (response, score) not in self._index:
            self._index[response, score] = len(self.texts)
            self.texts.append(response)
            self.scores.append(score)
        return self._index[response, score]

    def prefer(
        self,
        chosen: str,
        rejected: str,
        score_chosen: float | None = None,
        score_rejected: float | None = None,
    ) -> None:
        """Add a pair of texts, with their scores where there are any."""
        self.pairs.append((self.add(chosen, score_chosen), self.add(rejected, score_rejected)))


def scored_record(
    prompt, responses: list[str], scores: list[float], source: str, pair: Pairing
) -> Record:
    """A record of scored responses, paired by the policy in force; the best is the SFT target.

    With `first_two` the responses after the second are dropped, as in the published experiments.
    """
    if pair.policy == "first_two" and len(responses) > 2:
        pair.skipped["responses beyond the first two of a prompt"] += len(responses) - 2
        responses, scores = responses[:2], scores[:2]
    best = max(range(len(scores)), key=scores.__getitem__)
    return Record(prompt, responses, pair(prompt, responses, scores), best, scores, {}, source)


def list_record(record: Record, options: Options, seed: int, skipped: Counter) -> Record:
    """A record as a list of scored responses, at most `options.max_responses` of them, without
    pairs. Raises Skip where no two responses have different scores."""
    if len(record.responses) < 2:
        raise Skip("prompts with one response")
    if len(set(record.scores)) < 2:
        raise Skip("prompts whose responses all have the same score")
    members = choose_responses(record, options.max_responses, options.choose_responses, seed)
    if n := len(record.responses) - len(members):
        skipped["responses beyond max_responses of a prompt"] += n
    responses, scores = (
        [values[i] for i in members] for values in (record.responses, record.scores)
    )
    best = max(range(len(scores)), key=scores.__getitem__)
    return Record(record.prompt, responses, [], best, scores, {}, record.source)


def choose_responses(record: Record, n: int | None, choice: str, seed: int) -> list[int]:
    """The positions of at most `n` responses, ascending: a best one, a worst one, and others.

    choice: "best_worst" draws the others from all that remain, "stratified" one from each of
    equally large ranges of ranks. A function of (seed, prompt) and of the responses, not of
    their order.
    """
    texts, scores = record.responses, record.scores
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], texts[i]))
    if n is None or len(ranked) <= n:
        return sorted(ranked)
    rng = random.Random(f"{seed} {_digest(record.prompt).hex()}")
    worst, *between, best = ranked
    if choice == "stratified":
        ends = [len(between) * k // (n - 2) for k in range(n - 1)] if n > 2 else [0]
        others = [rng.choice(between[a:b]) for a, b in itertools.pairwise(ends)]
    else:
        others = rng.sample(between, n - 2)
    return sorted([worst, *others, best])


def pairs_record(
    prompt,
    pairs: list[tuple[str, str]],
    source: str,
    columns: dict | None = None,
    scores: list[tuple[float, float]] | None = None,
    token_weights: list[tuple[tuple, tuple]] | None = None,
) -> Record:
    """A record of (chosen, rejected) texts; the first chosen one is the SFT target.

    scores: those of (chosen, rejected) for each pair; they do not change the pairs. token_weights:
    likewise; the same text with other weights is another response.
    """
    responses, none = Responses(), [(None, None)] * len(pairs)
    for (chosen, rejected), of_scores, of_weights in zip(
        pairs, scores or none, token_weights or none, strict=True
    ):
        responses.prefer(chosen, rejected, *zip(of_scores, of_weights, strict=True))
    target = responses.pairs[0][0]
    of_responses, weights = map(list, zip(*responses.scores, strict=True))
    return Record(
        prompt,
        responses.texts,
        responses.pairs,
        target,
        of_responses if scores else None,
        columns or {},
        source,
        weights if token_weights else None,
    )


def response_text_of(row: dict, where: str) -> str:
    """The `text` of a row with one response, as `written_response` has it."""
    return written_response(row["text"], row, where)


def written_response(response: str, row: dict, where: str) -> str:
    """The response of a row. `ended` says whether the model that wrote it had ended it; a response
    that it had not gets no end token, which nobody chose."""
    ended = row.get("ended")
    if ended is None:
        return response
    if not isinstance(ended, bool):
        raise DataError(f"{where}: 'ended' is {type_and_value(ended)}, expected true or false")
    if ended:
        return response
    if not response:
        raise DataError(
            f"{where}: 'text' is empty and 'ended' is false, so nothing was written;"
            " leave the row out"
        )
    if isinstance(response, Turns):
        raise DataError(
            f"{where}: 'ended' is false, and the response has more than the content of one message,"
            " which must be whole; leave the row out"
        )
    return Unended(response)


def targets_record(prompt, response: str, source: str) -> Record:
    """A record of one response to imitate, without a pair or a score."""
    return Record(prompt, [response], [], 0, None, {}, source)
