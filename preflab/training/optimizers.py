"""The optimizer of a run."""

import inspect

import torch
from torch.distributed.tensor import DTensor


def make_optimizer(
    name: str, parameters: list[torch.nn.Parameter], *, lr: float
) -> torch.optim.Optimizer:
    """An optimizer of torch.optim by its name, fused where torch has a fused version.

    A fused step is one kernel instead of a dozen.
    """
    cls = getattr(torch.optim, name)
    has_fused = "fused" in inspect.signature(cls).parameters
    # Of the fused kernels, only those of Adam and AdamW accept DTensors.
    sharded = any(isinstance(p, DTensor) for p in parameters)
    if sharded and name not in ("Adam", "AdamW"):
        has_fused = False
    # torch before 2.13 has no fused Adagrad on a GPU.
    if name == "Adagrad" and any(p.device.type == "cuda" for p in parameters):
        has_fused = False
    return cls(parameters, lr=lr, **({"fused": True} if has_fused else {}))
