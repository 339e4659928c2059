"""The rollouts of a round, and their labels."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from preflab.objective.registry import BoundLoss


@dataclass
class Rollouts:
    """The samples of a round: prompts, and K responses to each, as text and as tokens.

    A key is the number of a prompt in the data, or in the service a hash of its texts. hidden: the
    policy's last hidden states that predict the tokens, (tokens, H), where sampling left them.
    """

    round: int
    keys: list[int]  # (prompts,)
    prompts: list[str]  # (prompts,)
    prompt_tokens: list[list[int]]  # (prompts, tokens)
    responses: list[list[str]]  # (prompts, K)
    tokens: list[list[list[int]]]  # (prompts, K, tokens)
    hidden: list[list[Tensor | None]] | None = None  # (prompts, K)

    def __len__(self) -> int:
        return len(self.keys)

    def flat(self) -> tuple[list[str], list[str]]:
        """The prompt and the response of each rollout, (prompts * K,) each."""
        prompts, responses = [], []
        for prompt, of_prompt in zip(self.prompts, self.responses, strict=True):
            prompts += [prompt] * len(of_prompt)
            responses += of_prompt
        return prompts, responses


@dataclass
class Labels:
    """The labels of the rollouts of a round.

    scores: (prompts, K), higher is better.
    pairs: (prompts,), the positions (better, worse) of two responses; None for a tie or no label.
    guesses: scores and pairs before bought labels replaced some of them; None where none did.
    """

    scores: list[list[float]]
    pairs: list[tuple[int, int] | None]
    guesses: "Labels | None" = None

    def suit(self, loss: BoundLoss) -> None:
        """Make of the labels what a loss learns from: lists, or pairs with a gap where it reads
        scores."""
        if loss.examples == "lists":
            self.pair_by_scores()
        elif "scores" in loss.reads:
            self.drop_pairs_without_a_gap()

    def pair_by_scores(self) -> None:
        """Pair the best and the worst response by the scores, for losses that read the scores of
        all."""
        self.pairs = [best_and_worst(scores) for scores in self.scores]

    def drop_pairs_without_a_gap(self) -> None:
        """Drop pairs whose scores are not in the order of the label.

        For losses that read scores: a bought label may contradict the discriminator's scores.
        """
        self.pairs = [
            pair if pair and scores[pair[0]] > scores[pair[1]] else None
            for pair, scores in zip(self.pairs, self.scores, strict=True)
        ]


def best_and_worst(scores: list[float]) -> tuple[int, int] | None:
    """The first position of the highest and of the lowest score; None where all are equal."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return (best, worst) if scores[best] > scores[worst] else None
