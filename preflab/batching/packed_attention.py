"""Attention over prompts that several responses share: exact, and without a mask over the whole
row.

A packed row holds trees, one after the other: a prompt, then each of its responses, whose positions
go on from the prompt's. A response sees its prompt and itself, never another response. The rows of
`Batch.segments` say where they are: (begin of the prompt, its length, begin of a response, its
length). They reach every layer in place of the attention mask, which transformers hands on
untouched when it has four dimensions.
"""

import types

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from utils import first_line

NAME = "preflab_segments"


# The architectures whose layers were compared, shared against padded, for values and gradients
# (tests/test_layouts.py).
SHARING = {
    "gemma",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "llama",
    "mistral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
}


def enable(model: nn.Module) -> None:
    """Let a transformers model take segments (or a block mask of `block_mask`) as its attention
    mask.

    Without them it attends as with `attn_implementation="sdpa"`, in generation for example.
    """
    # FlexAttention is compiled anew for rows of one block, without gradient, for another model;
    # past 8 it would go uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    own_loops = [module for module in model.modules() if type(module).__name__ in OWN_LOOPS]
    for module in (
        own_loops
    ):  # GPT-J and GPT-Neo compute attention themselves, whatever implementation is asked for
        module._attn = types.MethodType(_instead_of_own_loop, module)
    if not own_loops:
        model.set_attn_implementation(NAME)


def segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **options
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (1, heads, tokens, head size) to output (1,
    tokens, heads, head size).

    attention_mask: segments, a block mask, or what `sdpa` takes.
    """
    if isinstance(attention_mask, BlockMask):
        # Under autocast rotary embeddings and norms leave queries and keys in fp32, and in torch
        # 2.11 it does not see to FlexAttention.
        return flex_attention_forward(
            module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **options
        )
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _by_segments(module, query, key, value, attention_mask, **options), None


@torch.compiler.disable  # its loop is another for every row, and each would be compiled
def _by_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    sliding_window: int | None = None,
    **options,
) -> Tensor:
    trees, window = _trees(segments), sliding_window
    masked = [prompt + n for prompt, (_, *others) in trees for n in others] + [
        prompt + first for prompt, (first, *_) in trees if window is not None
    ]
    causal = _mask(max(masked), window, query.dtype, query.device) if masked else None
    # Split and concatenate: slices of the whole would each fill a zero tensor of its size in the
    # backward pass.
    sizes = [
        size
        for prompt, responses in trees
        for size in (prompt + responses[0], *filter(None, responses[1:]))
    ]
    pieces = iter(zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value))))
    outputs = []
    for prompt, (first, *others) in trees:
        q, k, v = next(pieces)
        n = prompt + first
        band = causal[:, :, :n, :n] if window is not None and n > window else None
        outputs.append(sdpa_attention_forward(module, q, k, v, band, is_causal=True, **options)[0])
        prompt_k, prompt_v = k[:, :, :prompt], v[:, :, :prompt]
        for n in (prompt + length for length in others if length):
            q, k, v = next(pieces)
            k, v = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
            outputs.append(
                sdpa_attention_forward(module, q, k, v, causal[:, :, prompt:n, :n], **options)[0]
            )
    return torch.cat(outputs, dim=1)


def _trees(segments: Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """Segments as [(prompt length, response lengths)], in the order of the row."""
    trees: dict[int, tuple[int, list[int]]] = {}
    for begin, prompt, _, length in segments.flatten(0, 2).tolist():
        trees.setdefault(begin, (prompt, []))[1].append(length)
    return [(prompt, tuple(lengths)) for prompt, lengths in trees.values()]


_masks: dict[tuple, Tensor] = {}  # every layer asks for the same


def _mask(n: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive causal mask of at least `n` tokens, (1, 1, tokens, tokens): that of a response
    behind its prompt is a part of it."""
    kind = window, dtype, device
    if kind not in _masks or _masks[kind].shape[-1] < n:
        n = -(-n // 256) * 256
        hidden = torch.full((n, n), torch.finfo(dtype).min, dtype=dtype)
        mask = hidden.triu(1) if window is None else hidden.triu(1) + hidden.tril(-window)
        _masks[kind] = mask[None, None].to(device)
    return _masks[kind]


def describe_tokens(segments: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every token of a packed row: its tree, its response (0 in a prompt) and its position,
    (tokens,) each.

    What no segment holds is a tree of its own, of which each token sees only itself and those
    before.
    """
    tree = torch.full((n_tokens,), -1)
    response, position = torch.zeros_like(tree), torch.arange(n_tokens)
    for i, (begin, prompt, at, length) in enumerate(segments.flatten(0, -2).tolist()):
        tree[begin : begin + prompt] = begin
        position[begin : begin + prompt] = torch.arange(prompt)
        tree[at : at + length], response[at : at + length] = begin, i + 1
        position[at : at + length] = torch.arange(prompt, prompt + length)
    return tree, response, position


def allowed_pairs(segments: Tensor, n_tokens: int, window: int | None = None) -> Tensor:
    """Which token (row) sees which (column), (tokens, tokens): the dense mask that everything else
    is tested against."""
    tree, response, position = describe_tokens(segments, n_tokens)
    own = (response[:, None] == response) | (response == 0)
    allowed = (tree[:, None] == tree) & own & (position[:, None] >= position)
    return allowed if window is None else allowed & (position[:, None] - position < window)


def block_table(segments: Tensor, n_tokens: int, size: int = 128) -> tuple[Tensor, ...]:
    """What a block mask is made of: tree, response and position of every token, (tokens,), and the
    blocks of size x size with an allowed pair.

    Which those are follows from what each block holds, so nothing of tokens x tokens is ever made.
    """
    tree, response, position = describe_tokens(segments, n_tokens)
    block, n_blocks = torch.arange(n_tokens) // size, -(-n_tokens // size)

    def holds(kind: Tensor, which: Tensor) -> Tensor:
        """(blocks, kinds): 1 where a block has a token of that kind, among those of `which`."""
        found = torch.zeros(n_blocks, int(kind.max()) + 1)
        found[block[which], kind[which]] = 1
        return found

    _, number = tree.unique(return_inverse=True)
    to_prompt = holds(number, response >= 0) @ holds(number, response == 0).T
    to_itself = holds(response, response > 0) @ holds(response, response > 0).T
    some = ((to_prompt + to_itself) > 0).tril()
    counts = some.sum(1, dtype=torch.int32)
    order = some.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return tree, response, position, counts[None, None], order[None, None]


def block_mask(table: tuple[Tensor, ...], device: torch.device, size: int = 128) -> BlockMask:
    """The mask of a `block_table` for FlexAttention, which computes the blocks in it and no
    others."""
    tree, response, position, counts, order = (column.to(device) for column in table)

    def allowed(batch, head, q, k):
        own = (response[k] == 0) | (response[k] == response[q])
        return (tree[q] == tree[k]) & own & (position[q] >= position[k])

    mask = BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=size, mask_mod=allowed, seq_lengths=(len(tree), len(tree))
    )
    mask.ndim = 4  # GPT-2 asks its mask
    return mask


def flex_problem(
    heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """What is wrong with FlexAttention here, values and gradients against attention segment by
    segment; None if nothing.

    Its kernels are compiled for each device, dtype and head size, and not every combination exists
    everywhere. Rows of two lengths are tried, for at the second they are compiled for rows of any
    length.
    """
    generator = torch.Generator().manual_seed(0)
    module, errors = nn.Module().eval(), []
    module.num_key_value_groups = heads // kv_heads
    try:
        for segments, n in (
            ([[0, 150, 150, 40], [0, 150, 190, 9], [199, 3, 202, 60]], 262),
            ([[0, 300, 300, 50], [0, 300, 350, 40]], 390),
        ):
            draw = lambda heads, n=n: torch.randn(1, heads, n, head_size, generator=generator).to(
                device, dtype
            )  # noqa: E731
            inputs, weight, found = (
                [draw(heads), draw(kv_heads), draw(kv_heads)],
                draw(heads).transpose(1, 2),
                [],
            )
            segments = torch.tensor(segments)[None, None]
            for mask in (segments, block_mask(block_table(segments, n), device)):
                leaves = [tensor.clone().requires_grad_() for tensor in inputs]
                output, _ = segment_attention(module, *leaves, mask, scaling=head_size**-0.5)
                found.append(
                    [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]
                )
            errors += [
                ((ours - theirs).norm() / theirs.norm()).item() for theirs, ours in zip(*found)
            ]
    except Exception as failure:  # compilers and kernels fail in ways of their own
        return f"FlexAttention fails here ({first_line(failure)})"
    bound = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    worst = torch.tensor(errors).max().item()  # NaN if any is
    return (
        None
        if worst < bound
        else f"FlexAttention is off by {worst:.2g} here, values or gradients, relative"
    )


def window_of(config) -> int | None:
    """The smallest attention window of an architecture, in tokens; None where every layer sees
    everything."""
    if config.model_type == "gpt_neo":
        return config.window_size if "local" in config.attention_layers else None
    return (
        getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True)
        else None
    )


OWN_LOOPS = {"GPTJAttention", "GPTNeoSelfAttention"}


def _instead_of_own_loop(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None
) -> tuple[Tensor, None]:
    """`_attn` of GPT-J and GPT-Neo for segments; their own for anything else. Returns (1, heads,
    tokens, head size)."""
    if not isinstance(attention_mask, BlockMask) and (
        attention_mask is None or attention_mask.dtype != torch.int64
    ):
        return type(module)._attn(module, query, key, value, attention_mask)
    local = (
        getattr(module, "attention_type", None) == "local"
    )  # GPT-Neo: every other layer, and no scaling
    scaling = 1 / float(module.scale_attn) if hasattr(module, "scale_attn") else 1.0
    options = {"scaling": scaling, "sliding_window": module.config.window_size if local else None}
    output, _ = segment_attention(
        module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **options
    )
    return output.transpose(1, 2), None
