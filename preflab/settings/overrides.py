"""The command line: its keys, its options, and what is nearest to one that does not exist."""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from preflab.settings.keys import CONFIG_DIR, GROUPS, flat_keys, options
from utils import ConfigError, nearest


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


def fail(error: Exception) -> None:
    """Print what is wrong, without a traceback, and leave with exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
