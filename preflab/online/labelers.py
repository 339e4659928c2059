"""Labelers: they decide which of a prompt's responses is better, and count what the labels cost.

*Gold* is the oracle, whose labels are limited; a *discriminator* is a model that replaces it most
of the time (D2PO, arXiv:2405.01511). What the labels of K responses cost is in `ledger.price`.
"""

from typing import Protocol

import numpy as np

from preflab.distributed.process_group import World
from preflab.online.ledger import Ledger, ledger_row, on_rank_0, score_shared
from preflab.online.rollouts import Labels, Rollouts, best_and_worst
from preflab.online.selection import Past, Pool, bind_selection, pool_of
from preflab.rewards.registry import Score
from preflab.settings.schema import OnlineSettings


class Discriminating(Protocol):
    """A model that scores responses and learns which are better."""

    def score_responses(self, prompts: list[str], responses: list[list[str]]) -> list[list[float]]:
        """Scores, (prompts, K), of responses (prompts, K)."""
        ...

    def learn(self, pairs: list[tuple[str, str, str]], *, epochs: int, seed: list[int]) -> None:
        """Train on (prompt, better response, worse response)."""
        ...

    def features(self, prompts: list[str], responses: list[list[str]]) -> list[np.ndarray]:
        """The last hidden states, (K, D) for each prompt."""
        ...


class StaticLabels:
    """OPO with a free reward, for example a reward model: it scores every response, and no gold
    labels are bought."""

    labels_by_reward = True  # whether the scores of the labels are those of `reward`
    discriminator: Discriminating | None = None
    ranks = False  # whether gold puts all responses in order, and not only finds best and worst

    def __init__(self, score: Score, world: World):
        self.score, self.world = score, world

    def label(self, rollouts: Rollouts) -> Labels:
        """The labels of a round. Raises RewardError, without changing the state, if it fails."""
        flat = iter(score_shared(self.world, self.score, *rollouts.flat()))
        scores = [[next(flat) for _ in of_prompt] for of_prompt in rollouts.responses]
        return Labels(scores, [best_and_worst(of_prompt) for of_prompt in scores])

    def bought_until(self, number: int) -> int:
        """The gold labels bought in round `number` and before."""
        return 0

    def recorded(self, number: int) -> list[dict]:
        """The ledger lines of round `number`.

        Before the round is labelled, there are some only if the run was stopped after buying them.
        """
        return []

    def room(self, number: int) -> int | None:
        """How many prompts of round `number` can be labelled; None for any number."""
        return None

    def spent(self, number: int) -> bool:
        """Whether no labels remain for round `number` and later rounds."""
        return self.room(number) == 0

    def state_dict(self) -> dict:
        """The state for a checkpoint, numbers and plain containers."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state. Raises DataError if the ledger has lost lines since."""


class RemoteLabels(StaticLabels):
    """OPO and D2PO with a service (serve_reward.py), which scores the responses, buys labels and
    learns.

    run: identifies this run among others that use the same service. ranks: see `StaticLabels`.
    """

    def __init__(self, score: Score, world: World, run: str, *, ranks: bool = False):
        super().__init__(score, world)
        self.ranks = ranks
        self.run, self.state = run, {"labels_bought": 0, "room": None}

    def label(self, rollouts: Rollouts) -> Labels:
        request = (self.run, rollouts.round, rollouts.prompts, rollouts.responses)
        options = {"ranks": True} if self.ranks else {}
        answer = on_rank_0(self.world, lambda: self.score.learn(*request, **options))
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
    """OPO with gold: the oracle labels every pair, until the budget is spent."""

    def __init__(self, score: Score, ledger: Ledger, k: int, *, ranks: bool = False):
        super().__init__(score, ledger.world)
        self.ledger, self.k, self.ranks = ledger, k, ranks
        self.bought_until, self.recorded = ledger.bought_until, ledger.of_round

    def state_dict(self) -> dict:
        return {"lines": len(self.ledger.rows)}

    def load_state_dict(self, state: dict) -> None:
        self.ledger.must_have(state["lines"])

    def room(self, number: int) -> int | None:
        n_affordable = self.ledger.affords(self.ledger.price(self.k, ranks=self.ranks))
        return None if n_affordable is None else n_affordable + len(self.recorded(number))

    def label(self, rollouts: Rollouts) -> Labels:
        paid = {row["key"]: row["scores"] for row in self.recorded(rollouts.round)}
        members = tuple(range(self.k))
        rows = [
            ledger_row(rollouts, i, members)
            for i, key in enumerate(rollouts.keys)
            if key not in paid
        ]
        bought = self.ledger.buy(rows, self.score, ranks=self.ranks)
        paid |= {row["key"]: row["scores"] for row in bought}
        scores = [paid[key] for key in rollouts.keys]
        return Labels(scores, [best_and_worst(of_prompt) for of_prompt in scores])


class DiscriminatorLabels(StaticLabels):
    """D2PO: a discriminator labels every pair.

    After every `relabel_every` rollouts a few gold labels are bought for pairs of a pool, and the
    discriminator learns from them. settings: `online` of config.yaml.
    """

    labels_by_reward = False

    def __init__(
        self,
        gold: Score,
        ledger: Ledger,
        discriminator: Discriminating,
        settings: OnlineSettings,
        seed: int,
        *,
        ranks: bool = False,
    ):
        self.ranks = ranks
        self.gold, self.ledger, self.discriminator = gold, ledger, discriminator
        self.settings, self.seed = settings, seed
        self.selection = bind_selection(settings.select)
        self.bought_until = ledger.bought_until
        # Candidate ledger lines, with the `gap` of the scores of two responses, or `scored`: the
        # scores of all.
        self.pool: list[dict] = []
        self.gathered = 0  # rollouts since the pool was last emptied
        # (prompt, better, worse) of the latest bought batches, which are trained on again.
        self.replay: list[list[tuple[str, str, str]]] = []

    def begin(self, rollouts: Rollouts) -> None:
        """Buy the initial labels, for two responses of each prompt, and train on them."""
        scores = [[0.0] * len(texts) for texts in rollouts.responses]
        candidates = self._candidates(rollouts, Labels(scores, [None] * len(rollouts)))
        bought = self._buy(candidates, 0, len(rollouts))
        self._learn(bought, 0, self.settings.initial_epochs)

    def label(self, rollouts: Rollouts) -> Labels:
        scores = self.discriminator.score_responses(rollouts.prompts, rollouts.responses)
        labels = Labels(scores, [best_and_worst(of_prompt) for of_prompt in scores])
        pool = self.pool + self._candidates(rollouts, labels)
        gathered = self.gathered + sum(map(len, rollouts.responses))
        if gathered >= self.settings.relabel_every:
            # The state is assigned last, so that it does not change if buying fails.
            bought = self._buy(pool, rollouts.round, self.settings.relabels)
            pool, gathered = [], 0
            self._learn(bought, rollouts.round, self.settings.discriminator_epochs)
            labels.guesses = Labels([list(of_prompt) for of_prompt in scores], list(labels.pairs))
            _overrule(labels, rollouts, bought, ranks=self.ranks)
        self.pool, self.gathered = pool, gathered
        return labels

    def _candidates(self, rollouts: Rollouts, labels: Labels) -> list[dict]:
        """The responses to each prompt that has different ones: all of these where the selection
        reads them, else a pair. That is the best and the worst, or the first two that differ where
        all scores are equal."""
        candidates = []
        for i, (texts, pair) in enumerate(zip(rollouts.responses, labels.pairs, strict=True)):
            scores = labels.scores[i]
            different = [m for m, text in enumerate(texts) if text not in texts[:m]]
            if len(different) < 2:
                continue
            if "responses" in self.selection.reads:
                scored = {"scored": [scores[m] for m in different]}
                candidates.append(ledger_row(rollouts, i, tuple(different)) | scored)
                continue
            first, second = pair or different[:2]
            if texts[first] != texts[second]:
                gap = scores[first] - scores[second]
                candidates.append(ledger_row(rollouts, i, (first, second)) | {"gap": gap})
        return candidates

    def _buy(self, pool: list[dict], number: int, n_labels: int) -> list[dict]:
        """Up to `n_labels` labelled pairs of round `number`: those already in the ledger, then as
        many of the pool as the limits allow."""
        paid, cost = self.ledger.of_round(number), self.ledger.price(2)
        limits = [n_labels - len(paid), self.ledger.affords(cost)]
        if self.settings.stop_labels is not None:
            limits.append((self.settings.stop_labels - self.ledger.bought) // cost)
        n = max(0, min(limit for limit in limits if limit is not None))
        # As without those in the ledger, so that a purchase that was cut short is completed.
        selected = self._select(pool, number, n + len(paid)) if n else []
        known = {(row["key"], *row["responses"]) for row in paid}
        rows = [row for row in selected if (row["key"], *row["responses"]) not in known][:n]
        return paid + self.ledger.buy([row | {"round": number} for row in rows], self.gold)

    def _select(self, rows: list[dict], number: int, n: int) -> list[dict]:
        """The lines of at most `n` pairs of the pool, as the ledger has them. Raises
        SelectionError."""
        if not rows:
            return []
        pool, seed = self._pool_of(rows, number), [self.seed, number]
        chosen = self.ledger.world.agree(lambda: self.selection(pool, n, seed))
        begins = np.searchsorted(pool.prompts, np.arange(len(rows)))
        lines = []
        for pair in chosen:
            prompt = int(pool.prompts_of_pairs[pair])
            members = (pool.pairs[pair] - begins[prompt]).tolist()
            row = {k: v for k, v in rows[prompt].items() if k not in ("gap", "scored")}
            lines.append(row | {k: [row[k][m] for m in members] for k in ("responses", "tokens")})
        return lines

    def _pool_of(self, rows: list[dict], number: int) -> Pool:
        """What the selection sees before the purchase of round `number`."""
        scores = [row.get("scored") or [row["gap"], 0.0] for row in rows]
        if "features" not in self.selection.reads:
            return pool_of(scores)
        earlier = [row for row in self.ledger.rows if row["round"] < number]
        texts = [row["responses"] for row in (*rows, *earlier)]
        prompts = [row["prompt"] for row in (*rows, *earlier)]
        features = self.discriminator.features(prompts, texts)
        past = self._past_of(earlier, features[len(rows) :], width=features[0].shape[1])
        return pool_of(scores, features[: len(rows)], past)

    def _past_of(self, bought: list[dict], features: list[np.ndarray], *, width: int) -> Past:
        """Bought labels, with the scores and the features, (2, width) each, that the discriminator
        gives their responses now."""
        pairs = [best_and_worst(row["scores"]) for row in bought]
        prompts, texts = ([row[key] for row in bought] for key in ("prompt", "responses"))
        scores = self.discriminator.score_responses(prompts, texts) if bought else []
        differences, gaps = np.zeros((len(bought), width)), np.zeros(len(bought))
        for i, pair in enumerate(pairs):
            better, worse = pair or (0, 1)
            differences[i] = features[i][better] - features[i][worse]
            gaps[i] = scores[i][better] - scores[i][worse]
        return Past(differences, gaps, np.array([pair is None for pair in pairs], bool))

    def _learn(self, bought: list[dict], number: int, epochs: int) -> None:
        """Train the discriminator on the replayed labels and the bought ones. Equal gold scores
        make no pair, although the label is paid for."""
        batch = []
        for row in bought:
            if pair := best_and_worst(row["scores"]):
                better, worse = pair
                batch.append((row["prompt"], row["responses"][better], row["responses"][worse]))
        if not batch:
            return
        older = [pair for replayed in self.replay for pair in replayed]
        self.discriminator.learn(older + batch, epochs=epochs, seed=[self.seed, number])
        n = self.settings.replay
        self.replay = [*self.replay, batch][-n:] if n else []

    def state_dict(self) -> dict:
        return {
            "lines": len(self.ledger.rows),
            "pool": self.pool,
            "gathered": self.gathered,
            "replay": [[list(pair) for pair in batch] for batch in self.replay],
        }

    def load_state_dict(self, state: dict) -> None:
        self.ledger.must_have(state["lines"])
        self.pool, self.gathered = list(state["pool"]), state["gathered"]
        self.replay = [[tuple(pair) for pair in batch] for batch in state["replay"]]


def _overrule(
    labels: Labels, rollouts: Rollouts, bought: list[dict], *, ranks: bool = False
) -> None:
    """Replace the discriminator's label of a pair by the gold label where one was bought.

    The two scores are swapped if they disagree with it: they stay on the discriminator's scale.
    ranks: where gold has a tie, both get the mean of the two.
    """
    positions = {key: i for i, key in enumerate(rollouts.keys)}
    for row in bought:
        i = positions.get(row["key"])
        texts = rollouts.responses[i] if i is not None else []
        if not all(response in texts for response in row["responses"]):
            continue  # of an earlier round
        verdict = best_and_worst(row["scores"])
        scores = labels.scores[i]
        better, worse = (texts.index(row["responses"][member]) for member in verdict or (0, 1))
        labels.pairs[i] = (better, worse) if verdict else None
        if verdict is None and ranks:
            scores[better] = scores[worse] = (scores[better] + scores[worse]) / 2
        if verdict is None:
            continue
        high, low = max(scores[better], scores[worse]), min(scores[better], scores[worse])
        scores[better], scores[worse] = high, low
