"""Gradients and weights of a model, whole or in shards."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from preflab.distributed.process_group import World
from preflab.modeling.fsdp import reshard
from preflab.modeling.logprobs import Scorer
from preflab.modeling.tensor_parallel import Body, whole_of_split


@torch.no_grad()
def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to a global norm of at most `max_norm`, wherever they live; returns the norm
    before."""
    by_mesh: dict = {}
    for p in parameters:
        if p.grad is not None:
            by_mesh.setdefault(
                (
                    (p.grad.device_mesh, p.grad.placements)
                    if isinstance(p.grad, DTensor)
                    else p.grad.device
                ),
                [],
            ).append(p)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = (
        norms[0]
        if len(norms) == 1
        else torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    )
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total.item()


@torch.no_grad()
def sum_over_ranks(parameters: list[nn.Parameter], world: World) -> None:
    """Sum the gradients of all ranks into each rank's `.grad`.

    For placements whose backward pass leaves each rank with the gradient of its own examples.
    """
    if world.size == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        torch.distributed.all_reduce(p.grad)


def bytes_here(tensors: Iterable[Tensor]) -> int:
    """What this rank holds of them; numbers of no dimension, such as step counts, are left out."""
    here = [
        tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for tensor in tensors
        if tensor.ndim
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in here)


def full_weights(scorer: Scorer, scratch: Path, *, keep: bool, alias: bool) -> dict[str, Tensor]:
    """All weights of a model by name, whole. Every rank must call it; the dict is filled where
    `keep` is true (rank 0).

    A weight that is not whole on this CPU already is copied to a file in `scratch` and mapped from
    there, so that one weight at a time is in memory; without `alias` so are the others. Weights
    that share memory do so here too.
    """
    reshard(scorer.model)
    if isinstance(body := getattr(scorer.model, scorer.causal_lm.base_model_prefix), Body):
        return whole_of_split(scorer.model, body.shards)
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for i, (name, tensor) in enumerate(scorer.model.state_dict(keep_vars=True).items()):
        if id(tensor) not in seen:
            sharded = isinstance(tensor, DTensor)
            whole = tensor.detach().full_tensor() if sharded else tensor.detach()
            if not keep:
                seen[id(tensor)] = whole.new_empty(0)
            elif alias and not sharded and whole.device.type == "cpu":
                seen[id(tensor)] = whole
            else:
                mapped = torch.from_file(
                    str(scratch / f"{i}"),
                    shared=True,
                    size=max(1, whole.numel()),
                    dtype=whole.dtype,
                )
                seen[id(tensor)] = mapped[: whole.numel()].view(whole.shape).copy_(whole)
            del whole
        state[name] = seen[id(tensor)]
    return state if keep else {}
