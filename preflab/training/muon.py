"""Muon for the matrices inside a model, and AdamW for all its other weights, as one optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer


def muon_weights(
    model: nn.Module, trained: Mapping[str, Parameter], matrices: set[str]
) -> set[str]:
    """Names of the weights that Muon takes: matrices, without the head of a language model or of a
    reward model.

    model: without the wrapper of an adapter. matrices: names of weights that are no embeddings.
    """
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    of_heads = {id(p) for head in heads if head is not None for p in head.parameters()}
    return {n for n in matrices & trained.keys() if trained[n].ndim == 2} - {
        n for n, p in trained.items() if id(p) in of_heads
    }


class MuonAndAdamW(Optimizer):
    """Muon (Jordan et al. 2024; arXiv:2502.16982) of torch.optim over `params`, which are groups of
    matrices, and AdamW over `others`.

    adamw: arguments of AdamW. The further arguments are those of torch.optim.Muon. Both have the
    same learning rate, and updates of the same size: adjust_lr_fn is "match_rms_adamw" unless
    given, where torch has "original".
    """

    def __init__(
        self,
        params: list[dict],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw: Mapping[str, Any] | None = None,
        others: list[dict] | None = None,
    ):
        sharded = any(isinstance(p, DTensor) for group in params for p in group["params"])
        muon = (_ShardedMuon if sharded else Muon)(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=tuple(ns_coefficients),
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        self.parts: list[Optimizer] = [muon]
        if others:
            self.parts.append(AdamW(others, lr=lr, **(adamw or {})))
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {p: state for part in self.parts for p, state in part.state.items()}

    def step(self, closure=None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what torch's optimizers load: groups and state by the index of the weight, of all
        parts."""
        first, groups = 0, list(state_dict["param_groups"])
        for part in self.parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            n = sum(len(group["params"]) for group in own)
            part.load_state_dict(
                {
                    "state": {
                        i: v for i, v in state_dict["state"].items() if first <= i < first + n
                    },
                    "param_groups": own,
                }
            )
            first += n


class _ShardedMuon(Muon):
    """Muon over DTensors. Every rank gathers one matrix after the other and takes torch's step on
    the whole of it, so that the update does not depend on the number of ranks.

    torch's own step runs on DTensors too, by products of shards in bfloat16, whose sums depend on
    how many shards there are.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_whole(p, {k: v for k, v in group.items() if k != "params"})

    def _step_whole(self, p: DTensor, settings: dict) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        whole = Parameter(p.full_tensor())
        whole.grad = p.grad.full_tensor()
        muon = Muon([{**settings, "params": [whole]}])
        muon.state[whole]["momentum_buffer"] = state["momentum_buffer"].full_tensor()
        muon.step()
        _write(p, whole.detach())
        _write(state["momentum_buffer"], muon.state[whole]["momentum_buffer"])


def _write(tensor: DTensor, whole: Tensor) -> None:
    """Write this rank's part of a whole tensor, which all ranks have."""
    part = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(part.to_local())
