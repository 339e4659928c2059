"""Labels of rollouts: which of a prompt's responses is better, who says so, and what it cost.

*Gold* is the oracle whose labels cost something; a *discriminator* is a model that stands in for it
(D2PO, arXiv:2405.01511). A label says which of two responses is better, so the best and the worst
of K cost K - 1 when the gold picks them.
"""

from typing import Protocol

import numpy as np

from preflab.distributed.process_group import World
from preflab.online.ledger import Ledger, ledger_row, on_rank_0, score_shared
from preflab.online.rollouts import Labels, Rollouts, best_and_worst
from preflab.rewards.registry import Score


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
            ledger_row(rollouts, i, tuple(range(self.k)))
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
                found.append(ledger_row(rollouts, i, members) | {"gap": gap})
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
