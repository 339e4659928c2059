"""The cases of benchmarks/step.py: models, lengths and losses, and the files that a case needs."""

import json
from pathlib import Path
from typing import NamedTuple

VOCABULARY = 50257
BETA = 0.1
MODELS = {  # GPT-2 of two sizes with the same vocabulary
    "30M": {"n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 1024},
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
}


class Tokens(NamedTuple):
    """Log-normal lengths: median, spread of the logarithm, minimum and maximum."""

    median: float
    spread: float
    least: int
    most: int


LENGTHS = {  # (prompt, response)
    "tldr": (Tokens(300, 0.38, 60, 512), Tokens(33, 0.32, 8, 80)),  # a post and its summary
    "hh": (Tokens(110, 0.8, 10, 400), Tokens(60, 0.8, 4, 256)),  # a dialogue and its last turn
    "imdb": (Tokens(5, 0.2, 3, 8), Tokens(78, 0.16, 20, 110)),  # the start of a review, the rest
}


class Case(NamedTuple):
    model: str
    lengths: str
    loss: str
    pairs: int
    prompts: int
    in_trl: bool  # whether TRL has this loss


CASES = {
    "tldr-124M-dpo": Case("124M", "tldr", "dpo", 8, 8, True),
    "tldr-30M-dpo": Case("30M", "tldr", "dpo", 8, 8, True),
    "hh-30M-dpo": Case("30M", "hh", "dpo", 8, 8, True),
    "imdb-30M-dpo": Case("30M", "imdb", "dpo", 8, 8, True),
    "tldr-30M-tdpo": Case("30M", "tldr", "tdpo2", 8, 8, False),
    "hh-30M-tdpo": Case("30M", "hh", "tdpo2", 8, 8, False),
    "hh-124M-dpo": Case("124M", "hh", "dpo", 8, 8, True),
    "tldr-124M-tdpo": Case("124M", "tldr", "tdpo2", 8, 8, False),
    "hh-124M-tdpo": Case("124M", "hh", "tdpo2", 8, 8, False),
    # 16 of the pairs of seven rated responses to one prompt
    "tldr-30M-rated": Case("30M", "tldr", "dpo", 16, 1, False),
}
OURS = {  # layout and reference.cache of our variants
    "prefix_shared": ("prefix_shared", "auto"),
    "prefix_shared, reference run": ("prefix_shared", "false"),
    "packed": ("packed", "auto"),
    "padded": ("padded", "auto"),
}


def reads(loss: str) -> set:
    """What a loss of pairs reads, by its declaration."""
    import losses  # noqa: F401  registers the losses
    from preflab.objective.registry import LOSSES

    return set(LOSSES[loss].reads({}))


def make_pairs(
    prompt: Tokens,
    response: Tokens,
    n_pairs: int,
    n_prompts: int,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
) -> list[dict]:
    """Pairs of random words with the given lengths. With one prompt, the pairs are made of seven
    responses to it."""
    import numpy as np

    rng = np.random.default_rng(seed)

    def words(lengths: Tokens) -> str:
        n = lengths.median * np.exp(lengths.spread * rng.standard_normal())
        n = int(np.clip(round(n), lengths.least, lengths.most))
        return " ".join(f"w{i}" for i in rng.integers(0, vocabulary - 1, n))

    if n_prompts == 1:
        text, answers = words(prompt), [" " + words(response) for _ in range(7)]
        both = [(i, j) for i in range(7) for j in range(i)][:n_pairs]
        return [{"prompt": text, "chosen": answers[i], "rejected": answers[j]} for i, j in both]
    return [
        {
            "prompt": words(prompt),
            "chosen": " " + words(response),
            "rejected": " " + words(response),
        }
        for _ in range(n_pairs)
    ]


def make_lists(prompt: Tokens, response: Tokens, n_prompts: int, k: int) -> list[dict]:
    """Prompts of random words with K responses each, whose scores differ. The first responses are
    the same for every K."""
    rows = []
    for i in range(n_prompts):
        texts = make_pairs(prompt, response, 21, 1, seed=i)  # of seven responses to one prompt
        more = make_pairs(prompt, response, 21, 1, seed=1000 + i)
        answers = [*dict.fromkeys(t[side] for t in texts + more for side in ("rejected", "chosen"))]
        scores = [float(j * 7 % 11) for j in range(k)]
        rows.append({"prompt": texts[0]["prompt"], "responses": answers[:k], "scores": scores})
    return rows


def pairs_of(lists: list[dict]) -> list[dict]:
    """All pairs of some lists, the higher score chosen."""
    return [
        {"prompt": row["prompt"], "chosen": a, "rejected": b}
        for row in lists
        for a, s in zip(row["responses"], row["scores"], strict=True)
        for b, t in zip(row["responses"], row["scores"], strict=True)
        if s > t
    ]


def write_rows(folder: Path, rows: list[dict]) -> None:
    """The train and the test split of a data set."""
    folder.mkdir()
    for split, part in (("train", rows), ("test", rows[:1])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def make_job(
    folder: Path,
    model: dict,
    vocabulary: int,
    loss: str,
    pairs: list[dict],
    bf16: bool,
    *,
    dtype: str = "float32",
    reference: bool = True,
) -> dict:
    """Write the tokenizer, the weights of policy and reference, and the pairs; returns the job that
    a variant is started with.

    model: arguments of its config, of a GPT-2 unless there is a `model_type`. dtype: of the files.
    reference: whether it has weights of its own; without, it is the policy before its first step.
    """
    folder.mkdir(parents=True)
    size = _write_models(folder, model, vocabulary, dtype, reference)
    write_rows(folder / "pairs", pairs)
    return {
        "folder": str(folder),
        "loss": loss,
        "n_pairs": len(pairs),
        "bf16": bf16,
        "reference": reference,
        "tokens": token_counts(pairs),
        "size": size,
    }


def _write_models(folder: Path, model: dict, vocabulary: int, dtype: str, reference: bool) -> dict:
    """Write a policy, a slightly different reference, and a tokenizer whose tokens are words.
    Returns the numbers of weights in the matrices of the body and in the head, and the sizes of
    attention.

    Weights are drawn on the GPU where there is one: a CPU takes minutes for the largest models.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from preflab.training.optimizers import matrices

    ids = {f"w{i}": i for i in range(vocabulary - 1)} | {"<eos>": vocabulary - 1}
    body = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    body.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=body, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **{"model_type": "gpt2"} | model,
        vocab_size=vocabulary,
        eos_token_id=vocabulary - 1,
        bos_token_id=None,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        policy = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    policy.save_pretrained(folder / "model")
    if reference:
        with torch.no_grad():
            for p in policy.parameters():  # with equal models every loss would be log 2
                p.add_(0.02 * p.std() * torch.randn_like(p) if p.ndim > 1 else 0)
        policy.save_pretrained(folder / "reference")
    inside, head = matrices(policy), policy.get_output_embeddings().weight
    linear = [p for name, p in policy.named_parameters() if name in inside and p is not head]
    return {
        "linear": sum(p.numel() for p in linear),
        "head": head.numel(),
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
    }


def token_counts(pairs: list[dict]) -> dict:
    """padded: tokens of the padded rows, prompt and response for each side of a pair; distinct:
    without repeating prompts and responses; scored: tokens of the responses, with EOS; attended:
    the lengths of each prompt and of its responses."""

    def count(text: str) -> int:
        return len(text.split())

    prompts = {pair["prompt"] for pair in pairs}
    answers = {(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")}
    return {
        "padded": 2 * len(pairs) * max(count(p) + count(a) + 1 for p, a in answers),
        "distinct": sum(map(count, prompts)) + sum(count(a) for _, a in answers),
        "scored": sum(count(a) + 1 for _, a in answers),
        "attended": [(count(p), [count(a) for q, a in answers if q == p]) for p in sorted(prompts)],
    }


def flop_floor(job: dict) -> float:
    """The floating point operations that no step can avoid: forward and backward pass of each
    distinct token through the body, of scored tokens through the head, and of attention to the
    tokens that are seen. tdpo also runs the forward pass of the reference. With LoRA, the backward
    pass has no gradients of the matrices."""
    tokens, size = job["tokens"], job["size"]
    seen = sum(
        p * p / 2 + sum(r * p + r * r / 2 for r in responses) for p, responses in tokens["attended"]
    )
    matrices = 2 * size["linear"] * tokens["distinct"] + 2 * size["head"] * tokens["scored"]
    attention = 4 * seen * size["width"] * size["layers"]
    passes = 2 if job.get("lora") else 3
    floor = passes * matrices + 3 * attention
    return floor + (matrices + attention if "token_kl" in reads(job["loss"]) else 0)
