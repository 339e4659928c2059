"""The losses: tensors in, tensors out.

A loss is one function here (or in a file of yours, `loss.module=`) and one yaml in `config/loss/`;
no other file knows its name. docs/losses.md says when to use which, with usual values of the
settings. Notation, as in the DPO paper (arXiv:2305.18290): w chosen, l rejected, pi and ref the
log-probs of a response under policy and reference, d = pi - ref its log-ratio, n its length,
h = d_w - d_l the gap of a pair, S the logistic sigmoid. Log-probs are sums over response tokens,
EOS included; the formula says where they are divided by n. All tensors are float64: a summed
log-probability near -400 carries 3e-5 of rounding in float32.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import preflab.objective.sums  # noqa: F401  registers sums of losses
from preflab.objective.ranges import Between, NonNegative, Positive
from preflab.objective.registry import register_loss
from preflab.objective.types import LossOutput, Pair, Side, Target
from utils import ConfigError, DataError

Beta = Annotated[float, Positive]  # inverse temperature of the implicit reward
Weight = Annotated[float, NonNegative]
FlipRate = Annotated[float, Between(0, 0.5)]  # assumed share of flipped labels
Momentum = Annotated[float, Between(0, 1)]  # share of the old value in a running mean
LogFlipRate = Annotated[float, Between(0, 0.5, "()", "its logarithm enters")]
PointName = Literal["batch", "mismatched"]  # which responses KTO's z is from
Sharpness = Annotated[float, Between(0, 1, "(]", "above 1, exp(-x) outgrows its weight S(x / tau)")]


def _gap(pair: Pair) -> Tensor:
    """h, (pairs,)."""
    return pair.chosen_logratio - pair.rejected_logratio


def _normalized_gap(pair: Pair) -> Tensor:
    """d_w/n_w - d_l/n_l, (pairs,)."""
    chosen, rejected = pair.chosen, pair.rejected
    return chosen.logratio / chosen.lengths - rejected.logratio / rejected.lengths


def _calibration(pair: Pair, beta: float) -> Tensor:
    """(d_w - 1/(2 beta))^2 + (d_l + 1/(2 beta))^2, (pairs,)."""
    target = 1 / (2 * beta)
    return (pair.chosen_logratio - target) ** 2 + (pair.rejected_logratio + target) ** 2


def _scaled(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """beta d_w and beta d_l, (pairs,) each: the logged rewards of every loss with a reference."""
    return beta * pair.chosen_logratio, beta * pair.rejected_logratio


def _output(pair: Pair, losses: Tensor, beta: float, **more) -> LossOutput:
    return LossOutput(losses, *_scaled(pair, beta), **more)


def _cross_entropy(x: Tensor, right: Tensor | float, wrong: Tensor | float) -> Tensor:
    """-right log S(x) - wrong log S(-x)."""
    return -right * F.logsigmoid(x) - wrong * F.logsigmoid(-x)


@register_loss("sft", reads={"lengths"}, examples="targets")
def sft(target: Target, *, reduction: Literal["sum", "mean"] = "sum") -> LossOutput:
    """-pi of the data's SFT target, or -pi/n with reduction="mean": supervised fine-tuning."""
    losses = -target.policy_logps
    return LossOutput(losses / target.lengths if reduction == "mean" else losses)


def _dpo_reads(settings: Mapping) -> set:
    return set() if settings.get("reference_free") else {"reference"}


@register_loss("dpo", reads=_dpo_reads)
def dpo(
    pair: Pair, *, beta: Beta, label_smoothing: FlipRate = 0.0, reference_free: bool = False
) -> LossOutput:
    """-(1-e) log S(beta h) - e log S(-beta h) (DPO, arXiv:2305.18290 eq. 7; e > 0: conservative
    DPO).

    label_smoothing: e. reference_free: ref is 0 everywhere, and no reference is built.
    """
    chosen = pair.policy_chosen_logps if reference_free else pair.chosen_logratio
    rejected = pair.policy_rejected_logps if reference_free else pair.rejected_logratio
    losses = _cross_entropy(beta * (chosen - rejected), 1 - label_smoothing, label_smoothing)
    return LossOutput(losses, beta * chosen, beta * rejected)


def _ipo_reads(settings: Mapping) -> set:
    return {"reference", "lengths"} if settings.get("average_log_prob") else {"reference"}


@register_loss("ipo", reads=_ipo_reads)
def ipo(pair: Pair, *, beta: Beta, average_log_prob: bool = False) -> LossOutput:
    """(h - 1/(2 beta))^2 (IPO, arXiv:2310.12036 eq. 17, beta for its tau).

    average_log_prob: d/n in place of d (what the authors ran), so that the target gap does not
    depend on length. The logged rewards stay those of the sums, to compare with other losses.
    """
    gap = _normalized_gap(pair) if average_log_prob else _gap(pair)
    return _output(pair, (gap - 1 / (2 * beta)) ** 2, beta)


ODPO_OFFSETS = {
    "log": lambda chosen, rejected: torch.log(chosen - rejected),
    "ratio": lambda chosen, rejected: torch.log(chosen / rejected),
    "identity": lambda chosen, rejected: chosen - rejected,
    "log1p": lambda chosen, rejected: torch.log1p(chosen - rejected),
}
OffsetName = Literal["log", "ratio", "identity", "log1p", "none"]


def _odpo_offset(chosen: Tensor, rejected: Tensor, name: str, names=()) -> Tensor:
    """f(s_w, s_l), (pairs,); raises DataError naming the example where it is undefined."""
    bad = chosen <= rejected
    needs = "a chosen score above the rejected one"
    if name == "ratio":
        bad = bad | (chosen <= 0) | (rejected <= 0)
        needs = "positive scores, the chosen one above the rejected one"
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise DataError(
            f"loss=odpo with offset={name} needs {needs}, but {names[i] if names else f'pair {i}'}"
            f" has {chosen[i].item()} and {rejected[i].item()}; correct the data, set"
            " min_gap above 0, which drops such pairs, or use loss.offset=none"
        )
    return ODPO_OFFSETS[name](chosen, rejected)


def _odpo_offset_name(settings: Mapping) -> str:
    name = settings.get("offset", "log")
    if settings.get("ratio") and name not in ("log", "ratio"):
        raise ConfigError(
            f"loss.ratio=true and loss.offset={name} contradict each other; set one of them"
        )
    return "ratio" if settings.get("ratio") else name


def _odpo_reads(settings: Mapping) -> set:
    return {"reference"} if _odpo_offset_name(settings) == "none" else {"reference", "scores"}


def _describe_odpo_offsets(chosen_scores, rejected_scores, names, *, alpha=1.0, **settings) -> str:
    f = alpha * _odpo_offset(chosen_scores, rejected_scores, _odpo_offset_name(settings), names)
    low, middle, high = f.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=f.dtype)).tolist()
    relaxed = (f < 0).double().mean().item()
    line = (
        f"odpo offsets alpha*f of {len(f):,} pairs: 5% {low:.3g}, median {middle:.3g}, 95%"
        f" {high:.3g}"
    )
    if not relaxed:
        return line
    return f"{line}; {relaxed:.0%} are negative, which relaxes the margin rather than demanding one"


@register_loss("odpo", reads=_odpo_reads, inspect_scores=_describe_odpo_offsets)
def odpo(
    pair: Pair, *, beta: Beta, alpha: Weight = 1.0, offset: OffsetName = "log", ratio: bool = False
) -> LossOutput:
    """-log S(beta h - alpha f(s_w, s_l)) (ODPO, arXiv:2402.10571), s the scores that came with the
    data.

    offset: f is log(s_w - s_l) by "log", log(s_w / s_l) by "ratio" (also by ratio=true), s_w - s_l
    by "identity", log(1 + s_w - s_l) by "log1p", 0 by "none". Raises DataError naming the example
    for a gap that is not positive, or with ratio a score that is not.
    """
    name = _odpo_offset_name({"offset": offset, "ratio": ratio})
    if name == "none":
        return _output(pair, -F.logsigmoid(beta * _gap(pair)), beta)
    f = alpha * _odpo_offset(pair.chosen_scores, pair.rejected_scores, name, pair.names)
    losses = -F.logsigmoid(beta * _gap(pair) - f)
    return _output(pair, losses, beta, metrics={"offset_{split}": f})


@register_loss("soft-label", reads={"reference", "scores"})
def soft_label(pair: Pair, *, beta: Beta, gamma: Weight = 1.0) -> LossOutput:
    """-p log S(beta h) - (1-p) log S(-beta h), p = S(gamma (s_w - s_l)): the cross-entropy of DPO's
    Bradley-Terry model (arXiv:2305.18290 eq. 6) with that of the scores s.

    gamma: inverse temperature of the scores; at 0 every pair is a coin toss.
    """
    p = torch.sigmoid(gamma * (pair.chosen_scores - pair.rejected_scores))
    losses = _cross_entropy(beta * _gap(pair), p, 1 - p)
    return _output(pair, losses, beta, metrics={"preference_{split}/mean": p})


@register_loss("cal-dpo", reads={"reference"})
def cal_dpo(pair: Pair, *, beta: Beta, cal_weight: Weight = 1.0) -> LossOutput:
    """-log S(h) + lambda ((d_w - 1/(2 beta))^2 + (d_l + 1/(2 beta))^2), lambda = cal_weight, no
    beta inside the sigmoid (Cal-DPO, arXiv:2412.14516, its algorithm)."""
    losses = -F.logsigmoid(_gap(pair)) + cal_weight * _calibration(pair, beta)
    return _output(pair, losses, beta)


@register_loss("tdpo", reads={"reference", "token_kl"})
def tdpo(pair: Pair, *, beta: Beta, alpha: Weight = 0.5, if_tdpo2: bool = True) -> LossOutput:
    """Token-level DPO (arXiv:2404.11999): `tdpo2` by default, `tdpo1` with if_tdpo2=false.

    K_w, K_l: KL(reference || policy) over the whole vocabulary, summed over response positions.
    """
    kl_w, kl_l = pair.chosen_kl, pair.rejected_kl
    margin = alpha * (kl_l - kl_w.detach()) if if_tdpo2 else kl_l - kl_w
    kl = {"chosen": kl_w, "rejected": kl_l, "margin": kl_l - kl_w}
    metrics = {f"kl_{{split}}/{name}": value for name, value in kl.items()}
    return _output(pair, -F.logsigmoid(beta * (_gap(pair) - margin)), beta, metrics=metrics)


@register_loss("tdpo1", reads={"reference", "token_kl"})
def tdpo1(pair: Pair, *, beta: Beta) -> LossOutput:
    """-log S(beta (h - (K_l - K_w))), gradient through both K (TDPO1, arXiv:2404.11999)."""
    return tdpo(pair, beta=beta, if_tdpo2=False)


@register_loss("tdpo2", reads={"reference", "token_kl"})
def tdpo2(pair: Pair, *, beta: Beta, alpha: Weight = 0.5) -> LossOutput:
    """-log S(beta (h - alpha (K_l - stopgrad(K_w)))) (TDPO2, arXiv:2404.11999); alpha=0 is DPO."""
    return tdpo(pair, beta=beta, alpha=alpha)


def _margin_column(settings: Mapping) -> set:
    return {settings["margin"]} if settings.get("margin") else set()


@register_loss("bradley_terry", reads={"scalar_head"}, columns=_margin_column)
def bradley_terry(pair: Pair, *, margin: str | None = None) -> LossOutput:
    """-log S(r_w - r_l - m), r the output of a scalar head (Bradley and Terry, 1952;
    arXiv:2203.02155).

    margin: null (m = 0), or the numeric column of the data that holds m (arXiv:2307.09288).
    """
    chosen, rejected = pair.chosen_values, pair.rejected_values
    gap = chosen - rejected if margin is None else chosen - rejected - pair.columns[margin]
    return LossOutput(-F.logsigmoid(gap), chosen, rejected)


@register_loss("robust", reads={"reference"})
def robust(pair: Pair, *, beta: Beta, label_smoothing: FlipRate = 0.1) -> LossOutput:
    """(-(1-e) log S(beta h) + e log S(-beta h)) / (1 - 2e), e = label_smoothing (rDPO,
    arXiv:2403.00409): its mean is DPO's loss on the true labels if a share e of them is flipped."""
    e = label_smoothing
    losses = _cross_entropy(beta * _gap(pair), 1 - e, -e) / (1 - 2 * e)
    return _output(pair, losses, beta)


@register_loss("hinge", reads={"reference"})
def hinge(pair: Pair, *, beta: Beta, margin: Weight = 1.0) -> LossOutput:
    """max(0, margin - beta h) (SLiC's hinge, arXiv:2305.10425, on log-ratios as in RSO,
    arXiv:2309.06657)."""
    return _output(pair, F.relu(margin - beta * _gap(pair)), beta)


@register_loss("exo", reads={"reference"})
def exo(pair: Pair, *, beta: Beta, label_smoothing: LogFlipRate = 1e-3) -> LossOutput:
    """q log(q / (1-e)) + (1-q) log((1-q) / e), q = S(beta h), e = label_smoothing (EXO-pref,
    arXiv:2402.00856 eq. 16): KL(policy's preference || label), the reverse of DPO's direction."""
    x, e = beta * _gap(pair), label_smoothing
    chosen = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-e))
    rejected = torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(e))
    return _output(pair, chosen + rejected, beta)


@register_loss("discopop", reads={"reference"})
def discopop(pair: Pair, *, beta: Beta, tau: Sharpness = 0.05) -> LossOutput:
    """(1-m) (-log S(x)) + m exp(-x), x = beta h, m = S(x / tau) (DiscoPOP, arXiv:2406.08414 eq. 5):
    logistic for pairs in the wrong order, exponential for the others, not convex between."""
    x = beta * _gap(pair)
    # m exp(-x) in one exponential: alone, neither factor need be finite.
    exponential = torch.exp(F.logsigmoid(x / tau) - x)
    return _output(pair, torch.sigmoid(-x / tau) * -F.logsigmoid(x) + exponential, beta)


@register_loss("sppo", reads={"reference"})
def sppo(pair: Pair, *, beta: Beta) -> LossOutput:
    """(d_w - 1/(2 beta))^2 + (d_l + 1/(2 beta))^2 (SPPO, arXiv:2405.00675 eq. 4.7, with win rates 1
    and 0 instead of estimated ones; 1/beta is its eta)."""
    return _output(pair, _calibration(pair, beta), beta)


@register_loss("nca", reads={"reference"})
def nca(pair: Pair, *, beta: Beta) -> LossOutput:
    """-log S(beta d_w) - (log S(-beta d_w) + log S(-beta d_l))/2 (NCA for pairs, arXiv:2402.05369):
    the chosen reward is pulled to beta d_w = log 2."""
    chosen, rejected = _scaled(pair, beta)
    losses = -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2
    return LossOutput(losses, chosen, rejected)


@register_loss("apo_zero", reads={"reference"})
def apo_zero(pair: Pair, *, beta: Beta) -> LossOutput:
    """1 - S(beta d_w) + S(beta d_l) (APO-zero, arXiv:2408.06266 eq. 7): one up, one down."""
    chosen, rejected = _scaled(pair, beta)
    return LossOutput(torch.sigmoid(-chosen) + torch.sigmoid(rejected), chosen, rejected)


@register_loss("apo_down", reads={"reference"})
def apo_down(pair: Pair, *, beta: Beta) -> LossOutput:
    """S(beta d_w) + 1 - S(beta h) (APO-down, arXiv:2408.06266 eq. 8): both go down."""
    chosen, rejected = _scaled(pair, beta)
    losses = torch.sigmoid(chosen) + torch.sigmoid(-beta * _gap(pair))
    return LossOutput(losses, chosen, rejected)


@register_loss("rdpo", reads={"reference", "lengths"})
def rdpo(pair: Pair, *, beta: Beta, alpha: Weight = 0.01) -> LossOutput:
    """-log S(beta h + alpha (n_w - n_l)) (length-regularised DPO, arXiv:2403.19159): DPO for the
    reward minus alpha nats a token."""
    lengths = pair.chosen_lengths - pair.rejected_lengths
    return _output(pair, -F.logsigmoid(beta * _gap(pair) + alpha * lengths), beta)


@register_loss("sigmoid_norm", reads={"reference", "lengths"})
def sigmoid_norm(pair: Pair, *, beta: Beta) -> LossOutput:
    """-log S(beta (d_w/n_w - d_l/n_l)) (length-normalised DPO, Tulu 3, arXiv:2411.15124); the
    logged rewards stay beta times the sums."""
    return _output(pair, -F.logsigmoid(beta * _normalized_gap(pair)), beta)


@register_loss("dpop", reads={"reference"})
def dpop(pair: Pair, *, beta: Beta, penalty_weight: Weight = 50.0) -> LossOutput:
    """-log S(beta (h - lambda max(0, ref_w - pi_w))), lambda = penalty_weight (DPO-Positive, Smaug,
    arXiv:2402.13228)."""
    penalty = F.relu(-pair.chosen_logratio)
    losses = -F.logsigmoid(beta * _gap(pair) - beta * penalty_weight * penalty)
    return _output(pair, losses, beta, metrics={"penalty_{split}/mean": penalty})


@register_loss("wpo", reads={"reference", "lengths", "collision"})
def wpo(pair: Pair, *, beta: Beta) -> LossOutput:
    """-w log S(beta h), w = min(1, w_w w_l), w_y = exp(mean over tokens of (log pi(y_t) - log sum_v
    pi(v)^2)), no gradient through w (WPO, arXiv:2406.11827 eq. 2): a pair counts by the chance
    that the policy writes it now, against what a draw from the policy expects at each position."""
    with torch.no_grad():
        chosen = (pair.policy_chosen_logps - pair.chosen_collision) / pair.chosen_lengths
        rejected = (pair.policy_rejected_logps - pair.rejected_collision) / pair.rejected_lengths
        weight = torch.exp((chosen + rejected).clamp(max=0))
    losses = -weight * F.logsigmoid(beta * _gap(pair))
    return _output(pair, losses, beta, metrics={"weight_{split}/mean": weight})


@register_loss("simpo", reads={"lengths"})
def simpo(pair: Pair, *, beta: Beta, gamma: Weight = 1.0) -> LossOutput:
    """-log S(beta (pi_w/n_w - pi_l/n_l) - gamma) (SimPO, arXiv:2405.14734); the logged reward is
    beta pi/n."""
    chosen = beta * pair.policy_chosen_logps / pair.chosen_lengths
    rejected = beta * pair.policy_rejected_logps / pair.rejected_lengths
    return LossOutput(-F.logsigmoid(chosen - rejected - gamma), chosen, rejected)


# A mean log-prob above this is one that float32 cannot tell from 0.
SURE = -torch.finfo(torch.float32).eps


@register_loss("orpo", reads={"lengths"})
def orpo(pair: Pair, *, or_weight: Weight = 0.1) -> LossOutput:
    """-p_w - lambda log S(o_w - o_l), o = p - log(1 - exp p), p = pi/n (ORPO, arXiv:2403.07691).

    or_weight: lambda. The paper has no reward; logged are the log-odds o. Where float32 cannot tell
    p from 0 the odds are those of its precision.
    """
    p_w, p_l = (side.policy_logps / side.lengths for side in (pair.chosen, pair.rejected))
    o_w, o_l = (p - torch.log(-torch.expm1(p)) for p in (p_w.clamp(max=SURE), p_l.clamp(max=SURE)))
    return LossOutput(-p_w - or_weight * F.logsigmoid(o_w - o_l), o_w, o_l)


@register_loss("cpo")
def cpo(pair: Pair, *, beta: Beta, nll_weight: Weight = 1.0) -> LossOutput:
    """-log S(beta (pi_w - pi_l)) - lambda pi_w, lambda = nll_weight (CPO, arXiv:2401.08417 eq. 3
    for the first term); the logged reward is beta pi."""
    chosen, rejected = beta * pair.policy_chosen_logps, beta * pair.policy_rejected_logps
    losses = -F.logsigmoid(chosen - rejected) - nll_weight * pair.policy_chosen_logps
    return LossOutput(losses, chosen, rejected)


@register_loss("slic", reads={"lengths"})
def slic(pair: Pair, *, delta: Weight = 1.0, nll_weight: Weight = 0.1) -> LossOutput:
    """max(0, delta - pi_w + pi_l) - lambda pi_w/n_w, lambda = nll_weight (SLiC-HF,
    arXiv:2305.10425, whose second term is on the SFT target); the logged reward is pi."""
    chosen, rejected = pair.policy_chosen_logps, pair.policy_rejected_logps
    losses = F.relu(delta - chosen + rejected) - nll_weight * chosen / pair.chosen_lengths
    return LossOutput(losses, chosen, rejected)


def _running_mean(pair: Pair, name: str, now: Tensor, momentum: float) -> Tensor:
    """The running mean `name` with the mean `now` of this batch taken in; the first batch starts
    it. In evaluation it is that of training, with the evaluation's batch taken in, and stays."""
    return momentum * pair.running[name] + (1 - momentum) * now if name in pair.running else now


@register_loss("bco", reads={"reference"}, couples_batch=True)
def bco(pair: Pair, *, beta: Beta, momentum: Momentum = 0.9) -> LossOutput:
    """-log S(beta d_w - delta) - log S(-(beta d_l - delta)) (BCO, arXiv:2404.04656), delta a
    running mean of the rewards beta d of both sides, no gradient through it."""
    chosen, rejected = _scaled(pair, beta)
    delta = _running_mean(pair, "delta", torch.cat([chosen, rejected]).mean().detach(), momentum)
    losses = -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)
    metrics = {"shift_{split}/mean": delta.expand_as(losses)}
    return LossOutput(losses, chosen, rejected, metrics, running={"delta": delta})


@register_loss("beta-dpo", reads={"reference"}, couples_batch=True)
def beta_dpo(
    pair: Pair,
    *,
    beta: Beta,
    alpha: Weight = 0.6,
    momentum: Momentum = 0.9,
    smallest: Beta = 1e-3,
) -> LossOutput:
    """-log S(b h), b = max(smallest, beta (1 + alpha (mean(h) - M))) (beta-DPO, arXiv:2407.08639),
    M a running mean of mean(h), no gradient through b.

    M has taken in this batch, so momentum=0 is DPO, as is alpha=0. The paper's filter, which drops
    pairs of unusual h, is not here. The logged rewards are beta times the log-ratios, not b times.
    """
    gap = _gap(pair)
    mean = gap.mean().detach()
    usual = _running_mean(pair, "gap", mean, momentum)
    b = (beta * (1 + alpha * (mean - usual))).clamp(min=smallest)
    losses = -F.logsigmoid(b * gap)
    metrics = {"beta_{split}/mean": b.expand_as(losses)}
    return _output(pair, losses, beta, metrics=metrics, running={"gap": usual})


def _reference_point(sides: list[Side], name: str) -> Tensor:
    """KTO's z: a mean log-ratio over the batch, at least 0, without gradient."""
    of_sides = [side.logratio if name == "batch" else side.mismatched for side in sides]
    return torch.cat(of_sides).mean().clamp(min=0).detach()


def _kto_reads(settings: Mapping) -> set:
    return {"reference"} | ({"mismatched"} if settings.get("point") == "mismatched" else set())


@register_loss("kto", reads=_kto_reads, couples_batch=True)
def kto(
    pair: Pair,
    *,
    beta: Beta,
    desirable_weight: Weight = 1.0,
    undesirable_weight: Weight = 1.0,
    point: PointName = "batch",
) -> LossOutput:
    """(lambda_D (1 - S(beta (d_w - z))) + lambda_U (1 - S(beta (z - d_l)))) / 2 (KTO,
    arXiv:2402.01306), chosen desirable, rejected not.

    point: z, an estimate of KL(pi || ref), is max(0, mean of d) over the responses of the batch by
    "batch", and over responses put to other prompts of the batch by "mismatched", as in the paper.
    The mean over both responses of a pair, so that the same responses one by one (`kto_unpaired`)
    give the same.
    """
    chosen, rejected = pair.chosen_logratio, pair.rejected_logratio
    z = _reference_point([pair.chosen, pair.rejected], point)
    desirable = desirable_weight * torch.sigmoid(beta * (z - chosen))
    undesirable = undesirable_weight * torch.sigmoid(beta * (rejected - z))
    losses = (desirable + undesirable) / 2
    return _output(pair, losses, beta, metrics={"kl_{split}/estimate": z.expand_as(losses)})


@register_loss(
    "kto_unpaired",
    reads=lambda settings: _kto_reads(settings) | {"scores"},
    examples="responses",
    couples_batch=True,
)
def kto_unpaired(
    target: Target,
    *,
    beta: Beta,
    desirable_weight: Weight = 1.0,
    undesirable_weight: Weight = 1.0,
    threshold: float = 0.5,
    point: PointName = "batch",
) -> LossOutput:
    """lambda_D (1 - S(beta (d - z))) of a desirable response, lambda_U (1 - S(beta (z - d))) of
    another (KTO, arXiv:2402.01306), for responses that need not come in pairs; z as in `kto`.

    threshold: a response is desirable where its score is above it. Logged are beta d as
    rewards_{split}/all and, as accuracy, how often d lies on the label's side of z.
    """
    logratio = target.logratio
    z = _reference_point([target], point)
    desirable = target.scores > threshold
    above = beta * (logratio - z)
    losses = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-above),
        undesirable_weight * torch.sigmoid(above),
    )
    right = torch.where(above == 0, 0.5, ((above > 0) == desirable).double())
    metrics = {
        "rewards_{split}/all": beta * logratio,
        "rewards_{split}/accuracies": right,
        "kl_{split}/estimate": z.expand_as(losses),
        "desirable_{split}/share": desirable.double(),
    }
    return LossOutput(losses, metrics=metrics)
