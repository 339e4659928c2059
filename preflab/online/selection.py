"""The registry of selections: functions that choose the pairs whose gold labels are bought.

    from preflab.online import Pool, register_selection

    @register_selection("closest")
    def closest(pool: Pool, n: int, rng, *, at_least: float = 0.0):
        gaps = abs(pool.gaps)
        return [pair for pair in gaps.argsort(kind="stable") if gaps[pair] >= at_least][:n]

`online.select` takes a name, or {name: NAME, setting: value} with `module` for a file of yours.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preflab.objective.ranges import annotations_of, expected, settings_of
from preflab.online.heads import fit_heads
from utils import ConfigError, PrefLabError, load_module, nearest

READS = ("responses", "features")


class SelectionError(PrefLabError):
    """A selection did not return pairs of the pool. The labels of the round are not bought."""

    everywhere = True


@dataclass(frozen=True)
class Past:
    """The labels bought in earlier rounds, as the discriminator sees their responses now.

    features: (labels, D), of the better response minus those of the worse one. gaps: (labels,), of
    their scores. ties: (labels,), whether gold scores were equal; then the first response stands
    for the better one.
    """

    features: np.ndarray
    gaps: np.ndarray
    ties: np.ndarray


@dataclass(frozen=True)
class Pool:
    """The pairs that may be labelled, in float64.

    scores: (responses,) of the discriminator; only differences within a prompt mean something.
    prompts: (responses,), the prompt of each, counted from 0. pairs: (pairs, 2), the positions of
    two responses to the same prompt, the one with the higher score first. Without "responses" in
    `reads` a prompt has one pair, the responses with the highest and the lowest score; with it, all
    pairs of its different responses. features: (responses, D), the hidden state in front of the
    discriminator's last layer at the end of each response, and past, with "features" in `reads`;
    else None.
    """

    scores: np.ndarray
    prompts: np.ndarray
    pairs: np.ndarray
    features: np.ndarray | None = None
    past: Past | None = None

    @property
    def gaps(self) -> np.ndarray:
        """(pairs,): by how much the first response of each pair scores higher."""
        return self.of_pairs(self.scores)

    @property
    def prompts_of_pairs(self) -> np.ndarray:
        """(pairs,): the prompt of each."""
        return self.prompts[self.pairs[:, 0]]

    def of_pairs(self, values: np.ndarray) -> np.ndarray:
        """Values of responses, (responses, ...), as differences of pairs, (pairs, ...)."""
        return values[self.pairs[:, 0]] - values[self.pairs[:, 1]]

    def typical_distance(self) -> float:
        """The root mean square, over pairs, of the distance between the features of a pair."""
        squares = (self.of_pairs(self.features) ** 2).sum(1)
        return float(np.sqrt(squares.mean())) or 1.0

    def heads(self, n: int, prior: float, rng: np.random.Generator) -> np.ndarray:
        """Scores of the responses under `n` bootstrap heads on the features, (responses, n).

        Each head is the discriminator's score plus a linear function of the features, which starts
        at random and learns from a resample of the labels in `past`; see `fit_heads`. prior: the
        standard deviation that a typical pair's gap has over heads before there is a label.
        """
        scale = self.typical_distance()
        labelled = ~self.past.ties
        weights = fit_heads(
            self.past.features[labelled] / scale, self.past.gaps[labelled], n, prior, rng
        )
        return self.scores[:, None] + (self.features / scale) @ weights.T


Rule = Callable[..., Iterable[int]]  # (pool, n, rng, **settings): positions in pool.pairs


@dataclass(frozen=True)
class SelectionSpec:
    """What the decorator declares."""

    name: str
    function: Rule
    reads: Callable[[dict], Iterable[str]]

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        return settings_of(self.function)


SELECTIONS: dict[str, SelectionSpec] = {}


def register_selection(
    name: str, *, reads: Iterable[str] | Callable[[dict], Iterable[str]] = ()
) -> Callable[[Rule], Rule]:
    """Register a function under `online.select=name`.

    It receives a `Pool`, the number of labels to buy and a numpy generator that depends on the seed
    and the round, and returns positions in `pool.pairs`, in the order in which they are bought. A
    prompt gets one label of a purchase: further pairs of it are skipped, and so is what comes after
    the number of labels. A setting is a keyword-only parameter, with the annotations of losses.

    reads: "responses" for all pairs of the responses to a prompt instead of the best and the worst,
    "features" for hidden states (and `Pool.heads`), or a function from the settings to these.
    """

    def as_function(settings: dict) -> Iterable[str]:
        return reads(settings) if callable(reads) else reads

    def decorate(function: Rule) -> Rule:
        known = SELECTIONS.get(name)
        if known is not None and _source(known.function) != _source(function):
            raise ConfigError(
                f"a selection named {name!r} is already registered in"
                f" {known.function.__code__.co_filename}; pick another name"
            )
        SELECTIONS[name] = SelectionSpec(name, function, as_function)
        return function

    return decorate


def _source(function: Callable) -> tuple[str, str]:
    return function.__code__.co_filename, function.__qualname__


@dataclass(frozen=True)
class BoundSelection:
    """A selection with its settings: `selection(pool, n, seed)` returns the pairs to buy."""

    spec: SelectionSpec
    settings: Mapping[str, Any]
    reads: frozenset[str]

    @property
    def name(self) -> str:
        return self.spec.name

    def __call__(self, pool: Pool, n: int, seed: Sequence[int]) -> list[int]:
        """Positions in `pool.pairs`, at most `n` and one of a prompt. Raises SelectionError."""
        if n <= 0 or not len(pool.pairs):
            return []
        try:
            rng = np.random.default_rng(seed)
            selected = self.spec.function(pool, n, rng, **self.settings)
            positions = [_position(value) for value in selected]
        except PrefLabError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise SelectionError(
                f"online.select={self.name} failed on {len(pool.pairs)} pairs:"
                f" {type(error).__name__}: {error}"
            ) from error
        if wrong := [value for value in positions if not 0 <= value < len(pool.pairs)]:
            raise SelectionError(
                f"online.select={self.name} returned {wrong[0]}, and accepted are positions of"
                f" pool.pairs, from 0 to {len(pool.pairs) - 1}"
            )
        return _one_of_each_prompt(positions, pool.prompts_of_pairs)[:n]


def _position(value) -> int:
    """A whole number of Python or numpy; raises TypeError for anything else, such as a mask."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"{value!r} is no position of a pair")
    return int(value)


def _one_of_each_prompt(positions: list[int], prompts: np.ndarray) -> list[int]:
    first = {int(prompts[position]): position for position in reversed(positions)}
    return [position for position in positions if first[int(prompts[position])] == position]


def bind_selection(given: str | Mapping) -> BoundSelection:
    """The selection that `online.select` names: NAME, or {name: NAME, setting: value}.

    Raises ConfigError for an unknown name or setting, for a value that the annotation of its
    setting does not accept, and for a function that fails on a made-up pool.
    """
    entries = {"name": given} if isinstance(given, str) else dict(given)
    module, name = entries.pop("module", None), entries.pop("name", None)
    if module:
        load_module(module, "online.select.module")
    if name not in SELECTIONS:
        raise ConfigError(
            f"online.select={name if isinstance(given, str) else dict(given)} names no registered"
            f" selection; {nearest(str(name), SELECTIONS)}"
        )
    spec = SELECTIONS[name]
    _check_settings(spec, entries)
    defaults = {key: parameter.default for key, parameter in spec.settings.items()}
    reads = frozenset(spec.reads({**defaults, **entries}))
    if unknown := sorted(reads - set(READS)):
        raise ConfigError(
            f"online.select={name} reads {', '.join(unknown)}; accepted: {', '.join(READS)}"
        )
    selection = BoundSelection(spec, entries, reads)
    _try_out(selection)
    return selection


def _check_settings(spec: SelectionSpec, settings: Mapping[str, Any]) -> None:
    accepted = ", ".join(spec.settings) or "none"
    if unknown := [key for key in settings if key not in spec.settings]:
        raise ConfigError(
            f"online.select={spec.name} has no setting {', '.join(unknown)}; accepted: {accepted}"
        )
    required = [key for key, p in spec.settings.items() if p.default is p.empty]
    if missing := [key for key in required if key not in settings]:
        raise ConfigError(
            f"online.select={spec.name} needs {', '.join(missing)}:"
            f" online.select={{name: {spec.name}, {missing[0]}: VALUE}}"
        )
    annotations = annotations_of(spec.function)
    for key, value in settings.items():
        if text := expected(annotations.get(key), value):
            raise ConfigError(f"{key}={value!r} of online.select={spec.name} must be {text}")


def _try_out(selection: BoundSelection) -> None:
    """Call the function once on a made-up pool: a slip in it shows now, not after models are
    loaded."""
    try:
        selection(made_up_pool(selection.reads), 2, [0])
    except SelectionError as error:
        raise ConfigError(
            f"{error} (of a made-up pool, with what `reads` names:"
            f" {', '.join(sorted(selection.reads)) or 'nothing'})"
        ) from error


def made_up_pool(reads: Iterable[str], n: int = 4, seed: int = 0) -> Pool:
    """Random numbers for exactly what is read, for `n` prompts with up to three responses."""
    rng = np.random.default_rng(seed)
    sizes = [2 + i % 2 if "responses" in reads else 2 for i in range(n)]
    scores = [rng.normal(size=size).tolist() for size in sizes]
    if "features" not in reads:
        return pool_of(scores)
    features = [rng.normal(size=(size, 3)) for size in sizes]
    past = Past(rng.normal(size=(5, 3)), rng.normal(size=5), np.arange(5) == 4)
    return pool_of(scores, features, past)


def pool_of(
    scores: list[list[float]],
    features: list[np.ndarray] | None = None,
    past: Past | None = None,
) -> Pool:
    """A pool of all pairs of the responses to each prompt. scores: (prompts, K), K may differ.
    features: (K, D) of each prompt."""
    pairs, begin = [], 0
    for of_prompt in scores:
        # of equal scores the earlier one is first
        order = sorted(range(len(of_prompt)), key=lambda i: (-of_prompt[i], i))
        ranks = {response: rank for rank, response in enumerate(order)}
        for i in range(len(of_prompt)):
            for j in range(i + 1, len(of_prompt)):
                first, second = (i, j) if ranks[i] < ranks[j] else (j, i)
                pairs.append((begin + first, begin + second))
        begin += len(of_prompt)
    prompts = np.repeat(np.arange(len(scores)), [len(of_prompt) for of_prompt in scores])
    flat = np.array([score for of_prompt in scores for score in of_prompt], dtype=np.float64)
    stacked = np.concatenate(features).astype(np.float64) if features else None
    return Pool(flat, prompts, np.array(pairs, dtype=np.int64).reshape(-1, 2), stacked, past)
