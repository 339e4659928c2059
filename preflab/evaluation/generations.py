"""Samples of a policy as a file of prompts and responses."""

import json
import logging
from pathlib import Path

from preflab.batching.chat import prompt_columns, prompt_text, response_text
from preflab.batching.examples import PreferenceData, prompts_to_sample
from preflab.modeling.generation import sample
from preflab.modeling.loading import build_policy
from preflab.serving.build import served_columns, served_models
from preflab.settings.schema import Settings
from preflab.settings.values import truncation, truncation_columns
from utils import atomic_write

logger = logging.getLogger(__name__)


def write_generations(path: Path, settings: Settings, tokenizer, data: PreferenceData) -> None:
    """Write `samples_per_prompt` responses to each of the first `n_eval_examples` prompts.

    A line holds prompt, response and chosen response as text, and how it was sampled. The policy is
    that of `model.archive`, and the samples are those of function=eval.
    """
    prompts = prompts_to_sample(data, settings.n_eval_examples, settings.max_prompt_length)
    if cut := sum(prompt.was_cut for prompt in prompts):
        logger.info(
            f"{cut:,} of {len(prompts):,} prompts are cut to"
            f" max_prompt_length={settings.max_prompt_length} tokens"
        )
    drawn = [(prompt, i) for prompt in prompts for i in range(settings.samples_per_prompt)]
    room = settings.max_length - settings.max_prompt_length
    served = served_models(settings, path.parent, settings.model.archive).get("policy")
    responses = (served or sample)(
        build_policy(settings.model, trainable=False),
        tokenizer,
        [prompt.tokens for prompt, _ in drawn],
        keys=[(prompt.key, i) if i else prompt.key for prompt, i in drawn],
        max_new_tokens=settings.max_new_tokens or room,
        temperature=settings.temperature,
        **truncation(settings),
        seed=settings.seed,
        batch_size=settings.eval_batch_size,
    )
    with atomic_write(path) as f:
        for (prompt, i), response in zip(drawn, responses, strict=True):
            row = {
                **prompt_columns(prompt_text(tokenizer, prompt.tokens, prompt.chat)),
                "response": response_text(tokenizer, response),
                "chosen": response_text(tokenizer, prompt.chosen),
                "sample": i,
                "temperature": settings.temperature,
                **truncation_columns(settings),
                "seed": settings.seed,
                **served_columns(settings),
            }
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
