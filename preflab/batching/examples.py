"""Examples of a split over one or several token stores, and prompts to sample for."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from preflab.batching.loader import evaluation_order
from preflab.batching.token_store import TokenStore, cut_prompt
from utils import DataError


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
