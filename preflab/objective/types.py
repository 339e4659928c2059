"""What a loss reads and what it returns."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Annotated, Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from preflab.objective.needs import Need


def _by_response(values: Tensor, batch: Any) -> Tensor:
    """Values of a batch's scored tokens (tokens,) by response, (responses, longest), 0 behind the
    end of each."""
    return pad_sequence(values.split(batch.lengths.tolist()), batch_first=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class Side:
    """One response of every example of a batch; what the loss does not name in `reads` is None.

    Each field is a float64 tensor (examples,) unless its comment says otherwise. Log-probs are sums
    over response tokens, in nats. To let losses read something new, add a field here: `bind_loss`,
    `made_up_batch` and `compute_loss` find it by its `Need`.
    """

    policy_logps: Annotated[
        Tensor | None,
        Need(
            "policy",
            "log-probs under the policy",
            take=lambda scores, batch: scores.logps,
            made_up=lambda draw: draw.normal() - 4,
            trained=True,
        ),
    ] = None
    reference_logps: Annotated[
        Tensor | None,
        Need(
            "reference",
            "log-probs under the reference",
            take=lambda scores, batch: scores.reference_logps,
            made_up=lambda draw: draw.normal() - 4,
            reference=True,
        ),
    ] = None
    lengths: Annotated[
        Tensor | None,
        Need(
            "lengths",
            "response lengths in tokens",
            take=lambda scores, batch: batch.lengths.double(),
            made_up=lambda draw: draw.lengths(),
            source="data",
        ),
    ] = None
    scores: Annotated[
        Tensor | None,
        Need(
            "scores",
            "numbers that came with the data",
            take=lambda scores, batch: batch.scores,
            made_up=lambda draw: draw.scores(),
            source="data",
        ),
    ] = None
    kl: Annotated[
        Tensor | None,
        Need(
            "token_kl",
            "KL(reference || policy) over the whole vocabulary, summed over response positions",
            take=lambda scores, batch: scores.kl,
            made_up=lambda draw: draw.normal().abs(),
            score_options={"kl": "reference||policy"},
            reference=True,
            trained=True,
        ),
    ] = None
    # (examples, longest response of the batch), zero behind each response's length
    token_logps: Annotated[
        Tensor | None,
        Need(
            "token_logps",
            "log-prob of each response token under the policy",
            take=lambda scores, batch: _by_response(scores.token_logps.double(), batch),
            made_up=lambda draw: draw.of_tokens(-draw.normal(5).abs()),
            trained=True,
            by_token=True,
        ),
    ] = None
    # as token_logps
    reference_token_logps: Annotated[
        Tensor | None,
        Need(
            "reference_token_logps",
            "log-prob of each response token under the frozen reference",
            take=lambda scores, batch: _by_response(scores.reference_token_logps.double(), batch),
            made_up=lambda draw: draw.of_tokens(-draw.normal(5).abs()),
            reference=True,
            by_token=True,
        ),
    ] = None
    # int64, shaped as token_logps
    tokens: Annotated[
        Tensor | None,
        Need(
            "tokens",
            "ids of the response tokens",
            take=lambda scores, batch: _by_response(batch.targets, batch),
            made_up=lambda draw: draw.of_tokens((100 * draw.normal(5).abs()).long()),
            source="data",
            by_token=True,
        ),
    ] = None
    # as token_logps
    token_weights: Annotated[
        Tensor | None,
        Need(
            "token_weights",
            "weights of the response tokens that came with the data",
            take=lambda scores, batch: _by_response(batch.token_weights, batch),
            made_up=lambda draw: draw.of_tokens(draw.normal(5).abs()),
            source="data",
            by_token=True,
        ),
    ] = None
    collision: Annotated[
        Tensor | None,
        Need(
            "collision",
            "log sum_v pi(v)^2 summed over response positions, without gradient",
            take=lambda scores, batch: scores.collision,
            made_up=lambda draw: -2 * draw.lengths(),
            score_options={"collision": True},
        ),
    ] = None
    mismatched: Annotated[
        Tensor | None,
        Need(
            "mismatched",
            "log-ratio of a response to another prompt of the batch, without gradient",
            take=lambda scores, batch: scores.mismatched,
            made_up=lambda draw: draw.normal(),
            reference=True,
        ),
    ] = None
    values: Annotated[
        Tensor | None,
        Need(
            "scalar_head",
            "output of a model that has one output instead of a vocabulary",
            take=lambda scores, batch: scores.values,
            made_up=lambda draw: draw.normal(),
            source="head",
            trained=True,
        ),
    ] = None

    @property
    def logratio(self) -> Tensor:
        """log pi(y|x) - log pi_ref(y|x), (examples,)."""
        return self.policy_logps - self.reference_logps


_ANNOTATIONS = get_type_hints(Side, include_extras=True)
FIELDS: dict[str, Need] = {f.name: get_args(_ANNOTATIONS[f.name])[1] for f in fields(Side)}
# What `reads` may name. Every loss reads the policy's log-probs, unless the model has none.
NEEDS: dict[str, Need] = {need.name: need for need in FIELDS.values() if need.name != "policy"}


def needs_of(reads: Iterable[str]) -> dict[str, Need]:
    """The fields of a `Side` that are filled for a loss with these `reads`, in their order."""
    names = {"policy", *reads} - ({"policy"} if "scalar_head" in reads else set())
    return {name: need for name, need in FIELDS.items() if need.name in names}


@dataclass(frozen=True, eq=False)
class Pair:
    """A batch of pairs as a loss sees it.

    chosen, rejected: the two responses of each pair. columns: further numbers of the data by column
    name, (pairs,) each. names: which example each pair is, for error messages. running: means over
    the steps so far by name, of a loss that returns some. head_norms: norms of the gradient of the
    mean log-prob of the chosen and of the rejected responses by the weight of the LM head, (2,),
    for reward calibration; None without it and in evaluations.

    The fields of a side can also be read by one name, with the side behind the model's name or in
    front of the others: `policy_chosen_logps`, `reference_rejected_logps`, `chosen_lengths`,
    `rejected_scores`, `chosen_logratio`, ...
    """

    chosen: Side
    rejected: Side
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    names: Sequence[str] = ()
    running: Mapping[str, Tensor] = field(default_factory=dict)
    head_norms: Tensor | None = None


def _name_in_pair(side: str, name: str) -> str:
    """`policy_logps` of the chosen side is `policy_chosen_logps`, `kl` is `chosen_kl`."""
    model, _, rest = name.partition("_")
    return f"{model}_{side}_{rest}" if model in ("policy", "reference") else f"{side}_{name}"


for _side in ("chosen", "rejected"):
    for _name in (*FIELDS, "logratio"):
        _path = f"{_side}.{_name}"
        setattr(Pair, _name_in_pair(_side, _name), property(attrgetter(_path), doc=f"`{_path}`."))


@dataclass(frozen=True, eq=False, kw_only=True)
class Target(Side):
    """A batch of single responses, to imitate or with scores.

    names, running: as in `Pair`.
    """

    names: Sequence[str] = ()
    running: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Ranking(Side):
    """A batch of lists: for each prompt its responses, which have scores. Scores may be equal.

    Each field is (lists, longest list), with the shapes of `Side` behind that. mask (lists, longest
    list): where there is a response; shorter lists repeat their first one behind it, so that all
    values are finite. names, running: as in `Pair`.
    """

    mask: Tensor
    names: Sequence[str] = ()
    running: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def better(self) -> Tensor:
        """(lists, longest, longest): whether response i has a higher score than response j."""
        pairs = self.mask[:, :, None] & self.mask[:, None, :]
        return pairs & (self.scores[:, :, None] > self.scores[:, None, :])

    @property
    def best(self) -> Tensor:
        """(lists, longest): equal weights of the responses with the highest score, of sum 1."""
        return self._share(self.scores)

    @property
    def worst(self) -> Tensor:
        """As `best`, of the lowest score."""
        return self._share(-self.scores)

    def _share(self, values: Tensor) -> Tensor:
        values = values.masked_fill(~self.mask, -torch.inf)
        first = (values == values.amax(1, keepdim=True)).double()
        return first / first.sum(1, keepdim=True)

    def pairs(self) -> tuple[Pair, Tensor]:
        """All pairs of responses with different scores, and the list of each, (pairs,)."""
        lists, i, j = self.better.nonzero(as_tuple=True)

        def side(k: Tensor) -> Side:
            filled = {name: getattr(self, name) for name in FIELDS}
            return Side(**{name: v[lists, k] for name, v in filled.items() if v is not None})

        names = _NamesOfPairs(self.names, lists) if len(self.names) else ()
        return Pair(side(i), side(j), names=names, running=self.running), lists


@dataclass(frozen=True)
class _NamesOfPairs(Sequence):
    """The name of the list that each pair is from, made only when a message asks for it."""

    names: Sequence[str]
    lists: Tensor

    def __getitem__(self, i: int) -> str:
        return self.names[int(self.lists[i])]

    def __len__(self) -> int:
        return len(self.lists)


@dataclass
class LossOutput:
    """Per-example losses (with gradient) and what is logged beside them (taken without gradient).

    losses: (examples,). chosen_rewards, rejected_rewards: (pairs,), beta times the log-ratios, so
    that losses can be compared whatever they optimise; without a reference what the paper takes for
    the reward. rewards: (lists, longest list), the same of a `Ranking`. metrics: further
    (examples,) tensors by name, logged as `<name>` with `{split}` filled in, e.g.
    `kl_{split}/chosen`. running: what `running` is in the next step, by name.
    """

    losses: Tensor
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    running: dict[str, Tensor] = field(default_factory=dict)
    rewards: Tensor | None = None
