"""What a config may say: its keys, the checks across them, the run folder. All of it before a model
loads."""

import getpass
import hashlib
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from archives import covered, expand_archives, temperatures
from batching import ORDERS
from distributed import data_ranks, world
from labels import SELECTIONS
from layouts import LAYOUTS
from losses import BoundLoss, bind_loss
from preference_datasets import DATASETS, open_dataset
from records import Source
from reference import wants_cache
from rewards import REWARDS, all_rewards, check_reward
from user_pairs import accepted_columns
from utils import ConfigError, nearest

ROOT = Path(__file__).resolve().parent
CONFIG_DIR = ROOT / "config"
GROUPS = ("model", "loss", "reward", "experiment")

# Keys that do not change what is trained, so a run may be continued with other values of them.
MAY_CHANGE = {
    "n_epochs",
    "n_examples",
    "eval_batch_size",
    "n_eval_examples",
    "n_eval_model_samples",
    "eval_every",
    "save_every",
    "sample_during_eval",
    "do_first_eval",
    "wandb",
    "minimum_log_interval_secs",
    "keep_checkpoints",
    "local_dirs",
    "local_run_dir",
    "resume",
    "skip_finished",
    "samples_per_prompt",
    "more_rewards",
    "trainer",
    "world_size",
    "fsdp_port",
    "fsdp_cpu_offload",
    "fsdp_shard_size",
    "tensor_parallel_size",
    "host",
    "port",
    "profile_steps",
    "activation_checkpointing",
    "compile",
    "gradient_accumulation_steps",
    "microbatch_tokens",
    "layout",
    "length_grouping",
    "reference",
    "plan",
    "temperature",
    "topp",
    "max_new_tokens",
    "cache_dir",
    "data_dir",
    "exp_name",
    "reward",
}


MAY_CHANGE_ONLINE = {
    f"online.{key}"
    for key in ("rounds", "budget", "eval_every", "save_every", "measure_gold", "discriminator_lr")
} | {
    # how a reward is reached, and not what it is
    f"reward.{key}"
    for key in (
        "url",
        "token_env",
        "key_env",
        "timeout",
        "retries",
        "backoff",
        "batch_size",
        "concurrency",
        "max_requests",
    )
}
SHAPES_ROLLOUTS = {
    "temperature",
    "topp",
    "max_new_tokens",
    "reward",
    "more_rewards",
}  # what function=online trains with


def register_resolvers() -> None:
    """The `${here:...}`, `${run_dir:...}` and `${run_name:...}` of config.yaml."""
    OmegaConf.register_new_resolver("here", lambda path: str(ROOT / path), replace=True)
    OmegaConf.register_new_resolver("run_dir", choose_run_dir, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("run_name", name_of_run, replace=True)


def choose_run_dir(
    local_run_dir: str | None, resume: str | None, local_dirs: Sequence[str], exp_name: str
) -> str:
    """`resume`, else `local_run_dir`, else a new folder `<first usable of
    local_dirs>/<user>/<exp_name>_<timestamp>`."""
    if resume or local_run_dir:
        return str(resume or local_run_dir)
    return world().agree(
        lambda: _new_run_dir(local_dirs, exp_name)
    )  # ranks that each read the clock would not meet


def _new_run_dir(local_dirs: Sequence[str], exp_name: str) -> str:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S") + f"_{time.time_ns() // 1000 % 10**6:06d}"
    for base in local_dirs:
        folder = Path(base) / getpass.getuser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".write-{stamp}").touch()
            (folder / f".write-{stamp}").unlink()
        except OSError:
            continue
        return str(folder / f"{exp_name}_{stamp}")
    raise ConfigError(
        f"local_dirs={list(local_dirs)}: none of these can be written to; give local_run_dir=DIR"
    )


def name_of_run(overrides: Sequence[str]) -> str:
    """Folder of one run of a sweep: its overrides, made safe for a file name."""
    telling = [
        o
        for o in overrides
        if not o.startswith(("local_run_dir=", "local_dirs=", "exp_name=", "wandb."))
    ]
    name = ",".join(re.sub(r"[^\w.,=+\-\[\]]+", "_", o) for o in telling) or "default"
    if len(name) > 150:
        name = name[:130] + "-" + hashlib.sha256(name.encode()).hexdigest()[:12]
    return name


# --------------------------------------------------------------------------------- keys and options


def flat_keys(config: DictConfig) -> set[str]:
    """Dotted names of all values and all groups of values."""
    keys = set()
    for key in config:
        keys.add(str(key))
        if (
            OmegaConf.is_dict(config)
            and not OmegaConf.is_missing(config, key)
            and OmegaConf.is_dict(config._get_node(key))
        ):
            keys |= {f"{key}.{inner}" for inner in flat_keys(config._get_node(key))}
    return keys


def options(group: str) -> set[str]:
    return {path.stem for path in (CONFIG_DIR / group).glob("*.yaml")}


def model_overrides(name: str) -> list[str]:
    """The settings of config/model/ for a model that has some, by its name there or on the hub;
    else the model as it is."""
    for path in sorted((CONFIG_DIR / "model").glob("*.yaml")):
        settings = OmegaConf.load(path)
        known = OmegaConf.select(settings, "model.name_or_path") or settings.get("name_or_path")
        if name in (path.stem, known) or (
            known and Path(known).is_dir() and Path(name).resolve() == Path(known).resolve()
        ):
            return [f"model={path.stem}"]
    return ["model=blank_model", f"model.name_or_path={quoted(name)}"]


def quoted(value: str) -> str:
    """A value as hydra reads it back, whatever it holds."""
    if re.fullmatch(r"[\w./+-]+", value, re.ASCII):
        return value
    return (
        "'"
        + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
        + "'"
    )


def _default_options() -> dict[str, list]:
    """The option that config.yaml takes for each group."""
    entries = OmegaConf.load(CONFIG_DIR / "config.yaml").defaults
    pairs = [next(iter(entry.items())) for entry in entries if OmegaConf.is_dict(entry)]
    return {group: [value for key, value in pairs if key == group] for group in GROUPS}


def _recipe_options(name: str) -> dict[str, str]:
    """The options that a recipe of config/experiment/ takes, those of the recipes it builds on
    included."""
    found = {}
    for entry in OmegaConf.load(CONFIG_DIR / "experiment" / f"{name}.yaml").get("defaults", ()):
        if isinstance(entry, str):
            found |= _recipe_options(entry)
        else:
            found |= {key.removeprefix("override /"): option for key, option in entry.items()}
    return found


def _named(value) -> list:
    """The options in the value of a group: one, several together (`[a,b]`), or those of a sweep."""
    value = value.list if isinstance(value, ChoiceSweep) else value
    return (
        [option for item in value for option in _named(item)]
        if isinstance(value, list)
        else [value]
    )


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuse unknown keys and options of a command line, naming the nearest valid ones."""
    own_config = any(
        a.split("=")[0] in ("--config-dir", "-cd", "--config-path", "-cp") for a in arguments
    )
    words = [a for a in arguments if "=" in a and not a.startswith("-")]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except OverrideParseException as error:
        raise ConfigError(
            f"{error.override}: hydra cannot read this ({str(error).splitlines()[0]}); put a value"
            " with = , [ ] or spaces in quotes inside the quotes of the shell: \"key='value'\""
        ) from error
    given = {
        override.key_or_group: _named(override.value())
        for override in overrides
        if override.key_or_group in GROUPS
    }
    if own_config:
        return  # hydra knows the options of a folder of the user's own, and refuses the rest
    for group, values in given.items():
        for value in values:
            if isinstance(value, str) and value not in options(group):
                raise ConfigError(
                    f"{group}={value}: no such file in config/{group}/;"
                    f" {nearest(value, options(group))}"
                )
    recipes = [
        _recipe_options(name) for name in given.get("experiment", ()) if isinstance(name, str)
    ]
    by_recipe = {
        group: [recipe[group] for recipe in recipes if group in recipe] for group in GROUPS
    }
    keys = _known_keys(
        {
            group: given.get(group) or by_recipe[group] or values
            for group, values in _default_options().items()
        }
    )
    for override in overrides:
        key = override.key_or_group
        if key not in keys and key not in GROUPS and not key.startswith("hydra"):
            raise ConfigError(f"unknown key {key}; {nearest(key, keys)}")


def _known_keys(chosen: dict[str, Iterable]) -> set[str]:
    keys = {
        key
        for key in flat_keys(OmegaConf.load(CONFIG_DIR / "config.yaml"))
        if not key.startswith(("hydra", "defaults"))
    }
    for group in ("loss", "reward"):
        names = [v for v in chosen[group] if isinstance(v, str)] or options(group)
        for name in names:
            keys |= {
                f"{group}.{key}" for key in OmegaConf.load(CONFIG_DIR / group / f"{name}.yaml")
            }
    return keys


def check_keys(config: DictConfig) -> None:
    """The composed config has exactly the keys of config.yaml; `loss` and `reward` are matched with
    their functions."""
    known = flat_keys(OmegaConf.load(CONFIG_DIR / "config.yaml")) | {"reward"}
    for key in flat_keys(config):
        if key not in known and not key.startswith(("loss.", "reward.", "online.discriminator.")):
            raise ConfigError(f"unknown key {key}; {nearest(key, known)}")


# ------------------------------------------------------------------------------------------- checks


def check_config(
    config: DictConfig, trainers: Iterable[str]
) -> tuple[BoundLoss, dict[str, list[Source]]]:
    """All checks within and across fields; returns the loss and the opened datasets by split.

    Raises ConfigError or DataError that says what came, what is accepted and what to change.
    """
    check_keys(config)
    _check_choice("function", config.function, ("train", "eval", "online", "plan"))
    _check_choice("trainer", config.trainer, trainers)
    if config.function == "plan" and world().size > 1:
        raise ConfigError(
            f"function=plan needs no ranks, and {world().size} were started; run it as one process"
            f" and say world_size={world().size}"
        )
    _check_choice("layout", config.layout, ("auto", *LAYOUTS))
    _check_choice("order", config.order, ORDERS)
    _check_numbers(config)
    _check_lengths(config)
    _check_optimizer(config.optimizer)
    for key in ("policy_dtype", "reference_dtype", "fsdp_policy_mp"):
        if config.model[key] is not None or key != "fsdp_policy_mp":
            _check_choice(
                f"model.{key}", config.model[key], ("float32", "bfloat16", "float16", "float64")
            )
    if not config.model.name_or_path:
        raise ConfigError(
            "model.name_or_path is not set; give a folder or a hub name, or choose model=tiny"
        )
    _check_archives(config)
    for settings in all_rewards(config).values():
        check_reward(settings)
    _check_choice("reference.cache", config.reference.cache, ("auto", True, False))
    loss = bind_loss(OmegaConf.to_container(config.loss, resolve=True))
    if loss.couples_batch and (
        config.gradient_accumulation_steps > 1 or data_ranks(config, world()) > 1
    ):
        raise ConfigError(
            f"loss={loss.name} couples the pairs of a batch, so the batch must not be split; set"
            " gradient_accumulation_steps=1, and train on one rank or with tensor_parallel_size"
            " equal to the ranks"
        )
    wants_cache(config, loss)
    if config.function == "online":
        _check_online(config, loss)
    return loss, _open_datasets(config, loss)


def check_service(config: DictConfig) -> None:
    """What serve_reward.py needs of a config."""
    check_keys(config)
    _check_numbers(config)
    _check_whole(config, {"port": 1}, ())
    if config.port > 65535:
        raise ConfigError(f"port={config.port} must be at most 65535")
    check_reward(config.reward)
    if config.reward.name == "http":
        raise ConfigError("reward=http: a service that asks another one; give the reward itself")
    _check_labels(config)
    if config.online.initial_labels:
        raise ConfigError(
            "online.initial_labels are of samples of the policy, which a service does not have;"
            " give it a discriminator_path"
        )


def _check_online(config: DictConfig, loss: BoundLoss) -> None:
    settings = config.online
    _check_labels(config)
    new = settings.max_new_tokens
    if new is not None and config.max_prompt_length + new > config.max_length:
        raise ConfigError(
            f"max_prompt_length={config.max_prompt_length} and online.max_new_tokens={new} exceed"
            f" max_length={config.max_length}; lower one or raise max_length"
        )
    if loss.examples == "responses":
        raise ConfigError(
            f"function=online: loss={loss.name} reads a label of each response, and rounds give"
            " pairs; take kto, say"
        )
    if "scalar_head" in loss.reads or loss.columns:
        what = (
            "trains a reward model, which samples nothing"
            if "scalar_head" in loss.reads
            else f"reads the column {min(loss.columns)!r}, which rollouts do not have"
        )
        raise ConfigError(f"function=online: loss={loss.name} {what}; take another loss")
    if settings.sampler not in (None, "reference") and not _exists(settings.sampler):
        raise ConfigError(
            f"online.sampler={settings.sampler}: no such file or folder; give an archive,"
            " reference, or null for the policy"
        )


def _check_labels(config: DictConfig) -> None:
    settings = config.online
    limits = {f"online.{key}": least for key, least in ONLINE_LIMITS.items()}
    _check_whole(
        config, {f"online.{key}": least for key, least in ONLINE_NUMBERS.items()} | limits, limits
    )
    _check_choice("online.select", settings.select, SELECTIONS)
    _check_choice("online.measure_gold", settings.measure_gold, ("auto", True, False))
    if (
        isinstance(settings.discriminator_lr, bool)
        or not isinstance(settings.discriminator_lr, (int, float))
        or not 0 < settings.discriminator_lr < float("inf")
    ):
        raise ConfigError(
            f"online.discriminator_lr={settings.discriminator_lr} must be a number above 0"
        )
    if settings.discriminator is None:
        for key in ("discriminator_path", "initial_labels"):
            if settings[key]:
                raise ConfigError(
                    f"online.{key} is set and online.discriminator is not; name its loss, such as"
                    " online.discriminator=bradley_terry"
                )
        if settings.budget == 0 and REWARDS[config.reward.name].is_gold:
            raise ConfigError(
                f"online.budget=0 buys no label of reward={config.reward.name}, so there is nothing"
                " to learn from; raise it, or give online.discriminator a discriminator_path"
            )
        return
    path = settings.discriminator_path
    if path and path.startswith(("/", ".")) and not _exists(path):
        raise ConfigError(
            f"online.discriminator_path={path}: no such file or folder; give a run, a model's"
            " folder or a hub name"
        )
    own = discriminator_loss(config)
    if own.examples != "pairs" or own.columns or "scores" in own.reads or own.couples_batch:
        raise ConfigError(
            f"online.discriminator={own.name}: bought labels say which of two responses is better"
            " and no more; take bradley_terry or dpo"
        )
    if settings.budget == 0 and not settings.discriminator_path:
        raise ConfigError(
            "online.budget=0 and no online.discriminator_path: the discriminator knows nothing and"
            " may learn nothing; set one of them"
        )


ONLINE_NUMBERS = {
    "rounds": 1,
    "responses_per_prompt": 2,
    "updates_per_round": 1,
    "eval_every": 1,
    "save_every": 1,
    "relabel_every": 2,
    "relabels": 1,
    "discriminator_epochs": 1,
    "discriminator_batch_size": 1,
    "replay": 0,
    "initial_labels": 0,
    "initial_epochs": 1,
}
ONLINE_LIMITS = {
    "prompts_per_round": 1,
    "max_new_tokens": 1,
    "budget": 0,
    "stop_labels": 0,
}  # null: none


def discriminator_loss(config) -> BoundLoss:
    """The loss of `online.discriminator`: a name of config/loss/, or {name: NAME, setting:
    value}."""
    given = config.online.discriminator
    if not isinstance(given, str) and not (OmegaConf.is_dict(given) and "name" in given):
        raise ConfigError(
            f"online.discriminator={given} is neither a loss nor {{name: LOSS, setting: value}};"
            " such as bradley_terry, or {name: dpo, beta: 0.1}"
        )
    given = {"name": given} if isinstance(given, str) else given
    path = CONFIG_DIR / "loss" / f"{given['name']}.yaml"
    settings = OmegaConf.load(path) if path.is_file() else {}
    return bind_loss(OmegaConf.to_container(OmegaConf.merge(settings, given), resolve=True))


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
        if path and not _exists(path):
            raise ConfigError(f"model.{key}={path}: no such file or folder")
    if config.skip_finished and not Path(config.skip_finished).is_dir():
        raise ConfigError(
            f"skip_finished={config.skip_finished}: no such folder; give one that holds run"
            " folders, or leave it out"
        )


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name too long for a file
        return False


def _check_choice(key: str, value, accepted: Iterable[str]) -> None:
    if value not in accepted:
        raise ConfigError(f"{key}={value}; {nearest(str(value), accepted)}")


def _check_whole(config: DictConfig, smallest: dict[str, int], optional: Iterable[str]) -> None:
    """`optional` ones may be null."""
    for key, least in smallest.items():
        value = OmegaConf.select(config, key)
        if value is None and key in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{key}={value} must be a whole number of at least {least}")


def _check_numbers(config: DictConfig) -> None:
    whole = {
        "seed": 0,
        "batch_size": 1,
        "eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0,
        "samples_per_prompt": 1,
        "max_length": 2,
        "max_prompt_length": 2,
        "n_eval_examples": 1,
        "n_eval_model_samples": 1,
        "eval_every": 1,
        "model.lora.r": 0,
        "tensor_parallel_size": 1,
    }
    optional = {
        "n_epochs": 1,
        "n_examples": 1,
        "max_new_tokens": 1,
        "save_every": 1,
        "keep_checkpoints": 1,
        "world_size": 1,
        "fsdp_shard_size": 1,
        "microbatch_tokens": 1,
        "profile_steps": 1,
    }
    _check_whole(config, whole | optional, optional)
    numbers = [
        (key, config[key])
        for key in (
            "lr",
            "max_grad_norm",
            "topp",
            "min_gap",
            "minimum_log_interval_secs",
            "test_fraction",
        )
    ]
    if OmegaConf.is_list(config.temperature) and not config.temperature:
        raise ConfigError(
            "temperature=[] names no temperature; give one, or several for function=eval"
        )
    several = config.function == "eval" and OmegaConf.is_list(config.temperature)
    for key, value in numbers + [
        ("temperature", t) for t in (temperatures(config) if several else [config.temperature])
    ]:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 <= value < float("inf")
        ):
            raise ConfigError(f"{key}={value} must be a number of at least 0")
    if config.plan.gpu_gib is not None and not (
        isinstance(config.plan.gpu_gib, (int, float)) and config.plan.gpu_gib > 0
    ):
        raise ConfigError(
            f"plan.gpu_gib={config.plan.gpu_gib} must be a number of GiB above 0, or null"
        )
    if not 0 < config.topp <= 1:
        raise ConfigError(
            f"topp={config.topp} must lie in (0, 1]; 1 draws from the whole vocabulary"
        )
    if not 0 < config.test_fraction < 1:
        raise ConfigError(f"test_fraction={config.test_fraction} must lie between 0 and 1")
    for key in ("lr", "max_grad_norm"):
        if config[key] == 0:
            raise ConfigError(f"{key}=0 would train nothing; it must be greater than 0")
    if config.n_epochs is None and config.n_examples is None:
        raise ConfigError(
            "n_epochs and n_examples are both null: the run would never end; set one of them"
        )
    if config.trainer == "BasicTrainer" and (config.world_size or 1) > 1:
        raise ConfigError(
            f"world_size={config.world_size} needs a distributed trainer; BasicTrainer is one"
            " process"
        )
    if config.trainer != "FSDPTrainer":
        for key, off in (
            ("tensor_parallel_size", 1),
            ("fsdp_cpu_offload", False),
            ("fsdp_shard_size", None),
        ):
            if config[key] != off:
                raise ConfigError(
                    f"{key}={config[key]} is for trainer=FSDPTrainer, not {config.trainer}; leave"
                    " it out, or change the trainer"
                )


def _check_lengths(config: DictConfig) -> None:
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
    parts = config.gradient_accumulation_steps * data_ranks(config, world())
    if config.batch_size % parts:
        lower = max(parts, config.batch_size // parts * parts)
        raise ConfigError(
            f"batch_size={config.batch_size} must be divisible by"
            f" gradient_accumulation_steps*world_size={parts}; try {lower} or {lower + parts}"
        )


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
    if isinstance(config.datasets, str) or not config.datasets:
        raise ConfigError(
            f"datasets={config.datasets} must be a list in brackets, such as datasets=[hh,shp]"
        )
    settings = dict(
        data_dir=config.data_dir,
        pairing=config.pairing,
        min_gap=config.min_gap,
        test_fraction=config.test_fraction,
        columns={ours: theirs for ours, theirs in config.dataset_columns.items() if theirs},
    )
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
        for need, wanted in (
            ("pairs", loss.examples == "pairs"),
            ("scores", "scores" in loss.reads),
        ):
            if wanted and need not in source.provides:
                able = sorted(name for name, entry in DATASETS.items() if need in entry.provides)
                raise ConfigError(
                    f"loss={loss.name} needs {need}, and datasets=[{source.name}] has none; with"
                    f" {need}: {', '.join(able)}"
                )
    return sources


def must_match(saved: DictConfig, config: DictConfig) -> None:
    """Refuse to continue a run with settings that would train something else."""
    before, now = (OmegaConf.to_container(c, resolve=True) for c in (saved, config))
    may_change = (
        MAY_CHANGE
        if config.function == "train"
        else (MAY_CHANGE - SHAPES_ROLLOUTS) | MAY_CHANGE_ONLINE
    )
    different = [
        key
        for key in sorted(flat_keys(OmegaConf.create(before)) | flat_keys(OmegaConf.create(now)))
        if not {key, key.split(".")[0]} & may_change
        and _value(before, key) != _value(now, key)
        and not isinstance(_value(now, key), dict)
    ]
    if different:
        told = ", ".join(
            f"{key} was {_value(before, key)} and is now {_value(now, key)}" for key in different
        )
        raise ConfigError(
            f"{told}: the run folder holds another run; take another local_run_dir, or leave these"
            " as they were"
        )


# Keys that change where a run is kept, or how fast it gets there, and nothing of what it is.
SURROUNDINGS = {
    "local_dirs",
    "local_run_dir",
    "exp_name",
    "wandb",
    "cache_dir",
    "resume",
    "skip_finished",
    "minimum_log_interval_secs",
    "keep_checkpoints",
    "fsdp_port",
    "hydra",
    "plan",
    "host",
    "port",
    "profile_steps",
}


def same_settings(saved: DictConfig, config: DictConfig) -> bool:
    """Whether two configs ask for the same run, wherever it is kept."""
    both = (
        {
            key: value
            for key, value in OmegaConf.to_container(c, resolve=True).items()
            if key not in SURROUNDINGS
        }
        for c in (saved, config)
    )
    return next(both) == next(both)


def finished_like(config: DictConfig, folder: str | None) -> Path | None:
    """A finished run below `folder` with the settings of `config`, if there is one."""
    for path in sorted(Path(folder).rglob("config.yaml")) if folder else ():
        done = (path.parent / "summary.json").is_file() and same_settings(
            OmegaConf.load(path), config
        )
        if done and (config.function != "eval" or covered(config, path.parent)):
            return path.parent
    return None


def _value(tree: dict, key: str):
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def fail(error: Exception) -> None:
    """Print what is wrong, without a traceback, and leave with exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
