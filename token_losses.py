"""The losses that weigh the tokens of a response: sums over tokens with a weight for each.

As in `losses.py`, a loss is one function here and one yaml in `config/loss/`. Notation, beside that
of `losses.py`: t is a place in a response, pi_t and ref_t the log-probs of its token there, and
d_t = pi_t - ref_t. Tensors of tokens are float64, (pairs, longest response); behind the end of a
response they are 0, and n says where that is. Logged rewards are beta d of the whole responses.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from preflab.objective.ranges import Between, NonNegative, Positive
from preflab.objective.registry import register_loss
from preflab.objective.types import LossOutput, Pair, Side

Beta = Annotated[float, Positive]  # inverse temperature of the implicit reward
Weight = Annotated[float, NonNegative]
Share = Annotated[float, Between(0, 1, "[]")]
Seed = Annotated[int, Between(0, 2**63)]
TOKENS = {"token_logps", "lengths"}
LOG_RATIOS = TOKENS | {"reference", "reference_token_logps"}


def _places(side: Side) -> Tensor:
    """0, 1, 2, ... for the tokens of each response, (pairs, longest)."""
    return torch.arange(side.token_logps.shape[1], device=side.lengths.device).expand_as(
        side.token_logps
    )


def _is_token(side: Side) -> Tensor:
    """Where a response has tokens, (pairs, longest)."""
    return _places(side) < side.lengths[:, None]


def _token_logratios(side: Side) -> Tensor:
    """d_t, (pairs, longest)."""
    return side.token_logps - side.reference_token_logps


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t v_t / sum_t w_t, (pairs,); 0 where all weights are 0."""
    total = weights.sum(1)
    return (weights * values).sum(1) / torch.where(total > 0, total, 1)


def _output(pair: Pair, losses: Tensor, beta: float, **metrics: Tensor) -> LossOutput:
    """The loss of a gap of log-ratios."""
    rewards = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    return LossOutput(losses, *rewards, metrics=metrics)


@register_loss("ld-dpo", reads=LOG_RATIOS)
def ld_dpo(pair: Pair, *, beta: Beta, alpha: Share = 0.5) -> LossOutput:
    """-log S(beta (g_w - g_l)), g = sum_{t <= m} d_t + alpha sum_{t > m} d_t, m = min(n_w, n_l)
    (LD-DPO, arXiv:2409.06411): the tokens that the longer response has more count alpha. 1 is DPO,
    0 leaves them out."""
    shorter = torch.minimum(pair.chosen_lengths, pair.rejected_lengths)[:, None]

    def logratio(side: Side) -> Tensor:
        weights = alpha + (1 - alpha) * (_places(side) < shorter).double()
        return (weights * _is_token(side) * _token_logratios(side)).sum(1)

    gap = logratio(pair.chosen) - logratio(pair.rejected)
    return _output(pair, -F.logsigmoid(beta * gap), beta)


# Multipliers of splitmix64 and of a multiplicative hash, as signed 64-bit integers.
GOLDEN, FIRST, SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's mixing of 64-bit integers; its shifts fill with zeros, as those of unsigned
    ones."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shifted(x, 30)) * FIRST
    x = (x ^ shifted(x, 27)) * SECOND
    return x ^ shifted(x, 31)


def _digest(side: Side) -> Tensor:
    """An integer for each response, (pairs,), a function of its tokens and their order."""
    numbered = _mixed(side.tokens + 1 + GOLDEN * (_places(side) + 1))
    return _mixed((numbered * _is_token(side)).sum(1))


def _drawn(side: Side, n: Tensor, key: Tensor) -> Tensor:
    """n tokens of each response, drawn without replacement, (pairs, longest) of 0 and 1.

    n, key (pairs,): the draw is a function of the key and of the lengths alone, not of the order
    of pairs, of padding or of the device.
    """
    draws = _mixed(key[:, None] + GOLDEN * (_places(side) + 1))
    last = torch.iinfo(torch.int64).max
    order = draws.masked_fill(~_is_token(side), last).argsort(dim=1, stable=True)
    return (order.argsort(1) < n[:, None]).double()


@register_loss("sampo", reads=LOG_RATIOS | {"tokens"})
def sampo(pair: Pair, *, beta: Beta, seed: Seed = 0) -> LossOutput:
    """-log S(beta (g_w - g_l)), g the sum of d_t over m = min(n_w, n_l) tokens of the response,
    drawn without replacement (SamPO, arXiv:2406.10957): both sums have as many terms.

    seed: of the draw, which is a function of it and of the tokens of the two responses.
    """
    m = torch.minimum(pair.chosen_lengths, pair.rejected_lengths)
    key = _mixed(_mixed(_digest(pair.chosen) + seed) + _digest(pair.rejected))

    def logratio(side: Side, key: Tensor) -> Tensor:
        return (_drawn(side, m, key) * _token_logratios(side)).sum(1)

    gap = logratio(pair.chosen, _mixed(key)) - logratio(pair.rejected, _mixed(key + 1))
    return _output(pair, -F.logsigmoid(beta * gap), beta)


@register_loss("confpo", reads=TOKENS)
def confpo(pair: Pair, *, beta: Beta, gamma: Weight = 1.0) -> LossOutput:
    """-log S(beta (p_w - p_l) - gamma), p the mean of pi_t over the tokens whose probability is
    below the mean probability of the response's tokens, no gradient through the choice (ConfPO,
    arXiv:2506.08712): SimPO on the tokens of which the policy is least sure.

    The loss is 0 where one of the responses has no such token. The logged reward is beta p.
    """

    def unsure(side: Side) -> Tensor:
        probabilities = side.token_logps.detach().exp() * _is_token(side)
        mean = probabilities.sum(1) / side.lengths
        return ((probabilities < mean[:, None]) & _is_token(side)).double()

    sides = pair.chosen, pair.rejected
    used = [unsure(side) for side in sides]
    chosen, rejected = (
        beta * _mean(side.token_logps, of_side) for side, of_side in zip(sides, used, strict=True)
    )
    both = used[0].any(1) & used[1].any(1)
    losses = -F.logsigmoid(chosen - rejected - gamma) * both
    shares = [of_side.sum(1) / side.lengths for side, of_side in zip(sides, used, strict=True)]
    return LossOutput(
        losses, chosen, rejected, metrics={"tokens_{split}/share": (shares[0] + shares[1]) / 2}
    )


@register_loss("tis-dpo", reads=LOG_RATIOS | {"token_weights"})
def tis_dpo(pair: Pair, *, beta: Beta) -> LossOutput:
    """-log S(beta (g_w - g_l)), g = sum_t w_t d_t, w the token weights that came with the data
    (TIS-DPO, arXiv:2410.04350, without the term of its sequential KL, which the released code does
    not use by default): with weights of 1 it is DPO."""
    gap = (pair.chosen_token_weights * _token_logratios(pair.chosen)).sum(1) - (
        pair.rejected_token_weights * _token_logratios(pair.rejected)
    ).sum(1)
    return _output(pair, -F.logsigmoid(beta * gap), beta)


@register_loss("sepo", reads=TOKENS | {"token_weights"})
def sepo(pair: Pair, *, beta: Beta, gamma: Weight = 0.0) -> LossOutput:
    """-log S(beta (p_w - p_l) - gamma), p = sum_t w_t pi_t / sum_t w_t, w the token weights that
    came with the data, 1 for selected tokens and 0 for others (SePO, arXiv:2408.13518, beta for its
    gamma; our gamma is SimPO's margin, 0 in the paper). The logged reward is beta p, 0 for a
    response without a selected token."""
    chosen = beta * _mean(pair.chosen.token_logps, pair.chosen_token_weights)
    rejected = beta * _mean(pair.rejected.token_logps, pair.rejected_token_weights)
    return LossOutput(-F.logsigmoid(chosen - rejected - gamma), chosen, rejected)
