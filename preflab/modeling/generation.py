"""Sampling from a policy. The k-th sample of a prompt depends on (seed, prompt, k) only, not on the
batch it was drawn in."""

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from preflab.distributed.process_group import ALONE, World
from preflab.modeling.blocks import compiled_blocks_off
from preflab.modeling.logprobs import Scorer
from preflab.modeling.response_ends import response_ends
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
    choose = functools.partial(
        InverseCDF, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p
    )
    drawn = []  # (index of the prompt, response) of this rank
    states: dict[int, Tensor | None] = {}  # by index of the prompt
    with _packed_weights(policy):
        for rows, n_real, repeated in _batches(prompts, batch_size, world):
            world.stop_if_asked()
            uniforms = np.stack([_uniforms(seed, keys[i], max_new_tokens) for i in rows])
            of_rows: list[Tensor | None] | None = None if hidden is None else []
            responses = _generate(
                policy,
                tokenizer,
                [prompts[i] for i in rows],
                torch.from_numpy(uniforms),
                choose,
                _ObeysStop(world),
                synced=world.size > 1,
                repeated=repeated,
                hidden=of_rows,
            )
            drawn += list(zip(rows, responses, strict=True))[:n_real]
            states |= zip(rows, of_rows or [None] * len(rows), strict=True)
            bar.update(n_real * world.data_ranks)
    bar.close()
    if hidden is not None:
        hidden += [states[i] for i in range(len(prompts))]
    by_prompt = dict(world.gather(drawn))
    return [by_prompt[i] for i in range(len(prompts))]


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
) -> Iterator[tuple[list[int], int, bool]]:
    """This rank's batches: numbers of prompts, how many of them count, and whether any prompt of
    this step occurs more than once.

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
        rows = list(itertools.chain(*(mine or groups[:1])))
        yield rows, len(rows) if mine else 0, repeated


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


def _generate(
    policy: Scorer,
    tokenizer,
    prompts: list[list[int]],
    uniforms: Tensor,
    choose: Callable[..., InverseCDF],
    obeys_stop: _ObeysStop,
    *,
    synced: bool,
    repeated: bool,
    hidden: list[Tensor | None] | None,
) -> list[list[int]]:
    """Responses of one batch. uniforms: (prompts, max_new_tokens). synced: ranks whose rows have
    all ended run on until those of every rank have, as a sharded model needs. repeated: the model
    reads each distinct prompt once, in a forward pass before the others. hidden: as in
    `sample`."""
    model, device = policy.causal_lm, policy.device
    ends = response_ends(tokenizer, model)
    cache = _make_cache(model)
    repeated = repeated and cache is not None
    # With two columns at least, one is left for the pass over the distinct prompts.
    width = max(*map(len, prompts), 2 if repeated else 1)
    input_ids, mask = (
        rows.to(device) for rows in _left_padded(prompts, width, tokenizer.pad_token_id)
    )
    ours = GenerationConfig(
        max_new_tokens=uniforms.shape[1],
        do_sample=False,
        use_cache=True,
        eos_token_id=list(ends.tokens),
        pad_token_id=tokenizer.pad_token_id,
    )
    with policy.active(), _eval_mode(model), compiled_blocks_off(model):
        if repeated:
            _read_prompts(model, prompts, input_ids, mask, cache, synced=synced)
        with _generation_config(model, ours), _head_inputs(model, hidden is not None) as states:
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=ours,
                logits_processor=[choose(uniforms.to(device), prompt_width=width), obeys_stop],
                synced_gpus=synced,
                **ends.criteria(width),
                **({} if cache is None else {"past_key_values": cache}),
            )
    responses = [ends.cut(row) for row in output[:, width:].tolist()]
    if hidden is not None:
        hidden += _by_response(states, responses, n_steps=output.shape[1] - width)
    return responses


@contextlib.contextmanager
def _head_inputs(model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """What the head reads in each forward pass inside, if it is wanted: the last hidden states of
    the last column, (rows, H) each."""
    states: list[Tensor] = []
    head = model.get_output_embeddings() if wanted else None
    if head is None:
        yield states
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][:, -1].clone()))
    try:
        yield states
    finally:
        hook.remove()


def _by_response(
    states: list[Tensor], responses: list[list[int]], *, n_steps: int
) -> list[Tensor | None]:
    """The states (rows, H) of each step as those of each response, (tokens, H)."""
    if len(states) != n_steps:  # a model that does not call its head as a module once a step
        return [None] * len(responses)
    by_row = torch.stack(states, dim=1).cpu()  # those of a round may not fit on a GPU
    return [by_row[row, : len(tokens)] for row, tokens in enumerate(responses)]


def _left_padded(prompts: list[list[int]], width: int, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (prompts, width) each."""
    input_ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return input_ids, mask


def _read_prompts(
    model: nn.Module,
    prompts: list[list[int]],
    input_ids: Tensor,
    mask: Tensor,
    cache: DynamicCache,
    *,
    synced: bool,
) -> None:
    """Fill the cache with all tokens of the prompts but the last, which `generate` reads next. Each
    distinct prompt is computed once, and its keys and values are copied to its rows."""
    distinct: dict[tuple[int, ...], int] = {}
    for prompt in map(tuple, prompts):
        distinct.setdefault(prompt, len(distinct))
    rows = [distinct[tuple(prompt)] for prompt in prompts]
    first = [rows.index(number) for number in range(len(distinct))]
    # One token, which is dropped: `generate` knows what the model's forward pass takes. Without a
    # pad token, it does not take the last column for padding.
    one = GenerationConfig(max_new_tokens=1, do_sample=False, use_cache=True)
    with _generation_config(model, one):
        model.generate(
            input_ids=input_ids[first, :-1],
            attention_mask=mask[first, :-1],
            generation_config=one,
            past_key_values=cache,
            synced_gpus=synced,
        )
    # Where layers are split over devices, each part has a cache of its own.
    for part in getattr(cache, "of_shards", [cache]):
        part.batch_select_indices(torch.tensor(rows))


@contextlib.contextmanager
def _eval_mode(model: nn.Module):
    """The model in eval mode: in training mode, layers with activation checkpointing use no cache
    and would see each new token alone."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _generation_config(model: nn.Module, config: GenerationConfig):
    """The model with this generation config.

    `generate` fills every unset value of the config that it is given from the model's own, so that
    passing a config is not enough.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


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


class _GrowingLayer(DynamicLayer):
    """A layer's keys and values in buffers that double in size when they are full. The library's
    layer copies all of them for each token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.length, self.buffers = 0, None
        end = self.length + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            self._grow(key_states, value_states, max(64, 2 * end))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., self.length : end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        self.length = end
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Copy or drop rows; the next update makes buffers for them."""
        super().batch_select_indices(indices)
        self.buffers = None

    def _grow(self, key_states: Tensor, value_states: Tensor, size: int) -> None:
        """New buffers for `size` positions, with the keys and values so far."""
        buffers = [
            states.new_empty(*states.shape[:-2], size, states.shape[-1])
            for states in (key_states, value_states)
        ]
        if self.length:
            for buffer, states in zip(buffers, (self.keys, self.values), strict=True):
                buffer[..., : self.length, :] = states
        self.buffers = buffers


def _make_cache(model: nn.Module) -> DynamicCache | None:
    """An empty cache whose rows can be copied; its layers grow in buffers if all of them attend to
    every position. None for other models, for example recurrent ones, which make their own."""
    cache = DynamicCache(config=model.config)
    types = {type(layer) for layer in cache.layers}
    if types == {DynamicLayer}:
        cache.layers = [_GrowingLayer() for _ in cache.layers]
    elif not types <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    return cache


@contextlib.contextmanager
def _packed_weights(policy: Scorer):
    """Inside, the linear layers of a float32 model on a CPU use weights in oneDNN's blocked format.

    A decoding step multiplies them with a few rows only, which takes up to three times as long with
    plain weights. It costs a second copy of the weights. Models that are placed over ranks or
    devices stay as they are.
    """
    model, changed = policy.causal_lm, []
    usable = (
        policy.placed_on is None
        and policy.autocast is None
        and torch.backends.mkldnn.is_available()
    )
    try:
        for module in model.modules() if usable else ():
            if not _can_pack(module):
                continue
            weight = module.weight.detach()
            if isinstance(module, Conv1D):  # GPT-2's layers store the transposed weight
                weight = weight.t()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
            module.forward = functools.partial(_packed_linear, packed, module.bias)
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _can_pack(module: nn.Module) -> bool:
    return (
        type(module) in (nn.Linear, Conv1D)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def _packed_linear(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
