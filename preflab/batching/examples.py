"""The examples of a split over one or several token stores, and the prompts to sample for."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from preflab.batching.loader import Mixture, evaluation_order
from preflab.batching.token_store import TokenStore
from preflab.batching.truncation import prompt_to_ask
from preflab.readers.messages import Chat
from utils import DataError


class PreferenceData:
    """One or several token stores read as one; `len(data)` counts examples.

    kind: what an example is. "pairs": a chosen and a rejected response. "targets": a prompt with
    the response to imitate. "responses": a single response. "lists": all responses of a prompt,
    which have scores. "prompts": a prompt to sample for.
    groups (examples,): the prompt of each example, numbered through all stores. mixture: the shares
    of the stores in an epoch, by `weights`; None where each example is drawn once.
    """

    def __init__(
        self,
        stores: list[TokenStore],
        kind: str,
        name: str,
        weights: list[float] | None = None,
    ):
        if kind == "responses":  # an example for each, so each is a target
            stores = [replace(store, targets=np.arange(len(store.responses))) for store in stores]
        self.stores, self.kind = stores, kind
        sizes = [len(store.pairs if kind == "pairs" else store.targets) for store in stores]
        self.begins = np.cumsum([0, *sizes])
        n_prompts = [len(store.prompts) for store in stores]
        first_prompts = np.cumsum([0, *n_prompts[:-1]])
        self.groups = np.concatenate(
            [
                self._example_prompts(store) + first
                for store, first in zip(stores, first_prompts, strict=True)
            ]
        )
        self._numbers = {id(store): i for i, store in enumerate(stores)}
        self._ends = [  # where the responses of each prompt begin and the last end
            np.searchsorted(store.response_prompt, np.arange(len(store.prompts) + 1))
            for store in stores
        ]
        if not len(self):
            counts = json.dumps([store.counts for store in stores])
            raise DataError(f"datasets: {name} hold no {kind}; counts: {counts}")
        self.mixture = None if weights is None else self._mixture(weights)

    def __len__(self) -> int:
        return int(self.begins[-1])

    def _mixture(self, weights: list[float]) -> Mixture:
        mixture = Mixture(self.begins, np.array(weights))
        sizes = np.diff(self.begins)
        for store, size, quota in zip(self.stores, sizes, mixture.quotas(), strict=True):
            if not size:
                raise DataError(f"datasets: {store.name} has a weight and holds no {self.kind}")
            if not quota:
                raise DataError(
                    f"datasets: the weight of {store.name} is less than one of the {len(self):,}"
                    " examples of an epoch; raise it, or leave the data set out"
                )
        return mixture

    def shares(self) -> list[str]:
        """A line for each store of a mixture, on its share of an epoch."""
        if self.mixture is None:
            return []
        return [
            f"{store.name}: {quota:,} of the {len(self):,} examples of an epoch, {quota / size:.3g}"
            " times its size"
            for store, size, quota in zip(
                self.stores, np.diff(self.begins), self.mixture.quotas(), strict=True
            )
        ]

    def _example_prompts(self, store: TokenStore) -> np.ndarray:
        """(examples,): the prompt each example belongs to."""
        responses = store.pairs[:, 0] if self.kind == "pairs" else store.targets
        return np.asarray(store.response_prompt)[responses]

    def locate(self, example: int) -> tuple[TokenStore, int]:
        """The store of an example, and its row among the store's pairs or targets."""
        part = int(np.searchsorted(self.begins, example, side="right")) - 1
        return self.stores[part], int(example - self.begins[part])

    def by_store(self, examples: np.ndarray) -> Iterator[tuple[TokenStore, np.ndarray]]:
        """Each store with the examples that are its own, as rows of its pairs or targets."""
        for begin, end, store in zip(self.begins[:-1], self.begins[1:], self.stores, strict=True):
            yield store, examples[(examples >= begin) & (examples < end)] - begin

    def responses_of(self, example: int) -> tuple[TokenStore, list[int]]:
        """The store and the response indices of an example: [chosen, rejected], [target], or those
        of a list."""
        store, i = self.locate(example)
        return store, self.responses_at(store, np.array([i])).tolist()

    def responses_at(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """The responses of examples, one example after the other, (responses,). rows: as `locate`
        has them."""
        if self.kind == "pairs":
            return np.asarray(store.pairs)[rows].ravel()
        if self.kind != "lists":
            return np.asarray(store.targets)[rows]
        ends = self._ends[self.number_of(store)]
        parts = [np.arange(ends[row], ends[row + 1]) for row in rows]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def number_of(self, store: TokenStore) -> int:
        """The place of a store in `stores`."""
        return self._numbers[id(store)]

    def describe(self, example: int) -> str:
        """The file and line that an example came from, for messages."""
        store, responses = self.responses_of(example)
        return f"{store.sources[store.response_prompt[responses[0]]]} (example {example})"

    def check_for(self, loss) -> str | None:
        """Raise DataError unless these data hold what a loss reads; runs before a model loads.

        Returns what `loss.inspect_scores` remarks on the scores, if anything.
        """
        for column in sorted(loss.columns):
            for store in self.stores:
                if column not in store.columns:
                    columns = ", ".join(store.columns) or "none"
                    raise DataError(
                        f"loss={loss.name} reads the column {column!r}, which {store.name} does not"
                        f" have; it has: {columns}"
                    )
        if loss.weight:
            self._check_weights(loss.weight)
        for store in self.stores if "token_weights" in loss.reads else ():
            if store.token_weights is None:
                raise DataError(
                    f"loss={loss.name} reads weights of tokens, which {store.name} does not have"
                )
        if "scores" not in loss.reads:
            return None
        if self.kind == "lists":
            return self._check_lists(loss)
        scores = self.pair_scores() if self.kind == "pairs" else [self._target_scores()]
        missing = np.flatnonzero(~np.isfinite(scores).all(axis=0))
        if len(missing):
            place = self.describe(int(missing[0]))
            raise DataError(f"loss={loss.name} needs scores, but {place} has none")
        if self.kind != "pairs":
            return None
        chosen, rejected = map(torch.from_numpy, scores)
        return loss.inspect_scores(chosen, rejected, ExampleNames(self, range(len(self))))

    def _check_weights(self, column: str) -> None:
        """Raise DataError unless the weights of the pairs are finite and at least 0, and some
        above."""
        weights = np.concatenate([np.asarray(store.columns[column]) for store in self.stores])
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(bad):
            place = self.describe(int(bad[0]))
            raise DataError(
                f"loss.weight={column}: {place} has the weight {weights[bad[0]]:g}; weights must be"
                " finite and at least 0"
            )
        if not weights.any():
            place = self.stores[0].name
            raise DataError(
                f"loss.weight={column}: all weights of {place} are 0, so nothing would be learned;"
                " set loss.weight=null"
            )

    def _check_lists(self, loss) -> str | None:
        """As `check_for`, of lists: every response has a score."""
        chosen, rejected, examples = [], [], []
        for example in range(len(self)):
            store, responses = self.responses_of(example)
            scores = np.asarray(store.scores)[responses]
            if not np.isfinite(scores).all():
                raise DataError(
                    f"loss={loss.name} needs scores, but {self.describe(example)} has responses"
                    " without one"
                )
            better, worse = np.nonzero(scores[:, None] > scores)
            chosen.append(scores[better])
            rejected.append(scores[worse])
            examples += [example] * len(better)
        scores = (torch.from_numpy(np.concatenate(part)) for part in (chosen, rejected))
        return loss.inspect_scores(*scores, ExampleNames(self, examples))

    def pair_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the chosen and of the rejected responses, (pairs,) each; NaN where the data
        have none."""
        scores = np.concatenate(
            [np.asarray(store.scores)[np.asarray(store.pairs)] for store in self.stores]
        )
        return np.ascontiguousarray(scores[:, 0]), np.ascontiguousarray(scores[:, 1])

    def _target_scores(self) -> np.ndarray:
        """Scores of the targets, (examples,)."""
        return np.concatenate([np.asarray(store.scores)[store.targets] for store in self.stores])


class ExampleNames:
    """Descriptions of some examples, made only when a message asks for one."""

    def __init__(self, data: PreferenceData, examples):
        self.data, self.examples = data, examples

    def __getitem__(self, i: int) -> str:
        return self.data.describe(self.examples[i])

    def __len__(self) -> int:
        return len(self.examples)


@dataclass
class PromptToSample:
    """A prompt to sample for.

    tokens: the prompt, cut to max_prompt_length. chosen: the tokens of the best response that the
    data have. key: the number of the prompt in `PreferenceData.groups`. chat: the conversation that
    it is made of, None for text. was_cut: whether the data's prompt is longer.
    """

    tokens: list[int]
    chosen: list[int]
    key: int
    chat: Chat | None = None
    was_cut: bool = False


def prompts_to_sample(data: PreferenceData, n: int, max_prompt_length: int) -> list[PromptToSample]:
    """The first `n` distinct prompts of the fixed evaluation order, the same whatever the seed of
    the run."""
    prompts: dict[int, PromptToSample] = {}
    for example in evaluation_order(data.groups):
        if int(data.groups[example]) not in prompts:
            prompt = prompt_to_sample(data, int(example), max_prompt_length)
            prompts[prompt.key] = prompt
        if len(prompts) == n:
            break
    return list(prompts.values())


def prompt_to_sample(data: PreferenceData, example: int, max_prompt_length: int) -> PromptToSample:
    """The prompt of an example."""
    store, responses = data.responses_of(example)
    whole = store.prompt_to_ask(int(store.response_prompt[responses[0]]))
    chat = store.chat(int(store.response_prompt[responses[0]]))
    prompt = prompt_to_ask(
        whole, max_prompt_length, store.truncation, store.bos, chat=chat is not None
    )
    chosen = responses[0]
    if data.kind in ("responses", "lists"):
        chosen = _best_response(store, chosen)
    return PromptToSample(
        prompt,
        _without_prompt(store, chosen),
        int(data.groups[example]),
        chat,
        was_cut=len(prompt) < len(whole),
    )


def _without_prompt(store: TokenStore, response: int) -> list[int]:
    """The tokens of a response from the first that is counted."""
    begin, end = store.responses[response]
    return store.tokens[begin + int(store.scored_tokens(response).argmax()) : end].tolist()


def _best_response(store: TokenStore, response: int) -> int:
    """The response of the same prompt with the highest score."""
    prompt = store.response_prompt[response]
    begin, end = np.searchsorted(store.response_prompt, [prompt, prompt + 1])
    return int(begin + np.argmax(store.scores[begin:end]))
