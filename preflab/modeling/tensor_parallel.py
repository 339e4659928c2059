"""Splitting a model's layers over the devices of one process, with the tensor-parallel package."""

import warnings

import torch
from torch import Tensor, nn

from preflab.modeling.blocks import cast
from preflab.modeling.logprobs import Scorer
from preflab.settings.schema import Settings
from utils import ConfigError


def devices_for(config: Settings) -> list[torch.device]:
    """The devices that TensorParallelTrainer splits layers over.

    They are `world_size` GPUs, by default all. Without a GPU they are `world_size` times the CPU,
    once by default. Raises ConfigError when there are fewer GPUs, and for settings that the package
    cannot run.
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
    """A model whose body and head can be called separately.

    The package makes a shard of it for each device and runs the shards in threads.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None):
        super().__init__()
        self.model, self.autocast, self.shard = model, autocast, 0

    def forward(self, **inputs):
        if self.autocast is None:
            return self._forward(**inputs)
        device = next(value for value in inputs.values() if isinstance(value, Tensor)).device
        with torch.autocast(device.type, self.autocast):  # threads do not inherit the caller's
            return self._forward(**inputs)

    def _forward(self, hidden: Tensor | None = None, past_key_values=None, **inputs):
        model = self.model
        if hidden is not None:
            is_scalar = hasattr(model, "score")
            head = model.score if is_scalar else model.get_output_embeddings()
            return head(hidden)
        if past_key_values is not None:
            # Each shard has its own cache; the caller holds the first shard's.
            past_key_values = past_key_values.of_shards[self.shard]
        if isinstance(inputs.get("attention_mask"), _Uncopied):
            inputs["attention_mask"] = inputs["attention_mask"].value
        body = getattr(model, model.base_model_prefix)
        return body(past_key_values=past_key_values, **inputs)


class _Uncopied:
    """Wraps a tensor that every shard gets uncopied.

    The package copies tensors to each device. Segments stay on the CPU, where they are read.
    """

    def __init__(self, value: Tensor):
        self.value = value


class Body(nn.Module):
    """Replaces the body of a model: calls the shards for hidden states."""

    def __init__(self, shards: nn.Module):
        super().__init__()
        self.shards = shards

    def forward(self, input_ids: Tensor, past_key_values=None, **inputs):
        if past_key_values is not None and not hasattr(past_key_values, "of_shards"):
            others = [type(past_key_values)() for _ in self.shards.module_shards[1:]]
            past_key_values.of_shards = [past_key_values, *others]
        if (mask := inputs.get("attention_mask")) is not None and mask.ndim == 4:
            inputs["attention_mask"] = _Uncopied(mask)
        return self.shards(input_ids=input_ids, past_key_values=past_key_values, **inputs)


class _Head(nn.Module):
    """Replaces the head of a model: calls the shards for logits or scores."""

    def __init__(self, shards: nn.Module):
        super().__init__()
        self.shards = shards

    def forward(self, hidden: Tensor) -> Tensor:
        return self.shards(hidden=hidden)


def split(scorer: Scorer, devices: list[torch.device], dtype: torch.dtype) -> None:
    """Split every linear layer and embedding of a model over `devices`, in `dtype`.

    The model keeps its class, so it scores and samples as before; its body and head are replaced by
    the package's. The split follows the package's generic config, because its configs for single
    architectures expect transformers classes of 2023.
    """
    model = scorer.model
    cast(model, dtype)
    scorer.placed_on = devices[0]
    if len(devices) == 1:
        model.to(devices[0])
        return
    # Imported here because it is slow and only this trainer needs it.
    from tensor_parallel import TensorParallel
    from tensor_parallel.autoconfig import get_default_config

    warnings.filterwarnings("ignore", category=FutureWarning, module="tensor_parallel")
    parts = _Parts(model, scorer.autocast)
    shards = TensorParallel(
        parts, devices, tensor_parallel_config=get_default_config(parts, devices), distributed=False
    )
    for i, part in enumerate(shards.module_shards):
        part.shard = i
    # The package keeps what it does not split (norms) in pieces, and gathers them again only when
    # they have changed. A gathered copy cannot be reused after an evaluation, where it has no
    # gradient, nor after a backward pass, which has freed its graph.
    manager = shards.sharding_manager
    shards.register_forward_pre_hook(lambda *_: setattr(manager, "_last_versions", None))
    head = _Head(shards)
    if hasattr(model, "score"):
        model.score = head
    else:
        model.set_output_embeddings(head)
    setattr(model, model.base_model_prefix, Body(shards))
    # transformers would look for layers that are no longer there.
    model.get_output_embeddings, model.get_input_embeddings = lambda: head, lambda: None


def full_weights_of_split(model: nn.Module, shards: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights of a model that `split` has split, by name, on the CPU."""
    from tensor_parallel import save_tensor_parallel

    # A fused optimizer changes weights without raising their version.
    shards.sharding_manager._last_versions = None
    with save_tensor_parallel(shards):
        state = {
            name.removeprefix("model."): tensor.detach().to("cpu", copy=True)
            for name, tensor in shards.state_dict().items()
        }
    # The package returns a tied weight only under its first name.
    return state | {name: state[tied_to] for name, tied_to in model.all_tied_weights_keys.items()}


def on_first_device(name: str) -> bool:
    """Whether the parameter of this name is on the first device of its process.

    In a split model the names contain the device; in any other there is only one device.
    """
    if "_shards." not in name:
        return True
    return ".module_shards.0." in name or name.endswith("flat_shards.0")
