"""Rollouts of a round and their labels."""

from dataclasses import dataclass

import numpy as np

SELECTIONS = ("conf", "rand")


@dataclass
class Rollouts:
    """What was sampled in a round: for each of its prompts a number, text and tokens, and K
    responses likewise."""

    round: int
    keys: list[int]
    prompts: list[str]
    prompt_tokens: list[list[int]]
    responses: list[list[str]]  # (prompts, K)
    tokens: list[list[list[int]]]  # (prompts, K, tokens)

    def __len__(self) -> int:
        return len(self.keys)

    def flat(self) -> tuple[list[str], list[str]]:
        """Prompt and response of each rollout, (prompts * K,)."""
        return [p for p, of_prompt in zip(self.prompts, self.responses) for _ in of_prompt], [
            r for of_prompt in self.responses for r in of_prompt
        ]


@dataclass
class Labels:
    """scores (prompts, K): higher is better; pairs (prompts,): (better, worse) of the responses,
    None for a tie or no label.

    guesses: scores and pairs as they were before bought labels overruled some; None where nothing
    did.
    """

    scores: list[list[float]]
    pairs: list[tuple[int, int] | None]
    guesses: "Labels | None" = None

    def drop_pairs_without_a_gap(self) -> None:
        """For losses that read scores: a bought label may order two responses that the
        discriminator scores the other way round, or equally."""
        self.pairs = [
            pair if pair and scores[pair[0]] > scores[pair[1]] else None
            for pair, scores in zip(self.pairs, self.scores, strict=True)
        ]


def best_and_worst(scores: list[float]) -> tuple[int, int] | None:
    """The first of the highest and the first of the lowest scores; None where all are equal."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return (best, worst) if scores[best] > scores[worst] else None
