"""The keys of config.yaml and the options of its groups."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[2]


CONFIG_DIR = ROOT / "config"


GROUPS = ("model", "loss", "reward", "experiment")


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
