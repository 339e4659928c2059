"""Sampling from a policy. The k-th sample of a prompt depends on (seed, prompt, k) only, not on the
batch it was drawn in."""

import functools
import itertools
import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from preflab.distributed.process_group import ALONE, World
from preflab.modeling.decoding import Decoder, Row
from preflab.modeling.logprobs import Scorer
from preflab.modeling.packed_linear import packed_weights
from utils import Progress

logger = logging.getLogger(__name__)

# Values of a model's generation config that change no sample, beside None, False and zero.
NO_EFFECT = {
    "use_cache": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
}
EFFECT_OF_ZERO = ("use_cache", "temperature")  # None aside, which is no value
# Keys of a model's generation config that do not choose tokens.
DESCRIPTIVE = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")


class InverseCDF(LogitsProcessor):
    """Chooses each next token by inverse transform sampling: the first token at which the
    cumulative probability exceeds a uniform random number.

    All logits but the chosen token's become -inf, so that greedy decoding takes it. uniforms:
    (rows, steps) in [0, 1). temperature: 0 is greedy. top_p: draw from the smallest set of most
    likely tokens that holds this much probability (Holtzman et al. 2020). prompt_width: columns of
    `input_ids` that belong to the prompt and its padding. top_k: draw from this many most likely
    tokens (Fan et al. 2018). min_p: draw from tokens with at least this share of the probability of
    the most likely one (Nguyen et al. 2024). None turns either off.

    A token is drawn only if all three allow it. top_p is a share of what top_k allows.
    """

    def __init__(
        self,
        uniforms: Tensor,
        temperature: float,
        top_p: float,
        prompt_width: int,
        top_k: int | None = None,
        min_p: float | None = None,
    ):
        self.uniforms = uniforms
        self.temperature = temperature
        self.top_p = top_p
        self.prompt_width = prompt_width
        self.top_k = top_k
        self.min_p = min_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.temperature == 0:
            return scores
        probabilities = (scores.float() / self.temperature).softmax(-1)
        order = None
        if self.top_p < 1 or self.top_k or self.min_p:
            probabilities, order = probabilities.sort(descending=True, stable=True)
            probabilities = self._truncate(probabilities)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        step = input_ids.shape[1] - self.prompt_width
        u = self.uniforms[:, step, None].to(cumulative)
        # u * total may round up to total, which lies beyond every token. The largest number below
        # it selects the last token with a positive probability.
        threshold = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
        chosen = torch.searchsorted(cumulative, threshold, right=True)
        if order is not None:
            chosen = order.gather(-1, chosen)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)

    def _truncate(self, probabilities: Tensor) -> Tensor:
        """Probabilities in descending order, with 0 for tokens that must not be drawn."""
        highest = probabilities[:, :1]
        if self.top_k:
            probabilities = probabilities[:, : self.top_k]
        if self.top_p < 1:
            total = probabilities.sum(-1, keepdim=True) if self.top_k else 1.0
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p * total, 0.0)
        if self.min_p:
            probabilities = probabilities.masked_fill(probabilities < self.min_p * highest, 0.0)
        return probabilities


class _ObeysStop(LogitsProcessor):
    """Raises Stopped between two tokens if this process, the only one, was asked to stop. Ranks
    stop together, between two batches."""

    def __init__(self, world: World):
        self.world = world

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.world.size == 1:
            self.world.stop_if_asked()
        return scores


@torch.no_grad()
def sample(
    policy: Scorer,
    tokenizer,
    prompts: list[list[int]],
    *,
    keys: list[int | tuple[int, int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    description: str = "sample",
    world: World = ALONE,
    hidden: list[Tensor | None] | None = None,
) -> list[list[int]]:
    """One response to each prompt, as token ids, with its end token if it ended within
    `max_new_tokens`. All that `response_ends` names ends a response.

    The model's own generation config (repetition penalty, suppressed tokens, beams, stop strings
    and so on) has no effect; its values are logged once.

    keys: one number or two for each prompt; equal (seed, key) draw equal random numbers. Prompts
    are batched by length and spread over the ranks; every rank gets all responses. Equal prompts
    stand in one batch, up to `batch_size`, and the model reads the prompt once for all of them.
    hidden: an empty list, which gets the last hidden states that predict the tokens of each
    response, (tokens, H), or None where the model's head does not show them. In one process only.
    """
    _log_ignored(str(_ignored(policy.causal_lm)))
    bar = _progress_bar(len(prompts), description, world)
    decoder = Decoder(
        policy,
        tokenizer,
        functools.partial(
            InverseCDF, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p
        ),
        _ObeysStop(world),
        size=batch_size,
        # A row joins at the last column of the others, and may go on for as many again.
        columns=max(map(len, prompts), default=0) + 2 * max_new_tokens,
        synced=world.size > 1,
    )
    drawn: dict[int, Row] = {}  # of this rank
    with packed_weights(policy):
        for groups, n_real, repeated in _work(decoder, prompts, world):
            world.stop_if_asked()
            uniforms = {
                i: _uniforms(seed, keys[i], max_new_tokens) for i in itertools.chain(*groups)
            }
            rows = [[Row(i, prompts[i], uniforms[i]) for i in group] for group in groups]
            for row in decoder.run(rows, repeated, show_hidden=hidden is not None):
                if n_real:
                    drawn[row.number] = row
                    bar.update(world.data_ranks)
    bar.close()
    if hidden is not None:
        hidden += [_joined(drawn[i].hidden) for i in range(len(prompts))]
    by_prompt = dict(world.gather([(i, row.response) for i, row in drawn.items()]))
    return [by_prompt[i] for i in range(len(prompts))]


def _work(
    decoder: Decoder, prompts: list[list[int]], world: World
) -> list[tuple[list[list[int]], int, bool]]:
    """The batches; all as one where rows of later batches take the places of those that ended."""
    batches = list(_batches(prompts, decoder.size, world))
    if not decoder.changes:
        return batches
    groups = [group for of_batch, *_ in batches for group in of_batch]
    return [(groups, len(prompts), any(repeated for *_, repeated in batches))]


def _joined(parts: list[Tensor] | None) -> Tensor | None:
    if parts is None or len(parts) == 1:
        return parts and parts[0]
    return torch.cat(parts)


def _progress_bar(n: int, description: str, world: World) -> Progress:
    return Progress(
        total=n,
        desc=description,
        unit=" samples",
        leave=False,
        delay=1.0,
        disable=world.no_bar,
    )


def _batches(
    prompts: list[list[int]], size: int, world: World
) -> Iterator[tuple[list[list[int]], int, bool]]:
    """This rank's batches: numbers of prompts in groups of equal ones, how many of them count, and
    whether any prompt of this step occurs more than once.

    All ranks get the same number of batches and the same answer, because a sharded model runs on
    all of them together. A rank with fewer batches gets stand-ins, of which 0 prompts count.
    """
    equal: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        equal.setdefault(tuple(prompt), []).append(i)
    by_length = sorted(equal.values(), key=lambda group: (len(prompts[group[0]]), group[0]))
    groups = [part for group in by_length for part in _evenly_split(group, size)]
    shares = [
        _packed_groups(groups[rank :: world.data_ranks], size) for rank in range(world.data_ranks)
    ]
    for step in itertools.zip_longest(*shares):
        repeated = any(len(group) > 1 for batch in step for group in batch or groups[:1])
        mine = step[world.data_rank]
        yield mine or groups[:1], sum(map(len, mine or [])), repeated


def _evenly_split(group: list[int], size: int) -> list[list[int]]:
    """As few parts of at most `size` as there can be."""
    n_parts = -(-len(group) // size)
    return [part.tolist() for part in np.array_split(group, n_parts)]


def _packed_groups(groups: list[list[int]], size: int) -> list[list[list[int]]]:
    """Batches of whole groups, in their order, of at most `size` prompts each."""
    batches: list[list[list[int]]] = []
    n = size
    for group in groups:
        if n + len(group) > size:
            batches.append([])
            n = 0
        batches[-1].append(group)
        n += len(group)
    return batches


def _uniforms(seed: int, key: int | tuple[int, int], n: int) -> np.ndarray:
    """(n,) in [0, 1), a function of (seed, key)."""
    return np.random.default_rng([seed, *np.atleast_1d(key)]).random(n)


def _ignored(model: nn.Module) -> dict:
    """The values of the model's generation config that `generate` would sample by."""
    values = model.generation_config.to_dict()
    if getattr(model.config, "use_cache", None) is False:
        values["use_cache"] = False
    return {
        name: value
        for name, value in sorted(values.items())
        if not name.startswith("_")
        and value is not None
        and name not in DESCRIPTIVE
        and value != NO_EFFECT.get(name)
        and (value or name in EFFECT_OF_ZERO)
    }


@functools.cache  # once for each set of values
def _log_ignored(values: str) -> None:
    if values != "{}":
        logger.info(f"samples ignore these values of the model's generation config: {values}")
