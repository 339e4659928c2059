"""Attention over prompts that several responses share: exact, without a mask over the whole row.

A packed row holds trees, one after the other: a prompt, then each of its responses, whose positions
continue from the prompt's. A response sees its prompt and itself, never another response. The rows
of `Batch.segments` are (begin of the prompt, its length, begin of a response, its length). They
reach every layer in place of the attention mask, which transformers passes through unchanged when
it has four dimensions.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from preflab.batching.short_rows import Tree, attend_in_rows, rows_are_faster
from utils import first_line

NAME = "preflab_segments"

# For models that transformers runs with the attention function of their own module, because `sdpa`
# has no soft caps and no sinks.
EAGER_NAME = f"{NAME}_eager"


@dataclass(frozen=True)
class Support:
    """Whether something can be used here. reason: a sentence for the user where it cannot; empty
    where there is nothing to report."""

    ok: bool
    reason: str = ""


def is_packed(attention_mask) -> bool:
    """Whether an attention mask is that of packed rows: segments or a block mask."""
    if isinstance(attention_mask, Tensor):
        return attention_mask.dtype == torch.int64 and attention_mask.ndim == 4
    return isinstance(attention_mask, BlockMask)


def segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **options
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (1, heads, tokens, head size) to output (1,
    tokens, heads, head size).

    attention_mask: segments (int64), a block mask, or what the module's attention accepts without
    us.
    """
    if isinstance(attention_mask, BlockMask):
        # Under autocast, rotary embeddings and norms leave queries and keys in fp32, and autocast
        # of torch 2.11 does not cover FlexAttention, which needs one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return flex_attention_forward(module, query, key, value, attention_mask, **options)
    if not is_packed(attention_mask):
        return _plain_attention(module)(module, query, key, value, attention_mask, **options)
    # Qwen2-MoE keeps its window to itself, because its mask has it already.
    window = options.pop("sliding_window", getattr(module, "sliding_window", None))
    return _by_segments(module, query, key, value, attention_mask, window, **options), None


def _plain_attention(module: nn.Module) -> Callable:
    """The attention function of transformers that a module uses without us."""
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) != EAGER_NAME:
        return sdpa_attention_forward
    return sys.modules[type(module).__module__].eager_attention_forward


@torch.compiler.disable  # its loop differs from row to row, and each would be compiled
def _by_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    window: int | None,
    **options,
) -> Tensor:
    """Attention of short texts in groups, and of long ones one by one."""
    states, trees = (query, key, value), split_trees(segments)
    attend = functools.partial(_attend, module, window, options)
    # Matrix products of an eager attention depend, in the last digit, on the rows beside them.
    is_fused = _plain_attention(module) is sdpa_attention_forward
    if is_fused and rows_are_faster(trees, query):
        return attend_in_rows(states, trees, attend)
    return attend_by_tree(states, trees, attend)


def _attend(
    module: nn.Module,
    window: int | None,
    options: Mapping,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: int,
) -> Tensor:
    """Causal attention. hidden: how many of the first keys have no query."""
    attend, n = _plain_attention(module), key.shape[2]
    # Only `sdpa` knows `is_causal`, which is faster than a mask.
    mask = None
    if hidden or attend is not sdpa_attention_forward or (window is not None and n > window):
        mask = causal_mask(n, window, query.dtype, query.device)[:, :, hidden:n, :n]
    return attend(module, query, key, value, mask, is_causal=True, **options)[0]


def attend_by_tree(
    states: Sequence[Tensor], trees: Sequence[Tree], attend: Callable[..., Tensor]
) -> Tensor:
    """Attention tree by tree: a prompt with its first response in one causal call, then each other
    response over the prompt's keys and its own. As `attend_in_rows`."""
    sizes = []
    for prompt, (first, *others) in trees:
        sizes += [prompt + first, *filter(None, others)]
    # Split and concatenate: in the backward pass, each slice of a whole tensor would fill a zero
    # tensor of the whole's size.
    pieces = zip(*(tensor.split(sizes, dim=2) for tensor in states), strict=True)
    outputs = []
    for prompt, (_, *others) in trees:
        q, k, v = next(pieces)
        outputs.append(attend(q, k, v, 0))
        prompt_k, prompt_v = k[:, :, :prompt], v[:, :, :prompt]
        for _ in filter(None, others):
            q, k, v = next(pieces)
            k, v = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
            outputs.append(attend(q, k, v, prompt))
    return torch.cat(outputs, dim=1)


def split_trees(segments: Tensor) -> list[Tree]:
    """Segments as [(prompt length, response lengths)], in the order of the row."""
    trees: dict[int, tuple[int, list[int]]] = {}
    for begin, prompt, _, length in segments.flatten(0, 2).tolist():
        trees.setdefault(begin, (prompt, []))[1].append(length)
    return [(prompt, tuple(lengths)) for prompt, lengths in trees.values()]


_masks: dict[tuple, Tensor] = {}  # every layer needs the same ones


def causal_mask(n: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive causal mask of at least `n` tokens, (1, 1, tokens, tokens); the mask of a response
    behind its prompt is a part of it."""
    key = window, dtype, device
    if key not in _masks or _masks[key].shape[-1] < n:
        n = -(-n // 256) * 256
        hidden = torch.full((n, n), torch.finfo(dtype).min, dtype=dtype)
        mask = hidden.triu(1) if window is None else hidden.triu(1) + hidden.tril(-window)
        _masks[key] = mask[None, None].to(device)
    return _masks[key]


def describe_tokens(segments: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every token of a packed row: its tree, its response (0 in a prompt) and its position,
    (tokens,) each.

    Tokens outside all segments form one more tree, in which attention is causal.
    """
    tree = torch.full((n_tokens,), -1)
    response, position = torch.zeros_like(tree), torch.arange(n_tokens)
    rows = segments.flatten(0, -2).tolist()
    for number, (begin, prompt, response_begin, length) in enumerate(rows, 1):
        tree[begin : begin + prompt] = begin
        position[begin : begin + prompt] = torch.arange(prompt)
        own = slice(response_begin, response_begin + length)
        tree[own], response[own] = begin, number
        position[own] = torch.arange(prompt, prompt + length)
    return tree, response, position


def allowed_pairs(segments: Tensor, n_tokens: int, window: int | None = None) -> Tensor:
    """The dense mask, (tokens, tokens): whether a token (row) sees another (column). The tests
    compare all other masks with it."""
    tree, response, position = describe_tokens(segments, n_tokens)
    own = (response[:, None] == response) | (response == 0)
    allowed = (tree[:, None] == tree) & own & (position[:, None] >= position)
    return allowed if window is None else allowed & (position[:, None] - position < window)


def block_table(segments: Tensor, n_tokens: int, size: int = 128) -> tuple[Tensor, ...]:
    """The parts of a block mask: tree, response and position of every token, (tokens,), and the
    blocks of size x size with an allowed pair: how many there are in each row of blocks (1, 1,
    blocks), and their columns in front of the others (1, 1, blocks, blocks).

    They are computed from the trees and responses in each block, never from tokens x tokens.
    """
    tree, response, position = describe_tokens(segments, n_tokens)
    block, n_blocks = torch.arange(n_tokens) // size, -(-n_tokens // size)

    def contains(label: Tensor, selected: Tensor) -> Tensor:
        """(blocks, labels): 1 where a block has a selected token of that label."""
        table = torch.zeros(n_blocks, int(label.max()) + 1)
        table[block[selected], label[selected]] = 1
        return table

    _, tree_number = tree.unique(return_inverse=True)
    in_response = contains(response, response > 0)
    to_prompt = contains(tree_number, response >= 0) @ contains(tree_number, response == 0).T
    to_response = in_response @ in_response.T
    allowed = ((to_prompt + to_response) > 0).tril()
    counts = allowed.sum(1, dtype=torch.int32)
    order = allowed.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return tree, response, position, counts[None, None], order[None, None]


def block_mask(table: tuple[Tensor, ...], device: torch.device, size: int = 128) -> BlockMask:
    """The mask of a `block_table` for FlexAttention, which computes only the blocks in it."""
    tree, response, position, counts, order = (column.to(device) for column in table)

    def allowed(batch, head, q, k):
        own = (response[k] == 0) | (response[k] == response[q])
        return (tree[q] == tree[k]) & own & (position[q] >= position[k])

    mask = BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=size, mask_mod=allowed, seq_lengths=(len(tree), len(tree))
    )
    mask.ndim = 4  # GPT-2 reads it
    return mask


def check_flex(
    heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> Support:
    """Whether FlexAttention gives the values and gradients of attention segment by segment.

    Its kernels are compiled for each device, dtype and head size, and not every combination exists
    everywhere.
    """
    try:
        errors = flex_errors(heads, kv_heads, head_size, dtype, device)
    except Exception as failure:  # compilers and kernels have no common exception class
        return Support(False, f"FlexAttention fails here ({first_line(failure)})")
    bound = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    worst = torch.tensor(errors).max().item()  # NaN if any error is
    if worst < bound:
        return Support(True)
    return Support(
        False, f"FlexAttention is off by {worst:.2g} here, values or gradients, relative"
    )


def allow_recompilations() -> None:
    """Let torch compile FlexAttention as often as models, dtypes, rows of one block and passes
    without gradient need it; beyond the default limit of 8 it would run uncompiled."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


def flex_errors(
    heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> list[float]:
    """How far FlexAttention is from attention segment by segment, relative in norm: its values, and
    its gradients in query, key and value, for rows of two lengths.

    At the second length the kernels are compiled for rows of any length.
    """
    allow_recompilations()
    generator = torch.Generator().manual_seed(0)
    module = nn.Module().eval()
    module.num_key_value_groups = heads // kv_heads
    rows = [
        ([[0, 150, 150, 40], [0, 150, 190, 9], [199, 3, 202, 60]], 262),
        ([[0, 300, 300, 50], [0, 300, 350, 40]], 390),
    ]
    errors = []
    for segments, n_tokens in rows:
        query, key, value, weight = (
            torch.randn(1, n, n_tokens, head_size, generator=generator).to(device, dtype)
            for n in (heads, kv_heads, kv_heads, heads)
        )
        segments = torch.tensor(segments)[None, None]
        blocks = block_mask(block_table(segments, n_tokens), device)
        expected, actual = (
            _output_and_gradients(module, (query, key, value), weight.transpose(1, 2), mask)
            for mask in (segments, blocks)
        )
        errors += [
            ((ours - theirs).norm() / theirs.norm()).item()
            for theirs, ours in zip(expected, actual, strict=True)
        ]
    return errors


def _output_and_gradients(
    module: nn.Module, inputs: tuple[Tensor, ...], weight: Tensor, mask
) -> list[Tensor]:
    """Attention's output, and the gradients of its weighted sum in query, key and value."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    head_size = inputs[0].shape[-1]
    output, _ = segment_attention(module, *leaves, mask, scaling=head_size**-0.5)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]
