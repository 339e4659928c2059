"""Checks of function=atlas, before a model loads, and the choice of a sketch."""

from collections.abc import Sequence

from torch import nn

from preflab.atlas.entries import entries_of
from preflab.atlas.measure import has_own_gradient
from preflab.modeling.parallelism import Placement
from preflab.objective.registry import BoundLoss
from preflab.settings.schema import Settings
from utils import ConfigError

# Whole gradients are kept up to this many bytes, and beyond it sketches of SKETCH numbers.
LARGEST, SKETCH = 2 * 2**30, 4096
MORE_ROWS = 16  # gradients beside those of the responses, about as many as losses of tokens


def check_atlas(settings: Settings, loss: BoundLoss, placement: Placement, ranks: int) -> None:
    """Raise ConfigError for settings of an atlas that do not go together."""
    if placement.one_process_per_device or placement.splits_layers or ranks > 1:
        raise ConfigError(
            f"function=atlas runs in one process, and trainer={settings.trainer} is for several"
            " or splits layers; take trainer=BasicTrainer and start one"
        )
    if loss.examples != "pairs" or "scalar_head" in loss.reads:
        what = "a scalar head" if "scalar_head" in loss.reads else loss.examples
        raise ConfigError(
            f"function=atlas compares losses with loss={loss.name}, which is one of {what}; take a"
            " loss of pairs and log-probs, such as loss=dpo"
        )
    if loss.calibration:
        raise ConfigError(
            "function=atlas: loss.calibration=true rebalances gradients by the norms of training"
            " steps, which an atlas does not take; set it to false"
        )
    if loss.couples_batch and has_own_gradient(loss):
        raise ConfigError(
            f"function=atlas: loss={loss.name} couples the pairs of a batch through more than the"
            " log-probs of responses; compare with another loss"
        )
    entries_of(settings, loss)


def sketch_of(settings: Settings, parameters: Sequence[nn.Parameter]) -> int | None:
    """Numbers of a row: None for whole gradients."""
    if settings.atlas.sketch != "auto":
        return settings.atlas.sketch or None
    rows = 2 * settings.atlas.pairs + MORE_ROWS
    n_bytes = rows * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return None if n_bytes <= LARGEST else SKETCH
