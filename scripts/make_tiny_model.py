"""A small language model with random weights and its tokenizer, for the texts of
`make_review_corpus.py`.

    python scripts/make_tiny_model.py --corpus DIR --output OUT

OUT is a folder that transformers loads: a byte-level BPE tokenizer trained on DIR/train.jsonl, and
a Llama of about a million fp32 parameters with random weights. Equal arguments write equal bytes.
Train it with `loss=sft`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preflab.settings.refused import errors_in_one_line
from utils import ConfigError, DataError, atomic_directory, path_argument

# BOS and EOS are one token, as in GPT-2; padding has its own, so that a mask made from the ids
# keeps every EOS.
END, PAD = "<|endoftext|>", "<|pad|>"
POSITIONS = 256


def read_texts(corpus: Path) -> list[str]:
    """The prompts and the responses of the training rows, as separate texts, because training
    tokenises them separately."""
    path = corpus / "train.jsonl"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; make it with scripts/make_review_corpus.py --output {corpus}"
        )
    with open(path, encoding="utf-8") as f:
        return [text for row in map(json.loads, f) for text in (row["prompt"], row["chosen"])]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a token for each byte, so that any text survives `decode(encode(text))`
    unchanged."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise ConfigError(
            f"--vocab_size {vocab_size} cannot hold the {smallest} bytes and special tokens;"
            " raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )


def blank_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights that depend on `seed` alone. The caller's random state does not
    change."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=144,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tokens_per_word(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Tokens over whitespace-separated words; punctuation counts as tokens, not as words."""
    return sum(map(len, tokenizer(texts)["input_ids"])) / sum(len(text.split()) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus", type=path_argument, required=True, help="folder of make_review_corpus.py"
    )
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder to make; must not exist"
    )
    parser.add_argument("--vocab_size", type=int, default=1536, help="tokens of the tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    if args.output.exists():
        raise ConfigError(f"--output {args.output} exists; name a new folder or remove it")
    texts = read_texts(args.corpus)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    model = blank_model(tokenizer, args.seed)
    with atomic_directory(args.output) as folder:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        # safetensors makes files that only the owner can read, and these are for everyone.
        (folder / "model.safetensors").chmod(0o644)
    words = f"{tokens_per_word(tokenizer, texts[:10_000]):.2f} tokens per word"
    print(f"{args.output}: {len(tokenizer)} tokens, {words}, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
