"""Where objective, batching and parallelism meet: a batch becomes losses and metrics."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from preflab.batching.examples import ExampleNames, PreferenceData
from preflab.batching.packing import Batch
from preflab.modeling.logprobs import ResponseScores, Scorer, score_responses, sum_by_owner
from preflab.objective import ranks
from preflab.objective.needs import Need
from preflab.objective.pushes import push_metrics, with_leaves
from preflab.objective.registry import BoundLoss
from preflab.objective.types import LossOutput, Pair, Ranking, Side, Target, needs_of

# of a summed log-prob in fp32, relative, when two computations lay its tokens out differently
ROUNDING = 1e-5


def compute_loss(
    loss: BoundLoss,
    policy: Scorer,
    reference: Scorer | None,
    batch: Batch,
    data: PreferenceData | None,
    split: str,
    *,
    entropy: bool = False,
) -> tuple[LossOutput, dict[str, Tensor]]:
    """Losses of a batch's examples, with gradient, and its metrics: (examples,) each, without.

    data: names the examples in error messages. split: "train" or "eval", the middle part of the
    metric names. entropy: also measure that of the policy at the tokens of the responses.
    """
    needs = needs_of(loss.reads)
    groups = _sides(batch) if loss.calibration and split == "train" else None
    scores = _score(needs.values(), policy, reference, batch, entropy=entropy, groups=groups)
    inputs = _inputs(loss, needs, scores, batch, data)
    if not torch.is_grad_enabled():
        inputs = with_leaves(inputs)
    with torch.enable_grad():  # of the numbers that the loss reads; in an evaluation no further
        output = loss(inputs)
        pushes = push_metrics(inputs, output.losses, split)
    with torch.no_grad():
        metrics = _metrics(inputs, output, split) | _entropies(inputs, scores, batch, split)
        return output, metrics | pushes


def read_responses(
    needs: Mapping[str, Need], policy: Scorer, reference: Scorer | None, batch: Batch
) -> dict[str, Tensor]:
    """Values of every response of a batch by field, (responses, ...) each, with gradient if it is
    enabled."""
    return _take(needs, _score(needs.values(), policy, reference, batch), batch)


def _take(
    needs: Mapping[str, Need], scores: ResponseScores | SimpleNamespace, batch: Batch
) -> dict[str, Tensor]:
    device = batch.chosen.device
    return {name: need.take(scores, batch).to(device) for name, need in needs.items()}


def _inputs(
    loss: BoundLoss,
    needs: Mapping[str, Need],
    scores: ResponseScores | SimpleNamespace,
    batch: Batch,
    data: PreferenceData | None,
) -> Pair | Target | Ranking:
    """What the loss reads of a batch, and no more."""
    taken = _take(needs, scores, batch)  # a response may take part in several examples
    names = ExampleNames(data, batch.examples)
    if loss.examples == "lists":
        listed = {name: values[batch.lists] for name, values in taken.items()}
        return Ranking(**listed, mask=batch.listed, names=names)
    chosen = {name: values[batch.chosen] for name, values in taken.items()}
    if loss.examples != "pairs":
        return Target(**chosen, names=names)
    rejected = {name: values[batch.rejected] for name, values in taken.items()}
    head_norms = getattr(scores, "head_norms", None)
    return Pair(Side(**chosen), Side(**rejected), batch.columns, names, head_norms=head_norms)


def _sides(batch: Batch) -> Tensor:
    """The share of each response in the mean over pairs of the chosen and of the rejected ones,
    (2, responses)."""
    n = len(batch.lengths)
    counts = [torch.bincount(side, minlength=n) for side in (batch.chosen, batch.rejected)]
    return torch.stack(counts).double() / len(batch.chosen)


def _score(
    needs: Iterable[Need],
    policy: Scorer,
    reference: Scorer | None,
    batch: Batch,
    *,
    entropy: bool = False,
    groups: Tensor | None = None,
) -> ResponseScores | SimpleNamespace:
    """Run the models as far as these needs ask for it.

    entropy: also that of the policy at every token, if it is a model of text. groups: as in
    `score_responses`.
    """
    if any(need.source == "head" for need in needs):
        return SimpleNamespace(values=policy.values(batch))
    options: dict[str, Any] = {"entropy": entropy, "groups": groups}
    for need in needs:
        options |= need.score_options
    if not any(need.reference for need in needs):
        reference = None
    mismatched = None
    if batch.mismatched is not None:
        with torch.no_grad():
            other = score_responses(policy, batch.mismatched, reference=reference)
        mismatched = other.logps - other.reference_logps
    scores = score_responses(policy, batch, reference=reference, **options)
    scores.mismatched = mismatched
    return scores


def _equal_to_reference(side: Side) -> Tensor | bool:
    """Where the policy has not moved from the reference: all that remains between them is
    rounding."""
    if side.reference_logps is None or side.policy_logps is None:
        return False
    return side.logratio.abs() <= ROUNDING * side.policy_logps.abs()


def _metrics(inputs: Pair | Target | Ranking, output: LossOutput, split: str) -> dict[str, Tensor]:
    metrics = {f"loss/{split}": output.losses}
    if isinstance(inputs, Ranking):
        return metrics | _of_lists(inputs, output, split) | _named(output, split)
    if isinstance(inputs, Target):
        name = "chosen" if inputs.scores is None else "all"
        metrics[f"logps_{split}/{name}"] = inputs.policy_logps
        return metrics | _named(output, split)
    sides = {"chosen": inputs.chosen, "rejected": inputs.rejected}
    for name, side in sides.items():
        if side.policy_logps is not None:
            metrics[f"logps_{split}/{name}"] = side.policy_logps
    for name, side in sides.items():
        if side.reference_logps is not None:
            metrics[f"logratios_{split}/{name}"] = side.logratio
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    if chosen is not None:
        metrics[f"rewards_{split}/chosen"] = chosen
        metrics[f"rewards_{split}/rejected"] = rejected
        # A tie counts one half: at policy = reference every pair ties, and that is chance, not
        # failure.
        still = _equal_to_reference(inputs.chosen) & _equal_to_reference(inputs.rejected)
        tie = (chosen == rejected) | still
        metrics[f"rewards_{split}/accuracies"] = torch.where(tie, 0.5, (chosen > rejected).double())
        metrics[f"rewards_{split}/margins"] = chosen - rejected
    return metrics | _named(output, split)


def _entropies(
    inputs: Pair | Target | Ranking,
    scores: ResponseScores | SimpleNamespace,
    batch: Batch,
    split: str,
) -> dict[str, Tensor]:
    """The policy's entropy at the tokens of a response, their mean, in nats, by side."""
    tokens = getattr(scores, "token_entropy", None)
    if tokens is None:
        return {}
    entropy = sum_by_owner(tokens, batch.owners, len(batch.lengths)) / batch.lengths
    entropy = entropy.to(batch.chosen.device)
    if isinstance(inputs, Ranking):
        listed = entropy[batch.lists]
        sides = {
            "chosen": (inputs.best * listed).sum(1),
            "rejected": (inputs.worst * listed).sum(1),
        }
    elif isinstance(inputs, Target):
        sides = {"chosen" if inputs.scores is None else "all": entropy[batch.chosen]}
    else:
        sides = {"chosen": entropy[batch.chosen], "rejected": entropy[batch.rejected]}
    return {f"entropy_{split}/{name}": values for name, values in sides.items()}


def _of_lists(ranking: Ranking, output: LossOutput, split: str) -> dict[str, Tensor]:
    """What is logged of lists, (lists,) each: by the names of pairs, with the responses of the
    highest score for the chosen one and those of the lowest for the rejected one."""
    sides = {"chosen": ranking.best, "rejected": ranking.worst}
    columns = {}
    if ranking.policy_logps is not None:
        columns["logps"] = ranking.policy_logps
    if ranking.reference_logps is not None:
        columns["logratios"] = ranking.logratio
    if output.rewards is not None:
        columns["rewards"] = output.rewards
    metrics = {
        f"{column}_{split}/{name}": (weights * values).sum(1)
        for column, values in columns.items()
        for name, weights in sides.items()
    }
    if output.rewards is None:
        return metrics
    truth = ranks.order_of(ranking.scores, ranking.mask)
    order = ranks.order_of(output.rewards, ranking.mask)
    still = _equal_to_reference(ranking)
    if isinstance(still, Tensor):  # ties, as in pairs
        order = order.masked_fill(still[:, :, None] & still[:, None, :], 0)
    gaps = output.rewards[:, :, None] - output.rewards[:, None, :]
    n_pairs = ranking.better.sum((1, 2)).clamp(min=1)
    return metrics | {
        f"rewards_{split}/accuracies": ranks.pair_accuracy(order, truth),
        f"rewards_{split}/margins": (gaps * ranking.better).sum((1, 2)) / n_pairs,
        f"ranking_{split}/kendall_tau": ranks.kendall_tau(order, truth),
        f"ranking_{split}/ndcg": ranks.ndcg(order, ranking.scores, ranking.mask),
    }


def _named(output: LossOutput, split: str) -> dict[str, Tensor]:
    return {name.format(split=split): values for name, values in output.metrics.items()}
