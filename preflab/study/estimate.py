"""What a study will take, before it runs: every run composed once, and the time of those so far."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from preflab.study.plan import PlannedRun, Study
from preflab.study.work import compose_run, missing, read_log
from utils import Progress


def describe_plan(study: Study, n_jobs: int = 2) -> str:
    """Counts and times of a study, in some lines, after a check of its settings.

    The settings of each loss, trial and case are composed as train.py composes them, for the first
    seed: the others differ in the seed alone. Raises ConfigError for the first that is refused.
    """
    runs, first = study.runs(), study.seeds[0]
    of_first_seed = [run for run in runs if run.seed == first]
    examples = [
        int(compose_run(study, run, Path("study.yaml"))[0].n_examples or 0)
        for run in Progress(of_first_seed, desc="check")
    ]
    left = missing(study)
    lines = [
        f"study {study.name} ({study.hash[:12]}): {study.question}",
        f"{len(runs):,} runs: {len(study.arms)} losses, {len(study.seeds)} seeds,"
        f" {len(study.cases)} cases, {len(study.arms[study.baseline].trials)} trials of a loss;"
        f" {len(of_first_seed)} settings are valid",
        f"examples of a run: {min(examples):,} to {max(examples):,}",
        f"finished: {len(runs) - len(left):,}; missing: {len(left):,}",
        _time(study, left, n_jobs),
    ]
    return "\n".join(lines)


def _time(study: Study, left: Sequence[PlannedRun], n_jobs: int) -> str:
    seconds = [row["seconds"] for row in read_log(study) if not row["error"]]
    if not seconds:
        return "time: not known before a run has finished; --limit 1 runs one for each worker"
    median = statistics.median(seconds)
    hours = median * len(left) / n_jobs / 3600
    return (
        f"time: {median:.0f} s a run (median of {len(seconds)}), so {hours:.1f} h for the missing"
        f" ones, {n_jobs} at a time, beside the preparation"
    )
