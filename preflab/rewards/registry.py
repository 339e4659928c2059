"""Rewards that score samples: `score(prompts, responses) -> list[float]`. A new one is one function
and one yaml."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from utils import ConfigError, PrefLabError, load_module, nearest

Score = Callable[[list[str], list[str]], list[float]]


REWARDS: dict[str, Callable[..., Score]] = {}


CONFIG_DIR = Path(__file__).resolve().parents[2] / "config" / "reward"


def register_reward(name: str, *, gold: bool = True, paid: bool = False):
    """Register a function from the settings of `config/reward/<name>.yaml` to a `Score`.

    gold: its labels count against a budget in online learning; not so those of a model that stands
    in for the oracle. paid: every question costs money, so it is not asked for the log alone.
    """

    def decorate(function):
        function.is_gold, function.is_paid = gold, paid
        REWARDS[name] = function
        return function

    return decorate


class RewardError(PrefLabError):
    """A reward that gave no usable scores: a failure is never taken for a score."""


def reward_settings(name, settings: dict | None = None) -> dict:
    """The settings of config/reward/NAME.yaml with `settings` in place of some of them. Raises
    ConfigError for an unknown name."""
    path = CONFIG_DIR / f"{name}.yaml"
    if not path.is_file() and name in REWARDS:  # of a file of the user's own
        return {"name": name, **(settings or {})}
    if not path.is_file():
        raise ConfigError(
            f"{name!r} is no reward;"
            f" {nearest(str(name), [p.stem for p in CONFIG_DIR.glob('*.yaml')])}"
        )
    return OmegaConf.to_container(
        OmegaConf.merge(OmegaConf.load(path), settings or {}), resolve=True
    )


def all_rewards(config) -> dict[str, dict]:
    """Settings of `reward`, and of every entry of `more_rewards`, by the name that its scores go
    by: `as`, or its own."""
    if config.reward.get("module"):
        load_module(config.reward["module"], "reward.module")
    found = {}
    for entry in (config.reward, *(config.more_rewards or ())):
        if (
            not isinstance(entry, str)
            and not OmegaConf.is_dict(entry)
            and not isinstance(entry, dict)
        ):
            raise ConfigError(
                f"more_rewards: {entry!r} is neither a name nor {{name: NAME, setting: value}}"
            )
        entry = {"name": entry} if isinstance(entry, str) else dict(entry)
        if "name" not in entry:
            raise ConfigError(
                f"more_rewards: {entry} has no name; give a file of config/reward/, or {{name:"
                " NAME, setting: value}"
            )
        called = entry.pop("as", entry["name"])
        if called in found:
            raise ConfigError(
                f"two rewards are called {called}; tell them apart: more_rewards=[{{name:"
                f" {entry['name']}, as: another_name}}]"
            )
        found[called] = (
            entry
            if not found
            else reward_settings(
                entry["name"], {key: value for key, value in entry.items() if key != "name"}
            )
        )
    return found


def check_reward(config) -> None:
    """Raise ConfigError for an unknown reward, or settings that do not fit it; loads nothing but
    `module`."""
    settings = dict(config)
    name, module = settings.pop("name"), settings.pop("module", None)
    if module:
        load_module(module, "reward.module")
    if name not in REWARDS:
        raise ConfigError(
            f"reward.name={name!r} is not a registered reward; {nearest(str(name), REWARDS)}"
        )
    accepted = inspect.signature(REWARDS[name]).parameters
    unknown = [key for key in settings if key not in accepted]
    if unknown:
        raise ConfigError(
            f"reward={name} has no setting {', '.join(unknown)}; accepted: {', '.join(accepted)}"
        )
    missing = [k for k, p in accepted.items() if p.default is p.empty and settings.get(k) is None]
    if missing:
        raise ConfigError(f"reward={name} needs {', '.join('reward.' + key for key in missing)}")


def build_rewards(config) -> dict[str, Score]:
    """`reward` first, then `more_rewards`, by name."""
    return {name: build_reward(settings) for name, settings in all_rewards(config).items()}


def build_reward(config) -> Score:
    """The reward of these settings, wrapped so that a wrong count or a number that is not finite is
    a RewardError."""
    check_reward(config)
    settings = dict(config)
    name = settings.pop("name")
    settings.pop("module", None)
    score = REWARDS[name](**settings)

    def checked(prompts: list[str], responses: list[str]) -> list[float]:
        try:
            values = [float(value) for value in score(prompts, responses)]
        except PrefLabError:
            raise
        except (
            Exception
        ) as error:  # of a reward of the user's own, say: whatever it is, there are no scores
            raise RewardError(
                f"reward {name} failed on {len(responses)} responses: {type(error).__name__}:"
                f" {error}"
            ) from error
        if len(values) != len(responses):
            raise RewardError(
                f"reward {name} returned {len(values)} scores for {len(responses)} responses"
            )
        for value, response in zip(values, responses):
            if not math.isfinite(value):
                raise RewardError(
                    f"reward {name} returned {value} for the response {response[:80]!r}"
                )
        return values

    if hasattr(score, "learn"):
        checked.learn = score.learn
    return checked
