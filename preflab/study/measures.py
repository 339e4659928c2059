"""The numbers of a study's runs: chosen on dev prompts, read on test prompts."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from preflab.reports.run_files import is_number
from preflab.reports.runs import Run
from preflab.reports.selection import (
    DEV,
    TEST,
    Evaluation,
    best_within,
    chosen_mixture,
    number_on,
    of_mixture,
    sampled_evaluations,
)
from preflab.study.halving import due
from preflab.study.plan import AT_KL, PlannedRun, Study

# {loss: {seed: {prompt: value}}}; a number without prompts has the one prompt "".
Table = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class StudyRun:
    """A planned run and its folder; `run` is None for one that has not begun."""

    planned: PlannedRun
    run: Run | None

    @property
    def state(self) -> str:
        return self.run.state if self.run else "not begun"

    @property
    def evaluations(self) -> list[Evaluation]:
        """Those of a finished run; none where they have no reward and KL of the policy's
        samples."""
        return sampled_evaluations(self.run) if self.run and self.run.finished else []


def load_runs(study: Study) -> list[StudyRun]:
    """The runs of a study as far as they are there. Raises DataError for a damaged file."""
    return [
        StudyRun(planned, Run(folder) if (folder / "config.yaml").is_file() else None)
        for planned in study.runs()
        for folder in [study.runs_dir / planned.name]
    ]


def of_case(runs: Sequence[StudyRun], case: str) -> list[StudyRun]:
    return [run for run in runs if run.planned.case == case]


def table_of_measure(study: Study, runs: Sequence[StudyRun], measure: str) -> Table:
    """A measure of each loss and seed of a case, over all trials of its grid.

    A seed counts once all of its trials of the loss are finished, or stopped by halving, so that
    each loss is the best of as many trials. It has no value where no evaluation is within the KL,
    and where a trial has no evaluations.
    """
    table: Table = {loss: {} for loss in study.arms}
    for (loss, seed), trials in finished_cells(study, runs).items():
        evaluations = [e for trial in trials for e in trial.evaluations]
        if values := _value(study, evaluations, measure):
            table[loss][str(seed)] = values
    return table


def finished_cells(study: Study, runs: Sequence[StudyRun]) -> dict[tuple[str, int], list[StudyRun]]:
    """The trials of each loss and seed of a case of which nothing is left to run."""
    cells: dict[tuple[str, int], list[StudyRun]] = defaultdict(list)
    for run in runs:
        cells[run.planned.loss, run.planned.seed].append(run)
    return {
        key: trials
        for key, trials in cells.items()
        if all(trial.evaluations for trial in trials)
        and not due(study, [trial.planned for trial in trials])
    }


def _value(
    study: Study, evaluations: Sequence[Evaluation], measure: str
) -> dict[str, float] | None:
    if measure.startswith(AT_KL):
        mixture = chosen_mixture(evaluations, float(measure.removeprefix(AT_KL)))
        return of_mixture(mixture, "policy_reward") if mixture else None
    best = best_within(evaluations, study.choose_within_kl)
    if best is None:
        return None
    if measure == "accuracy":
        of_all = best.row.get("rewards_eval/accuracies")  # what runs of earlier versions have
        accuracy = best.row.get(number_on(TEST, "eval_accuracy"), of_all)
        return {"": accuracy} if is_number(accuracy) else None
    return best.of(measure, TEST)


@dataclass(frozen=True)
class Trial:
    """One point of a loss's grid for one seed: its best evaluation within the KL, by dev.

    dev, test: its reward on both sides, and `kl` on test; NaN where none is within the KL. last_kl,
    last_reward: those of its last evaluation, on all prompts.
    """

    loss: str
    trial: str
    seed: int
    dev: float
    test: float
    kl: float
    last_kl: float
    last_reward: float


def trials_of(study: Study, runs: Sequence[StudyRun]) -> list[Trial]:
    """The finished trials of a case that have evaluations."""
    trials = []
    for run in runs:
        evaluations = run.evaluations
        if not evaluations:
            continue
        best = best_within(evaluations, study.choose_within_kl)
        rewards = [best.mean("policy_reward", p) if best else math.nan for p in (DEV, TEST)]
        kl = best.mean("kl", TEST) if best else math.nan
        last = evaluations[-1]
        ends = last.mean("kl"), last.mean("policy_reward")
        planned = run.planned
        trials.append(Trial(planned.loss, planned.trial, planned.seed, *rewards, kl, *ends))
    return trials


def best_of(trials: Sequence[Trial]) -> list[float]:
    """The expected reward on test of the trial that dev chooses among k of n, for k = 1 to n.

    The k are drawn without replacement. With the trials in the order of dev, the i-th is the best
    of the draw with probability C(i - 1, k - 1) / C(n, k). (Dodge et al. 2019 report it with
    replacement and on the prompts that choose.)
    """
    ordered = sorted(trials, key=lambda trial: trial.dev)
    n = len(ordered)
    return [
        math.fsum(math.comb(i, k - 1) * trial.test for i, trial in enumerate(ordered))
        / math.comb(n, k)
        for k in range(1, n + 1)
    ]
