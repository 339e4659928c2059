"""What makes two configs the same run, and what may change when a run continues."""

from omegaconf import DictConfig, OmegaConf

from preflab.settings.keys import CONFIG_DIR, flat_keys, load_yaml
from preflab.settings.schema import may_change, part_of_run
from utils import ConfigError


def must_match(saved: DictConfig, config: DictConfig) -> None:
    """Refuse to continue a run with settings that would train something else."""
    before, now = (_filled(OmegaConf.to_container(c, resolve=True)) for c in (saved, config))
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
    """Whether two configs ask for the same run, wherever its folder is. The settings of online
    learning and of the atlas count for these functions alone."""
    unread = {"online", "atlas"} - {config.function}
    before, now = (
        {
            key: value
            for key, value in _filled(OmegaConf.to_container(c, resolve=True)).items()
            if part_of_run(key) and value not in (None, {}) and key not in unread
        }
        for c in (saved, config)
    )
    return before == now


def _filled(tree: dict, defaults: dict | None = None) -> dict:
    """A config with the defaults of the keys that it lacks, which are newer than it is."""
    if defaults is None:
        defaults = OmegaConf.to_container(load_yaml(CONFIG_DIR / "config.yaml"))
        defaults = {key: defaults[key] for key in defaults if key not in ("defaults", "hydra")}
    inner = {
        key: _filled(tree[key], value)
        for key, value in defaults.items()
        if isinstance(value, dict) and isinstance(tree.get(key), dict)
    }
    return defaults | tree | inner


def _value(tree: dict, key: str):
    """The value of a key; None for an empty group, which null stands for in config.yaml."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return None if tree == {} else tree
