"""A base with quantised weights, on which a LoRA adapter is trained (QLoRA, arXiv:2305.14314).

The base is quantised when it is read, by bitsandbytes (`model.quantization`), or its folder holds
quantised weights. The reference is the same base with the adapter off.
"""

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from preflab.modeling.adapters import is_adapter
from preflab.modeling.model_source import model_config, model_source
from preflab.modeling.weights_io import archive_place
from preflab.settings.schema import ModelSettings, Settings
from utils import ConfigError, nearest

BITS = {"4bit": "load_in_4bit", "8bit": "load_in_8bit"}
# Arguments of transformers' BitsAndBytesConfig by what they are for, with what they must be.
ARGUMENTS: dict[str, dict[str, type]] = {
    "4bit": {
        "bnb_4bit_quant_type": str,
        "bnb_4bit_use_double_quant": bool,
        "llm_int8_skip_modules": list,  # its name for 4 bits too
    },
    "8bit": {"llm_int8_skip_modules": list},
}
BLOCK = 64  # weights that share a scale
QUANT_TYPES = ("nf4", "fp4")


def is_quantized(model: nn.Module) -> bool:
    """Whether a model, or the base of a peft model, has quantised weights."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return bool(getattr(base, "is_quantized", False))


def quantization_name(model: ModelSettings) -> str:
    """The setting that says that the weights are quantised, for messages; empty if they are not."""
    if model.quantization:
        return f"model.quantization={model.quantization}"
    source = model_source(model.name_or_path)
    if not source.options and getattr(model_config(model), "quantization_config", None):
        return f"model.name_or_path={model.name_or_path}, whose weights are quantised"
    return ""


def quantization_config(model: ModelSettings):
    """The `BitsAndBytesConfig` of the settings of a model, None without `model.quantization`.

    4 bits are NF4 unless the arguments say otherwise, and products are computed in the dtype of
    the forward pass.
    """
    if not model.quantization:
        return None
    from transformers import BitsAndBytesConfig

    options = {BITS[model.quantization]: True, **model.quantization_args}
    if model.quantization == "8bit":
        # Columns of outliers are chosen for all rows of a batch together. With them, log-probs of
        # a response would depend on the other responses.
        options["llm_int8_threshold"] = 0.0
    if model.quantization == "4bit":
        compute = getattr(torch, model.fsdp_policy_mp or model.policy_dtype)
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute, **options}
    return BitsAndBytesConfig(**options)


def check_blocks(settings: Settings, model: nn.Module) -> None:
    """Raise ConfigError for layers that bitsandbytes' kernels for a CPU read with the scales of
    other blocks, and so with other values: those of 4 bits whose rows are no multiple of a block.

    model: the model on the meta device.
    """
    given = settings.model
    if given.quantization != "4bit" or torch.cuda.is_available():
        return
    skipped = {"lm_head", "score", *given.quantization_args.get("llm_int8_skip_modules", ())}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            width = module.in_features
        elif isinstance(module, Conv1D):
            width = module.weight.shape[0]
        else:
            continue
        if width % BLOCK and skipped.isdisjoint(name.split(".")):
            raise ConfigError(
                f"model.quantization=4bit: {name} has {width} inputs, and on a CPU bitsandbytes is"
                f" right for multiples of {BLOCK} only; take 8bit, a GPU, or exclude it, as with"
                f' "model.quantization_args={{llm_int8_skip_modules: [lm_head,'
                f' {name.split(".")[-1]}]}}"'
            )


def prepare_quantized(model: nn.Module) -> None:
    """Make a model that bitsandbytes has quantised one that can be trained on a CPU."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In a forward pass without gradients it would pack the weights for a kernel that has no
            # backward pass, and training steps would have no gradients from then on.
            module.support_avx512bf16_for_cpu = False
    # 8-bit products say for each of them that they round their input.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def check_quantization(settings: Settings, trainer: type) -> None:
    """Raise ConfigError, before weights are read, for what a quantised base cannot do.

    trainer: the class that declares where models live.
    """
    model = settings.model
    _check_arguments(model)
    name = quantization_name(model)
    if not name:
        return
    if model.quantization:
        _check_source(model, name)
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"{name} needs the package bitsandbytes, which is not installed; pip install -r"
                " requirements/quantization.txt"
            )
    if trainer.place is not None:
        raise ConfigError(
            f"trainer={settings.trainer}: {name} has no shards and no splits; take"
            " trainer=BasicTrainer, which spreads a model over all GPUs of a process"
        )
    if settings.function == "plan":
        raise ConfigError(
            f"function=plan counts no quantised weights ({name}); plan the run with"
            " model.quantization=null and model.lora.r, and subtract what the base saves"
        )
    if settings.function != "eval" and not model.lora.r:
        raise ConfigError(
            f"{name} cannot be trained itself, and model.lora.r=0 trains all weights; train an"
            " adapter, as with model.lora.r=16, or set model.quantization=null"
        )
    _check_archives(settings, name)


def _check_arguments(model: ModelSettings) -> None:
    if model.quantization_args and not model.quantization:
        raise ConfigError(
            f"model.quantization_args={model.quantization_args} is for model.quantization=4bit or"
            " 8bit, which is not set; leave it out"
        )
    accepted = ARGUMENTS.get(model.quantization, {})
    for key, value in model.quantization_args.items():
        given = f"model.quantization_args.{key}={value}"
        if key not in accepted:
            raise ConfigError(
                f"{given}: model.quantization={model.quantization} has no such argument;"
                f" {nearest(key, accepted)}"
            )
        if not isinstance(value, accepted[key]):
            raise ConfigError(f"{given} must be a {accepted[key].__name__}")
        if key == "bnb_4bit_quant_type" and value not in QUANT_TYPES:
            raise ConfigError(f"{given}; accepted: {', '.join(QUANT_TYPES)}")


def _check_source(model: ModelSettings, name: str) -> None:
    source = model_source(model.name_or_path)
    problem = ""
    if model.from_scratch:
        problem = "model.from_scratch=true has random weights, which nothing is gained by rounding"
    elif source.options:
        problem = (
            f"model.name_or_path={model.name_or_path} is a GGUF file; give a folder of weights"
        )
    elif source.adapter is not None:
        problem = (
            f"model.name_or_path={model.name_or_path} is an adapter, which cannot be merged into"
            " quantised weights; merge it first with scripts/merge_adapter.py"
        )
    elif getattr(model_config(model), "quantization_config", None):
        problem = (
            f"the weights of model.name_or_path={model.name_or_path} are quantised already; leave"
            " model.quantization out"
        )
    if problem:
        raise ConfigError(f"{name}: {problem}")


def _check_archives(settings: Settings, name: str) -> None:
    model, is_eval = settings.model, settings.function == "eval"
    for key, path in (
        ("model.reference_archive", model.reference_archive),
        ("model.archive", None if is_eval else model.archive),
    ):
        if path:
            raise ConfigError(
                f"{key}={path} cannot be loaded into {name}; set model.name_or_path to it (a run's"
                " RUN/LATEST/hf; an adapter is merged first with scripts/merge_adapter.py)"
            )
    archives = [model.archive] if isinstance(model.archive, str) else (model.archive or [])
    for path in archives:
        if Path(path).exists() and not is_adapter(archive_place(path)):
            raise ConfigError(
                f"model.archive={path} has whole weights, which would replace those of {name};"
                " give the run of an adapter, or set model.quantization=null"
            )
    if settings.reference.update != "frozen":
        raise ConfigError(
            f"reference.update={settings.reference.update} copies the policy's weights, and {name}"
            " cannot take them; leave it out"
        )
    if settings.function == "online" and settings.online.discriminator is not None:
        raise ConfigError(
            f"online.discriminator={settings.online.discriminator} learns with all of its weights,"
            f" and starts from {name}; leave one of them out"
        )
