"""Samples from a policy. The k-th sample of a prompt depends on (seed, prompt, k) alone, not on the
batch it was in."""

import contextlib
import functools

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, LogitsProcessor
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from preflab.distributed.process_group import ALONE, World
from preflab.modeling.logprobs import Scorer


class InverseCDF(LogitsProcessor):
    """Chooses each next token from one uniform number: the first token at which the cumulative
    probability exceeds it.

    All logits but the chosen token's become -inf, so that greedy decoding takes it. uniforms:
    (rows, steps) in [0, 1). temperature 0 is greedy. top_p: the smallest set of most likely tokens
    that holds this much probability.
    """

    def __init__(self, uniforms: Tensor, temperature: float, top_p: float, prompt_width: int):
        self.uniforms, self.temperature, self.top_p, self.prompt_width = (
            uniforms,
            temperature,
            top_p,
            prompt_width,
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.temperature == 0:
            return scores
        probabilities = (scores.float() / self.temperature).softmax(-1)
        order = None
        if self.top_p < 1:
            probabilities, order = probabilities.sort(descending=True, stable=True)
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        u = self.uniforms[:, input_ids.shape[1] - self.prompt_width, None].to(cumulative)
        # Rounding can put u * total on the last edge; the last token with any probability is then
        # meant.
        below = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
        chosen = torch.searchsorted(cumulative, below, right=True)
        if order is not None:
            chosen = order.gather(-1, chosen)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


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
    seed: int = 0,
    batch_size: int = 16,
    description: str = "sample",
    world: World = ALONE,
) -> list[list[int]]:
    """One response a prompt, as token ids, with its EOS when it ended within `max_new_tokens`.

    keys: a number, or two, for each prompt; equal (seed, key) draw equal random numbers. Prompts
    are batched by length and spread over the ranks; every rank gets all responses.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    bar = tqdm(
        total=len(prompts),
        desc=description,
        unit=" samples",
        leave=False,
        delay=1.0,
        disable=world.no_bar,
    )
    mine = []
    with _packed(policy):
        for rows, n_real in world.batches(order, batch_size):
            uniforms = np.stack(
                [
                    np.random.default_rng([seed, *np.atleast_1d(keys[i])]).random(max_new_tokens)
                    for i in rows
                ]
            )
            generated = _generate(
                policy,
                tokenizer,
                [prompts[i] for i in rows],
                torch.from_numpy(uniforms),
                temperature,
                top_p,
                in_step=world.size > 1,
            )
            mine += list(zip(rows, generated))[:n_real]
            bar.update(n_real * world.data_ranks)
    bar.close()
    responses = dict(world.gather(mine))
    return [responses[i] for i in range(len(prompts))]


def _generate(
    policy: Scorer,
    tokenizer,
    prompts,
    uniforms: Tensor,
    temperature: float,
    top_p: float,
    *,
    in_step: bool,
) -> list[list[int]]:
    width, device = max(map(len, prompts)), policy.device
    input_ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with policy.active(), _evaluating(policy.causal_lm), torch.compiler.set_stance("force_eager"):
        output = policy.causal_lm.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=uniforms.shape[1],
            do_sample=False,
            logits_processor=[InverseCDF(uniforms.to(device), temperature, top_p, width)],
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=in_step,  # a rank whose rows have ended goes on until those of all have
            **_cache(policy.causal_lm),
        )
    return [_until_eos(row, tokenizer.eos_token_id) for row in output[:, width:].tolist()]


@contextlib.contextmanager
def _evaluating(model):
    """Out of training mode, in which layers with activation checkpointing take no cache and would
    see one token alone."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _GrowingLayer(DynamicLayer):
    """Keys and values of a layer in memory that doubles when it is full, where the library's copies
    all for each token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.length, self.room = 0, None
        end = self.length + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            grown = [
                states.new_empty(*states.shape[:-2], max(64, 2 * end), states.shape[-1])
                for states in (key_states, value_states)
            ]
            for new, old in zip(grown, (self.keys, self.values) if self.length else ()):
                new[..., : self.length, :] = old
            self.room = grown
        for room, states in zip(self.room, (key_states, value_states)):
            room[..., self.length : end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        self.length = end
        return self.keys, self.values


def _cache(model: nn.Module) -> dict:
    """A cache of growing layers for models whose layers all keep everything; others choose their
    own."""
    standard = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in standard.layers):
        return {}
    standard.layers = [_GrowingLayer() for _ in standard.layers]
    return {"past_key_values": standard}


@contextlib.contextmanager
def _packed(policy: Scorer):
    """Inside, linear layers of a float32 model on a CPU have their weights in the order in which
    oneDNN wants them.

    A decoding step multiplies them with a few rows only, which takes plain weights up to three
    times as long. It costs a second copy of the weights, and nothing where the model is placed over
    ranks or devices.
    """
    model, changed = policy.causal_lm, []
    usable = (
        policy.placed_on is None
        and policy.autocast is None
        and torch.backends.mkldnn.is_available()
    )
    try:
        for module in model.modules() if usable else ():
            if (
                type(module) in (nn.Linear, Conv1D)
                and module.weight.device.type == "cpu"
                and module.weight.dtype == torch.float32
            ):
                weight = (
                    module.weight.detach().t()
                    if isinstance(module, Conv1D)
                    else module.weight.detach()
                )
                packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
                module.forward = functools.partial(_packed_linear, packed, module.bias)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _packed_linear(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _until_eos(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
