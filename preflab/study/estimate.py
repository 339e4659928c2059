"""What a study will take, before it runs: every run composed once, and the time of those so far."""

import statistics
from pathlib import Path

from preflab.study.halving import count_stages, stages
from preflab.study.plan import Study
from preflab.study.work import compose_run, read_log
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
    done, total = count_stages(study)
    lines = [
        f"study {study.name} ({study.hash[:12]}): {study.question}",
        f"{len(runs):,} runs: {len(study.arms)} losses, {len(study.seeds)} seeds,"
        f" {len(study.cases)} cases, {len(study.arms[study.baseline].trials)} trials of a loss;"
        f" {len(of_first_seed)} settings are valid",
        f"examples of a run: {min(examples):,} to {max(examples):,}",
        *_halving(study),
        f"finished: {done:,}; missing: {total - done:,}",
        _time(study, total - done, n_jobs),
    ]
    return "\n".join(lines)


def _halving(study: Study) -> list[str]:
    """What halving saves at least; nothing without it."""
    if study.halving is None:
        return []
    [cell, *_] = study.cells()
    ends = stages(study, cell[0])
    counts = study.halving.counts(len(cell))
    segments = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    share = sum(n * size for n, size in zip(counts, segments, strict=True))
    share /= len(cell) * ends[-1]
    texts = [f"{n} trials up to {end:,} examples" for n, end in zip(counts, ends, strict=True)]
    return [
        f"halving: of {len(cell)} trials of a loss and seed, {', '.join(texts)}: {share:.0%} of the"
        " full grid, and a run more where the furthest continues too; counts below are of runs up"
        " to the next rung"
    ]


def _time(study: Study, left: int, n_jobs: int) -> str:
    seconds = [row["seconds"] for row in read_log(study) if not row["error"]]
    if not seconds:
        return "time: not known before a run has finished; --limit 1 runs one for each worker"
    median = statistics.median(seconds)
    hours = median * left / n_jobs / 3600
    return (
        f"time: {median:.0f} s a run (median of {len(seconds)}), so {hours:.1f} h for the missing"
        f" ones, {n_jobs} at a time, beside the preparation"
    )
