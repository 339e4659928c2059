"""What learns: a policy, its frozen reference, an optimizer, and one step.

A trainer, a run of online learning and a discriminator each have a learner. It knows no loop, no
evaluation and no run folder.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from concurrent.futures import Future
from pathlib import Path

import torch

from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.microbatches import microbatch_tokens, split_step
from preflab.batching.packing import Batch
from preflab.distributed.process_group import World
from preflab.modeling.blocks import find_blocks
from preflab.modeling.fsdp import reshard
from preflab.modeling.layout_choice import choose_layout
from preflab.modeling.loading import build_policy, build_reference
from preflab.modeling.logprobs import Scorer
from preflab.modeling.parallelism import bind_place
from preflab.modeling.placed_weights import bytes_here, clip_grad_norm, sum_over_ranks
from preflab.modeling.reference_cache import ReferencePlan, attach_reference, plan_reference
from preflab.modeling.tensor_parallel import on_first_device
from preflab.objective.registry import BoundLoss
from preflab.training.checkpoints import (
    Counters,
    load_optimizer,
    random_state,
    save_optimizer,
    set_random_state,
)
from preflab.training.compute_loss import compute_loss
from preflab.training.metrics import Sums
from preflab.training.optimizers import make_optimizer
from preflab.training.saved_weights import save_weights
from utils import PrefLabError

logger = logging.getLogger(__name__)

STATE = "training_state.pt"  # of a checkpoint: all but the weights and the optimizer's tensors


class NonFiniteLossError(PrefLabError):
    """The loss or its gradient is NaN or infinite; the weights of the last good step are saved."""

    everywhere = True


class NonFiniteStepError(Exception):
    """A step whose loss or gradient is NaN or infinite. It was not taken.

    what: "loss" or "gradient". examples: those whose loss is not finite, on any rank.
    """

    def __init__(self, what: str, examples: list[int]):
        super().__init__(f"the {what} is not finite")
        self.what, self.examples = what, examples


class Learner:
    """A policy that learns from batches of examples.

    settings: those of the run. trainer: the class that declares where models live (`placement`,
    `place`). checkpoint: a step folder to continue from.
    """

    def __init__(
        self,
        settings,
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
        self.scalar = "scalar_head" in loss.reads  # such a model has no text to sample
        self.counters = Counters()
        self.state_bytes: dict[str, int] = {}
        self.reference: Scorer | None = None
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
        logger.info(f"layout: {self.layout.name}" + (f" ({reason})" if reason else ""))

    # ----------------------------------------------------------------------------------- reference

    def build_reference(self, *, at_archive: bool = True) -> None:
        """Build the reference if steps or evaluations run it.

        at_archive: it starts where the policy starts (`model.archive`), otherwise it is
        `model.reference_archive` or the model as it is.
        """
        plan = self._reference_plan()
        if plan.built:
            self.reference = self._new_reference(at_archive)
        if plan.not_cached_because:
            logger.info(f"reference: runs in every step ({plan.not_cached_because})")

    def cache_reference(self, data: dict[str, PreferenceData], needed: dict) -> None:
        """Give `data` the reference's log-probs of the `needed` examples, if the run caches them.

        needed: indices of examples by split.
        """
        if not self._reference_plan().cached:
            return
        attach_reference(
            data,
            needed,
            cache_dir=self.settings.cache_dir,
            model=self.settings.model,
            own_mixed_precision=self.placement.own_mixed_precision,
            build_scorer=self._like_reference,
            layout=self.layout,
            microbatch_tokens=self._microbatch_tokens(),
            world=self.world,
        )
        reshard(self.policy.model)  # it may have stood in for the reference
        gc.collect()  # the reference may not be needed any more, and some models form cycles

    def _reference_plan(self) -> ReferencePlan:
        settings = self.settings
        return plan_reference(
            self.loss.reads,
            loss_name=self.loss.name,
            function=settings.function,
            cache=settings.reference.cache,
            from_scratch=settings.model.from_scratch,
            draws_samples=settings.sample_during_eval and not self.scalar,
        )

    def _new_reference(self, at_archive: bool = True) -> Scorer:
        return build_reference(
            self.settings.model, self.policy, training=at_archive, place=self.place
        )

    def _like_reference(self) -> Scorer:
        """The reference, or its equal: the policy before its first step, without an adapter."""
        model = self.settings.model
        untrained = self.checkpoint is None and not model.lora.r
        equal = not model.reference_archive and model.policy_dtype == model.reference_dtype
        if self.reference is None and untrained and equal:
            return self.policy
        return self.reference or self._new_reference()

    # -------------------------------------------------------------------------------------- a step

    def prepare(self) -> None:
        """Make the optimizer, and what training needs of the model: recomputation, compilation."""
        settings, model = self.settings, self.policy.model
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            model.train()  # transformers recomputes in training mode only; dropout stays off
        if settings.compile:
            for block in find_blocks(self.policy.causal_lm, settings.model.block_name):
                block.compile(dynamic=True)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters, self.parameter_names = list(trained.values()), list(trained)
        self.optimizer = make_optimizer(settings.optimizer, self.parameters, lr=settings.lr)

    def microbatches(self, data: PreferenceData, examples) -> list[tuple[Batch, int]]:
        """This rank's microbatches of a step, and how many examples of each count.

        Every rank has as many: one with nothing left gets a stand-in of which nothing counts.
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
            (collate(data, part if len(part) else examples[:1], self.layout), len(part))
            for part in mine
        ]

    def _microbatch_tokens(self) -> int:
        return microbatch_tokens(self.settings, self.loss, self.policy.device.type)

    def step(
        self, data: PreferenceData, microbatches: list[tuple[Batch, int]], n_examples: int
    ) -> dict[str, float]:
        """One optimizer step: the gradient of the mean loss over `n_examples`, however they are
        split over ranks and microbatches. Returns the metrics of the step.

        Raises NonFiniteStepError, on all ranks, before the weights change.
        """
        begun = time.perf_counter()
        sums, losses, seen, n_tokens = Sums(), [], [], 0
        lr = self._set_learning_rate()
        # The gradient is that of the mean over the examples of all ranks: where the placement
        # divides by the number of ranks, that is undone here.
        scale = self.world.data_ranks if self.placement.averages_gradients else 1
        for batch, n_real in microbatches:
            batch = batch.to(self.policy.device)
            output, metrics = compute_loss(
                self.loss, self.policy, self.reference, batch, data, "train"
            )
            (output.losses[:n_real].sum() * (scale / n_examples)).backward()
            sums.add(metrics, n_real)
            losses.append(output.losses[:n_real].detach())
            seen += batch.examples[:n_real]
            n_tokens += batch.n_tokens if n_real else 0
        if not self.placement.averages_gradients:
            sum_over_ranks(self.parameters, self.world)
        grad_norm = clip_grad_norm(self.parameters, self.settings.max_grad_norm)
        self._check_finite(grad_norm, torch.cat(losses), seen)
        self.optimizer.step()
        self.loss.keep(output)  # running means; a loss that has them gets the batch in one piece
        self.state_bytes = self.state_bytes or self._measure_state()
        self.optimizer.zero_grad(set_to_none=True)
        self.counters.steps += 1
        self.counters.examples += n_examples
        return self._step_metrics(sums, begun, n_examples, n_tokens) | {
            "grad_norm": grad_norm,
            "lr": lr,
        }

    def _set_learning_rate(self) -> float:
        """Linear warm-up, then constant: a function of the step, so there is no scheduler state."""
        warm_up = (self.counters.steps + 1) / (self.settings.warmup_steps + 1)
        lr = self.settings.lr * min(1.0, warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _check_finite(self, grad_norm: float, losses: torch.Tensor, seen: list[int]) -> None:
        finite = torch.isfinite(losses)
        bad = not math.isfinite(grad_norm) or not bool(finite.all())
        if not self.world.max([float(bad)])[0]:
            return
        by_example = self.world.gather(list(zip(seen, finite.tolist(), strict=True)))
        examples = sorted(example for example, is_finite in by_example if not is_finite)
        self.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteStepError("loss" if examples else "gradient", examples)

    def _step_metrics(
        self, sums: Sums, begun: float, n_examples: int, n_tokens: int
    ) -> dict[str, float]:
        means = sums.flush(
            self.world
        )  # the only read-back of a step, after which its time is known
        seconds = time.perf_counter() - begun
        n_tokens = self.world.sum([n_tokens])[0]
        self.counters.train_seconds += seconds
        rates = {
            "examples_per_second": n_examples / seconds,
            "tokens_per_second": n_tokens / seconds,
        }
        return means | rates

    def _measure_state(self) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state of one device, on the rank with most."""
        held = [p for name, p in self.policy.model.named_parameters() if on_first_device(name)]
        slots = [
            value
            for p in held
            for value in self.optimizer.state.get(p, {}).values()
            if isinstance(value, torch.Tensor)
        ]
        tensors = {
            "weights": held,
            "gradients": [p.grad for p in held if p.grad is not None],
            "optimizer": slots,
        }
        sizes = self.world.max([float(bytes_here(part)) for part in tensors.values()])
        return dict(zip(tensors, map(int, sizes), strict=True))

    # ----------------------------------------------------------------------------- saving, loading

    def save(self, folder: Path, state: dict, metrics: dict) -> Future | None:
        """Write everything that `load` needs, and the weights for others. Every rank calls it.

        state: of the loop, numbers and plain containers. metrics: for policy.pt. Returns a future
        while the optimizer's shards are still being written.
        """
        sharded = self.placement.shards_state
        optimizer, future = {}, None
        if sharded or self.world.rank == 0:
            optimizer, future = save_optimizer(
                self.optimizer, self.parameter_names, folder / "optimizer", self._writing_group()
            )
        save_weights(
            self.settings,
            self.policy,
            self.tokenizer,
            folder,
            world=self.world,
            trained=self.parameter_names,
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
        return future

    def load(self, folder: Path) -> dict:
        """Continue from what `save` wrote; returns the state of the loop. The weights were read
        when the policy was built."""
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        load_optimizer(
            self.optimizer,
            self.parameter_names,
            folder / "optimizer",
            state["optimizer"],
            alone=self._writing_group() is None,
        )
        if "loss" in state:
            self.loss.load_state_dict(state["loss"])
        self.counters = Counters(**state["counters"])
        set_random_state(state["random"])
        return state

    def _writing_group(self):
        """The process group that writes shards in the background. None: one process writes."""
        if not self.placement.shards_state:
            return None
        if not hasattr(self, "_group"):
            self._group = torch.distributed.new_group(backend="gloo")
        return self._group
