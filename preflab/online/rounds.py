"""Online learning: rounds of sampling, labelling and learning (OPO and D2PO, arXiv:2405.01511).

What learns, where it lives, its checkpoints and its evaluations are the parts that the offline
trainers are made of; here is what a round is.
"""

import contextlib
import logging
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from preflab.batching.examples import PreferenceData, PromptToSample, prompt_to_sample
from preflab.batching.loader import Loader
from preflab.batching.token_store import store_of
from preflab.distributed.process_group import ALONE, World
from preflab.distributed.signals import StopSignals
from preflab.evaluation.evaluator import Evaluator
from preflab.evaluation.worklist import draws_samples
from preflab.objective.registry import BoundLoss
from preflab.online.build import make_labeler
from preflab.online.drawing import Drawing, build_sampler, rollouts_file
from preflab.online.measures import RoundMeasures
from preflab.online.rollouts import Labels, Rollouts
from preflab.rewards.registry import build_rewards
from preflab.training.checkpointer import Checkpointer
from preflab.training.learner import Learner, NonFiniteLossError, NonFiniteStepError
from preflab.training.metrics import MetricLog, rewind
from preflab.training.profiling import Profiler
from preflab.training.session import Session
from utils import PrefLabError, in_use, seed_everything

logger = logging.getLogger(__name__)

PATIENCE = 20  # rounds without a single pair before the run gives up


class NothingToLearnError(PrefLabError):
    """Round after round no pair of responses could be ordered; the state is saved."""

    everywhere = True


class OnlineTrainer:
    """The loop over rounds: responses are sampled, labelled, and learned from.

    data: prompts by split. trainer: the class that declares where models live.
    """

    def __init__(
        self,
        settings,
        run_dir: Path,
        loss: BoundLoss,
        tokenizer,
        data: dict[str, PreferenceData],
        *,
        trainer: type,
        world: World = ALONE,
        wandb_run=None,
        stop: StopSignals | None = None,
    ):
        seed_everything(settings.seed)
        stop = stop or StopSignals()
        self.settings, self.run_dir, self.loss, self.world = settings, run_dir, loss, world
        self.prompts = data["train"]
        self.loader = Loader(
            np.arange(len(self.prompts)),
            batch_size=settings.online.prompts_per_round or settings.batch_size,
            seed=settings.seed,
            n_epochs=None,
            n_examples=2**62,  # the rounds end the run
        )
        self.round = 0
        self.seconds = dict.fromkeys(("sampling", "labelling", "learning", "measuring"), 0.0)
        self.fruitless = 0  # rounds in a row without a pair
        self.begun = False  # whether the initial labels are bought and learned from
        checkpointer = Checkpointer(
            run_dir, world, keep=settings.keep_checkpoints, enabled=not settings.debug
        )
        rewards = build_rewards(settings)
        self.learner = Learner(
            settings, loss, tokenizer, trainer, world, checkpoint=checkpointer.latest()
        )
        self.learner.build_reference()
        self.drawing = Drawing(settings, build_sampler(settings, self.learner), tokenizer, world)
        score = next(iter(rewards.values()))
        self.labeler = make_labeler(trainer, settings, score, run_dir, world)
        self.measures = RoundMeasures(settings, self.learner, rewards, self.labeler, run_dir, world)
        discriminator = self.labeler.discriminator
        self.session = Session(
            self.learner,
            Evaluator(
                settings,
                loss,
                tokenizer,
                data["test"],
                rewards if draws_samples(settings, loss) else {},
                run_dir,
                world,
            ),
            checkpointer,
            MetricLog(
                run_dir, wandb_run, settings.minimum_log_interval_secs, writes=world.rank == 0
            ),
            stop,
            loop_state=self.state_dict,
            # A round without a pair takes no step and still changes what labels.
            number=lambda: self.round,
            also={} if discriminator is None else {"discriminator": discriminator},
        )
        self.profiler = Profiler(run_dir, settings.profile_steps if world.rank == 0 else None)

    # ------------------------------------------------------------------------------------ the loop

    def train(self) -> dict:
        """All rounds, evaluating and saving on the way; returns the summary."""
        with contextlib.ExitStack() as stack:
            # Two runs that bought labels into one ledger would overspend.
            self.world.agree(lambda: stack.enter_context(in_use(self.run_dir / "labels.lock")))
            return self._train()

    def _train(self) -> dict:
        settings, session = self.settings.online, self.session
        self._prepare_and_resume()
        if self.round == 0 and session.last_eval is None and self.settings.do_first_eval:
            self._evaluate()
            session.stop_if_asked()
        if self.round == 0 and settings.initial_labels and not self.begun:
            self._teach_discriminator()
        bar = self._progress_bar()
        reason = None
        while self.round < settings.rounds and not (reason := self._reason_to_end()):
            self._learn_from_a_round(bar)
            bar.update()
            if self.round % settings.eval_every == 0 or self.round == settings.rounds:
                self._evaluate()
            session.tick()
            if self.round % settings.save_every == 0:
                session.save()
            session.stop_if_asked()
        bar.close()
        self.profiler.stop()
        if (session.last_eval or {}).get("round") != self.round:
            self._evaluate()  # the run ended early, or was stopped in its last evaluation
        if reason:
            logger.info(f"ended after {self.round} rounds: {reason}")
        return session.finish(
            temperature=self.settings.temperature,
            rounds=self.round,
            labels_bought=self.labeler.bought_until(self.round),
            ended=reason,
            **{f"seconds_{name}": seconds for name, seconds in self.seconds.items()},
        )

    def _reason_to_end(self) -> str | None:
        if self.labeler.spent(self.round + 1):
            return f"the budget of {self.settings.online.budget} labels is spent"
        return None

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.settings.online.rounds,
            initial=self.round,
            unit=" rounds",
            desc="online",
            disable=True if self.world.rank else None,
            file=sys.stderr,
        )

    # --------------------------------------------------------------------------------- the rounds

    def _teach_discriminator(self) -> None:
        """Buy labels of samples of the policy that the run starts with, before the first round."""
        n = self.settings.online.initial_labels
        with self._saved_on_error():
            with self._timed("sampling"):
                prompts = []
                while len(prompts) < n:
                    prompts += self._next_prompts()
                rollouts = self.drawing.roll_out(0, prompts[:n], self.labeler.recorded(0))
            with self._timed("labelling"):
                self.labeler.begin(rollouts)
        self.begun = True

    def _learn_from_a_round(self, bar: tqdm) -> None:
        number = self.round + 1
        with self._saved_on_error():
            with self._timed("sampling"):
                prompts = self._next_prompts()[: self.labeler.room(number)]
                recorded = self.labeler.recorded(number)
                rollouts = self.drawing.roll_out(number, prompts, recorded)
            with self._timed("measuring"):
                # First, because it may fail, and labelling changes the discriminator.
                scores = self.measures.scores(rollouts)
            with self._timed("labelling"):
                labels = self.labeler.label(rollouts)
        self.round = number
        if "scores" in self.loss.reads:
            labels.drop_pairs_without_a_gap()
        with self._timed("measuring"):
            values = self.measures.measure(rollouts, labels, scores)
        with self._timed("learning"):
            n_pairs = self._learn(rollouts, labels, bar)
        counts = {
            "round": number,
            "online/pairs": n_pairs,
            "online/ties": len(rollouts) - n_pairs,
        }
        shares = {f"seconds/{name}": seconds for name, seconds in self.seconds.items()}
        self.session.write("online", counts | values | shares)
        self.fruitless = 0 if n_pairs else self.fruitless + 1
        if self.fruitless >= PATIENCE:
            self._give_up()

    def _learn(self, rollouts: Rollouts, labels: Labels, bar: tqdm) -> int:
        """`updates_per_round` passes over the round's pairs; returns how many there are."""
        settings = self.settings
        store = store_of(
            f"round {rollouts.round}",
            list(zip(rollouts.prompt_tokens, rollouts.tokens, strict=True)),
            labels.scores,
            labels.pairs,
        )
        n_pairs = len(store.prompts)
        if not n_pairs:
            return 0
        pairs = PreferenceData([store], self.loss.examples, store.name)
        for update in range(settings.online.updates_per_round):
            order = np.random.default_rng([settings.seed, rollouts.round, update])
            order = order.permutation(n_pairs)
            for begin in range(0, n_pairs, settings.batch_size):
                self._step(pairs, order[begin : begin + settings.batch_size], bar)
        return n_pairs

    def _step(self, pairs: PreferenceData, examples: np.ndarray, bar: tqdm) -> None:
        learner = self.learner
        try:
            metrics = learner.step(pairs, learner.microbatches(pairs, examples), len(examples))
        except NonFiniteStepError as error:
            # A round is not taken back: some of its steps are done.
            self.session.save(wait=True)
            bad = (error.examples or examples.tolist())[:8]
            raise NonFiniteLossError(
                f"the {error.what} of step {learner.counters.steps + 1} is not finite, from"
                f" {', '.join(pairs.describe(example) for example in bad)};"
                f" {self.session.checkpointer.where()}; try a smaller lr or max_grad_norm, or look"
                " at these examples"
            ) from None
        self.session.write("train", metrics)
        speed = f"{metrics['tokens_per_second']:,.0f} tokens/s"
        bar.set_postfix_str(f"loss {metrics['loss/train']:.4g}, {speed}", refresh=False)
        self.profiler.step()

    def _next_prompts(self) -> list[PromptToSample]:
        longest = self.settings.max_prompt_length
        return [prompt_to_sample(self.prompts, int(i), longest) for i in next(self.loader)]

    def _evaluate(self) -> None:
        """There are no held-out pairs, so an evaluation is of samples: their rewards and KL."""
        bought = self.labeler.bought_until(self.round)
        with self._timed("measuring"), self._saved_on_error():
            self.session.evaluate(round=self.round, **{"online/labels_bought": bought})

    def _give_up(self) -> None:
        self.session.save(wait=True)
        raise NothingToLearnError(
            f"in the last {PATIENCE} rounds no two responses of a prompt could be ordered;"
            f" {self.session.checkpointer.where()}; look at rollouts.jsonl: has the policy"
            " collapsed, or does the reward give all its samples the same score?"
        )

    @contextlib.contextmanager
    def _saved_on_error(self):
        """An error in here leaves a checkpoint from which the same prompts come again: the policy
        has not learned from them."""
        before = self.loader.state_dict()
        try:
            yield
        except PrefLabError:
            self.loader.load_state_dict(before)
            self.session.save(wait=True)
            raise

    @contextlib.contextmanager
    def _timed(self, part: str):
        begun = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - begun

    # --------------------------------------------------------------------------- saving, resuming

    def state_dict(self) -> dict:
        """Where the rounds are, for a checkpoint."""
        online = {
            "round": self.round,
            "seconds": self.seconds,
            "fruitless": self.fruitless,
            "begun": self.begun,
            "labels": self.labeler.state_dict(),
        }
        return {"loader": self.loader.state_dict(), "online": online}

    def _prepare_and_resume(self) -> None:
        self.learner.prepare()
        if self.labeler.discriminator is not None:
            self.labeler.discriminator.prepare()
        if state := self.session.resume():
            self.loader.load_state_dict(state["loader"])
            online = state["online"]
            self.round, self.seconds = online["round"], online["seconds"]
            self.fruitless, self.begun = online["fruitless"], online["begun"]
            self.labeler.load_state_dict(online["labels"])
        if self.world.rank == 0:
            for path in (self.run_dir / "metrics.jsonl", rollouts_file(self.run_dir)):
                rewind(path, self.round, by="round")
