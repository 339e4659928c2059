"""Checks that span several settings, all of them before a model loads."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from preflab.distributed.process_group import world
from preflab.evaluation.worklist import draws_samples, expand_archives
from preflab.modeling.parallelism import check_placement_settings, data_ranks
from preflab.modeling.reference_cache import plan_reference
from preflab.objective.registry import BoundLoss, bind_loss
from preflab.online.checks import check_labels, check_online
from preflab.readers.columns import accepted_columns
from preflab.readers.records import Source
from preflab.readers.registry import DATASETS, open_dataset
from preflab.rewards.registry import all_rewards, check_reward
from preflab.settings.load import validate
from preflab.settings.values import exists
from preflab.training.registry import find_trainer
from utils import ConfigError, load_module, nearest


def check_config(config: DictConfig) -> tuple[BoundLoss, dict[str, list[Source]]]:
    """All checks within and across fields; returns the loss and the opened datasets by split.

    The config has the parsed values afterwards: false for `no`, 64 for 64.0.
    Raises ConfigError or DataError that says what came, what is accepted and what to change.
    """
    validate(config)
    trainer = find_trainer(config.trainer)
    check_placement_settings(trainer, config)
    if config.function == "plan" and world().size > 1:
        raise ConfigError(
            f"function=plan needs no ranks, and {world().size} were started; run it as one process"
            f" and say world_size={world().size}"
        )
    _check_length_of_run(config)
    _check_lengths(config, data_ranks(trainer, config, world()))
    _check_optimizer(config.optimizer)
    _check_model(config.model)
    _check_archives(config)
    for settings in all_rewards(config).values():
        check_reward(settings)
    loss = bind_loss(OmegaConf.to_container(config.loss, resolve=True))
    if loss.couples_batch and (
        config.gradient_accumulation_steps > 1 or data_ranks(trainer, config, world()) > 1
    ):
        raise ConfigError(
            f"loss={loss.name} couples the pairs of a batch, so the batch must not be split; set"
            " gradient_accumulation_steps=1, and train on one rank or with tensor_parallel_size"
            " equal to the ranks"
        )
    plan_reference(
        loss.reads,
        loss_name=loss.name,
        function=config.function,
        cache=config.reference.cache,
        from_scratch=config.model.from_scratch,
        draws_samples=draws_samples(config, loss),
    )
    if config.function == "online":
        check_online(config, loss)
    return loss, _open_datasets(config, loss)


def check_service(config: DictConfig) -> None:
    """What serve_reward.py needs of a config."""
    validate(config)
    check_reward(config.reward)
    if config.reward.name == "http":
        raise ConfigError("reward=http: a service that asks another one; give the reward itself")
    check_labels(config)
    if config.online.initial_labels:
        raise ConfigError(
            "online.initial_labels are of samples of the policy, which a service does not have;"
            " give it a discriminator_path"
        )


def _check_archives(config: DictConfig) -> None:
    archive, reference = config.model.archive, config.model.reference_archive
    if config.function == "eval":
        expand_archives(archive)
    elif not isinstance(archive, (str, type(None))):
        raise ConfigError(
            f"model.archive={archive}: training starts from one archive; function=eval compares"
            " several"
        )
    for key, path in (
        ("archive", archive if config.function != "eval" else None),
        ("reference_archive", reference),
    ):
        if path and not exists(path):
            raise ConfigError(f"model.{key}={path}: no such file or folder")
    if config.skip_finished and not Path(config.skip_finished).is_dir():
        raise ConfigError(
            f"skip_finished={config.skip_finished}: no such folder; give one that holds run"
            " folders, or leave it out"
        )


def _check_length_of_run(config: DictConfig) -> None:
    if OmegaConf.is_list(config.temperature) and config.function != "eval":
        raise ConfigError(
            f"temperature={config.temperature} must be a number; several are for function=eval"
        )
    if config.n_epochs is None and config.n_examples is None:
        raise ConfigError(
            "n_epochs and n_examples are both null: the run would never end; set one of them"
        )


def _check_lengths(config: DictConfig, ranks: int) -> None:
    if config.max_prompt_length >= config.max_length:
        raise ConfigError(
            f"max_prompt_length={config.max_prompt_length} must be smaller than"
            f" max_length={config.max_length}, or no room is left for a response; try"
            f" max_prompt_length={config.max_length // 2}"
        )
    if (
        config.max_new_tokens is not None
        and config.max_prompt_length + config.max_new_tokens > config.max_length
    ):
        raise ConfigError(
            f"max_prompt_length={config.max_prompt_length} and"
            f" max_new_tokens={config.max_new_tokens} exceed max_length={config.max_length}; lower"
            " one or raise max_length"
        )
    parts = config.gradient_accumulation_steps * ranks
    if config.batch_size % parts:
        lower = max(parts, config.batch_size // parts * parts)
        raise ConfigError(
            f"batch_size={config.batch_size} must be divisible by"
            f" gradient_accumulation_steps*world_size={parts}; try {lower} or {lower + parts}"
        )


def _check_model(model: DictConfig) -> None:
    if not model.name_or_path:
        raise ConfigError(
            "model.name_or_path is not set; give a folder or a hub name, or choose model=tiny"
        )
    for key in ("name_or_path", "tokenizer_name_or_path"):
        if model[key] and _is_missing_path(model[key]):
            raise ConfigError(
                f"model.{key}={model[key]}: no such folder; give a folder or a hub name"
            )


def _is_missing_path(name: str) -> bool:
    """Whether a name can only be a path, and nothing is there."""
    return name.startswith(("/", "./", "../", "~")) and not exists(name)


def _check_optimizer(name: str) -> None:
    usable = {
        key
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    } - {
        "Optimizer",
        "LBFGS",
        "SparseAdam",
    }  # these need a closure, or sparse gradients
    if name not in usable:
        raise ConfigError(f"optimizer={name}; {nearest(str(name), usable)}")


def _open_datasets(config: DictConfig, loss: BoundLoss) -> dict[str, list[Source]]:
    if config.get("dataset_module"):
        load_module(config.dataset_module, "dataset_module")
    for name in config.datasets:
        if _is_missing_path(name):
            raise ConfigError(
                f"datasets=[{name}]: no such file or folder; give the path of a file, the id of a"
                " hub dataset, or a name that --help lists"
            )
    settings = {
        "data_dir": config.data_dir,
        "pairing": config.pairing,
        "min_gap": config.min_gap,
        "seed": config.seed,
        "test_fraction": config.test_fraction,
        "columns": {ours: theirs for ours, theirs in config.dataset_columns.items() if theirs},
    }
    splits = {
        "train": ("train", "test"),
        "online": ("train", "test"),
        "eval": ("test",),
        "plan": ("train",),
    }[config.function]
    sources = {
        split: [open_dataset(name, split, **settings) for name in config.datasets]
        for split in splits
    }
    for source in (
        source for split in sources.values() for source in split if config.function != "online"
    ):
        if source.only_prompts and config.function != "eval":
            raise ConfigError(
                f"datasets=[{source.name}] has prompts and no responses: good for function=online"
                f" and eval, not for function={config.function}; accepted sets of columns:"
                f" {accepted_columns()}; dataset_columns renames yours"
            )
        if source.only_prompts:
            continue  # it is sampled for; there are no losses to measure
        for need, needed in (
            ("pairs", loss.examples == "pairs"),
            ("scores", "scores" in loss.reads),
        ):
            if needed and need not in source.provides:
                able = sorted(name for name, entry in DATASETS.items() if need in entry.provides)
                raise ConfigError(
                    f"loss={loss.name} needs {need}, and datasets=[{source.name}] has none; with"
                    f" {need}: {', '.join(able)}"
                )
    return sources
