"""The transformer blocks of a model, and the dtype of its parameters."""

import contextlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from utils import ConfigError


def find_blocks(model: nn.Module, name: str | None) -> list[nn.Module]:
    """The transformer blocks: modules of class `name`, by default of the model's
    `_no_split_modules`.

    Raises ConfigError with the classes that the model repeats if no module matches.
    """
    names = {name} if name else set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        repeated = sorted({type(member).__name__ for members in lists for member in members})
        raise ConfigError(
            f"model.block_name={name} matches no module of {type(model).__name__}; "
            f"its repeated blocks are of class {', '.join(repeated) or '(none)'}"
        )
    return blocks


def body_of(model: nn.Module) -> nn.Module:
    """The part of a causal LM below its head. `base_model_prefix` names it, in Llama 4 wrongly."""
    named = getattr(model, model.base_model_prefix, None)
    return model.model if named is None else named


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert parameters to `dtype`, in place.

    Buffers, such as rotary frequencies, keep their dtype, and so do parameters already sharded.
    """
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def compiled_blocks_off(model: nn.Module) -> contextlib.AbstractContextManager:
    """Run the blocks of a model as they are. The stance is one for all threads of the process, so
    it stays as it is where nothing was compiled."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
