"""The optimizer steps of a round: its pairs or lists in batches, and what the frozen reference says
of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Batch
from preflab.batching.token_store import store_of
from preflab.objective.types import needs_of
from preflab.online.rollouts import Labels, Rollouts
from preflab.settings.schema import Settings
from preflab.training.learner import Learner

Microbatches = list[tuple[Batch, int]]  # each with the number of its examples that count


@dataclass(frozen=True)
class ReadBatch:
    """A microbatch that the reference has read.

    counts: whether its responses count on this rank. responses: the prompt and the number of each
    among the rollouts. hidden (tokens, H): the reference's last hidden states, in the
    memory of the CPU.
    """

    batch: Batch
    counts: bool
    responses: list[tuple[int, int]]
    hidden: Tensor


class RoundSteps:
    """What a policy learns from in a round: a pair or a list for each prompt that has one.

    labels: those that suit the loss. In the first pass, a reference that does not move is read
    before the steps: its log-probs are those that the steps would compute, and its hidden states
    are measured too.
    """

    def __init__(self, settings: Settings, learner: Learner, rollouts: Rollouts, labels: Labels):
        self.settings, self.learner, self.round = settings, learner, rollouts.round
        self._k = settings.online.responses_per_prompt
        self._prompts = [i for i, pair in enumerate(labels.pairs) if pair is not None]
        trees = list(zip(rollouts.prompt_tokens, rollouts.tokens, strict=True))
        store = store_of(f"round {self.round}", trees, labels.scores, labels.pairs)
        self.data: PreferenceData | None = None  # None where no prompt has a pair
        self._first_pass: list[tuple[np.ndarray, Microbatches]] = []
        if self._prompts:
            self.data = PreferenceData([store], learner.loss.examples, store.name)
            self._first_pass = list(self._pass(0))

    def __len__(self) -> int:
        """The number of pairs or lists, at most one for each prompt."""
        return len(self._prompts)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Microbatches]]:
        """The examples and the microbatches of each step, of all passes."""
        yield from self._first_pass
        for number in range(
            1, self.settings.online.updates_per_round if self.data is not None else 1
        ):
            yield from self._pass(number)

    def _pass(self, number: int) -> Iterator[tuple[np.ndarray, Microbatches]]:
        order = np.random.default_rng([self.settings.seed, self.round, number])
        order, size = order.permutation(len(self)), self.settings.batch_size
        for begin in range(0, len(order), size):
            examples = order[begin : begin + size]
            yield examples, self.learner.microbatches(self.data, examples)

    def read_reference(self) -> list[ReadBatch]:
        """Give the batches of the first pass the log-probs of the reference, where the loss reads
        them and the reference does not move. Returns these batches."""
        learner = self.learner
        needs = needs_of(learner.loss.reads).values()
        # One whose whole distribution is read runs in the steps.
        is_read = any(need.reference for need in needs) and not any(
            "kl" in need.score_options for need in needs
        )
        if not is_read or learner.reference is not learner.initial_reference:
            return []
        read = []
        for _, microbatches in self._first_pass:
            for batch, n_real in microbatches:
                learner.world.stop_if_asked()
                hidden, logps = learner.reference.read(batch.to(learner.policy.device))
                batch.reference_logps = logps.cpu()
                # Those of a whole round may not fit on a GPU.
                responses = self._responses_of(batch)
                read.append(ReadBatch(batch, n_real > 0, responses, hidden.cpu()))
        return read

    def _responses_of(self, batch: Batch) -> list[tuple[int, int]]:
        """The prompt and the number of each response of a batch, in its order."""
        responses = (r for example in batch.examples for r in self.data.responses_of(example)[1])
        return [(self._prompts[r // self._k], r % self._k) for r in responses]
