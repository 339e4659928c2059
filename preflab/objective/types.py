"""What a loss reads and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Pair:
    """A batch of pairs as a loss sees it; what the loss did not ask for in `reads` is None.

    Every field is (pairs,) unless said otherwise. Log-probs are sums over response tokens, in nats.
    """

    policy_chosen_logps: Tensor | None = None
    policy_rejected_logps: Tensor | None = None
    reference_chosen_logps: Tensor | None = None
    reference_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    chosen_scores: Tensor | None = None
    rejected_scores: Tensor | None = None
    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None
    chosen_token_logps: Tensor | None = (
        None  # (pairs, longest response), zero behind each response's length
    )
    rejected_token_logps: Tensor | None = None
    chosen_collision: Tensor | None = None
    rejected_collision: Tensor | None = None
    chosen_values: Tensor | None = None  # output of the scalar head
    rejected_values: Tensor | None = None
    columns: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # further numbers of the data, by column name
    names: list[str] = field(default_factory=list)  # which example each is, for error messages
    running: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # means over the steps so far, of a loss that keeps some

    @property
    def chosen_logratio(self) -> Tensor:
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratio(self) -> Tensor:
        return self.policy_rejected_logps - self.reference_rejected_logps


@dataclass
class Target:
    """A batch of single responses, to imitate or with scores; fields are (examples,), None as in
    `Pair`."""

    policy_logps: Tensor
    lengths: Tensor | None = None
    reference_logps: Tensor | None = None
    scores: Tensor | None = None


@dataclass
class LossOutput:
    """Per-example losses (with gradient) and what is logged beside them (taken without gradient).

    losses: (examples,). chosen_rewards, rejected_rewards: (pairs,), beta times the log-ratios, so
    that losses can be compared whatever they optimise; without a reference what the paper takes for
    the reward. metrics: further (examples,) tensors by name, logged as `<name>` with `{split}`
    filled in, e.g. `kl_{split}/chosen`. running: what `Pair.running` is for the next step, by name.
    """

    losses: Tensor
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    running: dict[str, Tensor] = field(default_factory=dict)
