"""The training loop, and where the models of each trainer live. No loss has a name here.

A trainer is a class with three things: `placement` declares where its models live, `place` puts
them there, and `train` is the loop. Trainers differ in the first two; the loop is the same.
"""

import logging
from pathlib import Path
from typing import ClassVar

import torch

from preflab.batching.examples import PreferenceData
from preflab.batching.loader import Loader, evaluation_order
from preflab.batching.packing import Batch
from preflab.distributed.process_group import ALONE, World
from preflab.distributed.signals import Stopped
from preflab.evaluation.evaluator import Evaluator
from preflab.evaluation.worklist import draws_samples
from preflab.modeling.blocks import cast as cast  # for trainers of your own
from preflab.modeling.blocks import find_blocks
from preflab.modeling.fsdp import layer_plan, shard
from preflab.modeling.loading import skeleton
from preflab.modeling.logprobs import Scorer
from preflab.modeling.parallelism import Placement
from preflab.modeling.tensor_parallel import devices_for, split
from preflab.objective.registry import BoundLoss
from preflab.rewards.registry import build_rewards
from preflab.settings.schema import Settings
from preflab.training.checkpointer import Checkpointer
from preflab.training.learner import Learner, NonFiniteStepError
from preflab.training.metrics import MetricLog
from preflab.training.registry import register_trainer
from preflab.training.session import Session
from utils import Progress, seed_everything

logger = logging.getLogger(__name__)


@register_trainer
class BasicTrainer:
    """Trains in one process: on a CPU, on a GPU, or with a model's layers spread over several GPUs.

    settings: those of the run. data: examples by split, "train" and "test". world: the ranks of the
    run, with the signals that ask it to stop.
    """

    placement: ClassVar[Placement] = Placement()

    # place(scorer, dtype, settings, world) puts a built model where it lives. None: on the GPU if
    # there is one, spread over the GPUs if there are several.
    place = None

    @staticmethod
    def check(settings: Settings, *, scalar_head: bool) -> None:
        """Raise ConfigError, before weights are read, for what this placement cannot run."""

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        loss: BoundLoss,
        tokenizer,
        data: dict[str, PreferenceData],
        *,
        world: World = ALONE,
        tracker=None,
    ):
        seed_everything(settings.seed)
        self.settings, self.loss, self.data, self.world = settings, loss, data, world
        self.loader = Loader(
            data["train"].groups,
            batch_size=settings.batch_size,
            seed=settings.seed,
            n_epochs=settings.n_epochs,
            n_examples=settings.n_examples,
            order=settings.order,
            mixture=data["train"].mixture,
        )
        checkpointer = Checkpointer(
            run_dir,
            world,
            keep=settings.keep_checkpoints,
            keep_steps=settings.keep_steps or (),
            enabled=not settings.debug,
        )
        rewards = build_rewards(settings) if draws_samples(settings, loss) else {}
        self.learner = Learner(
            settings, loss, tokenizer, type(self), world, checkpoint=checkpointer.latest()
        )
        self.learner.build_reference()
        self.learner.cache_reference(
            data,
            {
                "train": self.loader.distinct(),
                "test": evaluation_order(data["test"].groups)[: settings.n_eval_examples],
            },
        )
        log = MetricLog(
            run_dir, tracker, settings.minimum_log_interval_secs, writes=world.rank == 0
        )
        self.session = Session(
            self.learner,
            Evaluator(settings, loss, tokenizer, data["test"], rewards, run_dir, world),
            checkpointer,
            log,
            loop_state=lambda: {"loader": self.loader.state_dict()},
            number=lambda: self.learner.counters.steps,
        )

    def train(self) -> dict:
        """Train to the end of the data, evaluating and saving on the way; returns the summary."""
        settings, session = self.settings, self.session
        self.world.stop_if_asked()  # there is nothing to save yet
        self.learner.prepare(total_steps=self.loader.total_steps)
        if state := session.resume():
            self.loader.load_state_dict(state["loader"])
        is_new = self.learner.counters.steps == 0 and not session.last_eval
        with session.saved_when_stopped():
            if session.owes_evaluation or (is_new and settings.do_first_eval):
                session.evaluate()
                if self.learner.counters.steps:
                    session.save()  # it may be the best
            bar = self._progress_bar()
            steps = self.loader.ahead(self._collate)
            while not session.best.reason_to_stop() and (step := next(steps, None)):
                examples, microbatches = step
                self.train_step(examples, microbatches, bar)
                bar.update(len(examples))
                if self._crossed(settings.eval_every, len(examples)) or self._at_end():
                    session.evaluate()
                session.tick()
                save_every = settings.save_every or settings.eval_every
                if self._crossed(save_every, len(examples)) or session.must_save():
                    session.save()
                self.world.stop_if_asked()
        bar.close()
        session.profiler.stop()
        ended = {}
        if reason := session.best.reason_to_stop():
            logger.info(f"ended early: {reason}")
            ended = {"ended": reason}
        return session.finish(temperature=settings.temperature, **ended)

    def _collate(self, examples) -> list[tuple[Batch, int]]:
        return self.learner.microbatches(self.data["train"], examples)

    def train_step(self, examples, microbatches: list[tuple[Batch, int]], bar: Progress) -> None:
        """One optimizer step on `examples`. One that is not finite ends the run, and so does a
        signal in the middle of it."""
        data = self.data["train"]
        try:
            self.session.step(data, microbatches, examples, bar)
        except Stopped:
            self.loader.step_back(len(examples))  # they come again when the run continues
            raise
        except NonFiniteStepError as error:
            self.loader.step_back(len(examples))
            self.session.stop_at_non_finite(error, data, examples)

    def _crossed(self, every: int, n: int) -> bool:
        """Whether the last `n` examples reached a multiple of `every`."""
        examples = self.learner.counters.examples
        return examples // every > (examples - n) // every

    def _at_end(self) -> bool:
        return self.learner.counters.examples == self.loader.total

    def _progress_bar(self) -> Progress:
        return Progress(
            total=self.loader.total,
            initial=self.learner.counters.examples,
            unit=f" {self.loss.examples}",
            desc="train",
            mininterval=self.settings.minimum_log_interval_secs,
            disable=self.world.rank > 0,
        )


@register_trainer
class FSDPTrainer(BasicTrainer):
    """Shards policy, reference, gradients and optimizer state over the ranks, with FSDP2."""

    placement = Placement(
        one_process_per_device=True,
        shards_state=True,
        averages_gradients=True,
        own_mixed_precision=True,
        settings=frozenset(
            {"world_size", "tensor_parallel_size", "fsdp_shard_size", "fsdp_cpu_offload"}
        ),
    )

    @staticmethod
    def place(scorer: Scorer, dtype: torch.dtype, settings: Settings, world: World) -> None:
        shard(scorer, world, settings, dtype)

    @staticmethod
    def check(settings: Settings, *, scalar_head: bool) -> None:
        model = skeleton(settings.model, scalar_head=scalar_head)
        find_blocks(model, settings.model.block_name)
        if settings.tensor_parallel_size > 1:
            layer_plan(model, settings.tensor_parallel_size)


@register_trainer
class TensorParallelTrainer(BasicTrainer):
    """One process; every layer of the policy and of the reference is split over several devices."""

    placement = Placement(splits_layers=True, settings=frozenset({"world_size"}))

    @staticmethod
    def place(scorer: Scorer, dtype: torch.dtype, settings: Settings, world: World) -> None:
        split(scorer, devices_for(settings), dtype)

    @staticmethod
    def check(settings: Settings, *, scalar_head: bool) -> None:
        if settings.function != "plan":  # a plan is for other machines
            devices_for(settings)
