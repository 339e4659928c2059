"""Where a model lives: sharded over ranks (FSDP2), its layers split over ranks (DTensor) or over
devices of one process.

Each takes a built `Scorer` and changes it in place. Nothing here knows a loss, and nothing else
knows how a model is placed: scoring goes through `Scorer.run`, weights come back through
`full_weights`.
"""

import logging
import types
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from distributed import World, join_alone
from logprobs import Scorer
from utils import ConfigError

# -------------------------------------------------------------------------------- over ranks: FSDP2


def shard(scorer: Scorer, world: World, config, dtype: torch.dtype) -> None:
    """Shard a model over the ranks with FSDP2, block by block, in `dtype`; layers are split first
    with tensor_parallel_size.

    The weights may be mapped from files, of another dtype too: a rank converts and copies its own
    part of a block before it touches the next, and never holds the whole model. Gradients come out
    as means over the data ranks.
    """
    join_alone()
    model = scorer.causal_lm
    mesh = _mesh(world, config)
    blocks = find_blocks(model, config.model.block_name)
    if config.tensor_parallel_size > 1:
        _split_layers(model, mesh["peers"])
    half = config.model.fsdp_policy_mp
    options = dict(
        mesh=mesh["replicas", "shards"] if mesh["replicas"].size() > 1 else mesh["shards"],
        mp_policy=MixedPrecisionPolicy(
            param_dtype=getattr(torch, half) if half else None,
            reduce_dtype=torch.float32 if half else None,
        ),
        offload_policy=(
            CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
            if config.fsdp_cpu_offload
            else OffloadPolicy()
        ),
    )
    for block in blocks:
        _cast(block, dtype)
        fully_shard(block, **options)
    _cast(model, dtype)
    # The root holds embeddings, last norm and head. They stay gathered from the forward to the
    # backward pass, in which the chunks of the head are computed again.
    fully_shard(model, reshard_after_forward=False, **options)
    model.enter = types.MethodType(lambda self, function: function(), model)
    register_fsdp_forward_method(model, "enter")
    scorer.enter, scorer.autocast, scorer.placed_on = model.enter, None, world.device
    scorer.mixed = getattr(torch, half) if half else None


def reshard(model: nn.Module) -> None:
    """Drop what a forward pass without a backward pass left gathered; until then the root's
    parameters are not the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _mesh(world: World, config):
    shards = config.fsdp_shard_size or world.data_ranks
    shape = (world.data_ranks // shards, shards, world.peers)
    return init_device_mesh(
        world.device.type, shape, mesh_dim_names=("replicas", "shards", "peers")
    )


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


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to `dtype`; buffers, such as rotary frequencies, keep theirs, and so do parameters
    already sharded."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


STYLES = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_rowwise": None,  # left whole: it saves little, and the head is often tied to it
}


def layer_plan(model: nn.Module, peers: int) -> dict:
    """How to split each linear layer over `peers` ranks, from the plan transformers has for the
    model.

    Raises ConfigError for a model without a plan, with layers or heads that `peers` does not
    divide, or with LoRA.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    plan = getattr(model, "_tp_plan", None) or {}
    unknown = sorted({style for style in plan.values() if style not in STYLES})
    if not plan or unknown:
        why = (
            f"uses {', '.join(unknown)}, which is not known here"
            if unknown
            else "does not exist in transformers"
        )
        raise ConfigError(
            f"tensor_parallel_size={peers}: the plan of {name} {why}; use tensor_parallel_size=1"
            " (FSDP alone) or TensorParallelTrainer"
        )
    if hasattr(model, "peft_config") or any("lora_" in key for key, _ in model.named_parameters()):
        raise ConfigError(
            f"tensor_parallel_size={peers} does not split LoRA adapters; use tensor_parallel_size=1"
            " (FSDP alone), or model.lora.r=0"
        )
    sizes = {
        "attention heads": config.num_attention_heads,
        "key and value heads": getattr(config, "num_key_value_heads", None),
    }
    for what, size in sizes.items():
        if size is not None and size % peers:
            raise ConfigError(
                f"tensor_parallel_size={peers} does not divide the {size} {what} of {name}"
            )
    tied = (
        model.get_output_embeddings() is not None
        and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    return {
        path: STYLES[style]()
        for path, style in plan.items()
        if STYLES[style] is not None and not (tied and style == "colwise_gather_output")
    }


def _split_layers(model: nn.Module, mesh) -> None:
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(
        logging.ERROR
    )  # says that 2-D meshes take two steps
    parallelize_module(model, mesh, layer_plan(model, mesh.size()))


# ----------------------------------------- over devices of one process: the tensor-parallel package


def devices_for(config) -> list[torch.device]:
    """The devices TensorParallelTrainer splits layers over: `world_size` GPUs (by default all), or
    parts of the CPU.

    Raises ConfigError when there are fewer, and for settings that the package cannot run.
    """
    gpus = torch.cuda.device_count()
    n = config.world_size or gpus or 1
    if gpus and n > gpus:
        raise ConfigError(f"world_size={n}, but TensorParallelTrainer finds {gpus} GPUs; lower it")
    if config.activation_checkpointing:
        raise ConfigError(
            "activation_checkpointing=true: TensorParallelTrainer cannot compute a part of a layer"
            " again; leave it out, or use FSDPTrainer"
        )
    if config.compile:
        raise ConfigError(
            "compile=true: TensorParallelTrainer runs layers in threads, which cannot be compiled;"
            " leave it out, or use FSDPTrainer"
        )
    if config.model.lora.r:
        raise ConfigError(
            f"model.lora.r={config.model.lora.r}: TensorParallelTrainer does not split adapters;"
            " use BasicTrainer or FSDPTrainer"
        )
    return [torch.device("cuda", i) if gpus else torch.device("cpu") for i in range(n)]


class _Parts(nn.Module):
    """A language model whose body and head can be called apart. The package runs one such shard a
    device, in threads."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None):
        super().__init__()
        self.model, self.autocast, self.shard = model, autocast, 0

    def forward(self, **inputs):
        if self.autocast is None:
            return self._forward(**inputs)
        device = next(value for value in inputs.values() if isinstance(value, Tensor)).device
        with torch.autocast(device.type, self.autocast):  # the caller's does not reach into threads
            return self._forward(**inputs)

    def _forward(self, hidden: Tensor | None = None, past_key_values=None, **inputs):
        if hidden is not None:
            head = (
                self.model.score
                if hasattr(self.model, "score")
                else self.model.get_output_embeddings()
            )
            return head(hidden)
        if (
            past_key_values is not None
        ):  # each shard keeps a cache of its own; the caller holds that of the first
            past_key_values = past_key_values.of_shards[self.shard]
        if isinstance(inputs.get("attention_mask"), _Whole):
            inputs["attention_mask"] = inputs["attention_mask"].value
        return getattr(self.model, self.model.base_model_prefix)(
            past_key_values=past_key_values, **inputs
        )


class _Whole:
    """What every shard gets as it is: the package copies tensors to GPUs, and cannot from the CPU,
    where segments are read."""

    def __init__(self, value: Tensor):
        self.value = value


class _Body(nn.Module):
    """Stands where the body of a model was."""

    def __init__(self, shards: nn.Module):
        super().__init__()
        self.shards = shards

    def forward(self, input_ids: Tensor, past_key_values=None, **inputs):
        if past_key_values is not None and not hasattr(past_key_values, "of_shards"):
            others = [type(past_key_values)() for _ in self.shards.module_shards[1:]]
            past_key_values.of_shards = [past_key_values, *others]
        if (mask := inputs.get("attention_mask")) is not None and mask.ndim == 4:
            inputs["attention_mask"] = _Whole(mask)
        return self.shards(input_ids=input_ids, past_key_values=past_key_values, **inputs)


class _Head(nn.Module):
    """Stands where the head of a model was."""

    def __init__(self, shards: nn.Module):
        super().__init__()
        self.shards = shards

    def forward(self, hidden: Tensor) -> Tensor:
        return self.shards(hidden=hidden)


def split(scorer: Scorer, devices: list[torch.device], dtype: torch.dtype) -> None:
    """Split every linear layer and embedding of a model over `devices`, with the tensor-parallel
    package's generic config.

    The model keeps its class, so that it scores and samples as before; its body and head are now
    the package's. (Its configs for single architectures expect classes as they were in 2023.)
    """
    model = scorer.model
    _cast(model, dtype)
    scorer.placed_on = devices[0]
    if len(devices) == 1:
        model.to(devices[0])
        return
    from tensor_parallel import (  # slow to import, and for this trainer alone
        TensorParallel,
    )
    from tensor_parallel.autoconfig import get_default_config

    warnings.filterwarnings("ignore", category=FutureWarning, module="tensor_parallel")
    parts = _Parts(model, scorer.autocast)
    shards = TensorParallel(
        parts, devices, tensor_parallel_config=get_default_config(parts, devices), distributed=False
    )
    for i, part in enumerate(shards.module_shards):
        part.shard = i
    # What the package does not split (norms) it keeps in pieces and gathers when they have changed.
    # Gathered without gradient in an evaluation, or with a graph that a backward pass has used up,
    # they must not be taken again.
    manager = shards.sharding_manager
    shards.register_forward_pre_hook(lambda *_: setattr(manager, "_last_versions", None))
    head = _Head(shards)
    if hasattr(model, "score"):
        model.score = head
    else:
        model.set_output_embeddings(head)
    setattr(model, model.base_model_prefix, _Body(shards))
    # transformers finds these by looking for layers that are no longer there.
    model.get_output_embeddings, model.get_input_embeddings = lambda: head, lambda: None


# ---------------------------------------------------------------------------- weights and gradients


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
    if isinstance(body := getattr(scorer.model, scorer.causal_lm.base_model_prefix), _Body):
        return _whole_of_split(scorer.model, body.shards)
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


def _whole_of_split(model: nn.Module, shards: nn.Module) -> dict[str, Tensor]:
    from tensor_parallel import save_tensor_parallel

    shards.sharding_manager._last_versions = (
        None  # a fused optimizer changes weights without counting it as a change
    )
    with save_tensor_parallel(shards):
        state = {
            name.removeprefix("model."): tensor.detach().cpu()
            for name, tensor in shards.state_dict().items()
        }
    # The package puts a tied weight together under its first name alone.
    return state | {name: state[tied_to] for name, tied_to in model.all_tied_weights_keys.items()}
