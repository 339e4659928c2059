"""Measures of a round for the log: rewards, KL, accuracy of labels. No training depends on them."""

import json
from pathlib import Path

import torch
from torch import Tensor

from preflab.batching.chat import prompt_columns
from preflab.batching.packing import Batch, lay_out
from preflab.distributed.process_group import World
from preflab.modeling.logprobs import score_responses
from preflab.modeling.response_ends import response_ends
from preflab.online.drawing import rollouts_file
from preflab.online.labelers import StaticLabels
from preflab.online.ledger import score_shared
from preflab.online.rollouts import Labels, Rollouts
from preflab.online.round_steps import ReadBatch
from preflab.rewards.registry import REWARDS, Score, all_rewards
from preflab.settings.schema import Settings
from preflab.training.learner import Learner
from utils import mean_and_error


class RoundMeasures:
    """Measures rounds, and writes their rollouts to rollouts.jsonl.

    rewards: scores by name, the first is that of `reward`.
    """

    def __init__(
        self,
        settings: Settings,
        learner: Learner,
        rewards: dict[str, Score],
        labeler: StaticLabels,
        run_dir: Path,
        world: World,
    ):
        self.settings, self.learner, self.rewards = settings, learner, rewards
        self.labeler, self.path, self.world = labeler, rollouts_file(run_dir), world
        registered = _registered(settings)
        self.gold = next((name for name, reward in registered.items() if reward.is_gold), None)
        self._logged = logged_rewards(settings)

    def scores(self, rollouts: Rollouts) -> dict[str, list[float]]:
        """Scores of all rollouts, (prompts * K,), by those rewards that only the log needs.

        They are not the reward that labels the rollouts, nor one that `online.measure_gold`
        excludes. Raises RewardError.
        """
        names = list(self.rewards)[1 if self.labeler.labels_by_reward else 0 :]
        return {
            name: score_shared(self.world, self.rewards[name], *rollouts.flat())
            for name in names
            if self._logged[name]
        }

    def measure(
        self,
        rollouts: Rollouts,
        labels: Labels,
        scores: dict[str, list[float]],
        read: list[ReadBatch],
    ) -> dict[str, float]:
        """Means over the rollouts of a round. scores: what `scores` returned before labelling.
        read: batches of some of the rollouts that the reference has read.

        Lengths are in tokens, KL in nats. The rollouts are appended to rollouts.jsonl.
        """
        guesses = labels.guesses or labels
        columns = self._lengths(rollouts) | self._kl(rollouts, read)
        if self.labeler.labels_by_reward:
            of_labels = [score for of_prompt in labels.scores for score in of_prompt]
            scores = {next(iter(self.rewards)): of_labels} | scores
        columns |= {f"reward[{name}]": values for name, values in scores.items()}
        columns["label_score"] = [score for of_prompt in guesses.scores for score in of_prompt]
        values = {f"online/{name}": mean_and_error(column)[0] for name, column in columns.items()}
        values["online/labels_bought"] = self.labeler.bought_until(rollouts.round)
        if self.gold in scores:
            values["online/gold_reward"] = values[f"online/reward[{self.gold}]"]
            values["online/label_accuracy"] = label_accuracy(guesses, scores[self.gold])
        if self.world.rank == 0:
            self._write(rollouts, guesses.scores, labels.pairs, scores)
        return values

    def _lengths(self, rollouts: Rollouts) -> dict[str, list[float]]:
        ends = response_ends(self.learner.tokenizer, self.learner.policy.causal_lm)
        responses = [ids for of_prompt in rollouts.tokens for ids in of_prompt]
        return {
            "length": [len(ids) for ids in responses],
            "ended": [float(ends.ended(ids)) for ids in responses],
        }

    def _kl(self, rollouts: Rollouts, read: list[ReadBatch]) -> dict[str, list[float]]:
        """KL to the initial reference and its estimate by the log-ratio, as `measure_samples` has
        them, (prompts * K,) each; none of it where a run has no such reference."""
        if self.learner.initial_reference is None:
            return {}
        mine = []
        for part in read:
            self.world.stop_if_asked()
            values = self._of_batch(rollouts, part.batch, part.responses, part.hidden)
            mine += values if part.counts else []
        measured = {response for response, _ in self.world.gather(mine)}
        missing = [
            (i, [j for j in range(len(of_prompt)) if (i, j) not in measured])
            for i, of_prompt in enumerate(rollouts.tokens)
        ]
        mine += self._of_unread([(i, numbers) for i, numbers in missing if numbers], rollouts)
        by_response = sorted(self.world.gather(mine))
        columns = zip(*(values for _, values in by_response), strict=True)
        return dict(zip(("kl", "kl_k1"), map(list, columns), strict=True))

    def _of_unread(self, trees: list[tuple[int, list[int]]], rollouts: Rollouts) -> list[tuple]:
        """As `_of_batch`, of what neither model has read: numbers of responses by prompt."""
        tokens, size = rollouts.tokens, self.settings.eval_batch_size
        trees = sorted(trees, key=lambda tree: sum(len(tokens[tree[0]][j]) for j in tree[1]))
        k = max((len(numbers) for _, numbers in trees), default=1)
        mine = []
        for part, n_real in self.world.batches(trees, max(1, size // k)):
            self.world.stop_if_asked()
            batch = lay_out(
                [
                    (rollouts.prompt_tokens[i], [tokens[i][j] for j in part_of])
                    for i, part_of in part
                ],
                self.learner.layout,
            )
            responses = [(i, j) for i, numbers in part for j in numbers]
            values = self._of_batch(rollouts, batch, responses)
            mine += values if n_real else []
        return mine

    @torch.no_grad()
    def _of_batch(
        self,
        rollouts: Rollouts,
        batch: Batch,
        responses: list[tuple[int, int]],
        reference_hidden: Tensor | None = None,
    ) -> list[tuple[tuple[int, int], list[float]]]:
        """The responses of a batch, each as (prompt, number), with their KL and its estimate."""
        learner, hidden = self.learner, None
        if rollouts.hidden is not None:
            states = [rollouts.hidden[i][j] for i, j in responses]
            missing = any(of is None for of in states)
            hidden = None if missing else torch.cat(states).to(learner.policy.device)
        if reference_hidden is not None:
            reference_hidden = reference_hidden.to(learner.policy.device)
        scores = score_responses(
            learner.policy,
            batch.to(learner.policy.device),
            reference=learner.initial_reference,
            kl="policy||reference",
            hidden=hidden,
            reference_hidden=reference_hidden,
        )
        values = torch.stack([scores.kl, scores.logps - scores.reference_logps], dim=1)
        return list(zip(responses, values.tolist(), strict=True))

    def _write(
        self,
        rollouts: Rollouts,
        label_scores: list[list[float]],
        pairs: list,
        scores: dict[str, list[float]],
    ) -> None:
        k = self.settings.online.responses_per_prompt
        with open(self.path, "a", encoding="utf-8") as f:
            for i, prompt in enumerate(rollouts.prompts):
                row = {
                    "round": rollouts.round,
                    **prompt_columns(prompt),
                    "responses": rollouts.responses[i],
                    "scores": label_scores[i],
                    "pair": pairs[i],
                    "rewards": {
                        name: values[i * k : (i + 1) * k] for name, values in scores.items()
                    },
                }
                f.write(json.dumps(row, ensure_ascii=False) + "\n")


def keeps_hidden(learner: Learner) -> bool:
    """Whether the hidden states of sampling can be measured against those of the reference.

    In half precision sampling rounds otherwise than a pass over whole responses, which would be
    measured as KL. A model over several ranks or devices does not keep them.
    """
    policy = learner.policy
    return (
        learner.initial_reference is not None
        and learner.world.size == 1
        and policy.placed_on is None
        and policy.is_full_precision()
    )


def _registered(settings: Settings) -> dict:
    """The registered rewards of the run, by the name of their scores."""
    return {name: REWARDS[entry["name"]] for name, entry in all_rewards(settings).items()}


def logged_rewards(settings: Settings) -> dict[str, bool]:
    """Whether each reward may be computed only for the log, by `online.measure_gold`.

    "auto" means the rewards that are not paid for.
    """
    logged = settings.online.measure_gold
    return {
        name: (not reward.is_paid) if logged == "auto" else logged
        for name, reward in _registered(settings).items()
    }


def label_accuracy(labels: Labels, gold: list[float]) -> float | None:
    """The share of labelled pairs that gold orders the same way, from 0 to 1.

    gold: scores of all responses, (prompts * K,). Pairs with equal gold scores do not count; None
    if there are no others.
    """
    k = len(labels.scores[0])
    pairs = [(i * k, pair) for i, pair in enumerate(labels.pairs) if pair]
    gaps = [gold[first + better] - gold[first + worse] for first, (better, worse) in pairs]
    correct = [gap > 0 for gap in gaps if gap]
    return sum(correct) / len(correct) if correct else None
