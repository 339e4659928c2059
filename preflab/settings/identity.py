"""What makes two configs the same run, and what may change when a run continues."""

from omegaconf import DictConfig, OmegaConf

from preflab.settings.keys import flat_keys
from preflab.settings.schema import may_change, part_of_run
from utils import ConfigError


def must_match(saved: DictConfig, config: DictConfig) -> None:
    """Refuse to continue a run with settings that would train something else."""
    before, now = (OmegaConf.to_container(c, resolve=True) for c in (saved, config))
    different = [
        key
        for key in sorted(flat_keys(OmegaConf.create(before)) | flat_keys(OmegaConf.create(now)))
        if not may_change(key, config.function)
        and _value(before, key) != _value(now, key)
        and not isinstance(_value(now, key), dict)
    ]
    if different:
        changes = ", ".join(
            f"{key} was {_value(before, key)} and is now {_value(now, key)}" for key in different
        )
        raise ConfigError(
            f"{changes}: the run folder holds another run; take another local_run_dir, or leave"
            " these as they were"
        )


def same_settings(saved: DictConfig, config: DictConfig) -> bool:
    """Whether two configs ask for the same run, wherever its folder is."""
    before, now = (
        {
            key: value
            for key, value in OmegaConf.to_container(c, resolve=True).items()
            if part_of_run(key) and value is not None  # a key that the older config lacks is off
        }
        for c in (saved, config)
    )
    return before == now


def _value(tree: dict, key: str):
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
