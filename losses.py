"""The registry of losses and the losses themselves: tensors in, tensors out.

A loss is one function here or in `more_losses.py` (or in a file of yours, `loss.module=`) and one
yaml in `config/loss/`; no other file knows its name, and docs/losses.md says when to use which.
Notation, as in the DPO paper (arXiv:2305.18290): w chosen, l rejected, d = log pi(y|x) - log
pi_ref(y|x) the log-ratio of a response, h = d_w - d_l the gap of a pair, S the logistic sigmoid, n
a response's length. Sums run over response tokens, EOS included. All tensors are float64: a summed
log-probability near -400 carries 3e-5 of rounding in float32.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from preflab.objective.registry import register_loss
from preflab.objective.types import LossOutput, Pair, Target
from utils import ConfigError, DataError


@register_loss("sft", reads={"lengths"}, examples="targets")
def sft(target: Target, *, reduction: str = "sum") -> LossOutput:
    """-log pi(y|x): supervised fine-tuning on the data's SFT target (prompt excluded, EOS
    included).

    reduction: "sum" over the response's tokens, or "mean", which divides each response by its
    length.
    """
    if reduction not in ("sum", "mean"):
        raise ConfigError(f"loss.reduction={reduction!r}; accepted: sum, mean")
    losses = -target.policy_logps
    return LossOutput(losses / target.lengths if reduction == "mean" else losses)


def _dpo_reads(settings: Mapping) -> set:
    return set() if settings.get("reference_free") else {"reference"}


@register_loss("dpo", reads=_dpo_reads)
def dpo(
    pair: Pair, *, beta: float, label_smoothing: float = 0.0, reference_free: bool = False
) -> LossOutput:
    """-(1-e) log S(beta h) - e log S(-beta h) (DPO, arXiv:2305.18290 eq. 7; e > 0: conservative
    DPO).

    beta: inverse temperature of the implicit reward, > 0; label_smoothing e in [0, 0.5): the
    assumed share of flipped labels; reference_free: the reference is taken as uniform (its
    log-probs as 0) and is not built.
    """
    chosen = pair.policy_chosen_logps if reference_free else pair.chosen_logratio
    rejected = pair.policy_rejected_logps if reference_free else pair.rejected_logratio
    gap = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
    return LossOutput(losses, beta * chosen, beta * rejected)


@register_loss(
    "ipo",
    reads=lambda settings: (
        {"reference", "lengths"} if settings.get("average_log_prob") else {"reference"}
    ),
)
def ipo(pair: Pair, *, beta: float, average_log_prob: bool = False) -> LossOutput:
    """(h - 1/(2 beta))^2 (IPO, arXiv:2310.12036 eq. 17, beta for its tau).

    average_log_prob: each log-ratio is divided by its response's length first (what the authors
    ran), so that the target gap does not depend on length. The logged rewards stay those of the
    sums, to compare with other losses.
    """
    chosen, rejected = pair.chosen_logratio, pair.rejected_logratio
    if average_log_prob:
        gap = chosen / pair.chosen_lengths - rejected / pair.rejected_lengths
    else:
        gap = chosen - rejected
    return LossOutput((gap - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected)


ODPO_OFFSETS = {
    "log": lambda chosen, rejected: torch.log(chosen - rejected),
    "ratio": lambda chosen, rejected: torch.log(chosen / rejected),
    "identity": lambda chosen, rejected: chosen - rejected,
    "log1p": lambda chosen, rejected: torch.log1p(chosen - rejected),
    "none": lambda chosen, rejected: torch.zeros_like(chosen),
}


def odpo_offset(
    chosen_scores: Tensor, rejected_scores: Tensor, offset: str, names: list[str] = ()
) -> Tensor:
    """f(s_w, s_l) of ODPO, (pairs,); raises DataError naming the example where it is undefined."""
    gap = chosen_scores - rejected_scores
    bad = gap <= 0
    if offset == "ratio":
        bad = bad | (chosen_scores <= 0) | (rejected_scores <= 0)
    if offset != "none" and bool(bad.any()):
        i = int(bad.nonzero()[0])
        wanted = "positive scores" if offset == "ratio" else "a chosen score above the rejected one"
        raise DataError(
            f"loss=odpo with offset={offset} needs {wanted}, but"
            f" {names[i] if names else f'pair {i}'} has {chosen_scores[i].item()} and"
            f" {rejected_scores[i].item()}; mend the data or use loss.offset=none"
        )
    return ODPO_OFFSETS[offset](chosen_scores, rejected_scores)


def _odpo_offset_name(settings: Mapping) -> str:
    if settings.get("offset", "log") not in ODPO_OFFSETS:
        raise ConfigError(
            f"loss.offset={settings['offset']!r}; accepted: {', '.join(ODPO_OFFSETS)}"
        )
    if settings.get("ratio") and settings.get("offset", "log") not in ("log", "ratio"):
        raise ConfigError(
            f"loss.ratio=true and loss.offset={settings['offset']} contradict each other; set one"
            " of them"
        )
    return "ratio" if settings.get("ratio") else settings.get("offset", "log")


def _odpo_reads(settings: Mapping) -> set:
    return {"reference"} if _odpo_offset_name(settings) == "none" else {"reference", "scores"}


def _odpo_offsets_at_start(
    chosen_scores, rejected_scores, names, *, alpha, offset="log", ratio=False, **_
) -> str:
    f = odpo_offset(
        chosen_scores, rejected_scores, _odpo_offset_name({"offset": offset, "ratio": ratio}), names
    )
    low, middle, high = (
        (alpha * f).quantile(torch.tensor([0.05, 0.5, 0.95], dtype=f.dtype)).tolist()
    )
    relaxed = (alpha * f < 0).double().mean().item()
    told = (
        f"odpo offsets alpha*f of {len(f):,} pairs: 5% {low:.3g}, median {middle:.3g}, 95%"
        f" {high:.3g}"
    )
    return told + (
        f"; {relaxed:.0%} are negative, which relaxes the margin rather than demanding one"
        if relaxed
        else ""
    )


@register_loss("odpo", reads=_odpo_reads, inspect_scores=_odpo_offsets_at_start)
def odpo(
    pair: Pair, *, beta: float, alpha: float = 1.0, offset: str = "log", ratio: bool = False
) -> LossOutput:
    """-log S(beta h - alpha f(s_w, s_l)) (ODPO, arXiv:2402.10571), s the scores that came with the
    data.

    alpha >= 0: how much of the score gap the policy must reproduce; offset f: log `log(s_w - s_l)`,
    ratio `log(s_w / s_l)` (also by ratio=true), identity `s_w - s_l`, log1p `log(1 + s_w - s_l)`,
    none 0. Raises DataError naming the example for a gap that is not positive, or with ratio a
    score that is not.
    """
    name = _odpo_offset_name({"offset": offset, "ratio": ratio})
    chosen, rejected = pair.chosen_logratio, pair.rejected_logratio
    margin = beta * (chosen - rejected)
    metrics = {}
    if name != "none":
        f = odpo_offset(pair.chosen_scores, pair.rejected_scores, name, pair.names)
        margin = margin - alpha * f
        metrics["offset_{split}"] = alpha * f
    return LossOutput(-F.logsigmoid(margin), beta * chosen, beta * rejected, metrics)


@register_loss("soft-label", reads={"reference", "scores"})
def soft_label(pair: Pair, *, beta: float, gamma: float = 1.0) -> LossOutput:
    """-p log S(beta h) - (1-p) log S(-beta h), p = S(gamma (s_w - s_l)): DPO towards the preference
    that the scores imply.

    The cross-entropy of DPO's Bradley-Terry model (arXiv:2305.18290 eq. 6) with the one of the
    scores. beta: inverse temperature of the implicit reward, > 0; gamma: that of the scores, >= 0
    (0: every pair is a coin toss).
    """
    gap = beta * (pair.chosen_logratio - pair.rejected_logratio)
    p = torch.sigmoid(gamma * (pair.chosen_scores - pair.rejected_scores)).to(gap.dtype)
    losses = -p * F.logsigmoid(gap) - (1 - p) * F.logsigmoid(-gap)
    return LossOutput(
        losses,
        beta * pair.chosen_logratio,
        beta * pair.rejected_logratio,
        {"preference_{split}/mean": p},
    )


@register_loss("cal-dpo", reads={"reference"})
def cal_dpo(pair: Pair, *, beta: float, cal_weight: float = 1.0) -> LossOutput:
    """-log S(h) + lambda ((d_w - 1/(2 beta))^2 + (d_l + 1/(2 beta))^2) (Cal-DPO, arXiv:2412.14516,
    its algorithm).

    There is no beta inside the sigmoid. beta sets the calibration targets +-1/(2 beta); cal_weight
    is lambda (the published code uses 0.5).
    """
    chosen, rejected = pair.chosen_logratio, pair.rejected_logratio
    target = 1 / (2 * beta)
    calibration = (chosen - target) ** 2 + (rejected + target) ** 2
    return LossOutput(
        -F.logsigmoid(chosen - rejected) + cal_weight * calibration, beta * chosen, beta * rejected
    )


def _tdpo(pair: Pair, beta: float, alpha: float, if_tdpo2: bool) -> LossOutput:
    chosen, rejected = pair.chosen_logratio, pair.rejected_logratio
    if if_tdpo2:
        margin = alpha * (pair.rejected_kl - pair.chosen_kl.detach())
    else:
        margin = pair.rejected_kl - pair.chosen_kl
    losses = -F.logsigmoid(beta * (chosen - rejected - margin))
    metrics = {
        "kl_{split}/chosen": pair.chosen_kl,
        "kl_{split}/rejected": pair.rejected_kl,
        "kl_{split}/margin": pair.rejected_kl - pair.chosen_kl,
    }
    return LossOutput(losses, beta * chosen, beta * rejected, metrics)


@register_loss("tdpo", reads={"reference", "token_kl"})
def tdpo(pair: Pair, *, beta: float, alpha: float = 0.5, if_tdpo2: bool = True) -> LossOutput:
    """Token-level DPO (arXiv:2404.11999): `tdpo2` by default, `tdpo1` with if_tdpo2=false.

    K_w, K_l: KL(reference || policy) over the whole vocabulary, summed over response positions.
    """
    return _tdpo(pair, beta, alpha, if_tdpo2)


@register_loss("tdpo1", reads={"reference", "token_kl"})
def tdpo1(pair: Pair, *, beta: float) -> LossOutput:
    """-log S(beta (h - (K_l - K_w))), gradient through both K (TDPO1, arXiv:2404.11999)."""
    return _tdpo(pair, beta, 1.0, False)


@register_loss("tdpo2", reads={"reference", "token_kl"})
def tdpo2(pair: Pair, *, beta: float, alpha: float = 0.5) -> LossOutput:
    """-log S(beta (h - alpha (K_l - stopgrad(K_w)))) (TDPO2, arXiv:2404.11999).

    alpha >= 0: weight of the sequential KL; 0 is DPO.
    """
    return _tdpo(pair, beta, alpha, True)


@register_loss(
    "bradley_terry",
    reads={"scalar_head"},
    columns=lambda settings: {settings["margin"]} if settings.get("margin") else set(),
)
def bradley_terry(pair: Pair, *, margin: str | None = None) -> LossOutput:
    """-log S(r_w - r_l - m) for a reward model with a scalar head (Bradley and Terry, 1952;
    arXiv:2203.02155).

    margin: null (m = 0), or the name of a numeric column of the data that holds m of each pair
    (arXiv:2307.09288).
    """
    gap = pair.chosen_values - pair.rejected_values
    if margin is not None:
        gap = gap - pair.columns[margin]
    return LossOutput(-F.logsigmoid(gap), pair.chosen_values, pair.rejected_values)


def _output(
    pair: Pair,
    losses: Tensor,
    beta: float,
    metrics: dict | None = None,
    running: dict | None = None,
) -> LossOutput:
    """With the logged rewards of every loss that has a reference: beta times the log-ratios of
    sums."""
    return LossOutput(
        losses,
        beta * pair.chosen_logratio,
        beta * pair.rejected_logratio,
        metrics or {},
        running or {},
    )


def _scaled_gap(pair: Pair, beta: float) -> Tensor:
    """beta h, (pairs,)."""
    return beta * (pair.chosen_logratio - pair.rejected_logratio)


@register_loss("robust", reads={"reference"})
def robust(pair: Pair, *, beta: float, label_smoothing: float = 0.1) -> LossOutput:
    """(-(1-e) log S(beta h) + e log S(-beta h)) / (1 - 2e): DPO's loss without the bias that
    flipped labels give it (rDPO, arXiv:2403.00409).

    If a share e of the labels is flipped at random, its expectation is DPO's loss on the true ones.
    Sums over tokens. For data with a known noise rate; conservative DPO (`dpo` with
    label_smoothing) hedges instead. It falls without end as h grows: the slope tends to -beta e /
    (1-2e). beta > 0, 0.01 to 0.5; label_smoothing e in [0, 0.5); 0 is DPO.
    """
    gap = _scaled_gap(pair, beta)
    losses = (-(1 - label_smoothing) * F.logsigmoid(gap) + label_smoothing * F.logsigmoid(-gap)) / (
        1 - 2 * label_smoothing
    )
    return _output(pair, losses, beta)


@register_loss("hinge", reads={"reference"})
def hinge(pair: Pair, *, beta: float, margin: float = 1.0) -> LossOutput:
    """max(0, margin - beta h) (the hinge of SLiC, arXiv:2305.10425, on log-ratios as in RSO,
    arXiv:2309.06657).

    Sums over tokens. A pair that has its margin gives no gradient at all, all others the same. beta
    > 0, 0.01 to 0.5; margin >= 0, in units of beta h. SLiC itself, without a reference, is `slic`.
    """
    return _output(pair, F.relu(margin - _scaled_gap(pair, beta)), beta)


@register_loss("exo", reads={"reference"})
def exo(pair: Pair, *, beta: float, label_smoothing: float = 1e-3) -> LossOutput:
    """q log(q / (1-e)) + (1-q) log((1-q) / e), q = S(beta h) (EXO-pref, arXiv:2402.00856 eq. 16).

    KL(policy's preference || label), the reverse of DPO's direction: it seeks the mode instead of
    covering both. Sums over tokens. Its gradient is small where beta h is far below 0. beta > 0,
    0.01 to 0.5; label_smoothing e in (0, 0.5): the label is (1-e, e), and e = 0 would make the loss
    infinite.
    """
    if not label_smoothing > 0:
        raise ConfigError(
            f"loss.label_smoothing={label_smoothing} of loss=exo must lie in (0, 0.5): its"
            " logarithm enters"
        )
    gap = _scaled_gap(pair, beta)
    chosen = torch.sigmoid(gap) * (F.logsigmoid(gap) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-gap) * (F.logsigmoid(-gap) - math.log(label_smoothing))
    return _output(pair, chosen + rejected, beta)


@register_loss("discopop", reads={"reference"})
def discopop(pair: Pair, *, beta: float, tau: float = 0.05) -> LossOutput:
    """(1-m) (-log S(x)) + m exp(-x), x = beta h, m = S(x / tau) (log-ratio modulated loss,
    DiscoPOP, arXiv:2406.08414 eq. 5).

    Found by a search in which a language model wrote the losses: logistic for pairs in the wrong
    order, exponential for those in the right one, and not convex between. Sums over tokens. beta >
    0, 0.01 to 0.5; tau in (0, 1]: how sharp the change-over is.
    """
    if not 0 < tau <= 1:
        raise ConfigError(
            f"loss.tau={tau} of loss=discopop must lie in (0, 1]: above 1, exp(-x) outgrows its"
            " weight S(x / tau)"
        )
    x = _scaled_gap(pair, beta)
    exponential = torch.exp(
        F.logsigmoid(x / tau) - x
    )  # m exp(-x), neither of which need be finite alone
    return _output(pair, torch.sigmoid(-x / tau) * -F.logsigmoid(x) + exponential, beta)


@register_loss("sppo", reads={"reference"})
def sppo(pair: Pair, *, beta: float) -> LossOutput:
    """(d_w - 1/(2 beta))^2 + (d_l + 1/(2 beta))^2 (SPPO, arXiv:2405.00675 eq. 4.7, with win rates 1
    and 0; 1/beta is its eta).

    Each log-ratio has its own target, so unlike with DPO the chosen response cannot lose
    probability for good. Sums over tokens. Meant for rounds of the policy's own samples; the paper
    estimates win rates, here labels are hard. beta > 0: 0.1 aims at log-ratios of +-5 nats; the
    paper's eta = 1000 is beta=0.001.
    """
    target = 1 / (2 * beta)
    return _output(
        pair, (pair.chosen_logratio - target) ** 2 + (pair.rejected_logratio + target) ** 2, beta
    )


@register_loss("nca", reads={"reference"})
def nca(pair: Pair, *, beta: float) -> LossOutput:
    """-log S(beta d_w) - (log S(-beta d_w) + log S(-beta d_l))/2 (NCA for pairs, arXiv:2402.05369).

    Noise-contrastive: it learns the absolute reward, so the chosen response does not lose
    probability with the rejected one. Sums over tokens. The chosen log-ratio is pulled to beta d_w
    = log 2. beta > 0, 0.01 to 0.1.
    """
    chosen, rejected = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    return _output(
        pair, -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2, beta
    )


@register_loss("apo_zero", reads={"reference"})
def apo_zero(pair: Pair, *, beta: float) -> LossOutput:
    """1 - S(beta d_w) + S(beta d_l) (APO-zero, arXiv:2408.06266 eq. 7).

    Up with the chosen response, down with the rejected one: for a policy that is worse than the
    chosen responses. Sums over tokens; between 0 and 2. beta > 0, 0.01 to 0.5.
    """
    return _output(
        pair,
        torch.sigmoid(-beta * pair.chosen_logratio) + torch.sigmoid(beta * pair.rejected_logratio),
        beta,
    )


@register_loss("apo_down", reads={"reference"})
def apo_down(pair: Pair, *, beta: float) -> LossOutput:
    """S(beta d_w) + 1 - S(beta h) (APO-down, arXiv:2408.06266 eq. 8).

    Down with both, with the rejected response further: for a policy that is better than the chosen
    responses. Sums over tokens; between 0 and 2. beta > 0, 0.01 to 0.5.
    """
    return _output(
        pair,
        torch.sigmoid(beta * pair.chosen_logratio) + torch.sigmoid(-_scaled_gap(pair, beta)),
        beta,
    )


@register_loss("rdpo", reads={"reference", "lengths"})
def rdpo(pair: Pair, *, beta: float, alpha: float = 0.01) -> LossOutput:
    """-log S(beta h + alpha (n_w - n_l)) (length-regularised DPO, arXiv:2403.19159).

    DPO for the reward minus alpha nats a token: where the chosen response is the longer one, its
    length explains a part of the preference and less is left to learn. Sums over tokens. beta > 0,
    0.01 to 0.5; alpha >= 0: 0.01 counts a hundred tokens as one nat; 0 is DPO.
    """
    return _output(
        pair,
        -F.logsigmoid(
            _scaled_gap(pair, beta) + alpha * (pair.chosen_lengths - pair.rejected_lengths)
        ),
        beta,
    )


@register_loss("sigmoid_norm", reads={"reference", "lengths"})
def sigmoid_norm(pair: Pair, *, beta: float) -> LossOutput:
    """-log S(beta (d_w/n_w - d_l/n_l)) (length-normalised DPO, Tulu 3, arXiv:2411.15124).

    Means over tokens in the loss, so a long response weighs no more than a short one; the logged
    rewards stay beta times the sums, as with every loss. beta > 0, larger than DPO's by about a
    response's length: 2 to 10 (Tulu 3: 5).
    """
    return _output(
        pair,
        -F.logsigmoid(
            beta
            * (
                pair.chosen_logratio / pair.chosen_lengths
                - pair.rejected_logratio / pair.rejected_lengths
            )
        ),
        beta,
    )


@register_loss("dpop", reads={"reference"})
def dpop(pair: Pair, *, beta: float, penalty_weight: float = 50.0) -> LossOutput:
    """-log S(beta (h - lambda max(0, ref_w - pi_w))) (DPO-Positive, Smaug, arXiv:2402.13228).

    The penalty acts where the policy gives the chosen response less than the reference does. Sums
    over tokens. For pairs that differ in few tokens, where DPO lowers both. beta > 0, 0.01 to 0.5;
    penalty_weight lambda >= 0, 1 to 50; 0 is DPO.
    """
    penalty = F.relu(-pair.chosen_logratio)
    losses = -F.logsigmoid(_scaled_gap(pair, beta) - beta * penalty_weight * penalty)
    return _output(pair, losses, beta, {"penalty_{split}/mean": penalty})


@register_loss("wpo", reads={"reference", "lengths", "collision"})
def wpo(pair: Pair, *, beta: float) -> LossOutput:
    """-w log S(beta h), w = min(1, w_w w_l), w_y = exp(mean over tokens of (log pi(y_t) - log sum_v
    pi(v)^2)) (WPO, arXiv:2406.11827 eq. 2).

    DPO that counts a pair by how likely the policy is to write it now, against what a draw from the
    policy expects at each position. Sums over tokens in the loss, means in the weight, through
    which no gradient goes. For data that another model wrote. beta > 0, 0.01 to 0.5. The weight is
    small at first for such data, and so is the loss.
    """
    with torch.no_grad():
        chosen = (pair.policy_chosen_logps - pair.chosen_collision) / pair.chosen_lengths
        rejected = (pair.policy_rejected_logps - pair.rejected_collision) / pair.rejected_lengths
        weight = torch.exp((chosen + rejected).clamp(max=0))
    return _output(
        pair, -weight * F.logsigmoid(_scaled_gap(pair, beta)), beta, {"weight_{split}/mean": weight}
    )


@register_loss("simpo", reads={"lengths"})
def simpo(pair: Pair, *, beta: float, gamma: float = 1.0) -> LossOutput:
    """-log S(beta (pi_w/n_w - pi_l/n_l) - gamma) (SimPO, arXiv:2405.14734).

    Means over tokens. The reward, also the logged one, is beta times the mean log-prob, which is
    what greedy decoding climbs. Needs no reference, and nothing holds the policy near one: keep the
    learning rate small. beta > 0, 2 to 10; gamma >= 0, the margin of the rewards, 0.3 to 0.8 of
    beta.
    """
    chosen, rejected = (
        beta * pair.policy_chosen_logps / pair.chosen_lengths,
        beta * pair.policy_rejected_logps / pair.rejected_lengths,
    )
    return LossOutput(-F.logsigmoid(chosen - rejected - gamma), chosen, rejected)


SURE = -torch.finfo(
    torch.float32
).eps  # a mean log-prob above this is one that float32 cannot tell from 0


@register_loss("orpo", reads={"lengths"})
def orpo(pair: Pair, *, or_weight: float = 0.1) -> LossOutput:
    """-p_w - lambda log S(o_w - o_l), o = p - log(1 - exp p), p = pi/n (ORPO, arXiv:2403.07691).

    Means over tokens: SFT on the chosen response with a penalty on the odds of the rejected one,
    instead of SFT and DPO one after the other. The paper has no reward; logged are the log-odds o,
    whose gap its sigmoid sees. or_weight lambda >= 0, 0.05 to 1. Where float32 cannot tell p from 0
    the odds are those of its precision.
    """
    p_w, p_l = (
        pair.policy_chosen_logps / pair.chosen_lengths,
        pair.policy_rejected_logps / pair.rejected_lengths,
    )
    o_w, o_l = (p - torch.log(-torch.expm1(p)) for p in (p_w.clamp(max=SURE), p_l.clamp(max=SURE)))
    return LossOutput(-p_w - or_weight * F.logsigmoid(o_w - o_l), o_w, o_l)


@register_loss("cpo")
def cpo(pair: Pair, *, beta: float, nll_weight: float = 1.0) -> LossOutput:
    """-log S(beta (pi_w - pi_l)) - lambda pi_w (CPO, arXiv:2401.08417 eq. 3 for the first term).

    DPO with a uniform reference, and SFT on the chosen response in its place. Sums over tokens; for
    a mean in the second term use nll_weight=0 sft_weight=1. The reward, also the logged one, is
    beta pi. beta > 0, 0.01 to 0.5; nll_weight lambda >= 0.
    """
    chosen, rejected = beta * pair.policy_chosen_logps, beta * pair.policy_rejected_logps
    return LossOutput(
        -F.logsigmoid(chosen - rejected) - nll_weight * pair.policy_chosen_logps, chosen, rejected
    )


@register_loss("slic", reads={"lengths"})
def slic(pair: Pair, *, delta: float = 1.0, nll_weight: float = 0.1) -> LossOutput:
    """max(0, delta - pi_w + pi_l) - lambda pi_w/n_w (SLiC-HF, arXiv:2305.10425).

    Sums over tokens in the hinge, a mean in the second term, which is on the chosen response; the
    paper's is on the SFT target. The logged reward is the log-prob pi, which the hinge compares.
    delta >= 0: margin in nats, 1 to 10; nll_weight lambda >= 0, 0.01 to 1.
    """
    chosen, rejected = pair.policy_chosen_logps, pair.policy_rejected_logps
    return LossOutput(
        F.relu(delta - chosen + rejected) - nll_weight * chosen / pair.chosen_lengths,
        chosen,
        rejected,
    )


def _running_mean(pair: Pair, name: str, now: Tensor, momentum: float) -> Tensor:
    """The running mean `name` with the mean `now` of this batch taken in; the first batch starts
    it."""
    return momentum * pair.running[name] + (1 - momentum) * now if name in pair.running else now


@register_loss("bco", reads={"reference"}, couples_batch=True)
def bco(pair: Pair, *, beta: float, momentum: float = 0.9) -> LossOutput:
    """-log S(beta d_w - delta) - log S(-(beta d_l - delta)) (BCO, arXiv:2404.04656), delta a
    running mean of the rewards beta d.

    A binary classifier of good and bad responses, whose logit is the reward; the shift delta
    tightens its bound on DPO's loss. Sums over tokens, no gradient through delta: momentum times
    its value after the last step, the rest from both sides of this batch. beta > 0, 0.01 to 0.5;
    momentum in [0, 1): 0 takes the batch's own mean. In evaluation the mean is that of training
    with the evaluation's batch taken in, and stays there.
    """
    chosen, rejected = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    delta = _running_mean(pair, "delta", torch.cat([chosen, rejected]).mean().detach(), momentum)
    losses = -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)
    return _output(
        pair, losses, beta, {"shift_{split}/mean": delta.expand_as(losses)}, {"delta": delta}
    )


@register_loss("beta-dpo", reads={"reference"}, couples_batch=True)
def beta_dpo(
    pair: Pair, *, beta: float, alpha: float = 0.6, momentum: float = 0.9, smallest: float = 1e-3
) -> LossOutput:
    """-log S(b h), b = max(smallest, beta (1 + alpha (mean(h) - M))) (beta-DPO, arXiv:2407.08639),
    M a running mean of mean(h).

    A batch whose pairs are further apart than usual gets a larger beta. Sums over tokens, no
    gradient through b. beta > 0, 0.01 to 0.5; alpha >= 0, for each nat of mean(h) above M, 0.2 to
    1; 0 is DPO; momentum in [0, 1): M has taken in this batch, so 0 is DPO too; smallest > 0. The
    paper's filter, which drops pairs of unusual h, is not here. The logged rewards are beta times
    the log-ratios, not b times. In evaluation M is that of training with the evaluation's batch
    taken in, and stays there.
    """
    if not smallest > 0:
        raise ConfigError(
            f"loss.smallest={smallest} of loss=beta-dpo must be greater than 0: a beta of 0 learns"
            " nothing"
        )
    gap = pair.chosen_logratio - pair.rejected_logratio
    mean = gap.mean().detach()
    usual = _running_mean(pair, "gap", mean, momentum)
    b = (beta * (1 + alpha * (mean - usual))).clamp(min=smallest)
    losses = -F.logsigmoid(b * gap)
    return _output(pair, losses, beta, {"beta_{split}/mean": b.expand_as(losses)}, {"gap": usual})


@register_loss("aot", reads={"reference"}, couples_batch=True)
def aot(pair: Pair, *, beta: float) -> LossOutput:
    """-log S(beta (sort(pi_w - pi_l) - sort(ref_w - ref_l))), sorted over the batch (paired AOT,
    arXiv:2406.05882).

    The policy's margins are to dominate the reference's as a distribution (first order), not pair
    by pair: the k-th smallest is compared with the k-th smallest. A pair's loss is that of its own
    margin. Sums over tokens. beta > 0, 0.01 to 0.5. The larger the batch the better the quantiles;
    with one pair it is DPO.
    """
    margins = pair.policy_chosen_logps - pair.policy_rejected_logps
    reference = (pair.reference_chosen_logps - pair.reference_rejected_logps).sort().values
    ranks = margins.detach().argsort(stable=True).argsort()
    return _output(pair, -F.logsigmoid(beta * (margins - reference[ranks])), beta)


def _reference_point(logratios: Tensor) -> Tensor:
    """KTO's z: the mean log-ratio of all responses of the batch, at least 0, without gradient."""
    return logratios.mean().clamp(min=0).detach()


@register_loss("kto", reads={"reference"}, couples_batch=True)
def kto(
    pair: Pair, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> LossOutput:
    """(lambda_D (1 - S(beta (d_w - z))) + lambda_U (1 - S(beta (z - d_l)))) / 2 (KTO,
    arXiv:2402.01306), chosen desirable, rejected not.

    Each response for itself, against z, an estimate of KL(pi || ref): here max(0, mean of d over
    the responses of the batch), whose log-probs are there; the paper takes it over responses to
    other prompts of the batch, which costs another forward pass of both models. Sums over tokens;
    the mean over both responses of a pair, so that pairs and the same responses one by one
    (`kto_unpaired`) give the same. Between 0 and lambda. beta > 0, 0.01 to 0.5; weights >= 0: with
    n_D and n_U responses, lambda_D n_D / (lambda_U n_U) from 1 to 1.5.
    """
    chosen, rejected = pair.chosen_logratio, pair.rejected_logratio
    z = _reference_point(torch.cat([chosen, rejected]))
    losses = (
        desirable_weight * torch.sigmoid(beta * (z - chosen))
        + undesirable_weight * torch.sigmoid(beta * (rejected - z))
    ) / 2
    return _output(pair, losses, beta, {"kl_{split}/estimate": z.expand_as(losses)})


@register_loss(
    "kto_unpaired", reads={"reference", "scores"}, examples="responses", couples_batch=True
)
def kto_unpaired(
    target: Target,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    threshold: float = 0.5,
) -> LossOutput:
    """lambda_D (1 - S(beta (d - z))) of a desirable response, lambda_U (1 - S(beta (z - d))) of
    another (KTO, arXiv:2402.01306).

    `kto` for responses that need not come in pairs: every response of the data is an example,
    desirable where its score is above `threshold`; labels are scores of 1 (true) and 0 (false). z,
    sums and settings as there. Logged are beta d as rewards_{split}/all and, as accuracy, how often
    the side of z on which d lies is the label's.
    """
    logratio = target.policy_logps - target.reference_logps
    z = _reference_point(logratio)
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
    }
    return LossOutput(losses, metrics=metrics | {"desirable_{split}/share": desirable.double()})
