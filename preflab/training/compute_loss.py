"""The one place where objective, batching and parallelism meet: a batch becomes losses and metrics."""

import torch
from torch import Tensor

from preflab.batching.examples import ExampleNames, PreferenceData
from preflab.batching.packing import Batch
from preflab.modeling.logprobs import Scorer, pad_by_owner, score_responses
from preflab.objective.registry import BoundLoss
from preflab.objective.types import LossOutput, Pair, Target

# of a summed log-prob in fp32, relative, when two computations lay its tokens out differently
ROUNDING = 1e-5


def compute_loss(
    loss: BoundLoss,
    policy: Scorer,
    reference: Scorer | None,
    batch: Batch,
    data: PreferenceData,
    split: str,
) -> tuple[LossOutput, dict[str, Tensor]]:
    """Losses of a batch's examples, with gradient, and its metrics: (examples,) each, without.

    split: "train" or "eval", the middle part of the metric names.
    """
    if "scalar_head" in loss.reads:
        inputs = _values_as_pair(policy, batch)
    else:
        inputs = _logps_as_inputs(loss, policy, reference, batch)
    if loss.examples == "pairs":
        inputs.names = ExampleNames(data, batch.examples)
        inputs.columns = batch.columns
        if "scores" in loss.reads:
            scores = batch.scores.to(batch.chosen.device)
            inputs.chosen_scores, inputs.rejected_scores = (
                scores[batch.chosen],
                scores[batch.rejected],
            )
    output = loss(inputs)
    with torch.no_grad():
        return output, _metrics(inputs, output, split)


def _values_as_pair(policy: Scorer, batch: Batch) -> Pair:
    values = policy.values(batch)
    return Pair(chosen_values=values[batch.chosen], rejected_values=values[batch.rejected])


def _logps_as_inputs(
    loss: BoundLoss, policy: Scorer, reference: Scorer | None, batch: Batch
) -> Pair | Target:
    kl = "reference||policy" if "token_kl" in loss.reads else None
    needed = reference if "reference" in loss.reads or kl else None
    scores = score_responses(
        policy, batch, reference=needed, kl=kl, collision="collision" in loss.reads
    )
    chosen, rejected = batch.chosen, batch.rejected
    lengths = batch.lengths.to(scores.logps)
    if loss.examples != "pairs":
        target = Target(policy_logps=scores.logps[chosen], lengths=lengths[chosen])
        if "reference" in loss.reads:
            target.reference_logps = scores.reference_logps[chosen]
        if "scores" in loss.reads:
            target.scores = batch.scores.to(chosen.device)[chosen]
        return target
    pair = Pair(
        policy_chosen_logps=scores.logps[chosen], policy_rejected_logps=scores.logps[rejected]
    )
    if "reference" in loss.reads:
        pair.reference_chosen_logps = scores.reference_logps[chosen]
        pair.reference_rejected_logps = scores.reference_logps[rejected]
    if "lengths" in loss.reads:
        pair.chosen_lengths, pair.rejected_lengths = lengths[chosen], lengths[rejected]
    if "token_kl" in loss.reads:
        pair.chosen_kl, pair.rejected_kl = scores.kl[chosen], scores.kl[rejected]
    if "collision" in loss.reads:
        pair.chosen_collision, pair.rejected_collision = (
            scores.collision[chosen],
            scores.collision[rejected],
        )
    if "token_logps" in loss.reads:
        padded = pad_by_owner(scores.token_logps, batch.owners, batch.lengths)
        pair.chosen_token_logps, pair.rejected_token_logps = padded[chosen], padded[rejected]
    return pair


def _equal_to_reference(pair: Pair) -> Tensor | bool:
    """Where the policy has not moved from the reference on either response: all that is left
    between them is rounding."""
    if pair.reference_chosen_logps is None or pair.policy_chosen_logps is None:
        return False
    sides = (
        (pair.chosen_logratio, pair.policy_chosen_logps),
        (pair.rejected_logratio, pair.policy_rejected_logps),
    )
    chosen, rejected = (ratio.abs() <= ROUNDING * logps.abs() for ratio, logps in sides)
    return chosen & rejected


def _metrics(inputs: Pair | Target, output: LossOutput, split: str) -> dict[str, Tensor]:
    metrics = {f"loss/{split}": output.losses}
    if isinstance(inputs, Target):
        metrics[f"logps_{split}/{'chosen' if inputs.scores is None else 'all'}"] = (
            inputs.policy_logps
        )
        return metrics | _named(output, split)
    if inputs.policy_chosen_logps is not None:
        metrics[f"logps_{split}/chosen"] = inputs.policy_chosen_logps
        metrics[f"logps_{split}/rejected"] = inputs.policy_rejected_logps
    if inputs.reference_chosen_logps is not None:
        metrics[f"logratios_{split}/chosen"] = inputs.chosen_logratio
        metrics[f"logratios_{split}/rejected"] = inputs.rejected_logratio
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    if chosen is not None:
        metrics[f"rewards_{split}/chosen"] = chosen
        metrics[f"rewards_{split}/rejected"] = rejected
        # A tie counts one half: at policy = reference every pair ties, and that is chance, not
        # failure.
        tie = (chosen == rejected) | _equal_to_reference(inputs)
        metrics[f"rewards_{split}/accuracies"] = torch.where(tie, 0.5, (chosen > rejected).double())
        metrics[f"rewards_{split}/margins"] = chosen - rejected
    return metrics | _named(output, split)


def _named(output: LossOutput, split: str) -> dict[str, Tensor]:
    return {name.format(split=split): values for name, values in output.metrics.items()}
