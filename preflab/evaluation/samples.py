"""Samples of a policy, and their rewards, KL to the reference, length and repetition."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from preflab.batching.chat import prompt_columns, prompt_text, response_text
from preflab.batching.examples import PreferenceData, PromptToSample, prompts_to_sample
from preflab.batching.packing import Layout, lay_out
from preflab.batching.token_store import tokenizer_hash
from preflab.distributed.process_group import ALONE, World
from preflab.evaluation.sides import sides_of
from preflab.modeling.generation import sample
from preflab.modeling.logprobs import Scorer, score_responses, sum_by_owner
from preflab.modeling.response_ends import response_ends
from preflab.modeling.shared_samples import SHARED, equal_models
from preflab.reports.selection import number_on
from preflab.rewards.registry import Score
from preflab.serving.sampler import ServedModel
from utils import mean_and_error


@dataclass(frozen=True)
class Sampling:
    """The sampling of an evaluation: `k` responses to each of the first `n` held-out prompts.

    max_prompt_length, max_new_tokens: in tokens. temperature 0 is greedy.
    """

    n: int
    k: int
    max_prompt_length: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    min_p: float | None
    seed: int
    batch_size: int


@dataclass(frozen=True)
class Samples:
    """The responses of one model, (prompts * k,) each, prompt by prompt.

    tokens: with the end token, where a response ended. rewards: scores by the name of the reward.
    """

    tokens: list[list[int]]
    ended: list[bool]
    texts: list[str]
    rewards: dict[str, list[float]]


def sample_and_measure(
    policy: Scorer,
    reference: Scorer | None,
    tokenizer,
    data: PreferenceData,
    rewards: dict[str, Score],
    sampling: Sampling,
    layout: Layout,
    world: World = ALONE,
    reference_samples: dict[Sampling, Samples] | None = None,
    served: Mapping[str, ServedModel] = MappingProxyType({}),
) -> tuple[list[dict], dict[str, float]]:
    """Sample responses of both models to held-out prompts, and measure them.

    Returns the rows of samples.jsonl, and means over them with standard errors, and over dev and
    test prompts alone. Errors are over prompts, each with the mean of its samples. The first of
    `rewards` gives `policy_reward`.

    Both models draw the same random numbers, so equal models give equal samples and differences
    are paired. KL is measured on the policy's samples; it is the KL of the sampled distribution
    only at temperature 1 and top_p 1, without top_k and min_p. Without a reference there are
    neither KL nor reference samples. reference_samples: a cache of the reference's samples, for
    evaluating several policies with the same reference. served: what a server samples, of "policy"
    and "reference".
    """
    prompts = prompts_to_sample(data, sampling.n, sampling.max_prompt_length)
    shared = (tokenizer, prompts, rewards, sampling, world)
    samples = {"policy": _draw(policy, *shared, served.get("policy"), of="policy")}
    prompt_tokens = [prompt.tokens for prompt in prompts for _ in range(sampling.k)]
    measured = measure_samples(
        policy,
        reference,
        prompt_tokens,
        samples["policy"].tokens,
        sampling.batch_size,
        layout,
        world,
    )
    if reference is not None:
        cache = {} if reference_samples is None else reference_samples
        if sampling not in cache:
            # Before the first step, for example.
            is_policy = not served and world.size == 1 and equal_models(policy, reference)
            cache[sampling] = (
                samples["policy"]
                if is_policy
                else _draw(reference, *shared, served.get("reference"), of="reference")
            )
        samples["reference"] = cache[sampling]
    rows = _rows(tokenizer, prompts, samples, measured, sampling)
    means = _sample_means(rows, list(rewards), list(measured), sampling.k)
    for model, drawn in samples.items():
        for n in (1, 2, 3):
            means[f"samples_eval/{model}_distinct_{n}"] = distinct(drawn.tokens, n)
    return rows, means


def _draw(
    scorer: Scorer,
    tokenizer,
    prompts: list[PromptToSample],
    rewards: dict[str, Score],
    sampling: Sampling,
    world: World,
    served: ServedModel | None,
    *,
    of: str,
) -> Samples:
    """`k` responses of a model to each prompt, with their rewards. served: that model on a server,
    which then samples them. of: policy or reference."""
    # The random numbers of a response depend on its key: the prompt's, with a number from the
    # second response on.
    keys = [(p.key, i) if i else p.key for p in prompts for i in range(sampling.k)]
    prompt_tokens = [prompt.tokens for prompt in prompts for _ in range(sampling.k)]
    ends = response_ends(tokenizer, scorer.causal_lm)
    draw = functools.partial(
        served or sample,
        scorer,
        tokenizer,
        prompt_tokens,
        keys=keys,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        batch_size=sampling.batch_size,
        world=world,
        description=f"sample {of}",
    )
    numbers = [list(map(int, tokens)) for tokens in prompt_tokens]
    decoded = tokenizer_hash(tokenizer) if ends.turn else None  # an end that is text is decoded
    question = (numbers, keys, sampling, ends, decoded, tokenizer.pad_token_id)
    tokens = draw() if served else SHARED.draw(scorer, question, draw, world)
    texts = [response_text(tokenizer, response) for response in tokens]
    prompt_texts = [text for text in _prompt_texts(tokenizer, prompts) for _ in range(sampling.k)]
    mine = world.share(prompt_texts), world.share(texts)
    scores = {name: world.gather(score(*mine)) for name, score in rewards.items()}
    return Samples(tokens, list(map(ends.ended, tokens)), texts, scores)


def _prompt_texts(tokenizer, prompts: list[PromptToSample]) -> list[str]:
    return [prompt_text(tokenizer, prompt.tokens, prompt.chat) for prompt in prompts]


def _rows(
    tokenizer,
    prompts: list[PromptToSample],
    samples: dict[str, Samples],
    measured: dict[str, list[float]],
    sampling: Sampling,
) -> list[dict]:
    """The rows of samples.jsonl. samples: by model. measured: values of the policy's samples."""
    prompt_texts = _prompt_texts(tokenizer, prompts)
    chosen_texts = [response_text(tokenizer, prompt.chosen) for prompt in prompts]
    rows = []
    for i in range(len(prompts) * sampling.k):
        number, member = divmod(i, sampling.k)
        row = {
            **prompt_columns(prompt_texts[number]),
            "sample": member,
            "policy": None,
            "reference": None,
            "chosen": chosen_texts[number],
            "policy_reward": None,
            "reference_reward": None,
            "policy_tokens": None,
            "reference_tokens": None,
        }
        for model, drawn in samples.items():
            row[model] = drawn.texts[i]
            row[f"{model}_reward"] = {name: values[i] for name, values in drawn.rewards.items()}
            row[f"{model}_tokens"] = len(drawn.tokens[i])
            row[f"{model}_ended"] = drawn.ended[i]
        row |= {name: values[i] for name, values in measured.items()}
        row["repetition"] = repetition(samples["policy"].tokens[i])
        row |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        row |= {k: v for k in ("top_k", "min_p") if (v := getattr(sampling, k)) is not None}
        rows.append(row)
    return rows


def _sample_means(
    rows: list[dict], rewards: list[str], measured: list[str], k: int
) -> dict[str, float]:
    """The mean and standard error of every measured value, over prompts of `k` rows each, and the
    means over dev and over test prompts, where there are both."""
    sides = sides_of([row["prompt"] for row in rows[::k]])
    models = ["policy"] if rows[0]["reference"] is None else ["policy", "reference"]
    columns: dict[str, list[float]] = {}
    for name in rewards:
        suffix = "" if name == rewards[0] else f"[{name}]"
        for model in models:
            columns[f"{model}_reward{suffix}"] = [row[f"{model}_reward"][name] for row in rows]
        if "reference" in models:
            ours, theirs = (columns[f"{model}_reward{suffix}"] for model in models)
            columns[f"reward_gain{suffix}"] = [p - r for p, r in zip(ours, theirs, strict=True)]
    for model in models:
        columns[f"{model}_length"] = [row[f"{model}_tokens"] for row in rows]
        columns[f"{model}_ended"] = [float(row[f"{model}_ended"]) for row in rows]
    columns |= {name: [row[name] for row in rows] for name in (*measured, "repetition")}
    means = {}
    for name, values in columns.items():
        of_prompts = [math.fsum(values[i : i + k]) / k for i in range(0, len(values), k)]
        means[f"samples_eval/{name}"], means[f"samples_eval/{name}_se"] = mean_and_error(of_prompts)
        for side, chosen in sides.items():
            of_side = math.fsum(of_prompts[i] for i in chosen)
            means[number_on(side, name)] = of_side / len(chosen)
    return means | {number_on(side, "prompts"): len(chosen) for side, chosen in sides.items()}


def repetition(tokens: list[int], n: int = 4) -> float:
    """The share of a response's n-grams that occur in it earlier, from 0 to 1.

    It is near 1 for a response that loops, and 0 for one with fewer than two n-grams.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(responses: list[list[int]], n: int) -> float | None:
    """distinct-n (Li et al. 2016): the share of different n-grams among those of all responses.

    None where no response has an n-gram.
    """
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
    """The policy's entropy and three estimators of KL(policy || reference), of each response.

    prompts, responses: token ids, responses with EOS, (n,) each. Returns lists of n values, in
    nats:
    entropy: the mean over the response's tokens.
    kl: full-vocabulary KL at each prefix, summed over the response (Rao-Blackwellised; >= 0).
    kl_k1: r = log pi - log pi_ref of a token, summed.
    kl_k3: exp(-r) - 1 + r, summed (>= 0).
    Without a reference there is only the entropy.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    mine = []
    for rows, n_real in world.batches(order, batch_size):
        world.stop_if_asked()
        batch = lay_out([(prompts[i], [responses[i]]) for i in rows], layout).to(policy.device)
        scores = score_responses(
            policy,
            batch,
            reference=reference,
            kl="policy||reference" if reference else None,
            entropy=True,
        )
        device = scores.logps.device
        owners, lengths = batch.owners.to(device), batch.lengths.to(device)
        values = {"entropy": sum_by_owner(scores.token_entropy, owners, len(rows)) / lengths}
        if reference is not None:
            ratio = scores.token_logps.double() - scores.reference_token_logps.double()
            k3 = sum_by_owner(torch.expm1(-ratio) + ratio, owners, len(rows))
            values |= {"kl": scores.kl, "kl_k1": scores.logps - scores.reference_logps, "kl_k3": k3}
        by_response = torch.stack(list(values.values()), dim=1).tolist()
        mine += list(zip(rows, by_response, strict=True))[:n_real]
    measured = dict(world.gather(mine))
    names = ("entropy", "kl", "kl_k1", "kl_k3") if reference is not None else ("entropy",)
    return {
        name: [measured[i][column] for i in range(len(prompts))]
        for column, name in enumerate(names)
    }
