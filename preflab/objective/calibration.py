"""Reward calibration: the loss keeps its value, and the gradients of its two sides are rebalanced.

The gradient of a loss of pairs is -d_w s_w + d_l s_l, where s is the gradient of a side's log-prob
and d, the incentive, is what the loss makes of it. Calibration (arXiv:2604.18239) multiplies d_w by
a factor and divides d_l by it, such that d_w / d_l is |s_l| / |s_w|: neither side outweighs the
other, so the chosen response is not pulled down together with the rejected one.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from preflab.objective.pushes import slopes_of, with_leaves
from preflab.objective.types import NEEDS, LossOutput, Pair

# Running means of logarithms, in this order: incentives d_w and d_l, norms |s_w| and |s_l|.
NAMES = tuple(
    f"calibration/{name}"
    for name in ("chosen_incentive", "rejected_incentive", "chosen_norm", "rejected_norm")
)


def reason_against(examples: str, reads: frozenset[str]) -> str | None:
    """None for a loss whose gradient goes through the log-probs of the two responses of a pair
    alone, else why it cannot be calibrated, as the end of a sentence."""
    if examples != "pairs":
        return f"is one of {examples}"
    further = sorted(name for name in reads if NEEDS[name].trained)
    if further:
        return f"trains the policy through {', '.join(further)}"
    return None


def calibrated(
    loss: Callable[[Pair], LossOutput], pair: Pair, running: Mapping[str, Tensor], decay: float
) -> LossOutput:
    """The output of `loss`, with rebalanced gradients.

    pair: with `head_norms`. running: means over the steps so far. decay: share of the old value in
    the running means. A batch that pulls a side the wrong way on average, so that an incentive has
    no logarithm, is not calibrated and leaves the means as they are.
    """
    incentives = _incentives(loss, pair)
    now = torch.stack([*incentives, *pair.head_norms.to(incentives[0])])
    if bool((now > 0).all()):
        means = now.log()
        if NAMES[0] in running:
            before = torch.stack([running[name].to(means) for name in NAMES])
            means = decay * before + (1 - decay) * means
        d_w, d_l, s_w, s_l = means
        factor = torch.exp((s_l - s_w - d_w + d_l) / 2)
        kept = dict(zip(NAMES, means, strict=True))
    else:
        factor = torch.ones_like(now[0])
        kept = {name: running[name] for name in NAMES if name in running}
    output = loss(
        replace(
            pair,
            chosen=replace(pair.chosen, policy_logps=_scaled(pair.policy_chosen_logps, factor)),
            rejected=replace(
                pair.rejected, policy_logps=_scaled(pair.policy_rejected_logps, 1 / factor)
            ),
        )
    )
    metrics = {
        "calibration_{split}/factor": factor,
        "calibration_{split}/incentives": now[0] / now[1],  # chosen over rejected, as the norms
        "calibration_{split}/norms": now[2] / now[3],
    }
    more = {name: value.expand_as(output.losses) for name, value in metrics.items()}
    return replace(output, metrics=output.metrics | more, running=output.running | kept)


def _incentives(loss: Callable[[Pair], LossOutput], pair: Pair) -> tuple[Tensor, Tensor]:
    """d_w and d_l, means over the batch: minus the slope of the loss in the chosen log-probs, and
    its slope in the rejected ones."""
    leaves = with_leaves(pair)
    chosen, rejected = slopes_of([leaves.chosen, leaves.rejected], loss(leaves).losses)
    return -chosen["policy_logps"].mean(), rejected["policy_logps"].mean()


def _scaled(values: Tensor, factor: Tensor) -> Tensor:
    """The same values, with `factor` times their gradient."""
    fixed = values.detach()
    return fixed + factor * (values - fixed)
