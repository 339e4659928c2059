"""Further losses of pairs: variants of those in `losses.py`, published since.

As there, a loss is one function here and one yaml in `config/loss/`, with the same notation: d a
log-ratio, h = d_w - d_l the gap, p = pi/n a mean log-prob per token, S the logistic sigmoid. All
tensors are float64, (pairs,).
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from preflab.objective.ranges import Between, NonNegative, Positive
from preflab.objective.registry import register_loss
from preflab.objective.types import LossOutput, Pair
from utils import ConfigError, DataError

Beta = Annotated[float, Positive]  # inverse temperature of the implicit reward
Weight = Annotated[float, NonNegative]
Share = Annotated[float, Between(0, 1, "(]")]
Momentum = Annotated[float, Between(0, 1)]  # share of the old value in a running mean
LARGEST_EXPONENT = 80.0  # exp of it is 5.5e34; beyond it a loss has no slope


def _gap(pair: Pair) -> Tensor:
    """h."""
    return pair.chosen_logratio - pair.rejected_logratio


def _means(pair: Pair) -> tuple[Tensor, Tensor]:
    """p_w and p_l: the policy's mean log-prob of a token of each response."""
    chosen = pair.policy_chosen_logps / pair.chosen_lengths
    return chosen, pair.policy_rejected_logps / pair.rejected_lengths


def _output(pair: Pair, losses: Tensor, beta: float, **more) -> LossOutput:
    """With the logged rewards of every loss that has a reference, beta d."""
    return LossOutput(losses, beta * pair.chosen_logratio, beta * pair.rejected_logratio, **more)


def _bounded_exp(exponent: Tensor) -> Tensor:
    return torch.exp(exponent.clamp(max=LARGEST_EXPONENT))


# ---------------------------------------------------------------------- functions of the log-ratios


@register_loss("chi-po", reads={"reference"})
def chi_po(pair: Pair, *, beta: Beta, r_max: Beta = 10.0) -> LossOutput:
    """-log S(clip(beta (f(d_w) - f(d_l)), -2 r_max, 2 r_max)), f(d) = exp(d) + d (chi-PO,
    arXiv:2407.13399, algorithm 1): DPO with a chi-squared penalty beside the KL.

    r_max: the largest reward that is expected. Pairs beyond the clip have no gradient.
    """
    chosen, rejected = (_bounded_exp(d) + d for d in (pair.chosen_logratio, pair.rejected_logratio))
    x = beta * (chosen - rejected)
    return _output(pair, -F.logsigmoid(x.clamp(-2 * r_max, 2 * r_max)), beta)


@register_loss("h-dpo", reads={"reference"})
def h_dpo(pair: Pair, *, beta: Beta, alpha: Beta = 0.95) -> LossOutput:
    """-log S(beta (alpha (pi_w - pi_l) - (ref_w - ref_l))) (H-DPO, arXiv:2411.07595): the KL's
    entropy term times alpha, so alpha < 1 asks for a sharper policy; 1 is DPO."""
    policy = pair.policy_chosen_logps - pair.policy_rejected_logps
    reference = pair.reference_chosen_logps - pair.reference_rejected_logps
    return _output(pair, -F.logsigmoid(beta * (alpha * policy - reference)), beta)


@register_loss("hypo", reads={"reference"})
def hypo(pair: Pair, *, beta: Beta) -> LossOutput:
    """-log S(beta (pi_w - pi_l - max(0, ref_w - ref_l))) (HyPO, arXiv:2602.11902): DPO, and
    without the reference where it prefers the rejected response."""
    policy = pair.policy_chosen_logps - pair.policy_rejected_logps
    reference = pair.reference_chosen_logps - pair.reference_rejected_logps
    return _output(pair, -F.logsigmoid(beta * (policy - F.relu(reference))), beta)


@register_loss("focal-po", reads={"reference"})
def focal_po(pair: Pair, *, beta: Beta, gamma: Weight = 0.05) -> LossOutput:
    """-q^gamma log q, q = S(beta h) (FocalPO, arXiv:2501.06645): pairs in the wrong order count
    less. gamma=0 is DPO; the slope changes its sign where log q = -1/gamma."""
    log_q = F.logsigmoid(beta * _gap(pair))
    return _output(pair, -torch.exp(gamma * log_q) * log_q, beta)


@register_loss("bpo", reads={"reference"})
def bpo(pair: Pair, *, beta: Beta, alpha: Share = 1.0) -> LossOutput:
    """-log S(beta min(d_w, -alpha d_l)) (BPO, arXiv:2506.03557): whichever of the two responses has
    moved less is moved, so the chosen one is not given up for the gap."""
    least = torch.minimum(pair.chosen_logratio, -alpha * pair.rejected_logratio)
    return _output(pair, -F.logsigmoid(beta * least), beta)


@register_loss("dpo-shift", reads={"reference"})
def dpo_shift(pair: Pair, *, beta: Beta, shift: Share = 0.75) -> LossOutput:
    """-log S(beta (d_w - lambda d_l)), lambda = shift (DPO-Shift, arXiv:2502.07599, its fixed
    lambda): the chosen response gets the larger share of the gradient; 1 is DPO."""
    x = beta * (pair.chosen_logratio - shift * pair.rejected_logratio)
    return _output(pair, -F.logsigmoid(x), beta)


@register_loss("c2-dpo", reads={"reference"})
def c2_dpo(pair: Pair, *, beta: Beta, constraint_weight: Weight = 2e-4) -> LossOutput:
    """-log S(beta h) + lambda (d_w + d_l)^2, lambda = constraint_weight (C2-DPO, arXiv:2502.17507,
    its constraint on log-probs): what one response gains is to be what the other loses."""
    total = pair.chosen_logratio + pair.rejected_logratio
    losses = -F.logsigmoid(beta * _gap(pair)) + constraint_weight * total**2
    return _output(pair, losses, beta, metrics={"displacement_{split}/mean": total})


# --------------------------------------------------------------------------------- with scores


def _spread(values: Tensor) -> str:
    quantiles = torch.tensor([0.05, 0.5, 0.95], dtype=values.dtype)
    low, middle, high = values.quantile(quantiles).tolist()
    return f"5% {low:.3g}, median {middle:.3g}, 95% {high:.3g}"


def _check_score_gaps(chosen_scores, rejected_scores, names, *, scale=1.0, **settings) -> str:
    gaps = (chosen_scores - rejected_scores) / scale
    outside = (gaps < 0) | (gaps > 1)
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        raise DataError(
            "loss=mappo weighs the rejected response by (s_w - s_l) / scale, which must be in"
            f" [0, 1], and {names[i]} has {gaps[i].item():g} (scores {chosen_scores[i].item():g}"
            f" and {rejected_scores[i].item():g}); set loss.scale to the largest gap of the data"
        )
    return f"mappo weights of {len(gaps):,} rejected responses: {_spread(gaps)}"


@register_loss("mappo", reads={"reference", "scores"}, inspect_scores=_check_score_gaps)
def mappo(pair: Pair, *, beta: Beta, scale: Beta = 1.0) -> LossOutput:
    """-log S(beta (d_w - D d_l)), D = (s_w - s_l) / scale (MaPPO, arXiv:2507.21183 eq. 8): the less
    two responses differ in their scores, the less the rejected one is pushed down.

    scale: the range of the scores, 1 in the paper. Gaps outside of it are refused when a run
    starts.
    """
    weight = (pair.chosen_scores - pair.rejected_scores) / scale
    x = beta * (pair.chosen_logratio - weight * pair.rejected_logratio)
    return _output(pair, -F.logsigmoid(x), beta, metrics={"prior_{split}/mean": weight})


@register_loss("rebel", reads={"reference", "scores"})
def rebel(pair: Pair, *, eta: Beta = 1.0) -> LossOutput:
    """(h - eta (s_w - s_l))^2 (REBEL, arXiv:2404.16767, as its code has it): the log-ratios regress
    the scores. Its reference is the policy of the last round (`reference.update=round`).

    The logged rewards are d / eta, in the unit of the scores.
    """
    losses = (_gap(pair) - eta * (pair.chosen_scores - pair.rejected_scores)) ** 2
    return _output(pair, losses, 1 / eta)


def _check_quantiles(chosen_scores, rejected_scores, names, **settings) -> str:
    for scores in (chosen_scores, rejected_scores):
        outside = (scores < 0) | (scores > 1)
        if settings.get("transform", "identity") == "log":
            outside |= scores == 0  # its logarithm enters
        if bool(outside.any()):
            i = int(outside.nonzero()[0])
            raise DataError(
                "loss=qrpo reads quantiles as scores, the share of the reference's own responses"
                " to a prompt that score no higher, from 0 to 1 (above 0 for loss.transform=log),"
                f" and {names[i]} has {scores[i].item():g}; replace the scores of the data by"
                " quantiles"
            )
    quantiles = torch.cat([chosen_scores, rejected_scores])
    return f"qrpo quantiles of {len(quantiles):,} responses: {_spread(quantiles)}"


@register_loss("qrpo", reads={"reference", "scores"}, inspect_scores=_check_quantiles)
def qrpo(
    pair: Pair, *, beta: Beta, transform: Literal["identity", "log"] = "identity"
) -> LossOutput:
    """The mean over both responses of (R(q) - beta log Z - beta d)^2 (QRPO, arXiv:2507.08068), q
    the quantile of a response among those of the reference, Z = E exp(R/beta) over uniform q.

    transform: R(q) is q by "identity" and log q by "log". The data have q as scores; others are
    refused when a run starts.
    """
    inverse = torch.tensor(1 / beta, dtype=torch.float64)
    if transform == "log":
        log_z = -torch.log1p(inverse)
    else:  # log(beta (exp(1/beta) - 1))
        log_z = inverse + torch.log(-torch.expm1(-inverse)) - torch.log(inverse)
    losses = torch.zeros_like(pair.chosen_scores)
    for side in (pair.chosen, pair.rejected):
        reward = side.scores.log() if transform == "log" else side.scores
        losses = losses + (reward - beta * log_z - beta * side.logratio) ** 2 / 2
    return _output(pair, losses, beta)


def _exploration_column(settings) -> set:
    if not settings.get("reference_chosen"):
        raise ConfigError(
            "loss=xpo needs pairs of which one response was drawn from the reference:"
            " loss.reference_chosen names the column that is 1 where that is the chosen one, and 0"
            " where it is the rejected one"
        )
    return {settings["reference_chosen"]}


@register_loss("xpo", reads={"reference"}, columns=_exploration_column)
def xpo(
    pair: Pair, *, beta: Beta, alpha: Weight = 1e-5, reference_chosen: str | None = None
) -> LossOutput:
    """-log S(beta h) + alpha pi(y'), y' the response of the pair that the reference wrote (XPO,
    arXiv:2405.21046): lowering what is known already is a bonus for exploring.

    reference_chosen: the column of the data that is 1 where y' is the chosen response, else 0.
    """
    is_chosen = pair.columns[reference_chosen]
    known = is_chosen * pair.policy_chosen_logps + (1 - is_chosen) * pair.policy_rejected_logps
    return _output(pair, -F.logsigmoid(beta * _gap(pair)) + alpha * known, beta)


# ------------------------------------------------------------------------------ without a reference


@register_loss("simper", reads={"lengths"})
def simper(pair: Pair) -> LossOutput:
    """exp(p_l) - exp(p_w), the difference of the inverse perplexities (SimPER, arXiv:2502.00883);
    it has no setting. The logged reward is exp(p)."""
    chosen, rejected = (torch.exp(p) for p in _means(pair))
    return LossOutput(rejected - chosen, chosen, rejected)


@register_loss("repo", reads={"lengths"})
def repo(pair: Pair, *, gamma: Weight = 0.5) -> LossOutput:
    """max(0, gamma - (p_w - p_l)) (RePO, arXiv:2503.07426): SimPO for beta to infinity. Pairs with
    their margin have no gradient. The logged reward is p."""
    chosen, rejected = _means(pair)
    return LossOutput(F.relu(gamma - (chosen - rejected)), chosen, rejected)


@register_loss("alphapo", reads={"lengths"})
def alphapo(pair: Pair, *, beta: Beta, gamma: Weight = 1.0, alpha: float = 0.25) -> LossOutput:
    """-log S(r_w - r_l - gamma), r = beta (1 - exp(-alpha p)) / alpha (AlphaPO, arXiv:2501.03884):
    SimPO, at alpha=0, with another shape of the reward r, which is logged."""
    if alpha == 0:
        chosen, rejected = (beta * p for p in _means(pair))
    else:
        exponents = ((-alpha * p).clamp(max=LARGEST_EXPONENT) for p in _means(pair))
        chosen, rejected = (-beta / alpha * torch.expm1(exponent) for exponent in exponents)
    return LossOutput(-F.logsigmoid(chosen - rejected - gamma), chosen, rejected)


# -------------------------------------------------------------------------------- over a batch


@register_loss("aot", reads={"reference"}, couples_batch=True)
def aot(pair: Pair, *, beta: Beta) -> LossOutput:
    """-log S(beta (sort(pi_w - pi_l) - sort(ref_w - ref_l))), sorted over the batch (paired AOT,
    arXiv:2406.05882).

    A pair's loss is that of its own margin, against the reference's margin of the same rank.
    """
    margins = pair.policy_chosen_logps - pair.policy_rejected_logps
    reference = (pair.reference_chosen_logps - pair.reference_rejected_logps).sort().values
    ranks = margins.detach().argsort(stable=True).argsort()
    return _output(pair, -F.logsigmoid(beta * (margins - reference[ranks])), beta)


@register_loss("dr-dpo", reads={"reference"}, couples_batch=True)
def dr_dpo(pair: Pair, *, beta: Beta, beta_prime: Beta = 1.0) -> LossOutput:
    """-b log mean_i exp(-l_i / b), l_i = -log S(beta h_i), b = beta_prime (Dr. DPO,
    arXiv:2407.07880): pairs with a large loss, which may be labelled wrongly, count less.

    Each pair of a batch has the loss of the batch; b to infinity is DPO.
    """
    each = -F.logsigmoid(beta * _gap(pair))
    log_mean = torch.logsumexp(-each / beta_prime, 0) - torch.log(each.new_tensor(len(each)))
    metrics = {"loss_{split}/dpo": each}
    return _output(pair, (-beta_prime * log_mean).expand_as(each), beta, metrics=metrics)


@register_loss("kldpo", reads={"reference"}, couples_batch=True)
def kldpo(pair: Pair, *, beta: Beta, tau: Beta = 1.0, largest: Beta = 10.0) -> LossOutput:
    """w_i l_i, l_i = -log S(beta h_i), w_i = min(largest, exp((l_i - mean l) / tau)), no gradient
    through w (KLDPO, arXiv:2502.01930, as its code has it): the worst case of preferences within a
    KL of those of the data, so pairs with a large loss count more."""
    each = -F.logsigmoid(beta * _gap(pair))
    exponent = (each.detach() - each.detach().mean()) / tau
    weight = _bounded_exp(exponent).clamp(max=largest)
    return _output(pair, weight * each, beta, metrics={"weight_{split}/mean": weight})


def _running(pair: Pair, name: str, now: Tensor, momentum: float) -> Tensor:
    """The running mean `name` with this batch taken in; the first batch starts it."""
    return momentum * pair.running[name] + (1 - momentum) * now if name in pair.running else now


@register_loss("alpha-dpo", reads={"reference", "lengths"}, couples_batch=True)
def alpha_dpo(
    pair: Pair,
    *,
    beta: Beta,
    gamma: Weight = 0.375,
    alpha: Weight = 0.05,
    momentum: Momentum = 0.9,
) -> LossOutput:
    """-log S(beta (p_w - p_l) - gamma - beta alpha z), z = (g - m) / s, g = d_w/n_w - d_l/n_l,
    m and s running means of its mean and standard deviation, no gradient through z (alpha-DPO,
    arXiv:2410.10148, as its code has it): SimPO with a target that grows with the gap of a pair.

    alpha=0 is SimPO. m and s have taken in this batch; one pair alone has s = 0, and z = 0.
    """
    p_w, p_l = _means(pair)
    chosen, rejected = pair.chosen, pair.rejected
    g = (chosen.logratio / chosen.lengths - rejected.logratio / rejected.lengths).detach()
    spread = g.std() if len(g) > 1 else torch.zeros_like(g[0])
    m = _running(pair, "gap", g.mean(), momentum)
    s = _running(pair, "spread", spread, momentum)
    z = torch.where(s > 0, (g - m) / torch.where(s > 0, s, 1.0), 0.0)
    margin = gamma + beta * alpha * z
    losses = -F.logsigmoid(beta * (p_w - p_l) - margin)
    metrics = {"margin_{split}/mean": margin}
    return _output(pair, losses, beta, metrics=metrics, running={"gap": m, "spread": s})


def _dynamic_margins(gaps: Tensor, gamma: float, tau: float, n_steps: int = 20) -> Tensor:
    """gamma n p, with p from `n_steps` steps of exponentiated gradient that start uniform."""
    n, rate = len(gaps), min(0.5 / tau, 1.0)
    p = torch.full_like(gaps, 1 / n)
    for _ in range(n_steps):
        slope = gamma * torch.sigmoid(gamma * n * p - gaps)
        p = p * torch.exp(-rate * (tau * (1 + torch.log(n * (p + 1e-10))) + slope))
        p = p / p.sum()
    return gamma * n * p


@register_loss("gamma-po", reads={"lengths"}, couples_batch=True)
def gamma_po(pair: Pair, *, beta: Beta, gamma: Weight = 1.0, tau: Beta = 10.0) -> LossOutput:
    """-log S(g_i - gamma_i), g = beta (p_w - p_l), gamma_i = gamma n p_i, p the distribution over
    the n pairs of the batch that minimises the mean loss + tau KL(p || uniform), without gradient
    (gamma-PO on SimPO, arXiv:2506.03690): pairs with a small margin get a smaller target.

    tau to infinity is SimPO. The logged reward is beta p, as in SimPO.
    """
    chosen, rejected = (beta * p for p in _means(pair))
    gaps = chosen - rejected
    margins = _dynamic_margins(gaps.detach(), gamma, tau)
    metrics = {"margin_{split}/mean": margins}
    return LossOutput(-F.logsigmoid(gaps - margins), chosen, rejected, metrics)
