"""Checks of the settings of online learning."""

from omegaconf import DictConfig, OmegaConf

from preflab.objective.registry import BoundLoss, bind_loss
from preflab.rewards.registry import REWARDS
from preflab.settings.keys import CONFIG_DIR
from preflab.settings.values import exists
from utils import ConfigError


def check_online(config: DictConfig, loss: BoundLoss) -> None:
    """Raise ConfigError for settings of function=online that do not go together."""
    settings = config.online
    check_labels(config)
    new = settings.max_new_tokens
    if new is not None and config.max_prompt_length + new > config.max_length:
        raise ConfigError(
            f"max_prompt_length={config.max_prompt_length} and online.max_new_tokens={new} exceed"
            f" max_length={config.max_length}; lower one or raise max_length"
        )
    if loss.examples == "responses":
        raise ConfigError(
            f"function=online: loss={loss.name} reads a label of each response, and rounds give"
            " pairs; take kto, say"
        )
    if "scalar_head" in loss.reads or loss.columns:
        what = (
            "trains a reward model, which samples nothing"
            if "scalar_head" in loss.reads
            else f"reads the column {min(loss.columns)!r}, which rollouts do not have"
        )
        raise ConfigError(f"function=online: loss={loss.name} {what}; take another loss")
    if settings.sampler not in (None, "reference") and not exists(settings.sampler):
        raise ConfigError(
            f"online.sampler={settings.sampler}: no such file or folder; give an archive,"
            " reference, or null for the policy"
        )


def check_labels(config: DictConfig) -> None:
    """Raise ConfigError where no label could be bought or learned from with these settings."""
    settings = config.online
    if settings.discriminator is None:
        for key in ("discriminator_path", "initial_labels"):
            if settings[key]:
                raise ConfigError(
                    f"online.{key} is set and online.discriminator is not; name its loss, such as"
                    " online.discriminator=bradley_terry"
                )
        if settings.budget == 0 and REWARDS[config.reward.name].is_gold:
            raise ConfigError(
                f"online.budget=0 buys no label of reward={config.reward.name}, so there is nothing"
                " to learn from; raise it, or give online.discriminator a discriminator_path"
            )
        return
    path = settings.discriminator_path
    if path and path.startswith(("/", ".")) and not exists(path):
        raise ConfigError(
            f"online.discriminator_path={path}: no such file or folder; give a run, a model's"
            " folder or a hub name"
        )
    own = discriminator_loss(config)
    if own.examples != "pairs" or own.columns or "scores" in own.reads or own.couples_batch:
        raise ConfigError(
            f"online.discriminator={own.name}: bought labels say which of two responses is better"
            " and no more; take bradley_terry or dpo"
        )
    if settings.budget == 0 and not settings.discriminator_path:
        raise ConfigError(
            "online.budget=0 and no online.discriminator_path: the discriminator knows nothing and"
            " may learn nothing; set one of them"
        )


def discriminator_loss(config) -> BoundLoss:
    """The loss of `online.discriminator`: a name of config/loss/, or {name: NAME, setting:
    value}."""
    given = config.online.discriminator
    if not isinstance(given, str) and not (OmegaConf.is_dict(given) and "name" in given):
        raise ConfigError(
            f"online.discriminator={given} is neither a loss nor {{name: LOSS, setting: value}};"
            " such as bradley_terry, or {name: dpo, beta: 0.1}"
        )
    given = {"name": given} if isinstance(given, str) else given
    path = CONFIG_DIR / "loss" / f"{given['name']}.yaml"
    settings = OmegaConf.load(path) if path.is_file() else {}
    return bind_loss(OmegaConf.to_container(OmegaConf.merge(settings, given), resolve=True))
