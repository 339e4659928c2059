"""Orders of the responses of a list, with ties: their positions, and how far two orders agree.

An order is (lists, longest, longest): 1 where response i is above response j, -1 where it is below,
0 where they are tied and where one of them is padding. Nothing here depends on the order in which
the responses of a list are written.
"""

import torch
from torch import Tensor


def order_of(values: Tensor, mask: Tensor) -> Tensor:
    """The order by values, (lists, longest), with the largest on top. mask: where responses are."""
    signs = torch.sign(values[:, :, None] - values[:, None, :])
    return signs.masked_fill(~(mask[:, :, None] & mask[:, None, :]), 0)


def positions(order: Tensor, mask: Tensor) -> Tensor:
    """The chance of each response to be at each position, (lists, longest, longest): tied responses
    share theirs. 0 for padding."""
    n_above = (order < 0).sum(2, keepdim=True)
    tied = (order == 0) & mask[:, :, None] & mask[:, None, :]
    n_tied = tied.sum(2, keepdim=True)  # a response is tied with itself
    place = torch.arange(mask.shape[1], device=mask.device)
    within = (place >= n_above) & (place < n_above + n_tied)
    return within.double() / n_tied.clamp(min=1)


def discounts(longest: int, device=None) -> Tensor:
    """1 / log(1 + position) of positions 1, 2, ..., (longest,): what a place counts in DCG."""
    return 1 / torch.log(2 + torch.arange(longest, dtype=torch.float64, device=device))


def pair_accuracy(order: Tensor, truth: Tensor) -> Tensor:
    """The share of the pairs that differ in `truth` and have the same order, (lists,). A tie in
    `order` counts one half."""
    differ = (truth > 0).double()
    return (differ * (1 + order) / 2).sum((1, 2)) / differ.sum((1, 2)).clamp(min=1)


def kendall_tau(order: Tensor, truth: Tensor) -> Tensor:
    """Kendall's tau-b, (lists,), from -1 to 1; 0 where everything is tied in one of the two."""
    norm = ((order**2).sum((1, 2)) * (truth**2).sum((1, 2))).sqrt()
    return (order * truth).sum((1, 2)) / norm.clamp(min=1)


def ndcg(order: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Normalised discounted cumulative gain of an order, (lists,), from 0 to 1.

    The gain of a response is its score above the lowest of its list, scores may be negative. 1
    where all scores are equal.
    """
    lowest = scores.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    gains = (scores - lowest).masked_fill(~mask, 0)
    weights = discounts(mask.shape[1], mask.device)
    dcg, ideal = (
        (gains * (positions(by, mask) @ weights)).sum(1) for by in (order, order_of(scores, mask))
    )
    return torch.where(ideal > 0, dcg / ideal.where(ideal > 0, torch.ones_like(ideal)), 1.0)
