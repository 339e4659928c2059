"""The registry of losses and the losses themselves: tensors in, tensors out.

A loss is one function here or in `more_losses.py` (or in a file of yours, `loss.module=`) and one
yaml in `config/loss/`; no other file knows its name, and docs/losses.md says when to use which.
Notation, as in the DPO paper (arXiv:2305.18290): w chosen, l rejected, d = log pi(y|x) - log
pi_ref(y|x) the log-ratio of a response, h = d_w - d_l the gap of a pair, S the logistic sigmoid, n
a response's length. Sums run over response tokens, EOS included. All tensors are float64: a summed
log-probability near -400 carries 3e-5 of rounding in float32.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import ConfigError, DataError, load_module, nearest

NEEDS = {
    "reference",  # log-probs under the frozen reference: reference_*_logps, *_logratio
    "scores",  # numbers that came with the data: *_scores
    "token_kl",  # full-vocabulary KL(reference || policy) summed over response positions: *_kl
    "token_logps",  # log-prob of each response token under the policy: *_token_logps
    "lengths",  # response lengths in tokens: *_lengths
    "collision",  # log sum_v pi(v)^2 summed over response positions, without gradient: *_collision
    "scalar_head",  # a model with one output instead of a vocabulary: *_values
}


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


# --------------------------------------------------------------------------------------------------


@register_loss("sft", reads={"lengths"}, examples="targets")
def sft(target: Target, *, reduction: str = "sum") -> LossOutput:
    """-log pi(y|x): supervised fine-tuning on the data's SFT target (prompt excluded, EOS
    included).

    reduction: "sum" over the response's tokens, or "mean", which divides each response by its
    length.
    """
    if reduction not in ("sum", "mean"):
        raise ConfigError(f"loss.reduction={reduction!r}; accepted: sum, mean")
    losses = -target.policy_logps
    return LossOutput(losses / target.lengths if reduction == "mean" else losses)


def _dpo_reads(settings: Mapping) -> set:
    return set() if settings.get("reference_free") else {"reference"}


@register_loss("dpo", reads=_dpo_reads)
def dpo(
    pair: Pair, *, beta: float, label_smoothing: float = 0.0, reference_free: bool = False
) -> LossOutput:
    """-(1-e) log S(beta h) - e log S(-beta h) (DPO, arXiv:2305.18290 eq. 7; e > 0: conservative
    DPO).

    beta: inverse temperature of the implicit reward, > 0; label_smoothing e in [0, 0.5): the
    assumed share of flipped labels; reference_free: the reference is taken as uniform (its
    log-probs as 0) and is not built.
    """
    chosen = pair.policy_chosen_logps if reference_free else pair.chosen_logratio
    rejected = pair.policy_rejected_logps if reference_free else pair.rejected_logratio
    gap = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
    return LossOutput(losses, beta * chosen, beta * rejected)


@register_loss(
    "ipo",
    reads=lambda settings: (
        {"reference", "lengths"} if settings.get("average_log_prob") else {"reference"}
    ),
)
def ipo(pair: Pair, *, beta: float, average_log_prob: bool = False) -> LossOutput:
    """(h - 1/(2 beta))^2 (IPO, arXiv:2310.12036 eq. 17, beta for its tau).

    average_log_prob: each log-ratio is divided by its response's length first (what the authors
    ran), so that the target gap does not depend on length. The logged rewards stay those of the
    sums, to compare with other losses.
    """
    chosen, rejected = pair.chosen_logratio, pair.rejected_logratio
    if average_log_prob:
        gap = chosen / pair.chosen_lengths - rejected / pair.rejected_lengths
    else:
        gap = chosen - rejected
    return LossOutput((gap - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected)


ODPO_OFFSETS = {
    "log": lambda chosen, rejected: torch.log(chosen - rejected),
    "ratio": lambda chosen, rejected: torch.log(chosen / rejected),
    "identity": lambda chosen, rejected: chosen - rejected,
    "log1p": lambda chosen, rejected: torch.log1p(chosen - rejected),
    "none": lambda chosen, rejected: torch.zeros_like(chosen),
}


def odpo_offset(
    chosen_scores: Tensor, rejected_scores: Tensor, offset: str, names: list[str] = ()
) -> Tensor:
    """f(s_w, s_l) of ODPO, (pairs,); raises DataError naming the example where it is undefined."""
    gap = chosen_scores - rejected_scores
    bad = gap <= 0
    if offset == "ratio":
        bad = bad | (chosen_scores <= 0) | (rejected_scores <= 0)
    if offset != "none" and bool(bad.any()):
        i = int(bad.nonzero()[0])
        wanted = "positive scores" if offset == "ratio" else "a chosen score above the rejected one"
        raise DataError(
            f"loss=odpo with offset={offset} needs {wanted}, but"
            f" {names[i] if names else f'pair {i}'} has {chosen_scores[i].item()} and"
            f" {rejected_scores[i].item()}; mend the data or use loss.offset=none"
        )
    return ODPO_OFFSETS[offset](chosen_scores, rejected_scores)


def _odpo_offset_name(settings: Mapping) -> str:
    if settings.get("offset", "log") not in ODPO_OFFSETS:
        raise ConfigError(
            f"loss.offset={settings['offset']!r}; accepted: {', '.join(ODPO_OFFSETS)}"
        )
    if settings.get("ratio") and settings.get("offset", "log") not in ("log", "ratio"):
        raise ConfigError(
            f"loss.ratio=true and loss.offset={settings['offset']} contradict each other; set one"
            " of them"
        )
    return "ratio" if settings.get("ratio") else settings.get("offset", "log")


def _odpo_reads(settings: Mapping) -> set:
    return {"reference"} if _odpo_offset_name(settings) == "none" else {"reference", "scores"}


def _odpo_offsets_at_start(
    chosen_scores, rejected_scores, names, *, alpha, offset="log", ratio=False, **_
) -> str:
    f = odpo_offset(
        chosen_scores, rejected_scores, _odpo_offset_name({"offset": offset, "ratio": ratio}), names
    )
    low, middle, high = (
        (alpha * f).quantile(torch.tensor([0.05, 0.5, 0.95], dtype=f.dtype)).tolist()
    )
    relaxed = (alpha * f < 0).double().mean().item()
    told = (
        f"odpo offsets alpha*f of {len(f):,} pairs: 5% {low:.3g}, median {middle:.3g}, 95%"
        f" {high:.3g}"
    )
    return told + (
        f"; {relaxed:.0%} are negative, which relaxes the margin rather than demanding one"
        if relaxed
        else ""
    )


@register_loss("odpo", reads=_odpo_reads, inspect_scores=_odpo_offsets_at_start)
def odpo(
    pair: Pair, *, beta: float, alpha: float = 1.0, offset: str = "log", ratio: bool = False
) -> LossOutput:
    """-log S(beta h - alpha f(s_w, s_l)) (ODPO, arXiv:2402.10571), s the scores that came with the
    data.

    alpha >= 0: how much of the score gap the policy must reproduce; offset f: log `log(s_w - s_l)`,
    ratio `log(s_w / s_l)` (also by ratio=true), identity `s_w - s_l`, log1p `log(1 + s_w - s_l)`,
    none 0. Raises DataError naming the example for a gap that is not positive, or with ratio a
    score that is not.
    """
    name = _odpo_offset_name({"offset": offset, "ratio": ratio})
    chosen, rejected = pair.chosen_logratio, pair.rejected_logratio
    margin = beta * (chosen - rejected)
    metrics = {}
    if name != "none":
        f = odpo_offset(pair.chosen_scores, pair.rejected_scores, name, pair.names)
        margin = margin - alpha * f
        metrics["offset_{split}"] = alpha * f
    return LossOutput(-F.logsigmoid(margin), beta * chosen, beta * rejected, metrics)


@register_loss("soft-label", reads={"reference", "scores"})
def soft_label(pair: Pair, *, beta: float, gamma: float = 1.0) -> LossOutput:
    """-p log S(beta h) - (1-p) log S(-beta h), p = S(gamma (s_w - s_l)): DPO towards the preference
    that the scores imply.

    The cross-entropy of DPO's Bradley-Terry model (arXiv:2305.18290 eq. 6) with the one of the
    scores. beta: inverse temperature of the implicit reward, > 0; gamma: that of the scores, >= 0
    (0: every pair is a coin toss).
    """
    gap = beta * (pair.chosen_logratio - pair.rejected_logratio)
    p = torch.sigmoid(gamma * (pair.chosen_scores - pair.rejected_scores)).to(gap.dtype)
    losses = -p * F.logsigmoid(gap) - (1 - p) * F.logsigmoid(-gap)
    return LossOutput(
        losses,
        beta * pair.chosen_logratio,
        beta * pair.rejected_logratio,
        {"preference_{split}/mean": p},
    )


@register_loss("cal-dpo", reads={"reference"})
def cal_dpo(pair: Pair, *, beta: float, cal_weight: float = 1.0) -> LossOutput:
    """-log S(h) + lambda ((d_w - 1/(2 beta))^2 + (d_l + 1/(2 beta))^2) (Cal-DPO, arXiv:2412.14516,
    its algorithm).

    There is no beta inside the sigmoid. beta sets the calibration targets +-1/(2 beta); cal_weight
    is lambda (the published code uses 0.5).
    """
    chosen, rejected = pair.chosen_logratio, pair.rejected_logratio
    target = 1 / (2 * beta)
    calibration = (chosen - target) ** 2 + (rejected + target) ** 2
    return LossOutput(
        -F.logsigmoid(chosen - rejected) + cal_weight * calibration, beta * chosen, beta * rejected
    )


def _tdpo(pair: Pair, beta: float, alpha: float, if_tdpo2: bool) -> LossOutput:
    chosen, rejected = pair.chosen_logratio, pair.rejected_logratio
    if if_tdpo2:
        margin = alpha * (pair.rejected_kl - pair.chosen_kl.detach())
    else:
        margin = pair.rejected_kl - pair.chosen_kl
    losses = -F.logsigmoid(beta * (chosen - rejected - margin))
    metrics = {
        "kl_{split}/chosen": pair.chosen_kl,
        "kl_{split}/rejected": pair.rejected_kl,
        "kl_{split}/margin": pair.rejected_kl - pair.chosen_kl,
    }
    return LossOutput(losses, beta * chosen, beta * rejected, metrics)


@register_loss("tdpo", reads={"reference", "token_kl"})
def tdpo(pair: Pair, *, beta: float, alpha: float = 0.5, if_tdpo2: bool = True) -> LossOutput:
    """Token-level DPO (arXiv:2404.11999): `tdpo2` by default, `tdpo1` with if_tdpo2=false.

    K_w, K_l: KL(reference || policy) over the whole vocabulary, summed over response positions.
    """
    return _tdpo(pair, beta, alpha, if_tdpo2)


@register_loss("tdpo1", reads={"reference", "token_kl"})
def tdpo1(pair: Pair, *, beta: float) -> LossOutput:
    """-log S(beta (h - (K_l - K_w))), gradient through both K (TDPO1, arXiv:2404.11999)."""
    return _tdpo(pair, beta, 1.0, False)


@register_loss("tdpo2", reads={"reference", "token_kl"})
def tdpo2(pair: Pair, *, beta: float, alpha: float = 0.5) -> LossOutput:
    """-log S(beta (h - alpha (K_l - stopgrad(K_w)))) (TDPO2, arXiv:2404.11999).

    alpha >= 0: weight of the sequential KL; 0 is DPO.
    """
    return _tdpo(pair, beta, alpha, True)


@register_loss(
    "bradley_terry",
    reads={"scalar_head"},
    columns=lambda settings: {settings["margin"]} if settings.get("margin") else set(),
)
def bradley_terry(pair: Pair, *, margin: str | None = None) -> LossOutput:
    """-log S(r_w - r_l - m) for a reward model with a scalar head (Bradley and Terry, 1952;
    arXiv:2203.02155).

    margin: null (m = 0), or the name of a numeric column of the data that holds m of each pair
    (arXiv:2307.09288).
    """
    gap = pair.chosen_values - pair.rejected_values
    if margin is not None:
        gap = gap - pair.columns[margin]
    return LossOutput(-F.logsigmoid(gap), pair.chosen_values, pair.rejected_values)


import more_losses  # noqa: E402, F401  the further losses, which need the registry above
