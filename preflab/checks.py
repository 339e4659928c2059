"""Checks that span several settings, all of them before a model loads."""

from pathlib import Path

from omegaconf import DictConfig

from preflab.atlas.checks import check_atlas
from preflab.distributed.process_group import world
from preflab.evaluation.worklist import draws_samples, expand_archives
from preflab.modeling.parallelism import check_placement_settings, data_ranks
from preflab.modeling.reference_cache import plan_reference
from preflab.modeling.weights_io import archive_place
from preflab.objective.registry import BoundLoss, bind_loss
from preflab.online.checks import check_ahead, check_labels, check_online
from preflab.readers.columns import (
    accepted_columns,
    columns_with_pairs,
    columns_with_scores,
    columns_with_token_weights,
)
from preflab.readers.records import Source
from preflab.readers.registry import DATASETS, open_dataset
from preflab.rewards.registry import all_rewards, check_reward
from preflab.serving.checks import check_sampler
from preflab.settings.load import validate
from preflab.settings.run_folder import COMPARING
from preflab.settings.schema import ModelSettings, Settings
from preflab.settings.values import dataset_names, dataset_weights, exists
from preflab.training.best import check_best
from preflab.training.optimizers import check_optimizer
from preflab.training.reference_update import check_update
from preflab.training.registry import find_trainer
from preflab.training.schedules import schedule_of
from preflab.training.trackers import check_tracker
from utils import ConfigError, load_module


def check_config(config: DictConfig) -> tuple[BoundLoss, dict[str, list[Source]]]:
    """`check_settings` of a composed config, which has the parsed values afterwards: false for
    `no`, 64 for 64.0."""
    return check_settings(validate(config))


def check_settings(settings: Settings) -> tuple[BoundLoss, dict[str, list[Source]]]:
    """All checks across fields; returns the loss and the opened datasets by split.

    Raises ConfigError or DataError that says what was received, what is accepted and what to
    change.
    """
    trainer = find_trainer(settings.trainer)
    check_placement_settings(trainer, settings)
    if settings.function == "plan" and world().size > 1:
        raise ConfigError(
            f"function=plan needs no ranks, and {world().size} were started; run it as one process"
            f" and say world_size={world().size}"
        )
    _check_length_of_run(settings)
    _check_lengths(settings, data_ranks(trainer, settings, world()))
    if settings.function not in COMPARING:
        check_optimizer(settings, trainer.placement)
    _check_model(settings.model)
    _check_archives(settings)
    for reward in all_rewards(settings).values():
        check_reward(reward)
    loss = bind_loss(settings.loss)
    if loss.couples_batch and (
        settings.gradient_accumulation_steps > 1 or data_ranks(trainer, settings, world()) > 1
    ):
        option = " with loss.calibration=true" if loss.has_own_losses else ""
        raise ConfigError(
            f"loss={loss.name}{option} couples the pairs of a batch, so the batch must not be"
            " split; set gradient_accumulation_steps=1, and train on one rank or with"
            " tensor_parallel_size equal to the ranks"
        )
    plan_reference(
        loss.reads,
        loss_name=loss.name,
        function=settings.function,
        cache=settings.reference.cache,
        from_scratch=settings.model.from_scratch,
        draws_samples=draws_samples(settings, loss),
        update=settings.reference.update,
        compare=settings.reference.compare,
    )
    check_sampler(
        settings,
        n_policies=len(expand_archives(settings.model.archive))
        if settings.function == "eval"
        else 0,
        samples=draws_samples(settings, loss),
    )
    check_update(settings, loss)
    check_best(settings, scalar="scalar_head" in loss.reads)
    if settings.function == "online":
        check_online(settings, loss)
        check_ahead(settings, trainer)
        schedule_of(settings, None)
    if settings.function == "atlas":
        check_atlas(settings, loss, trainer.placement, world().size)
    check_tracker(settings)
    if settings.criterion and not Path(settings.criterion).is_file():
        raise ConfigError(f"criterion={settings.criterion}: no such file")
    return loss, _open_datasets(settings, loss)


def check_service(settings: Settings) -> None:
    """What serve_reward.py needs of its settings."""
    check_reward(settings.reward)
    if settings.reward["name"] == "http":
        raise ConfigError("reward=http: a service that asks another one; give the reward itself")
    check_labels(settings)
    if settings.online.initial_labels:
        raise ConfigError(
            "online.initial_labels are of samples of the policy, which a service does not have;"
            " give it a discriminator_path"
        )


def _check_archives(settings: Settings) -> None:
    archive, reference = settings.model.archive, settings.model.reference_archive
    if settings.function in COMPARING:
        expand_archives(archive)
    elif not isinstance(archive, (str, type(None))):
        raise ConfigError(
            f"model.archive={archive}: training starts from one archive; function=eval and"
            " function=atlas compare several"
        )
    for key, path in (
        ("archive", archive if settings.function not in COMPARING else None),
        ("reference_archive", reference),
    ):
        if path and not exists(str(archive_place(path))):
            raise ConfigError(f"model.{key}={path}: no such file or folder")
    if settings.skip_finished and not Path(settings.skip_finished).is_dir():
        raise ConfigError(
            f"skip_finished={settings.skip_finished}: no such folder; give one that holds run"
            " folders, or leave it out"
        )


def _check_length_of_run(settings: Settings) -> None:
    if not isinstance(settings.temperature, (int, float)) and settings.function != "eval":
        raise ConfigError(
            f"temperature={settings.temperature} must be a number; several are for function=eval"
        )
    if settings.n_epochs is None and settings.n_examples is None:
        raise ConfigError(
            "n_epochs and n_examples are both null: the run would never end; set one of them"
        )


def _check_lengths(settings: Settings, ranks: int) -> None:
    if settings.max_prompt_length >= settings.max_length:
        raise ConfigError(
            f"max_prompt_length={settings.max_prompt_length} must be smaller than"
            f" max_length={settings.max_length}, or no room is left for a response; try"
            f" max_prompt_length={settings.max_length // 2}"
        )
    if (
        settings.max_new_tokens is not None
        and settings.max_prompt_length + settings.max_new_tokens > settings.max_length
    ):
        raise ConfigError(
            f"max_prompt_length={settings.max_prompt_length} and"
            f" max_new_tokens={settings.max_new_tokens} exceed"
            f" max_length={settings.max_length}; lower one or raise max_length"
        )
    parts = settings.gradient_accumulation_steps * ranks
    if settings.batch_size % parts:
        lower = max(parts, settings.batch_size // parts * parts)
        raise ConfigError(
            f"batch_size={settings.batch_size} must be divisible by"
            f" gradient_accumulation_steps*world_size={parts}; try {lower} or {lower + parts}"
        )


def _check_model(model: ModelSettings) -> None:
    if not model.name_or_path:
        raise ConfigError(
            "model.name_or_path is not set; give a folder or a hub name, or choose model=tiny"
        )
    for key in ("name_or_path", "tokenizer_name_or_path"):
        name = getattr(model, key)
        if name and _is_missing_path(name):
            raise ConfigError(f"model.{key}={name}: no such folder; give a folder or a hub name")


def _is_missing_path(name: str) -> bool:
    """Whether a name can only be a path, and nothing is there."""
    return name.startswith(("/", "./", "../", "~")) and not exists(name)


def _further_numbers(loss: BoundLoss) -> dict[str, str]:
    """Columns that are read because the loss asks for them, with what reads each. `magnitude` is
    always read where it is there."""
    numbers = {name: f"loss={loss.name}" for name in loss.columns if name != "magnitude"}
    return numbers | ({loss.weight: f"loss.weight={loss.weight}"} if loss.weight else {})


def _reads_lists(settings: Settings, loss: BoundLoss) -> bool:
    """Whether data are read as lists. Raises ConfigError for keys of the other way to read them."""
    lists = loss.examples == "lists" and settings.function != "online"
    if not lists and settings.max_responses is not None:
        reason = f"loss={loss.name} learns from {loss.examples}"
        if settings.function == "online":
            reason = "function=online draws online.responses_per_prompt responses"
        raise ConfigError(
            f"max_responses={settings.max_responses} is for losses of lists, and {reason}; set it"
            " to null"
        )
    for key, off in (("pairing", None), ("min_gap", 0)):
        value = getattr(settings, key)
        if lists and value != off:
            raise ConfigError(
                f"{key}={value} makes pairs, and this run (loss={loss.name}) learns from lists; set"
                f" {key}={'null' if off is None else off}; max_responses selects responses"
            )
    return lists


def _reading_options(settings: Settings, loss: BoundLoss) -> dict:
    """What `open_dataset` gets beside a name and a split."""
    return {
        "data_dir": settings.data_dir,
        "pairing": settings.pairing,
        "min_gap": settings.min_gap,
        "seed": settings.seed,
        "test_fraction": settings.test_fraction,
        "train_split": settings.train_split,
        "test_split": settings.test_split,
        "prompt_template": settings.prompt_template,
        "train_on": settings.train_on,
        "numbers": _further_numbers(loss),
        "lists": _reads_lists(settings, loss),
        "max_responses": settings.max_responses,
        "choose_responses": settings.choose_responses,
        "token_weights": "token_weights" in loss.reads,
        "columns": {
            ours: theirs for ours, theirs in vars(settings.dataset_columns).items() if theirs
        },
    }


def _open_datasets(settings: Settings, loss: BoundLoss) -> dict[str, list[Source]]:
    if settings.dataset_module:
        load_module(settings.dataset_module, "dataset_module")
    names = dataset_names(settings)
    dataset_weights(settings)  # all of them have one, or none
    for name in names:
        if _is_missing_path(name):
            raise ConfigError(
                f"datasets=[{name}]: no such file or folder; give the path of a file, the id of a"
                " hub dataset, or a name that --help lists"
            )
    options = _reading_options(settings, loss)
    splits = {
        "train": ("train", "test"),
        "online": ("train", "test"),
        "eval": ("test",),
        "plan": ("train",),
        "atlas": ("train",),
    }[settings.function]
    sources = {split: [open_dataset(name, split, **options) for name in names] for split in splits}
    for source in (
        source for split in sources.values() for source in split if settings.function != "online"
    ):
        if source.only_prompts and settings.function != "eval":
            raise ConfigError(
                f"datasets=[{source.name}] has prompts and no responses: good for function=online"
                f" and eval, not for function={settings.function}; accepted sets of columns:"
                f" {accepted_columns()}; dataset_columns renames yours"
            )
        if source.only_prompts:
            continue  # it is sampled for; there are no losses to measure
        _check_provided(source, loss)
    return sources


def _check_provided(source: Source, loss: BoundLoss) -> None:
    """Raise ConfigError unless a data set has what the loss needs of it."""
    for need, needed, columns in (
        ("pairs", loss.examples == "pairs", columns_with_pairs()),
        ("scores", "scores" in loss.reads, columns_with_scores()),
        ("token_weights", "token_weights" in loss.reads, columns_with_token_weights()),
    ):
        if needed and need not in source.provides:
            able = sorted(name for name, entry in DATASETS.items() if need in entry.provides)
            named = f"{', '.join(able)}, and " if able else ""
            more = "; scripts/token_weights.py writes them" if need == "token_weights" else ""
            raise ConfigError(
                f"loss={loss.name} needs {need}, and datasets=[{source.name}] has none; with"
                f" {need}: {named}data with the columns {columns}"
                f" (dataset_columns renames yours){more}"
            )
