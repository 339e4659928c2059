"""The losses of an atlas: from the registry, or those that the config lists."""

from dataclasses import dataclass
from typing import Any

from preflab.objective.registry import LOSSES, BoundLoss, bind_loss
from preflab.settings.keys import CONFIG_DIR, load_yaml
from preflab.settings.load import with_loss_defaults
from preflab.settings.schema import Settings
from utils import ConfigError, nearest

ATLAS_KEYS = ("as",)  # keys of an entry that are not the loss's


@dataclass(frozen=True)
class Entry:
    """A loss of the atlas. label: its name on the map. settings: of the loss, to be shown."""

    label: str
    loss: BoundLoss
    settings: dict[str, Any]


def baseline_of(settings: Settings, loss: BoundLoss) -> Entry:
    """The loss that the others are compared with: `loss` of the config."""
    return Entry(loss.name, loss, _shown(settings.loss))


def entries_of(settings: Settings, loss: BoundLoss) -> tuple[list[Entry], dict[str, str]]:
    """The losses of an atlas, `loss` of the config first, and the reason of each that is left out,
    by its label.

    Without `atlas.losses` they are all that are registered, with the settings of their yaml. Raises
    ConfigError for an entry that names no loss, or that has settings it cannot have.
    """
    entries = [baseline_of(settings, loss)]
    left_out: dict[str, str] = {}
    if settings.atlas.losses is not None:
        entries += map(_listed, settings.atlas.losses)
    else:
        for name in sorted(LOSSES.keys() - {loss.name}):
            config = with_loss_defaults(name)
            try:
                entries.append(_entry(name, {"name": name} if isinstance(config, str) else config))
            except ConfigError as error:
                left_out[name] = str(error)
    _check_distinct(entries)
    heads = [entry.label for entry in entries if "scalar_head" in entry.loss.reads]
    left_out |= dict.fromkeys(heads, "trains a model with a scalar head, which has no log-probs")
    return [entry for entry in entries if entry.label not in heads], left_out


def _listed(given: Any) -> Entry:
    """An entry of `atlas.losses`: a name, or {name: NAME, as: LABEL, setting: value}."""
    config = with_loss_defaults(given)
    if isinstance(config, str):  # a registered loss without a yaml
        config = {"name": config}
    name = config.get("name")
    if name not in LOSSES and not config.get("module"):
        raise ConfigError(f"atlas.losses: {name!r} is no loss; {nearest(str(name), LOSSES)}")
    label = str(config.get("as") or name)
    try:
        return _entry(label, config)
    except ConfigError as error:
        raise ConfigError(f"atlas.losses, {label}: {error}") from error


def _entry(label: str, config: dict) -> Entry:
    config = {key: value for key, value in config.items() if key not in ATLAS_KEYS}
    return Entry(label, bind_loss(config), _shown(config))


def _shown(config: dict) -> dict[str, Any]:
    """The settings of a loss, and of those that all losses have the ones that are changed."""
    defaults = load_yaml(CONFIG_DIR / "config.yaml").loss
    return {
        key: value
        for key, value in config.items()
        if key not in ("name", "module") and not (key in defaults and value == defaults[key])
    }


def _check_distinct(entries: list[Entry]) -> None:
    labels = [entry.label for entry in entries]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(
            f"atlas.losses: {twice[0]} is there twice (loss={labels[0]} always is); tell them"
            f" apart, such as with as: {twice[0]}_2"
        )
