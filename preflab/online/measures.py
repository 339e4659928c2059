"""Measures of a round for the log: rewards, KL, accuracy of labels. No training depends on them."""

import json
from pathlib import Path

from preflab.batching.chat import prompt_columns
from preflab.distributed.process_group import World
from preflab.evaluation.samples import measure_samples
from preflab.modeling.response_ends import response_ends
from preflab.online.drawing import rollouts_file
from preflab.online.labelers import StaticLabels
from preflab.online.ledger import score_shared
from preflab.online.rollouts import Labels, Rollouts
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
        self, rollouts: Rollouts, labels: Labels, scores: dict[str, list[float]]
    ) -> dict[str, float]:
        """Means over the rollouts of a round. scores: what `scores` returned before labelling.

        Lengths are in tokens, KL in nats. The rollouts are appended to rollouts.jsonl.
        """
        guesses = labels.guesses or labels
        columns = self._lengths(rollouts) | self._kl(rollouts)
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

    def _kl(self, rollouts: Rollouts) -> dict[str, list[float]]:
        learner = self.learner
        if learner.initial_reference is None:
            return {}
        prompts, responses = [], []
        for prompt, of_prompt in zip(rollouts.prompt_tokens, rollouts.tokens, strict=True):
            prompts += [prompt] * len(of_prompt)
            responses += of_prompt
        measured = measure_samples(
            learner.policy,
            learner.initial_reference,
            prompts,
            responses,
            self.settings.eval_batch_size,
            learner.layout,
            self.world,
        )
        return {name: measured[name] for name in ("kl", "kl_k1")}

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
