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
from preflab.reports.selection import number_on
from preflab.training.best import NUMBERS
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
    sides: dict[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """Means of the loss and of every logged metric over the first `n` examples of the fixed
    evaluation order.

    With several data sets, there are also the means over the examples of each, named
    METRIC@DATASET. sides: the dev and the test examples (`held_out_sides`), whose numbers are named
    `dev/eval_loss` and so on.
    """
    examples = evaluation_order(data.groups)[:n]
    numbers = np.unique(_dataset_numbers(data, examples)).tolist()
    total = Sums()
    by_dataset = {number: Sums() for number in numbers} if len(numbers) > 1 else {}
    by_side = {side: Sums() for side in sides or {}}
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
        batch = collate(data, part, layout, mismatched="mismatched" in loss.reads)
        batch = batch.to(policy.device)
        _, metrics = compute_loss(
            loss, policy, reference, batch, data, "eval", entropy="scalar_head" not in loss.reads
        )
        total.add(metrics, n_real)
        of_example = _dataset_numbers(data, part[:n_real])
        for number, sums in by_dataset.items():
            _add_where(sums, metrics, of_example == number)
        for side, sums in by_side.items():
            _add_where(sums, metrics, np.isin(part[:n_real], sides[side]))
    means = total.flush(world)
    for number, sums in by_dataset.items():
        dataset = data.stores[number].name
        means |= {f"{name}@{dataset}": value for name, value in sums.flush(world).items()}
    for side, sums in by_side.items():
        of_side = sums.flush(world)
        means |= {
            number_on(side, name): of_side[key]
            for name, (key, _) in NUMBERS.items()
            if key in of_side
        }
        means[number_on(side, "examples")] = len(sides[side])
    return means


def _add_where(sums: Sums, metrics: dict[str, torch.Tensor], chosen: np.ndarray) -> None:
    """Add the examples of a batch for which `chosen` is true. metrics: (examples,) by name."""
    rows = np.flatnonzero(chosen)
    of_rows = {
        name: values[torch.from_numpy(rows).to(values.device)] for name, values in metrics.items()
    }
    sums.add(of_rows, len(rows))


def _dataset_numbers(data: PreferenceData, examples: np.ndarray) -> np.ndarray:
    """The position in `data.stores` of the data set of each example."""
    return np.searchsorted(data.begins, examples, side="right") - 1
