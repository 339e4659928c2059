"""The optimizer of a run."""

import inspect

import torch
from torch.distributed.tensor import DTensor

from preflab.settings.schema import Settings


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


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> float:
    """Linear warm-up, then constant: a function of the finished `steps`, so that there is no
    scheduler state. Returns the learning rate of the next step."""
    lr = settings.lr * min(1.0, (steps + 1) / (settings.warmup_steps + 1))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
