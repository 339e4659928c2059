"""Attention of short texts in groups: many of a packed row in one call.

A call takes as long as the attention of some thousand pairs of tokens, and a packed row of short
texts holds a hundred of them. Here each prompt is a row of its own, and each response a row behind
a copy of its prompt. A row is padded to a length that depends on its own tokens alone, and attends
with rows of that length. On a CPU, what a token gets is therefore the same bit for bit, whatever
stands beside it: a policy equals its reference at the start, though that has read other batches.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tree = tuple[int, tuple[int, ...]]  # the lengths of a prompt and of its responses

# Where rows are longer, or all heads together wider, a call for each response takes less time than
# the copies do.
LONGEST = 64
WIDEST = 128

_MULTIPLE = 8  # of the padded lengths

# A row: the begin of its prompt and its length, the begin of its response and its length.
_Row = tuple[int, int, int, int]


@dataclass(frozen=True)
class Rows:
    """A packed row as rows that attend. groups: the short ones, by padded length. firsts: long ones
    of a prompt with its first response. others: long ones of other responses."""

    groups: dict[int, list[_Row]] = field(default_factory=lambda: defaultdict(list))
    firsts: list[_Row] = field(default_factory=list)
    others: list[_Row] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """How many places each group and each long row has."""
        longs = [prompt + length for _, prompt, _, length in (*self.firsts, *self.others)]
        return [length * len(rows) for length, rows in self.groups.items()] + longs


def make_rows(trees: Sequence[Tree]) -> Rows:
    """The rows of the trees of a packed row."""
    rows, begin = Rows(), 0
    for prompt, responses in trees:
        at = begin + prompt
        if has_short_first := prompt + responses[0] <= LONGEST:
            rows.groups[_padded(prompt)].append((begin, prompt, at, 0))
        for number, length in enumerate(responses):
            row = (begin, prompt, at, length)
            if number == 0 and not has_short_first:
                rows.firsts.append(row)
            elif length and prompt + length > LONGEST:
                rows.others.append(row)
            elif length:
                rows.groups[_padded(prompt + length)].append(row)
            at += length
        begin = at
    return rows


def _padded(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


def rows_are_faster(trees: Sequence[Tree], query: Tensor) -> bool:
    """Whether `attend_in_rows` is the faster way. query: (1, heads, tokens, head size)."""
    return query.shape[1] * query.shape[3] <= WIDEST and bool(make_rows(trees).groups)


def attend_in_rows(
    states: Sequence[Tensor], trees: Sequence[Tree], attend: Callable[..., Tensor]
) -> Tensor:
    """Attention of all trees of a packed row, (1, tokens, heads, head size).

    states: query, key and value, (1, heads, tokens, head size) each. attend(query, key, value,
    hidden): causal attention of equally long rows, from (rows, heads, L, head size) to (rows, L,
    heads, head size). hidden: how many of the first keys have no query.
    """
    places = _find_places(tuple(trees), states[0].device)
    copied = [_Copied.apply(state[0].transpose(0, 1), places) for state in states]
    return _Collected.apply(attend_rows(copied, places.rows, attend), places)[None]


def attend_rows(states: Sequence[Tensor], rows: Rows, attend: Callable[..., Tensor]) -> Tensor:
    """Attention at all places, (places, heads, head size), as `attend_in_rows`. states: query, key
    and value, (places, heads, head size) each."""
    pieces, outputs = zip(*(state.split(rows.sizes) for state in states), strict=True), []
    for length in rows.groups:
        group = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in next(pieces))
        outputs.append(attend(*group, 0).flatten(0, 1))
    for _ in rows.firsts:
        outputs.append(attend(*(part.transpose(0, 1)[None] for part in next(pieces)), 0)[0])
    for _, prompt, _, _ in rows.others:
        query, key, value = (part.transpose(0, 1)[None] for part in next(pieces))
        output = attend(query[:, :, prompt:], key, value, prompt)[0]
        outputs += [output.new_zeros(prompt, *output.shape[1:]), output]
    return torch.cat(outputs)


@dataclass(frozen=True)
class _Places:
    """tokens (places,): the token of each place of the rows, 0 at padding. own (tokens,): the one
    place of each token whose output counts. copies: the other places, of copied prompts, and
    copied: their tokens. unused: these places and padding."""

    rows: Rows
    tokens: Tensor
    own: Tensor
    copies: Tensor
    copied: Tensor
    unused: Tensor


@functools.lru_cache(maxsize=8)  # every layer needs the same places
def _find_places(trees: tuple[Tree, ...], device: torch.device) -> _Places:
    rows = make_rows(trees)
    tokens, is_copy = [], []
    for length, group in rows.groups.items():
        _add_places(group, length, tokens, is_copy)
    for row in rows.firsts:
        _add_places([row], row[1] + row[3], tokens, is_copy, owns_prompt=True)
    for row in rows.others:
        _add_places([row], row[1] + row[3], tokens, is_copy)
    tokens, is_copy = torch.cat(tokens), torch.cat(is_copy)
    is_own = (tokens >= 0) & ~is_copy
    own = torch.empty(int(is_own.sum()), dtype=torch.int64)
    own[tokens[is_own]] = is_own.nonzero()[:, 0]
    found = (own, is_copy.nonzero()[:, 0], tokens[is_copy], (~is_own).nonzero()[:, 0])
    return _Places(rows, *(index.to(device) for index in (tokens.clamp(min=0), *found)))


def _add_places(
    rows: Sequence[_Row],
    padded: int,
    tokens: list[Tensor],
    is_copy: list[Tensor],
    owns_prompt: bool = False,
) -> None:
    """Append the places of rows of one padded length: their tokens, -1 at padding, and which hold
    a copy of the prompt."""
    begin, prompt, response, length = torch.tensor(rows).T[:, :, None]
    place = torch.arange(padded)
    token = torch.where(place < prompt, begin + place, response + place - prompt)
    tokens.append(token.masked_fill(place >= prompt + length, -1).flatten())
    copy = (place < prompt) & (length > 0) & (not owns_prompt)
    is_copy.append(copy.flatten())


class _Copied(torch.autograd.Function):
    """Tokens at their places. Without this, the backward pass would add token by token, the slowest
    operation of a small model, where only prompts have several places."""

    @staticmethod
    def forward(ctx, tokens: Tensor, places: _Places):
        ctx.places = places
        return tokens.index_select(0, places.tokens)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        places = ctx.places
        total = gradient.index_select(0, places.own)
        total.index_add_(0, places.copied, gradient.index_select(0, places.copies))
        return total, None


class _Collected(torch.autograd.Function):
    """The outputs of the tokens, from their own places."""

    @staticmethod
    def forward(ctx, outputs: Tensor, places: _Places):
        ctx.places = places
        return outputs.index_select(0, places.own)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.index_select(0, ctx.places.tokens)
        return gradient.index_fill_(0, ctx.places.unused, 0), None
