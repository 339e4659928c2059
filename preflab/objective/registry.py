"""The registry of losses: a loss is one function whose signature is its settings and whose `reads` is its input."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from preflab.objective.types import LossOutput, Pair, Target
from utils import ConfigError, load_module, nearest

NEEDS = {
    "reference",  # log-probs under the frozen reference: reference_*_logps, *_logratio
    "scores",  # numbers that came with the data: *_scores
    "token_kl",  # full-vocabulary KL(reference || policy) summed over response positions: *_kl
    "token_logps",  # log-prob of each response token under the policy: *_token_logps
    "lengths",  # response lengths in tokens: *_lengths
    "collision",  # log sum_v pi(v)^2 summed over response positions, without gradient: *_collision
    "scalar_head",  # a model with one output instead of a vocabulary: *_values
}


@dataclass(frozen=True)
class LossSpec:
    """What the decorator declares. `reads` and `columns` are functions of the settings."""

    name: str
    function: Callable
    reads: Callable[[dict], frozenset]
    columns: Callable[[dict], frozenset]
    examples: str
    couples_batch: bool
    inspect_scores: Callable | None

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


LOSSES: dict[str, LossSpec] = {}


EXAMPLES = ("pairs", "targets", "responses")


# Keys of the `loss` group that belong to every loss and are handled here, not by the function.
COMMON_KEYS = {"name", "module", "sft_weight"}


SFT_WEIGHT = inspect.Parameter(
    "sft_weight", inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation=float
)


# What a number must satisfy, by the name of its setting. Those that end in _weight are like alpha.
RANGES = {
    "beta": (lambda value: value > 0, "be greater than 0; docs/losses.md has usual values"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "lie in [0, 0.5)"),
    "momentum": (lambda value: 0 <= value < 1, "lie in [0, 1)"),
    **dict.fromkeys(
        ("alpha", "gamma", "delta", "margin"), (lambda value: value >= 0, "not be negative")
    ),
}


def register_loss(
    name: str,
    *,
    reads=frozenset(),
    columns=frozenset(),
    examples="pairs",
    couples_batch=False,
    inspect_scores=None,
):
    """Register a loss function under `loss=name`.

    reads: subset of `NEEDS`, or a function from the settings (a dict) to one, when it depends on
    them. columns: numeric data columns read through `pair.columns`, likewise a set or a function of
    the settings. examples: "pairs" (the function gets a `Pair`), "targets" (it gets a `Target` with
    the responses to imitate) or
        "responses" (it gets a `Target` with any of the data's responses).
    couples_batch: the loss of an example depends on the others of the batch, so a batch must not be
    split; in
        evaluation it is computed over batches of `eval_batch_size`, and is not comparable with
        other sizes.
    inspect_scores: `f(chosen_scores, rejected_scores, names, **settings) -> str`, called once with
    the scores of all
        training pairs before a model loads; it raises on data the loss cannot use and returns a
        line to print.
    """
    if examples not in EXAMPLES:
        raise ValueError(
            f"register_loss({name!r}): examples={examples!r}; accepted: {', '.join(EXAMPLES)}"
        )

    def as_function(declared):
        return declared if callable(declared) else lambda settings: frozenset(declared)

    def decorate(function):
        spec = LossSpec(
            name,
            function,
            as_function(reads),
            as_function(columns),
            examples,
            couples_batch,
            inspect_scores,
        )
        known = LOSSES.get(name)
        if known is not None and _source(known.function) != _source(function):
            raise ConfigError(
                f"a loss named {name!r} is already registered in {known.function.__module__}; pick"
                " another name"
            )
        LOSSES[name] = spec
        return function

    return decorate


def _source(function: Callable) -> tuple[str, str]:
    return function.__code__.co_filename, function.__qualname__


class BoundLoss:
    """A loss with its settings, ready to call: `BoundLoss(pair) -> LossOutput`.

    Calling it changes nothing. A loss with means over the steps has them in `running`, which moves
    by `keep` alone.
    """

    def __init__(self, spec: LossSpec, settings: dict, sft_weight: float = 0.0):
        self.name = spec.name
        self.examples = spec.examples
        self.couples_batch = spec.couples_batch
        self.settings = settings
        self.sft_weight = sft_weight
        self.reads = frozenset(spec.reads(settings)) | ({"lengths"} if sft_weight else frozenset())
        self.columns = frozenset(spec.columns(settings))
        unknown = self.reads - NEEDS
        if unknown:
            raise ConfigError(
                f"loss {spec.name!r} reads {sorted(unknown)}; accepted: {sorted(NEEDS)}"
            )
        self._spec = spec
        self.running: dict[str, Tensor] = {}

    def inspect_scores(self, chosen_scores: Tensor, rejected_scores: Tensor, names) -> str | None:
        """What the loss has to say of the training scores, (pairs,) each, before a model loads; see
        `register_loss`."""
        if self._spec.inspect_scores is None or "scores" not in self.reads:
            return None
        return self._spec.inspect_scores(chosen_scores, rejected_scores, names, **self.settings)

    def __call__(self, data: Pair | Target) -> LossOutput:
        if isinstance(data, Pair):
            data.running = self.running
        output = self._spec.function(data, **self.settings)
        if self.sft_weight:
            output.losses = (
                output.losses - self.sft_weight * data.policy_chosen_logps / data.chosen_lengths
            )
        return output

    def keep(self, output: LossOutput) -> None:
        """Take over the running means that a training batch led to, once its step was taken."""
        self.running = {name: value.detach().double() for name, value in output.running.items()}

    def state_dict(self) -> dict:
        """Numbers by name; nothing for a loss without running means."""
        return {name: value.item() for name, value in self.running.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.running = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()
        }


def bind_loss(config: Mapping) -> BoundLoss:
    """Match the yaml of a loss (`config`: name, module, sft_weight and the settings) with its
    function's signature.

    Raises ConfigError for an unknown loss, an unknown or missing setting, or a setting out of its
    range.
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
    accepted = spec.settings
    unknown = [key for key in settings if key not in accepted]
    if unknown:
        raise ConfigError(
            f"loss={name} has no setting {', '.join(unknown)}; accepted:"
            f" {', '.join(accepted) or 'none'}"
        )
    missing = [
        key for key, p in accepted.items() if p.default is p.empty and settings.get(key) is None
    ]
    if missing:
        raise ConfigError(
            f"loss={name} needs {', '.join('loss.' + key for key in missing)}; accepted:"
            f" {', '.join(accepted)}"
        )
    sft_weight = config.get("sft_weight") or 0.0
    for key, parameter in (spec.settings | {"sft_weight": SFT_WEIGHT}).items():
        _check_setting(
            name,
            parameter,
            sft_weight if key == "sft_weight" else settings.get(key, parameter.default),
        )
    if sft_weight and (spec.examples != "pairs" or "scalar_head" in spec.reads(settings)):
        raise ConfigError(
            f"loss.sft_weight={sft_weight} mixes in a likelihood, which loss={name} does not have;"
            " set it to 0"
        )
    loss = BoundLoss(spec, settings, sft_weight)
    _try_out(loss)
    return loss


def made_up_batch(loss: BoundLoss, n: int = 3, seed: int = 0) -> Pair | Target:
    """Random numbers for exactly what the loss declares to read, as `n` examples; the rest is
    None."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([float(2 + i % 3) for i in range(n)], dtype=torch.float64)
    if loss.examples != "pairs":
        return Target(
            policy_logps=normal(n) - 4,
            lengths=lengths,
            reference_logps=normal(n) - 4,
            scores=torch.arange(n).remainder(2).double(),
        )
    filled = {
        "reference": {
            "reference_chosen_logps": normal(n) - 4,
            "reference_rejected_logps": normal(n) - 4,
        },
        "scores": {
            "chosen_scores": normal(n).abs() + 2,
            "rejected_scores": normal(n).abs().clamp(max=1) + 0.5,
        },
        "token_kl": {"chosen_kl": normal(n).abs(), "rejected_kl": normal(n).abs()},
        "token_logps": {
            "chosen_token_logps": -normal(n, 4).abs(),
            "rejected_token_logps": -normal(n, 4).abs(),
        },
        "lengths": {"chosen_lengths": lengths, "rejected_lengths": lengths + 1},
        "collision": {"chosen_collision": -2 * lengths, "rejected_collision": -2 * lengths},
        "scalar_head": {"chosen_values": normal(n), "rejected_values": normal(n)},
    }
    fields = {key: value for need in sorted(loss.reads) for key, value in filled[need].items()}
    if "scalar_head" not in loss.reads:
        fields |= {"policy_chosen_logps": normal(n) - 4, "policy_rejected_logps": normal(n) - 4}
    return Pair(**fields, columns={name: normal(n) for name in sorted(loss.columns)})


def _try_out(loss: BoundLoss) -> None:
    """Call the loss once on a made-up batch: a slip in a loss or its yaml shows now, not after the
    models are loaded."""
    try:
        output = loss(made_up_batch(loss))
    except (TypeError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"loss={loss.name} failed on a made-up batch that holds what it declares to read"
            f" ({', '.join(sorted(loss.reads)) or 'nothing'}): {error}; mend the function, its"
            " yaml, or `reads`"
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


def _check_setting(name: str, parameter: inspect.Parameter, value) -> None:
    """A setting is of the kind that the function's signature says, and in the range that goes with
    its name."""
    key = parameter.name
    holds, told = (
        RANGES["alpha" if key.endswith("_weight") else key]
        if key in RANGES or key.endswith("_weight")
        else (lambda value: True, "")
    )
    if parameter.annotation in (bool, "bool") and not isinstance(value, bool):
        raise ConfigError(f"loss.{key}={value!r} of loss={name} must be true or false")
    if parameter.annotation not in (float, "float") and not (
        parameter.annotation is parameter.empty and told
    ):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"loss.{key}={value!r} of loss={name} must be a finite number")
    if not holds(value):
        raise ConfigError(f"loss.{key}={value} of loss={name} must {told}")
