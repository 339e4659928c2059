"""How the examples of a step are divided into microbatches over ranks."""

import heapq
from typing import Any

import numpy as np

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Layout

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
