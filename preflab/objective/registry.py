"""The registry of losses: a signature is the settings of a loss, `reads` is its input."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from preflab.objective.calibration import calibrated, reason_against
from preflab.objective.divergences import link_of, reads_logratios_alone, through_link
from preflab.objective.needs import MadeUp
from preflab.objective.ranges import (
    Between,
    NonNegative,
    annotations_of,
    expected,
    prepared,
    settings_of,
)
from preflab.objective.types import NEEDS, LossOutput, Pair, Ranking, Side, Target, needs_of
from utils import ConfigError, load_module, nearest

EXAMPLES = ("pairs", "targets", "responses", "lists")
# Keys of the `loss` group that belong to every loss and are handled here, not by the function.
COMMON = {
    "sft_weight": Annotated[float, NonNegative],
    "all_pairs": bool,
    "divergence": Literal["reverse_kl", "forward_kl", "js", "alpha"],
    "divergence_alpha": Annotated[float | None, Between(0, 1, "()")],
    "calibration": bool,
    "calibration_decay": Annotated[float, Between(0, 1)],
}
COMMON_KEYS = {"name", "module", "weight", *COMMON}
Declared = Iterable[str] | Callable[[dict], Iterable[str]]


@dataclass(frozen=True)
class LossSpec:
    """What the decorator declares. `reads` and `columns` are functions of the settings; `examples`
    and `couples_batch` may be."""

    name: str
    function: Callable
    reads: Callable[[dict], Iterable[str]]
    columns: Callable[[dict], Iterable[str]]
    examples: str | Callable[[dict], str]
    couples_batch: bool | Callable[[dict], bool]
    inspect_scores: Callable | None

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        return settings_of(self.function)


LOSSES: dict[str, LossSpec] = {}


def register_loss(
    name: str,
    *,
    reads: Declared = frozenset(),
    columns: Declared = frozenset(),
    examples: str | Callable[[dict], str] = "pairs",
    couples_batch: bool | Callable[[dict], bool] = False,
    inspect_scores: Callable | None = None,
) -> Callable[[Callable], Callable]:
    """Register a loss function under `loss=name`.

    reads: names of `NEEDS`, or a function from the settings (a dict) to them. columns: numeric data
    columns read through `pair.columns`, likewise names or a function. examples: "pairs" (the
    function gets a `Pair`), "targets" (a `Target` with the responses to imitate), "responses" (a
    `Target` with any of the data's responses) or "lists" (a `Ranking` with all responses of each
    prompt; their scores are always read). couples_batch: the loss of an example depends on the
    others of the batch, so a batch is not split; in evaluation it is computed over batches of
    `eval_batch_size` and is not comparable with other sizes. inspect_scores: `f(chosen_scores,
    rejected_scores, names, **settings) -> str`, called once with the scores of all training pairs
    (of lists, every pair in them) before a model loads; it raises on data that the loss cannot use
    and returns a line to print. examples and couples_batch may be functions of the settings, too.

    A setting is a keyword-only parameter; its annotation says what is accepted (see `ranges`).
    """
    if not callable(examples) and examples not in EXAMPLES:
        raise ValueError(
            f"register_loss({name!r}): examples={examples!r}; accepted: {', '.join(EXAMPLES)}"
        )

    def as_function(declared: Declared) -> Callable[[dict], Iterable[str]]:
        return declared if callable(declared) else lambda settings: declared

    def decorate(function: Callable) -> Callable:
        known = LOSSES.get(name)
        if known is not None and _source(known.function) != _source(function):
            raise ConfigError(
                f"a loss named {name!r} is already registered in"
                f" {known.function.__code__.co_filename}; pick another name"
            )
        LOSSES[name] = LossSpec(
            name,
            function,
            as_function(reads),
            as_function(columns),
            examples,
            couples_batch,
            inspect_scores,
        )
        return function

    return decorate


def _source(function: Callable) -> tuple[str, str]:
    return function.__code__.co_filename, function.__qualname__


def _declared(value: Any, settings: dict) -> Any:
    """What a loss declares, for its settings where it is a function of them."""
    return value(settings) if callable(value) else value


def _mean_logp_of_best(data: Pair | Ranking) -> Tensor:
    """pi/n of the chosen response, or of the best of a list, (examples,)."""
    if isinstance(data, Ranking):
        return (data.best * data.policy_logps / data.lengths).sum(1)
    return data.chosen.policy_logps / data.chosen.lengths


class BoundLoss:
    """A loss with its settings, ready to call: `BoundLoss(pair) -> LossOutput`.

    sft_weight: of the likelihood that is added to it. weight: the column of the data by which the
    loss of each pair is multiplied; None for none. all_pairs: a loss of pairs becomes one of lists,
    the mean over all pairs of a list. divergence, divergence_alpha: what holds the policy to the
    reference, see `divergences`. calibration, calibration_decay: rebalance the gradients of the two
    sides, see `calibration`; it couples the pairs of a batch.

    Calling it changes neither the loss nor its input. A loss with means over the steps has them in
    `running`, which moves by `keep` alone.
    """

    def __init__(
        self,
        spec: LossSpec,
        settings: dict,
        sft_weight: float = 0.0,
        weight: str | None = None,
        all_pairs: bool = False,
        divergence: str = "reverse_kl",
        divergence_alpha: float | None = None,
        calibration: bool = False,
        calibration_decay: float = 0.98,
    ):
        self.name = spec.name
        self.divergence, self._link = divergence, link_of(divergence, divergence_alpha)
        self.all_pairs = all_pairs
        self.examples = "lists" if all_pairs else _declared(spec.examples, settings)
        self.has_own_losses = not _declared(spec.couples_batch, settings)  # for each example
        self.calibration, self.calibration_decay = calibration, calibration_decay
        self.couples_batch = calibration or not self.has_own_losses
        self.settings = settings
        self.sft_weight, self.weight = sft_weight, weight
        self.reads = frozenset(spec.reads(settings)) | ({"lengths"} if sft_weight else frozenset())
        if self.examples == "lists":
            self.reads |= {"scores"}
        self.columns = frozenset(spec.columns(settings)) | ({weight} if weight else frozenset())
        _check_reads(spec.name, self.reads)
        self._spec = spec
        self.running: dict[str, Tensor] = {}

    def inspect_scores(self, chosen_scores: Tensor, rejected_scores: Tensor, names) -> str | None:
        """What the loss has to say of the training scores, (pairs,) each, before a model loads; see
        `register_loss`."""
        if self._spec.inspect_scores is None or "scores" not in self.reads:
            return None
        return self._spec.inspect_scores(chosen_scores, rejected_scores, names, **self.settings)

    def __call__(self, data: Pair | Target | Ranking) -> LossOutput:
        return self.after(data, self.running)

    def after(self, data: Pair | Target | Ranking, running: Mapping[str, Tensor]) -> LossOutput:
        """The loss where `running` are the means over the steps so far."""
        if self.calibration and isinstance(data, Pair) and data.head_norms is not None:
            loss = functools.partial(self._plain, running=running)
            return calibrated(loss, data, running, self.calibration_decay)
        return self._plain(data, running)

    def _plain(self, data: Pair | Target | Ranking, running: Mapping[str, Tensor]) -> LossOutput:
        """`after`, without calibration."""
        read = data if self.divergence == "reverse_kl" else through_link(data, self._link)
        output = self._of_its_own(replace(read, running=running))
        losses = output.losses
        if self.sft_weight:
            losses = losses - self.sft_weight * _mean_logp_of_best(data)
        if self.weight:
            losses = losses * data.columns[self.weight]
        return replace(output, losses=losses)

    def _of_its_own(self, data: Pair | Target | Ranking) -> LossOutput:
        """What the function returns, without what is common to all losses."""
        call = self._mean_over_pairs if self.all_pairs else self._spec.function
        return call(data, **self.settings)

    def check_calibration(self) -> None:
        """Raise ConfigError if calibration is set and the loss has no place for it."""
        reason = reason_against(self.examples, self.reads) if self.calibration else None
        if reason:
            raise ConfigError(
                "loss.calibration=true rebalances the gradients through the log-probs of the chosen"
                f" and the rejected response, and loss={self.name} {reason}; set it to false"
            )

    def check_divergence(self) -> None:
        """Raise ConfigError if another divergence is set and the loss has no place for it."""
        if self.divergence == "reverse_kl":
            return
        batch = made_up_batch(self, n=32)
        reason = reads_logratios_alone(self.reads, lambda b: self._of_its_own(b).losses, batch)
        if reason:
            raise ConfigError(
                f"loss.divergence={self.divergence} changes what a loss of log-ratios makes of"
                f" them, and loss={self.name} {reason}; set it to reverse_kl"
            )

    def _mean_over_pairs(self, ranking: Ranking, **settings: Any) -> LossOutput:
        """The loss of pairs on all pairs of each list, and its mean over them; 0 without a pair."""
        pair, lists = ranking.pairs()
        output = self._spec.function(pair, **settings)
        n_pairs = torch.bincount(lists, minlength=len(ranking.mask)).clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            sums = values.new_zeros(len(n_pairs)).index_add(0, lists, values)
            return sums / n_pairs

        rewards = None
        if output.chosen_rewards is not None:
            # A response has one reward, in however many pairs it is.
            _, better, worse = ranking.better.nonzero(as_tuple=True)
            rewards = torch.zeros_like(ranking.scores)
            rewards[lists, better] = output.chosen_rewards.detach()
            rewards[lists, worse] = output.rejected_rewards.detach()
        metrics = {name: mean(values) for name, values in output.metrics.items()}
        return LossOutput(
            mean(output.losses), metrics=metrics, running=output.running, rewards=rewards
        )

    def keep(self, output: LossOutput) -> None:
        """Take over the running means that a training batch led to, once its step was taken."""
        self.running = {name: value.detach().double() for name, value in output.running.items()}

    def state_dict(self) -> dict[str, float]:
        """The running means by name; empty for a loss that has none."""
        return {name: value.item() for name, value in self.running.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.running = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()
        }


def _check_reads(name: str, reads: frozenset[str]) -> None:
    unknown = sorted(reads - NEEDS.keys())
    if unknown:
        raise ConfigError(f"loss {name!r} reads {unknown}; accepted: {sorted(NEEDS)}")
    text = sorted(need for need in reads if NEEDS[need].source == "text")
    if "scalar_head" in reads and text:
        raise ConfigError(
            f"loss {name!r} reads {', '.join(text)}, and scalar_head, a model that has no"
            " log-probs; leave out one or the other"
        )


def bind_loss(config: Mapping) -> BoundLoss:
    """Match the yaml of a loss (`config`: name, module, sft_weight and the settings) with its
    function's signature.

    Raises ConfigError for an unknown loss, an unknown or missing setting, or a value that the
    annotation of its setting does not accept.
    """
    config = dict(config)
    if config.get("module"):
        load_module(config["module"], "loss.module")
    name = config.get("name")
    if name not in LOSSES:
        raise ConfigError(
            f"loss.name={name!r} is not a registered loss; {nearest(str(name), LOSSES)}"
        )
    spec = LOSSES[name]
    settings = {key: value for key, value in config.items() if key not in COMMON_KEYS}
    common = {
        "sft_weight": config.get("sft_weight") or 0.0,
        "all_pairs": config.get("all_pairs") or False,
        "divergence": config.get("divergence") or "reverse_kl",
        "divergence_alpha": config.get("divergence_alpha"),
        "calibration": config.get("calibration") or False,
        "calibration_decay": config.get("calibration_decay", 0.98),
    }
    _check_settings(spec, settings, common)
    sft_weight, all_pairs = common["sft_weight"], common["all_pairs"]
    settings |= prepared(spec.function, settings)
    examples = _declared(spec.examples, settings)
    if all_pairs and (examples != "pairs" or spec.columns(settings)):
        reason = (
            f"is one of {examples}"
            if examples != "pairs"
            else "reads a column, which belongs to pairs that came with the data"
        )
        raise ConfigError(
            f"loss.all_pairs=true is the mean of a loss of pairs over all pairs of a prompt, and"
            f" loss={name} {reason}; set it to false"
        )
    weight = config.get("weight")
    loss = BoundLoss(spec, settings, weight=weight, **common)
    if sft_weight and (loss.examples not in ("pairs", "lists") or "scalar_head" in loss.reads):
        raise ConfigError(
            f"loss.sft_weight={sft_weight} mixes in a likelihood, which loss={name} does not have;"
            " set it to 0"
        )
    if weight is not None:
        _check_weight(loss)
    _try_out(loss)
    return loss


def _check_weight(loss: BoundLoss) -> None:
    """A column of weights is named, and belongs to a loss that is a mean over pairs."""
    if not isinstance(loss.weight, str) or not loss.weight:
        raise ConfigError(
            f"loss.weight={loss.weight!r} must be the name of a column of the data, or null"
        )
    reason = ""
    if loss.examples != "pairs":
        reason = f"is a loss of {loss.examples}, and columns of numbers belong to pairs"
    elif not loss.has_own_losses:
        reason = "couples the pairs of a batch, so that no pair has its own loss to weight"
    if reason:
        raise ConfigError(f"loss.weight={loss.weight}: loss={loss.name} {reason}; set it to null")


def _check_settings(spec: LossSpec, settings: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    """Every setting is a parameter, none is missing, and each is what its annotation accepts.

    common: the values of keys of every loss.
    """
    accepted = spec.settings
    unknown = [key for key in settings if key not in accepted]
    if unknown:
        raise ConfigError(
            f"loss={spec.name} has no setting {', '.join(unknown)}; accepted:"
            f" {', '.join(accepted) or 'none'}"
        )
    missing = [
        key for key, p in accepted.items() if p.default is p.empty and settings.get(key) is None
    ]
    if missing:
        raise ConfigError(
            f"loss={spec.name} needs {', '.join('loss.' + key for key in missing)}; accepted:"
            f" {', '.join(accepted)}"
        )
    annotations = annotations_of(spec.function) | COMMON
    values = {key: p.default for key, p in accepted.items()} | dict(settings)
    for key, value in (values | common).items():
        if text := expected(annotations.get(key), value):
            raise ConfigError(f"loss.{key}={value!r} of loss={spec.name} must be {text}")


def made_up_batch(loss: BoundLoss, n: int = 3, seed: int = 0) -> Pair | Target | Ranking:
    """Random numbers for exactly what the loss declares to read, as `n` examples; the rest is
    None. Lists have four responses, and every other one three."""
    generator = torch.Generator().manual_seed(seed)

    def filled(side: str, n: int = n) -> dict[str, Tensor]:
        draw = MadeUp(n, side, generator)
        return {name: need.made_up(draw) for name, need in needs_of(loss.reads).items()}

    if loss.examples == "lists":
        mask = torch.ones(n, 4, dtype=torch.bool)
        mask[::2, 3] = False
        values = filled("listed", 4 * n)
        return Ranking(**{k: v.reshape(n, 4, *v.shape[1:]) for k, v in values.items()}, mask=mask)
    if loss.examples != "pairs":
        return Target(**filled("single"))
    chosen, rejected = Side(**filled("chosen")), Side(**filled("rejected"))
    columns = MadeUp(n, "chosen", generator)
    return Pair(chosen, rejected, {name: columns.normal() for name in sorted(loss.columns)})


def _try_out(loss: BoundLoss) -> None:
    """Call the loss once on a made-up batch: a slip in a loss or its yaml shows now, not after the
    models are loaded."""
    try:
        loss.check_divergence()
        loss.check_calibration()
        output = loss(made_up_batch(loss))
    except (TypeError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"loss={loss.name} failed on a made-up batch that holds what it declares to read"
            f" ({', '.join(sorted(loss.reads)) or 'nothing'}): {error}; correct the function, its"
            f" yaml, or `reads`, which may name {', '.join(sorted(NEEDS))}"
        ) from error
    if output.losses.shape != (3,) or not bool(torch.isfinite(output.losses).all()):
        raise ConfigError(
            f"loss={loss.name} must return one finite loss an example, shape (3,), not"
            f" {output.losses}"
        )
    if output.running and not loss.couples_batch:
        raise ConfigError(
            f"loss={loss.name} keeps running means of whole batches; register it with"
            " couples_batch=True"
        )
