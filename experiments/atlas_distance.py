"""Does the atlas at the start rank how far apart the losses end?

    python experiments/atlas_distance.py runs/study/losses [--case CASE | --partial]

Takes the folder of a finished study, and for each case and seed the trial in the middle of each
loss's grid. The claim and the criterion are in claims.py and were written before any result.

* Atlas distance of two losses: 1 - cosine of their updates (docs/atlas.md) at the model that the
  runs start from, on the 64 pairs that training with this seed begins with.
* End distance: 1 - cosine of the displacements of the two trained policies. The displacement of a
  policy is the vector of log pi(y | x) - log pi_start(y | x) over both responses of 400 held-out
  pairs. Like the atlas it does not know how far a policy went, which beta and the length of a run
  decide, and differences of betas between losses mean nothing. The responses are samples of the
  start, so that inner products of displacements are those of log-ratios under it. They are not
  centred: whether both responses fall together is what distinguishes some losses.

Spearman's rho is over all pairs of losses that have both distances; distances are rounded to 1e-6,
so that equal ones are tied. Shown beside it, without a criterion: rho over the distances from the
baseline alone; rho with an atlas at the end of the baseline's run; how well the end distances of
one seed rank those of the other seeds on average, which no predictor can be expected to exceed; and
the end distance of the baseline from itself with another seed.

Writes experiments/results/atlas_distance.json and .png, and the verdict into experiments/README.md.
With --partial, runs may be missing, and the result goes into the study's folder alone. With --case,
only this case is looked at. A case that falls short decides, because the criterion is about each;
one that does not decides nothing, and its result goes into the study's folder too.
"""

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.claims import LEAST_RHO
from experiments.verdict_page import write_results
from preflab.atlas.measure import Pairs, pairs_of
from preflab.batching.collate import collate
from preflab.batching.loader import evaluation_order
from preflab.batching.packing import Layout
from preflab.checks import check_settings
from preflab.execution import execute, load_inputs, register_built_in
from preflab.modeling.loading import build_policy
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.reports.atlas import ROWS
from preflab.reports.plot_style import COLOR_CYCLE, label_axes, new_axes, png
from preflab.reports.run_files import read_jsonl
from preflab.reports.statistics import over_seeds
from preflab.settings.compose import compose
from preflab.settings.load import validate
from preflab.settings.values import changed
from preflab.study.measures import StudyRun, load_runs
from preflab.study.plan import Study, read_study
from utils import ConfigError, PrefLabError, atomic_write

TRAIN_PAIRS, HELD_OUT_PAIRS = 64, 400
DIGITS = 6  # of a distance; the rest is rounding error of the cosines
FEWEST_LOSSES = 4
MOST_NAMED = 12  # runs and losses that the text says are left out; the JSON has all
BATCH = 400  # responses that are scored at a time
NAME = "atlas_distance"


@dataclass(frozen=True)
class Distances:
    """Of one case and seed. losses: those with all distances, the baseline first. start, trained,
    end: (losses, losses), by the atlas at the start and at the end of the baseline's run, and of
    the trained policies. again: end distance of the baseline from itself with another seed."""

    losses: list[str]
    start: np.ndarray
    trained: np.ndarray
    end: np.ndarray
    again: float | None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a study, with its runs")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--partial", action="store_true", help="although runs are missing")
    some.add_argument("--case", help="the one case whose runs have ended")
    arguments = parser.parse_args()
    try:
        study = study_in(arguments.folder.resolve())
        open_cases = [case for case in study.cases if arguments.case not in (None, case)]
        study = study if arguments.case is None else study.with_only(arguments.case)
        result, figure = answer(study, partial=arguments.partial)
    except (PrefLabError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    verdict = "holds" if result["holds"] else "does not hold"
    if open_cases:
        result["found"] += f" Not run: {', '.join(open_cases)}."
    print(f"{NAME}: {verdict} here\n{result['found']}")
    if arguments.partial or (open_cases and result["holds"]):
        with atomic_write(arguments.folder / f"{NAME}.json") as f:
            json.dump(result, f, indent=1)
        with atomic_write(arguments.folder / f"{NAME}.png", "wb") as f:
            f.write(png(figure))
    else:
        write_results(NAME, result, {NAME: figure})


def answer(study: Study, *, partial: bool) -> tuple[dict, Figure]:
    """The result and its picture. Raises ConfigError where a middle trial has not ended, unless
    `partial`; one that failed, or left a policy that is not finite, is left out and named."""
    folder = study.work
    register_built_in()
    middle = [run for run in load_runs(study) if run.planned.trial == middle_trial(study, run)]
    missing = [run for run in middle if run.state != "finished"]
    left_out = {run.planned.name: run.state for run in missing}
    if waiting := [run for run in missing if not run.state.startswith("failed")]:
        names = ", ".join(run.planned.name for run in waiting[:5])
        if not partial:
            raise ConfigError(
                f"{folder}: {len(waiting)} middle trials have not ended, such as {names}; finish"
                " the study, or give --partial for a result that is not written here"
            )
    by_case: dict[str, dict[str, Distances]] = {case: {} for case in study.cases}
    for case, seed in itertools.product(study.cases, study.seeds):
        of_cell = {
            run.planned.loss: run
            for run in middle
            if (run.planned.case, run.planned.seed) == (case, seed) and run.state == "finished"
        }
        if study.baseline in of_cell and len(of_cell) >= FEWEST_LOSSES:
            distances = distances_of(study, of_cell, folder / "atlas" / f"{case}-{seed}", left_out)
            if len(distances.losses) >= FEWEST_LOSSES:
                by_case[case][str(seed)] = distances
    by_case = {case: of for case, of in by_case.items() if of}
    if not by_case:
        raise ConfigError(f"{folder}: no case and seed has {FEWEST_LOSSES} losses with distances")
    cases = {case: numbers_of(of) for case, of in by_case.items()}
    result = {
        "holds": holds(cases, study),
        "found": text_of(cases, study.baseline, left_out),
        "seeds": study.seeds,
        "cases": cases,
        "left_out": left_out,
    }
    return result, picture(cases, study.baseline)


def holds(cases: Mapping[str, dict], study: Study) -> bool:
    """The criterion; a case without a rho does not meet it."""
    rhos = [cases[case]["start"]["mean"] if case in cases else None for case in study.cases]
    return all(rho is not None and rho >= LEAST_RHO for rho in rhos)


def study_in(folder: Path) -> Study:
    """The study of a folder, by the newest copy of its file."""
    copies = sorted(folder.glob("study*.yaml"), key=lambda path: (len(path.name), path.name))
    if not copies:
        raise ConfigError(f"{folder}: no study.yaml there; give the folder of a study")
    return replace(read_study(str(copies[-1])), work=folder)


def middle_trial(study: Study, run: StudyRun) -> str:
    trials = list(study.arms[run.planned.loss].trials)
    return trials[(len(trials) - 1) // 2]


# ---------------------------------------------------------------------------------------- distances


def distances_of(
    study: Study, runs: Mapping[str, StudyRun], folder: Path, left_out: dict[str, str]
) -> Distances:
    """Of the finished middle trials of a case and seed, by loss. folder: for the atlas. left_out:
    gets the losses that the atlas does not support, and policies that are not finite."""
    again = [loss for loss in runs if study.arms[loss].seed_offset]
    losses = [study.baseline, *(x for x in runs if x != study.baseline and x not in again)]
    atlas = atlas_rows(study, [runs[loss] for loss in losses], folder)
    left_out |= {f"{loss} (no atlas)": reason for loss, reason in atlas[0]["left_out"].items()}
    moved = displacements(study, [runs[loss] for loss in [*losses, *again]])
    for loss in list(moved):
        if not np.isfinite(moved[loss]).all() or not moved[loss].any():
            left_out[runs[loss].planned.name] = "its policy is not finite, or has not moved"
            del moved[loss]
    cosines = [_cosines_by_label(row) for row in atlas]
    shown = [loss for loss in losses if loss in moved and all(loss in of for of in cosines)]
    start, trained = (np.array([[1 - of[a][b] for b in shown] for a in shown]) for of in cosines)
    end = cosine_distances(np.array([moved[loss] for loss in shown]))
    itself = [moved[loss] for loss in (study.baseline, *again) if loss in moved]
    same = cosine_distances(np.array(itself[:2]))[0, -1] if len(itself) > 1 else None
    return Distances(shown, start, trained, end, same)


def atlas_rows(study: Study, runs: Sequence[StudyRun], folder: Path) -> list[dict]:
    """The rows of atlas.jsonl at the start and at the end of the first run, which is the
    baseline's."""
    losses = [_entry(run) for run in runs[1:]]
    rows = []
    for name, archive in (("start", None), ("trained", runs[0].run.folder / "LATEST")):
        where = folder / name
        shutil.rmtree(where, ignore_errors=True)  # of fewer losses, or of other runs
        overrides = [*runs[0].planned.overrides, "function=atlas", f"atlas.pairs={TRAIN_PAIRS}"]
        config = compose([*overrides, f"local_run_dir='{where}'"], study.config_dir)
        config.model.archive = archive and str(archive)
        config.atlas.losses = losses
        execute(config, where)
        rows.append(read_jsonl(where / ROWS)[-1])
    return rows


def _entry(run: StudyRun) -> dict:
    """The loss of a run with all of its settings, as an entry of `atlas.losses`."""
    return {**run.run.config["loss"], "as": run.planned.loss}


def _cosines_by_label(row: dict) -> dict[str, dict[str, float]]:
    """The cosines between the losses of an atlas that have a gradient, by their labels."""
    labels = [update["loss"] for update in row["updates"]]
    table = {
        a: dict(zip(labels, line, strict=True))
        for a, line in zip(labels, row["cosines"], strict=True)
    }
    return {a: of for a, of in table.items() if of[a] is not None}


@torch.no_grad()
def displacements(study: Study, runs: Sequence[StudyRun]) -> dict[str, np.ndarray]:
    """log pi(y | x) - log pi_start(y | x) over the held-out responses, (responses,), of the trained
    policy of each run, by loss. The runs have the same start and the same data."""
    settings = validate(compose(runs[0].planned.overrides, study.config_dir))
    loss, sources = check_settings(settings)
    inputs = load_inputs(settings, sources, loss)
    data = inputs.data["test"]
    pairs = pairs_of(data, evaluation_order(data.groups)[:HELD_OUT_PAIRS])
    layout = Layout("padded", pad_id=inputs.tokenizer.pad_token_id)
    start = log_probs(build_policy(settings.model), pairs, layout)
    moved = {}
    for run in runs:
        model = changed(settings.model, name_or_path=str(run.run.folder / "LATEST" / "hf"))
        moved[run.planned.loss] = log_probs(build_policy(model), pairs, layout) - start
    return moved


def log_probs(policy: Scorer, pairs: Pairs, layout: Layout) -> np.ndarray:
    """Log-probs of the distinct responses of some pairs, (responses,) float64, in nats."""
    parts = [
        score_responses(
            policy,
            collate(pairs.singles, np.array(pairs.responses[i : i + BATCH]), layout).to(
                policy.device
            ),
        ).logps
        for i in range(0, len(pairs.responses), BATCH)
    ]
    return torch.cat(parts).double().cpu().numpy()


def cosine_distances(rows: np.ndarray) -> np.ndarray:
    """1 - cosine of all rows (n, values), (n, n)."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return 1 - unit @ unit.T


# ------------------------------------------------------------------------------------- correlations


def mid_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; those of equal values are their mean. Values are rounded to `DIGITS`."""
    _, place, counts = np.unique(np.round(values, DIGITS), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rho of two vectors, with mean ranks for ties; None where one is constant."""
    ranks = np.array([mid_ranks(a), mid_ranks(b)])
    if (ranks.std(axis=1) == 0).any():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def pairs_in(table: np.ndarray) -> np.ndarray:
    """The values of a symmetric table (n, n) above its diagonal."""
    return table[np.triu_indices(len(table), 1)]


def numbers_of(by_seed: Mapping[str, Distances]) -> dict:
    """The correlations of a case: each seed, and their mean with its 95% t interval over seeds."""
    rhos = {
        "start": lambda of: spearman(pairs_in(of.start), pairs_in(of.end)),
        "start, from the baseline": lambda of: spearman(of.start[0, 1:], of.end[0, 1:]),
        "trained": lambda of: spearman(pairs_in(of.trained), pairs_in(of.end)),
        "trained, from the baseline": lambda of: spearman(of.trained[0, 1:], of.end[0, 1:]),
    }
    numbers = {
        name: _over_seeds({seed: rho(of) for seed, of in by_seed.items()})
        for name, rho in rhos.items()
    }
    numbers["other seeds"] = _over_seeds(_reliability(by_seed))
    numbers["baseline again"] = _over_seeds({seed: of.again for seed, of in by_seed.items()})
    numbers["end, median"] = _over_seeds(
        {seed: float(np.median(pairs_in(of.end))) for seed, of in by_seed.items()}
    )
    tied = [float((np.round(pairs_in(of.start), DIGITS) == 0).mean()) for of in by_seed.values()]
    return numbers | {
        "losses": {seed: len(of.losses) for seed, of in by_seed.items()},
        "tied at the start": float(np.mean(tied)),
        "from_baseline": _from_baseline(by_seed),
    }


def _over_seeds(values: Mapping[str, float | None]) -> dict:
    """{mean, low, high, by_seed}; None where no seed has a value."""
    known = {seed: value for seed, value in values.items() if value is not None}
    of = over_seeds(known.values())
    return {key: of and getattr(of, key) for key in ("mean", "low", "high")} | {"by_seed": known}


def _reliability(by_seed: Mapping[str, Distances]) -> dict[str, float | None]:
    """How the end distances of a seed rank the means of the other seeds', over losses of all."""
    if len(by_seed) < 2:
        return {}
    tables = _shared(by_seed, "end")[1]
    return {
        seed: spearman(
            pairs_in(table),
            pairs_in(np.mean([other for s, other in tables.items() if s != seed], axis=0)),
        )
        for seed, table in tables.items()
    }


def _shared(
    by_seed: Mapping[str, Distances], which: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The losses that all seeds have, and the distances between them of each seed."""
    first, *others = by_seed.values()
    losses = [loss for loss in first.losses if all(loss in of.losses for of in others)]
    places = {seed: [of.losses.index(x) for x in losses] for seed, of in by_seed.items()}
    return losses, {
        seed: getattr(of, which)[np.ix_(places[seed], places[seed])] for seed, of in by_seed.items()
    }


def _from_baseline(by_seed: Mapping[str, Distances]) -> dict[str, dict[str, float]]:
    """Both distances of each loss from the baseline, means over the seeds that have it."""
    found: dict[str, dict[str, list]] = {}
    for of in by_seed.values():
        for i, loss in enumerate(of.losses[1:], 1):
            for which in ("start", "trained", "end"):
                value = getattr(of, which)[0, i]
                found.setdefault(loss, {}).setdefault(which, []).append(value)
    return {
        loss: {which: round(float(np.mean(values)), DIGITS) for which, values in of.items()}
        for loss, of in found.items()
    }


# --------------------------------------------------------------------------------- text and picture


def text_of(cases: Mapping[str, dict], baseline: str, left_out: Mapping[str, str]) -> str:
    parts = []
    for case, of in cases.items():
        counts = sorted(set(of["losses"].values()))
        n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        parts.append(
            f"{case} ({n} losses): rho {_number(of['start'])}, from {baseline} alone"
            f" {_number(of['start, from the baseline'])}; with an atlas at the end of {baseline}'s"
            f" run {_number(of['trained'])} and {_number(of['trained, from the baseline'])}; the"
            f" end distances of other seeds {_number(of['other seeds'])}. At the start"
            f" {of['tied at the start']:.0%} of the pairs are at distance 0; at the end the median"
            f" is {of['end, median']['mean']:.3f}, and {baseline} with another seed is at"
            f" {_number(of['baseline again'], 4)} from itself."
        )
    text = "Spearman's rho of the distances, mean over seeds [95% interval]: " + " ".join(parts)
    if left_out:
        named = [f"{name}: {reason}" for name, reason in left_out.items()]
        more = len(named) - MOST_NAMED
        text += f" Left out: {'; '.join(named[:MOST_NAMED])}{f'; and {more} more' * (more > 0)}."
    return text


def _number(of: dict, digits: int = 2) -> str:
    if not of["by_seed"]:
        return "-"
    ends = "" if of["low"] is None else f" [{of['low']:.{digits}f}, {of['high']:.{digits}f}]"
    return f"{of['mean']:.{digits}f}{ends}"


def picture(cases: Mapping[str, dict], baseline: str) -> Figure:
    """End distance of each loss from the baseline against atlas distance, at the start and at the
    end of the baseline's run, a row for each case: means over seeds. Distances below the rounding
    of the results are drawn there."""
    figure = Figure(figsize=(12, 5.4 * len(cases)), layout="constrained")
    axes = iter(new_axes(figure, len(cases), 2))
    for case, of in cases.items():
        found = of["from_baseline"]
        for which, when in (("start", "the start"), ("trained", f"the end of {baseline}'s run")):
            ax = next(axes)
            points = {
                loss: [max(d[key], 10.0**-DIGITS) for key in (which, "end")]
                for loss, d in found.items()
            }
            for i, (loss, place) in enumerate(sorted(points.items(), key=lambda item: item[1])):
                ax.plot(*place, "o", ms=4, color=COLOR_CYCLE[0])
                side = (
                    {"xytext": (4, 1), "ha": "left"}
                    if i % 2
                    else {"xytext": (-4, 1), "ha": "right"}
                )
                ax.annotate(loss, place, textcoords="offset points", fontsize=6, **side)
            ax.margins(x=0.12)
            ax.set_xscale("log")
            ax.set_yscale("log")
            label_axes(ax, f"{case}: from {baseline}", f"atlas distance at {when}", "end distance")
    return figure


if __name__ == "__main__":
    main()
