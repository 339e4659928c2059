"""What plays the reference: the model it starts as, or one that follows the policy.

A loss reads the reference's log-probs, and never which model they come from. `reference.update`
decides that: frozen, or the reference takes over the policy's weights, in whole or in part, after
some steps (TR-DPO, arXiv:2404.09656) or before a round of online learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from preflab.batching.packing import Batch
from preflab.modeling.fsdp import reshard
from preflab.modeling.logprobs import Scorer
from preflab.objective.registry import BoundLoss
from preflab.settings.schema import ReferenceSettings, Settings
from preflab.training.optimizer_state import read_shards, write_shards
from utils import ConfigError

# The folder of a checkpoint with the weights of a reference that follows the policy.
FOLDER = "reference"


def check_update(settings: Settings, loss: BoundLoss) -> None:
    """Raise ConfigError for settings of the reference that cannot work together."""
    reference = settings.reference
    name = f"reference.update={reference.update}"
    if reference.rate is not None and reference.update != "ema":
        raise ConfigError(
            f"reference.rate={reference.rate} is for reference.update=ema, not {name}; leave it out"
        )
    if reference.past is not None:
        _check_past(reference, loss)
    if reference.update == "frozen":
        if reference.every is not None:
            raise ConfigError(
                f"reference.every={reference.every}: {name} never updates the reference; leave it"
                " out, or set reference.update to hard, ema or round"
            )
        return
    if reference.update == "round" and settings.function == "train":
        raise ConfigError(
            f"{name} follows the rounds of function=online, and function=train has none; set"
            " reference.update=hard and reference.every to a number of steps"
        )
    if reference.update == "hard" and reference.every is None:
        raise ConfigError(
            f"{name} needs reference.every, the number of steps between two updates, such as"
            " reference.every=512"
        )
    if reference.update == "ema" and reference.rate is None:
        raise ConfigError(
            f"{name} needs reference.rate, the share of the policy in each update, above 0 and at"
            " most 1, such as reference.rate=0.6"
        )
    if reference.update == "ema" and settings.model.reference_dtype in ("bfloat16", "float16"):
        raise ConfigError(
            f"{name}: model.reference_dtype={settings.model.reference_dtype} rounds small changes"
            " of a weight away; use float32 (model.fsdp_policy_mp=bfloat16 still computes in half)"
        )
    if "reference" not in loss.reads and "token_kl" not in loss.reads:
        raise ConfigError(f"{name}: loss={loss.name} reads no reference; leave it out")


def _check_past(reference: ReferenceSettings, loss: BoundLoss) -> None:
    total = sum(reference.past)
    if reference.update not in ("hard", "round"):
        raise ConfigError(
            f"reference.past={reference.past} is for reference.update=hard and round, not"
            f" reference.update={reference.update}; leave it out"
        )
    if total > 1 + 1e-9:
        raise ConfigError(
            f"reference.past={reference.past} adds up to {total:g}; the weights are shares, and the"
            " initial reference has what they leave of 1; lower them"
        )
    if "token_kl" in loss.reads:
        raise ConfigError(
            f"reference.past={reference.past}: loss={loss.name} reads the whole distribution of the"
            " reference, and a weighted sum of log-probs is none; set it to null"
        )


class PastPolicies:
    """Past policies read as one reference, log pi_ref = sum_j w_j log pi_j + (1 - sum_j w_j) log
    pi_0, which is not normalised (MNPO, arXiv:2509.23102; INPO, arXiv:2407.00617).

    models: the policies, the newest first. weights: one for each. initial: pi_0; None where the
    weights leave nothing for it.
    """

    def __init__(self, models: list[Scorer], weights: list[float], initial: Scorer | None):
        self.models, self.weights, self.initial = models, weights, initial

    def token_logps(self, batch: Batch) -> Tensor:
        """Log-probs of the scored tokens of a batch, (tokens,), without gradient."""
        terms = [
            weight * model.token_logps(batch)
            for model, weight in zip(self.models, self.weights, strict=True)
        ]
        if self.initial is not None:
            terms.append((1 - sum(self.weights)) * self.initial.token_logps(batch))
        return torch.stack([term.to(terms[0].device) for term in terms]).sum(0)


class ReferenceUpdate:
    """Moves a reference after the policy, as `reference.update` says.

    policy: the model that learns. reference: another model of the same architecture, placed alike,
    or several past policies; None where a run has none. A frozen reference never moves.
    """

    def __init__(
        self,
        settings: ReferenceSettings,
        policy: Scorer,
        reference: Scorer | PastPolicies | None,
    ):
        self.rule = settings.update if reference is not None else "frozen"
        self.every = settings.every or 1
        self.rate = settings.rate if self.rule == "ema" else 1.0
        self.policy = policy
        # Those that move, the newest first.
        self.models = reference.models if isinstance(reference, PastPolicies) else [reference]
        if self.rule != "frozen":
            _check_alike(policy, self.models[0], f"reference.update={self.rule}")

    def after_step(self, steps: int) -> None:
        """Move the reference if it is time to; steps: how many the policy has taken."""
        if self.rule in ("hard", "ema") and steps % self.every == 0:
            self._move()

    def before_round(self, number: int) -> None:
        """Make the reference the policy that the round before ended with; number: from 1.

        The first round has the reference that the run starts with.
        """
        if self.rule == "round" and number > 1 and (number - 1) % self.every == 0:
            self._move()

    def _move(self) -> None:
        self.models.insert(0, self.models.pop())  # the oldest is given up
        mix_weights(self.models[0], self.policy, self.rate)

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{age}.{name}": weight
            for age, model in enumerate(self.models)
            for name, weight in _own_weights(model).items()
        }

    def save(self, folder: Path, group=None) -> Callable[[], None]:
        """Copy the reference's weights, each rank its shards, and return what writes the copies
        into a checkpoint. group: as in `write_shards`."""
        weights = {} if self.rule == "frozen" else self._weights()
        return write_shards(weights, folder / FOLDER, group)

    def load(self, folder: Path, *, alone: bool) -> None:
        """Read what `save` wrote. alone: whether this process reads by itself."""
        if self.rule != "frozen":
            read_shards(self._weights(), folder / FOLDER, alone)


@torch.no_grad()
def mix_weights(target: Scorer, source: Scorer, rate: float) -> None:
    """target <- rate * source + (1 - rate) * target, weight by weight and shard by shard.

    The weights of a source with a LoRA adapter are those of its base with the adapter merged, and
    of its base alone where the scorer turns the adapter off. Those of a target in half precision
    are rounded to it.
    """
    weights = _own_weights(target)
    for name, value in _merged_weights(source):
        own = _local(weights[name])
        given = _like(value, weights[name]).to(own.device)
        if rate == 1.0:
            own.copy_(given)
            continue
        precise = torch.promote_types(torch.promote_types(own.dtype, given.dtype), torch.float32)
        own.copy_(own.to(precise).mul(1.0 - rate).add_(given.to(precise), alpha=rate))


def _own_weights(scorer: Scorer) -> dict[str, Tensor]:
    """The weights of a model by name, sharded where they are; tied ones once."""
    reshard(scorer.model)
    return {name: parameter.detach() for name, parameter in scorer.model.named_parameters()}


def _merged_weights(scorer: Scorer) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model by the names of its base; an adapter is merged into one weight at a
    time."""
    reshard(scorer.model)
    base = scorer.causal_lm
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        value = parameter.detach()
        path, is_adapted, weight = name.partition(".base_layer.")
        if is_adapted and weight == "weight" and not scorer.adapter_off:
            value = value + base.get_submodule(path).get_delta_weight(scorer.model.active_adapter)
        yield name.replace(".base_layer.", "."), value


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a weight, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """This rank's part of a value, where `weight` has its shard."""
    if isinstance(value, DTensor) and isinstance(weight, DTensor):
        value = value.redistribute(weight.device_mesh, weight.placements)
    return _local(value)


def _check_alike(policy: Scorer, reference: Scorer, what: str) -> None:
    shapes = {
        name.replace(".base_layer.", "."): parameter.shape
        for name, parameter in policy.causal_lm.named_parameters()
        if ".lora_" not in name
    }
    own = {name: parameter.shape for name, parameter in reference.model.named_parameters()}
    if shapes != own:
        name = min(key for key in shapes.keys() | own.keys() if shapes.get(key) != own.get(key))
        raise ConfigError(
            f"{what}: the policy and the reference differ in the weight {name}"
            f" ({tuple(shapes.get(name, ()))} and {tuple(own.get(name, ()))}); both must be the"
            " same model, without quantised weights"
        )
