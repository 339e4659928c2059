"""The LM head fused with the log-softmax, with its own backward pass, a chunk of tokens at a time.

Shapes: T scored tokens, V vocabulary, H hidden size.
"""

import contextlib
import contextvars
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**25  # logits in memory at a time: 128 MiB in fp32

# Probabilities saved for the backward pass: 256 MiB. Where there are more, all are recomputed.
SAVED_ELEMENTS = 2**26

# A GPU gets this many times both budgets: each chunk reads the whole weight of the head and adds to
# its whole gradient, so that small chunks are slow.
GPU_FACTOR = 4

_planned_device = contextvars.ContextVar("planned_device", default=None)


class LogitStep(NamedTuple):
    """What an architecture does to the logits of its linear head: z to cap tanh(scale z / cap), or
    to scale z where there is no cap."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """The logits, overwritten."""
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative, from the logits after the step."""
        if self.cap is None:
            return self.scale
        return (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)


NO_STEPS = LogitStep(), LogitStep()


class TokenScores(NamedTuple):
    """Values of each scored token, (T,) each; None where they are not asked for."""

    logps: Tensor
    kl: Tensor | None
    entropy: Tensor | None
    reference_logps: Tensor | None
    collision: Tensor | None


def concatenate(chunks: list[TokenScores]) -> TokenScores:
    columns = zip(*chunks, strict=True)
    return TokenScores(*(None if column[0] is None else torch.cat(column) for column in columns))


def chunk_slices(hidden: Tensor, vocabulary: int, buffers: int = 1) -> list[slice]:
    """Slices of the T tokens of `hidden` such that `buffers` tensors of a chunk's logits fit into
    CHUNK_ELEMENTS."""
    n_tokens = len(hidden)
    step = max(1, _budget(CHUNK_ELEMENTS, hidden) // (vocabulary * buffers))
    return [slice(begin, min(begin + step, n_tokens)) for begin in range(0, n_tokens, step)]


def _budget(elements: int, hidden: Tensor) -> int:
    device = _planned_device.get() or hidden.device.type
    return elements * (GPU_FACTOR if device == "cuda" else 1)


@contextlib.contextmanager
def planned_on(device: str):
    """Chunks in this context are as large as on this type of device, whatever the tensors' is."""
    before = _planned_device.set(device)
    try:
        yield
    finally:
        _planned_device.reset(before)


class LinearLogProbs(torch.autograd.Function):
    """Linear layer, log-softmax, KL, entropy and collision in one function: each step overwrites
    the logits of a chunk.

    hidden (T, H), weight (V, H), bias (V,) or None, targets (T,); hidden states, weight and bias of
    the reference, which get no gradient; kl, entropy and collision as in `score_responses`.
    differentiable: whether a backward pass may follow. steps: of policy and reference. Returns the
    fields of `TokenScores`; only log-probs and KL have a gradient.

    With p and q the distributions of policy and reference and z the policy's logits after its step:
    d log p(t) / dz = onehot(t) - p
    d KL(q || p) / dz = p - q
    d KL(p || q) / dz = p (log p/q - KL)
    """

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        reference_hidden,
        reference_weight,
        reference_bias,
        kl,
        entropy,
        differentiable=True,
        collision=False,
        steps=NO_STEPS,
    ):
        inputs = hidden, weight, bias, targets, reference_hidden, reference_weight, reference_bias
        ctx.save_for_backward(*inputs)
        ctx.kl, ctx.steps, ctx.saved_chunks = kl, steps, []
        is_capped = steps[0].cap is not None
        n_saved = len(hidden) * len(weight) * ((1 if kl is None else 2) + is_capped)
        save = (
            differentiable
            and any(ctx.needs_input_grad)
            and n_saved <= _budget(SAVED_ELEMENTS, hidden)
        )
        chunks = []
        for piece in chunk_slices(hidden, len(weight), _buffers(kl, steps)):
            scores, saved = _forward_chunk(inputs, piece, kl, entropy, collision, steps)
            chunks.append(scores)
            if save:
                ctx.saved_chunks.append(saved)
            del saved  # before the next chunk is computed
        scores = concatenate(chunks)
        ctx.mark_non_differentiable(*(column for column in scores[2:] if column is not None))
        return tuple(scores)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps, grad_kl, *_):
        inputs = ctx.saved_tensors
        hidden, weight, bias, targets = inputs[:4]
        needs_grad = [
            tensor is not None and needed
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        grad_weight = grad_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            for piece in chunk_slices(hidden, len(weight), _buffers(ctx.kl, ctx.steps)):
                # The saved probabilities are overwritten here, so a second backward pass recomputes
                # them.
                if ctx.saved_chunks:
                    saved = ctx.saved_chunks.pop(0)
                else:
                    _, saved = _forward_chunk(inputs, piece, ctx.kl, False, False, ctx.steps)
                chunk_grad_kl = None if ctx.kl is None else grad_kl[piece]
                grad_logits = _logit_gradient(
                    saved, targets[piece], grad_logps[piece], chunk_grad_kl
                )
                grad_logits = grad_logits.to(weight.dtype)
                if needs_grad[0]:
                    torch.mm(grad_logits, weight, out=grad_hidden[piece])
                if needs_grad[1]:
                    grad_weight = _add_product(grad_weight, grad_logits.t(), hidden[piece])
                if needs_grad[2]:
                    grad_bias = _add_column_sums(grad_bias, grad_logits)
                del saved, grad_logits  # before the next chunk is computed
        return grad_hidden, grad_weight, grad_bias, *[None] * 9


def _buffers(kl: str | None, steps: tuple[LogitStep, LogitStep]) -> int:
    """Number of (chunk, V) tensors in memory at a time: with a KL, the logits and probabilities of
    both models; with a cap, its slope."""
    return (1 if kl is None else 4) + (steps[0].cap is not None)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b; the sum is in fp32 or better, whatever the dtype of a and b."""
    if total is None:
        return a @ b
    if total.dtype == torch.promote_types(total.dtype, torch.float32):
        return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)
    return total.float().add_(a @ b)


def _add_column_sums(total: Tensor | None, values: Tensor) -> Tensor:
    """total + the sums over tokens of (T, V) values, in fp32 or better."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.sum(0, dtype=dtype) + (0 if total is None else total)


def _forward_chunk(
    inputs,
    piece: slice,
    kl: str | None,
    entropy: bool,
    collision: bool,
    steps: tuple[LogitStep, LogitStep],
) -> tuple[TokenScores, tuple]:
    """The scores of a chunk, and what its backward pass needs."""
    hidden, weight, bias, targets, *reference = inputs
    logits = steps[0].apply_(_linear(hidden[piece], weight, bias))
    slope = steps[0].slope(logits)
    target_logits = logits.gather(1, targets[piece, None])
    p, log_total = _softmax_(logits if kl is None else logits.clone())
    logps = (target_logits - log_total).squeeze(1)
    token_entropy = torch.special.entr(p).sum(1) if entropy else None
    # A collision probability is at least 1/V, so it cannot underflow.
    token_collision = _dot(p, p).log() if collision else None
    if kl is None:
        return TokenScores(logps, None, token_entropy, None, token_collision), (None, slope, p)
    reference_hidden, reference_weight, reference_bias = reference
    reference_logits = _linear(reference_hidden[piece], reference_weight, reference_bias)
    steps[1].apply_(reference_logits)
    q, reference_log_total = _softmax_(reference_logits.clone())
    log_ratio = logits.sub_(log_total).sub_(reference_logits.sub_(reference_log_total))  # log p/q
    reference_logps = reference_logits.gather(1, targets[piece, None]).squeeze(1)
    if kl == "reference||policy":
        token_kl = -_dot(q, log_ratio)
        saved = (kl, slope, p, q)
    else:
        token_kl = _dot(p, log_ratio)
        saved = (kl, slope, p, log_ratio.sub_(token_kl[:, None]))
    return TokenScores(logps, token_kl, token_entropy, reference_logps, token_collision), saved


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits (T, V) in fp32 or better."""
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if bias is None else logits.add_(bias)


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V) overwritten by their softmax, and their log-sum-exp (T, 1)."""
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    return logits.div_(total), largest + total.log()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of a and b, (T,), without a tensor for the elementwise products."""
    return torch.bmm(a[:, None], b[:, :, None]).flatten()


def _logit_gradient(
    saved: tuple, targets: Tensor, grad_logps: Tensor, grad_kl: Tensor | None
) -> Tensor:
    """Gradient with respect to the output of the linear layer, (T, V) of a chunk, in the memory of
    its probabilities."""
    kl, slope, p, *rest = saved
    g_logp = grad_logps[:, None].to(p.dtype)
    if kl is None:
        grad_logits = p.mul_(-g_logp)
    elif kl == "reference||policy":
        [q] = rest
        g_kl = grad_kl[:, None].to(p.dtype)
        grad_logits = p.mul_(g_kl - g_logp).sub_(q.mul_(g_kl))
    else:
        [centred_log_ratio] = rest  # log p/q - KL
        g_kl = grad_kl[:, None].to(p.dtype)
        grad_logits = p.mul_(centred_log_ratio.mul_(g_kl).sub_(g_logp))
    grad_logits.scatter_add_(1, targets[:, None], g_logp)
    return grad_logits if isinstance(slope, float) and slope == 1 else grad_logits.mul_(slope)
