"""What scripts/inspect_data.py counts in a split, and which counts are errors or warnings."""

import hashlib
import itertools
import random
from array import array
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from preflab.batching.chat_template import render
from preflab.batching.summary import histogram
from preflab.batching.token_store import CHUNK, tokenise
from preflab.batching.truncation import truncate
from preflab.batching.turn_ends import check_room, end_of_turn
from preflab.readers.messages import Unended
from preflab.readers.records import Record, Source
from preflab.reports.statistics import wilson


class Check(NamedTuple):
    """A fault that is counted. of: what it is a share of; limit: the share beyond which it is an
    error (None: never; "tolerate": that of --tolerate); meaning: the text of the finding."""

    of: str
    limit: float | str | None
    meaning: str


ANY, HALF = 0.0, 0.5
TOKEN_IN_TEXT = "BOS or EOS in the text, which the tokenizer takes for the token itself"
CHECKS = {
    "contradictory_pairs": Check(
        "pairs", "tolerate", "their opposite is there as well, and undoes them"
    ),
    "leaked_prompts": Check(
        "prompts",
        "tolerate",
        "they are prompts of the train split too, so the evaluation is not on unseen ones",
    ),
    "same_after_cut": Check(
        "pairs",
        "tolerate",
        "the same tokens on both sides once they are cut to max_length, so nothing to learn",
    ),
    "eos_in_responses": Check("responses", ANY, TOKEN_IN_TEXT),
    "eos_doubled": Check("responses", ANY, "the text ends with EOS, and another one is appended"),
    "eos_in_prompts": Check("prompts", ANY, TOKEN_IN_TEXT),
    "bos_doubled": Check(
        "prompts", ANY, "the text starts with BOS, and another one is put in front"
    ),
    "prompt_repeated": Check(
        "responses", HALF, "they begin with their prompt, which they follow anyway"
    ),
    "truncated_responses": Check(
        "responses", HALF, "cut to max_length, so without an end to learn"
    ),
    "truncated_prompts": Check("prompts", None, "cut to max_prompt_length"),
    "identical_pairs": Check("pairs", None, "the same text on both sides, with different scores"),
    "duplicate_pairs": Check("pairs", None, "they repeat an earlier pair"),
    "empty_responses": Check("responses", None, "empty, so EOS alone"),
    "merged_boundaries": Check(
        "responses",
        None,
        "tokenised together with the prompt they are other tokens;"
        " training and sampling tokenise the two separately",
    ),
    "joined_prompts": Check(
        "prompts",
        None,
        "the last token of their generation prompt joins the first of an answer, which begins"
        " before it; samples continue the whole generation prompt",
    ),
    "messages_as_text": Check(
        "prompts",
        None,
        "they look like chat messages, but not in JSON; write them with json.dumps",
    ),
}
COUNTED = ("rows", "prompts", "responses", "pairs")
LENGTH_BIAS = (0.4, 0.6)  # the share of pairs with a longer chosen response, without a warning


def render_prompt(record: Record, tokenizer) -> str:
    """The prompt as text; a conversation as its chat template writes it."""
    if isinstance(record.prompt, str):
        return record.prompt
    return render(tokenizer, record.prompt, generation_prompt=True, where=record.source)


class SplitStatistics:
    """Counts over the records of a split, which are read in chunks. It holds a few numbers per
    prompt in memory."""

    def __init__(
        self, tokenizer, max_length: int, max_prompt_length: int, n_examples: int, seed: int
    ):
        self.tokenizer, self.lengths = tokenizer, (max_length, max_prompt_length)
        self.special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self.counts: Counter = Counter()
        self.first: dict[str, str] = {}  # where each fault occurs first
        self.boundary: str | None = None  # the first boundary that the tokenizer would merge
        self.prompts: set[bytes] = set()  # hashes
        self.prompt_tokens, self.response_tokens, self.gaps = array("i"), array("i"), array("d")
        # Pairs whose chosen response has more (1), as many (0) or fewer (-1) tokens.
        self.longer: Counter = Counter()
        self.prompts_with_pairs = self.chats = self.ties = 0
        self.lists: array | None = None  # how many responses each has
        self.examples, self.n_examples, self.rng = [], n_examples, random.Random(seed)

    def read(self, source: Source) -> None:
        self.has_pairs, self.truncation = "pairs" in source.provides, source.truncation
        records = source.records()
        if source.options.lists:
            self.lists, records = array("i"), map(self._as_pairs, records)
        name = f"{source.name} {source.split}"
        with tqdm(desc=name, unit=" prompts", mininterval=1.0, delay=2.0) as bar:
            for chunk in iter(lambda: list(itertools.islice(records, CHUNK)), []):
                self._read_chunk(chunk)
                bar.update(len(chunk))
        lists = {} if self.lists is None else {"pairs": len(self.gaps)}
        of_source = source.counts | lists
        self.counts.update({key: of_source[key] for key in (*COUNTED, "empty_responses")})
        self.skipped, self.note = source.counts["skipped"], source.counts.get("note")

    def _as_pairs(self, record: Record) -> Record:
        """A list with all pairs of responses whose scores differ."""
        scores = record.scores
        indices = range(len(scores))
        pairs = [(a, b) for a in indices for b in indices if scores[a] > scores[b]]
        self.lists.append(len(scores))
        self.ties += len(scores) * (len(scores) - 1) // 2 - len(pairs)
        return replace(record, pairs=pairs)

    def _read_chunk(self, chunk: list) -> None:
        prompts = [render_prompt(record, self.tokenizer) for record in chunk]
        joined = [
            prompt + response
            for prompt, record in zip(prompts, chunk, strict=True)
            for response in record.responses
        ]
        together = iter(
            self.tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
        )
        tokens = tokenise(chunk, self.tokenizer)
        for record, prompt, prompt_tokens, responses, masks, asked in zip(
            chunk, prompts, *tokens, strict=True
        ):
            is_chat = not isinstance(record.prompt, str)
            self.chats += is_chat
            self._count("joined_prompts", record, asked != prompt_tokens)
            check_room(self.tokenizer, record.prompt, self.lengths[1], record.source)
            self._prompt(record, prompt, prompt_tokens)
            for text, response in zip(record.responses, responses, strict=True):
                whole = next(together)
                self._response(record, prompt, text, prompt_tokens, response, whole)
            cut = truncate(
                prompt_tokens,
                responses,
                self.tokenizer,
                self.truncation,
                *self.lengths,
                chat=is_chat,
                unended=[isinstance(one, Unended) for one in record.responses],
            )
            self._pairs(record, responses, cut)
            self._sample_example(record, cut, masks)

    def _count(self, key: str, record, n: int = 1) -> None:
        if n:
            self.counts[key] += n
            self.first.setdefault(key, record.source)

    def _prompt(self, record, prompt: str, tokens: list[int]) -> None:
        self.prompts.add(hashlib.blake2b(prompt.encode(), digest_size=16).digest())
        self.prompt_tokens.append(len(tokens))
        bos = self.tokenizer.bos_token_id
        begins = 0 if isinstance(record.prompt, str) else 1  # a chat template writes its own
        if bos is not None and tokens[: begins + 1] == [bos] * (begins + 1):
            self._count("bos_doubled", record)
        elif self._names_special(record.prompt, tokens):
            self._count("eos_in_prompts", record)
        if isinstance(record.prompt, str) and record.prompt.lstrip().startswith(('[{"', "[{'")):
            self._count("messages_as_text", record)

    def _names_special(self, prompt, tokens: list[int]) -> bool:
        """Whether BOS or EOS come from the text itself, and not from a chat template."""
        if isinstance(prompt, str):
            return not self.special.isdisjoint(tokens)
        names = [name for name in (self.tokenizer.bos_token, self.tokenizer.eos_token) if name]
        texts = [message["content"] or "" for message in prompt.messages]
        return any(name in text for text in texts for name in names)

    def _response(
        self,
        record,
        prompt: str,
        text: str,
        prompt_tokens: list[int],
        tokens: list[int],
        together: list[int],
    ) -> None:
        self.response_tokens.append(len(tokens))
        self._count("prompt_repeated", record, text.startswith(prompt))
        if not isinstance(record.prompt, str):
            ends = {*self.special, end_of_turn(self.tokenizer)}
            self._count("eos_in_responses", record, not ends.isdisjoint(tokens[:-1]))
            return
        if tokens[-1:] == [self.tokenizer.eos_token_id]:
            self._count("eos_doubled", record)
        elif not self.special.isdisjoint(tokens):
            self._count("eos_in_responses", record)
        if together != prompt_tokens + tokens:
            self._count("merged_boundaries", record)
            self.boundary = self.boundary or f"{prompt[-12:]!r} and {text[:12]!r}"

    def _pairs(self, record, responses: list[list[int]], cut: tuple) -> None:
        _, cut_responses, (prompt_cut, cuts) = cut
        self._count("truncated_prompts", record, prompt_cut)
        self._count("truncated_responses", record, sum(cuts))
        texts = [(record.responses[a], record.responses[b]) for a, b in record.pairs]
        distinct = set(texts)
        contradictory = sum(a != b and (b, a) in distinct for a, b in texts)
        same_after_cut = sum(
            record.responses[a] != record.responses[b] and cut_responses[a] == cut_responses[b]
            for a, b in record.pairs
        )
        self._count("duplicate_pairs", record, len(texts) - len(distinct))
        self._count("identical_pairs", record, sum(a == b for a, b in texts))
        self._count("contradictory_pairs", record, contradictory)
        self._count("same_after_cut", record, same_after_cut)
        self.longer.update(
            int(np.sign(len(responses[a]) - len(responses[b]))) for a, b in record.pairs
        )
        self.prompts_with_pairs += bool(record.pairs)
        if record.scores is not None:
            self.gaps.extend(record.scores[a] - record.scores[b] for a, b in record.pairs)

    def _sample_example(self, record, cut: tuple, masks: list) -> None:
        """Reservoir sampling: each record with a pair, or a target, is equally likely to be among
        the examples."""
        if self.has_pairs and not record.pairs:
            return
        self.counts["candidates"] += 1
        place = len(self.examples)
        if place >= self.n_examples:
            place = self.rng.randrange(self.counts["candidates"])
        if place < self.n_examples:
            members = self.rng.choice(record.pairs) if self.has_pairs else (record.sft_target,)
            if self.lists is not None:
                order = sorted(range(len(record.scores)), key=lambda i: -record.scores[i])
                members = tuple(order)
            self.examples[place : place + 1] = [(record, cut, masks, members)]

    def numbers(self) -> dict:
        """All statistics as plain numbers."""
        return {
            "has_pairs": self.has_pairs,
            "note": self.note,
            **{key: self.counts[key] for key in (*COUNTED, *CHECKS)},
            "skipped": self.skipped,
            "first": self.first,
            "boundary": self.boundary,
            "prompt_tokens": quantiles(self.prompt_tokens),
            "response_tokens": quantiles(self.response_tokens),
            "longer_wins": self._longer_wins(),
            "score_gap": self._score_gap(),
            "list_length": quantiles(self.lists or array("i")),
            "tied_pairs": self.ties,
        }

    def _longer_wins(self) -> dict | None:
        decided = self.longer[1] + self.longer[-1]
        if not decided:
            return None
        share = self.longer[1] / decided
        # The pairs of a prompt are not independent, so the trials are at most the prompts.
        trials = min(decided, self.prompts_with_pairs)
        return {"share": share, "interval": wilson(share, trials), "pairs": decided}

    def _score_gap(self) -> dict | None:
        if not self.gaps:
            return None
        shape = histogram(np.asarray(self.gaps), whole=False)
        return quantiles(self.gaps) | {"histogram": shape}


def quantiles(values: array) -> dict[str, float]:
    if not len(values):
        return {}
    names = {"min": 0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1}
    quantile_values = np.quantile(np.asarray(values), list(names.values()))
    return {name: float(q) for name, q in zip(names, quantile_values, strict=True)}


# ----------------------------------------------------------------------------------------- findings


def findings_of(statistics: dict, tolerate: float) -> list[dict]:
    """Errors and warnings: {level, split, what, count, of, text}."""
    return [
        finding
        for split, n in statistics["splits"].items()
        for finding in (
            *_missing_data(split, n),
            *_faults(split, n, tolerate),
            *_skipped_rows(split, n),
            *_length_bias(split, n),
        )
    ]


def _finding(level: str, split: str, what: str, count: int, of: int, text: str) -> dict:
    return {
        "level": level,
        "split": split,
        "what": what,
        "count": count,
        "of": of,
        "text": f"{split}: {text}",
    }


def _missing_data(split: str, n: dict):
    if not n["prompts"]:
        yield _finding("error", split, "no_prompts", 0, n["rows"], "no usable prompt")
    elif not n["has_pairs"]:
        text = "responses to imitate (loss=sft), no pairs"
        yield _finding("warning", split, "no_pairs", 0, n["prompts"], text)
    elif not n["pairs"]:
        yield _finding("error", split, "no_pairs", 0, n["prompts"], "no pair in it")


def _faults(split: str, n: dict, tolerate: float):
    for what, check in CHECKS.items():
        count, total = n[what], n[check.of]
        if not count:
            continue
        limit = {"tolerate": tolerate, None: 1.0}.get(check.limit, check.limit)
        level = "error" if count / total > limit else "warning"
        parts = [f"{count:,} of {total:,} {check.of} ({count / total:.2%}): {check.meaning}"]
        if what == "merged_boundaries":
            parts.append(f"such as {n['boundary']}")
        if what in n["first"]:
            parts.append(f"first at {n['first'][what]}")
        yield _finding(level, split, what, count, total, "; ".join(parts))


def _skipped_rows(split: str, n: dict):
    for reason, count in n["skipped"].items():
        text = f"{count:,} left out: {reason}"
        yield _finding("warning", split, "skipped", count, n["rows"], text)


def _length_bias(split: str, n: dict):
    wins = n["longer_wins"]
    if not wins:
        return
    low, high = wins["interval"]
    if low > LENGTH_BIAS[1] or high < LENGTH_BIAS[0]:
        text = (
            f"the longer response is chosen in {wins['share']:.1%} of the pairs:"
            " length alone predicts much"
        )
        count = round(wins["share"] * wins["pairs"])
        yield _finding("warning", split, "length_bias", count, wins["pairs"], text)
