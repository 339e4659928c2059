"""The transformer blocks of a model, and the dtype of its parameters."""

from collections import Counter

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from utils import ConfigError


def find_blocks(model: nn.Module, name: str | None) -> list[nn.Module]:
    """The transformer blocks: modules of class `name`, by default those that transformers says not
    to split.

    Raises ConfigError that lists the repeated classes of the model when there is none.
    """
    names = {name} if name else set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        repeated = Counter(
            type(m).__name__
            for parent in model.modules()
            if isinstance(parent, nn.ModuleList)
            for m in parent
        )
        raise ConfigError(
            f"model.block_name={name} matches no module of {type(model).__name__}; "
            f"its repeated blocks are of class {', '.join(sorted(repeated)) or '(none)'}"
        )
    return blocks


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to `dtype`; buffers, such as rotary frequencies, keep theirs, and so do parameters
    already sharded."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
