"""Tokenised datasets: flat arrays, memory-mapped from a cache that is keyed by content."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from preflab.readers.records import Record, Source
from utils import DataError, atomic_directory, content_hash

STORE_VERSION = 1  # raise it whenever what is stored, or how text is cut, changes


CHUNK = 512  # records tokenised at a time; fast tokenizers spread a chunk over all cores


@dataclass
class TokenStore:
    """One dataset split, tokenised: flat arrays, memory-mapped.

    tokens (all tokens,) int32. prompts (prompts, 2) and responses (responses, 2): begin and end in
    `tokens`. response_prompt (responses,): the prompt of each. cut (responses,): text was cut, so
    there is no EOS. scores (responses,) float64, NaN where the data has none. pairs (pairs, 2):
    chosen and rejected response. targets (prompts,): the response to imitate. columns: further
    numbers, (pairs,) by name.
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
    key: str = ""  # changes with the content
    reference: Any = (
        None  # what the frozen reference says of each response, where it is kept; see reference.py
    )


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


def prepare(
    source: Source, tokenizer, *, max_length: int, max_prompt_length: int, cache_dir: str | Path
) -> TokenStore:
    """Tokenise a dataset split, or map the copy an earlier run left in `cache_dir` under the hash
    of its content."""
    key = content_hash(
        f"store {STORE_VERSION}",
        source.fingerprint(),
        tokenizer_hash(tokenizer),
        f"{max_length} {max_prompt_length}",
    )
    folder = Path(cache_dir) / "tokens" / key
    if not folder.is_dir():
        with atomic_directory(folder) as temporary:
            _write_store(source, tokenizer, max_length, max_prompt_length, temporary)
    return _load_store(folder)


def tokenizer_hash(tokenizer) -> str:
    """Changes when the tokenizer would produce other ids."""
    special = json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = (
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    return content_hash(type(tokenizer).__name__, special, body)


def _write_store(
    source: Source, tokenizer, max_length: int, max_prompt_length: int, folder: Path
) -> None:
    rows = {key: [] for key in ARRAYS if key != "tokens"}
    columns: dict[str, list[float]] = {}
    truncated = {"truncated_prompts": 0, "truncated_responses": 0}
    written = 0
    progress = tqdm(
        desc=f"tokenise {source.name} {source.split}", unit=" prompts", mininterval=1.0, delay=2.0
    )
    with open(folder / "tokens.bin", "wb") as out:
        for records in _chunks(source.records(), CHUNK):
            for record, prompt, responses in zip(records, *tokenise(records, tokenizer)):
                prompt, responses, cut = truncate(
                    prompt, responses, tokenizer, source.truncation, max_length, max_prompt_length
                )
                truncated["truncated_prompts"] += cut[0]
                truncated["truncated_responses"] += sum(cut[1])
                first = len(rows["responses"])
                rows["prompts"].append((written, written + len(prompt)))
                rows["sources"].append(record.source)
                rows["targets"].append(first + record.sft_target)
                rows["pairs"].extend(
                    (first + chosen, first + rejected) for chosen, rejected in record.pairs
                )
                for name, values in record.columns.items():
                    columns.setdefault(name, []).extend(values)
                flat = list(prompt)
                for tokens, was_cut in zip(responses, cut[1]):
                    rows["responses"].append(
                        (written + len(flat), written + len(flat) + len(tokens))
                    )
                    rows["response_prompt"].append(len(rows["prompts"]) - 1)
                    rows["cut"].append(was_cut)
                    flat.extend(tokens)
                rows["scores"].extend(record.scores or [float("nan")] * len(responses))
                out.write(np.asarray(flat, dtype=np.int32).tobytes())
                written += len(flat)
            progress.update(len(records))
    progress.close()
    counts = {"name": source.name, "split": source.split, **source.counts, **truncated}
    if not rows["prompts"]:
        raise DataError(
            f"datasets: {source.name} ({source.split}) holds no usable prompt; counts:"
            f" {json.dumps(counts)}"
        )
    for name, values in columns.items():
        if len(values) != len(rows["pairs"]):
            raise DataError(
                f"datasets: {source.name} has column {name!r} for some pairs only; give it for all"
                " or none"
            )
    kinds = {"cut": np.bool_, "scores": np.float64, "sources": np.str_}
    for key, values in rows.items():
        array = np.asarray(values, dtype=kinds.get(key, np.int64))
        np.save(
            folder / f"{key}.npy",
            array.reshape(-1, 2) if key in ("prompts", "responses", "pairs") else array,
        )
    for name, values in columns.items():
        np.save(folder / f"column-{content_hash(name)}.npy", np.asarray(values, dtype=np.float64))
    meta = {
        "name": source.name,
        "truncation": source.truncation,
        "counts": counts,
        "columns": sorted(columns),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _load_store(folder: Path) -> TokenStore:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = {
        key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in ARRAYS if key != "tokens"
    }
    arrays["tokens"] = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
    columns = {
        name: np.load(folder / f"column-{content_hash(name)}.npy") for name in meta["columns"]
    }
    return TokenStore(
        meta["name"],
        meta["truncation"],
        columns=columns,
        counts=meta["counts"],
        key=folder.name,
        **arrays,
    )


def store_of(
    name: str,
    trees: list[tuple[list[int], list[list[int]]]],
    scores: list[list[float]],
    pairs: list[tuple[int, int] | None],
) -> TokenStore:
    """A token store in memory, of [(prompt tokens, [response tokens, ...])], scores of each
    response, and a pair of each prompt or None.

    Prompts without a pair are left out; the better response of the others is the one to imitate.
    """
    kept = [i for i, pair in enumerate(pairs) if pair is not None]
    flat, prompts, responses, response_prompt = [], [], [], []
    for number, i in enumerate(kept):
        for tokens in (trees[i][0], *trees[i][1]):
            spans = prompts if tokens is trees[i][0] else responses
            spans.append((len(flat), len(flat) + len(tokens)))
            flat.extend(tokens)
        response_prompt += [number] * len(trees[i][1])
    first = np.searchsorted(response_prompt, np.arange(len(kept)))
    indices = first[:, None] + np.array([pairs[i] for i in kept], dtype=np.int64).reshape(-1, 2)
    return TokenStore(
        name,
        "keep_end",
        np.array(flat, dtype=np.int32),
        np.array(prompts).reshape(-1, 2),
        np.array(responses).reshape(-1, 2),
        np.array(response_prompt),
        np.zeros(len(responses), dtype=bool),
        np.array([score for i in kept for score in scores[i]], dtype=np.float64),
        indices,
        indices[:, 0],
        {},
        [f"prompt {i + 1}" for i in kept],
        {"name": name},
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


def tokenise(records: list[Record], tokenizer) -> tuple[list, list]:
    """Token ids of each record's prompt, and of each of its responses: no special tokens, nothing
    cut."""
    texts = [render_prompt(record, tokenizer) for record in records]
    for record in records:
        texts.extend(record.responses)
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    prompts = [next(ids) for _ in records]
    return prompts, [[next(ids) for _ in record.responses] for record in records]


def render_prompt(record: Record, tokenizer) -> str:
    """The prompt as text; chat messages go through the tokenizer's own template, up to where the
    answer begins."""
    if isinstance(record.prompt, str):
        return record.prompt
    if tokenizer.chat_template is None:
        raise DataError(
            f"{record.source}: the prompt is a list of chat messages, but the tokenizer"
            f" {tokenizer.name_or_path} has no chat template; use a chat model's tokenizer"
            " (model.tokenizer_name_or_path) or give prompts as text"
        )
    text = tokenizer.apply_chat_template(record.prompt, add_generation_prompt=True, tokenize=False)
    bos = tokenizer.bos_token or ""
    return (
        text[len(bos) :] if bos and text.startswith(bos) else text
    )  # the BOS is put in front by `truncate`


def truncate(prompt, responses, tokenizer, truncation, max_length, max_prompt_length):
    """Add BOS and EOS and cut to length. All responses of a prompt share one truncation of it.

    The prompt is cut to max_prompt_length only when it and the longest response do not fit into
    max_length; then each response is cut to what is left. A response that was cut has no EOS.
    Returns prompt, responses, (prompt was cut, [response was cut]).
    """
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    longest = max(len(response) for response in responses) + 1
    prompt_cut = False
    if len(bos) + len(prompt) + longest > max_length:
        cut = cut_prompt(prompt, max_prompt_length - len(bos), truncation)
        prompt_cut = len(cut) < len(prompt)
        prompt = cut
    prompt = bos + list(prompt)
    room = max_length - len(prompt)
    cuts = [len(response) + 1 > room for response in responses]
    responses = [
        list(response[:room]) if cut else [*response, tokenizer.eos_token_id]
        for response, cut in zip(responses, cuts)
    ]
    return prompt, responses, (prompt_cut, cuts)


def cut_prompt(prompt, limit: int, truncation: str):
    """At most `limit` tokens of the prompt: its start ("keep_start") or its end ("keep_end")."""
    if len(prompt) <= limit:
        return prompt
    return prompt[:limit] if truncation == "keep_start" else prompt[len(prompt) - limit :]
