"""What learns: a policy, its reference, an optimizer, and one step.

A trainer, an online run and a discriminator each have a learner. It knows no loop, no evaluation
and no run folder.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from preflab.batching.chat import PromptText
from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.microbatches import default_microbatch_tokens, split_step
from preflab.batching.packing import Batch
from preflab.distributed.process_group import World
from preflab.modeling.blocks import find_blocks
from preflab.modeling.fsdp import reshard
from preflab.modeling.layout_choice import choose_layout
from preflab.modeling.loading import build_policy
from preflab.modeling.logprobs import Scorer
from preflab.modeling.parallelism import bind_place
from preflab.modeling.placed_weights import (
    clip_grad_norm,
    largest_state_bytes,
    sum_over_ranks,
)
from preflab.modeling.router_loss import RouterLoss
from preflab.objective.registry import BoundLoss
from preflab.objective.types import LossOutput
from preflab.settings.schema import Settings
from preflab.training.checkpoints import (
    Counters,
    in_order,
    random_state,
    set_random_state,
    undone_when_stopped,
)
from preflab.training.compute_loss import compute_loss
from preflab.training.metrics import Sums
from preflab.training.optimizer_state import load_optimizer, save_optimizer
from preflab.training.optimizers import make_optimizer, trained_weights
from preflab.training.reference import ReferenceSource
from preflab.training.reference_update import PastPolicies, ReferenceUpdate
from preflab.training.saved_weights import save_weights
from preflab.training.schedules import schedule_of
from utils import ConfigError, PrefLabError, first_line

logger = logging.getLogger(__name__)

# The file of a checkpoint with everything but the weights and the optimizer's tensors.
STATE = "training_state.pt"


class NonFiniteLossError(PrefLabError):
    """The loss or its gradient is NaN or infinite; the weights of the last good step are saved."""

    everywhere = True


class NonFiniteStepError(Exception):
    """The loss or the gradient of a step is NaN or infinite. The weights are unchanged.

    what: "loss" or "gradient". examples: indices of those whose loss is not finite, on any rank;
    empty where only the gradient is not.
    """

    def __init__(self, what: str, examples: list[int]):
        super().__init__(f"the {what} is not finite")
        self.what, self.examples = what, examples


def not_finite(
    world: World, grad_norm: float, losses: torch.Tensor, seen: list[int]
) -> NonFiniteStepError | None:
    """The error of a step, the same on all ranks; None if all that was computed is finite.

    losses, seen: (examples,) of this rank, the loss and the index of each.
    """
    finite = torch.isfinite(losses)
    is_bad = not math.isfinite(grad_norm) or not bool(finite.all())
    if not world.max([float(is_bad)])[0]:
        return None
    by_example = world.gather(list(zip(seen, finite.tolist(), strict=True)))
    examples = sorted(example for example, is_finite in by_example if not is_finite)
    return NonFiniteStepError("loss" if examples else "gradient", examples)


class Learner:
    """A policy that learns from batches of examples.

    settings: those of the run. trainer: the class that declares where models live (`placement`,
    `place`). checkpoint: a step folder to continue from.

    Call `build_reference`, then `prepare`, then `load` if there is a checkpoint, then `step`.
    """

    def __init__(
        self,
        settings: Settings,
        loss: BoundLoss,
        tokenizer,
        trainer: type,
        world: World,
        *,
        checkpoint: Path | None = None,
    ):
        self.settings, self.loss, self.tokenizer, self.world = settings, loss, tokenizer, world
        self.placement, self.place = trainer.placement, bind_place(trainer, settings, world)
        self.checkpoint = checkpoint
        self.scalar = "scalar_head" in loss.reads  # such a model scores and writes no text
        self.counters = Counters()
        self.state_bytes: dict[str, int] = {}  # empty before the first step
        self.reference: Scorer | PastPolicies | None = None  # the loss reads its log-probs
        self.initial_reference: Scorer | None = None  # evaluations compare the policy with it
        self._group = None
        self.policy = build_policy(
            settings.model, scalar_head=self.scalar, checkpoint=checkpoint, place=self.place
        )
        self.layout, reason = choose_layout(
            settings,
            self.policy,
            world,
            pad_id=tokenizer.pad_token_id,
            last_tokens=self.scalar,
        )
        reshard(self.policy.model)
        self.router_loss = RouterLoss.of(self.policy)
        logger.info(f"layout: {self.layout.name}" + (f" ({reason})" if reason else ""))
        self._reference_source = ReferenceSource(
            settings,
            loss,
            self.policy,
            self.place,
            own_mixed_precision=self.placement.own_mixed_precision,
            resumed=checkpoint is not None,
        )

    def build_reference(self, *, at_archive: bool = True) -> None:
        """Build `reference` if steps or evaluations run it.

        at_archive: start at `model.archive`, as the policy does; see `ReferenceSource.build`.
        """
        built = self._reference_source.build(at_archive=at_archive)
        self.reference, self.initial_reference = built
        self.reference_update = ReferenceUpdate(
            self.settings.reference, self.policy, self.reference
        )

    def cache_reference(
        self, data: dict[str, PreferenceData], needed: dict[str, np.ndarray]
    ) -> None:
        """Give `data` the reference's log-probs of the `needed` examples, if the run caches them.

        needed: indices of examples by split.
        """
        self._reference_source.cache(
            data, needed, self.reference, self.layout, self._microbatch_tokens(), self.world
        )

    # -------------------------------------------------------------------------------------- a step

    def prepare(self, *, total_steps: int | None = None) -> None:
        """Make the optimizer, and set up activation checkpointing and compilation if asked for.

        total_steps: of the run, for learning rates that end with it.
        """
        settings, model = self.settings, self.policy.model
        self.schedule = schedule_of(settings, total_steps)
        _prepare_blocks(settings, self.policy)
        trained = trained_weights(model)
        self.parameters = list(trained.values())
        self.optimizer, self.optimized_names = make_optimizer(settings, self.policy)

    def microbatches(self, data: PreferenceData, examples) -> list[tuple[Batch, int]]:
        """This rank's microbatches of a step, each with the number of its examples that count.

        examples: indices of the examples of all ranks. All ranks have the same number of
        microbatches; a rank with fewer examples gets stand-ins, of which 0 examples count.
        """
        budget = None if self.loss.couples_batch else self._microbatch_tokens()
        parts = split_step(
            data,
            examples,
            self.layout,
            ranks=self.world.data_ranks,
            at_least=self.settings.gradient_accumulation_steps,
            tokens=budget,
            grouping=self.settings.length_grouping,
        )
        [mine] = self.world.share(parts)
        return [
            (_collated(self, data, part if len(part) else examples[:1]), len(part)) for part in mine
        ]

    def _microbatch_tokens(self) -> int:
        given = self.settings.microbatch_tokens
        return given or default_microbatch_tokens(self.loss.reads, self.policy.device.type)

    def step(
        self, data: PreferenceData, microbatches: list[tuple[Batch, int]], n_examples: int
    ) -> dict[str, float]:
        """Take one optimizer step and return its metrics.

        The gradient is that of the mean loss over the `n_examples` examples of all ranks, however
        they are split over ranks and microbatches. Raises NonFiniteStepError, or between two
        microbatches Stopped, on all ranks, before the weights change.
        """
        begun = time.perf_counter()
        lr = self.schedule.at(self.counters.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with undone_when_stopped(self.optimizer.zero_grad):
            output, sums, losses, seen, n_tokens = self._backward(data, microbatches, n_examples)
        if not self.placement.averages_gradients:
            sum_over_ranks(self.parameters, self.world)
        grad_norm = clip_grad_norm(self.parameters, self.settings.max_grad_norm)
        if bad := not_finite(self.world, grad_norm, losses, seen):
            self.optimizer.zero_grad()
            raise bad
        self.optimizer.step()
        self.loss.keep(output)  # running means; such a loss gets its batch in one microbatch
        # Before the gradients are freed; every step holds the same tensors.
        self.state_bytes = self.state_bytes or largest_state_bytes(
            self.policy.model, self.optimizer, self.world
        )
        self.optimizer.zero_grad()
        self.counters.steps += 1
        self.counters.examples += n_examples
        self.reference_update.after_step(self.counters.steps)
        return self._step_metrics(sums, begun, n_examples, n_tokens) | {
            "grad_norm": grad_norm,
            "lr": lr,
        }

    def _backward(
        self, data: PreferenceData, microbatches: list[tuple[Batch, int]], n_examples: int
    ) -> tuple[LossOutput, Sums, torch.Tensor, list[int], int]:
        """Add up the gradient of this rank's part of a step.

        Returns the output of the last microbatch, sums of the metrics, the loss of each example,
        the indices of these examples, and the number of tokens.
        """
        sums, losses, seen, n_tokens = Sums(), [], [], 0
        # Where the placement divides gradients by the number of ranks, this factor undoes it.
        scale = self.world.data_ranks if self.placement.averages_gradients else 1
        if self.router_loss:
            self.router_loss.begin(microbatches, self.world)
        for batch, n_real in microbatches:
            self.world.stop_if_asked()
            batch = batch.to(self.policy.device)
            output, metrics = compute_loss(
                self.loss, self.policy, self.reference, batch, data, "train"
            )
            total = output.losses[:n_real].sum() * (scale / n_examples)
            if self.router_loss:
                total = total + scale * self.router_loss.part(batch, n_real)
            total.backward()
            sums.add(metrics, n_real)
            losses.append(output.losses[:n_real].detach())
            seen += batch.examples[:n_real]
            n_tokens += batch.n_tokens if n_real else 0
        return output, sums, torch.cat(losses), seen, n_tokens

    def _step_metrics(
        self, sums: Sums, begun: float, n_examples: int, n_tokens: int
    ) -> dict[str, float]:
        # The only read-back from the device in a step: the step's time is known after it.
        means = sums.flush(self.world)
        seconds = time.perf_counter() - begun
        n_tokens = self.world.sum([n_tokens])[0]
        self.counters.train_seconds += seconds
        means["examples_per_second"] = n_examples / seconds
        means["tokens_per_second"] = n_tokens / seconds
        if self.router_loss:
            means["router_loss/train"] = self.router_loss.total()
        return means

    # ----------------------------------------------------------------------------- saving, loading

    def save(self, folder: Path, state: dict, metrics: dict) -> Callable[[], None]:
        """Take a snapshot of what `load` reads and of hf/, for `folder`. Every rank calls it.

        state: of the loop, numbers and plain containers. metrics: for the model card. Returns what
        writes the snapshot, on every rank and in any thread, while training continues.
        """
        sharded = self.placement.shards_state
        optimizer, writes = {}, []
        if sharded or self.world.rank == 0:
            group = self._writing_group()
            optimizer, write = save_optimizer(
                self.optimizer, self.optimized_names, folder / "optimizer", group
            )
            writes = [self.reference_update.save(folder, group), write]
        write = save_weights(
            self.settings,
            self.policy,
            self.tokenizer,
            folder,
            world=self.world,
            scalar_head=self.scalar,
            step=self.counters.steps,
            metrics=metrics,
        )
        if self.world.rank == 0:
            own = {
                "optimizer": optimizer,
                "loss": self.loss.state_dict(),
                "counters": vars(self.counters),
                "random": random_state(),
            }
            torch.save(own | state, folder / STATE)
        return in_order([*writes, write])

    def load(self, folder: Path) -> dict:
        """Continue from what `save` wrote; returns the state of the loop.

        The weights were read when the policy was built. Raises ConfigError for a checkpoint whose
        optimizer has other parameters.
        """
        state = _read_state(folder / STATE)
        alone = self._writing_group() is None
        optimizer = folder / "optimizer", state["optimizer"]
        load_optimizer(self.optimizer, self.optimized_names, *optimizer, alone=alone)
        self.reference_update.load(folder, alone=alone)
        if "loss" in state:
            self.loss.load_state_dict(state["loss"])
        self.counters = Counters(**state["counters"])
        set_random_state(state["random"])
        return state

    def _writing_group(self):
        """The process group that writes shards in the background; None where one process writes."""
        if self.placement.shards_state and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        return self._group


def _collated(learner: Learner, data: PreferenceData, examples: np.ndarray) -> Batch:
    """A batch with all that the learner's loss reads."""
    mismatched = "mismatched" in learner.loss.reads
    return collate(data, examples, learner.layout, mismatched=mismatched)


def _prepare_blocks(settings: Settings, policy: Scorer) -> None:
    """Activation checkpointing and compilation of a model's blocks, if asked for."""
    if settings.activation_checkpointing:
        policy.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        policy.model.train()  # transformers recomputes only in training mode; dropout rates are 0
    if settings.compile:
        for block in find_blocks(policy.causal_lm, settings.model.block_name):
            block.compile(dynamic=True)


def _read_state(path: Path) -> dict:
    """What `Learner.save` wrote beside weights and optimizer. Only plain containers, numbers and
    tensors are unpickled. Raises ConfigError for anything else."""
    try:
        with torch.serialization.safe_globals([PromptText]):  # prompts of a labeler's pool
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many classes, with the same meaning for the user
        raise ConfigError(
            f"{path} cannot be read ({first_line(error)}); delete {path.parent} to continue from"
            " the checkpoint before it"
        ) from error
