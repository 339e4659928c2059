"""Samples of a policy, and their rewards, KL to the reference, lengths and repetition."""

import math
from dataclasses import dataclass

import torch

from preflab.batching.examples import PreferenceData, prompts_to_sample
from preflab.batching.packing import Layout, lay_out
from preflab.distributed.process_group import ALONE, World
from preflab.modeling.generation import sample
from preflab.modeling.logprobs import Scorer, score_responses, sum_by_owner
from preflab.rewards.registry import Score
from utils import mean_and_error


@dataclass(frozen=True)
class Sampling:
    """How an evaluation samples: for the first `n` held-out prompts, `k` responses each.

    max_prompt_length, max_new_tokens: in tokens. temperature 0 is greedy.
    """

    n: int
    k: int
    max_prompt_length: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch_size: int


def sample_and_measure(
    policy: Scorer,
    reference: Scorer | None,
    tokenizer,
    data: PreferenceData,
    rewards: dict[str, Score],
    how: Sampling,
    layout: Layout,
    world: World = ALONE,
    kept: dict | None = None,
) -> tuple[list[dict], dict[str, float]]:
    """Samples of both models for held-out prompts; rows for samples.jsonl, and the means of what is
    measured on them.

    Both models draw the same random numbers, so equal models give equal samples and differences are
    paired. KL is measured on the policy's samples, whatever temperature and top_p they were drawn
    with; only at temperature 1 and top_p 1 is it the KL of the sampled distribution. Without a
    reference there is neither KL nor reference sample. Standard errors are over prompts, each with
    the mean of its samples. The first of `rewards` is what `policy_reward` means. kept: a dict in
    which the samples of a reference are found again, for several policies with the same one.
    """
    prompts = prompts_to_sample(data, how.n, how.max_prompt_length)

    def texts_of(responses):
        return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in responses]

    tokens = [p.tokens for p in prompts for _ in range(how.k)]
    prompt_texts, chosen_texts = texts_of(tokens), texts_of(p.chosen for p in prompts)

    def draw(scorer: Scorer, who: str) -> tuple[list[list[int]], list[str], dict[str, list[float]]]:
        drawn = sample(
            scorer,
            tokenizer,
            tokens,
            keys=[(p.key, i) if i else p.key for p in prompts for i in range(how.k)],
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=how.seed,
            batch_size=how.batch_size,
            world=world,
            description=f"sample {who}",
        )
        texts = texts_of(drawn)
        mine = world.share(prompt_texts), world.share(texts)
        return drawn, texts, {name: world.gather(score(*mine)) for name, score in rewards.items()}

    drawn = {"policy": draw(policy, "policy")}
    measured = measure_samples(
        policy, reference, tokens, drawn["policy"][0], how.batch_size, layout, world
    )
    if reference is not None:
        kept = {} if kept is None else kept
        drawn["reference"] = kept[how] = kept.get(how) or draw(reference, "reference")
    rows = []
    for i in range(len(tokens)):
        row = {
            "prompt": prompt_texts[i],
            "sample": i % how.k,
            "policy": None,
            "reference": None,
            "chosen": chosen_texts[i // how.k],
        }
        row |= {
            "policy_reward": None,
            "reference_reward": None,
            "policy_tokens": None,
            "reference_tokens": None,
        }
        for who, (responses, texts, scores) in drawn.items():
            row |= {
                who: texts[i],
                f"{who}_reward": {name: values[i] for name, values in scores.items()},
                f"{who}_tokens": len(responses[i]),
            }
            row[f"{who}_ended"] = responses[i][-1:] == [tokenizer.eos_token_id]
        row |= {name: values[i] for name, values in measured.items()}
        row["repetition"] = repetition(drawn["policy"][0][i])
        rows.append(row | {"temperature": how.temperature, "top_p": how.top_p})
    means = _sample_means(rows, list(rewards), list(measured), how.k)
    for who, (responses, *_) in drawn.items():
        means |= {f"samples_eval/{who}_distinct_{n}": distinct(responses, n) for n in (1, 2, 3)}
    return rows, means


def _sample_means(
    rows: list[dict], rewards: list[str], measured: list[str], k: int
) -> dict[str, float]:
    columns = {}
    for name in rewards:
        more = "" if name == rewards[0] else f"[{name}]"
        columns[f"policy_reward{more}"] = [row["policy_reward"][name] for row in rows]
        if rows[0]["reference"] is not None:
            columns[f"reference_reward{more}"] = [row["reference_reward"][name] for row in rows]
            columns[f"reward_gain{more}"] = [
                p - r
                for p, r in zip(
                    columns[f"policy_reward{more}"],
                    columns[f"reference_reward{more}"],
                    strict=True,
                )
            ]
    for who in ("policy", "reference") if rows[0]["reference"] is not None else ("policy",):
        columns |= {
            f"{who}_length": [row[f"{who}_tokens"] for row in rows],
            f"{who}_ended": [float(row[f"{who}_ended"]) for row in rows],
        }
    columns |= {name: [row[name] for row in rows] for name in (*measured, "repetition")}
    means = {}
    for name, values in columns.items():
        of_prompts = [math.fsum(values[i : i + k]) / k for i in range(0, len(values), k)]
        means[f"samples_eval/{name}"], means[f"samples_eval/{name}_se"] = mean_and_error(of_prompts)
    return means


def repetition(tokens: list[int], n: int = 4) -> float:
    """The share of a response's n-grams that it already had: 0 for none, towards 1 for a loop; 0
    with less than two."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(responses: list[list[int]], n: int) -> float | None:
    """distinct-n (Li et al. 2016): different n-grams of all responses together, over their number;
    None without any."""
    grams = [tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


@torch.no_grad()
def measure_samples(
    policy: Scorer,
    reference: Scorer | None,
    prompts: list[list[int]],
    responses: list[list[int]],
    batch_size: int,
    layout: Layout,
    world: World = ALONE,
) -> dict[str, list[float]]:
    """For each sampled response, EOS included: the policy's entropy, and three estimators of
    KL(policy || reference).

    entropy: mean over its tokens, in nats. kl: full-vocabulary KL at each visited prefix, summed
    (Rao-Blackwellised, never negative); kl_k1: log pi - log pi_ref of the sampled tokens; kl_k3:
    exp(-r) - 1 + r with r = log pi - log pi_ref of a token (never negative). Without a reference
    the entropy alone.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    mine = []
    for rows, n_real in world.batches(order, batch_size):
        batch = lay_out([(prompts[i], [responses[i]]) for i in rows], layout).to(policy.device)
        scores = score_responses(
            policy,
            batch,
            reference=reference,
            kl="policy||reference" if reference else None,
            entropy=True,
        )
        owners = batch.owners.to(scores.logps.device)
        values = {
            "entropy": (
                sum_by_owner(scores.token_entropy, owners, len(rows))
                / batch.lengths.to(scores.logps.device)
            )
        }
        if reference is not None:
            ratio = scores.token_logps.double() - scores.reference_token_logps.double()
            k3 = sum_by_owner(torch.expm1(-ratio) + ratio, owners, len(rows))
            values |= {"kl": scores.kl, "kl_k1": scores.logps - scores.reference_logps, "kl_k3": k3}
        measured = torch.stack(list(values.values()), dim=1).tolist()
        mine += list(zip(rows, measured, strict=True))[:n_real]
    found = dict(world.gather(mine))
    names = ("entropy", "kl", "kl_k1", "kl_k3") if reference is not None else ("entropy",)
    return {
        name: [found[i][column] for i in range(len(prompts))] for column, name in enumerate(names)
    }
