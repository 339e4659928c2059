"""The examples of a microbatch as a `Batch` in the layout of the run."""

import numpy as np
import torch

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Batch, Layout, keep_scored, lay_out
from preflab.batching.token_store import TokenStore


def collate(
    data: PreferenceData, examples: np.ndarray, layout: Layout, *, mismatched: bool = False
) -> Batch:
    """A batch with each distinct response of the examples once, in however many pairs it is.

    examples (examples,): indices into `data`. mismatched: with `Batch.mismatched`.
    """
    located = [data.responses_of(int(example)) for example in examples]
    trees = _trees(data, located)
    sequences, scores, reference_logps, scored, first_response = [], [], [], [], {}
    weights: list[np.ndarray] = []
    for (store_number, prompt), responses in trees.items():
        store = data.stores[store_number]
        first_response[store_number, prompt] = len(scores)
        tokens = [_span(store.tokens, store.responses[r]) for r in responses]
        sequences.append((_span(store.tokens, store.prompts[prompt]), tokens))
        scores.extend(float(store.scores[r]) for r in responses)
        scored.extend(store.scored_tokens(r) for r in responses)
        if store.reference is not None:
            reference_logps.extend(store.reference.logps(r) for r in responses)
        if store.token_weights is not None:
            weights.extend(_span(store.token_weights, store.responses[r]) for r in responses)
    batch = lay_out(sequences, layout)
    batch.scores = torch.tensor(scores, dtype=torch.float64)
    batch.examples = [int(example) for example in examples]
    members = []  # of each example, its responses as indices into the batch
    for store, responses in located:
        key = _tree_key(data, store, responses)
        members.append([first_response[key] + trees[key][r] for r in responses])
    batch.chosen = torch.tensor([responses[0] for responses in members])
    if data.kind == "lists":
        batch.lists, batch.listed = _rectangle(members)
    if data.kind == "pairs":
        batch.rejected = torch.tensor([responses[1] for responses in members])
        batch.columns = _columns(data, examples)
    if len(reference_logps) == len(scores):
        batch.reference_logps = torch.from_numpy(np.concatenate(reference_logps))
    if len(weights) == len(scores):
        batch.token_weights = torch.from_numpy(np.concatenate(weights))
    if mismatched:
        batch.mismatched = _mismatched(sequences, scored, layout)
    if any(store.scored is not None for store in data.stores):
        keep_scored(batch, torch.from_numpy(np.concatenate(scored)))
    return batch


def _mismatched(
    sequences: list[tuple[np.ndarray, list[np.ndarray]]],
    scored: list[np.ndarray],
    layout: Layout,
) -> Batch:
    """Each prompt with as many responses as its own, from the prompt that follows in the batch,
    after the last the first. They are cut to the longest row of the batch.

    sequences: (prompt tokens, [response tokens, ...]). scored: which tokens of each response count.
    """
    masks = iter(scored)
    answers = [[(tokens, next(masks)) for tokens in responses] for _, responses in sequences]
    limit = max(len(p) + max(map(len, responses)) for p, responses in sequences)
    trees, counted = [], []
    for (prompt, responses), others in zip(sequences, answers[1:] + answers[:1], strict=True):
        room = limit - len(prompt)
        drawn = [others[i % len(others)] for i in range(len(responses))]
        trees.append((prompt, [tokens[:room] for tokens, _ in drawn]))
        counted += [mask[:room] for _, mask in drawn]
    batch = lay_out(trees, layout)
    keep_scored(batch, torch.from_numpy(np.concatenate(counted)))
    return batch


def _rectangle(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists as rows of one length, (lists, longest), each with its first entry again behind its
    end, and where they are no repetition."""
    longest = max(map(len, lists))
    rows = [members + members[:1] * (longest - len(members)) for members in lists]
    sizes = torch.tensor([len(members) for members in lists])
    return torch.tensor(rows), torch.arange(longest) < sizes[:, None]


def _trees(
    data: PreferenceData, located: list[tuple[TokenStore, list[int]]]
) -> dict[tuple[int, int], dict[int, int]]:
    """(store, prompt) -> {response: its place among the prompt's responses in this batch}."""
    trees: dict[tuple[int, int], dict[int, int]] = {}
    for store, responses in located:
        places = trees.setdefault(_tree_key(data, store, responses), {})
        for response in responses:
            places.setdefault(response, len(places))
    return trees


def _tree_key(data: PreferenceData, store: TokenStore, responses: list[int]) -> tuple[int, int]:
    """(number of the store, prompt) of an example's responses."""
    return data.number_of(store), int(store.response_prompt[responses[0]])


def _columns(data: PreferenceData, examples: np.ndarray) -> dict[str, torch.Tensor]:
    """The columns that the stores of all these pairs have, (examples,) by name."""
    rows = [data.locate(int(example)) for example in examples]
    shared = set.intersection(*(set(store.columns) for store, _ in rows))
    return {
        name: torch.tensor(
            [float(store.columns[name][i]) for store, i in rows], dtype=torch.float64
        )
        for name in shared
    }


def _span(values: np.ndarray, span: np.ndarray) -> np.ndarray:
    return values[span[0] : span[1]]
