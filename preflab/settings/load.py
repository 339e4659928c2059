"""From a composed config to `Settings`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from preflab.settings.keys import load_yaml, option_file
from preflab.settings.overrides import check_keys
from preflab.settings.schema import RULES, Settings, parse_entry, parse_value
from utils import ConfigError


def load_settings(config: DictConfig) -> Settings:
    """The settings of a composed config, each in its type. Raises ConfigError, which names the key,
    what was received and what is accepted.

    `loss`, `reward` and the entries of `more_rewards` are dicts as they are: the signatures of the
    functions that they name say what they hold.
    """
    check_keys(config)
    settings = _load(Settings, _plain(config), "")
    if isinstance(parts := settings.loss.get("parts"), list):
        complete = [with_loss_defaults(part) for part in parts]
        return dataclasses.replace(settings, loss=settings.loss | {"parts": complete})
    return settings


def with_loss_defaults(given: Any) -> Any:
    """The settings of a loss that is named inside of another setting, by a name or {name: NAME,
    setting: value}: what is not given is that of config/loss/NAME.yaml. What names no loss there
    stays as it is."""
    settings = {"name": given} if isinstance(given, str) else given
    if not isinstance(settings, Mapping):
        return given
    path = option_file("loss", str(settings.get("name")))
    defaults = OmegaConf.to_container(load_yaml(path), resolve=True) if path else {}
    return {**defaults, **settings}


def _plain(config: DictConfig) -> dict[str, Any]:
    """The config without interpolations."""
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise ConfigError(
            f"{error.full_key or 'config'}: its value cannot be resolved ({message}); give a value,"
            " or the name of a key in ${...}"
        ) from error


def _load(group: type, values: dict[str, Any], prefix: str) -> Any:
    fields = {}
    for field in dataclasses.fields(group):
        key = prefix + field.name
        if field.name not in values:
            raise ConfigError(
                f"{key} is missing, as in a config.yaml of another version; add {key}=VALUE"
            )
        value = parse_value(key, values[field.name])
        if isinstance(value, dict) and RULES[key].accepts is not None:
            value = {name: parse_entry(key, name, entry) for name, entry in value.items()}
        nested = dataclasses.is_dataclass(field.type)
        fields[field.name] = _load(field.type, value, f"{key}.") if nested else value
    return group(**fields)


def validate(config: DictConfig) -> Settings:
    """The settings of a config, which has them afterwards too: true in place of yes, 64 in place of
    64.0. Interpolations stay where they give a value of the right type."""
    settings = load_settings(config)
    given = _plain(config)
    with read_write(config):
        for key, rule in RULES.items():
            if rule.accepts is None:
                continue
            value, before = _at(settings, key), _at(given, key)
            if repr(value) != repr(before):  # 1 and 1.0 and true are equal, and not the same
                OmegaConf.update(config, key, value)
    return settings


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part] if isinstance(tree, dict) else getattr(tree, part)
    return tree
