"""A config composed from overrides, for programs that are not started by hydra."""

from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from preflab.settings.keys import CONFIG_DIR
from preflab.settings.overrides import check_overrides
from preflab.settings.run_folder import register_resolvers
from utils import ConfigError


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The config of `python train.py OVERRIDES`.

    config_dir: a folder with yamls of the user's own, as for `--config-dir` of train.py.
    Raises ConfigError for an unknown key or option, with the nearest valid ones.
    """
    register_resolvers()
    overrides = list(overrides)
    if config_dir is not None:
        overrides.append(f"hydra.searchpath=[file://{config_dir.resolve()}]")
    check_overrides(overrides)
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra.compose("config", overrides=overrides)
    except HydraException as error:
        raise ConfigError(str(error)) from error
