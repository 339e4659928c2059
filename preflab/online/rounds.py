"""Online learning: rounds of sampling, labelling and learning (OPO and D2PO, arXiv:2405.01511).

The learner, its placement, checkpoints and evaluations are those of offline training.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from preflab.batching.examples import PreferenceData
from preflab.distributed.process_group import ALONE, World
from preflab.objective.registry import BoundLoss
from preflab.online.build import build_parts
from preflab.online.drawing import rollouts_file
from preflab.online.round_steps import RoundSteps
from preflab.settings.schema import Settings
from preflab.training.checkpoints import undone_when_stopped
from preflab.training.learner import NonFiniteStepError
from preflab.training.metrics import rewind
from preflab.training.profiling import Stopwatch
from preflab.training.session import Session
from utils import PrefLabError, Progress, seed_everything

logger = logging.getLogger(__name__)

PATIENCE = 20  # rounds in a row without a pair after which the run stops


class NothingToLearnError(PrefLabError):
    """No pair of responses could be ordered in PATIENCE rounds; the state is saved."""

    everywhere = True


class OnlineTrainer:
    """The loop over rounds: sample responses, label them, learn from them.

    settings: those of the run. data: prompts by split, "train" and "test". trainer: the class that
    declares where models live. world: the ranks of the run, with the signals that ask it to stop.

    A signal is obeyed at once until a model has learned in a round, and after that at the end of
    the round: what was learned from a part of one cannot be continued.
    """

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        loss: BoundLoss,
        tokenizer,
        data: dict[str, PreferenceData],
        *,
        trainer: type,
        world: World = ALONE,
        tracker=None,
    ):
        seed_everything(settings.seed)
        self.settings, self.run_dir, self.loss, self.world = settings, run_dir, loss, world
        self.round = 0  # the last one that was labelled
        self.rounds_without_pairs = 0  # in a row
        self.has_initial_labels = False  # whether they are bought and learned from
        self.timed = Stopwatch("sampling", "labelling", "learning", "measuring", "evaluating")
        parts = build_parts(
            settings,
            run_dir,
            loss,
            tokenizer,
            data,
            trainer=trainer,
            world=world,
            tracker=tracker,
        )
        self.learner, self.source = parts.learner, parts.source
        self.labeler, self.measures = parts.labeler, parts.measures
        discriminator = self.labeler.discriminator
        self.session = Session(
            self.learner,
            parts.evaluator,
            parts.checkpointer,
            parts.log,
            loop_state=self.state_dict,
            # Not the step: a round without a pair takes none, and still changes the labeler.
            number=lambda: self.round,
            also={} if discriminator is None else {"discriminator": discriminator},
        )

    # ------------------------------------------------------------------------------------ the loop

    def train(self) -> dict:
        """Run all rounds, evaluating and saving in between; returns the summary.

        Raises NothingToLearnError, NonFiniteLossError or RewardError after saving, and Stopped
        after a signal.
        """
        settings, session = self.settings.online, self.session
        self.world.stop_if_asked()  # there is nothing to save yet
        self._prepare_and_resume()
        is_new = self.round == 0 and session.last_eval is None
        with session.saved_when_stopped():
            if session.owes_evaluation or (is_new and self.settings.do_first_eval):
                self._evaluate()
                self.world.stop_if_asked()
            if self.round == 0 and settings.initial_labels and not self.has_initial_labels:
                self._learn_initial_labels()
            bar = self._progress_bar()
            while self.round < settings.rounds and not self._reason_to_end():
                with self._unchanged_when_stopped():
                    self._learn_from_a_round(bar)
                bar.update()
                if self.round % settings.eval_every == 0 or self.round == settings.rounds:
                    self._evaluate()
                session.tick()
                if self.round % settings.save_every == 0 or session.must_save():
                    session.save()
                self.world.stop_if_asked()
            bar.close()
            session.profiler.stop()
            if (session.last_eval or {}).get("round") != self.round:
                self._evaluate()  # the run ended early, or an error ended its last evaluation
        reason = self._reason_to_end() if self.round < settings.rounds else None
        if reason:
            logger.info(f"ended after {self.round} rounds: {reason}")
        return session.finish(
            temperature=self.settings.temperature,
            rounds=self.round,
            labels_bought=self.labeler.bought_until(self.round),
            ended=reason,
            **{f"seconds_{name}": seconds for name, seconds in self.timed.seconds.items()},
        )

    def _reason_to_end(self) -> str | None:
        """The reason to end before the last round; None for none."""
        if self.labeler.spent(self.round + 1):
            return f"the budget of {self.settings.online.budget} labels is spent"
        return self.session.best.reason_to_stop()

    def _progress_bar(self) -> Progress:
        return Progress(
            total=self.settings.online.rounds,
            initial=self.round,
            unit=" rounds",
            desc="online",
            disable=self.world.no_bar,
        )

    # --------------------------------------------------------------------------------- the rounds

    def _learn_initial_labels(self) -> None:
        """Buy labels of samples of the initial policy, and train the discriminator on them."""
        n = self.settings.online.initial_labels
        with self._unchanged_when_stopped(), self._saved_on_error():
            with self.timed("sampling"):
                rollouts = self.source.initial(n, self.labeler.recorded(0))
            with self.timed("labelling"):
                self.labeler.begin(rollouts)
        self.has_initial_labels = True

    def _learn_from_a_round(self, bar: Progress) -> None:
        number = self.round + 1
        with self._saved_on_error():
            with self.timed("sampling"):
                room, recorded = self.labeler.room(number), self.labeler.recorded(number)
                rollouts = self.source.of_round(number, room, recorded)
            with self.timed("measuring"):
                # Before labelling, which changes the discriminator: a reward may fail here.
                scores = self.measures.scores(rollouts)
            with self.timed("labelling"):
                labels = self.labeler.label(rollouts)
        self.round = number
        labels.suit(self.loss)
        with self.timed("learning"):
            steps = RoundSteps(self.settings, self.learner, rollouts, labels)
            read = steps.read_reference()
        with self.timed("measuring"):
            values = self.measures.measure(rollouts, labels, scores, read)
        del read  # with the hidden states
        rollouts.hidden = None
        with self.timed("learning"):
            self.learner.reference_update.before_round(number)
            self._learn(steps, bar)
        with self.timed("sampling"):
            self.source.wait(self.world)
        n_ties = len(rollouts) - len(steps)
        counts = {"round": number, "online/pairs": len(steps), "online/ties": n_ties}
        seconds = {f"seconds/{part}": spent for part, spent in self.timed.seconds.items()}
        self.session.write("online", counts | values | seconds)
        self.rounds_without_pairs = 0 if len(steps) else self.rounds_without_pairs + 1
        if self.rounds_without_pairs >= PATIENCE:
            self._stop_without_pairs()

    def _learn(self, steps: RoundSteps, bar: Progress) -> None:
        """Train on the pairs or lists of a round, `updates_per_round` times."""
        for examples, microbatches in steps:
            try:
                self.session.step(steps.data, microbatches, examples, bar)
            except NonFiniteStepError as error:
                # The round cannot be repeated: the policy has learned from a part of it.
                self.session.stop_at_non_finite(error, steps.data, examples)
            self.world.stop.held = True

    def _evaluate(self) -> None:
        """Evaluate by the rewards and the KL of samples, because there are no held-out pairs."""
        begun = self.round > 0 or self.has_initial_labels  # a kill may have left bought labels
        bought = self.labeler.bought_until(self.round) if begun else 0
        with self.timed("evaluating"), self._saved_on_error():
            self.session.evaluate(round=self.round, **{"online/labels_bought": bought})

    def _stop_without_pairs(self) -> None:
        self.session.save(wait=True)
        raise NothingToLearnError(
            f"in the last {PATIENCE} rounds no two responses of a prompt could be ordered;"
            f" {self.session.checkpointer.where()}; look at rollouts.jsonl: has the policy"
            " collapsed, or does the reward give all its samples the same score?"
        )

    @contextlib.contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Save before an error ends the run. The policy has not learned from the current prompts,
        so the checkpoint starts with them again."""
        before = self.source.prompts.state_dict()
        try:
            yield
        except PrefLabError:
            self.source.prompts.load_state_dict(before)
            self.session.save(wait=True)
            raise

    @contextlib.contextmanager
    def _unchanged_when_stopped(self) -> Iterator[None]:
        """Go back to the state before a round that a signal interrupts; from the moment on that a
        model learns in the round, no signal does."""
        before = self.state_dict()
        try:
            with undone_when_stopped(lambda: self._restore(before)):
                yield
        finally:
            self.source.abandon()  # after an error; else nothing is being drawn
            self.world.stop.held = False

    # --------------------------------------------------------------------------- saving, resuming

    def state_dict(self) -> dict:
        """The state of the loop, for a checkpoint."""
        online = {
            "round": self.round,
            "seconds": dict(self.timed.seconds),
            "fruitless": self.rounds_without_pairs,
            "begun": self.has_initial_labels,
            "labels": self.labeler.state_dict(),
        }
        return {**self.source.state_dict(self.round + 1), "online": online}

    def _prepare_and_resume(self) -> None:
        self.learner.prepare()
        if self.labeler.discriminator is not None:
            self.labeler.discriminator.prepare()
        if state := self.session.resume():
            self._restore(state)
        if self.world.rank == 0:
            for path in (self.run_dir / "metrics.jsonl", rollouts_file(self.run_dir)):
                rewind(path, self.round, by="round")

    def _restore(self, state: dict) -> None:
        """Return to what `state_dict` returned."""
        online = state["online"]
        self.round = online["round"]
        self.timed.seconds |= online["seconds"]
        self.source.load_state_dict(state, self.round + 1)
        self.rounds_without_pairs = online["fruitless"]
        self.has_initial_labels = online["begun"]
        self.labeler.load_state_dict(online["labels"])
