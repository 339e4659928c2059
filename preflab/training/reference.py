"""The reference of a run: whether it needs one, its model, and its cached log-probs."""

from __future__ import annotations

import gc
import logging

import numpy as np

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Layout
from preflab.distributed.process_group import World
from preflab.modeling.fsdp import reshard
from preflab.modeling.loading import build_reference, shares_weights
from preflab.modeling.logprobs import Scorer
from preflab.modeling.parallelism import Place
from preflab.modeling.reference_cache import ReferencePlan, attach_reference, plan_reference
from preflab.objective.registry import BoundLoss
from preflab.settings.schema import Settings
from preflab.training.reference_update import PastPolicies, mix_weights

logger = logging.getLogger(__name__)


def reference_plan(settings: Settings, loss: BoundLoss) -> ReferencePlan:
    """How a run with these settings and this loss uses the reference."""
    return plan_reference(
        loss.reads,
        loss_name=loss.name,
        function=settings.function,
        cache=settings.reference.cache,
        from_scratch=settings.model.from_scratch,
        draws_samples=settings.sample_during_eval and "scalar_head" not in loss.reads,
        update=settings.reference.update,
        compare=settings.reference.compare,
    )


class ReferenceSource:
    """Builds the reference of a policy, and gives data the reference's log-probs.

    policy: a policy that has taken no step since it was built. place: puts a model where it lives.
    own_mixed_precision: as in `Placement`. resumed: whether the policy comes from a checkpoint, so
    that its weights are no longer those of the reference.
    """

    def __init__(
        self,
        settings: Settings,
        loss: BoundLoss,
        policy: Scorer,
        place: Place | None,
        *,
        own_mixed_precision: bool,
        resumed: bool,
    ):
        self.settings, self.policy, self.place = settings, policy, place
        self.own_mixed_precision, self.resumed = own_mixed_precision, resumed
        self.plan = reference_plan(settings, loss)

    def build(
        self, *, at_archive: bool = True
    ) -> tuple[Scorer | PastPolicies | None, Scorer | None]:
        """The reference that the loss reads, and the initial one, which evaluations compare the
        policy with. They are one model unless `reference.update` moves the former; None where
        nothing runs it.

        at_archive: start at `model.archive`, as the policy does. Without it, the reference is
        `model.reference_archive`, or the model of `model.name_or_path`.
        """
        if self.plan.not_cached_because:
            logger.info(f"reference: runs in every step ({self.plan.not_cached_because})")
        if not self.plan.moves:
            reference = self._new(at_archive) if self.plan.built else None
            return reference if self.plan.read else None, reference
        return self._build_moving(at_archive)

    def _build_moving(self, at_archive: bool) -> tuple[Scorer | PastPolicies, Scorer | None]:
        weights = self.settings.reference.past or [1.0]
        is_shared = shares_weights(self.settings.model, self.policy)
        has_share = sum(weights) < 1 - 1e-9
        initial = None
        if self.plan.compared or is_shared or has_share:
            initial = self._new(at_archive)
        models = [self._new(at_archive, own=True) for _ in weights]
        for model in models:  # random weights of model.from_scratch are drawn anew for each
            mix_weights(model, initial or models[0], 1.0)
        reference = models[0]
        if len(models) > 1 or has_share:
            reference = PastPolicies(models, weights, initial if has_share else None)
        # Without samples nothing but the loss reads the initial one.
        return reference, initial if self.plan.compared or is_shared else None

    def cache(
        self,
        data: dict[str, PreferenceData],
        needed: dict[str, np.ndarray],
        built: Scorer | None,
        layout: Layout,
        microbatch_tokens: int,
        world: World,
    ) -> None:
        """Give `data` the reference's log-probs of the `needed` examples, if the plan caches them.

        needed: indices of examples by split. built: what `build` returned. microbatch_tokens: input
        tokens of a forward pass. Raises ConfigError and DataError as `attach_reference` does.
        """
        if not self.plan.cached:
            return
        attach_reference(
            data,
            needed,
            cache_dir=self.settings.cache_dir,
            model=self.settings.model,
            own_mixed_precision=self.own_mixed_precision,
            build_scorer=lambda: built or self._equal_model(),
            layout=layout,
            microbatch_tokens=microbatch_tokens,
            world=world,
        )
        reshard(self.policy.model)  # the policy may have run in place of the reference
        gc.collect()  # a reference built here is not needed any more; some models form cycles

    def _equal_model(self) -> Scorer:
        """The policy where it still equals the reference, otherwise a new reference."""
        model = self.settings.model
        untrained = not self.resumed and not model.lora.r
        same_weights = not model.reference_archive and model.policy_dtype == model.reference_dtype
        return self.policy if untrained and same_weights else self._new()

    def _new(self, at_archive: bool = True, **options: bool) -> Scorer:
        return build_reference(
            self.settings.model, self.policy, training=at_archive, place=self.place, **options
        )
