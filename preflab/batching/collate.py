"""Examples of a microbatch become a `Batch` in the layout of the run."""

import numpy as np
import torch

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Batch, Layout, lay_out
from preflab.batching.token_store import TokenStore


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
