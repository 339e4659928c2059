"""Labels of rollouts: which of a prompt's responses is better, who says so, and what it cost.

*Gold* is the oracle whose labels cost something; a *discriminator* is a model that stands in for it
(D2PO, arXiv:2405.01511). A label says which of two responses is better, so the best and the worst
of K cost K - 1 when the gold picks them.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from distributed import ALONE, World
from rewards import RewardError, Score
from utils import DataError, PrefLabError

SELECTIONS = ("conf", "rand")
LINE = {
    "round",
    "key",
    "prompt",
    "prompt_tokens",
    "responses",
    "tokens",
    "scores",
    "cost",
}  # of the ledger


@dataclass
class Rollouts:
    """What was sampled in a round: for each of its prompts a number, text and tokens, and K
    responses likewise."""

    round: int
    keys: list[int]
    prompts: list[str]
    prompt_tokens: list[list[int]]
    responses: list[list[str]]  # (prompts, K)
    tokens: list[list[list[int]]]  # (prompts, K, tokens)

    def __len__(self) -> int:
        return len(self.keys)

    def flat(self) -> tuple[list[str], list[str]]:
        """Prompt and response of each rollout, (prompts * K,)."""
        return [p for p, of_prompt in zip(self.prompts, self.responses) for _ in of_prompt], [
            r for of_prompt in self.responses for r in of_prompt
        ]


@dataclass
class Labels:
    """scores (prompts, K): higher is better; pairs (prompts,): (better, worse) of the responses,
    None for a tie or no label.

    guesses: scores and pairs as they were before bought labels overruled some; None where nothing
    did.
    """

    scores: list[list[float]]
    pairs: list[tuple[int, int] | None]
    guesses: "Labels | None" = None


def best_and_worst(scores: list[float]) -> tuple[int, int] | None:
    """The first of the highest and the first of the lowest scores; None where all are equal."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return (best, worst) if scores[best] > scores[worst] else None


def score_shared(
    world: World, score: Score, prompts: list[str], responses: list[str]
) -> list[float]:
    """`score(prompts, responses)`, a part on each rank; where it fails on one, all raise."""
    try:
        mine, error = score(world.share(prompts), world.share(responses)), ""
    except PrefLabError as failure:
        mine, error = [], str(failure)
    if failed := [told for told in world.gather([error]) if told]:
        raise _everywhere(RewardError(failed[0]))
    return world.gather(mine)


def on_rank_0(world: World, function):
    """What `function()` returns on rank 0, on all ranks; where it fails, all raise."""

    def attempt():
        try:
            return function(), None
        except PrefLabError as failure:
            return None, str(failure)

    result, error = world.agree(attempt)
    if error is not None:
        raise _everywhere(RewardError(error))
    return result


def _everywhere(error: PrefLabError) -> PrefLabError:
    error.everywhere = True
    return error


# ---------------------------------------------------------------------------------- what was bought


class Ledger:
    """Every gold label bought, a line each in `labels.jsonl`: on the disk before anything learns
    from it, and never bought again.

    A line holds what was compared (text and tokens), its scores and the round; `cost` is how many
    labels it took. A resumed run finds in it what was bought after its checkpoint.
    """

    def __init__(self, path: Path, budget: int | None, world: World = ALONE):
        self.path, self.budget, self.world = path, budget, world
        self.rows: list[dict] = world.agree(lambda: _read_ledger(path))

    @property
    def bought(self) -> int:
        return sum(row["cost"] for row in self.rows)

    def bought_until(self, number: int) -> int:
        """Labels bought in this round and before."""
        return sum(row["cost"] for row in self.rows if row["round"] <= number)

    def must_have(self, lines: int) -> None:
        """Refuse to go on with less than a checkpoint knew of: what is missing was paid for, and
        would be paid for again."""
        if len(self.rows) < lines:
            raise DataError(
                f"{self.path} has {len(self.rows)} bought labels, and there were {lines} at the"
                " checkpoint; restore the file, or start in another folder"
            )

    def affords(self, cost: int) -> int | None:
        """How many more comparisons of this cost the budget has room for; None for any number."""
        return None if self.budget is None else max(0, self.budget - self.bought) // cost

    def of_round(self, number: int) -> list[dict]:
        return [row for row in self.rows if row["round"] == number]

    def buy(self, wanted: list[dict], score: Score) -> list[dict]:
        """Have the gold score the responses of `wanted`, and write that down; returns the rows with
        their `scores`.

        Raises RewardError where the gold fails, or the budget has no room: nothing is bought then.
        """
        if not wanted:
            return []
        cost = len(wanted[0]["responses"]) - 1
        room = self.affords(cost)
        if room is not None and len(wanted) > room:
            raise RewardError(
                f"{len(wanted)} labels were to be bought and the budget has room for {room}"
            )

        def purchase() -> list[list[float]]:
            flat = score(
                [row["prompt"] for row in wanted for _ in row["responses"]],
                [r for row in wanted for r in row["responses"]],
            )
            scores = iter(flat)
            bought = [[next(scores) for _ in row["responses"]] for row in wanted]
            with open(self.path, "a", encoding="utf-8") as f:
                f.writelines(
                    json.dumps(row | {"scores": s, "cost": cost}, ensure_ascii=False) + "\n"
                    for row, s in zip(wanted, bought)
                )
                f.flush()
                os.fsync(f.fileno())
            return bought

        bought = [
            row | {"scores": s, "cost": cost}
            for row, s in zip(wanted, on_rank_0(self.world, purchase))
        ]
        self.rows += bought
        return bought


def _read_ledger(path: Path) -> list[dict]:
    """The lines there are; a last one that a kill cut short is taken off."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
            assert isinstance(rows[-1]["cost"], int) and rows[-1]["cost"] >= 1
            assert LINE <= rows[-1].keys() and len(rows[-1]["responses"]) == len(
                rows[-1]["scores"]
            ) == len(rows[-1]["tokens"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise DataError(
                f"{path}:{number}: expected a bought label, with {', '.join(sorted(LINE))}; restore"
                " the file, for what it counts was paid for"
            ) from error
    return rows


def _row(rollouts: Rollouts, i: int, members: tuple[int, ...]) -> dict:
    """What a ledger line says of some responses of prompt i."""
    return {
        "round": rollouts.round,
        "key": rollouts.keys[i],
        "prompt": rollouts.prompts[i],
        "prompt_tokens": rollouts.prompt_tokens[i],
        "responses": [rollouts.responses[i][m] for m in members],
        "tokens": [rollouts.tokens[i][m] for m in members],
    }


# --------------------------------------------------------------------------------------- who labels


class StaticLabels:
    """OPO with a reward that costs nothing, a reward model for example: every response is scored,
    no gold is asked."""

    labels_by_reward = True  # whether the scores of its labels are those of `reward`
    discriminator: "Discriminating | None" = None

    def __init__(self, score: Score, world: World):
        self.score, self.world = score, world

    def label(self, rollouts: Rollouts) -> Labels:
        """Raises RewardError where scores cannot be had; then nothing has changed."""
        flat = iter(score_shared(self.world, self.score, *rollouts.flat()))
        scores = [[next(flat) for _ in of_prompt] for of_prompt in rollouts.responses]
        return Labels(scores, [best_and_worst(of_prompt) for of_prompt in scores])

    def bought_until(self, number: int) -> int:
        """Gold labels bought in this round and before."""
        return 0

    def recorded(self, number: int) -> list[dict]:
        """Ledger lines of this round, of a run that was stopped after it had bought them."""
        return []

    def room(self, number: int) -> int | None:
        """For how many prompts of this round there can be labels; None for any number."""
        return None

    def spent(self, number: int) -> bool:
        """Whether there are no labels left for this round and all that follow."""
        return self.room(number) == 0

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class RemoteLabels(StaticLabels):
    """OPO and D2PO by a service of its own (serve_reward.py): it scores the responses, buys labels
    and learns.

    run: what tells this run from others that ask the same service.
    """

    def __init__(self, score: Score, world: World, run: str):
        super().__init__(score, world)
        self.run, self.state = run, {"labels_bought": 0, "room": None}

    def label(self, rollouts: Rollouts) -> Labels:
        answer = on_rank_0(
            self.world,
            lambda: self.score.learn(
                self.run, rollouts.round, rollouts.prompts, rollouts.responses
            ),
        )
        self.state = {key: answer[key] for key in self.state}
        return Labels(answer["scores"], [tuple(pair) if pair else None for pair in answer["pairs"]])

    def bought_until(self, number: int) -> int:
        return self.state["labels_bought"]

    def room(self, number: int) -> int | None:
        return self.state["room"]

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = dict(state)


class GoldLabels(StaticLabels):
    """OPO with gold: every pair is labelled by the oracle, until the budget is spent."""

    def __init__(self, score: Score, ledger: Ledger, k: int):
        super().__init__(score, ledger.world)
        self.ledger, self.k = ledger, k
        self.bought_until, self.recorded = ledger.bought_until, ledger.of_round

    def state_dict(self) -> dict:
        return {"lines": len(self.ledger.rows)}

    def load_state_dict(self, state: dict) -> None:
        self.ledger.must_have(state["lines"])

    def room(self, number: int) -> int | None:
        more = self.ledger.affords(self.k - 1)
        return None if more is None else more + len(self.recorded(number))

    def label(self, rollouts: Rollouts) -> Labels:
        paid = {row["key"]: row["scores"] for row in self.recorded(rollouts.round)}
        rows = [
            _row(rollouts, i, tuple(range(self.k)))
            for i, key in enumerate(rollouts.keys)
            if key not in paid
        ]
        paid |= {row["key"]: row["scores"] for row in self.ledger.buy(rows, self.score)}
        scores = [paid[key] for key in rollouts.keys]
        return Labels(scores, [best_and_worst(of_prompt) for of_prompt in scores])


class Discriminating(Protocol):
    """A model that scores responses and learns which are better; online.py makes one of a
    trainer."""

    def score_responses(
        self, prompts: list[str], responses: list[list[str]]
    ) -> list[list[float]]: ...

    def learn(self, pairs: list[tuple[str, str, str]], *, epochs: int, seed: list[int]) -> None: ...


class DiscriminatorLabels(StaticLabels):
    """D2PO: a discriminator labels every pair; now and then a few gold labels are bought of a pool
    of pairs, and it learns from them.

    settings: `online` of config.yaml.
    """

    labels_by_reward = False

    def __init__(
        self, gold: Score, ledger: Ledger, discriminator: Discriminating, settings, seed: int
    ):
        self.gold, self.ledger, self.discriminator, self.settings, self.seed = (
            gold,
            ledger,
            discriminator,
            settings,
            seed,
        )
        self.bought_until = ledger.bought_until
        self.pool: list[dict] = []  # ledger lines not bought, with the `gap` of their scores
        self.gathered = 0  # rollouts since the pool was last emptied
        self.kept: list[
            list[tuple[str, str, str]]
        ] = []  # (prompt, better, worse) of the last bought batches

    def begin(self, rollouts: Rollouts) -> None:
        """Buy the labels that the discriminator starts with, of two responses of each prompt."""
        untold = Labels(
            [[0.0] * len(texts) for texts in rollouts.responses], [None] * len(rollouts)
        )
        self._learn(
            self._buy(self._candidates(rollouts, untold), 0, len(rollouts)),
            0,
            self.settings.initial_epochs,
        )

    def label(self, rollouts: Rollouts) -> Labels:
        scores = self.discriminator.score_responses(rollouts.prompts, rollouts.responses)
        labels = Labels(scores, [best_and_worst(of_prompt) for of_prompt in scores])
        pool = self.pool + self._candidates(rollouts, labels)
        gathered = self.gathered + sum(map(len, rollouts.responses))
        if gathered >= self.settings.relabel_every:
            bought = self._buy(
                pool, rollouts.round, self.settings.relabels
            )  # where this fails, nothing has changed
            pool, gathered = [], 0
            self._learn(bought, rollouts.round, self.settings.discriminator_epochs)
            labels.guesses = Labels([list(of_prompt) for of_prompt in scores], list(labels.pairs))
            _overrule(labels, rollouts, bought)
        self.pool, self.gathered = pool, gathered
        return labels

    def _candidates(self, rollouts: Rollouts, labels: Labels) -> list[dict]:
        """A pair of each prompt that has two different responses: the best and the worst, the first
        two that differ where scores tie."""
        found = []
        for i, (texts, pair) in enumerate(zip(rollouts.responses, labels.pairs)):
            members = pair or next(
                ((0, m) for m in range(1, len(texts)) if texts[m] != texts[0]), None
            )
            if members and texts[members[0]] != texts[members[1]]:
                gap = labels.scores[i][members[0]] - labels.scores[i][members[1]]
                found.append(_row(rollouts, i, members) | {"gap": gap})
        return found

    def _buy(self, pool: list[dict], number: int, most: int) -> list[dict]:
        """The labels of this round: what the ledger has of it, and as many more of the pool as are
        wanted and affordable."""
        paid = self.ledger.of_round(number)
        limits = [most - len(paid), self.ledger.affords(1)]
        if self.settings.stop_labels is not None:
            limits.append(self.settings.stop_labels - self.ledger.bought)
        n = min(limit for limit in limits if limit is not None)
        known = {(row["key"], *row["responses"]) for row in paid}
        pool = [row for row in pool if (row["key"], *row["responses"]) not in known]
        chosen = select(pool, max(0, n), self.settings.select, [self.seed, number])
        rows = [{key: value for key, value in pool[i].items() if key != "gap"} for i in chosen]
        return paid + self.ledger.buy([row | {"round": number} for row in rows], self.gold)

    def _learn(self, bought: list[dict], number: int, epochs: int) -> None:
        """Equal gold scores cost a label and teach nothing."""
        batch = []
        for row in bought:
            if pair := best_and_worst(row["scores"]):
                batch.append((row["prompt"], row["responses"][pair[0]], row["responses"][pair[1]]))
        if batch:
            older = [pair for kept in self.kept for pair in kept]
            self.discriminator.learn(older + batch, epochs=epochs, seed=[self.seed, number])
            self.kept = [*self.kept, batch][-self.settings.replay :] if self.settings.replay else []

    def state_dict(self) -> dict:
        return {
            "lines": len(self.ledger.rows),
            "pool": self.pool,
            "gathered": self.gathered,
            "kept": [[list(pair) for pair in batch] for batch in self.kept],
        }

    def load_state_dict(self, state: dict) -> None:
        self.ledger.must_have(state["lines"])
        self.pool, self.gathered = list(state["pool"]), state["gathered"]
        self.kept = [[tuple(pair) for pair in batch] for batch in state["kept"]]


def select(pool: list[dict], n: int, how: str, seed: list[int]) -> list[int]:
    """Places of `n` pairs of the pool: "conf" the smallest absolute score gaps, "rand"
    uniformly."""
    if how == "rand":
        return sorted(np.random.default_rng(seed).permutation(len(pool))[:n].tolist())
    return sorted(range(len(pool)), key=lambda i: (abs(pool[i]["gap"]), i))[:n]


def _overrule(labels: Labels, rollouts: Rollouts, bought: list[dict]) -> None:
    """Where a pair of this round was bought, gold says which is better; the scores keep their scale
    and change sides."""
    place = {key: i for i, key in enumerate(rollouts.keys)}
    for row in bought:
        i = place.get(row["key"])
        texts = rollouts.responses[i] if i is not None else []
        if not all(r in texts for r in row["responses"]):
            continue  # of an earlier round
        first, second = (texts.index(r) for r in row["responses"])
        verdict = best_and_worst(row["scores"])
        if verdict is None:
            labels.pairs[i] = None
            continue
        better, worse = (first, second) if verdict == (0, 1) else (second, first)
        labels.pairs[i] = (better, worse)
        of_prompt = labels.scores[i]
        of_prompt[better], of_prompt[worse] = (
            max(of_prompt[better], of_prompt[worse]),
            min(of_prompt[better], of_prompt[worse]),
        )
