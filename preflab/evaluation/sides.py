"""Dev and test prompts of an evaluation: what may choose a checkpoint, and what is reported."""

from collections.abc import Sequence

import numpy as np

from preflab.batching.chat import prompt_text
from preflab.batching.examples import PreferenceData, prompt_to_sample
from preflab.batching.loader import evaluation_order
from preflab.reports.selection import DEV, TEST, part_of


def sides_of(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The positions of the dev and of the test prompts; empty where one of them has none."""
    parts = np.array([part_of(prompt) for prompt in prompts])
    sides = {side: np.flatnonzero(parts == side) for side in (DEV, TEST)}
    return sides if all(map(len, sides.values())) else {}


def held_out_sides(
    data: PreferenceData, tokenizer, *, n: int, max_prompt_length: int
) -> dict[str, np.ndarray]:
    """The dev and the test examples among the first `n` of the evaluation order; empty where one
    side has none. A prompt has the text that samples.jsonl has of it."""
    examples = evaluation_order(data.groups)[:n]
    texts: dict[int, str] = {}  # by prompt: several pairs may share one
    for example, group in zip(examples.tolist(), data.groups[examples].tolist(), strict=True):
        if group not in texts:
            prompt = prompt_to_sample(data, example, max_prompt_length)
            texts[group] = prompt_text(tokenizer, prompt.tokens, prompt.chat)
    sides = sides_of([texts[group] for group in data.groups[examples].tolist()])
    return {side: examples[positions] for side, positions in sides.items()}
