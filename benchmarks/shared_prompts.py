"""Time of K samples of each prompt, with the prompt read once for all of them and once for each,
interleaved.

    python benchmarks/shared_prompts.py --output benchmarks/results [--rounds 5]

GPT-2 with random weights, 8 samples of each of 2 prompts in one batch, 64 new tokens each, EOS off,
temperature 1. Prompts of 300 tokens, as of TL;DR, and of 5, as of IMDb. Both variants draw the same
samples. Times are of the process on all cores; on a GPU they are wall-clock times. The command
writes shared-prompts-DEVICE.json.
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
from preflab.modeling import decoding, generation
from preflab.modeling.logprobs import Scorer

K, PROMPTS, NEW = 8, 2, 64
LENGTHS = {"300 tokens": 300, "5 tokens": 5}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    here = machine()
    results = {
        "machine": here | {"threads": torch.get_num_threads()},
        "samples_per_prompt": K,
        "prompts": PROMPTS,
        "new_tokens": NEW,
        "cases": {
            f"{model}, {name}": measure(model, n, arguments.rounds)
            for model in MODELS
            for name, n in LENGTHS.items()
        },
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"shared-prompts-{'cuda' if here['gpus'] else 'cpu'}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, case in results["cases"].items():
        low, high = min(case["ratios"]), max(case["ratios"])
        print(
            f"{name}: {case['once']:.2f} s, {case['each']:.2f} s with a prompt for each sample,"
            f" {case['times_as_fast']:.2f} times as fast ({low:.2f} to {high:.2f})"
        )


def measure(name: str, length: int, rounds: int) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=None, pad_token_id=0, **MODELS[name]
    )
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    prompts = torch.randint(1, VOCABULARY, (PROMPTS, length)).tolist()
    batches, can_join = generation._batches, decoding.can_join

    def each(*arguments):
        """The same batches, in which no prompt is said to repeat."""
        return ((rows, n, False) for rows, n, _ in batches(*arguments))

    def draw(variant) -> list[list[int]]:
        generation._batches = variant
        if variant is each:
            decoding.can_join = lambda cache: False  # `generate` reads the prompts
        drawn = generation.sample(
            Scorer(model),
            _Tokenizer,
            [prompt for prompt in prompts for _ in range(K)],
            keys=list(range(K * PROMPTS)),
            max_new_tokens=NEW,
            batch_size=K * PROMPTS,
        )
        generation._batches, decoding.can_join = batches, can_join
        return drawn

    clock = time.perf_counter if device == "cuda" else time.process_time
    variants = {"once": batches, "each": each}
    if draw(batches) != draw(each):
        raise SystemExit(f"{name}: the samples differ")
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(rounds):
        for variant in list(variants)[:: 1 if number % 2 else -1]:
            start = clock()
            draw(variants[variant])
            seconds[variant].append(clock() - start)
    ratios = [b / a for a, b in zip(seconds["once"], seconds["each"], strict=True)]
    return {variant: statistics.median(values) for variant, values in seconds.items()} | {
        "times_as_fast": statistics.median(ratios),
        "ratios": ratios,
    }


class _Tokenizer:
    """The attributes of a tokenizer that `sample` reads, without an EOS, so that all rows have the
    same length."""

    eos_token_id, pad_token_id = -1, 0
    chat_template = None


if __name__ == "__main__":
    main()
