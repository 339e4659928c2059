"""Weighted sums of losses: a loss whose parts are losses."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from torch import Tensor

from preflab.objective.ranges import NonNegative, Prepare, expected
from preflab.objective.registry import BoundLoss, bind_loss, register_loss
from preflab.objective.types import LossOutput, Pair, Ranking, Side, Target
from utils import ConfigError


@dataclass(frozen=True)
class Part:
    """A loss in a sum, with its weight and a label for the logs."""

    label: str
    weight: float
    loss: BoundLoss

    def __call__(self, data: Pair | Target | Ranking) -> LossOutput:
        """The part alone, without its weight. Of pairs, a loss that imitates a response gets the
        chosen ones. Its running means are those of `data` whose names begin with the label."""
        prefix = f"{self.label}/"
        own = {
            name.removeprefix(prefix): value
            for name, value in data.running.items()
            if name.startswith(prefix)
        }
        if isinstance(data, Pair) and self.loss.examples != "pairs":
            chosen = {f.name: getattr(data.chosen, f.name) for f in fields(Side)}
            data = Target(**chosen, names=data.names)
        output = self.loss.after(data, own)
        return replace(
            output, running={prefix + name: value for name, value in output.running.items()}
        )


def bind_parts(key: str, given: Any) -> list[Part]:
    """The losses of a list: {name: LOSS, weight: 1.0, as: LABEL} with the settings of the loss.

    key: the setting that holds the list, for messages. Raises ConfigError.
    """
    if not isinstance(given, list) or not given:
        raise ConfigError(
            f"{key}={given} must be a list of losses, such as"
            f' "{key}=[{{name: dpo, weight: 0.8}}, {{name: sft, weight: 0.2}}]"'
        )
    parts: list[Part] = []
    for entry in given:
        settings = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        weight, label = settings.pop("weight", 1.0), settings.pop("as", settings.get("name"))
        if problem := expected(Annotated[float, NonNegative], weight):
            raise ConfigError(f"{key}: the weight of {label} is {weight!r} and must be {problem}")
        try:
            loss = bind_loss(settings)
            if loss.calibration:
                raise ConfigError(
                    "calibration: true is of the whole sum; set loss.calibration=true in its place"
                )
            parts.append(Part(str(label), float(weight), loss))
        except ConfigError as error:
            raise ConfigError(f"{key}, {label}: {error}") from error
    labels = [part.label for part in parts]
    if odd := [label for label in labels if not re.fullmatch(r"[\w.-]+", label)]:
        raise ConfigError(f"{key}: as: {odd[0]!r} names a metric, and has letters and digits only")
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(
            f"{key} has {twice[0]} twice; tell them apart, such as with as: {twice[0]}_2"
        )
    return parts


def _examples(settings: Mapping) -> str:
    """What the parts read: pairs, of which a loss of targets reads the chosen response, or all the
    same."""
    parts: list[Part] = settings["parts"]
    kinds = {part.loss.examples: part.label for part in parts}
    if len(kinds) > 1 and set(kinds) != {"pairs", "targets"}:
        found = ", ".join(f"{label} reads {kind}" for kind, label in kinds.items())
        raise ConfigError(
            f"loss.parts: {found}; sum losses of pairs, with losses of targets if you like, or"
            " losses of responses or of lists alone"
        )
    heads = {"scalar_head" in part.loss.reads: part.label for part in parts}
    if len(heads) > 1:
        raise ConfigError(
            f"loss.parts: {heads[True]} trains a scalar head and {heads[False]} a model that"
            " writes text, and no model is both"
        )
    return "pairs" if "pairs" in kinds else min(kinds)


def _union(field: str) -> Callable[[Mapping], set]:
    return lambda settings: set().union(*(getattr(p.loss, field) for p in settings["parts"]))


def _inspect(chosen: Tensor, rejected: Tensor, names, *, parts: list[Part]) -> str | None:
    remarks = {part.label: part.loss.inspect_scores(chosen, rejected, names) for part in parts}
    return "; ".join(f"{label}: {text}" for label, text in remarks.items() if text) or None


@register_loss(
    "weighted_sum",
    reads=_union("reads"),
    columns=_union("columns"),
    examples=_examples,
    couples_batch=lambda settings: any(part.loss.couples_batch for part in settings["parts"]),
    inspect_scores=_inspect,
)
def weighted_sum(
    data: Pair | Target | Ranking, *, parts: Annotated[list[Part], Prepare(bind_parts)]
) -> LossOutput:
    """sum_k weight_k loss_k of losses of the same examples, such as MPO (arXiv:2411.10442).

    The logged rewards are those of the first part that has some. Each part is logged without its
    weight.
    """
    outputs = {part.label: part(data) for part in parts}
    losses = sum(part.weight * outputs[part.label].losses for part in parts)
    rewarded = [output for output in outputs.values() if output.chosen_rewards is not None]
    of_lists = [output.rewards for output in outputs.values() if output.rewards is not None]
    metrics: dict[str, Tensor] = {}
    for label, output in outputs.items():
        metrics = output.metrics | metrics | {f"loss_{{split}}/{label}": output.losses}
    return LossOutput(
        losses,
        rewarded[0].chosen_rewards if rewarded else None,
        rewarded[0].rejected_rewards if rewarded else None,
        metrics,
        {name: value for output in outputs.values() for name, value in output.running.items()},
        rewards=of_lists[0] if of_lists else None,
    )
