"""Tokens per second of `preflab.modeling.generation.sample` and of transformers' `generate`,
interleaved, batch 32.

    python benchmarks/sampling.py --output benchmarks/results [--rounds 3]

GPT-2 with random weights, prompts of 32 tokens, 64 new tokens each, EOS off in both, temperature 1.
The greedy tokens of both are compared first. The command writes sampling-DEVICE.json.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import MODELS, VOCABULARY
from benchmarks.placement import machine
from preflab.modeling.generation import sample
from preflab.modeling.logprobs import Scorer

BATCH, PROMPT, NEW = 32, 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    here = machine()
    results = {
        "machine": here,
        "batch": BATCH,
        "new_tokens": NEW,
        "models": {name: measure(sizes, arguments.rounds) for name, sizes in MODELS.items()},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"sampling-{'cuda' if here['gpus'] else 'cpu'}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, measured in results["models"].items():
        print(
            f"{name}: {measured['ours']:.0f} tokens/s, generate {measured['generate']:.0f},"
            f" {measured['times_as_fast']:.2f} times as fast"
        )


def measure(
    sizes: dict, rounds: int, dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY
) -> dict:
    """Medians over rounds. sizes: arguments of the config. dtype: of the weights where time is
    measured; the greedy tokens are compared in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, eos_token_id=None, bos_token_id=None, pad_token_id=0, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    prompts = torch.randint(1, vocabulary, (BATCH, PROMPT)).tolist()
    ids = torch.tensor(prompts, device=device)

    def plain(greedy: bool):
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=not greedy,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            eos_token_id=None,
        )[:, PROMPT:].tolist()

    def ours(greedy: bool):
        return sample(
            Scorer(model),
            _Tokenizer,
            prompts,
            keys=list(range(BATCH)),
            max_new_tokens=NEW,
            temperature=0.0 if greedy else 1.0,
            batch_size=BATCH,
        )

    agreement = _agreement(ours(greedy=True), plain(greedy=True))
    if agreement < 0.98:  # random weights have near ties, which rounding decides
        raise SystemExit(f"greedy tokens agree for {agreement:.1%} only")
    variants = {"ours": ours, "generate": plain}
    if dtype != torch.float32:
        model.to(dtype)
        for draw in variants.values():
            draw(greedy=False)  # to warm up
    rates: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(rounds):
        order = list(variants) if number % 2 else list(variants)[::-1]
        for variant in order:
            start = time.perf_counter()
            n = sum(map(len, variants[variant](greedy=False)))
            rates[variant].append(n / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(rates["ours"], rates["generate"], strict=True)]
    return {variant: statistics.median(values) for variant, values in rates.items()} | {
        "times_as_fast": statistics.median(ratios),
        "greedy_agreement": agreement,
    }


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of equal tokens."""
    equal = sum(
        a == b
        for our_row, their_row in zip(ours, theirs, strict=True)
        for a, b in zip(our_row, their_row, strict=True)
    )
    return equal / (BATCH * NEW)


class _Tokenizer:
    """The attributes of a tokenizer that `sample` reads, without an EOS, so that all rows have the
    same length."""

    eos_token_id, pad_token_id = -1, 0
    chat_template = None


if __name__ == "__main__":
    main()
