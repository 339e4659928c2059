"""Splits the layers of a model over the devices of one process, by the tensor-parallel package."""

import warnings

import torch
from torch import Tensor, nn

from preflab.modeling.blocks import cast
from preflab.modeling.logprobs import Scorer
from utils import ConfigError


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


class Body(nn.Module):
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
    cast(model, dtype)
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
    setattr(model, model.base_model_prefix, Body(shards))
    # transformers finds these by looking for layers that are no longer there.
    model.get_output_embeddings, model.get_input_embeddings = lambda: head, lambda: None


def whole_of_split(model: nn.Module, shards: nn.Module) -> dict[str, Tensor]:
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


def on_first_device(name: str) -> bool:
    """Whether the parameter of this name lives on the first device of its process.

    Names of parts of split layers say the device; every other parameter is on the only one.
    """
    if "_shards." not in name:
        return True
    return ".module_shards.0." in name or name.endswith("flat_shards.0")
