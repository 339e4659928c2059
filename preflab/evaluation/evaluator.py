"""Evaluations of a policy, by held-out losses and samples, in training and of checkpoints."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import numpy as np

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Layout
from preflab.distributed.process_group import World
from preflab.evaluation.held_out import evaluate_loss
from preflab.evaluation.samples import Samples, Sampling, sample_and_measure
from preflab.evaluation.sides import held_out_sides
from preflab.evaluation.worklist import (
    Checkpoint,
    draws_samples,
    expand_archives,
    finish_evaluation,
    temperatures,
)
from preflab.modeling.fsdp import reshard
from preflab.modeling.layout_choice import choose_layout
from preflab.modeling.loading import build_policy, build_reference
from preflab.modeling.logprobs import Scorer
from preflab.modeling.parallelism import bind_place
from preflab.objective.registry import BoundLoss
from preflab.rewards.registry import Score
from preflab.serving.build import served_columns, served_models
from preflab.settings.schema import Settings
from preflab.settings.values import changed, truncation, truncation_columns
from preflab.training.checkpoints import Counters
from preflab.training.metrics import MetricLog
from preflab.training.summary import write_summary
from utils import Progress, append_rows

logger = logging.getLogger(__name__)


class Evaluator:
    """Measures a policy on the held-out examples `data`.

    rewards: score samples, by name. The initial reference does not change, so it is sampled only
    once.
    """

    def __init__(
        self,
        settings: Settings,
        loss: BoundLoss,
        tokenizer,
        data: PreferenceData,
        rewards: dict[str, Score],
        run_dir: Path,
        world: World,
    ):
        self.settings, self.loss, self.tokenizer, self.data = settings, loss, tokenizer, data
        self.rewards, self.run_dir, self.world = rewards, run_dir, world
        archive = None  # of training, where the policy is not served
        if settings.function == "eval":
            archive = expand_archives(settings.model.archive)[0]
        self.served = served_models(settings, run_dir, archive)
        self._reference_samples: dict[Sampling, Samples] = {}
        self._sides: dict[str, np.ndarray] | None = None  # of the held-out examples

    def evaluate(
        self,
        policy: Scorer,
        reference: Scorer | None,
        layout: Layout,
        *,
        initial_reference: Scorer | None,
        examples: int,
    ) -> dict[str, float]:
        """Held-out losses, and means over samples if the run draws some.

        reference: the one that the loss reads. initial_reference: the one that is sampled too, and
        that KL is measured to. The samples are appended to samples.jsonl. examples: number of
        examples that the policy has learned from, a column of the samples.
        """
        values = self.held_out_losses(policy, reference, layout)
        if draws_samples(self.settings, self.loss):
            rows, means = self.sample(
                policy,
                initial_reference,
                layout,
                n=self.settings.n_eval_model_samples,
                temperature=self.settings.temperature,
            )
            if self.world.rank == 0:
                append_rows(self.run_dir / "samples.jsonl", rows, examples=examples)
            values |= means
        return values

    def held_out_losses(
        self, policy: Scorer, reference: Scorer | None, layout: Layout
    ) -> dict[str, float]:
        """Means of the loss and its metrics over the held-out examples; empty for data of prompts
        only."""
        if self.data.kind == "prompts":
            return {}
        if self._sides is None:
            self._sides = held_out_sides(
                self.data,
                self.tokenizer,
                n=self.settings.n_eval_examples,
                max_prompt_length=self.settings.max_prompt_length,
            )
        return evaluate_loss(
            self.loss,
            policy,
            reference,
            self.data,
            n=self.settings.n_eval_examples,
            batch_size=self.settings.eval_batch_size,
            layout=layout,
            world=self.world,
            sides=self._sides,
        )

    def sample(
        self,
        policy: Scorer,
        reference: Scorer | None,
        layout: Layout,
        *,
        n: int,
        temperature: float,
    ) -> tuple[list[dict], dict[str, float]]:
        """Rows of samples.jsonl for the first `n` held-out prompts, and the means over them."""
        settings = self.settings
        default_length = settings.max_length - settings.max_prompt_length
        sampling = Sampling(
            n=n,
            k=settings.samples_per_prompt,
            max_prompt_length=settings.max_prompt_length,
            max_new_tokens=settings.max_new_tokens or default_length,
            temperature=temperature,
            **truncation(settings),
            seed=settings.seed,
            batch_size=settings.eval_batch_size,
        )
        return sample_and_measure(
            policy,
            reference,
            self.tokenizer,
            self.data,
            self.rewards,
            sampling,
            layout,
            self.world,
            self._reference_samples,
            self.served,
        )


def evaluate_checkpoints(
    worklist: list[tuple[Checkpoint, list[float]]],
    evaluator: Evaluator,
    trainer: type,
    log: MetricLog,
) -> dict:
    """Evaluate every checkpoint at every temperature, and return the summary.

    worklist: the evaluations that have no row yet, see `pending`. trainer: the class that declares
    where models live. Each evaluation writes its samples, then a row of eval.jsonl. Raises Stopped
    between two batches if a signal arrived; the same command continues after the last row.
    """
    return write_summary(
        evaluator.run_dir,
        evaluator.settings,
        evaluator.loss.name,
        _evaluate_all(worklist, evaluator, trainer, log),
        Counters(),
        evaluator.world,
        temperature=temperatures(evaluator.settings)[-1],
        state_bytes={},
    )


def _evaluate_all(
    worklist: list[tuple[Checkpoint, list[float]]],
    evaluator: Evaluator,
    trainer: type,
    log: MetricLog,
) -> dict[str, float]:
    """The rows of a worklist; returns the values of the last."""
    world = evaluator.world
    models = _Models(evaluator, trainer)
    n_rows = sum(len(missing) for _, missing in worklist)
    hidden = True if len(worklist) < 2 else world.no_bar
    values: dict = {}
    with Progress(total=n_rows, desc="evaluations", disable=hidden) as bar:
        for checkpoint, missing in worklist:
            models.load(checkpoint)
            losses = evaluator.held_out_losses(models.policy, models.reference, models.layout)
            for temperature in missing:
                means = _evaluate_at(evaluator, models, checkpoint, temperature, losses)
                values = losses | means
                evaluated = {"checkpoint": checkpoint.path, "temperature": temperature}
                log.write_at(Counters(), "eval", values | evaluated)
                bar.update()
                world.stop_if_asked()
    return values


class _Models:
    """The policy of one checkpoint after the other, with the reference and layout of them all."""

    def __init__(self, evaluator: Evaluator, trainer: type):
        self.settings, self.world = evaluator.settings, evaluator.world
        self.tokenizer = evaluator.tokenizer
        self.place = bind_place(trainer, self.settings, self.world)
        self.scalar = "scalar_head" in evaluator.loss.reads
        self.policy: Scorer | None = None
        self.reference: Scorer | None = None
        self.layout: Layout | None = None

    def load(self, checkpoint: Checkpoint) -> None:
        """Replace the policy; choose the layout and build the reference with the first one."""
        self.policy = None  # two policies need not be in memory at once
        gc.collect()  # some models form cycles
        model = changed(self.settings.model, archive=checkpoint.source)
        self.policy = build_policy(
            model, scalar_head=self.scalar, trainable=False, place=self.place
        )
        if self.layout is not None:
            return
        self.layout, reason = choose_layout(
            self.settings,
            self.policy,
            self.world,
            pad_id=self.tokenizer.pad_token_id,
            last_tokens=self.scalar,
        )
        reshard(self.policy.model)
        logger.info(f"layout: {self.layout.name}" + (f" ({reason})" if reason else ""))
        if not self.scalar:
            self.reference = build_reference(
                self.settings.model, self.policy, training=False, place=self.place
            )


def _evaluate_at(
    evaluator: Evaluator,
    models: _Models,
    checkpoint: Checkpoint,
    temperature: float,
    losses: dict[str, float],
) -> dict[str, float]:
    """Write the samples of a checkpoint at one temperature, and its row of eval.jsonl with
    `losses`. Returns the means over the samples; both are empty where the run draws none."""
    settings = evaluator.settings
    rows: list[dict] = []
    means: dict[str, float] = {}
    if draws_samples(settings, evaluator.loss):
        rows, means = evaluator.sample(
            models.policy,
            models.reference,
            models.layout,
            n=settings.n_eval_examples,
            temperature=temperature,
        )
    if evaluator.world.rank == 0:
        sampling = {
            "temperature": temperature,
            **truncation_columns(settings),
            "samples_per_prompt": settings.samples_per_prompt,
            "eval_seed": settings.seed,
            **served_columns(settings),
        }
        finish_evaluation(evaluator.run_dir, checkpoint, rows, sampling | losses | means)
    return means
