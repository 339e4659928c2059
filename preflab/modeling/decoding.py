"""Decoding in a batch that changes: rows whose responses have ended leave it, and waiting prompts
take their places."""

import collections
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from preflab.modeling.blocks import compiled_blocks_off
from preflab.modeling.kv_cache import can_join, join, make_cache
from preflab.modeling.logprobs import Scorer
from preflab.modeling.response_ends import ResponseEnds, response_ends

# Operations of a decoding step of the whole batch. In a smaller one, a change of the batch takes
# longer than the steps that it saves.
SMALLEST_STEP = 1e9


@dataclass
class Row:
    """A response that is being drawn.

    number: of its prompt, among those to sample. uniforms: (limit,), one random number for each
    token that it may have. hidden: parts of the last hidden states that predict its tokens,
    (tokens, H) each; None if they are not wanted, or the model does not show them.
    """

    number: int
    prompt: list[int]
    uniforms: np.ndarray
    response: list[int] = field(default_factory=list)
    hidden: list[Tensor] | None = None


class Decoder:
    """Draws the responses of rows.

    choose: makes the logits processor that chooses each token, of uniforms (rows, steps) and the
    width of the prompts. processor: a further one. size: the most rows that are decoded together.
    columns: the most that a batch may have, padding included, where its rows change. synced: ranks
    decode together, as a sharded model needs: rows that have ended stay until those of every rank
    have.
    """

    def __init__(
        self,
        policy: Scorer,
        tokenizer,
        choose: Callable[..., LogitsProcessor],
        processor: LogitsProcessor,
        *,
        size: int,
        columns: int,
        synced: bool,
    ):
        self.policy, self.model, self.device = policy, policy.causal_lm, policy.device
        self.ends, self.pad = response_ends(tokenizer, self.model), tokenizer.pad_token_id
        self.choose, self.processor = choose, processor
        self.size, self.synced = size, synced
        # The rows that are decoded, and their columns: prompts and responses, padded on the left.
        self.rows: list[Row] = []
        self.ids = self.mask = torch.empty(0, 0, dtype=torch.int64)
        self.cache: DynamicCache | None = None
        # Rows and columns that stay in the cache, until it is copied for the next step.
        self.kept: tuple[list[int], int] | None = None
        n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        worth_it = 2 * n_parameters * size > SMALLEST_STEP
        fits = columns <= _most_columns(self.model)
        plain = policy.placed_on is None and not synced and not self.model.is_remote_code()
        self.changes = worth_it and fits and plain and can_join(make_cache(self.model))

    def run(
        self, groups: list[list[Row]], repeated: bool, show_hidden: bool = False
    ) -> Iterator[Row]:
        """The rows, each when its response has ended.

        groups: of equal prompts, which the model reads once; all are admitted in this order.
        repeated: whether any group, on any rank, has several rows. show_hidden: whether rows get
        their hidden states.
        """
        for row in itertools.chain(*groups) if show_hidden else ():
            row.hidden = []
        waiting = collections.deque(groups)
        while waiting or self.rows:
            admitted: list[Row] = []
            while waiting and len(self.rows) + len(admitted) + len(waiting[0]) <= self.size:
                admitted += waiting.popleft()
            if admitted:
                self._admit(admitted, repeated)
            elif self.kept:
                self._rearrange_cache()
            yield from self._decode(self._enough(len(waiting[0]) if waiting else 0))

    def _enough(self, next_group: int) -> int:
        """How many rows must end before the batch changes: those that make room for the next group,
        and a share that makes a change worth its time."""
        n = len(self.rows)
        if not self.changes:
            return n
        if next_group:
            return min(n, max(self.size // 4, next_group - (self.size - n)))
        return -(-n // 2) if n > 4 else n

    def _admit(self, rows: list[Row], repeated: bool) -> None:
        """Let the model read the prompts of rows, but for their last tokens, and add the rows to
        those that are decoded."""
        cache = make_cache(self.model)
        # Where nothing is shared and nothing is joined, `generate` reads the prompts.
        apart = cache is not None and (self.changes or repeated)
        prompts = [row.prompt for row in rows]
        # With two columns at least, one is left for the pass over the distinct prompts.
        width = max(*map(len, prompts), 2 if apart else 1)
        ids, mask = (part.to(self.device) for part in left_padded(prompts, width, self.pad))
        if apart:
            with self._ready():
                _read_prompts(self.model, prompts, ids, mask, cache, synced=self.synced)
        if self.rows:
            self._rearrange_cache(cache)
            width = max(width, self.ids.shape[1])
            self.ids = torch.cat([_widened(part, width, self.pad) for part in (self.ids, ids)])
            self.mask = torch.cat([_widened(part, width, 0) for part in (self.mask, mask)])
        else:
            self.ids, self.mask, self.cache = ids, mask, cache
        self.rows += rows

    def _rearrange_cache(self, new: DynamicCache | None = None) -> None:
        """Drop from the cache what `_keep` dropped, and add the rows of a new one."""
        kept, begin = self.kept or (list(range(len(self.rows))), 0)
        join(self.cache, kept, begin, new, room=max(len(row.uniforms) for row in self.rows))
        self.kept = None

    def _decode(self, enough: int) -> list[Row]:
        """Draw tokens until so many rows have ended, and drop these rows from the batch."""
        rows, width = self.rows, self.ids.shape[1]
        left = [len(row.uniforms) - len(row.response) for row in rows]
        uniforms = torch.zeros(len(rows), max(left), dtype=torch.float64)
        for i, row in enumerate(rows):
            uniforms[i, : left[i]] = torch.from_numpy(row.uniforms[len(row.response) :])
        ended = _Ended(self.ends, rows, left, width, enough, self.device)
        config = GenerationConfig(
            max_new_tokens=max(left),
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self.ends.tokens),
            pad_token_id=self.pad,
        )
        wanted = any(row.hidden is not None for row in rows)
        cache = {} if self.cache is None else {"past_key_values": self.cache}
        with (
            self._ready(),
            _generation_config(self.model, config),
            _head_inputs(self.model, wanted) as states,
        ):
            output = self.model.generate(
                input_ids=self.ids,
                attention_mask=self.mask,
                generation_config=config,
                logits_processor=[
                    self.choose(uniforms.to(self.device), prompt_width=width),
                    self.processor,
                ],
                stopping_criteria=StoppingCriteriaList([ended]),
                synced_gpus=self.synced,
                **cache,
            )
        is_over = ended.ended.tolist()
        self._take(output[:, width:].tolist(), is_over, states)
        self._keep([i for i, over in enumerate(is_over) if not over], output)
        return [row for row, over in zip(rows, is_over, strict=True) if over]

    def _take(self, drawn: list[list[int]], ended: list[bool], states: list[Tensor]) -> None:
        """Add the tokens that were drawn, and their states, to the rows."""
        # A model may not call its head as a module once a step. A GPU may not hold all states.
        shown = len(states) == len(drawn[0])
        by_row = torch.stack(states, dim=1).cpu() if shown else None
        for i, (row, tokens) in enumerate(zip(self.rows, drawn, strict=True)):
            before = len(row.response)
            row.response = (row.response + tokens)[: len(row.uniforms)]
            if ended[i]:
                row.response = self.ends.cut(row.response)
            if row.hidden is not None:
                # A view would keep the states of all rows.
                n = len(row.response) - before
                row.hidden = None if by_row is None else [*row.hidden, by_row[i, :n].clone()]

    def _keep(self, kept: list[int], output: Tensor) -> None:
        """Drop all other rows, and the columns in front of the longest of those that are kept.

        output: (rows, tokens), of the prompts and of what was drawn.
        """
        self.rows, self.kept = [self.rows[i] for i in kept], None
        if not kept:
            self.cache = None
            return
        if (n := self.cache.get_seq_length()) != output.shape[1] - 1:
            raise RuntimeError(
                f"the cache of {type(self.model).__name__} has {n} of {output.shape[1] - 1}"
                " positions after sampling, so further tokens would be wrong; sample with a batch"
                " size of 1, whose rows never change"
            )
        new = torch.ones_like(output[:, self.mask.shape[1] :])
        self.ids, self.mask = output[kept], torch.cat([self.mask, new], dim=1)[kept]
        begin = int(self.mask.any(0).int().argmax())
        self.ids, self.mask = self.ids[:, begin:], self.mask[:, begin:]
        self.kept = kept, begin

    @contextlib.contextmanager
    def _ready(self):
        """The model as it decodes. In training mode, layers with activation checkpointing use no
        cache and would see each new token alone."""
        training = self.model.training
        self.model.eval()
        try:
            with self.policy.active(), compiled_blocks_off(self.model):
                yield
        finally:
            self.model.train(training)


def _most_columns(model: nn.Module) -> float:
    """How many columns a model takes, whatever the positions in them: some index tables by column,
    and Phi-3 drops its cache where its RoPE changes."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    name = "original_max_position_embeddings"
    names = ("max_position_embeddings", "max_seq_len", name)
    limits = [getattr(config, each, None) for each in names]
    limits.append(rope.get(name) if isinstance(rope, dict) else None)
    return min((limit for limit in limits if isinstance(limit, int)), default=math.inf)


class _Ended(StoppingCriteria):
    """Whether each row's response has ended. All rows stop when `enough` of them have.

    left: tokens that each row may still have. width: columns of the prompts. ended: (rows,), what
    has been decided.
    """

    def __init__(
        self,
        ends: ResponseEnds,
        rows: list[Row],
        left: list[int],
        width: int,
        enough: int,
        device: torch.device,
    ):
        self.ends, self.width, self.enough = ends, width, enough
        self.before = [row.response for row in rows]
        self.tokens = torch.tensor(ends.tokens, device=device)
        self.left = torch.tensor(left, device=device)
        self.ended = torch.zeros(len(rows), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **more) -> Tensor:
        self.ended |= torch.isin(input_ids[:, -1], self.tokens)
        self.ended |= self.left <= input_ids.shape[1] - self.width
        if self.ends.turn is not None:
            drawn = input_ids[:, self.width :].tolist()
            texts = [before + tokens for before, tokens in zip(self.before, drawn, strict=True)]
            self.ended |= torch.tensor(
                [self.ends.by_text(text) for text in texts], device=input_ids.device
            )
        return self.ended | (self.ended.sum() >= self.enough)


def left_padded(prompts: list[list[int]], width: int, pad: int) -> tuple[Tensor, Tensor]:
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
    # Where layers are split over devices, each part has its own cache.
    for part in getattr(cache, "of_shards", [cache]):
        part.batch_select_indices(torch.tensor(rows))


def _widened(part: Tensor, width: int, value: int) -> Tensor:
    """Columns of `value` in front of a part with fewer than `width`."""
    return nn.functional.pad(part, (width - part.shape[1], 0), value=value)


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
