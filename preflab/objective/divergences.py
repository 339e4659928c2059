"""Divergences that hold a policy to its reference, in place of the reverse KL.

DPO's reward is beta f'(u) up to a constant, u = pi/ref, where f is the divergence's function
(arXiv:2309.16240). A loss of log-ratios d = log u that reads f'(exp d) in their place is therefore
the same loss under that divergence. The constants are those with f'(1) = 0, so policy = reference
has a reward of 0 for each.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from preflab.objective.types import NEEDS, Pair, Ranking, Target
from utils import ConfigError

LARGEST_EXPONENT = 80.0  # exp of it is 5.5e34; beyond it there is no slope

Link = Callable[[Tensor], Tensor]


def _alpha_link(alpha: float) -> Link:
    return lambda d: -torch.expm1((-alpha * d).clamp(max=LARGEST_EXPONENT)) / alpha


def link_of(name: str, alpha: float | None) -> Link:
    """d -> f'(exp d) of a divergence: d for "reverse_kl", 1 - exp(-d) for "forward_kl",
    log(2u / (1+u)) for "js" (Jensen-Shannon), (1 - exp(-alpha d)) / alpha for "alpha".

    Raises ConfigError for an unknown name, and for an alpha that is missing or not used.
    """
    if (name == "alpha") != (alpha is not None):
        raise ConfigError(
            f"loss.divergence={name} and loss.divergence_alpha={alpha}: alpha is the parameter of"
            " loss.divergence=alpha, between 0 (the reverse KL) and 1 (the forward KL), and of no"
            " other; set both, or none"
        )
    links: dict[str, Link] = {
        "reverse_kl": lambda d: d,
        "forward_kl": _alpha_link(1.0),
        "js": lambda d: F.logsigmoid(d) + math.log(2),
        "alpha": _alpha_link(alpha if alpha is not None else 1.0),
    }
    return links[name]


def through_link(data: Pair | Target | Ranking, link: Link) -> Pair | Target | Ranking:
    """The batch with link(d) for each log-ratio d. Losses that read log-ratios alone see nothing
    else of it: their log-probs are link(d) under the policy and 0 under the reference."""
    if isinstance(data, Pair):
        return replace(
            data, chosen=through_link(data.chosen, link), rejected=through_link(data.rejected, link)
        )
    logratio = data.logratio
    return replace(data, policy_logps=link(logratio), reference_logps=torch.zeros_like(logratio))


def reads_logratios_alone(reads: frozenset[str], function: Callable, batch) -> str | None:
    """None for a loss that depends on the two models through log-ratios alone, else why it does
    not, as the end of a sentence. function: from a batch to losses. batch: a made-up one."""
    if "reference" not in reads:
        return "reads no reference"
    further = sorted(name for name in reads - {"reference"} if NEEDS[name].reference)
    if further:
        return f"reads {', '.join(further)} beside the log-ratios"
    same = torch.allclose(function(through_link(batch, lambda d: d)), function(batch), rtol=1e-9)
    return None if same else "reads log-probs beside the log-ratios"
