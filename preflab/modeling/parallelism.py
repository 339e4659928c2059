"""What the placement of a model means for the processes of a run."""

import torch

from preflab.distributed.process_group import World
from utils import ConfigError


def local_workers(config) -> int:
    """How many workers of the config's trainer a process on its own should start on this
    machine."""
    if config.trainer != "FSDPTrainer":
        return 1
    return config.world_size or torch.cuda.device_count() or 1


def data_ranks(config, given: World) -> int:
    """How many ranks will see examples of their own. Raises ConfigError for a world the config
    cannot be run in."""
    if config.trainer != "FSDPTrainer":
        if given.size > 1:
            raise ConfigError(
                f"trainer={config.trainer} is one process, and this is rank {given.rank} of"
                f" {given.size}; start one, or take trainer=FSDPTrainer"
            )
        return 1
    if given.size > 1 and config.world_size not in (None, given.local_size):
        raise ConfigError(
            f"world_size={config.world_size}, but {given.local_size} workers were started on this"
            " machine; leave world_size out, or start as many"
        )
    size = given.size if given.size > 1 else local_workers(config)
    if size % config.tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} does not divide the {size} ranks;"
            f" take one of {_divisors(size)}"
        )
    ranks = size // config.tensor_parallel_size
    if config.fsdp_shard_size is not None and ranks % config.fsdp_shard_size:
        raise ConfigError(
            f"fsdp_shard_size={config.fsdp_shard_size} does not divide the {ranks} data-parallel"
            f" ranks (ranks/tensor_parallel_size); take one of {_divisors(ranks)}"
        )
    return ranks


def _divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
