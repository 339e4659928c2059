"""Evaluations: held-out losses and samples of a policy, during training and of checkpoints."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

from tqdm import tqdm

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Layout
from preflab.distributed.process_group import World
from preflab.distributed.signals import Stopped, StopSignals
from preflab.evaluation.held_out import evaluate_loss
from preflab.evaluation.samples import Sampling, sample_and_measure
from preflab.evaluation.worklist import Checkpoint, draws_samples, finish_evaluation, temperatures
from preflab.modeling.fsdp import reshard
from preflab.modeling.layout_choice import choose_layout
from preflab.modeling.loading import build_policy, build_reference
from preflab.modeling.logprobs import Scorer
from preflab.modeling.parallelism import bind_place
from preflab.objective.registry import BoundLoss
from preflab.rewards.registry import Score
from preflab.settings.values import changed
from preflab.training.checkpoints import Counters
from preflab.training.metrics import MetricLog
from preflab.training.summary import write_summary
from utils import append_rows

logger = logging.getLogger(__name__)


class Evaluator:
    """Measures a policy on the held-out examples `data`.

    rewards: what scores samples, by name. The samples of the reference are drawn once, for it does
    not change.
    """

    def __init__(
        self,
        settings,
        loss: BoundLoss,
        tokenizer,
        data: PreferenceData,
        rewards: dict[str, Score],
        run_dir: Path,
        world: World,
    ):
        self.settings, self.loss, self.tokenizer, self.data = settings, loss, tokenizer, data
        self.rewards, self.run_dir, self.world = rewards, run_dir, world
        self._reference_samples: dict = {}

    def evaluate(
        self, policy: Scorer, reference: Scorer | None, layout: Layout, *, examples: int
    ) -> dict[str, float]:
        """Held-out losses, and samples where the run takes some, which go to samples.jsonl.

        examples: how many the policy has learned from so far.
        """
        values = self.held_out_losses(policy, reference, layout)
        if draws_samples(self.settings, self.loss):
            rows, means = self.sample(
                policy,
                reference,
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
        """Means over the held-out examples; empty where the data holds prompts only."""
        if self.data.kind == "prompts":
            return {}
        return evaluate_loss(
            self.loss,
            policy,
            reference,
            self.data,
            n=self.settings.n_eval_examples,
            batch_size=self.settings.eval_batch_size,
            layout=layout,
            world=self.world,
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
        room = settings.max_length - settings.max_prompt_length
        how = Sampling(
            n=n,
            k=settings.samples_per_prompt,
            max_prompt_length=settings.max_prompt_length,
            max_new_tokens=settings.max_new_tokens or room,
            temperature=temperature,
            top_p=settings.topp,
            seed=settings.seed,
            batch_size=settings.eval_batch_size,
        )
        return sample_and_measure(
            policy,
            reference,
            self.tokenizer,
            self.data,
            self.rewards,
            how,
            layout,
            self.world,
            self._reference_samples,
        )


def evaluate_checkpoints(
    worklist: list[tuple[Checkpoint, list[float]]],
    evaluator: Evaluator,
    trainer: type,
    log: MetricLog,
    stop: StopSignals,
) -> dict:
    """Every checkpoint at every temperature: a row of eval.jsonl for each, and samples.

    worklist: what is still to do. trainer: the class that declares where models live. Returns the
    summary. Raises Stopped after a row if a signal arrived; the same command continues after it.
    """
    settings, world, scalar = evaluator.settings, evaluator.world, False
    scalar = "scalar_head" in evaluator.loss.reads
    place = bind_place(trainer, settings, world)
    n_rows = sum(len(missing) for _, missing in worklist)
    bar = tqdm(
        total=n_rows, desc="evaluations", disable=True if len(worklist) < 2 else world.no_bar
    )
    policy = reference = layout = None
    values: dict = {}
    for checkpoint, missing in worklist:
        policy = None  # two of them need not be in memory at once
        gc.collect()  # some models form cycles
        model = changed(settings.model, archive=checkpoint.source)
        policy = build_policy(model, scalar_head=scalar, trainable=False, place=place)
        if layout is None:
            layout, reason = choose_layout(
                settings,
                policy,
                world,
                pad_id=evaluator.tokenizer.pad_token_id,
                last_tokens=scalar,
            )
            reshard(policy.model)
            logger.info(f"layout: {layout.name}" + (f" ({reason})" if reason else ""))
            if not scalar:
                reference = build_reference(settings.model, policy, training=False, place=place)
        losses = evaluator.held_out_losses(policy, reference, layout)
        for temperature in missing:
            rows, means = [], {}
            if draws_samples(settings, evaluator.loss):
                rows, means = evaluator.sample(
                    policy, reference, layout, n=settings.n_eval_examples, temperature=temperature
                )
            values = losses | means
            if world.rank == 0:
                drawn = {
                    "temperature": temperature,
                    "top_p": settings.topp,
                    "samples_per_prompt": settings.samples_per_prompt,
                    "eval_seed": settings.seed,
                }
                finish_evaluation(evaluator.run_dir, checkpoint, rows, drawn | values)
            where = {"checkpoint": checkpoint.path, "temperature": temperature}
            log.write_at(Counters(), "eval", values | where)
            bar.update()
            if signum := stop.anywhere(world):
                log.finish()
                raise Stopped(signum)
    bar.close()
    summary = write_summary(
        evaluator.run_dir,
        settings,
        evaluator.loss.name,
        values,
        Counters(),
        world,
        temperature=temperatures(settings)[-1],
        state_bytes={},
    )
    log.finish()
    return summary
