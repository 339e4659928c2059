"""How hard a loss pushes the log-prob of each response: minus dL/dlogp.

The push is what gradient descent adds to a log-prob, as far as the loss alone decides: positive
pushes raise a response and negative ones lower it. It is a derivative with respect to the few
numbers that a loss reads, so no model takes part.
"""

from dataclasses import replace

import torch
from torch import Tensor

from preflab.objective.types import FIELDS, Pair, Ranking, Side, Target

# Means from which ratio and share follow, and which are not logged.
_CHOSEN, _REJECTED, _TOTAL, _SQUARE = "|chosen|", "|rejected|", "|total|", "|total|^2"


def with_leaves(data: Pair | Target | Ranking) -> Pair | Target | Ranking:
    """The batch with a leaf of autograd for each value that depends on the policy, so that a loss
    of it has pushes where no gradient is recorded, as in an evaluation."""
    if isinstance(data, Pair):
        return replace(data, chosen=with_leaves(data.chosen), rejected=with_leaves(data.rejected))
    leaves = {name: value.detach().requires_grad_() for name, value in _trained(data).items()}
    return replace(data, **leaves)


def _trained(side: Side) -> dict[str, Tensor]:
    """The values of a side that depend on the weights of the policy, by field."""
    values = {name: getattr(side, name) for name, need in FIELDS.items() if need.trained}
    return {name: value for name, value in values.items() if value is not None}


def slopes_of(sides: list[Side], losses: Tensor) -> list[dict[str, Tensor]]:
    """d(sum of losses)/d(value) for each side and each of its values that depend on the policy.

    The graph of `losses` stays, so that a backward pass can follow.
    """
    names = [(i, name) for i, side in enumerate(sides) for name in _trained(side)]
    values = [getattr(sides[i], name) for i, name in names]
    slopes = torch.autograd.grad(losses.sum(), values, retain_graph=True, allow_unused=True)
    by_side: list[dict[str, Tensor]] = [{} for _ in sides]
    for (i, name), value, slope in zip(names, values, slopes, strict=True):
        by_side[i][name] = torch.zeros_like(value) if slope is None else slope
    return by_side


def slope_of_logps(side: Side, slopes: dict[str, Tensor]) -> Tensor | None:
    """dL/dlogp of each response, shaped as its log-probs; of a scalar head dL/dvalue.

    A loss that weighs tokens has a slope at each token. Here it counts by their mean: the slope
    where the log-prob of the response changes by equal parts at all tokens. None for such a loss
    that does not read the lengths.
    """
    total = [slopes[name] for name in ("policy_logps", "values") if name in slopes]
    if "token_logps" in slopes:
        if side.lengths is None:
            return None
        total.append(slopes["token_logps"].sum(-1) / side.lengths)
    return sum(total) if total else None


def push_metrics(data: Pair | Target | Ranking, losses: Tensor, split: str) -> dict[str, Tensor]:
    """Metrics (examples,) of the pushes of `losses` (examples,); empty where there are none.

    Of lists, chosen and rejected are the means over the responses with the highest and the lowest
    score. Of single responses with scores, the ratio is that of the downward and upward pushes.
    """
    sides = [data.chosen, data.rejected] if isinstance(data, Pair) else [data]
    if not losses.requires_grad or not any(map(_trained, sides)):
        return {}
    slopes = slopes_of(sides, losses)
    of_sides = [slope_of_logps(side, of_side) for side, of_side in zip(sides, slopes, strict=True)]
    if any(slope is None for slope in of_sides):
        return {}
    if isinstance(data, Pair):
        chosen, rejected = (-slope for slope in of_sides)
        metrics = _described(split, chosen, rejected, chosen.abs() + rejected.abs())
        for name, of_side in zip(("chosen", "rejected"), slopes, strict=True):
            if "kl" in of_side:
                metrics[f"push_{split}/{name}_kl"] = -of_side["kl"]
        return metrics
    [push] = (-slope for slope in of_sides)
    if isinstance(data, Ranking):
        best, worst = (data.best * push).sum(1), (data.worst * push).sum(1)
        return _described(split, best, worst, push.abs().sum(1))
    if data.scores is None:
        return _described(split, push, None, push.abs())
    up, down = push.clamp(min=0), push.clamp(max=0)
    metrics = _described(split, up, down, push.abs())
    return {f"push_{split}/all": push} | {
        name: values
        for name, values in metrics.items()
        if name.rpartition("/")[2] not in ("chosen", "rejected")
    }


def _described(
    split: str, chosen: Tensor, rejected: Tensor | None, total: Tensor
) -> dict[str, Tensor]:
    """The pushes of both sides, and what ratio and share are computed from, (examples,) each."""
    values = {"chosen": chosen, _TOTAL: total, _SQUARE: total**2}
    if rejected is not None:
        values |= {"rejected": rejected, _CHOSEN: chosen.abs(), _REJECTED: rejected.abs()}
    return {f"push_{split}/{name}": value for name, value in values.items()}


def with_ratio_and_share(means: dict[str, float]) -> dict[str, float]:
    """Means over examples, with the ratio and the share of their pushes.

    ratio: the mean size of the push on rejected responses over that on chosen ones; left out where
    that is 0. share: (mean w)^2 / mean w^2, w the size of a pair's two pushes together: 1 where all
    pairs are pushed alike, k/n where k of n are pushed alike and the others not at all.
    """
    means = dict(means)
    for split in ("train", "eval"):
        prefix = f"push_{split}/"
        chosen, rejected, total, square = (
            means.pop(prefix + name, None) for name in (_CHOSEN, _REJECTED, _TOTAL, _SQUARE)
        )
        if chosen:
            means[f"{prefix}ratio"] = rejected / chosen
        if total is not None:
            means[f"{prefix}share"] = total**2 / square if square else 0.0
    return means
