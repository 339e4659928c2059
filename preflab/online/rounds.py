"""Online learning: rounds of sampling from the policy, labelling what came, and learning from it
(OPO and D2PO, arXiv:2405.01511).

What learns, where it lives, its optimizer, checkpoints and evaluations are those of the offline
trainers; here is what a round is, and how a model becomes a discriminator.
"""

import contextlib
import json
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from tqdm import tqdm

from preflab.batching.examples import PreferenceData, PromptToSample, prompt_to_sample
from preflab.batching.loader import Loader
from preflab.batching.token_store import store_of
from preflab.evaluation.samples import measure_samples
from preflab.modeling.generation import sample
from preflab.modeling.loading import build_policy
from preflab.online.build import make_labeller
from preflab.online.discriminator import Several
from preflab.online.ledger import score_shared
from preflab.online.rollouts import Labels, Rollouts
from preflab.rewards.registry import REWARDS, all_rewards, build_rewards
from preflab.training.metrics import rewind
from trainers import BasicTrainer
from utils import PrefLabError, in_use, mean_and_error

PATIENCE = 20  # rounds without a single pair before the run gives up


class NothingToLearn(PrefLabError):
    """Round after round the responses could not be told apart; the state is saved."""

    everywhere = True


def online_trainer(kind: type[BasicTrainer]) -> type[BasicTrainer]:
    """The trainer that learns online where `kind` learns from given pairs."""
    return type(f"Online{kind.__name__}", (Online, kind), {"kind": kind})


class Online:
    """Rounds around the step of a trainer. `data` holds prompts; the pairs of each round take the
    place of training data."""

    def _make_loader(self) -> Loader:
        self.prompts = self.data["train"]
        settings = self.config.online
        n = settings.prompts_per_round or self.config.batch_size
        return Loader(
            np.arange(len(self.prompts)),
            batch_size=n,
            seed=self.config.seed,
            n_epochs=None,
            n_examples=2**62,
        )  # rounds end it

    def build_models(self) -> None:
        super().build_models()
        self.round = 0
        self.seconds = dict.fromkeys(("sampling", "labelling", "learning", "measuring"), 0.0)
        self.fruitless = 0  # rounds in a row without a pair
        self.begun = False  # whether the initial labels are bought and learnt from
        self.rewards = self.rewards or build_rewards(
            self.config
        )  # evaluations may have them already
        self.gold = next(
            (
                name
                for name, settings in all_rewards(self.config).items()
                if REWARDS[settings["name"]].is_gold
            ),
            None,
        )
        self.sampler = self._build_sampler()
        self.labeller = make_labeller(
            self.kind,
            self.config,
            next(iter(self.rewards.values())),
            self.run_dir,
            self.world,
            self.stop,
        )

    def _build_sampler(self):
        """Who writes the rollouts: the policy, or a model that stays as it is."""
        given = self.config.online.sampler
        if given is None or (given == "reference" and self.reference is not None):
            return self.reference if given else self.policy
        model = self.config.model
        archive = (model.reference_archive or model.archive) if given == "reference" else given
        return build_policy(
            OmegaConf.merge(model, {"archive": archive}), trainable=False, place=self.place
        )

    # ----------------------------------------------------------------------------------- the rounds

    def train(self) -> dict:
        """All rounds, evaluating and saving on the way; returns the summary."""
        with (
            contextlib.ExitStack() as stack
        ):  # two runs that bought labels into one ledger would overspend
            self.world.agree(lambda: stack.enter_context(in_use(self.run_dir / "labels.lock")))
            return self._train()

    def _train(self) -> dict:
        self._prepare_training()
        self.resume()
        settings = self.config.online
        started = time.perf_counter() - self.counters.seconds
        if self.round == 0 and self.last_eval is None and self.config.do_first_eval:
            self.evaluate()
            self._stop_if_asked()
        if self.round == 0 and settings.initial_labels and not self.begun:
            self._teach_discriminator()
        bar = tqdm(
            total=settings.rounds,
            initial=self.round,
            unit=" rounds",
            desc="online",
            disable=True if self.world.rank else None,
        )
        why = None
        while self.round < settings.rounds and not (why := self._why_to_end()):
            self._learn_from_a_round(bar)
            bar.update()
            if self.round % settings.eval_every == 0 or self.round == settings.rounds:
                self.evaluate()
            self.counters.seconds = time.perf_counter() - started
            if self.round % settings.save_every == 0:
                self.save()
            self._stop_if_asked()
        bar.close()
        self.profiler.stop()
        if (self.last_eval or {}).get(
            "round"
        ) != self.round:  # ended early, or stopped in the last evaluation
            self.evaluate()
        self.save()
        self.finish_saving()
        if why:
            print(f"ended after {self.round} rounds: {why}")
        seconds = {f"seconds_{name}": s for name, s in self.seconds.items()}
        return self.summarize(
            rounds=self.round,
            labels_bought=self.labeller.bought_until(self.round),
            ended=why,
            **seconds,
        )

    def _why_to_end(self) -> str | None:
        if self.labeller.spent(self.round + 1):
            return f"the budget of {self.config.online.budget} labels is spent"
        return None

    def _teach_discriminator(self) -> None:
        """Buy labels of samples of the policy that the run starts with, before the first round."""
        with self._or_saved():
            with self._timed("sampling"):
                prompts = []
                while len(prompts) < self.config.online.initial_labels:
                    prompts += self._next_prompts()
                rollouts = self._roll_out(0, prompts[: self.config.online.initial_labels])
            with self._timed("labelling"):
                self.labeller.begin(rollouts)
        self.begun = True

    def _learn_from_a_round(self, bar: tqdm) -> None:
        number = self.round + 1
        with self._or_saved():
            with self._timed("sampling"):
                rollouts = self._roll_out(
                    number, self._next_prompts()[: self.labeller.room(number)]
                )
            with self._timed(
                "measuring"
            ):  # first, for it may fail, and labelling changes the discriminator
                rewards = self._asked_for_the_log(rollouts)
            with self._timed("labelling"):
                labels = self.labeller.label(rollouts)
        self.round = number
        if (
            "scores" in self.loss.reads
            # a bought label may order what the discriminator cannot, and then there is no gap to read
        ):
            labels.pairs = [
                pair if pair and of[pair[0]] > of[pair[1]] else None
                for pair, of in zip(labels.pairs, labels.scores)
            ]
        with self._timed("measuring"):
            values = self._measure(rollouts, labels, rewards)
        with self._timed("learning"):
            n = self._learn(rollouts, labels, bar)
        self.fruitless = 0 if n else self.fruitless + 1
        shares = {f"seconds/{name}": s for name, s in self.seconds.items()}
        self._write(
            "online",
            {"round": number, "online/pairs": n, "online/ties": len(rollouts) - n}
            | values
            | shares,
        )
        if self.fruitless >= PATIENCE:
            self._save_now()
            raise NothingToLearn(
                f"in the last {PATIENCE} rounds no two responses of a prompt were told apart; the"
                f" weights are in {self.run_dir / 'LATEST'}; look at rollouts.jsonl: has the policy"
                " collapsed, or can the reward not tell its samples apart?"
            )

    @contextlib.contextmanager
    def _or_saved(self):
        """What fails in here leaves a checkpoint from which the same prompts come again: the policy
        has not learnt from them."""
        before = self.loader.state_dict()
        try:
            yield
        except PrefLabError:
            self.loader.load_state_dict(before)
            self._save_now()
            raise

    def checkpoint_number(self) -> int:
        """That of the round: one without a pair takes no step, and changes who labels all the
        same."""
        return self.round

    def _save_now(self) -> None:
        self.save()
        self.finish_saving()

    @contextlib.contextmanager
    def _timed(self, what: str):
        begun = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - begun

    def _next_prompts(self) -> list[PromptToSample]:
        return [
            prompt_to_sample(self.prompts, int(i), self.config.max_prompt_length)
            for i in next(self.loader)
        ]

    def _roll_out(self, number: int, prompts: list[PromptToSample]) -> Rollouts:
        """K responses to each prompt of a round; those that labels were bought for before a stop
        are taken as they were."""
        k = self.config.online.responses_per_prompt
        paid = {row["key"]: row["tokens"] for row in self.labeller.recorded(number)}
        drawn = iter(
            self._draw(
                [
                    (p, j)
                    for i, p in enumerate(prompts)
                    if p.key not in paid
                    for j in range(i * k, (i + 1) * k)
                ],
                number,
            )
        )
        tokens = [paid.get(p.key) or [next(drawn) for _ in range(k)] for p in prompts]
        texts = lambda many: [
            self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in many
        ]  # noqa: E731
        return Rollouts(
            number,
            [p.key for p in prompts],
            texts(p.tokens for p in prompts),
            [p.tokens for p in prompts],
            [texts(of_prompt) for of_prompt in tokens],
            tokens,
        )

    def _draw(self, wanted: list[tuple[PromptToSample, int]], number: int) -> list[list[int]]:
        """A response to each prompt of a round, with the number it has among all of the round."""
        config = self.config
        if not wanted:
            return []
        return sample(
            self.sampler,
            self.tokenizer,
            [p.tokens for p, _ in wanted],
            keys=[(p.key, number, j) for p, j in wanted],
            max_new_tokens=config.online.max_new_tokens
            or config.max_new_tokens
            or config.max_length - config.max_prompt_length,
            temperature=config.temperature,
            top_p=config.topp,
            seed=config.seed,
            batch_size=config.eval_batch_size,
            world=self.world,
            description="roll out",
        )

    def _measure(
        self, rollouts: Rollouts, labels: Labels, rewards: dict[str, list[float]]
    ) -> dict[str, float]:
        """What the log has of a round, none of which the learner sees: gold of all rollouts, KL to
        the reference, accuracy of the labels.

        rewards: scores of the rollouts by name, as far as they were asked for.
        """
        guesses = labels.guesses or labels
        flat = [t for of_prompt in rollouts.tokens for t in of_prompt]
        columns = {
            "length": list(map(len, flat)),
            "ended": [float(t[-1:] == [self.tokenizer.eos_token_id]) for t in flat],
        }
        if self.reference is not None:
            prompts = [
                p
                for p, of_prompt in zip(rollouts.prompt_tokens, rollouts.tokens)
                for _ in of_prompt
            ]
            measured = measure_samples(
                self.policy,
                self.reference,
                prompts,
                flat,
                self.config.eval_batch_size,
                self.layout,
                self.world,
            )
            columns |= {name: measured[name] for name in ("kl", "kl_k1")}
        if self.labeller.labels_by_reward:  # not asked twice
            rewards = {
                next(iter(self.rewards)): [s for of_prompt in labels.scores for s in of_prompt]
            } | rewards
        columns |= {f"reward[{name}]": values for name, values in rewards.items()}
        columns["label_score"] = [score for of_prompt in guesses.scores for score in of_prompt]
        values = {
            f"online/{name}": mean_and_error(of_rollouts)[0]
            for name, of_rollouts in columns.items()
        }
        values |= {"online/labels_bought": self.labeller.bought_until(rollouts.round)}
        if self.gold in rewards:
            values["online/gold_reward"] = values[f"online/reward[{self.gold}]"]
            values["online/label_accuracy"] = _accuracy(guesses, rewards[self.gold])
        if self.world.rank == 0:
            self._keep(rollouts, guesses.scores, labels.pairs, rewards)
        return values

    def _asked_for_the_log(self, rollouts: Rollouts) -> dict[str, list[float]]:
        """Scores of all rollouts by name: not by what will label them anyway, and not by gold that
        may not be measured."""
        names = list(self.rewards)[1 if self.labeller.labels_by_reward else 0 :]
        return {
            name: score_shared(self.world, self.rewards[name], *rollouts.flat())
            for name in names
            if self._measures(name)
        }

    def _measures(self, name: str) -> bool:
        wanted = self.config.online.measure_gold
        return (
            not REWARDS[all_rewards(self.config)[name]["name"]].is_paid
            if wanted == "auto"
            else wanted
        )

    def _keep(
        self,
        rollouts: Rollouts,
        scores: list[list[float]],
        pairs: list,
        rewards: dict[str, list[float]],
    ) -> None:
        k = self.config.online.responses_per_prompt
        with open(self.run_dir / "rollouts.jsonl", "a", encoding="utf-8") as f:
            for i, prompt in enumerate(rollouts.prompts):
                row = {
                    "round": rollouts.round,
                    "prompt": prompt,
                    "responses": rollouts.responses[i],
                    "scores": scores[i],
                }
                row |= {
                    "pair": pairs[i],
                    "rewards": {
                        name: values[i * k : (i + 1) * k] for name, values in rewards.items()
                    },
                }
                f.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _learn(self, rollouts: Rollouts, labels: Labels, bar: tqdm) -> int:
        """`updates_per_round` passes over the round's pairs; returns how many there are."""
        store = store_of(
            f"round {rollouts.round}",
            list(zip(rollouts.prompt_tokens, rollouts.tokens)),
            labels.scores,
            labels.pairs,
        )
        if not len(store.prompts):
            return 0
        self.data["train"] = PreferenceData([store], self.loss.examples, store.name)
        for update in range(self.config.online.updates_per_round):
            order = np.random.default_rng([self.config.seed, rollouts.round, update]).permutation(
                len(store.prompts)
            )
            for begin in range(0, len(order), self.config.batch_size):
                examples = order[begin : begin + self.config.batch_size]
                self.train_step(examples, self._collate(examples), bar)
        return len(store.prompts)

    def _step_back(self, n: int) -> None:
        """A round is not taken back: some of its steps are done."""

    def evaluate(self) -> None:
        with self._timed("measuring"), self._or_saved():
            super().evaluate()

    def _held_out_losses(self) -> dict[str, float]:
        """There are no held-out pairs, so an evaluation is of samples: their rewards and KL."""
        return {"round": self.round, "online/labels_bought": self.labeller.bought_until(self.round)}

    # -------------------------------------------------------------------------- saving and resuming

    def progress(self) -> dict:
        more = {
            "round": self.round,
            "seconds": self.seconds,
            "fruitless": self.fruitless,
            "begun": self.begun,
            "labels": self.labeller.state_dict(),
        }
        return super().progress() | {"online": more}

    def go_on_from(self, progress: dict) -> None:
        super().go_on_from(progress)
        state = progress["online"]
        self.round, self.seconds, self.fruitless, self.begun = (
            state[key] for key in ("round", "seconds", "fruitless", "begun")
        )
        self.labeller.load_state_dict(state["labels"])

    def _prepare_training(self) -> None:
        super()._prepare_training()
        if self.labeller.discriminator is not None:
            self.labeller.discriminator._prepare_training()

    def resume(self) -> None:
        if self.labeller.discriminator is not None:
            self.labeller.discriminator.resume()
        super().resume()
        if self.world.rank == 0:
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                rewind(self.run_dir / name, self.round, by="round")

    def _fill_checkpoint(self, folder: Path) -> Future | None:
        futures = [super()._fill_checkpoint(folder)]
        if self.labeller.discriminator is not None:
            inner = folder / "discriminator"
            inner.mkdir(exist_ok=True)
            futures.append(self.labeller.discriminator._fill_checkpoint(inner))
        waiting = [future for future in futures if future is not None]
        return Several(waiting) if waiting else None


def _accuracy(labels: Labels, gold: list[float]) -> float | None:
    """The share of labelled pairs that gold orders the same way; those that it does not order are
    left out."""
    k = len(labels.scores[0])
    right = [
        gold[i * k + pair[0]] - gold[i * k + pair[1]] for i, pair in enumerate(labels.pairs) if pair
    ]
    right = [gap > 0 for gap in right if gap]
    return sum(right) / len(right) if right else None
