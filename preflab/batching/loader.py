"""The order of examples, a pure function of (seed, epoch), and a loader that can be resumed."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

ORDERS = ("pairs", "prompts")


def epoch_order(
    groups: np.ndarray, seed: int, epoch: int, order: str = "pairs", *key: int
) -> np.ndarray:
    """A permutation of the examples, a pure function of (seed, epoch, *key).

    groups (examples,): the prompt of each example.
    order: "pairs" spreads the examples of a prompt out: its m examples sit at u/m, (1+u)/m, ... of
    the epoch, with one random u for each prompt, so two of them meet in a batch only when the batch
    is longer than an m-th of the epoch. "prompts" keeps them together, prompt after prompt.
    """
    rng = np.random.default_rng([seed, epoch, *key])
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


@dataclass(frozen=True)
class Mixture:
    """Data sets that are drawn from in fixed shares.

    begins (sets + 1,): where the examples of each set begin, and where the last end. weights
    (sets,): above 0; what counts is their ratio.
    """

    begins: np.ndarray
    weights: np.ndarray

    def quotas(self) -> np.ndarray:
        """Examples of each set in an epoch, (sets,). Together they are as many as all sets have;
        what rounding leaves over goes to the largest remainders."""
        exact = self.begins[-1] * self.weights / self.weights.sum()
        quotas = np.floor(exact).astype(np.int64)
        left_over = int(self.begins[-1] - quotas.sum())
        quotas[np.argsort(quotas - exact, kind="stable")[:left_over]] += 1
        return quotas

    def epoch_order(self, groups: np.ndarray, seed: int, epoch: int, order: str) -> np.ndarray:
        """The examples of an epoch, a pure function of (seed, epoch); see `epoch_order`.

        Each set goes through its own shuffled passes, which continue over the epochs: all of its
        examples come once before one comes again. The sets are spread evenly over the epoch. With
        order="prompts" the examples of a prompt stay together.
        """
        rng = np.random.default_rng([seed, epoch, len(self.weights)])
        indices, places = [], []
        shifts = rng.random(len(self.weights))
        for number, quota in enumerate(map(int, self.quotas())):
            begin, end = map(int, self.begins[number : number + 2])
            first_pass, first = divmod(epoch * quota, end - begin)
            n_passes = -(-(first + quota) // (end - begin))
            passes = [
                epoch_order(groups[begin:end], seed, first_pass + i, order, number)
                for i in range(n_passes)
            ]
            own = begin + np.concatenate(passes)[first : first + quota]
            rank = np.arange(quota)
            if order == "prompts":
                is_new = np.diff(groups[own], prepend=-1) != 0
                rank = np.maximum.accumulate(np.where(is_new, rank, 0))
            indices.append(own)
            places.append((rank + shifts[number]) / quota)
        return np.concatenate(indices)[np.argsort(np.concatenate(places), kind="stable")]


def evaluation_order(groups: np.ndarray) -> np.ndarray:
    """One fixed order for all runs, so that runs with different seeds are evaluated on the same
    examples."""
    return epoch_order(groups, 0, 0)


def count_steps(
    n: int, *, batch_size: int, n_epochs: int | None, n_examples: int | None
) -> tuple[int, int]:
    """(examples, optimizer steps) of a run over `n` examples, whose epochs are not joined."""
    limits = [] if n_examples is None else [n_examples]
    if n_epochs is not None:
        limits.append(n_epochs * n)
    examples = min(limits)
    epochs, rest = divmod(examples, n)
    return examples, epochs * math.ceil(n / batch_size) + math.ceil(rest / batch_size)


class Loader:
    """Yields the example indices of one optimizer step at a time, each example once an epoch, or
    in the shares of a `mixture`.

    Stops after `n_epochs` epochs or `n_examples` examples, whichever comes first; None means no
    limit, and one of them must be given. The last batch of an epoch, and the last of all, may be
    smaller. The state is (epoch, cursor).
    """

    def __init__(
        self,
        groups: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        n_epochs: int | None,
        n_examples: int | None,
        order: str = "pairs",
        mixture: Mixture | None = None,
    ):
        self.mixture = mixture
        self.groups, self.batch_size, self.seed, self.order = groups, batch_size, seed, order
        # examples and steps of the whole run
        self.total, self.total_steps = count_steps(
            len(groups), batch_size=batch_size, n_epochs=n_epochs, n_examples=n_examples
        )
        self.epoch = self.cursor = 0
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def examples(self) -> int:
        """Examples yielded since the start of the run."""
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
        """The indices of the next step, without a move of the cursor; empty at the end."""
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, self._epoch_order(self.epoch)
        _, order = self._order
        size = min(self.batch_size, self.total - self.examples)
        return order[self.cursor : self.cursor + max(0, size)]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self.mixture is None:
            return epoch_order(self.groups, self.seed, epoch, self.order)
        return self.mixture.epoch_order(self.groups, self.seed, epoch, self.order)

    def distinct(self) -> np.ndarray:
        """The distinct examples of a run, in the order in which they first come."""
        seen = np.empty(0, dtype=np.int64)
        for epoch in range(-(-self.total // len(self.groups))):
            left = self.total - epoch * len(self.groups)
            new = np.concatenate([seen, self._epoch_order(epoch)[:left]])
            seen = new[np.sort(np.unique(new, return_index=True)[1])]
            if len(seen) == len(self.groups):
                break
        return seen

    def ahead(self, prepare: Callable[[np.ndarray], Any]) -> Iterator[tuple[np.ndarray, Any]]:
        """(indices, `prepare(indices)`) of each step; a thread prepares the next step while this
        one is used."""
        with ThreadPoolExecutor(1, "prepare") as thread:

            def submit():
                return thread.submit(prepare, self.peek()) if len(self.peek()) else None

            upcoming = submit()
            while upcoming is not None:
                prepared = upcoming.result()
                indices = next(self)
                upcoming = submit()
                yield indices, prepared

    def step_back(self, n: int) -> None:
        """Yield the last `n` examples again."""
        self.epoch, self.cursor = divmod(self.examples - n, len(self.groups))

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
