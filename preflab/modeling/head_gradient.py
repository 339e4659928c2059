"""Norms of the gradient of log-probs by the weight of the LM head, without a backward pass."""

import torch
from torch import Tensor

from preflab.modeling.fused_head import LogitStep, chunk_slices


@torch.no_grad()
def head_gradient_norms(
    head: torch.nn.Module, step: LogitStep, hidden: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    """|d/dW sum_t weights[g, t] log p(t)| of each group g of tokens, (groups,) float64, where W
    (V, H) is the weight of the head as a linear layer.

    hidden (T, H), targets (T,), weights (groups, T). step: what the architecture does to logits.
    Hidden states are taken as given, so the input embeddings of a tied model add nothing. The sums
    take the memory of (groups, V, H) numbers in fp32 or better.

    With z the logits before the step: d log p(t) / dW = (onehot(t) - p) dstep/dz outer hidden.
    """
    totals = None
    for piece in chunk_slices(hidden, len(head(hidden[:1])[0]), buffers=2):
        logits = head(hidden[piece])
        logits = step.apply_(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        slopes = step.slope(logits)
        by_logit = logits.softmax(-1).neg_()
        by_logit.scatter_add_(1, targets[piece, None], torch.ones_like(by_logit[:, :1]))
        by_logit.mul_(slopes)
        states = hidden[piece].to(by_logit)
        if totals is None:
            shape = len(weights), by_logit.shape[1], states.shape[1]
            totals = by_logit.new_zeros(shape)
        for total, of_group in zip(totals, weights[:, piece].to(by_logit), strict=True):
            total.addmm_(by_logit.t(), of_group[:, None] * states)
    return torch.stack([total.double().norm() for total in totals])
