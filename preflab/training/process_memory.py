"""The memory of a process on a CPU without the tensors of a model: measured, not counted.

Libraries load their code when it first runs, and kernels are compiled for the sizes that they meet:
oneDNN makes one for each width of a row and each length of a text, and keeps it. So the first
microbatches of the run go through a model with one of its layers, forward, backward and an
optimizer step. What then remains in memory, without that model, is the answer.
"""

import ctypes
import gc
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from preflab.batching.packing import Batch
from preflab.modeling.loading import one_layer_model
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.settings.schema import Settings
from preflab.training.optimizers import make_optimizer

VOCABULARY = 512  # of the small model; kernels do not depend on it


def process_bytes(settings: Settings, batches: Sequence[Batch], *, scalar_head: bool) -> int:
    """Resident bytes of this process after `batches` went through a small model and it is gone."""
    _train_one_layer(settings, batches, scalar_head)
    gc.collect()
    _return_free_memory()
    return resident_bytes()


def _train_one_layer(settings: Settings, batches: Sequence[Batch], scalar_head: bool) -> None:
    with torch.random.fork_rng():
        model = one_layer_model(settings.model, VOCABULARY, scalar_head=scalar_head)
    policy = Scorer(model)
    optimizer, _ = make_optimizer(settings, policy)
    for batch in batches:
        ids, targets = batch.input_ids % VOCABULARY, batch.targets % VOCABULARY
        batch = replace(batch, input_ids=ids, targets=targets)
        values = policy.values(batch) if scalar_head else score_responses(policy, batch).logps
        values.sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _return_free_memory() -> None:
    """Give pages that the heap does not use back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Resident memory of this process; its peak so far where the system has no /proc."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
