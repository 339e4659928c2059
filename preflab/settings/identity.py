"""What makes two configs the same run, and what may change when a run continues."""

from omegaconf import DictConfig, OmegaConf

from preflab.settings.keys import flat_keys
from utils import ConfigError

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


def _value(tree: dict, key: str):
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
