"""Fits of over-optimisation for the losses of a sweep, as a table and as curves."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from preflab.reports.overoptimization import BEST_OF_N, TRAINED, Fit, Points, fit
from preflab.reports.run_files import is_number
from preflab.reports.runs import Group, Run
from preflab.reports.selection import gain_of, sampled_evaluations
from preflab.reports.statistics import Estimate
from preflab.reports.tables import Table
from utils import mean_and_error

HEAD = (
    *("", "reward", "a", "b", "gain at KL", "slope there", "peak at KL", "gain there"),
    *("error", "error of d (a - b d)"),
)
NOTES = (
    "gain: reward over the reference's samples, of all evaluations at all settings of a loss."
    " Mean [95% interval]; error: root mean square over the evaluations.",
    "peak: where the fit is highest, as far as the evaluations reach; its interval is open towards"
    " KLs where the slope is not known to be above, or below, 0. Without b above 0 there is none.",
)


def fits_of(runs: Sequence[Run]) -> dict[str, list[Points]]:
    """{reward: the points of each seed} of the runs of a loss.

    Rewards of samples have their own names. Online runs also have the rounds' means of the gold
    reward and of the scores that labelled, the proxy, over those of the first round.
    """
    seeds: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        seeds[str(run.seed)].append(run)
    by_reward: dict[str, list[Points]] = defaultdict(list)
    for of_seed in seeds.values():
        for reward, points in (_of_samples(of_seed) | _of_rounds(of_seed)).items():
            by_reward[reward].append(points)
    return {reward: of for reward, of in by_reward.items() if len(of) == len(seeds)}


def _of_samples(runs: Sequence[Run]) -> dict[str, Points]:
    evaluations = [e for run in runs for e in sampled_evaluations(run)]
    points = {}
    for reward in _rewards(runs):
        of_evaluations = [e.of(gain_of(reward)) for e in evaluations]
        prompts = {tuple(sorted(gains)) for gains in of_evaluations}
        if len(prompts) == 1 and prompts != {()}:
            [shared] = prompts
            gains = np.array([[of[prompt] for prompt in shared] for of in of_evaluations])
            kls = np.array([e.mean("kl") for e in evaluations])
            points[reward] = Points(kls, gains, shared)
    return points


def _rewards(runs: Sequence[Run]) -> list[str]:
    """The names of the rewards of samples; frontiers show the first."""
    row = next((row for run in runs for row in run.samples()), {})
    return list(row.get("policy_reward") or {})


ROUNDS = {"gold, by rounds": "online/gold_reward", "labels, by rounds": "online/label_score"}


def _of_rounds(runs: Sequence[Run]) -> dict[str, Points]:
    """Of online runs whose labels are not the gold itself."""
    columns: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        needed = ("online/kl", *ROUNDS.values())
        rows = [row for row in run.rows if all(is_number(row.get(key)) for key in needed)]
        is_proxy = any(row["online/gold_reward"] != row["online/label_score"] for row in rows)
        if not is_proxy or run.rollout_sampler():
            return {}
        for name, key in ROUNDS.items():
            columns[name] += [(row["online/kl"], row[key] - rows[0][key]) for row in rows]
    points = {name: np.array(pairs) for name, pairs in columns.items()}
    return {name: Points(pairs[:, 0], pairs[:, 1:]) for name, pairs in points.items()}


def fitted_curves(families: dict[str, list[Run]]) -> dict[str, tuple[float, Fit]]:
    """{loss: (reward of the start, fit)} of the first reward, which frontiers show."""
    curves = {}
    for name, runs in families.items():
        starts = [run.latest().get("reference_reward") for run in runs]
        first = _rewards(runs)[:1]
        points = fits_of(runs).get(first[0], []) if first else []
        if (fitted := fit(TRAINED, points)) and all(map(is_number, starts)):
            curves[name] = mean_and_error(starts)[0], fitted
    return curves


def overoptimization_table(groups: Sequence[Group]) -> Table | None:
    """A row for each loss and reward; None where no loss has evaluations enough.

    Several rewards of one loss stand below one another: of two that measure the same, the one that
    was learned from is the proxy, and rises on where the gold falls.
    """
    families: dict[str, list[Run]] = defaultdict(list)
    for group in groups:
        families[group.family] += group.runs
    rows, over = [], set()
    for name, runs in families.items():
        for reward, points in fits_of(runs).items():
            if fitted := fit(TRAINED, points):
                rows.append([name, reward, *_cells(fitted, fit(BEST_OF_N, points))])
                over.add(fitted.estimates()[0].over)
    if not rows:
        return None
    spans = " or ".join(sorted(over - {""})) or "nothing: there is one seed"
    return Table(
        title="Over-optimisation: the gain as d (a - b log d), d = sqrt(KL)",
        head=HEAD,
        rows=rows,
        notes=[*NOTES, f"Intervals are over {spans}."],
    )


def _cells(fitted: Fit, other: Fit) -> list[str]:
    a, b = fitted.estimates()
    at_end = float(fitted.gain(fitted.high))
    peak = fitted.peak
    is_inside = peak is not None and fitted.low <= peak <= fitted.high
    return [
        _number(a),
        _number(b),
        f"{at_end:.3f} at {fitted.high:.2f}",
        _number(fitted.slope(fitted.high)),
        peak_text(fitted),
        f"{float(fitted.gain(peak)):.3f}" if is_inside else "-",
        f"{fitted.error:.3f}",
        f"{other.error:.3f}",
    ]


def _number(of: Estimate) -> str:
    interval = "" if of.low is None else f" [{of.low:.2f}, {of.high:.2f}]"
    return f"{of.mean:.2f}{interval}"


def peak_text(fitted: Fit) -> str:
    """Where the peak is, without a number where nothing was measured."""
    peak = fitted.peak
    if peak is None:
        return "none: b is not above 0"
    below, beyond = f"below {fitted.low:.2g}", f"beyond {fitted.high:.2f}"
    point = below if peak < fitted.low else beyond if peak > fitted.high else f"{peak:.2f}"
    interval = fitted.peak_interval()
    if interval is None:
        return f"{point} (no interval)"
    low, high = interval
    if low is None and high is None:
        return f"{point} [not known]"
    if low is not None and low >= fitted.high:
        return f"{beyond} (95%)"
    if high is not None and high <= fitted.low:
        return f"{below} (95%)"
    low_text = below if low is None else f"{low:.2f}"
    return f"{point} [{low_text}, {beyond if high is None else f'{high:.2f}'}]"
