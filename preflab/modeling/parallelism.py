"""Placements: where the models of a trainer live, and what a run derives from that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from preflab.distributed.process_group import World
from preflab.modeling.logprobs import Scorer
from preflab.settings.schema import Settings
from utils import ConfigError

# The keys of config.yaml that only some placements read, each with the value that means unused.
PLACEMENT_SETTINGS = {
    "world_size": None,
    "tensor_parallel_size": 1,
    "fsdp_shard_size": None,
    "fsdp_cpu_offload": False,
}


@dataclass(frozen=True)
class Placement:
    """Where the models of a trainer live. A trainer declares it on its class.

    Launching, the checks, the memory plan, the reference cache, gradients and checkpoints read this
    record and never compare the name of a trainer.

    one_process_per_device: the run has a process for every device, each with its own examples;
        otherwise it has one process.
    splits_layers: one process splits every layer over its devices.
    shards_state: weights, gradients and optimizer state are DTensors, sharded over the ranks.
    averages_gradients: the backward pass leaves the mean over the ranks in `.grad` (FSDP, DDP);
        otherwise the learner computes it.
    own_mixed_precision: the placement casts weights and inputs itself, and torch.autocast is off.
    settings: keys of PLACEMENT_SETTINGS that this placement reads. The others must not be set.
    """

    one_process_per_device: bool = False
    splits_layers: bool = False
    shards_state: bool = False
    averages_gradients: bool = False
    own_mixed_precision: bool = False
    settings: frozenset[str] = frozenset()

    def peers(self, settings: Settings) -> int:
        """Ranks that hold parts of the same layers and see the same examples."""
        if "tensor_parallel_size" in self.settings:
            return settings.tensor_parallel_size
        return 1


# Puts a model where it will live and changes the scorer in place: place(scorer, dtype).
Place = Callable[[Scorer, torch.dtype], None]


def bind_place(trainer: type, settings: Settings, world: World) -> Place | None:
    """`trainer.place` bound to a run. None: on the GPU if there is one, otherwise the CPU."""
    if trainer.place is None:
        return None
    return functools.partial(trainer.place, settings=settings, world=world)


def check_placement_settings(trainer: type, settings: Settings) -> None:
    """Raise ConfigError for a key that is set and that the trainer's placement does not read."""
    name, placement = trainer.__name__, trainer.placement
    for key, unused in PLACEMENT_SETTINGS.items():
        value = getattr(settings, key)
        if key in placement.settings or value == unused or (key == "world_size" and value == 1):
            continue
        if key == "world_size":
            raise ConfigError(
                f"world_size={value} needs a distributed trainer, and {name} runs in one process;"
                " take trainer=FSDPTrainer, or leave world_size out"
            )
        raise ConfigError(
            f"{key}={value} is for trainer=FSDPTrainer, not {name}; leave it out, or change the"
            " trainer"
        )


def local_workers(trainer: type, settings: Settings) -> int:
    """Number of workers to start on this machine where no launcher has started the ranks."""
    if not trainer.placement.one_process_per_device:
        return 1
    return settings.world_size or torch.cuda.device_count() or 1


def data_ranks(trainer: type, settings: Settings, given: World) -> int:
    """Number of ranks that see different examples.

    given: the ranks that a launcher has started, or one. Raises ConfigError where the settings
    cannot run on them.
    """
    name, placement = trainer.__name__, trainer.placement
    if not placement.one_process_per_device:
        if given.size > 1:
            raise ConfigError(
                f"trainer={name} runs in one process, and this is rank {given.rank} of"
                f" {given.size}; start one, or take trainer=FSDPTrainer"
            )
        return 1
    if given.size > 1 and settings.world_size not in (None, given.local_size):
        raise ConfigError(
            f"world_size={settings.world_size}, but {given.local_size} workers were started on"
            " this machine; leave world_size out, or start as many"
        )
    size = given.size if given.size > 1 else local_workers(trainer, settings)
    peers = placement.peers(settings)
    if size % peers:
        raise ConfigError(
            f"tensor_parallel_size={peers} does not divide the {size} ranks; take one of"
            f" {_divisors(size)}"
        )
    ranks = size // peers
    shards = settings.fsdp_shard_size if "fsdp_shard_size" in placement.settings else None
    if shards is not None and ranks % shards:
        raise ConfigError(
            f"fsdp_shard_size={shards} does not divide the {ranks} data-parallel ranks"
            f" (ranks/tensor_parallel_size); take one of {_divisors(ranks)}"
        )
    return ranks


def _divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
