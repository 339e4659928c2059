"""What labels the rollouts of a run."""

from pathlib import Path

from preflab.distributed.signals import StopSignals
from preflab.online.discriminator import make_discriminator
from preflab.online.labelers import DiscriminatorLabels, GoldLabels, RemoteLabels, StaticLabels
from preflab.online.ledger import Ledger
from preflab.rewards.registry import REWARDS
from trainers import BasicTrainer


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
