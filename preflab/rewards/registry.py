"""The registry of rewards. A reward is `score(prompts, responses) -> list[float]`; a new one takes
one function and one yaml file."""

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from preflab.batching.chat import chat_of_prompt
from preflab.settings.schema import Settings
from utils import ConfigError, PrefLabError, load_module, nearest

Score = Callable[[list[str], list[str]], list[float]]

REWARDS: dict[str, Callable[..., Score]] = {}
CONFIG_DIR = Path(__file__).resolve().parents[2] / "config" / "reward"


class RewardError(PrefLabError):
    """A reward did not return usable scores. A failure is never treated as a score."""


def register_reward(
    name: str,
    *,
    gold: bool = True,
    paid: bool = False,
    reads_messages: bool = False,
    reads_chats: bool = False,
):
    """Register a function that maps the settings of `config/reward/<name>.yaml` to a `Score`.

    gold: labels from this reward count against the budget of online learning. Set it to False for a
        model that stands in for the oracle.
    paid: each request costs money, so the reward is not called for logging alone.
    reads_messages: the score gets each prompt as a list of {role, content}; a prompt of text is one
        message of a user. Else it gets text: of a conversation the content of its only message, or
        `role: content` for each, separated by blank lines.
    reads_chats: the score gets each prompt as a `Chat`, with the messages, the tools and the
        options of the chat template.
    """

    def decorate(function):
        function.is_gold, function.is_paid = gold, paid
        function.reads_messages, function.reads_chats = reads_messages, reads_chats
        REWARDS[name] = function
        return function

    return decorate


def reward_settings(name, overrides: dict | None = None) -> dict:
    """The settings of config/reward/NAME.yaml, updated with `overrides`. Raises ConfigError for an
    unknown name."""
    path = CONFIG_DIR / f"{name}.yaml"
    if path.is_file():
        merged = OmegaConf.merge(OmegaConf.load(path), overrides or {})
        return OmegaConf.to_container(merged, resolve=True)
    if name in REWARDS:  # registered by the user's own file, so there is no yaml
        return {"name": name, **(overrides or {})}
    known = [path.stem for path in CONFIG_DIR.glob("*.yaml")]
    raise ConfigError(f"{name!r} is not a reward; {nearest(str(name), known)}")


def all_rewards(config: Settings) -> dict[str, dict]:
    """The settings of `reward` and of each entry of `more_rewards`, by the name that its scores are
    logged under: `as` if given, else the reward's own name."""
    if config.reward.get("module"):
        load_module(config.reward["module"], "reward.module")
    rewards: dict[str, dict] = {}
    for entry in (config.reward, *(config.more_rewards or ())):
        settings = _entry_settings(entry)
        label = settings.pop("as", settings["name"])
        if label in rewards:
            raise ConfigError(
                f"two rewards are called {label}; give one of them another name:"
                f" more_rewards=[{{name: {settings['name']}, as: another_name}}]"
            )
        if rewards:  # the first is `reward`, which hydra composed from its yaml already
            overrides = {key: value for key, value in settings.items() if key != "name"}
            settings = reward_settings(settings["name"], overrides)
        rewards[label] = settings
    return rewards


def _entry_settings(entry) -> dict:
    if isinstance(entry, str):
        return {"name": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"more_rewards: {entry!r} is neither a name nor {{name: NAME, setting: value}}"
        )
    if "name" not in entry:
        raise ConfigError(
            f"more_rewards: {entry} has no name;"
            " give a file of config/reward/, or {name: NAME, setting: value}"
        )
    return dict(entry)


def check_reward(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for an unknown reward, or for settings that do not fit it. Imports `module`
    and loads nothing else."""
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
    missing = [
        key
        for key, parameter in accepted.items()
        if parameter.default is parameter.empty and settings.get(key) is None
    ]
    if missing:
        raise ConfigError(f"reward={name} needs {', '.join(f'reward.{key}' for key in missing)}")


def build_rewards(config: Settings) -> dict[str, Score]:
    """`reward` first, then `more_rewards`, by name."""
    return {name: build_reward(settings) for name, settings in all_rewards(config).items()}


def build_reward(config: Mapping[str, Any]) -> Score:
    """The reward with these settings. A wrong number of scores, or a score that is NaN or infinite,
    raises RewardError."""
    check_reward(config)
    settings = {key: value for key, value in config.items() if key not in ("name", "module")}
    name = config["name"]
    score = REWARDS[name](**settings)
    given = _given_prompts(REWARDS[name])

    def checked(prompts: list[str], responses: list[str]) -> list[float]:
        try:
            scores = [float(value) for value in score(given(prompts), responses)]
        except PrefLabError:
            raise
        except Exception as error:  # a user's reward may raise anything
            raise RewardError(
                f"reward {name} failed on {len(responses)} responses:"
                f" {type(error).__name__}: {error}"
            ) from error
        _check_scores(name, scores, responses)
        return scores

    if hasattr(score, "learn"):
        checked.learn = score.learn
    return checked


def _given_prompts(reward: Callable) -> Callable[[list[str]], list]:
    """What turns prompts into those that a registered reward reads."""
    if getattr(reward, "reads_chats", False):
        return lambda prompts: list(map(chat_of_prompt, prompts))
    if getattr(reward, "reads_messages", False):
        return lambda prompts: [chat_of_prompt(prompt).messages for prompt in prompts]
    return lambda prompts: prompts


def _check_scores(name: str, scores: list[float], responses: list[str]) -> None:
    if len(scores) != len(responses):
        raise RewardError(
            f"reward {name} returned {len(scores)} scores for {len(responses)} responses"
        )
    for value, response in zip(scores, responses, strict=True):
        if not math.isfinite(value):
            raise RewardError(f"reward {name} returned {value} for the response {response[:80]!r}")
