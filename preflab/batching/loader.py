"""The order of examples, a pure function of (seed, epoch), and a loader that can be resumed."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

ORDERS = ("pairs", "prompts")


def epoch_order(groups: np.ndarray, seed: int, epoch: int, order: str = "pairs") -> np.ndarray:
    """A permutation of the examples, a pure function of (seed, epoch).

    groups (examples,): the prompt of each example.
    order: "pairs" spreads the examples of a prompt out: its m examples sit at u/m, (1+u)/m, ... of
    the epoch, with one random u for each prompt, so two of them meet in a batch only when the batch
    is longer than an m-th of the epoch. "prompts" keeps them together, prompt after prompt.
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
    """Yields the example indices of one optimizer step at a time, each example once an epoch.

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
    ):
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
            self._order = self.epoch, epoch_order(self.groups, self.seed, self.epoch, self.order)
        _, order = self._order
        size = min(self.batch_size, self.total - self.examples)
        return order[self.cursor : self.cursor + max(0, size)]

    def first_epoch(self) -> np.ndarray:
        """The distinct examples of a run, in the order of its first epoch."""
        return epoch_order(self.groups, self.seed, 0, self.order)[: self.total]

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
