"""The optimizer of a run: its class and arguments, checked before a model loads, and the groups of
weights that it gets."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from preflab.modeling.logprobs import Scorer
from preflab.modeling.parallelism import Placement
from preflab.settings.schema import Settings
from preflab.settings.value_types import shown
from preflab.training.muon import MuonAndAdamW, muon_weights
from utils import ConfigError, first_line, load_module, nearest

# Of torch.optim, those that need a closure, or sparse gradients.
UNUSABLE = {"Optimizer", "LBFGS", "SparseAdam"}
BUILT_IN: dict[str, type[Optimizer]] = {
    key: value
    for key, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and key not in UNUSABLE
} | {"Muon": MuonAndAdamW}
# Arguments that choose torch's implementation of a step; a fused one is chosen without them.
IMPLEMENTATIONS = {"foreach", "fused", "differentiable", "capturable"}

# The first parameter of a class that takes names beside weights (Adam-mini), and the parameters
# that such a class may have for sizes of the model, with the keys of its config.
NAMED = "named_parameters"
SIZES = {
    "dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
}

# ----------------------------------------------------------------------------- class and arguments


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of `optimizer=name`: a class of torch.optim, `package.Class`, or
    `path/to/file.py:Class`. Raises ConfigError for anything else."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, separator, cls_name = name.rpartition(":" if ".py:" in name else ".")
    if not separator or module == "torch.optim":
        raise ConfigError(
            f"optimizer={name}; {nearest(cls_name, BUILT_IN)}; or package.Class for another one"
        )
    cls = getattr(load_module(module, "optimizer"), cls_name, None)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ConfigError(
            f"optimizer={name}: {module} has no optimizer {cls_name}, a class derived from"
            " torch.optim.Optimizer"
        )
    if callable(getattr(cls, "train", None)) and callable(getattr(cls, "eval", None)):
        raise ConfigError(
            f"optimizer={name} trains one set of weights and is evaluated with another, by .train()"
            " and .eval(), so that saving a checkpoint would change the run; take AdamW with"
            " lr_schedule=wsd, whose runs can be extended too"
        )
    return cls


def accepted_arguments(cls: type[Optimizer]) -> dict[str, inspect.Parameter] | None:
    """What `optimizer_args` may hold: the parameters of a class but the weights and lr; None where
    it takes any."""
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return {key: p for key, p in list(parameters.items())[1:] if key != "lr"}


def arguments(settings: Settings, cls: type[Optimizer]) -> dict[str, Any]:
    """`optimizer_args`, without weight decay unless they give one. Raises ConfigError for arguments
    that the class does not have."""
    given, accepted = dict(settings.optimizer_args), accepted_arguments(cls)
    if "lr" in given:
        raise ConfigError(
            f"optimizer_args.lr={given['lr']}: the learning rate is a separate setting; say"
            f" lr={given['lr']}"
        )
    unknown = [] if accepted is None else [key for key in given if key not in accepted]
    if unknown:
        raise ConfigError(
            f"optimizer={settings.optimizer} has no argument {', '.join(unknown)};"
            f" {nearest(unknown[0], accepted)}"
        )
    nested = given.get("adamw", {})  # the arguments of the other half of Muon
    of_adamw = accepted_arguments(torch.optim.AdamW)
    if not isinstance(nested, dict) or (wrong := [key for key in nested if key not in of_adamw]):
        raise ConfigError(
            f"optimizer_args.adamw={shown(nested)} are arguments of AdamW:"
            f" {nearest(wrong[0] if isinstance(nested, dict) else '', of_adamw)}"
        )
    decays = "weight_decay" in inspect.signature(cls).parameters
    return ({"weight_decay": 0} if decays else {}) | given


def check_optimizer(settings: Settings, placement: Placement) -> None:
    """Raise ConfigError for an optimizer that does not exist or that this run cannot use.

    It takes a step on a small weight, which shows wrong values of arguments, and whether the state
    can be sharded as weights are.
    """
    name, cls = settings.optimizer, optimizer_class(settings.optimizer)
    if cls is MuonAndAdamW and (placement.splits_layers or _splits_or_offloads(settings)):
        raise ConfigError(
            "optimizer=Muon needs each gradient as a whole matrix on one device, which"
            " TensorParallelTrainer, tensor_parallel_size>1 and fsdp_cpu_offload do not give; take"
            " FSDPTrainer without these, or optimizer=AdamW"
        )
    decays = settings.optimizer_args.get("weight_decay")
    if placement.splits_layers and decays and settings.weight_decay_on == "matrices":
        raise ConfigError(
            f"weight_decay_on=matrices: trainer={settings.trainer} keeps what it cannot split in"
            " pieces without a shape, which would not decay; take weight_decay_on=all, or another"
            " trainer"
        )
    other = [key for key, size in state_shapes(settings).items() if size != (64, 64)]
    if placement.shards_state and other:
        raise ConfigError(
            f"optimizer={name} has state that is not shaped as the weights are ({other[0]}), which"
            f" trainer={settings.trainer} cannot shard; take trainer=BasicTrainer, or AdamW"
        )


def _splits_or_offloads(settings: Settings) -> bool:
    return settings.tensor_parallel_size > 1 or settings.fsdp_cpu_offload


def state_shapes(settings: Settings) -> dict[str, torch.Size]:
    """The shapes of the tensors that the optimizer keeps for a weight (64, 64), by name, without
    scalars. Raises ConfigError where it takes no step on one."""
    cls = optimizer_class(settings.optimizer)
    given = arguments(settings, cls)
    # Another package may have kernels for a GPU only.
    on_gpu = cls not in BUILT_IN.values() and torch.cuda.is_available()
    weight = Parameter(torch.zeros(64, 64, device="cuda" if on_gpu else "cpu"))
    weight.grad = torch.ones_like(weight)
    try:
        optimizer = _build(cls, given, {"weight": weight}, {"weight"}, {"weight"}, settings.lr)
        optimizer.step()
    except Exception as error:  # of many classes, with the same meaning for the user
        raise ConfigError(
            f"optimizer={settings.optimizer} takes no step with optimizer_args={shown(given)}:"
            f" {first_line(error)}"
        ) from error
    state = optimizer.state.get(weight, {})
    return {key: v.shape for key, v in state.items() if isinstance(v, torch.Tensor) and v.ndim}


def state_slots(settings: Settings, model: nn.Module) -> float:
    """Numbers in the optimizer's state for each trained number of a model."""
    slots = sum(shape.numel() for shape in state_shapes(settings).values()) / 64**2
    if optimizer_class(settings.optimizer) is not MuonAndAdamW:
        return slots
    trained = trained_weights(model)
    inside = muon_weights(Scorer(model).causal_lm, trained, matrices(model))
    share = sum(trained[name].numel() for name in inside) / sum(p.numel() for p in trained.values())
    return share * slots + (1 - share) * 2  # both moments of AdamW


# ------------------------------------------------------------------------------------- the weights


def trained_weights(model: nn.Module) -> dict[str, Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def matrices(model: nn.Module) -> set[str]:
    """Names of the weights that decay: those with two dimensions or more that are no embeddings."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = {id(p) for module in embeddings for p in module.parameters(recurse=False)}
    named = model.named_parameters()
    return {name for name, p in named if p.ndim > 1 and id(p) not in tables}


def make_optimizer(settings: Settings, policy: Scorer) -> tuple[Optimizer, list[str]]:
    """The optimizer of the trained weights of a policy, and their names in its order."""
    cls, trained = optimizer_class(settings.optimizer), trained_weights(policy.model)
    all_decay = settings.weight_decay_on == "all"
    optimizer = _build(
        cls,
        _shape_arguments(cls, policy.causal_lm.config) | arguments(settings, cls),
        trained,
        set(trained) if all_decay else matrices(policy.model),
        muon_weights(policy.causal_lm, trained, matrices(policy.model)),
        settings.lr,
    )
    names = {id(p): name for name, p in trained.items()}
    return optimizer, [names[id(p)] for g in optimizer.param_groups for p in g["params"]]


def _shape_arguments(cls: type[Optimizer], config) -> dict[str, int]:
    """The sizes of the model, for a class that takes names of weights and those sizes."""
    parameters = inspect.signature(cls).parameters
    if next(iter(parameters)) != NAMED:
        return {}
    return {
        name: getattr(config, key)
        for name, key in SIZES.items()
        if name in parameters and hasattr(config, key)
    }


def _build(
    cls: type[Optimizer],
    given: Mapping[str, Any],
    trained: Mapping[str, Parameter],
    decayed: set[str],
    hidden: set[str],
    lr: float,
) -> Optimizer:
    """An optimizer over the trained weights. given: its arguments. decayed: names of those that
    decay. hidden: names of those that Muon takes."""
    if next(iter(inspect.signature(cls).parameters)) == NAMED:
        return cls(list(trained.items()), lr=lr, **given)
    if cls is not MuonAndAdamW:
        groups = decay_groups(trained, decayed, given.get("weight_decay", 0))
        return cls(groups, lr=lr, **given, **_fused(cls, given, trained.values()))
    of_muon = {key: value for key, value in given.items() if key != "adamw"}
    of_adamw = {"weight_decay": of_muon["weight_decay"]} | given.get("adamw", {})
    inside = {name: p for name, p in trained.items() if name in hidden}
    others = {name: p for name, p in trained.items() if name not in hidden}
    return cls(
        decay_groups(inside, decayed, of_muon["weight_decay"]),
        lr=lr,
        others=decay_groups(others, decayed, of_adamw["weight_decay"]) if others else [],
        adamw=of_adamw | _fused(torch.optim.AdamW, of_adamw, others.values()),
        **of_muon,
    )


def decay_groups(
    trained: Mapping[str, Parameter], decayed: set[str], weight_decay: float
) -> list[dict]:
    """Groups of weights: those that decay, and those that do not; a single one without decay."""
    if not weight_decay:
        return [{"params": list(trained.values())}]
    groups = [
        {"params": [p for name, p in trained.items() if name in decayed]},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0},
    ]
    return [group for group in groups if group["params"]]


def _fused(
    cls: type[Optimizer], given: Mapping[str, Any], parameters: Iterable[Parameter]
) -> dict[str, bool]:
    """`fused=True` where torch has a fused version: one kernel instead of a dozen."""
    has_fused = cls.__module__.startswith("torch.optim") and (
        "fused" in inspect.signature(cls).parameters
    )
    parameters = list(parameters)
    # Of the fused kernels, only those of Adam and AdamW accept DTensors.
    if any(isinstance(p, DTensor) for p in parameters):
        has_fused &= cls.__name__ in ("Adam", "AdamW")
    # torch before 2.13 has no fused Adagrad on a GPU.
    if cls.__name__ == "Adagrad" and any(p.device.type == "cuda" for p in parameters):
        has_fused = False
    return {"fused": True} if has_fused and not IMPLEMENTATIONS & given.keys() else {}
