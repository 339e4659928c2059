"""Evaluation: losses on held-out examples; samples from policy and reference, their KL and their reward."""

import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from batching import (
    PreferenceData,
    collate,
    evaluation_order,
    prompts_to_sample,
)
from distributed import ALONE, World
from layouts import Layout, lay_out
from logprobs import Scorer, score_responses, sum_by_owner
from losses import BoundLoss
from metrics import Sums
from objective import compute_loss
from rewards import Score
from sampling import sample
from utils import atomic_write


@torch.no_grad()
def evaluate_loss(
    loss: BoundLoss, policy: Scorer, reference: Scorer | None, data: PreferenceData, *, n: int, batch_size: int, layout: Layout, world: World = ALONE
) -> dict[str, float]:
    """Means of the loss and of every logged metric over the first `n` examples of the fixed evaluation order."""
    examples = evaluation_order(data.groups)[:n]
    sums = Sums()
    parts = list(world.batches(examples, batch_size))
    for part, n_real in tqdm(parts, desc="evaluate", leave=False, delay=1.0, disable=world.no_bar):
        batch = collate(data, part, layout).to(policy.device)
        sums.add(compute_loss(loss, policy, reference, batch, data, "eval")[1], n_real)
    return sums.flush(world)


def sample_and_measure(
    policy: Scorer,
    reference: Scorer | None,
    tokenizer,
    data: PreferenceData,
    reward: Score,
    reward_name: str,
    *,
    n: int,
    max_prompt_length: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
    layout: Layout,
    world: World = ALONE,
) -> tuple[list[dict], dict[str, float]]:
    """Sample one response for each of `n` held-out prompts from both models; rows for samples.jsonl, and their means.

    Both models draw the same random numbers, so equal models give equal samples and differences are paired. KL is
    measured on the policy's samples, whatever `temperature` and `top_p` they were drawn with; only at temperature 1 and
    top_p 1 is it the KL of the sampled distribution. Without a reference there is neither KL nor reference sample.
    """
    prompts = prompts_to_sample(data, n, max_prompt_length)
    options = dict(
        keys=[p.key for p in prompts], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        batch_size=batch_size, world=world,
    )  # fmt: skip
    tokens = [p.tokens for p in prompts]
    drawn = {"policy": sample(policy, tokenizer, tokens, description="sample policy", **options)}
    if reference is not None:
        drawn["reference"] = sample(reference, tokenizer, tokens, description="sample reference", **options)
    texts = {who: [tokenizer.decode(t, skip_special_tokens=True) for t in responses] for who, responses in drawn.items()}
    prompt_texts = [tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
    rewards = {who: world.gather(reward(world.share(prompt_texts), world.share(responses))) for who, responses in texts.items()}
    kl = sample_kl(policy, reference, tokens, drawn["policy"], batch_size, layout, world) if reference else {}
    rows = []
    for i, prompt in enumerate(prompts):
        row = {
            "prompt": prompt_texts[i],
            "policy": texts["policy"][i],
            "reference": texts["reference"][i] if reference else None,
            "chosen": tokenizer.decode(prompt.chosen, skip_special_tokens=True),
            "policy_reward": {reward_name: rewards["policy"][i]},
            "reference_reward": {reward_name: rewards["reference"][i]} if reference else None,
            "policy_tokens": len(drawn["policy"][i]),
            "reference_tokens": len(drawn["reference"][i]) if reference else None,
            **{name: values[i] for name, values in kl.items()},
            "temperature": temperature,
            "top_p": top_p,
        }
        rows.append(row)
    return rows, _sample_means(rows, reward_name, list(kl))


def _sample_means(rows: list[dict], reward_name: str, kl_names: list[str]) -> dict[str, float]:
    columns = {"policy_reward": [row["policy_reward"][reward_name] for row in rows]}
    columns["policy_length"] = [row["policy_tokens"] for row in rows]
    if kl_names:
        columns["reference_reward"] = [row["reference_reward"][reward_name] for row in rows]
        columns["reference_length"] = [row["reference_tokens"] for row in rows]
        columns["reward_gain"] = [p - r for p, r in zip(columns["policy_reward"], columns["reference_reward"])]
        columns |= {name: [row[name] for row in rows] for name in kl_names}
    means = {}
    for name, values in columns.items():
        means[f"samples_eval/{name}"], means[f"samples_eval/{name}_se"] = mean_and_error(values)
    return means


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error (None for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


@torch.no_grad()
def sample_kl(
    policy: Scorer, reference: Scorer, prompts: list[list[int]], responses: list[list[int]], batch_size: int, layout: Layout,
    world: World = ALONE,
) -> dict[str, list[float]]:
    """Three estimators of KL(policy || reference) for each sampled response, summed over its tokens, EOS included.

    kl: full-vocabulary KL at each visited prefix (Rao-Blackwellised, never negative); kl_k1: log pi - log pi_ref of the
    sampled tokens; kl_k3: exp(-r) - 1 + r with r = log pi - log pi_ref of a token (never negative).
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    mine = []
    for rows, n_real in world.batches(order, batch_size):
        batch = lay_out([(prompts[i], [responses[i]]) for i in rows], layout).to(policy.device)
        scores = score_responses(policy, batch, reference=reference, kl="policy||reference")
        ratio = scores.token_logps.double() - scores.reference_token_logps.double()
        k3 = sum_by_owner(torch.expm1(-ratio) + ratio, batch.owners.to(ratio.device), len(rows))
        values = torch.stack([scores.kl, scores.logps - scores.reference_logps, k3], dim=1).tolist()
        mine += list(zip(rows, values))[:n_real]
    found = dict(world.gather(mine))
    return {name: [found[i][column] for i in range(len(prompts))] for column, name in enumerate(("kl", "kl_k1", "kl_k3"))}


def append_samples(path: Path, rows: list[dict], examples: int) -> None:
    """Add the rows of one evaluation to samples.jsonl, all or none of them."""
    kept = path.read_text(encoding="utf-8") if path.is_file() else ""
    with atomic_write(path) as f:
        f.write(kept)
        for row in rows:
            f.write(json.dumps({"examples": examples, **row}, ensure_ascii=False) + "\n")
