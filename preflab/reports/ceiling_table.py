"""How much of the possible reward the losses of a sweep have reached."""

import math
from collections import defaultdict

import numpy as np

from preflab.reports.ceiling import Ceiling, best_of_n, ceiling
from preflab.reports.runs import Group, Run
from preflab.reports.selection import envelopes
from preflab.reports.tables import Table
from utils import mean_and_error

KLS = (0.25, 0.5, 1.0, 2.0, 4.0)  # nats; columns


def ceiling_table(groups: list[Group], rewards: np.ndarray | None) -> Table | None:
    """The highest possible gain in reward at a KL, and the share of it that each loss has reached;
    None if there are too few samples to estimate it.

    rewards: (prompts, samples) of the reference's samples.
    """
    highest = ceiling(rewards) if rewards is not None else None
    kls = [kl for kl in KLS if highest and highest.at(kl)]
    if not kls:
        return None
    most = [highest.at(kl) for kl in kls]
    rows = [
        ["possible gain", *(f"{gain:.3f} \N{PLUS-MINUS SIGN} {error:.3f}" for gain, error in most)],
        ["samples that count", *(f"{_effective(highest, kl):.0f}" for kl in kls)],
    ]
    families: dict[str, list[Run]] = defaultdict(list)
    for group in groups:
        families[group.family] += group.runs
    rows += [
        [name, *(_share(runs, kl, *at) for kl, at in zip(kls, most, strict=True))]
        for name, runs in families.items()
    ]
    best = ", ".join(
        f"of {n} {gain:.3f} at KL {kl:.2f}" for n, kl, gain in best_of_n(rewards, (2, 4, 8, 16))
    )
    n_prompts, n_samples = rewards.shape
    return Table(
        title=(
            "The highest possible gain over the reference's reward within a KL, and the share of"
            " it that is reached"
        ),
        head=["", *(f"KL {kl:g}" for kl in kls)],
        rows=rows,
        notes=[
            f"Estimated from {n_samples} samples of the reference for each of {n_prompts} prompts;"
            " its standard error is over these prompts, that of a share over these and the seeds.",
            f"Best of n samples: {best}.",
        ],
    )


def _effective(highest: Ceiling, kl: float) -> float:
    return float(np.interp(kl, highest.kls, highest.effective))


def _share(runs: list[Run], kl: float, possible: float, error: float) -> str:
    """The gain of a loss within `kl`, in percent of what is possible there."""
    starts = {str(run.seed): run.latest().get("reference_reward") for run in runs}
    gains = [
        reward - starts[seed]
        for seed, [reward] in envelopes(runs, [kl]).items()
        if reward is not None and starts.get(seed) is not None
    ]
    if not gains:
        return "-"
    gain, over_seeds = mean_and_error(gains)
    text = f"{100 * gain / possible:.0f}%"
    if over_seeds is None:
        return text
    relative = math.hypot(over_seeds, gain * error / possible) / possible
    return f"{text} \N{PLUS-MINUS SIGN} {100 * relative:.0f}"
