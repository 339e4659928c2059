"""Losses on held-out examples."""

import numpy as np
import torch
from tqdm import tqdm

from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.loader import evaluation_order
from preflab.batching.packing import Layout
from preflab.distributed.process_group import ALONE, World
from preflab.modeling.logprobs import Scorer
from preflab.objective.registry import BoundLoss
from preflab.training.compute_loss import compute_loss
from preflab.training.metrics import Sums


@torch.no_grad()
def evaluate_loss(
    loss: BoundLoss,
    policy: Scorer,
    reference: Scorer | None,
    data: PreferenceData,
    *,
    n: int,
    batch_size: int,
    layout: Layout,
    world: World = ALONE,
) -> dict[str, float]:
    """Means of the loss and of every logged metric over the first `n` examples of the fixed
    evaluation order.

    With several data sets, the means over the examples of each are there as well, named
    METRIC@DATASET.
    """
    examples = evaluation_order(data.groups)[:n]
    numbers = np.searchsorted(data.begins, examples, side="right") - 1  # of the data set of each
    total, sums = Sums(), {number: Sums() for number in np.unique(numbers).tolist()}
    parts = list(world.batches(examples, batch_size))
    for part, n_real in tqdm(parts, desc="evaluate", leave=False, delay=1.0, disable=world.no_bar):
        batch = collate(data, part, layout).to(policy.device)
        metrics = compute_loss(loss, policy, reference, batch, data, "eval")[1]
        total.add(metrics, n_real)
        of = np.searchsorted(data.begins, part[:n_real], side="right") - 1
        for number, own in sums.items() if len(sums) > 1 else ():
            mine = torch.from_numpy(np.flatnonzero(of == number)).to(policy.device)
            own.add({name: values[mine] for name, values in metrics.items()}, len(mine))
    means = total.flush(world)
    for number, own in sums.items() if len(sums) > 1 else ():
        means |= {
            f"{name}@{data.stores[number].name}": value for name, value in own.flush(world).items()
        }
    return means
