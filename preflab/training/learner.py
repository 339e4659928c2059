"""What learns: the optimizer over a policy."""

import inspect

import torch
from torch.distributed.tensor import DTensor

from utils import PrefLabError


class NonFiniteLoss(PrefLabError):
    """The loss or its gradient is no number; the weights of the last good step are saved."""

    everywhere = True


def make_optimizer(config, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer of torch.optim by its name there, in its fused form where it has one: one kernel
    instead of a dozen."""
    kind = getattr(torch.optim, config.optimizer)
    has_one = "fused" in inspect.signature(kind).parameters
    sharded = any(isinstance(p, DTensor) for p in parameters)  # of which only Adam's kernels know
    on_gpu = any(
        p.device.type == "cuda" for p in parameters
    )  # where torch before 2.13 has none for Adagrad
    adam = config.optimizer in ("Adam", "AdamW")
    fused = (
        {"fused": True}
        if has_one and (adam or not sharded) and not (on_gpu and config.optimizer == "Adagrad")
        else {}
    )
    return kind(parameters, lr=config.lr, **fused)
