"""Tokenised datasets: flat arrays, memory-mapped from a cache that is keyed by content."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from preflab.batching.chat import conversations_ids
from preflab.batching.chat_template import chat_settings
from preflab.batching.token_weights import fit_weights, whole_lengths
from preflab.batching.truncation import truncate
from preflab.batching.turn_ends import check_room
from preflab.readers.messages import Chat, Unended
from preflab.readers.records import Record, Source
from utils import (
    DataError,
    Progress,
    atomic_directory,
    content_hash,
    damaged_file,
    one_at_a_time,
    remove_leftovers,
    write_checksums,
)

logger = logging.getLogger(__name__)

STORE_VERSION = 1  # raise it when what is stored, or the truncation of text, changes
CHUNK = 512  # records tokenised at a time; fast tokenizers spread a chunk over all cores
# The arrays of a store, a file each.
ARRAYS = (
    "tokens",
    "prompts",
    "responses",
    "response_prompt",
    "cut",
    "scores",
    "pairs",
    "targets",
    "sources",
)
CHATS, CHAT_BEGINS, SCORED, ASKED = "chats.bin", "chat_begins.npy", "scored.npy", "asked.npy"
WEIGHTS = "token_weights.npy"
DTYPES = {"cut": np.bool_, "scores": np.float64, "sources": np.str_}  # the others are int64


@dataclass
class TokenStore:
    """One dataset split, tokenised: flat arrays, memory-mapped.

    truncation: the end of a long prompt that is kept, "keep_start" or "keep_end".
    tokens (all tokens,) int32.
    prompts (prompts, 2), responses (responses, 2): begin and end in `tokens`.
    response_prompt (responses,): the prompt of each response, ascending.
    cut (responses,): whether text was cut, so that there is no EOS.
    scores (responses,) float64: NaN where the data have none.
    pairs (pairs, 2): chosen and rejected response.
    targets (prompts,): the response to imitate.
    columns: further numbers, (pairs,) by name.
    sources (prompts,): file and line.
    chats: the conversations that prompts are made of, in JSON, one after the other, and where each
    begins and the last ends, (prompts + 1,); None where all prompts are text.
    scored (all tokens,): whether a loss counts the token, where responses have turns of a user in
    between; None where all tokens of responses are counted.
    token_weights (all tokens,) float64: those of responses that came with the data, 0 for prompts;
    None where the data have none or no loss reads them.
    asked (prompts, 2): begin and end in `tokens` of the prompt to sample for, where a tokenizer
    joins the end of a prompt with a response; None where all are those of `prompts`.
    bos: the id of BOS, None without one.
    counts: what was read, truncated and skipped, and under "content" a hash of the arrays but
    `sources`.
    key: changes with the content.
    reference: log-probs of the frozen reference, where they are cached; see reference_cache.py.
    """

    name: str
    truncation: str
    tokens: np.ndarray
    prompts: np.ndarray
    responses: np.ndarray
    response_prompt: np.ndarray
    cut: np.ndarray
    scores: np.ndarray
    pairs: np.ndarray
    targets: np.ndarray
    columns: dict[str, np.ndarray]
    sources: list[str] | np.ndarray
    counts: dict
    key: str = ""
    reference: Any = None
    chats: tuple[np.ndarray, np.ndarray] | None = None
    scored: np.ndarray | None = None
    bos: int | None = None
    asked: np.ndarray | None = None
    token_weights: np.ndarray | None = None

    def prompt_to_ask(self, prompt: int) -> list[int]:
        """The tokens that a response to a prompt is sampled behind."""
        begin, end = (self.prompts if self.asked is None else self.asked)[prompt]
        return self.tokens[begin:end].tolist()

    def scored_tokens(self, response: int) -> np.ndarray:
        """Whether each token of a response is counted, (tokens,)."""
        begin, end = self.responses[response]
        if self.scored is None:
            return np.ones(end - begin, dtype=np.bool_)
        return self.scored[begin:end]

    def chat(self, prompt: int) -> Chat | None:
        """The conversation that a prompt is made of; None for text."""
        if self.chats is None:
            return None
        content, begins = self.chats
        written = content[begins[prompt] : begins[prompt + 1]].tobytes()
        return Chat(*json.loads(written)) if written else None


def prepare(
    source: Source,
    tokenizer,
    *,
    max_length: int,
    max_prompt_length: int,
    cache_dir: str | Path,
    between_chunks: Callable[[], None] = lambda: None,
) -> TokenStore:
    """Tokenise a dataset split, or map the copy that an earlier run stored in `cache_dir` under the
    hash of its content.

    between_chunks: called again and again while the split is tokenised; what it raises leaves
    nothing in `cache_dir`.
    """
    key = content_hash(
        f"store {STORE_VERSION}",
        source.fingerprint(),
        tokenizer_hash(tokenizer),
        f"{max_length} {max_prompt_length}",
    )
    folder = Path(cache_dir) / "tokens" / key
    if not folder.is_dir() or damaged_file(folder):
        waiting = f"another run tokenises {source.name} {source.split}; waiting for it"
        with one_at_a_time(Path(cache_dir) / "locks" / key, waiting):
            # It may be whole by now.
            if folder.is_dir() and (damage := damaged_file(folder)):
                logger.warning(f"{folder}: {damage}; the data are tokenised again")
                shutil.rmtree(folder)
            if not folder.is_dir():
                remove_leftovers(folder.parent)
                with atomic_directory(folder) as temporary:
                    _write_store(
                        source, tokenizer, max_length, max_prompt_length, temporary, between_chunks
                    )
                    write_checksums(temporary)
    return _load_store(folder)


def tokenizer_hash(tokenizer) -> str:
    """Changes when the tokenizer would produce other ids."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]
    if tokenizer.chat_template:
        special += chat_settings(tokenizer).key()
    special = json.dumps(special)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        body = backend.to_str()
    else:
        body = json.dumps(sorted(tokenizer.get_vocab().items()))
    return content_hash(type(tokenizer).__name__, special, body)


def _write_store(
    source: Source,
    tokenizer,
    max_length: int,
    max_prompt_length: int,
    folder: Path,
    between_chunks: Callable[[], None],
) -> None:
    progress = Progress(
        desc=f"tokenise {source.name} {source.split}", unit=" prompts", mininterval=1.0, delay=2.0
    )
    with open(folder / "tokens.bin", "wb") as out, progress:
        writer = _StoreWriter(out)
        for records in _chunks(source.records(), CHUNK):
            between_chunks()
            tokenised = tokenise(records, tokenizer)
            for record, prompt, of_prompt, masks, asked in zip(records, *tokenised, strict=True):
                joined, whole = prompt != asked, whole_lengths(record, of_prompt)
                check_room(tokenizer, record.prompt, max_prompt_length, record.source)
                prompt, of_prompt, (prompt_cut, cuts) = truncate(
                    prompt,
                    of_prompt,
                    tokenizer,
                    source.truncation,
                    max_length,
                    max_prompt_length,
                    chat=not isinstance(record.prompt, str),
                    unended=[isinstance(one, Unended) for one in record.responses],
                )
                writer.add(record, prompt, of_prompt, prompt_cut, cuts, masks)
                writer.ask(asked if joined else None)
                writer.weigh(record, whole)
            progress.update(len(records))
    counts = {"name": source.name, "split": source.split, **source.counts, **writer.truncated}
    writer.check(source, counts)
    writer.save_arrays(folder)
    writer.save_chats(folder)
    if joined := sum(a != b for a, b in zip(writer.asked, writer.rows["prompts"], strict=True)):
        counts["joined_prompts"] = joined
    counts["content"] = _content(folder, writer.columns)
    meta = {
        "name": source.name,
        "truncation": source.truncation,
        "counts": counts,
        "columns": sorted(writer.columns),
        "bos": tokenizer.bos_token_id,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


class _StoreWriter:
    """Writes tokens to a file as they come, and collects the rows of all other arrays."""

    def __init__(self, out: BinaryIO):
        self.out = out
        self.n_tokens = 0
        self.rows: dict[str, list] = {key: [] for key in ARRAYS if key != "tokens"}
        self.columns: dict[str, list[float]] = {}
        self.truncated = {"truncated_prompts": 0, "truncated_responses": 0}
        self.chats: list[bytes] = []
        self.masks: list[tuple[int, list[bool]]] = []  # where each begins in `tokens`
        self.asked: list[tuple[int, int]] = []
        self.weights: list[tuple[int, list[float]]] = []  # as masks

    def add(
        self,
        record: Record,
        prompt: list[int],
        responses: list[list[int]],
        prompt_cut: bool,
        cuts: list[bool],
        masks: list[list[bool] | None],
    ) -> None:
        """One prompt with its responses, both as tokens; cuts: whether each response was cut;
        masks: whether each of its tokens is counted, None for all."""
        rows = self.rows
        prompt_number, first = len(rows["prompts"]), len(rows["responses"])
        rows["prompts"].append(self._write(prompt))
        rows["responses"].extend(self._write(response) for response in responses)
        for (begin, end), mask in zip(rows["responses"][first:], masks, strict=True):
            if mask is not None:
                self.masks.append((begin, mask[: end - begin]))
        rows["response_prompt"].extend([prompt_number] * len(responses))
        rows["cut"].extend(cuts)
        rows["scores"].extend(record.scores or [float("nan")] * len(responses))
        rows["sources"].append(record.source)
        is_chat = isinstance(record.prompt, Chat)
        self.chats.append(record.prompt.to_json().encode() if is_chat else b"")
        rows["targets"].append(first + record.sft_target)
        rows["pairs"].extend(
            (first + chosen, first + rejected) for chosen, rejected in record.pairs
        )
        for name, values in record.columns.items():
            self.columns.setdefault(name, []).extend(values)
        self.truncated["truncated_prompts"] += prompt_cut
        self.truncated["truncated_responses"] += sum(cuts)

    def ask(self, asked: list[int] | None) -> None:
        """The tokens to sample behind for the prompt of before; None: those of the prompt."""
        prompt = self.rows["prompts"][-1]
        self.asked.append(prompt if asked is None else self._write(asked))

    def weigh(self, record: Record, whole: list[int]) -> None:
        """The weights of the responses of the record of before. whole: their tokens uncut."""
        spans = self.rows["responses"][len(self.rows["responses"]) - len(whole) :]
        of_record = record.token_weights or []
        for values, n_whole, (begin, end) in zip(of_record, whole, spans, strict=bool(of_record)):
            kept = fit_weights(values, n_whole, end - begin, record.source)
            self.weights.append((begin, kept))

    def _write(self, tokens: list[int]) -> tuple[int, int]:
        """The span that the tokens have in the file."""
        self.out.write(np.asarray(tokens, dtype=np.int32).tobytes())
        begin = self.n_tokens
        self.n_tokens += len(tokens)
        return begin, self.n_tokens

    def check(self, source: Source, counts: dict) -> None:
        """Raise DataError where there is no prompt, or a column lacks values."""
        if not self.rows["prompts"]:
            raise DataError(
                f"datasets: {source.name} ({source.split}) holds no usable prompt; counts:"
                f" {json.dumps(counts)}"
            )
        for name, values in self.columns.items():
            if len(values) != len(self.rows["pairs"]):
                raise DataError(
                    f"datasets: {source.name} has column {name!r} for some pairs only; give it for"
                    " all or none"
                )

    def save_chats(self, folder: Path) -> None:
        """What only some data have: conversations, masks, and weights of tokens."""
        if any(self.chats):
            (folder / CHATS).write_bytes(b"".join(self.chats))
            begins = np.cumsum([0, *map(len, self.chats)])
            np.save(folder / CHAT_BEGINS, begins)
        if self.masks:
            scored = np.ones(self.n_tokens, dtype=np.bool_)
            for begin, mask in self.masks:
                scored[begin : begin + len(mask)] = mask
            np.save(folder / SCORED, scored)
        if self.weights:
            weights = np.zeros(self.n_tokens)
            for begin, values in self.weights:
                weights[begin : begin + len(values)] = values
            np.save(folder / WEIGHTS, weights)
        if self.asked != self.rows["prompts"]:
            np.save(folder / ASKED, np.asarray(self.asked))

    def save_arrays(self, folder: Path) -> None:
        for key, values in self.rows.items():
            array = np.asarray(values, dtype=DTYPES.get(key, np.int64))
            if key in ("prompts", "responses", "pairs"):
                array = array.reshape(-1, 2)
            np.save(folder / f"{key}.npy", array)
        for name, values in self.columns.items():
            array = np.asarray(values, dtype=np.float64)
            np.save(_column_file(folder, name), array)


def _content(folder: Path, columns: Iterable[str]) -> str:
    """Changes with what a run learns from, but not with where, or by which version, it was read."""
    arrays = (f"{key}.npy" for key in ARRAYS if key not in ("tokens", "sources"))
    files = [folder / name for name in ("tokens.bin", *arrays)]
    files += [path for path in (folder / SCORED, folder / WEIGHTS) if path.is_file()]
    files += [_column_file(folder, name) for name in sorted(columns)]
    return content_hash(*(part for file in files for part in (file.name, file)))


def _column_file(folder: Path, name: str) -> Path:
    """Hashed, because the name of a column need not be one that a file can have."""
    return folder / f"column-{content_hash(name)}.npy"


def _load_store(folder: Path) -> TokenStore:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = {
        key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in ARRAYS if key != "tokens"
    }
    arrays["tokens"] = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
    chats = None
    if (folder / CHATS).is_file():
        chats = np.memmap(folder / CHATS, dtype=np.uint8, mode="r"), np.load(folder / CHAT_BEGINS)
    columns = {name: np.load(_column_file(folder, name)) for name in meta["columns"]}
    if "content" not in meta["counts"]:  # of a version that did not store it
        meta["counts"]["content"] = _content(folder, columns)
    return TokenStore(
        meta["name"],
        meta["truncation"],
        columns=columns,
        counts=meta["counts"],
        key=folder.name,
        chats=chats,
        bos=meta.get("bos"),
        scored=_optional(folder / SCORED),
        asked=_optional(folder / ASKED),
        token_weights=_optional(folder / WEIGHTS),
        **arrays,
    )


def _optional(file: Path) -> np.ndarray | None:
    return np.load(file, mmap_mode="r") if file.is_file() else None


def store_of(
    name: str,
    trees: list[tuple[list[int], list[list[int]]]],
    scores: list[list[float]],
    pairs: list[tuple[int, int] | None],
) -> TokenStore:
    """A token store in memory.

    trees: [(prompt tokens, [response tokens, ...])]. scores: of each response of each prompt.
    pairs: (chosen, rejected) responses of each prompt, or None. Prompts without a pair are dropped;
    the chosen response of the others is the target.
    """
    used = [i for i, pair in enumerate(pairs) if pair is not None]
    tokens, prompts, responses, response_prompt = [], [], [], []

    def append(new: list[int]) -> tuple[int, int]:
        tokens.extend(new)
        return len(tokens) - len(new), len(tokens)

    for prompt_number, i in enumerate(used):
        prompt, of_prompt = trees[i]
        prompts.append(append(prompt))
        responses.extend(append(response) for response in of_prompt)
        response_prompt.extend([prompt_number] * len(of_prompt))
    first_responses = np.searchsorted(response_prompt, np.arange(len(used)))
    pairs_within = np.array([pairs[i] for i in used], dtype=np.int64).reshape(-1, 2)
    indices = first_responses[:, None] + pairs_within
    return TokenStore(
        name=name,
        truncation="keep_end",
        tokens=np.array(tokens, dtype=np.int32),
        prompts=np.array(prompts).reshape(-1, 2),
        responses=np.array(responses).reshape(-1, 2),
        response_prompt=np.array(response_prompt),
        cut=np.zeros(len(responses), dtype=bool),
        scores=np.array([score for i in used for score in scores[i]], dtype=np.float64),
        pairs=indices,
        targets=indices[:, 0],
        columns={},
        sources=[f"prompt {i + 1}" for i in used],
        counts={"name": name},
    )


def _chunks(items: Iterator, size: int) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def tokenise(records: list[Record], tokenizer) -> tuple[list, list, list, list]:
    """Token ids of each record's prompt, and of each of its responses, without truncation; whether
    each token of a response is counted, None for a response of which all are; and the ids to sample
    behind, see `conversations_ids`.

    Those of text have no special tokens, which `truncate` adds; those of conversations have all
    that the chat template writes.
    """
    texts = [record for record in records if isinstance(record.prompt, str)]
    chats = [record for record in records if not isinstance(record.prompt, str)]
    of_texts = iter(zip(*_text_ids(texts, tokenizer), strict=True))
    conversations = [(record.prompt, record.responses, record.source) for record in chats]
    of_chats = iter(zip(*conversations_ids(tokenizer, conversations), strict=True))
    ids = [next(of_texts if isinstance(record.prompt, str) else of_chats) for record in records]
    prompts, responses, masks, asked = map(list, zip(*ids, strict=True))
    return prompts, responses, masks, asked


def _text_ids(records: list[Record], tokenizer) -> tuple[list, list, list, list]:
    strings = [record.prompt for record in records]
    for record in records:
        strings.extend(record.responses)
    ids = iter(
        tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"] if strings else []
    )
    prompts = [next(ids) for _ in records]
    responses = [[next(ids) for _ in record.responses] for record in records]
    return prompts, responses, [[None] * len(record.responses) for record in records], prompts
