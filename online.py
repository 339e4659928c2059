"""Online learning: rounds of sampling from the policy, labelling what came, and learning from it
(OPO and D2PO, arXiv:2405.01511).

What learns, where it lives, its optimizer, checkpoints and evaluations are those of the offline
trainers; here is what a round is, and how a model becomes a discriminator.
"""

import contextlib
import json
import math
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import AutoConfig

from batching import (
    Loader,
    PreferenceData,
    PromptToSample,
    prompt_to_sample,
    store_of,
    truncate,
)
from checkpoints import latest_checkpoint
from configuration import discriminator_loss
from evaluation import measure_samples
from labels import (
    DiscriminatorLabels,
    GoldLabels,
    Labels,
    Ledger,
    RemoteLabels,
    Rollouts,
    StaticLabels,
    score_shared,
)
from launch import StopSignals
from layouts import lay_out
from logprobs import Scorer
from metrics import rewind
from models import build_policy, build_reference, load_tokenizer
from objective import compute_loss
from rewards import REWARDS, all_rewards, build_rewards
from sampling import sample
from trainers import BasicTrainer, NonFiniteLoss
from utils import ConfigError, PrefLabError, in_use, mean_and_error, model_folder

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
        return _Several(waiting) if waiting else None


class _Several:
    """Futures as one."""

    def __init__(self, futures: list):
        self.futures = futures

    def result(self) -> None:
        for future in self.futures:
            future.result()


def _accuracy(labels: Labels, gold: list[float]) -> float | None:
    """The share of labelled pairs that gold orders the same way; those that it does not order are
    left out."""
    k = len(labels.scores[0])
    right = [
        gold[i * k + pair[0]] - gold[i * k + pair[1]] for i, pair in enumerate(labels.pairs) if pair
    ]
    right = [gap > 0 for gap in right if gap]
    return sum(right) / len(right) if right else None


# --------------------------------------------------------------------------------------- who labels


def make_labeller(
    kind: type[BasicTrainer], config, score, run_dir: Path, world, stop: StopSignals | None = None
) -> StaticLabels:
    """Who labels in a run of this config. score: that of `reward`."""
    settings = config.online
    ledger = Ledger(run_dir / "labels.jsonl", settings.budget, world)
    if settings.discriminator is not None:
        discriminator = make_discriminator(kind, config, run_dir, world, stop)
        return DiscriminatorLabels(score, ledger, discriminator, settings, config.seed)
    if hasattr(score, "learn"):
        return RemoteLabels(score, world, str(run_dir.resolve()))
    if REWARDS[config.reward.name].is_gold:
        return GoldLabels(score, ledger, settings.responses_per_prompt)
    return StaticLabels(score, world)


def make_discriminator(
    kind: type[BasicTrainer], config, run_dir: Path, world, stop: StopSignals | None = None
):
    """A trainer of this kind whose model scores responses, and whose examples are bought labels."""
    loss, settings = discriminator_loss(config), config.online
    model, start = {}, settings.discriminator_path
    if "scalar_head" in loss.reads and start:
        folder = str(model_folder(start))
        if settings.budget == 0 and not any(
            kind.endswith("ForSequenceClassification")
            for kind in AutoConfig.from_pretrained(folder).architectures or ()
        ):
            raise ConfigError(
                f"online.discriminator_path={start} is no reward model, and with online.budget=0 it"
                f" would stay untaught; give a run of loss={loss.name}, or a budget"
            )
        model = {
            "name_or_path": folder,
            "tokenizer_name_or_path": folder,
            "archive": None,
            "block_name": None,
            "from_scratch": False,
            "reinit_head": False,
        }
    elif (
        "scalar_head" not in loss.reads
    ):  # log pi - log pi_ref; the reference is where the policy starts
        model = {
            "archive": start or config.model.archive,
            "reference_archive": config.model.reference_archive or config.model.archive,
            "lora": {"r": 0},
        }
    changed = {
        "model": model,
        "lr": settings.discriminator_lr,
        "optimizer": "AdamW",
        "warmup_steps": 0,
        "batch_size": settings.discriminator_batch_size,
        "gradient_accumulation_steps": 1,
        "sample_during_eval": False,
        "profile_steps": None,
    }
    own = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(config, resolve=True)), changed)
    kind = type(f"Discriminator{kind.__name__}", (Discriminator, kind), {})
    (run_dir / "discriminator").mkdir(parents=True, exist_ok=True)
    print(
        f"discriminator: loss={loss.name}, from"
        f" {start or own.model.archive or own.model.name_or_path}"
    )
    return kind(
        own, run_dir / "discriminator", loss, load_tokenizer(own.model), {}, world=world, stop=stop
    )


class Discriminator:
    """A trainer whose model scores texts: a response's score is what the loss calls its reward, and
    bought labels are its examples."""

    def _make_loader(self) -> None:
        return None

    def _find_checkpoint(self) -> Path | None:
        """It is saved inside the checkpoints of the run it labels for."""
        found = latest_checkpoint(self.run_dir.parent)
        return found / "discriminator" if found else None

    def _build_reference(self) -> Scorer:
        return build_reference(self.config.model, self.policy, training=False, place=self.place)

    def _tokenise(
        self, prompts: list[str], responses: list[list[str]]
    ) -> list[tuple[list[int], list[list[int]]]]:
        """As the data of reward models are: prompt and response apart, each response to its EOS."""
        ids = iter(
            self.tokenizer(
                [*prompts, *(r for of_prompt in responses for r in of_prompt)],
                add_special_tokens=False,
                verbose=False,
            )["input_ids"]
        )
        heads = [next(ids) for _ in prompts]
        limits = self.tokenizer, "keep_end", self.config.max_length, self.config.max_prompt_length
        return [
            truncate(head, [next(ids) for _ in of_prompt], *limits)[:2]
            for head, of_prompt in zip(heads, responses)
        ]

    @torch.no_grad()
    def score_responses(self, prompts: list[str], responses: list[list[str]]) -> list[list[float]]:
        """(prompts, K): the reward of each response."""
        trees = self._tokenise(prompts, responses)
        order = sorted(
            range(len(trees)), key=lambda i: len(trees[i][0]) + sum(map(len, trees[i][1]))
        )
        mine = []
        for rows, n_real in self.world.batches(order, self.config.eval_batch_size):
            batch = lay_out([trees[i] for i in rows], self.layout)
            batch.rejected = (
                batch.chosen
            )  # each response beside itself: what is wanted is the reward of one
            output, _ = compute_loss(
                self.loss, self.policy, self.reference, batch.to(self.policy.device), None, "eval"
            )
            values = iter(output.chosen_rewards.tolist())
            mine += [(i, [next(values) for _ in trees[i][1]]) for i in rows][:n_real]
        found = dict(self.world.gather(mine))
        if not all(math.isfinite(value) for of_prompt in found.values() for value in of_prompt):
            raise NonFiniteLoss(
                "the discriminator's scores are not finite; try a smaller online.discriminator_lr"
            )
        return [found[i] for i in range(len(trees))]

    def learn(self, pairs: list[tuple[str, str, str]], *, epochs: int, seed: list[int]) -> None:
        """pairs: (prompt, better, worse)."""
        trees = self._tokenise(
            [prompt for prompt, _, _ in pairs], [[better, worse] for _, better, worse in pairs]
        )
        store = store_of(
            "bought labels", trees, [[math.nan, math.nan]] * len(pairs), [(0, 1)] * len(pairs)
        )
        self.data["train"] = PreferenceData([store], "pairs", store.name)
        with tqdm(disable=True) as bar:
            for epoch in range(epochs):
                order = np.random.default_rng([*seed, epoch]).permutation(len(pairs))
                for begin in range(0, len(order), self.config.batch_size):
                    examples = order[begin : begin + self.config.batch_size]
                    self.train_step(examples, self._collate(examples), bar)

    def _stop_at_non_finite(self, examples, seen, losses) -> None:
        raise NonFiniteLoss(
            "the discriminator's loss, or its gradient, is not finite; try a smaller"
            " online.discriminator_lr"
        )

    def progress(self) -> dict:
        return {}

    def go_on_from(self, progress: dict) -> None:
        pass
