"""A language of 48 words in which sentiment can be counted. It is small enough to train on in a
minute, and its true distribution is known.

    python experiments/words.py --output DIR

writes DIR/model (a random GPT-2 of about 110,000 parameters with its tokenizer; a word is a token),
DIR/sft/{train,test}.jsonl ({"prompt", "chosen"}), DIR/prompts.jsonl and DIR/words.json (the words
of sentiment). Equal arguments write equal bytes.

A text has a latent sentiment, good or bad with equal probability. After a prompt of three neutral
words, each of up to 16 words carries sentiment with probability 0.45, and agrees with the latent
one with probability 0.8; other words follow a fixed random bigram over the 22 neutral words. From
the 8th word on, a text ends with probability 0.15 per word.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import atomic_write

LETTERS = "abcdefghijklmnopqrstuv"
POSITIVE = [f"good{letter}" for letter in LETTERS[:12]]
NEGATIVE = [f"bad{letter}" for letter in LETTERS[:12]]
NEUTRAL = [f"word{letter}" for letter in LETTERS]
START, END = "<start>", "<end>"
LENGTH, SENTIMENT, AGREE, SHORTEST, HAZARD = 16, 0.45, 0.8, 8, 0.15


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--n", type=int, default=64_000, help="texts to train on")
    parser.add_argument("--n_prompts", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.output, arguments.n, arguments.n_prompts, arguments.seed)


def write(folder: Path, n: int, n_prompts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    writer = Writer(rng)
    held_out = {writer.prompt() for _ in range(n_prompts)}
    texts = []
    while len(texts) < n + 500:
        prompt = writer.prompt()
        if prompt not in held_out:
            texts.append({"prompt": prompt, "chosen": " " + writer.response(prompt)})
    files = {
        "sft/train": texts[:n],
        "sft/test": texts[n:],
        "prompts": [{"prompt": prompt} for prompt in sorted(held_out)],
    }
    for name, rows in files.items():
        with atomic_write(folder / f"{name}.jsonl") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    with atomic_write(folder / "words.json") as f:
        json.dump({"positive": POSITIVE, "negative": NEGATIVE}, f)
    make_model(folder / "model", seed)


class Writer:
    """Draws prompts and responses of the language."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        # The bigram, (words, words): a few likely successors of each neutral word.
        self.next_word = rng.dirichlet(np.full(len(NEUTRAL), 0.3), size=len(NEUTRAL))

    def prompt(self) -> str:
        return " ".join(self.rng.choice(NEUTRAL, 3))

    def response(self, prompt: str) -> str:
        good, words, last = self.rng.random() < 0.5, [], NEUTRAL.index(prompt.split()[-1])
        while len(words) < LENGTH and not (len(words) >= SHORTEST and self.rng.random() < HAZARD):
            if self.rng.random() < SENTIMENT:
                positive = good == (self.rng.random() < AGREE)
                words.append(str(self.rng.choice(POSITIVE if positive else NEGATIVE)))
            else:
                last = int(self.rng.choice(len(NEUTRAL), p=self.next_word[last]))
                words.append(NEUTRAL[last])
        return " ".join(words)


def make_model(folder: Path, seed: int) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

    words = [END, START, *POSITIVE, *NEGATIVE, *NEUTRAL]
    body = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=START))
    body.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=body, bos_token=START, eos_token=END, pad_token=END
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
