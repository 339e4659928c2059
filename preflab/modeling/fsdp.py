"""Sharding over ranks with FSDP2, and splitting layers over ranks with DTensor."""

import logging
import types

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from preflab.distributed.process_group import World, join_alone
from preflab.modeling.blocks import cast, find_blocks
from preflab.modeling.logprobs import Scorer
from preflab.settings.schema import Settings
from utils import ConfigError


def shard(scorer: Scorer, world: World, config: Settings, dtype: torch.dtype) -> None:
    """Shard a model over the ranks with FSDP2, block by block, in `dtype`.

    With tensor_parallel_size > 1, each layer is first split over that many ranks. The weights may
    be mapped from files, in any dtype: a rank converts and copies its part of one block after the
    other, and never holds the whole model in memory. Backward passes average gradients over the
    data ranks.
    """
    join_alone()
    model = scorer.causal_lm
    mesh = _mesh(world, config)
    blocks = find_blocks(model, config.model.block_name)
    if config.tensor_parallel_size > 1:
        _split_layers(model, mesh["peers"])
    half = getattr(torch, config.model.fsdp_policy_mp) if config.model.fsdp_policy_mp else None
    offload: OffloadPolicy = OffloadPolicy()
    if config.fsdp_cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    replicates = mesh["replicas"].size() > 1
    options = {
        "mesh": mesh["replicas", "shards"] if replicates else mesh["shards"],
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32 if half else None
        ),
        "offload_policy": offload,
    }
    for block in blocks:
        cast(block, dtype)
        fully_shard(block, **options)
    cast(model, dtype)
    # The root holds the embeddings, the last norm and the head. They stay gathered from the forward
    # to the backward pass, because the backward pass computes chunks of the head again.
    fully_shard(model, reshard_after_forward=False, **options)
    model.enter = types.MethodType(lambda self, function: function(), model)
    register_fsdp_forward_method(model, "enter")
    scorer.enter, scorer.autocast, scorer.placed_on = model.enter, None, world.device
    scorer.mixed = half


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward pass without a backward pass has gathered.

    Until then the root's parameters are the gathered ones, not the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _mesh(world: World, config: Settings):
    shards = config.fsdp_shard_size or world.data_ranks
    shape = (world.data_ranks // shards, shards, world.peers)
    return init_device_mesh(
        world.device.type, shape, mesh_dim_names=("replicas", "shards", "peers")
    )


STYLES = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_rowwise": None,  # not split: it saves little, and the head is often tied to it
}


def layer_plan(model: nn.Module, peers: int) -> dict:
    """How to split each linear layer over `peers` ranks, by the transformers plan of the model.

    Raises ConfigError for a model without a plan, with heads that `peers` does not divide, or with
    LoRA.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    plan = getattr(model, "_tp_plan", None) or {}
    unknown = sorted({style for style in plan.values() if style not in STYLES})
    if not plan or unknown:
        problem = "does not exist in transformers"
        if unknown:
            problem = f"uses {', '.join(unknown)}, which is not supported here"
        raise ConfigError(
            f"tensor_parallel_size={peers}: the plan of {name} {problem}; use"
            " tensor_parallel_size=1 (FSDP alone) or TensorParallelTrainer"
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
    for heads, size in sizes.items():
        if size is not None and size % peers:
            raise ConfigError(
                f"tensor_parallel_size={peers} does not divide the {size} {heads} of {name}"
            )
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    unsplit = {"embedding_rowwise"} | ({"colwise_gather_output"} if is_tied else set())
    return {path: STYLES[style]() for path, style in plan.items() if style not in unsplit}


def _split_layers(model: nn.Module, mesh) -> None:
    # It warns that redistribution over a 2-D mesh takes two steps.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    parallelize_module(model, mesh, layer_plan(model, mesh.size()))
