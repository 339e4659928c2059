"""Builds the parts of an online run, and what labels its rollouts."""

from dataclasses import dataclass
from pathlib import Path

from preflab.batching.examples import PreferenceData
from preflab.distributed.process_group import World
from preflab.evaluation.evaluator import Evaluator
from preflab.evaluation.worklist import draws_samples
from preflab.objective.registry import BoundLoss
from preflab.online.ahead import Ahead, RolloutSource, twin_of
from preflab.online.discriminator import build_discriminator
from preflab.online.drawing import Drawing, PromptLoader, build_sampler
from preflab.online.labelers import DiscriminatorLabels, GoldLabels, RemoteLabels, StaticLabels
from preflab.online.ledger import Ledger
from preflab.online.measures import RoundMeasures, keeps_hidden
from preflab.rewards.registry import REWARDS, Score, build_rewards
from preflab.serving.build import served_models
from preflab.settings.schema import Settings
from preflab.training.checkpointer import Checkpointer
from preflab.training.learner import Learner
from preflab.training.metrics import MetricLog


@dataclass
class OnlineParts:
    """What an online run consists of, besides its loop and its session."""

    learner: Learner
    source: RolloutSource
    labeler: StaticLabels
    measures: RoundMeasures
    evaluator: Evaluator
    checkpointer: Checkpointer
    log: MetricLog


def build_parts(
    settings: Settings,
    run_dir: Path,
    loss: BoundLoss,
    tokenizer,
    data: dict[str, PreferenceData],
    *,
    trainer: type,
    world: World,
    tracker=None,
) -> OnlineParts:
    """Build the models and everything that rounds use.

    data: prompts by split. trainer: the class that declares where models live.
    """
    checkpointer = Checkpointer(
        run_dir,
        world,
        keep=settings.keep_checkpoints,
        keep_steps=settings.keep_steps or (),
        enabled=not settings.debug,
    )
    rewards = build_rewards(settings)
    learner = Learner(settings, loss, tokenizer, trainer, world, checkpoint=checkpointer.latest())
    learner.build_reference()
    served = served_models(settings, run_dir).get("sampler")
    sampler = build_sampler(settings, learner)
    is_policy, is_ahead = sampler is learner.policy, settings.online.ahead
    keeps = is_policy and not is_ahead and keeps_hidden(learner)
    drawing = Drawing(settings, sampler, tokenizer, world, served, keeps_hidden=keeps)
    ahead = None
    if is_ahead:
        # A served one is compared with the server's in the thread, where switching an adapter of
        # the policy off would reach the training step.
        own_drawing = Drawing(settings, twin_of(sampler), tokenizer, World(), served)
        ahead = Ahead(own_drawing, sampler if is_policy else None)
    score = next(iter(rewards.values()))  # of the reward that labels
    ranks = loss.examples == "lists"
    labeler = make_labeler(trainer, settings, score, run_dir, world, ranks=ranks)
    shown = rewards if draws_samples(settings, loss) else {}
    log_interval, is_first = settings.minimum_log_interval_secs, world.rank == 0
    return OnlineParts(
        learner,
        RolloutSource(PromptLoader(settings, data["train"]), drawing, ahead),
        labeler,
        RoundMeasures(settings, learner, rewards, labeler, run_dir, world),
        Evaluator(settings, loss, tokenizer, data["test"], shown, run_dir, world),
        checkpointer,
        MetricLog(run_dir, tracker, log_interval, writes=is_first),
    )


def make_labeler(
    trainer: type,
    settings: Settings,
    score: Score,
    run_dir: Path,
    world: World,
    *,
    ranks: bool = False,
) -> StaticLabels:
    """The labeler of a run with these settings. score: the scores of `reward`. ranks: whether the
    run learns from the order of all responses to a prompt."""
    online = settings.online
    ledger = Ledger(run_dir / "labels.jsonl", online.budget, world, online.oracle)
    if online.discriminator is not None:
        discriminator = build_discriminator(trainer, settings, run_dir, world)
        return DiscriminatorLabels(score, ledger, discriminator, online, settings.seed, ranks=ranks)
    if hasattr(score, "learn"):
        return RemoteLabels(score, world, str(run_dir.resolve()), ranks=ranks)
    if REWARDS[settings.reward["name"]].is_gold:
        return GoldLabels(score, ledger, online.responses_per_prompt, ranks=ranks)
    return StaticLabels(score, world)
