"""From records to batches: tokenise once into memory-mapped arrays, order the examples, collate.

The order of the data is a pure function of (seed, epoch) and the loader's state is two integers.
"""

import heapq
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from layouts import Batch, Layout, lay_out
from records import Record, Source
from utils import DataError, atomic_directory, content_hash

STORE_VERSION = 1  # raise it whenever what is stored, or how text is cut, changes
CHUNK = 512  # records tokenised at a time; fast tokenizers spread a chunk over all cores


# ----------------------------------------------------------------------------------- tokens on disk


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


# ----------------------------------------------------------------------------------------- examples


class PreferenceData:
    """One or several token stores read as one: examples are pairs, prompts with the response to
    imitate, or responses.

    kind: "pairs", "targets", "responses", or "prompts", which are for sampling alone. `len(data)`
    counts examples.
    """

    def __init__(self, stores: list[TokenStore], kind: str, name: str):
        if kind == "responses":  # each of them is a target
            stores = [replace(store, targets=np.arange(len(store.responses))) for store in stores]
        self.stores, self.kind = stores, kind
        sizes = [len(store.pairs if kind == "pairs" else store.targets) for store in stores]
        self.begins = np.cumsum([0, *sizes])
        prompts = np.cumsum([0, *(len(store.prompts) for store in stores)])
        self.groups = np.concatenate(
            [self._example_prompts(store) + n for store, n in zip(stores, prompts)]
        )
        self._numbers = {id(store): i for i, store in enumerate(stores)}
        if not len(self):
            raise DataError(
                f"datasets: {name} hold no {kind}; counts:"
                f" {json.dumps([store.counts for store in stores])}"
            )

    def __len__(self) -> int:
        return int(self.begins[-1])

    def _example_prompts(self, store: TokenStore) -> np.ndarray:
        """(examples,): the prompt each example belongs to."""
        responses = store.pairs[:, 0] if self.kind == "pairs" else store.targets
        return np.asarray(store.response_prompt)[responses]

    def locate(self, example: int) -> tuple[TokenStore, int]:
        part = int(np.searchsorted(self.begins, example, side="right")) - 1
        return self.stores[part], int(example - self.begins[part])

    def by_store(self, examples: np.ndarray) -> Iterator[tuple[TokenStore, np.ndarray]]:
        """Each store with its own part of some examples, as rows of its pairs or targets."""
        for begin, end, store in zip(self.begins[:-1], self.begins[1:], self.stores):
            yield store, examples[(examples >= begin) & (examples < end)] - begin

    def responses_of(self, example: int) -> tuple[TokenStore, list[int]]:
        """The store and the response indices of an example: [chosen, rejected], or [target]."""
        store, i = self.locate(example)
        return store, (
            [int(r) for r in store.pairs[i]] if self.kind == "pairs" else [int(store.targets[i])]
        )

    def number_of(self, store: TokenStore) -> int:
        return self._numbers[id(store)]

    def describe(self, example: int) -> str:
        """Where an example came from, for messages."""
        store, responses = self.responses_of(example)
        return f"{store.sources[store.response_prompt[responses[0]]]} (example {example})"

    def check_for(self, loss) -> str | None:
        """Whether these data hold what a loss reads, before a model loads; returns what the loss
        says of the scores."""
        for column in sorted(loss.columns):
            for store in self.stores:
                if column not in store.columns:
                    has = ", ".join(store.columns) or "none"
                    raise DataError(
                        f"loss={loss.name} reads the column {column!r}, which {store.name} does not"
                        f" have; it has: {has}"
                    )
        if "scores" not in loss.reads:
            return None
        scores = (
            self.pair_scores()
            if self.kind == "pairs"
            else [
                np.concatenate([np.asarray(store.scores)[store.targets] for store in self.stores])
            ]
        )
        for i in np.flatnonzero(~np.isfinite(scores).all(axis=0))[:1]:
            raise DataError(f"loss={loss.name} needs scores, but {self.describe(int(i))} has none")
        if self.kind != "pairs":
            return None
        chosen, rejected = map(torch.from_numpy, scores)
        return loss.inspect_scores(chosen, rejected, ExampleNames(self, range(len(self))))

    def pair_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the chosen and of the rejected responses, (pairs,) each; NaN where the data has
        none."""
        both = [np.asarray(store.scores)[np.asarray(store.pairs)] for store in self.stores]
        return tuple(np.concatenate([part[:, side] for part in both]) for side in (0, 1))


class ExampleNames:
    """Descriptions of some examples, looked up only when an error message asks for one."""

    def __init__(self, data: PreferenceData, examples):
        self.data, self.examples = data, examples

    def __getitem__(self, i: int) -> str:
        return self.data.describe(self.examples[i])

    def __len__(self) -> int:
        return len(self.examples)


@dataclass
class PromptToSample:
    """A prompt for sampling, cut to max_prompt_length, and the best response the data has for
    it."""

    tokens: list[int]
    chosen: list[int]
    key: int


def prompts_to_sample(data: PreferenceData, n: int, max_prompt_length: int) -> list[PromptToSample]:
    """The first `n` distinct prompts of the fixed evaluation order, the same whatever the seed of
    the run."""
    found: dict[int, PromptToSample] = {}
    for example in evaluation_order(data.groups):
        if int(data.groups[example]) not in found:
            prompt = prompt_to_sample(data, int(example), max_prompt_length)
            found[prompt.key] = prompt
        if len(found) == n:
            break
    return list(found.values())


def prompt_to_sample(data: PreferenceData, example: int, max_prompt_length: int) -> PromptToSample:
    """The prompt of an example."""
    store, responses = data.responses_of(example)
    begin, end = store.prompts[store.response_prompt[responses[0]]]
    prompt = store.tokens[begin:end].tolist()
    if len(prompt) > max_prompt_length:
        head = 1 if store.truncation == "keep_end" else 0  # a BOS stays in front
        prompt = prompt[:head] + list(
            cut_prompt(prompt[head:], max_prompt_length - head, store.truncation)
        )
    begin, end = store.responses[
        _best_response(store, responses[0]) if data.kind == "responses" else responses[0]
    ]
    return PromptToSample(prompt, store.tokens[begin:end].tolist(), int(data.groups[example]))


def _best_response(store: TokenStore, response: int) -> int:
    """The response of the same prompt with the highest score."""
    begin, end = np.searchsorted(
        store.response_prompt, store.response_prompt[response] + np.array([0, 1])
    )
    return int(begin + np.argmax(store.scores[begin:end]))


# -------------------------------------------------------------------------------------------- order


ORDERS = ("pairs", "prompts")


def epoch_order(groups: np.ndarray, seed: int, epoch: int, order: str = "pairs") -> np.ndarray:
    """A permutation of the examples, a pure function of (seed, epoch).

    groups (examples,): the prompt of each example. order: "pairs" spreads the examples of a prompt
    out: its m examples sit at u/m, (1+u)/m, ... of the epoch for one random u a prompt, so two of
    them meet in a batch only when the batch is longer than an m-th of the epoch. "prompts" keeps
    them together, prompt after prompt.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(groups))
    by_group = shuffled[np.argsort(groups[shuffled], kind="stable")]
    _, first, inverse, count = np.unique(
        groups[by_group], return_index=True, return_inverse=True, return_counts=True
    )
    place = rng.random(len(count))[inverse]
    if order == "pairs":
        rank = np.arange(len(groups)) - first[inverse]
        place = (rank + place) / count[inverse]
    return by_group[np.argsort(place, kind="stable")]


def evaluation_order(groups: np.ndarray) -> np.ndarray:
    """One fixed order for all runs, so that runs with different seeds are evaluated on the same
    examples."""
    return epoch_order(groups, 0, 0)


class Loader:
    """Yields the example indices of one optimizer step at a time, each example once an epoch.

    Stops after `n_epochs` epochs or `n_examples` examples, whichever comes first (null means no
    limit, not both). The last batch of an epoch, and the last of all, may be smaller. State:
    (epoch, cursor).
    """

    def __init__(
        self,
        groups,
        *,
        batch_size: int,
        seed: int,
        n_epochs: int | None,
        n_examples: int | None,
        order: str = "pairs",
    ):
        self.groups, self.batch_size, self.seed, self.order = groups, batch_size, seed, order
        limits = [n for n in (n_examples, n_epochs and n_epochs * len(groups)) if n is not None]
        self.total = min(limits)
        self.epoch = self.cursor = 0
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def examples(self) -> int:
        """How many examples were yielded since the start of the run."""
        return self.epoch * len(self.groups) + self.cursor

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        indices = self.peek()
        if not len(indices):
            raise StopIteration
        self.cursor += len(indices)
        if self.cursor == len(self.groups):
            self.epoch, self.cursor = self.epoch + 1, 0
        return indices

    def peek(self) -> np.ndarray:
        """What comes next, and empty at the end."""
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, epoch_order(self.groups, self.seed, self.epoch, self.order)
        size = min(self.batch_size, self.total - self.examples)
        return self._order[1][self.cursor : self.cursor + max(0, size)]

    def first_epoch(self) -> np.ndarray:
        """All examples of a run, each once."""
        return epoch_order(self.groups, self.seed, 0, self.order)[: self.total]

    def ahead(self, prepare: Callable[[np.ndarray], Any]) -> Iterator[tuple[np.ndarray, Any]]:
        """(indices, `prepare(indices)`) of each step, the next one prepared by a thread while this
        one is used."""
        with ThreadPoolExecutor(1, "prepare") as thread:
            coming = thread.submit(prepare, self.peek()) if len(self.peek()) else None
            while coming is not None:
                prepared = coming.result()
                indices = next(self)
                coming = thread.submit(prepare, self.peek()) if len(self.peek()) else None
                yield indices, prepared

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]


# ------------------------------------------------------------------------------------- microbatches


MICROBATCH_TOKENS = {
    "cpu": 2048,
    "cuda": 16384,
}  # beyond, a microbatch takes more memory and gains no speed


def microbatch_tokens(config, loss, device: str) -> int:
    """How many input tokens a microbatch is meant to have."""
    distributions = (
        2 if "token_kl" in loss.reads else 1
    )  # over the vocabulary, kept for the backward pass
    return config.microbatch_tokens or MICROBATCH_TOKENS[device] // distributions


def split_step(
    data: PreferenceData,
    examples: np.ndarray,
    layout: Layout,
    *,
    ranks: int,
    at_least: int = 1,
    tokens: int | None = None,
    grouping: bool = True,
) -> list[list[np.ndarray]]:
    """The examples of one step as microbatches: for each rank equally many, whose sizes differ
    little in tokens.

    at_least: microbatches of a rank. tokens: wanted size of one; null: any. What shares a prompt
    stays together where the layout gains by it. Without `grouping` examples keep their order; with
    it microbatches are evened out, or, where there is padding, hold examples of like lengths. A
    microbatch may be empty where there is less to share than ranks.
    """
    units, rows, sizes = _units(data, examples, layout)
    most = -(-len(units) // ranks) * ranks

    def cost(of_bin: np.ndarray) -> int:
        """Input tokens of a microbatch; where there is padding, with it."""
        return int(
            sizes[of_bin].sum()
            if layout.name != "padded"
            else rows[of_bin].sum() * (sizes[of_bin] // rows[of_bin]).max(initial=0)
        )

    if grouping and layout.name != "padded":  # the largest first, each where there is least
        n = at_least if tokens is None else max(at_least, -(-int(sizes.sum()) // (ranks * tokens)))
        bins: list[list[int]] = [[] for _ in range(min(n * ranks, most))]
        filled = [(0, i) for i in range(len(bins))]
        for unit in np.argsort(-sizes, kind="stable"):
            size, i = filled[0]
            bins[i].append(int(unit))
            heapq.heapreplace(filled, (size + int(sizes[unit]), i))
    else:  # one after the other, in as many as it takes
        order = np.argsort(sizes // rows, kind="stable") if grouping else np.arange(len(units))
        for n in range(min(at_least * ranks, most), most + 1, ranks):
            bins = np.array_split(order, n)
            if tokens is None or max(map(cost, bins)) <= tokens:
                break
    return [
        [
            examples[sorted(i for unit in of_bin for i in units[unit])]
            for of_bin in bins[rank::ranks]
        ]
        for rank in range(ranks)
    ]


def _units(
    data: PreferenceData, examples: np.ndarray, layout: Layout
) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """What must not be parted (places in `examples`), and of each its rows and its input tokens;
    padded rows are as wide as the widest."""
    units: dict[Any, tuple[list[int], int, dict[int, int]]] = {}
    for i, example in enumerate(examples):
        store, responses = data.responses_of(int(example))
        key = int(data.groups[example]) if layout.name == "prefix_shared" else i
        prompt = int(np.diff(store.prompts[store.response_prompt[responses[0]]])[0])
        places, _, lengths = units.setdefault(key, ([], prompt, {}))
        places.append(i)
        lengths.update({r: int(np.diff(store.responses[r])[0]) for r in responses})
    rows = np.array(
        [1 if layout.name == "prefix_shared" else len(lengths) for _, _, lengths in units.values()]
    )
    if layout.name == "padded":
        sizes = [
            len(lengths) * (prompt + max(lengths.values())) for _, prompt, lengths in units.values()
        ]
    else:
        sizes = [
            n * prompt + sum(lengths.values())
            for n, (_, prompt, lengths) in zip(rows, units.values())
        ]
    return [places for places, _, _ in units.values()], rows, np.array(sizes)


# ------------------------------------------------------------------------------------------ batches


def collate(data: PreferenceData, examples: np.ndarray, layout: Layout) -> Batch:
    """Each distinct response of the examples once, however many of them it takes part in."""
    trees: dict[
        tuple[int, int], dict[int, int]
    ] = {}  # (store, prompt) -> its responses in this batch
    located = [data.responses_of(int(example)) for example in examples]
    for store, responses in located:
        tree = trees.setdefault(
            (data.number_of(store), int(store.response_prompt[responses[0]])), {}
        )
        for r in responses:
            tree.setdefault(r, len(tree))
    sequences, scores, reference_logps, first = [], [], [], {}
    for (number, prompt), tree in trees.items():
        store = data.stores[number]
        first[number, prompt] = len(scores)
        sequences.append(
            (
                _tokens(store, store.prompts[prompt]),
                [_tokens(store, store.responses[r]) for r in tree],
            )
        )
        scores.extend(float(store.scores[r]) for r in tree)
        if store.reference is not None:
            reference_logps.extend(store.reference.logps(r) for r in tree)
    batch = lay_out(sequences, layout)
    members = []
    for store, responses in located:
        key = data.number_of(store), int(store.response_prompt[responses[0]])
        members.append([first[key] + trees[key][r] for r in responses])
    if data.kind == "pairs":
        rows = [data.locate(int(example)) for example in examples]
        shared = set.intersection(*(set(store.columns) for store, _ in rows))
        batch.columns = {
            name: torch.tensor(
                [float(store.columns[name][i]) for store, i in rows], dtype=torch.float64
            )
            for name in shared
        }
    batch.chosen = torch.tensor([pair[0] for pair in members])
    batch.rejected = torch.tensor([pair[1] for pair in members]) if data.kind == "pairs" else None
    batch.scores = torch.tensor(scores, dtype=torch.float64)
    batch.examples = [int(example) for example in examples]
    if len(reference_logps) == len(scores):
        batch.reference_logps = torch.from_numpy(np.concatenate(reference_logps))
    return batch


def _tokens(store: TokenStore, span: np.ndarray) -> np.ndarray:
    return store.tokens[span[0] : span[1]]


# --------------------------------------------------------------------------- what the data are like


def describe_data(stores: list[TokenStore]) -> dict:
    """Counts of a split's datasets and histograms of its lengths (tokens) and score gaps, for
    data.json."""
    lengths = {
        "prompt_tokens": np.concatenate([np.diff(store.prompts, axis=1)[:, 0] for store in stores]),
        "response_tokens": np.concatenate(
            [np.diff(store.responses, axis=1)[:, 0] for store in stores]
        ),
    }
    gaps = [
        np.asarray(store.scores)[store.pairs[:, 0]] - np.asarray(store.scores)[store.pairs[:, 1]]
        for store in stores
    ]
    gaps = np.concatenate(gaps)
    gaps = gaps[np.isfinite(gaps)]
    histograms = {name: histogram(values, whole=True) for name, values in lengths.items()}
    if len(gaps):
        histograms["score_gap"] = histogram(gaps, whole=False)
    return {"datasets": [store.counts for store in stores], "histograms": histograms}


def histogram(values: np.ndarray, *, whole: bool, bins: int = 30) -> dict:
    """{edges (bins + 1,), counts (bins,)} of values, (n,) with n > 0; `whole` numbers get bins of
    equal whole width, at most `bins` of them."""
    low, high = float(values.min()), float(values.max())
    if whole:  # edges between whole numbers, so that no bin is wider by chance
        width = max(1, int(np.ceil((high - low + 1) / bins)))
        edges = np.arange(low - 0.5, high + width, width)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts, edges = np.histogram(values, bins=edges)
    return {"edges": [round(float(e), 6) for e in edges], "counts": counts.tolist()}


def counts_line(counts: dict) -> str:
    """One line for the console: what was read from a dataset split, cut and skipped."""
    told = ", ".join(
        f"{counts[key]:,} {key}"
        for key in ("rows", "prompts", "responses", "pairs")
        if key in counts
    )
    cut = (
        f"{counts['truncated_prompts']:,} prompts and {counts['truncated_responses']:,} responses"
        " truncated"
    )
    if counts.get("empty_responses"):
        told += f" ({counts['empty_responses']:,} responses are empty: EOS alone)"
    skipped = "; ".join(
        f"skipped {n:,}: {why}" for why, n in counts.get("skipped", {}).items() if n
    )
    return f"{counts['name']} {counts['split']}: " + "; ".join(
        filter(None, [told, cut, skipped, counts.get("note")])
    )
