"""The order of examples, a pure function of (seed, epoch), and the loader that can be resumed."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

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

    def step_back(self, n: int) -> None:
        """Yield the last `n` examples again."""
        self.epoch, self.cursor = divmod(self.examples - n, len(self.groups))

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
