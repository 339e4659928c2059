"""LoRA adapters in the format of peft: a folder with adapter_config.json and
adapter_model.safetensors, read and merged into the model that it was trained on."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from utils import ConfigError, first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = ("CAUSAL_LM", "SEQ_CLS")


def is_adapter(path: str | Path) -> bool:
    """Whether a path is the folder of an adapter, and not of a whole model."""
    # Not by pathlib, which raises for a name that no file can have.
    holds = [os.path.isfile(os.path.join(path, name)) for name in (CONFIG, "config.json")]
    return holds == [True, False]


def adapter_files(folder: Path) -> list[Path]:
    """The files that determine an adapter."""
    return [folder / CONFIG, folder / WEIGHTS]


def read_adapter(folder: Path, name: str) -> tuple:
    """The settings of an adapter, a peft config, and its tensors by name.

    name: the setting and the folder, for messages. Raises ConfigError for anything else than a LoRA
    adapter of a causal language model or of a sequence classifier.
    """
    from peft import PeftConfig

    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            what = "holds no" if folder.is_dir() else "is no folder with an"
            raise ConfigError(
                f"{name} {what} {file}; give the folder of an adapter, such as RUN/LATEST/adapter"
            )
    try:
        settings = PeftConfig.from_pretrained(folder)
        weights = load_file(folder / WEIGHTS)
    except Exception as error:  # JSON, peft and safetensors raise different errors
        raise ConfigError(f"{name} cannot be read: {str(error).splitlines()[0]}") from error
    if settings.peft_type != "LORA" or settings.task_type not in TASKS:
        raise ConfigError(
            f"{name}: an adapter of type {settings.peft_type} for {settings.task_type}; accepted:"
            f" LORA for {' or '.join(TASKS)}"
        )
    return settings, weights


def add_adapter(model: nn.Module, settings, weights: dict, name: str, base: str) -> nn.Module:
    """The model with the adapter on it, a peft model.

    Every tensor of the adapter must fit, because peft itself ignores those that do not. name, base:
    the settings and the folders of adapter and model, for messages.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    try:
        model = get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"{base} does not fit {name}: {str(error).splitlines()[0]}") from error
    places = {key: tensor.shape for key, tensor in get_peft_model_state_dict(model).items()}
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    if places != shapes:
        [key, *more] = sorted(
            key for key in places.keys() | shapes if places.get(key) != shapes.get(key)
        )
        given, accepted = (f"{tuple(of[key])}" if key in of else "none" for of in (shapes, places))
        others = f", and so on for {len(more)} more" if more else ""
        raise ConfigError(
            f"{base} does not fit {name}: of {key} the adapter has {given}"
            f" and the base takes {accepted}{others}; give the model it was trained on"
        )
    check_tied(model, name)
    set_peft_model_state_dict(model, weights)
    return model


def load_saved_adapter(model: nn.Module, checkpoint: Path) -> None:
    """Give the adapter of a model the weights that a checkpoint of its run has for it.

    model: a peft model. Checkpoints of earlier versions have `adapter.pt`.
    """
    from peft import set_peft_model_state_dict

    earlier = checkpoint / "adapter.pt"
    if earlier.is_file():
        state = torch.load(earlier, map_location="cpu", weights_only=True)
        model.load_state_dict(state, strict=False)
    else:
        weights = checkpoint / "adapter" / WEIGHTS
        try:
            set_peft_model_state_dict(model, load_file(weights))
        except SafetensorError as error:
            raise ConfigError(f"{weights} is damaged ({first_line(error)}); restore it") from error


def merge_adapter(
    model: nn.Module, folder: Path, name: str, base: str, dtype: torch.dtype
) -> nn.Module:
    """The model with the adapter of a folder merged into its weights.

    dtype: of the merged weights, the one that the model is used in. A model whose weights are
    mapped still has that of its files, and a sum rounded to bfloat16 would be off by up to 0.4%.
    Other arguments: as above.
    """
    settings, weights = read_adapter(folder, name)
    adapted = add_adapter(model, settings, weights, name, base)
    for module in adapted.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            module.base_layer.to(dtype)
    return adapted.merge_and_unload()


def base_of(folder: Path, name: str) -> str:
    """The folder, GGUF file or hub name of the model that an adapter was trained on. Raises
    ConfigError for a path that is not there."""
    from peft import PeftConfig

    try:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    except Exception as error:  # JSON and peft raise different errors
        raise ConfigError(f"{name} cannot be read: {first_line(error)}") from error
    if not base or (Path(base).is_absolute() and not Path(base).exists()):
        raise ConfigError(
            f"{name} is an adapter, and its base_model_name_or_path={base} is not here; set"
            f" model.name_or_path to the base and model.archive={folder}"
        )
    return base


def check_tied(model: nn.Module, name: str) -> None:
    """Raise ConfigError for an adapter on a weight that two modules share, such as tied embeddings.

    The adapter would change one of them while it is trained, and both once it is merged.

    model: a peft model. name: of what to change, for the message.
    """
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            users.setdefault(id(weight), []).append(path)
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A") or not hasattr(module, "base_layer"):
            continue
        shared = users.get(id(module.base_layer.weight), [])
        if len(shared) > 1:
            short = [user.removeprefix("base_model.model.") for user in sorted(shared)]
            raise ConfigError(
                f"{name}: {path.removeprefix('base_model.model.')} shares its weight with another"
                f" module ({' and '.join(short)}), so a merged adapter would change both and"
                " compute something else than what was trained; leave it out of the target modules"
            )
