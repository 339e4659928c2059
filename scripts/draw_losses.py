"""Draw the value and the gradient weight of every loss that depends only on the gap between the two
log-ratios of a pair. The curves are computed by the loss functions themselves.

    python scripts/draw_losses.py docs/losses.png

The settings are those of config/loss/. A loss is drawn if it reads the reference and nothing else,
and if its value stays the same when both log-ratios are shifted; this is tested numerically.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import list_losses  # noqa: F401  registers losses
import losses  # noqa: F401  registers losses
import pair_losses  # noqa: F401  registers losses
import preference_datasets  # noqa: F401  registers the datasets
import token_losses  # noqa: F401  registers losses
from preflab.objective.registry import BoundLoss, bind_loss
from preflab.objective.types import Pair, Side
from preflab.reports.plot_style import png, style
from preflab.settings.keys import CONFIG_DIR
from preflab.settings.refused import errors_in_one_line
from utils import atomic_write, path_argument

GAPS = torch.linspace(-40, 40, 801, dtype=torch.float64)
EXTRA = {"dpo, label_smoothing=0.1": {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=path_argument, help="the PNG file to write")
    path = parser.parse_args().output
    bound = {name: loss for name, loss in bound_losses().items() if depends_on_gap_only(loss)}
    with atomic_write(path, "wb") as f:
        f.write(png(draw(bound)))
    print(f"{path}: {'; '.join(bound)}")


def bound_losses() -> dict[str, BoundLoss]:
    """Every loss of config/loss/, and those of `EXTRA`, by name."""
    configs = {
        path.stem: OmegaConf.to_container(OmegaConf.load(path))
        for path in sorted((CONFIG_DIR / "loss").glob("*.yaml"))
    }
    return {name: bind_loss(config) for name, config in sorted((configs | EXTRA).items())}


def depends_on_gap_only(loss: BoundLoss) -> bool:
    """Whether the loss is the same for other log-ratios with the same gap, and for another
    reference."""
    reads_more = loss.reads != {"reference"} or loss.columns
    if loss.examples != "pairs" or loss.couples_batch or reads_more:
        return False
    others = [values(loss, share, reference=ref) for share, ref in ((0, 0), (0.3, 0), (1, -3))]
    return all(torch.allclose(other, values(loss, 1.0)) for other in others)


def values(
    loss: BoundLoss, share: float, gaps: torch.Tensor = GAPS, reference: float = 0.0
) -> torch.Tensor:
    """The loss at each gap, (gaps,). The chosen response's log-ratio is `share` of the gap, and the
    rejected one's is minus the rest. reference: its log-prob of the chosen response; that of the
    rejected one is 0."""
    zero = torch.zeros_like(gaps)
    chosen = Side(policy_logps=share * gaps + reference, reference_logps=zero + reference)
    rejected = Side(policy_logps=(share - 1) * gaps, reference_logps=zero)
    return loss(Pair(chosen, rejected)).losses


def draw(bound: dict[str, BoundLoss]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    values_axes, weight_axes = figure.subplots(1, 2)
    for i, (name, loss) in enumerate(bound.items()):
        gaps = GAPS.clone().requires_grad_()
        value = values(loss, 1.0, gaps)
        weight = -torch.autograd.grad(value.sum(), gaps)[0]
        scale = weight.abs().mean()
        values_axes.plot(GAPS, (value / scale).detach(), **style(i), linewidth=1.6, label=name)
        weight_axes.plot(GAPS, weight / scale, **style(i), linewidth=1.6)
    values_axes.set(
        title="loss",
        xlabel="gap h of the log-ratios (nats)",
        ylabel="in units of the mean |dL/dh| shown",
        ylim=(-12, 85),
    )
    weight_axes.set(
        title="gradient weight, -dL/dh", xlabel="gap h of the log-ratios (nats)", ylim=(-1.8, 3.2)
    )
    for axes in (values_axes, weight_axes):
        axes.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


if __name__ == "__main__":
    with errors_in_one_line():
        main()
