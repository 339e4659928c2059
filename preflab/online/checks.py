"""Checks of the settings of online learning."""

from collections.abc import Mapping

import torch

from preflab.modeling.weights_io import archive_place
from preflab.objective.registry import BoundLoss, bind_loss
from preflab.online.selection import bind_selection
from preflab.rewards.registry import REWARDS
from preflab.settings.load import with_loss_defaults
from preflab.settings.schema import Settings
from preflab.settings.values import exists
from utils import ConfigError


def check_online(settings: Settings, loss: BoundLoss) -> None:
    """Raise ConfigError for settings of function=online that do not go together."""
    online = settings.online
    check_labels(settings)
    new = online.max_new_tokens
    if new is not None and settings.max_prompt_length + new > settings.max_length:
        raise ConfigError(
            f"max_prompt_length={settings.max_prompt_length} and online.max_new_tokens={new} exceed"
            f" max_length={settings.max_length}; lower one or raise max_length"
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
    if "token_weights" in loss.reads:
        raise ConfigError(
            f"function=online: loss={loss.name} reads weights of tokens, which rollouts do not"
            " have; take another loss"
        )
    if online.sampler not in (None, "reference") and not exists(str(archive_place(online.sampler))):
        raise ConfigError(
            f"online.sampler={online.sampler}: no such file or folder; give an archive,"
            " reference, or null for the policy"
        )


def check_ahead(settings: Settings, trainer: type) -> None:
    """Raise ConfigError where `online.ahead` cannot work: where the models of `trainer` live."""
    if not settings.online.ahead:
        return
    placement = trainer.placement
    is_served = settings.sampler.url is not None and settings.online.sampler is not None
    alone = not placement.one_process_per_device
    where = None
    if not alone or ((placement.splits_layers or trainer.place is not None) and not is_served):
        where = f"trainer={settings.trainer} places the policy itself"
    elif torch.cuda.device_count() > 1 and not is_served:
        where = f"the policy is spread over {torch.cuda.device_count()} GPUs"
    if where is not None:
        raise ConfigError(
            f"online.ahead=true samples from a copy of the policy on its device, and {where}; take"
            " trainer=BasicTrainer with one GPU (CUDA_VISIBLE_DEVICES=0) or on a CPU, or"
            " online.ahead=false"
        )
    if settings.compile and not is_served:
        raise ConfigError(
            "online.ahead=true and compile=true: sampling turns compiled blocks off in the whole"
            " process, and would do so in the middle of a step; set one of them to false"
        )


def check_labels(settings: Settings) -> None:
    """Raise ConfigError where no label could be bought or learned from with these online."""
    online = settings.online
    bind_selection(online.select)
    if online.discriminator is None:
        for key in ("discriminator_path", "initial_labels"):
            if getattr(online, key):
                raise ConfigError(
                    f"online.{key} is set and online.discriminator is not; name its loss, such as"
                    " online.discriminator=bradley_terry"
                )
        if online.select != "conf":
            raise ConfigError(
                f"online.select={online.select} is set and online.discriminator is not, so every"
                " pair is labelled and none is selected; leave it out"
            )
        reward = settings.reward["name"]
        if online.budget == 0 and REWARDS[reward].is_gold:
            raise ConfigError(
                f"online.budget=0 buys no label of reward={reward}, so there is nothing"
                " to learn from; raise it, or give online.discriminator a discriminator_path"
            )
        return
    path = online.discriminator_path
    if path and path.startswith(("/", ".")) and not exists(path):
        raise ConfigError(
            f"online.discriminator_path={path}: no such file or folder; give a run, a model's"
            " folder or a hub name"
        )
    own = discriminator_loss(settings)
    if own.examples != "pairs" or own.columns or "scores" in own.reads or own.couples_batch:
        raise ConfigError(
            f"online.discriminator={own.name}: bought labels say which of two responses is better"
            " and no more; take bradley_terry or dpo"
        )
    if online.budget == 0 and not online.discriminator_path:
        raise ConfigError(
            "online.budget=0 and no online.discriminator_path: the discriminator knows nothing and"
            " may learn nothing; set one of them"
        )


def discriminator_loss(settings: Settings) -> BoundLoss:
    """The loss of `online.discriminator`: a name of config/loss/, or {name: NAME, setting:
    value}."""
    given = settings.online.discriminator
    if not isinstance(given, str) and not (isinstance(given, Mapping) and "name" in given):
        raise ConfigError(
            f"online.discriminator={given} is neither a loss nor {{name: LOSS, setting: value}};"
            " such as bradley_terry, or {name: dpo, beta: 0.1}"
        )
    return bind_loss(with_loss_defaults(given))
