"""The losses of lists: all responses of a prompt and their scores at once.

As in `losses.py`, a loss is one function here and one yaml in `config/loss/`. Notation, beside that
of `losses.py`: the K responses of a prompt have scores s_i, log-ratios d_i and rewards
x_i = beta d_i. Sums and softmaxes are over the responses of one list; `loss.all_pairs=true` makes a
loss of lists from any loss of pairs. Responses with equal scores are not ordered: exchanging them
changes nothing. All tensors are float64, (lists, longest list); the mask says where responses are.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from preflab.objective.ranges import NonNegative, Positive
from preflab.objective.ranks import discounts, order_of, positions
from preflab.objective.registry import register_loss
from preflab.objective.types import LossOutput, Ranking
from utils import DataError

Beta = Annotated[float, Positive]  # inverse temperature of the implicit reward
Temperature = Annotated[float, Positive]  # of the scores, in their unit
Weight = Annotated[float, NonNegative]


def _rewards(ranking: Ranking, beta: float) -> Tensor:
    """x, (lists, longest)."""
    return beta * ranking.logratio


def _log_softmax(values: Tensor, mask: Tensor) -> Tensor:
    """Log-probs of the responses of each list, (lists, longest); 0 where there is no response."""
    return values.masked_fill(~mask, -torch.inf).log_softmax(1).masked_fill(~mask, 0)


def _softmax(values: Tensor, mask: Tensor) -> Tensor:
    """Probabilities of the responses of each list, (lists, longest)."""
    return _log_softmax(values, mask).exp() * mask


def _gaps(values: Tensor) -> Tensor:
    """v_i - v_j, (lists, longest, longest)."""
    return values[:, :, None] - values[:, None, :]


@register_loss("plackett-luce", reads={"reference", "scores"}, examples="lists")
def plackett_luce(ranking: Ranking, *, beta: Beta) -> LossOutput:
    """-sum_i log(exp x_i / (exp x_i + sum_{s_j < s_i} exp x_j)) (DPO's Plackett-Luce model,
    arXiv:2305.18290 appendix A.3): DPO for two responses. A response competes with those of a lower
    score alone, so ties take no side; the paper has none."""
    x = _rewards(ranking, beta)
    itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    competing = x[:, None, :].masked_fill(~(ranking.better | itself), -torch.inf)
    return LossOutput((competing.logsumexp(2) - x).sum(1), rewards=x)


def _check_gains(chosen_scores: Tensor, rejected_scores: Tensor, names, **settings) -> str:
    high = chosen_scores.argmax()
    if chosen_scores[high] > 100:
        raise DataError(
            f"loss=lipo weighs pairs by 2^score, and {names[int(high)]} has a score of"
            f" {chosen_scores[high].item():g}; scores are at most 100 here, and from 0 to 1 in the"
            " paper: scale them"
        )
    gaps = torch.exp2(chosen_scores) - torch.exp2(rejected_scores)
    low, middle, top = gaps.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=gaps.dtype)).tolist()
    return f"lipo gains of {len(gaps):,} pairs: 5% {low:.3g}, median {middle:.3g}, 95% {top:.3g}"


def _swaps(x: Tensor, mask: Tensor) -> Tensor:
    """|1/D(tau_i) - 1/D(tau_j)|, (lists, longest, longest), D = log(1 + .), tau the positions in
    the order of x. Where some x are tied, as at the start of a run, the mean over all their orders.
    """
    order = order_of(x, mask)
    chance = positions(order, mask)
    discount = discounts(x.shape[1], x.device)
    swaps = chance @ (discount[:, None] - discount).abs() @ chance.mT
    # Two tied responses are never at the same position.
    n_tied = ((order == 0) & mask[:, None, :]).sum(2, keepdim=True)
    return torch.where(order == 0, swaps * n_tied / (n_tied - 1).clamp(min=1), swaps)


@register_loss("lipo", reads={"reference", "scores"}, examples="lists", inspect_scores=_check_gains)
def lipo(ranking: Ranking, *, beta: Beta) -> LossOutput:
    """-sum_{s_i > s_j} (2^s_i - 2^s_j) |1/D(tau_i) - 1/D(tau_j)| log S(x_i - x_j), D(t) = log(1+t),
    tau the positions in the order of x, without gradient (LiPO-lambda, arXiv:2402.01878): DPO on
    all pairs, with the weight that exchanging the two has in DCG."""
    x = _rewards(ranking, beta)
    weights = _gaps(torch.exp2(ranking.scores)) * _swaps(x.detach(), ranking.mask)
    losses = -(weights * F.logsigmoid(_gaps(x))).masked_fill(~ranking.better, 0)
    return LossOutput(losses.sum((1, 2)), rewards=x)


@register_loss("info-nca", reads={"reference", "scores"}, examples="lists")
def info_nca(ranking: Ranking, *, beta: Beta, alpha: Temperature = 1.0) -> LossOutput:
    """-sum_i p_i log softmax_i(x), p = softmax(s / alpha) (InfoNCA, arXiv:2402.05369): the
    cross-entropy of the scores' distribution with the policy's; `soft-label` for two responses."""
    x, mask = _rewards(ranking, beta), ranking.mask
    p = _softmax(ranking.scores / alpha, mask)
    return LossOutput(-(p * _log_softmax(x, mask)).sum(1), rewards=x)


@register_loss("nca-list", reads={"reference", "scores"}, examples="lists")
def nca_list(ranking: Ranking, *, beta: Beta, alpha: Temperature = 1.0) -> LossOutput:
    """-sum_i (p_i log S(x_i) + log S(-x_i) / K), p = softmax(s / alpha) (NCA, arXiv:2402.05369):
    the reward of each response is pulled to log(K p_i); `nca` for two with alpha -> 0."""
    x, mask = _rewards(ranking, beta), ranking.mask
    p = _softmax(ranking.scores / alpha, mask)
    losses = p * F.logsigmoid(x) + mask * F.logsigmoid(-x) / mask.sum(1, keepdim=True)
    return LossOutput(-losses.sum(1), rewards=x)


@register_loss("exo-list", reads={"reference", "scores"}, examples="lists")
def exo_list(ranking: Ranking, *, beta: Beta, alpha: Temperature = 1.0) -> LossOutput:
    """KL(q || p), q = softmax(x), p = softmax(s / alpha) (EXO with rewards, arXiv:2402.00856):
    the reverse of the direction of `info-nca`; `exo` for two, with e = S(-(s_w - s_l) / alpha)."""
    x, mask = _rewards(ranking, beta), ranking.mask
    log_q, log_p = _log_softmax(x, mask), _log_softmax(ranking.scores / alpha, mask)
    return LossOutput((mask * log_q.exp() * (log_q - log_p)).sum(1), rewards=x)


@register_loss("swepo", reads={"reference", "scores"}, examples="lists")
def swepo(ranking: Ranking, *, beta: Beta, alpha: Weight = 1.0) -> LossOutput:
    """-log(sum_{s_i > m} w_i exp x_i / sum_i w_i exp x_i), w_i = exp(alpha |s_i - m|), m the mean
    score of the list (SWEPO, arXiv:2412.04628): responses above the mean against all, the more the
    farther they are from it; DPO for two responses."""
    x, scores, mask = _rewards(ranking, beta), ranking.scores, ranking.mask
    mean = (scores * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    log_shares = _log_softmax(x + alpha * (scores - mean).abs(), mask)
    above = ((scores > mean) & mask) | (ranking.best > 0)  # the best one, whatever the rounding
    losses = -log_shares.masked_fill(~above, -torch.inf).logsumexp(1)
    return LossOutput(losses, rewards=x)


@register_loss("rrhf", reads={"lengths", "scores"}, examples="lists")
def rrhf(ranking: Ranking, *, nll_weight: Weight = 1.0) -> LossOutput:
    """sum_{s_i > s_j} max(0, p_j - p_i) - lambda pi_b, p = pi/n, b the response with the highest
    score, lambda = nll_weight (RRHF, arXiv:2304.05302); of several best ones the mean.
    The logged reward is p."""
    p = ranking.policy_logps / ranking.lengths
    hinges = F.relu(-_gaps(p)).masked_fill(~ranking.better, 0).sum((1, 2))
    likelihood = (ranking.best * ranking.policy_logps).sum(1)
    return LossOutput(hinges - nll_weight * likelihood, rewards=p)
