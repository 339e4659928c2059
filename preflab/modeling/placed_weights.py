"""Gradients and weights of a model, wherever they are placed: norms, sums, sizes, full weights."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from preflab.distributed.process_group import World
from preflab.modeling.fsdp import reshard
from preflab.modeling.logprobs import Scorer
from preflab.modeling.tensor_parallel import Body, full_weights_of_split, on_first_device


@torch.no_grad()
def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients to a global L2 norm of at most `max_norm`; returns the norm before.

    The parameters may be on several devices, and some or all of their gradients DTensors.
    """
    # torch takes the norm of tensors together only if they are placed alike.
    groups: dict = {}
    for p in parameters:
        if p.grad is not None:
            groups.setdefault(_placement_of(p.grad), []).append(p)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in groups.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = norms[0]
    if len(norms) > 1:
        total = torch.linalg.vector_norm(torch.stack([norm.to(total.device) for norm in norms]))
    for group in groups.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total.item()


def _placement_of(tensor: Tensor):
    """A key that tensors on the same mesh and shards, or on the same device, share."""
    if isinstance(tensor, DTensor):
        return tensor.device_mesh, tensor.placements
    return tensor.device


@torch.no_grad()
def sum_over_ranks(parameters: list[nn.Parameter], world: World) -> None:
    """Sum the gradients of all ranks into each rank's `.grad`.

    For placements whose backward pass gives each rank the gradient of the rank's own examples.
    """
    if world.size == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        torch.distributed.all_reduce(p.grad)


def bytes_here(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's parts of some tensors, without scalars such as step counts."""
    local = [
        tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for tensor in tensors
        if tensor.ndim
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def largest_state_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> dict[str, int]:
    """Bytes of "weights", "gradients" and "optimizer" state of one device, each the most of any
    rank. Every rank calls it."""
    parameters = [p for name, p in model.named_parameters() if on_first_device(name)]
    states = [optimizer.state.get(p, {}) for p in parameters]
    values = [value for state in states for value in state.values()]
    tensors = {
        "weights": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": [value for value in values if isinstance(value, Tensor)],
    }
    sizes = world.max([float(bytes_here(part)) for part in tensors.values()])
    return dict(zip(tensors, map(int, sizes), strict=True))


def full_weights(scorer: Scorer, scratch: Path, *, keep: bool) -> tuple[dict[str, Tensor], set]:
    """A snapshot of all weights of a model by name, unsharded on the CPU. Every rank calls it.

    keep: whether this rank gets them (rank 0); the dict of the others is empty. Sharded weights are
    gathered into files in `scratch` and mapped from there, so that only one at a time is in memory.
    Others are copied in memory, but for those on the CPU that are not trained: the snapshot has the
    model's own, whose names are the second result. Weights that share memory in the model share it
    in the snapshot.
    """
    reshard(scorer.model)
    if isinstance(body := getattr(scorer.model, scorer.causal_lm.base_model_prefix, None), Body):
        return full_weights_of_split(scorer.model, body.shards), set()
    state: dict[str, Tensor] = {}
    in_use: set[str] = set()
    converted: dict[int, Tensor] = {}  # by the id of the model's tensor
    for i, (name, tensor) in enumerate(scorer.model.state_dict(keep_vars=True).items()):
        is_sharded = isinstance(tensor, DTensor)
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if keep and is_frozen and not is_sharded and tensor.device.type == "cpu":
            in_use.add(name)
        if id(tensor) not in converted:
            full = tensor.detach().full_tensor() if is_sharded else tensor.detach()
            if not keep:
                full = full.new_empty(0)
            elif is_sharded:
                full = on_disk(full, scratch / f"{i}")
            elif name not in in_use:
                full = full.clone() if full.device.type == "cpu" else full.cpu()
            converted[id(tensor)] = full
            del full
        state[name] = converted[id(tensor)]
    return (state, in_use) if keep else ({}, set())


def on_disk(tensor: Tensor, path: Path, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a tensor, in `dtype` where it is given, that is mapped from a new file. Raises
    OSError where the disk is full."""
    size, dtype = max(1, tensor.numel()), dtype or tensor.dtype
    _reserve(path, size * dtype.itemsize)
    mapped = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    return mapped[: tensor.numel()].view(tensor.shape).copy_(tensor)


def _reserve(path: Path, n_bytes: int) -> None:
    """Make a file of `n_bytes` that are on the disk: a write to a mapped page for which there is no
    space would end the process with SIGBUS."""
    with open(path, "wb") as f:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(f.fileno(), 0, n_bytes)
