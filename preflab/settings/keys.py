"""The keys of config.yaml and the options of its groups."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[2]


CONFIG_DIR = ROOT / "config"


GROUPS = ("model", "loss", "reward", "experiment")


def load_yaml(path: Path) -> DictConfig | ListConfig:
    """A yaml file as it is, read once; not to be changed."""
    return _load_yaml(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _load_yaml(path: Path, changed: int) -> DictConfig | ListConfig:
    return OmegaConf.load(path)


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


def options(group: str, folders: Sequence[Path] = (CONFIG_DIR,)) -> set[str]:
    """The options of a group: the files of `FOLDER/GROUP`."""
    return {
        path.relative_to(folder / group).with_suffix("").as_posix()
        for folder in folders
        for path in (folder / group).rglob("*.yaml")
    }


def option_file(group: str, name: str, folders: Sequence[Path] = (CONFIG_DIR,)) -> Path | None:
    """The file of an option; of several with one name it is the first folder's, as in hydra."""
    paths = (folder / group / f"{name}.yaml" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def option_keys(group: str, name: str, folders: Sequence[Path] = (CONFIG_DIR,)) -> set[str]:
    """The keys that an option adds to its group: `loss.beta`, ... Those of the options that it
    builds on are included."""
    path = option_file(group, name, folders)
    if path is None:
        return set()
    settings = load_yaml(path)
    if not OmegaConf.is_dict(settings):
        return set()
    keys = set()
    for entry in settings.get("defaults", ()):
        if isinstance(entry, str) and entry not in ("_self_", name):
            keys |= option_keys(group, entry, folders)
    if is_global(path):
        settings = settings.get(group) or {}
    own = flat_keys(settings) - {"defaults"}
    return keys | {f"{group}.{key}" for key in own}


def is_global(path: Path) -> bool:
    """Whether a file of a group sets keys from the top of the config."""
    return re.search(r"^#\s*@package\s+_global_\s*$", path.read_text("utf-8"), re.M) is not None
