"""The head of a language model and what is read from its distribution, with a backward pass of its own."""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**25  # logits in flight: 128 MiB in fp32


KEPT_ELEMENTS = (
    2**26
)  # probabilities kept for the backward pass: 256 MiB; where there are more, all are computed again


ON_A_GPU = 4  # times as many of both: a chunk reads the whole head, and writes its gradient


class Tokens(NamedTuple):
    """What is known of each scored token, (tokens,) each; None where not asked for."""

    logps: Tensor
    kl: Tensor | None
    entropy: Tensor | None
    reference_logps: Tensor | None
    collision: Tensor | None


def together(chunks: list[Tokens]) -> Tokens:
    return Tokens(*(None if column[0] is None else torch.cat(column) for column in zip(*chunks)))


def chunk_slices(hidden: Tensor, vocabulary: int, buffers: int = 1) -> list[slice]:
    """The tokens of `hidden` in chunks whose logits, `buffers` times, fit into CHUNK_ELEMENTS."""
    n, step = len(hidden), max(1, _here(CHUNK_ELEMENTS, hidden) // (vocabulary * buffers))
    return [slice(begin, min(begin + step, n)) for begin in range(0, n, step)]


def _here(elements: int, hidden: Tensor) -> int:
    return elements * (ON_A_GPU if hidden.device.type == "cuda" else 1)


class LinearLogProbs(torch.autograd.Function):
    """Linear layer, log-softmax, and what is read off it, in one: the logits of a chunk are
    overwritten by each next step.

    hidden (tokens, hidden size), weight (vocabulary, hidden size), bias (vocabulary,) or None,
    targets (tokens,); the same of the reference, without gradient; kl, entropy and collision as in
    `score_responses`. Returns the fields of `Tokens`, all but log-probs and KL without gradient.
    With p and q the distributions of policy and reference and z the policy's logits: d log p(t) /
    dz = onehot(t) - p, d KL(q || p) / dz = p - q, d KL(p || q) / dz = p (log p/q - KL).
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
    ):
        inputs = hidden, weight, bias, targets, reference_hidden, reference_weight, reference_bias
        ctx.save_for_backward(*inputs)
        ctx.kl, ctx.kept = kl, []
        pieces = chunk_slices(hidden, len(weight), 1 if kl is None else 4)
        keep = (
            differentiable
            and any(ctx.needs_input_grad)
            and len(hidden) * len(weight) * (1 if kl is None else 2) <= _here(KEPT_ELEMENTS, hidden)
        )
        chunks = []
        for piece in pieces:
            tokens, kept = _forward_chunk(inputs, piece, kl, entropy, collision)
            chunks.append(tokens)
            if keep:
                ctx.kept.append(kept)
            del kept
        tokens = together(chunks)
        ctx.mark_non_differentiable(*(column for column in tokens[2:] if column is not None))
        return tuple(tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps, grad_kl, *_):
        inputs = ctx.saved_tensors
        hidden, weight, bias, targets = inputs[:4]
        wanted = [
            tensor is not None and needed
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad)
        ]
        grads = [torch.empty_like(hidden) if wanted[0] else None, None, None]
        with torch.autocast(hidden.device.type, enabled=False):
            for piece in chunk_slices(hidden, len(weight), 1 if ctx.kl is None else 4):
                # What was kept is overwritten here, so a second backward pass computes it again.
                kept = (
                    ctx.kept.pop(0)
                    if ctx.kept
                    else _forward_chunk(inputs, piece, ctx.kl, False, False)[1]
                )
                slope = _logit_gradient(
                    kept,
                    targets[piece],
                    grad_logps[piece],
                    None if ctx.kl is None else grad_kl[piece],
                )
                slope = slope.to(weight.dtype)
                if wanted[0]:
                    torch.mm(slope, weight, out=grads[0][piece])
                if wanted[1]:
                    grads[1] = _add_product(grads[1], slope.t(), hidden[piece])
                if wanted[2]:
                    grads[2] = slope.sum(
                        0, dtype=torch.promote_types(slope.dtype, torch.float32)
                    ) + (0 if grads[2] is None else grads[2])
                del kept, slope
        return *grads, *[None] * 8


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, the sum in fp32 or better whatever a and b are."""
    if total is None:
        return a @ b
    if total.dtype == torch.promote_types(total.dtype, torch.float32):
        return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)
    return total.float().add_(a @ b)


def _forward_chunk(
    inputs, piece: slice, kl: str | None, entropy: bool, collision: bool
) -> tuple[Tokens, tuple]:
    """The tokens of a chunk, and what its backward pass needs."""
    hidden, weight, bias, targets, *reference = inputs
    logits = _linear(hidden[piece], weight, bias)
    picked = logits.gather(1, targets[piece, None])
    p, log_total = _softmax_(logits if kl is None else logits.clone())
    logps = (picked - log_total).squeeze(1)
    token_entropy = torch.special.entr(p).sum(1) if entropy else None
    token_collision = (
        _dot(p, p).log() if collision else None
    )  # at least 1/vocabulary, so it cannot underflow
    if kl is None:
        return Tokens(logps, None, token_entropy, None, token_collision), (None, p)
    reference_logits = _linear(reference[0][piece], *reference[1:])
    q, reference_log_total = _softmax_(reference_logits.clone())
    ratio = logits.sub_(log_total).sub_(reference_logits.sub_(reference_log_total))  # log p/q
    reference_logps = reference_logits.gather(1, targets[piece, None]).squeeze(1)
    if kl == "reference||policy":
        return Tokens(logps, -_dot(q, ratio), token_entropy, reference_logps, token_collision), (
            kl,
            p,
            q,
        )
    token_kl = _dot(p, ratio)
    return Tokens(logps, token_kl, token_entropy, reference_logps, token_collision), (
        kl,
        p,
        ratio.sub_(token_kl[:, None]),
    )


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in fp32 or better."""
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if bias is None else logits.add_(bias)


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (tokens, vocabulary) overwritten by their softmax, and their log-sum-exp (tokens,
    1)."""
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    return logits.div_(total), largest + total.log()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, without writing the products down."""
    return torch.bmm(a[:, None], b[:, :, None]).flatten()


def _logit_gradient(
    kept: tuple, targets: Tensor, grad_logps: Tensor, grad_kl: Tensor | None
) -> Tensor:
    """Gradient with respect to the logits of a chunk, in the memory of its probabilities."""
    kl, p, *other = kept
    a = grad_logps[:, None].to(p.dtype)
    if kl is None:
        slope = p.mul_(-a)
    elif kl == "reference||policy":
        g = grad_kl[:, None].to(p.dtype)
        slope = p.mul_(g - a).sub_(other[0].mul_(g))
    else:
        g = grad_kl[:, None].to(p.dtype)
        slope = p.mul_(other[0].mul_(g).sub_(a))
    return slope.scatter_add_(1, targets[:, None], a)
