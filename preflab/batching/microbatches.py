"""The division of a step's examples into microbatches and over ranks."""

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Layout

# Input tokens of a microbatch; a larger one takes more memory and is no faster.
MICROBATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


def default_microbatch_tokens(reads: Collection[str], device: str) -> int:
    """The input tokens that a microbatch has where the config does not say.

    reads: of the loss. device: "cpu" or "cuda".
    """
    # A loss that reads token_kl also keeps the reference's distribution over the vocabulary for the
    # backward pass.
    distributions = 2 if "token_kl" in reads else 1
    return MICROBATCH_TOKENS[device] // distributions


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
    """The examples of one step as microbatches: for each rank the same number, of nearly equal
    sizes in tokens.

    examples (examples,): indices into `data`. at_least: microbatches of a rank. tokens: target size
    of a microbatch; None: no target. grouping: False keeps the order of the examples; True evens
    microbatches out or, in a padded layout, groups examples of similar lengths.

    Examples that share a prompt stay together where the layout writes the prompt once. A microbatch
    is empty where there are fewer units than ranks.
    """
    units = _units(data, examples, layout)
    most = -(-len(units.places) // ranks) * ranks
    if grouping and layout.name != "padded":
        n = at_least
        if tokens is not None:
            n = max(at_least, -(-int(units.sizes.sum()) // (ranks * tokens)))
        bins = _even_bins(units, min(n * ranks, most))
    else:
        order = np.arange(len(units.places))
        if grouping:
            order = np.argsort(units.sizes // units.rows, kind="stable")
        for n in range(min(at_least * ranks, most), most + 1, ranks):
            bins = np.array_split(order, n)
            if tokens is None or max(map(units.cost, bins)) <= tokens:
                break

    def examples_of(microbatch) -> np.ndarray:
        return examples[sorted(i for unit in microbatch for i in units.places[unit])]

    return [[examples_of(microbatch) for microbatch in bins[rank::ranks]] for rank in range(ranks)]


@dataclass
class Units:
    """What must stay in one microbatch: the examples of a prompt, or each example alone.

    places: of each unit, where its examples are in the step. rows (units,): its rows. sizes
    (units,): its input tokens; padded rows count as wide as the unit's widest. padded: whether rows
    of several units are padded to one width.
    """

    places: list[list[int]]
    rows: np.ndarray
    sizes: np.ndarray
    padded: bool

    def cost(self, members: np.ndarray) -> int:
        """Input tokens of a microbatch of some units, padding included."""
        if not self.padded:
            return int(self.sizes[members].sum())
        widths = self.sizes[members] // self.rows[members]
        return int(self.rows[members].sum() * widths.max(initial=0))


def _even_bins(units: Units, n: int) -> list[list[int]]:
    """`n` bins of units: the largest first, each into the bin with the fewest tokens."""
    bins: list[list[int]] = [[] for _ in range(n)]
    filled = [(0, i) for i in range(n)]  # a heap of (tokens, bin)
    for unit in np.argsort(-units.sizes, kind="stable"):
        size, i = filled[0]
        bins[i].append(int(unit))
        heapq.heapreplace(filled, (size + int(units.sizes[unit]), i))
    return bins


def _units(data: PreferenceData, examples: np.ndarray, layout: Layout) -> Units:
    shares_prompts = layout.name == "prefix_shared"
    # Of each unit: the places of its examples, the prompt's length, {response: length}.
    units: dict[Any, tuple[list[int], int, dict[int, int]]] = {}
    for i, example in enumerate(examples):
        store, responses = data.responses_of(int(example))
        key = int(data.groups[example]) if shares_prompts else i
        prompt_span = store.prompts[store.response_prompt[responses[0]]]
        places, _, lengths = units.setdefault(key, ([], _length(prompt_span), {}))
        places.append(i)
        lengths.update({r: _length(store.responses[r]) for r in responses})
    rows, sizes = [], []
    for _, prompt, lengths in units.values():
        n_rows = 1 if shares_prompts else len(lengths)
        rows.append(n_rows)
        if layout.name == "padded":
            sizes.append(n_rows * (prompt + max(lengths.values())))
        else:
            sizes.append(n_rows * prompt + sum(lengths.values()))
    places = [places for places, _, _ in units.values()]
    return Units(places, np.array(rows), np.array(sizes), layout.name == "padded")


def _length(span: np.ndarray) -> int:
    return int(span[1] - span[0])
