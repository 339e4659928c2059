"""Tokens per second of `preflab.modeling.generation.sample` and of transformers' `generate`,
interleaved, batch 32.

    python benchmarks/sampling.py --output benchmarks/results [--rounds 3]

GPT-2 with random weights, temperature 1. Three cases: 32 prompts of 32 tokens with 64 new tokens
each; prompts and responses with the lengths of TL;DR, 96 prompts with a response each; and 12
prompts with 8 responses each. The lengths of the responses are given, and each response ends there;
`generate` gets the prompts in batches of similar length, as ours does. The greedy tokens of both
are compared first. The command writes sampling-DEVICE.json.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import LENGTHS, MODELS, VOCABULARY, Tokens
from benchmarks.placement import machine
from preflab.modeling import generation
from preflab.modeling.decoding import left_padded
from preflab.modeling.logprobs import Scorer

BATCH = 32
CASES = {  # lengths of prompts and responses, prompts, responses to each
    "64 tokens": (Tokens(32, 0, 32, 32), Tokens(64, 0, 64, 64), 32, 1),
    "TL;DR, 1 response": (*LENGTHS["tldr"], 96, 1),
    "TL;DR, 8 responses": (*LENGTHS["tldr"], 12, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    here = machine()
    results = {"machine": here | {"threads": torch.get_num_threads()}, "batch": BATCH, "cases": {}}
    for model in MODELS:
        for case in CASES:
            measured = measure(MODELS[model], case, arguments.rounds)
            results["cases"][f"{model}, {case}"] = measured
            print(
                f"{model}, {case}: {measured['ours']:.0f} tokens/s, generate"
                f" {measured['generate']:.0f}, {measured['times_as_fast']:.2f} times as fast"
                f" ({min(measured['ratios']):.2f} to {max(measured['ratios']):.2f})",
                flush=True,
            )
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"sampling-{'cuda' if here['gpus'] else 'cpu'}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(
    sizes: dict,
    case: str,
    rounds: int,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = VOCABULARY,
) -> dict:
    """Medians over rounds. sizes: arguments of the config. dtype: of the weights where time is
    measured; the greedy tokens are compared in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, eos_token_id=None, bos_token_id=None, pad_token_id=0, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    rows = make_rows(case, vocabulary)
    variants = {"ours": draw_ours, "generate": draw_by_transformers}
    greedy = {name: draw(model, rows, 0.0) for name, draw in variants.items()}
    agreement = agreement_of(*greedy.values())
    if agreement < 0.98:  # random weights have near ties, which rounding decides
        raise SystemExit(f"greedy tokens agree for {agreement:.1%} only")
    if dtype != torch.float32:
        model.to(dtype)
        for draw in variants.values():
            draw(model, rows, 1.0)  # to warm up
    n_tokens = sum(length for _, length in rows)
    rates: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(rounds):
        order = list(variants) if number % 2 else list(variants)[::-1]
        for variant in order:
            start = time.perf_counter()
            variants[variant](model, rows, 1.0)
            rates[variant].append(n_tokens / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(rates["ours"], rates["generate"], strict=True)]
    return {variant: statistics.median(values) for variant, values in rates.items()} | {
        "times_as_fast": statistics.median(ratios),
        "ratios": ratios,
        "greedy_agreement": agreement,
    }


def make_rows(case: str, vocabulary: int) -> list[tuple[list[int], int]]:
    """Prompts, the shortest first, and the number of tokens of the response to each."""
    of_prompts, of_responses, n, k = CASES[case]
    rng = np.random.default_rng(0)

    def lengths(of: Tokens, n: int) -> np.ndarray:
        drawn = of.median * np.exp(of.spread * rng.standard_normal(n))
        return np.clip(np.round(drawn), of.least, of.most).astype(int)

    prompts = [rng.integers(1, vocabulary, m).tolist() for m in sorted(lengths(of_prompts, n))]
    limits = lengths(of_responses, n * k).tolist()
    return list(zip([prompt for prompt in prompts for _ in range(k)], limits, strict=True))


def draw_ours(model, rows: list[tuple[list[int], int]], temperature: float) -> list[list[int]]:
    prompts, limits = zip(*rows, strict=True)
    uniforms = generation._uniforms
    # A response ends where its random numbers do.
    generation._uniforms = lambda seed, key, n: uniforms(seed, key, limits[key])
    try:
        return generation.sample(
            Scorer(model),
            _Tokenizer,
            list(prompts),
            keys=list(range(len(rows))),
            max_new_tokens=max(limits),
            temperature=temperature,
            batch_size=BATCH,
        )
    finally:
        generation._uniforms = uniforms


def draw_by_transformers(
    model, rows: list[tuple[list[int], int]], temperature: float
) -> list[list[int]]:
    responses = []
    for begin in range(0, len(rows), BATCH):
        prompts, limits = zip(*rows[begin : begin + BATCH], strict=True)
        width = max(map(len, prompts))
        ids, mask = (part.to(model.device) for part in left_padded(prompts, width, pad=0))
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(limits),
            do_sample=temperature > 0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([_Lengths(limits, width)]),
        )
        drawn = output[:, width:].tolist()
        responses += [row[:limit] for row, limit in zip(drawn, limits, strict=True)]
    return responses


def agreement_of(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of equal tokens."""
    equal = [
        a == b
        for our_row, their_row in zip(ours, theirs, strict=True)
        for a, b in zip(our_row, their_row, strict=True)
    ]
    return sum(equal) / len(equal)


class _Lengths(StoppingCriteria):
    """Each row ends at its own length."""

    def __init__(self, limits, width: int):
        self.limits, self.width = torch.tensor(limits), width

    def __call__(self, input_ids, scores, **more):
        return (self.limits <= input_ids.shape[1] - self.width).to(input_ids.device)


class _Tokenizer:
    """The attributes of a tokenizer that `sample` reads, without an EOS."""

    eos_token_id, pad_token_id = -1, 0
    chat_template = None


if __name__ == "__main__":
    main()
