"""Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): which runs are due.

The trials of a loss, for one seed and case, train up to a rung. There they are compared at equal KL
on dev prompts, and a share of them continues. Nothing is kept of a decision: it follows from the
evaluations up to the rung, which stay in the folders, so that every worker takes the same one.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from preflab.reports.run_files import is_number, read_config, read_jsonl, read_summary
from preflab.reports.runs import Run
from preflab.reports.selection import DEV, Evaluation, chosen_mixture, sampled_evaluations
from preflab.settings.compose import compose
from preflab.study.plan import AT_KL, LEAST_KL, PlannedRun, Study
from utils import ConfigError, DataError


def is_finished(study: Study, run: PlannedRun) -> bool:
    """Whether a run has ended, at whatever rung."""
    return bool(_summary(study, run).get("finished"))


def _summary(study: Study, run: PlannedRun) -> dict:
    """A summary; {} where it is damaged, which the run's next start says."""
    try:
        return read_summary(study.runs_dir / run.name)
    except DataError:
        return {}


def due(
    study: Study,
    cell: Sequence[PlannedRun],
    has_failed: Callable[[PlannedRun], bool] = lambda run: False,
) -> list[PlannedRun]:
    """What is to be run next of the trials of one seed, case and loss.

    has_failed: trials that do not count any more; without them a cell waits for every trial. Raises
    DataError where an evaluation that decides who continues is damaged.
    """
    alive = [run for run in cell if not has_failed(run)]
    if not alive:
        return []
    if study.halving is None:
        return [run for run in alive if not is_finished(study, run)]
    counts = study.halving.counts(len(cell))
    for stage, n_next in enumerate([*counts[1:], None]):
        targets = {run.name: stages(study, run)[stage] for run in alive}
        left = [r for r in alive if not _has_reached(study, r, targets[r.name], n_next is None)]
        if left or n_next is None:
            return [run.until(targets[run.name]) for run in left]
        evaluations = {run.name: _evaluations_until(study, run, targets[run.name]) for run in alive}
        names = survivors(evaluations, n_next, compared_kl(study), study.halving.least_kl)
        alive = [run for run in alive if run.name in names]
    return []


def stages(study: Study, run: PlannedRun) -> list[int]:
    """The numbers of examples after which a run is looked at: rungs, and its end.

    A rung is where the whole run evaluates too. Raises ConfigError for settings with which a run
    that continues would be another one than the whole run.
    """
    filled = [word for word in run.overrides if not word.startswith(("seed=", "datasets="))]
    return list(_stages(tuple(filled), tuple(study.halving.rungs), study.config_dir))


@functools.lru_cache(maxsize=10_000)
def _stages(
    overrides: tuple[str, ...], rungs: tuple[float, ...], config_dir: Path | None
) -> tuple[int, ...]:
    config = compose(overrides, config_dir)
    n, every, batch = config.n_examples, config.eval_every, config.batch_size
    problem = None
    if not n or config.n_epochs is not None:
        problem = f"n_examples={n} n_epochs={config.n_epochs}; set n_examples, and n_epochs=null"
    elif every % batch:
        problem = f"eval_every={every} is no multiple of batch_size={batch}"
    elif config.lr_schedule not in ("constant", "inverse_sqrt") or 0 < config.warmup_steps < 1:
        problem = (
            f"lr_schedule={config.lr_schedule} warmup_steps={config.warmup_steps} depend on the"
            " length of a run; use constant or inverse_sqrt, and warmup_steps in steps"
        )
    elif config.patience is not None:
        problem = f"patience={config.patience} ends runs between rungs; set patience=null"
    elif not _is_compared(config):
        problem = (
            "trials are compared on samples of every evaluation from the start on; set"
            " do_first_eval=true, sample_during_eval=true, temperature=1, topp=1, top_k=null and"
            " min_p=null"
        )
    targets = [max(1, round(share * (n or 0) / every)) * every for share in rungs]
    if problem is None and (len(set(targets)) < len(targets) or targets[-1] >= n):
        problem = f"eval_every={every} of n_examples={n} has no evaluations at the rungs {rungs}"
    if problem:
        raise ConfigError(f"halving stops runs and continues them: {problem}")
    return (*targets, n)


def _is_compared(config) -> bool:
    """Whether the evaluations of a run are points of its reward-KL frontier, the start included."""
    plain = config.temperature == 1 and config.topp == 1
    plain &= config.top_k is None and config.min_p is None
    return bool(plain and config.do_first_eval and config.sample_during_eval)


def _has_reached(study: Study, run: PlannedRun, examples: int, is_end: bool) -> bool:
    """Whether a run has ended at a rung, or at its end. One that is being continued has no summary,
    and a config that goes beyond the rung."""
    folder, summary = study.runs_dir / run.name, _summary(study, run)
    if summary.get("finished"):
        return (summary.get("examples") or 0) >= examples
    if is_end or examples_of(study, run) < examples:
        return False
    try:
        return (read_config(folder / "config.yaml").n_examples or 0) > examples
    except DataError:  # the run's next start says it
        return False


def examples_of(study: Study, run: PlannedRun) -> int:
    """After how many examples a run was evaluated last; 0 before that, and where its rows are
    damaged, which its next start says."""
    try:
        rows = read_jsonl(study.runs_dir / run.name / "metrics.jsonl")
    except DataError:
        return 0
    seen = [row.get("examples") for row in rows if row.get("split") == "eval"]
    return max(filter(is_number, seen), default=0)


def _evaluations_until(study: Study, run: PlannedRun, examples: int) -> list[Evaluation]:
    evaluations = sampled_evaluations(Run(study.runs_dir / run.name))
    return [e for e in evaluations if e.row["examples"] <= examples]


def count_stages(study: Study) -> tuple[int, int]:
    """How many stages of runs are done, and how many there are in all: each run is one without
    halving. Cheap, for a progress bar."""
    runs = study.runs()
    if study.halving is None:
        return sum(is_finished(study, run) for run in runs), len(runs)
    size = len(study.cells()[0])
    total = sum(study.halving.counts(size)) * len(study.cells())
    done = 0
    for run in runs:
        ends = stages(study, run)
        reached = examples_of(study, run)
        done += sum(reached >= end for end in ends[:-1])
        done += _has_reached(study, run, ends[-1], is_end=True)
    return min(done, total), total


def compared_kl(study: Study) -> float | None:
    """The largest KL that the study asks about; beyond it no trial has to go."""
    kls = [float(name.removeprefix(AT_KL)) for name in study.compare if name.startswith(AT_KL)]
    if study.choose_within_kl is not None:
        kls.append(study.choose_within_kl)
    return max(kls, default=None)


def survivors(
    evaluations: Mapping[str, Sequence[Evaluation]],
    n: int,
    largest_kl: float | None,
    least_kl: float = LEAST_KL,
) -> set[str]:
    """The trials that continue: the `n` best ones at the largest KL that all have reached, by dev.

    largest_kl: where the study compares; None for no limit. A trial with less than the share
    `least_kl` of the furthest one's KL is not compared and does not continue: the gain grows with
    the root of the KL, so that at its KL noise would choose. Where none of the `n` has gone as far
    as the furthest, or as `largest_kl`, the furthest continues too, because the frontier of the
    others may end too early.
    """
    limit = math.inf if largest_kl is None else largest_kl
    reached = {
        name: min(max((e.mean("kl", DEV) for e in of), default=0.0), limit)
        for name, of in evaluations.items()
    }
    furthest = max(reached, key=reached.__getitem__)
    moved = {name for name, kl in reached.items() if kl >= least_kl * reached[furthest]}
    common = min(reached[name] for name in moved)
    rewards = {name: _dev_reward(evaluations[name], common) for name in moved}
    best = sorted(moved, key=lambda name: (-rewards[name], -reached[name], name))[:n]
    if all(reached[name] < reached[furthest] for name in best):
        best.append(furthest)
    return set(best)


def _dev_reward(evaluations: Sequence[Evaluation], kl: float) -> float:
    """The highest reward within a KL on dev prompts; minus infinity where there is none."""
    mixture = chosen_mixture(evaluations, kl)
    if not mixture:
        return -math.inf
    return sum(weight * e.mean("policy_reward", DEV) for e, weight in mixture)
