"""Loss and metrics on held-out examples."""

import numpy as np
import torch

from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.loader import evaluation_order
from preflab.batching.packing import Layout
from preflab.distributed.process_group import ALONE, World
from preflab.modeling.logprobs import Scorer
from preflab.objective.registry import BoundLoss
from preflab.training.compute_loss import compute_loss
from preflab.training.metrics import Sums
from utils import Progress


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

    With several data sets, there are also the means over the examples of each, named
    METRIC@DATASET.
    """
    examples = evaluation_order(data.groups)[:n]
    numbers = np.unique(_dataset_numbers(data, examples)).tolist()
    total = Sums()
    by_dataset = {number: Sums() for number in numbers} if len(numbers) > 1 else {}
    batches = Progress(
        world.batches(examples, batch_size),
        total=-(-world.largest_share(len(examples)) // batch_size),
        desc="evaluate",
        leave=False,
        delay=1.0,
        disable=world.no_bar,
    )
    for part, n_real in batches:
        world.stop_if_asked()
        batch = collate(data, part, layout).to(policy.device)
        _, metrics = compute_loss(
            loss, policy, reference, batch, data, "eval", entropy="scalar_head" not in loss.reads
        )
        total.add(metrics, n_real)
        of_example = _dataset_numbers(data, part[:n_real])
        for number, sums in by_dataset.items():
            rows = torch.from_numpy(np.flatnonzero(of_example == number)).to(policy.device)
            sums.add({name: values[rows] for name, values in metrics.items()}, len(rows))
    means = total.flush(world)
    for number, sums in by_dataset.items():
        dataset = data.stores[number].name
        means |= {f"{name}@{dataset}": value for name, value in sums.flush(world).items()}
    return means


def _dataset_numbers(data: PreferenceData, examples: np.ndarray) -> np.ndarray:
    """The position in `data.stores` of the data set of each example."""
    return np.searchsorted(data.begins, examples, side="right") - 1
