"""What an atlas knows of some pairs: the gradient of each response's log-prob, and the coefficients
of each loss.

A loss whose gradient goes through log-probs of responses alone has the update sum_r c_r g_r, with c
from one call of autograd on as many numbers as there are responses. A loss that reads whole
distributions or weighs tokens has its own gradient, a row beside those of the responses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from preflab.atlas.entries import Entry
from preflab.atlas.gradients import Gradients, SketchError
from preflab.batching.collate import collate
from preflab.batching.examples import ExampleNames, PreferenceData
from preflab.batching.packing import Layout
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.objective.needs import Need
from preflab.objective.pushes import slope_of_logps
from preflab.objective.registry import BoundLoss
from preflab.objective.types import FIELDS, LossOutput, Pair, Ranking, Side, Target, needs_of
from preflab.training.compute_loss import read_responses
from utils import DataError, Progress

LOGPS = "policy_logps"
Taken = dict[str, Tensor]  # values of responses by field, (responses, ...)


@dataclass(frozen=True)
class Pairs:
    """The pairs of an atlas: which responses they have, and what losses read of them.

    examples: indices of the pairs in `data`. responses: those of each distinct response in
    `singles`, the same data response by response. chosen, rejected (pairs,): places in
    `responses`.
    """

    data: PreferenceData
    examples: np.ndarray
    singles: PreferenceData
    responses: list[int]
    chosen: Tensor
    rejected: Tensor

    @property
    def names(self) -> ExampleNames:
        return ExampleNames(self.data, self.examples.tolist())


def pairs_of(data: PreferenceData, examples: np.ndarray) -> Pairs:
    """Each distinct response of some pairs once."""
    singles = PreferenceData(data.stores, "responses", "responses")
    places: dict[int, int] = {}
    members = []
    for example in examples:
        store, responses = data.responses_of(int(example))
        begin = int(singles.begins[data.number_of(store)])
        members.append([places.setdefault(begin + r, len(places)) for r in responses])
    chosen, rejected = torch.tensor(members).t()
    return Pairs(data, examples, singles, list(places), chosen, rejected)


@dataclass(frozen=True)
class Measured:
    """What the geometry of an atlas is computed from.

    gram (n, n): inner products of the gradients, those of the responses first. coefficients
    (losses, n). weights (losses, pairs): the size of the pushes on a pair. pushes (losses, 2): mean
    sizes of those on chosen and rejected responses. entries: the losses. own: whether a loss has a
    gradient of its own. left_out: reasons, by label. n_responses, n_weights: numbers of distinct
    responses and of trained weights.
    """

    gram: Tensor
    coefficients: Tensor
    weights: Tensor
    pushes: Tensor
    entries: list[Entry]
    own: list[bool]
    left_out: dict[str, str]
    pairs: Pairs
    n_weights: int
    error: SketchError | None

    @property
    def n_responses(self) -> int:
        return len(self.pairs.responses)


def has_own_gradient(loss: BoundLoss) -> bool:
    """Whether a loss reads more of the policy than the log-prob of each response, or values of
    tokens."""
    fields = needs_of(loss.reads)
    return any(FIELDS[name].trained and name != LOGPS for name in fields) or any(
        need.by_token for need in fields.values()
    )


def measure(
    policy: Scorer,
    reference: Scorer,
    pairs: Pairs,
    entries: Sequence[Entry],
    layout: Layout,
    gradients: Gradients,
    stop: Callable[[], None] = lambda: None,
) -> Measured:
    """Gradients and coefficients on some pairs.

    gradients: without rows; gets them. stop: is called between two passes of the model. Raises
    DataError where the first of `entries` cannot be computed on these pairs.
    """
    taken, columns = _read(policy, reference, pairs, entries, layout, stop)
    usable, left_out = _usable(entries, taken, columns, pairs)
    own = [entry for entry in usable if has_own_gradient(entry.loss)]
    bar = Progress(total=len(pairs.responses) + len(pairs.examples) * bool(own), desc="gradients")
    with bar:
        for response in pairs.responses:
            stop()
            batch = collate(pairs.singles, np.array([response]), layout).to(policy.device)
            gradients.add(gradients.of(score_responses(policy, batch).logps[0]))
            bar.update()
        _add_own(policy, reference, pairs, own, layout, gradients, stop, bar)
    n_rows = len(gradients.rows)
    coefficients = torch.zeros(len(usable), n_rows, dtype=torch.float64)
    slopes = torch.zeros(len(usable), len(pairs.responses), dtype=torch.float64)
    for i, entry in enumerate(usable):
        slopes[i] = _slopes(entry.loss, taken, columns, pairs)
        if entry in own:
            coefficients[i, len(pairs.responses) + own.index(entry)] = 1.0
        else:
            coefficients[i, : len(pairs.responses)] = slopes[i]
    chosen, rejected = slopes[:, pairs.chosen].abs(), slopes[:, pairs.rejected].abs()
    return Measured(
        gradients.gram(),
        coefficients,
        chosen + rejected,
        torch.stack([chosen.mean(1), rejected.mean(1)], dim=1),
        usable,
        [entry in own for entry in usable],
        left_out,
        pairs,
        sum(parameter.numel() for parameter in gradients.parameters),
        gradients.sketch_error(),
    )


def _needs(entries: Sequence[Entry]) -> dict[str, Need]:
    """What any of the losses reads, and the lengths, by which slopes of tokens are averaged."""
    return needs_of(frozenset({"lengths"}).union(*(entry.loss.reads for entry in entries)))


@torch.no_grad()
def _read(
    policy: Scorer,
    reference: Scorer,
    pairs: Pairs,
    entries: Sequence[Entry],
    layout: Layout,
    stop: Callable[[], None],
) -> tuple[Taken, Taken]:
    """What the losses read of each response, (responses, ...), and the columns of the pairs."""
    needs, parts = _needs(entries), []
    for response in pairs.responses:
        stop()
        batch = collate(pairs.singles, np.array([response]), layout).to(policy.device)
        available = {
            name: need
            for name, need in needs.items()
            if need.name not in ("token_weights", "mismatched")
            or (need.name == "token_weights" and batch.token_weights is not None)
        }
        read = read_responses(available, policy, reference, batch)
        parts.append({name: values.cpu() for name, values in read.items()})
    taken = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    batch = collate(pairs.data, pairs.examples, layout)
    return taken, batch.columns


def _joined(rows: list[Tensor]) -> Tensor:
    """Values of responses, (1, ...) each, as one tensor, with zeros behind shorter ones."""
    if rows[0].dim() == 1:
        return torch.cat(rows)
    return torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)


def _usable(
    entries: Sequence[Entry], taken: Taken, columns: Mapping[str, Tensor], pairs: Pairs
) -> tuple[list[Entry], dict[str, str]]:
    """The losses that can be computed on these pairs, and why the others cannot."""
    usable, left_out = [], {}
    for i, entry in enumerate(entries):
        reason = _obstacle(entry.loss, taken, columns, pairs)
        if reason and not i:
            raise DataError(f"loss={entry.label}: {reason}")
        if reason:
            left_out[entry.label] = reason
        else:
            usable.append(entry)
    return usable, left_out


def _obstacle(loss: BoundLoss, taken: Taken, columns: Mapping[str, Tensor], pairs: Pairs) -> str:
    """Why a loss cannot be computed on these pairs; "" if it can."""
    if missing := sorted(loss.columns - columns.keys()):
        return f"reads the column {missing[0]}, which the data do not have"
    if "token_weights" in loss.reads and "token_weights" not in taken:
        return "reads weights of tokens, which the data do not have"
    if "mismatched" in loss.reads:
        return "reads responses put to other prompts, which an atlas does not score"
    if loss.calibration:
        return "is calibrated by the norms of training steps, which an atlas does not take"
    if has_own_gradient(loss) and loss.couples_batch:
        return "couples the pairs of a batch through more than the log-probs of responses"
    if "scores" in loss.reads:
        scores = taken["scores"]
        if not bool(torch.isfinite(scores).all()):
            return "reads scores, which some of these responses do not have"
        try:
            sides = scores[pairs.chosen], scores[pairs.rejected]
            loss.inspect_scores(*sides, pairs.names)
            _call(loss, taken, columns, pairs)
        except DataError as error:
            return str(error)
    return ""


def _call(loss: BoundLoss, taken: Taken, columns: Mapping[str, Tensor], pairs: Pairs) -> LossOutput:
    """A loss of these pairs, in the form of examples that it reads: the chosen responses for one
    that imitates, all responses for one of single responses, and lists of two."""
    read = {name: taken[name] for name in needs_of(loss.reads)}

    def side(rows: Tensor) -> Taken:
        return {name: values[rows] for name, values in read.items()}

    chosen, rejected = side(pairs.chosen), side(pairs.rejected)
    if loss.examples == "pairs":
        own = {name: columns[name] for name in loss.columns}
        return loss(Pair(Side(**chosen), Side(**rejected), own, pairs.names))
    if loss.examples == "targets":
        return loss(Target(**chosen, names=pairs.names))
    if loss.examples == "responses":
        both = {name: torch.cat([chosen[name], rejected[name]]) for name in read}
        return loss(Target(**both, names=[*pairs.names, *pairs.names]))
    both = {name: torch.stack([chosen[name], rejected[name]], dim=1) for name in read}
    mask = torch.ones(len(pairs.chosen), 2, dtype=torch.bool, device=pairs.chosen.device)
    return loss(Ranking(**both, mask=mask, names=pairs.names))


def _slopes(loss: BoundLoss, taken: Taken, columns: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
    """d(mean loss)/dlogp of each response, (responses,); of a loss that weighs tokens for equal
    changes at all tokens."""
    trained = [name for name in needs_of(loss.reads) if FIELDS[name].trained]
    leaves = {name: taken[name].detach().requires_grad_() for name in trained}
    output = _call(loss, taken | leaves, columns, pairs)
    found = torch.autograd.grad(output.losses.mean(), list(leaves.values()), allow_unused=True)
    slopes = {
        name: torch.zeros_like(leaf) if slope is None else slope
        for (name, leaf), slope in zip(leaves.items(), found, strict=True)
    }
    return slope_of_logps(Side(**leaves, lengths=taken["lengths"]), slopes)


def _add_own(
    policy: Scorer,
    reference: Scorer,
    pairs: Pairs,
    own: list[Entry],
    layout: Layout,
    gradients: Gradients,
    stop: Callable[[], None],
    bar: Progress,
) -> None:
    """Append the gradient of the mean loss of each of `own`, by a pass for each pair."""
    if not own:
        return
    needs = _needs(own)
    totals = torch.zeros(len(own), gradients.width, dtype=torch.float64)
    for i in range(len(pairs.examples)):
        stop()
        one = pairs_of(pairs.data, pairs.examples[i : i + 1])
        batch = collate(one.data, one.examples, layout).to(policy.device)
        read = read_responses(needs, policy, reference, batch)
        single = Pairs(
            one.data, one.examples, one.singles, one.responses, batch.chosen, batch.rejected
        )
        for number, entry in enumerate(own):
            loss = _call(entry.loss, read, batch.columns, single).losses.mean()
            row = gradients.as_row(gradients.of(loss, retain_graph=True))
            totals[number] += row
        bar.update()
    gradients.rows += [row / len(pairs.examples) for row in totals]
