"""What labels the rollouts of a run."""

from pathlib import Path

from preflab.distributed.process_group import World
from preflab.online.discriminator import build_discriminator
from preflab.online.labelers import DiscriminatorLabels, GoldLabels, RemoteLabels, StaticLabels
from preflab.online.ledger import Ledger
from preflab.rewards.registry import REWARDS, Score


def make_labeler(
    trainer: type, settings, score: Score, run_dir: Path, world: World
) -> StaticLabels:
    """What labels in a run of these settings. score: that of `reward`."""
    ledger = Ledger(run_dir / "labels.jsonl", settings.online.budget, world)
    if settings.online.discriminator is not None:
        discriminator = build_discriminator(trainer, settings, run_dir, world)
        return DiscriminatorLabels(score, ledger, discriminator, settings.online, settings.seed)
    if hasattr(score, "learn"):
        return RemoteLabels(score, world, str(run_dir.resolve()))
    if REWARDS[settings.reward["name"]].is_gold:
        return GoldLabels(score, ledger, settings.online.responses_per_prompt)
    return StaticLabels(score, world)
