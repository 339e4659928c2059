"""Lets the models of transformers read packed rows, see packed_attention.py.

Most of them look their attention function up by name, and get ours. Some compute attention in a
module of their own, of which the attention, or the whole forward pass, is replaced.
"""

import sys
import types

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from preflab.batching.packed_attention import (
    EAGER_NAME,
    NAME,
    allow_recompilations,
    causal_mask,
    is_packed,
    segment_attention,
    split_trees,
)

# The architectures whose layers were compared, shared against padded, for values and gradients
# (tests/test_layouts.py). Others are tried at the start, see modeling/architecture_trial.py.
SHARING = {
    "bloom",
    "cohere2",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "mpt",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
}


def enable(model: nn.Module) -> None:
    """Let a transformers model accept segments, or a mask of `block_mask`, as its attention mask.

    With any other mask, in generation for example, it attends as before.
    """
    allow_recompilations()
    for name, mask in ((NAME, sdpa_mask), (EAGER_NAME, _finite_mask)):
        AttentionInterface.register(name, segment_attention)
        AttentionMaskInterface.register(name, mask)
    own = [(module, _OWN[type(module).__name__]) for module in _modules(model, _OWN)]
    for module, (name, function) in own:
        setattr(module, name, types.MethodType(function, module))
    if not own:
        model.set_attn_implementation(NAME if model._supports_sdpa else EAGER_NAME)


def _finite_mask(*arguments, dtype: torch.dtype = torch.float32, **options) -> Tensor:
    """The additive mask of transformers, finite also after a float64 model's conversion to float32
    in the softmax: a padding token that sees padding only would be NaN, and spread."""
    dtype = torch.float32 if dtype == torch.float64 else dtype
    return eager_mask(*arguments, dtype=dtype, **options)


def by_segments_only(model: nn.Module) -> str:
    """Why packed rows of a model never attend by FlexAttention; empty where they may."""
    if _modules(model, _IN_PIECES):
        return "the model computes attention in its own module"
    if not model._supports_sdpa and not _modules(model, _OWN):
        return "the model has soft caps or sinks in its attention"
    return ""


def window_of(config) -> int | None:
    """The smallest attention window of an architecture, in tokens; None where every layer sees the
    whole text."""
    if config.model_type == "gpt_neo":
        return config.window_size if "local" in config.attention_layers else None
    if not getattr(config, "use_sliding_window", True):
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def _modules(model: nn.Module, classes) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in classes]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None
) -> tuple[Tensor, None]:
    """`_attn` of GPT-J and GPT-Neo for segments and block masks, and the module's own for any other
    mask. Returns (1, heads, tokens, head size)."""
    if not is_packed(attention_mask):
        return type(module)._attn(module, query, key, value, attention_mask)
    # GPT-J divides by `scale_attn`. GPT-Neo does not scale, and every other layer is local.
    scaling = 1 / float(module.scale_attn) if hasattr(module, "scale_attn") else 1.0
    is_local = getattr(module, "attention_type", None) == "local"
    window = module.config.window_size if is_local else None
    query, key = query.to(value.dtype), key.to(value.dtype)
    output, _ = segment_attention(
        module, query, key, value, attention_mask, scaling=scaling, sliding_window=window
    )
    return output.transpose(1, 2), None


# ------------------------------------------------------------------------- modules run in pieces


class _Prompt:
    """Stands in for the cache of transformers: the first piece leaves its keys and values here, and
    those of the prompt come before the keys and values of each other response."""

    def __init__(self, length: int):
        self.length, self.states = length, None

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if self.states is None:
            self.states = key[:, :, : self.length], value[:, :, : self.length]
            return key, value
        prompt_key, prompt_value = self.states
        return torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)

    def get_seq_length(self) -> int:
        return 0 if self.states is None else self.length


@torch.compiler.disable  # as attention by segments is
def _in_pieces(module: nn.Module, segments: Tensor, rows: list[Tensor], run) -> tuple[Tensor, None]:
    """The module's own forward pass, piece by piece: a prompt with its first response, then each
    other response with the prompt's keys and values as its cache.

    rows: inputs (1, tokens, ...), split into pieces. run(pieces, mask, prompt): calls the module.
    mask: additive, (1, 1, tokens of the piece, keys). A key stands at its position in its text, so
    biases by position (ALiBi) are those of the keys 0, 1, ...
    """
    trees = split_trees(segments)
    longest = max(prompt + length for prompt, lengths in trees for length in lengths)
    causal = causal_mask(longest, None, rows[0].dtype, rows[0].device)
    sizes = []
    for prompt, (first, *others) in trees:
        sizes += [prompt + first, *filter(None, others)]
    pieces = zip(*(row.split(sizes, dim=1) for row in rows), strict=True)
    outputs = []
    for length, (first, *others) in trees:
        prompt = _Prompt(length)
        for begin, end in [(0, length + first), *((length, length + n) for n in others if n)]:
            mask = causal[:, :, begin:end, :end]
            outputs.append(run(next(pieces), mask, prompt)[0])
    return torch.cat(outputs, dim=1), None


def _bloom(module, hidden, residual, alibi, attention_mask, **options):
    """`forward` of BLOOM's attention. alibi: (heads, 1, keys)."""
    forward = type(module).forward
    if not is_packed(attention_mask):
        return forward(module, hidden, residual, alibi, attention_mask, **options)

    def run(pieces, mask, prompt):
        return forward(module, *pieces, alibi[..., : mask.shape[-1]], mask, layer_past=prompt)

    return _in_pieces(module, attention_mask, [hidden, residual], run)


def _bloom_alibi(module, attention_mask, heads, dtype):
    """`build_alibi_tensor` of BLOOM's body: over the positions of the longest text."""
    if is_packed(attention_mask):
        attention_mask = _longest_text(attention_mask)
    return type(module).build_alibi_tensor(module, attention_mask, heads, dtype)


def _longest_text(segments: Tensor) -> Tensor:
    """The padded mask (1, tokens) of the longest prompt and response."""
    length = int((segments[..., 1] + segments[..., 3]).max())
    return torch.ones(1, length, dtype=torch.int64, device=segments.device)


def _mpt(module, hidden, position_bias, past_key_values=None, attention_mask=None, **options):
    """`forward` of MPT's attention, whose mask is True where a key is hidden."""
    forward = type(module).forward
    if not is_packed(attention_mask):
        return forward(module, hidden, position_bias, past_key_values, attention_mask, **options)

    def run(pieces, mask, prompt):
        return forward(module, *pieces, position_bias, prompt, mask < 0)

    return _in_pieces(module, attention_mask, [hidden], run)


class _Segments(Tensor):
    """Segments that a conversion to bool leaves alone."""

    def to(self, *arguments, **options):
        return self if arguments == (torch.bool,) else super().to(*arguments, **options)


def _mpt_body(module, *arguments, attention_mask=None, **options):
    """`forward` of MPT's body, which converts the mask to bool."""
    if is_packed(attention_mask):
        attention_mask = attention_mask.as_subclass(_Segments)
    return type(module).forward(module, *arguments, attention_mask=attention_mask, **options)


def _falcon(module, hidden, alibi, attention_mask, position_embeddings=None, **options):
    """`forward` of Falcon's attention. With ALiBi, which `_falcon_body` leaves to this, the mask
    has the biases too."""
    forward = type(module).forward
    options["position_embeddings"] = position_embeddings
    if not is_packed(attention_mask):
        return forward(module, hidden, alibi, attention_mask, **options)
    has_alibi = module.config.alibi
    if has_alibi:
        text = _longest_text(attention_mask)
        build = sys.modules[type(module).__module__].build_alibi_tensor
        alibi = build(text, module.num_heads, hidden.dtype).to(hidden.device)

    def run(pieces, mask, prompt):
        piece, *rotary = pieces
        bias = None
        if has_alibi:
            bias = alibi[..., : mask.shape[-1]]
            mask = (bias * module.inv_norm_factor)[None].masked_fill(mask < 0, mask.min())
        options = {"layer_past": prompt, "position_embeddings": rotary}
        return forward(module, piece, bias, mask, **options)

    return _in_pieces(module, attention_mask, [hidden, *position_embeddings], run)


def _falcon_body(module, *arguments, attention_mask=None, **options):
    """`forward` of Falcon's body, which builds ALiBi from a mask of two dimensions."""
    module.use_alibi = module.config.alibi and not is_packed(attention_mask)
    return type(module).forward(module, *arguments, attention_mask=attention_mask, **options)


# Modules that attend by themselves, whatever `attn_implementation` is, and what holds such modules:
# the method that is replaced, and by what.
_IN_PIECES = {
    "BloomAttention": ("forward", _bloom),
    "BloomModel": ("build_alibi_tensor", _bloom_alibi),
    "FalconAttention": ("forward", _falcon),
    "FalconModel": ("forward", _falcon_body),
    "MptAttention": ("forward", _mpt),
    "MptModel": ("forward", _mpt_body),
}
_OWN = {
    "GPTJAttention": ("_attn", _attend),
    "GPTNeoSelfAttention": ("_attn", _attend),
    **_IN_PIECES,
}
