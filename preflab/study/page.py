"""The page of a study: verdicts, frontiers, tuning budgets, sensitivity and failures."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from preflab.reports.charts import Chart, chart_of
from preflab.reports.markdown_page import write_markdown_page
from preflab.reports.overoptimization_table import overoptimization_table
from preflab.reports.plot_style import png
from preflab.reports.run_files import read_starts
from preflab.reports.runs import Group
from preflab.reports.selection import envelopes
from preflab.reports.statistics import Estimate, Spread, difference, over_seeds
from preflab.reports.sweep_plots import frontier_figure
from preflab.reports.tables import markdown
from preflab.reports.verdicts import BETTER, WORSE, Verdict, check, decide, power_of
from preflab.study.halving import compared_kl, examples_of, stages
from preflab.study.measures import (
    StudyRun,
    Table,
    best_of,
    finished_cells,
    load_runs,
    of_case,
    table_of_measure,
    trials_of,
)
from preflab.study.plan import AT_KL, MEASURES, Study
from utils import atomic_write

FRONTIER_KLS = (0.25, 0.5, 1.0, 1.5, 2.0)
COMPARISONS = 200


def write_study(study: Study) -> str:
    """Write study.md, its pictures, study.json and report.html into `study.page_dir`; returns the
    page."""
    study.page_dir.mkdir(parents=True, exist_ok=True)
    runs = load_runs(study)
    charts: list[Chart] = []
    parts = [_head(study, runs)]
    numbers: dict[str, dict] = {}
    for case in study.cases:
        of = of_case(runs, case)
        if len(study.cases) > 1:
            parts.append(f"# Case: {case}\n")
        if not any(run.evaluations for run in of):
            parts.append("No run of this case has finished.\n")
            continue
        for measure, margin in study.compare.items():
            table = table_of_measure(study, of, measure)
            text, result = _verdicts(study, of, measure, margin, table)
            parts.append(text)
            numbers.setdefault(case, {})[measure] = result
        parts += [_frontier(study, case, of, charts), _budgets(study, of), _sensitivity(study, of)]
    parts.append(_halving(study, runs))
    parts.append(_failures(runs))
    page = "\n".join(part for part in parts if part)
    with atomic_write(study.page_dir / "study.md") as f:
        f.write(page)
    with atomic_write(study.page_dir / "study.json") as f:
        json.dump({"hash": study.hash, "cases": numbers}, f, indent=1)
    write_markdown_page(study.page_dir, page, charts)
    return page


def _head(study: Study, runs: Sequence[StudyRun]) -> str:
    states = Counter(run.state.split(":")[0] for run in runs)
    trials = len(study.arms[study.baseline].trials)
    lines = [
        f"# Study: {study.name}{'' if study.only is None else f', case {study.only} alone'}\n",
        f"{study.question}\n",
        f"{len(study.arms)} losses with {trials} trials each, {len(study.seeds)} seeds:"
        f" {', '.join(f'{n} runs {state}' for state, n in states.items())}.",
        _criterion(study, runs),
        f"A seed draws {', '.join(study.drawn_by_seed())}: the intervals say how far the numbers"
        " could be off if these were drawn again, and nothing about what all seeds share.",
    ]
    within = study.choose_within_kl
    limit = "" if within is None else f" with a KL of at most {within:g}"
    lines.append(
        "For each loss and seed, dev prompts choose the trial and the evaluation with the highest"
        f" reward{limit}. The numbers are those of the test prompts.\n"
    )
    return "\n".join(lines)


def _criterion(study: Study, runs: Sequence[StudyRun]) -> str:
    """With which study file the runs were started."""
    hashes = Counter(_hash_of(run.run.folder) for run in runs if run.run)
    if set(hashes) <= {study.hash}:
        return f"Every run was started with this study file ({study.hash[:12]})."
    found = ", ".join(f"{n} with {str(value)[:12]}" for value, n in hashes.items())
    return (
        f"**The study file was changed after runs had been started**: this one is"
        f" {study.hash[:12]}; of the runs, {found}. The copies beside this page are the versions."
    )


def _hash_of(folder: Path) -> str | None:
    """The hash of the criterion at the first start of a run."""
    starts = read_starts(folder) or [{}]
    return (starts[0].get("criterion") or {}).get("hash")


# ----------------------------------------------------------------------------------------- verdicts


def _verdicts(
    study: Study, runs: Sequence[StudyRun], measure: str, margin: float, table: Table
) -> tuple[str, dict]:
    baseline = table[study.baseline]
    others = [loss for loss in study.arms if loss != study.baseline]
    differences = {loss: difference(table[loss], baseline) for loss in others}
    verdicts = decide(differences, margin)
    rows = [["loss", "mean", f"minus {study.baseline} [95%]", "verdict", "p", "p equal", "decides"]]
    known = [loss for loss in study.arms if table[loss]]
    for loss in known:
        mean = over_seeds(_seed_means(table[loss]))
        rows.append([loss, _mean_text(mean), *_verdict_cells(verdicts.get(loss), measure)])
    over = {estimate.over for estimate in differences.values() if estimate}
    lines = [
        f"## {measure}\n",
        f"The smallest difference that matters, d, is {margin:g}. Intervals and means are over"
        f" {' or '.join(sorted(over)) or 'nothing yet'}; p-values are corrected for"
        f" {len(others)} comparisons (Holm).\n",
        *([markdown(rows)] if known else []),
        *_without_value(study, runs, measure, known),
        *([_power_text(study, measure, margin, differences)] if known else []),
    ]
    result = {loss: _as_numbers(verdict) for loss, verdict in verdicts.items()}
    return "\n".join(lines), result


def _without_value(
    study: Study, runs: Sequence[StudyRun], measure: str, known: Sequence[str]
) -> list[str]:
    """Which losses have no value: those that do not reach it, and those that are not done."""
    done = {loss for loss, _ in finished_cells(study, runs)}
    missed = [loss for loss in study.arms if loss not in known and loss in done]
    others = [loss for loss in study.arms if loss not in known and loss not in done]
    texts = []
    if missed:
        limit = "this KL" if measure.startswith(AT_KL) else "an evaluation with this measure"
        texts.append(f"No seed reaches {limit}: {', '.join(missed)}.\n")
    return [*texts, f"No seed has finished: {', '.join(others)}.\n"] if others else texts


def _seed_means(of_loss: dict[str, dict[str, float]]) -> list[float]:
    return [math.fsum(values.values()) / len(values) for values in of_loss.values()]


def _mean_text(of: Estimate | None) -> str:
    if of is None:
        return "-"
    error = "" if of.se is None else f" ± {of.se:.3f}"
    return f"{of.mean:.3f}{error} ({of.seeds} seed{'s' * (of.seeds != 1)})"


def _verdict_cells(verdict: Verdict | None, measure: str) -> list[str]:
    if verdict is None:
        return ["", "baseline", "", "", ""]
    of = verdict.estimate
    if of is None:
        return ["-", "no seed in common", "", "", ""]
    word = verdict.word
    if MEASURES.get(measure, True) is None:
        word = {BETTER: "higher", WORSE: "lower"}.get(word, word)
    interval = f"[{of.low:+.3f}, {of.high:+.3f}]" if of.low is not None else "(no interval)"
    needed = [f"{verdict.seeds} seeds"] if verdict.seeds else []
    needed += [f"{verdict.prompts:,} prompts"] if verdict.prompts else []
    return [
        f"{of.mean:+.3f} {interval}",
        f"**{word}**",
        _p_text(verdict.p_differs),
        _p_text(verdict.p_equal),
        " or ".join(needed) or "-",
    ]


def _p_text(p: float | None) -> str:
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _as_numbers(verdict: Verdict) -> dict:
    of = verdict.estimate
    numbers = {key: getattr(verdict, key) for key in ("word", "p_differs", "p_equal")}
    numbers |= {"seeds_to_decide": verdict.seeds, "prompts_to_decide": verdict.prompts}
    if of is not None:
        keys = ("mean", "se", "low", "high", "seeds", "prompts")
        numbers |= {key: getattr(of, key) for key in keys}
    return numbers


def _power_text(
    study: Study, measure: str, margin: float, differences: dict[str, Estimate | None]
) -> str:
    """What the column `decides` means, the power before the study, and the A/A check after it."""
    lines = [
        "`decides`: how many seeds, or prompts for each seed, would find a difference of d, and"
        " call none equal, with a probability of 80%, with the spread that was measured.",
    ]
    if assumed := study.assume.get(measure):
        spread = Spread(*(assumed.get(key, 0.0) ** 2 for key in ("seeds", "prompts", "rest")))
        prompts = int(assumed.get("n_prompts", 0))
        power = power_of(spread, len(study.seeds), prompts, margin, 0.05 / len(differences))
        lines.append(
            f"Before the study, with the spread that its file assumes, this was {power:.0%}."
        )
    known = [of for of in differences.values() if of and of.spread and of.low is not None]
    if known:
        seeds, prompts = min(of.seeds for of in known), min(of.prompts for of in known)
        result = check([of.spread for of in known], seeds, prompts, margin, COMPARISONS)
        lines.append(
            f"A/A check: of {result.comparisons} simulated comparisons of a loss with itself, with"
            f" the measured spread, {result.same_called_different:.1%} are called better or worse;"
            f" a planted difference of d is found in {result.planted_found:.0%}."
        )
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------ frontiers, budgets, sensitivity


def _groups(study: Study, runs: Sequence[StudyRun]) -> list[Group]:
    groups = []
    for loss in study.arms:
        of_loss = [r.run for r in runs if r.planned.loss == loss and r.evaluations]
        if of_loss:
            groups.append(Group({"loss.name": loss}, of_loss))
    return groups


def _frontier(study: Study, case: str, runs: Sequence[StudyRun], charts: list[Chart]) -> str:
    """The reward within some KLs, and its picture with a band over seeds, also for `charts`."""
    groups = _groups(study, runs)
    if not groups:
        return ""
    rows: list[list] = [["loss", *(f"KL {kl:g}" for kl in FRONTIER_KLS)]]
    for group in groups:
        by_kl = zip(*envelopes(group.runs, FRONTIER_KLS).values(), strict=True)
        cells = [_cell(rewards) for rewards in by_kl]
        rows.append([group.name, *cells])
    picture = "frontier.png" if case == "-" else f"frontier-{case}.png"
    lines = [
        "## Frontier\n",
        "Best reward within a KL, chosen on dev and measured on test: mean and 95% interval over"
        " seeds; - where a seed does not reach the KL.\n",
        markdown(rows),
    ]
    if table := overoptimization_table(groups):
        lines += [
            f"## {table.title}\n",
            markdown([table.head, *table.rows]),
            "\n".join(f"{note}\n" for note in table.notes),
        ]
    asked = 2 * (compared_kl(study) or 0.0)
    if figure := frontier_figure(groups, largest_kl=max(*FRONTIER_KLS, asked)):
        with atomic_write(study.page_dir / picture, "wb") as f:
            f.write(png(figure))
        charts.append(chart_of("Frontier" if case == "-" else f"Frontier: {case}", figure))
        lines.append(f"![reward against KL; bands are the range over seeds]({picture})\n")
    return "\n".join(lines)


def _cell(rewards: Sequence[float | None]) -> str:
    if None in rewards:
        return "-"
    of = over_seeds(rewards)
    interval = "" if of.low is None else f" [{of.low:.3f}, {of.high:.3f}]"
    return f"{of.mean:.3f}{interval}"


def _budgets(study: Study, runs: Sequence[StudyRun]) -> str:
    """The expected reward of the best of k trials."""
    trials = trials_of(study, runs)
    n = len(study.arms[study.baseline].trials)
    rows: list[list] = [["loss", *(f"k = {k}" for k in range(1, n + 1))]]
    for loss in study.arms:
        by_seed = [[t for t in trials if (t.loss, t.seed) == (loss, seed)] for seed in study.seeds]
        curves = [best_of(of_seed) for of_seed in by_seed if len(of_seed) == n]
        if curves:
            rows.append([loss, *(_cell(column) for column in zip(*curves, strict=True))])
    if len(rows) == 1:
        return ""
    return (
        "## Best of k trials\n\nExpected reward on test of the trial that dev chooses among k of"
        f" the {n} trials of a loss: mean and 95% interval over seeds.\n\n{markdown(rows)}"
    )


def _sensitivity(study: Study, runs: Sequence[StudyRun]) -> str:
    """Each point of each grid, of those that have been run."""
    trials = trials_of(study, runs)
    n_left = 0
    head = ["loss", "trial", "best reward (test)", "at KL", "reward at the end", "KL at the end"]
    rows: list[list] = [head]
    for loss, arm in study.arms.items():
        for name in arm.trials:
            of = [t for t in trials if (t.loss, t.trial) == (loss, name)]
            if not of:
                n_left += 1
                continue
            columns = ("test", "kl", "last_reward", "last_kl")
            means = [over_seeds(getattr(t, column) for t in of) for column in columns]
            rows.append([loss, name, *map(_short, means)])
    if not trials:
        return ""
    left = f" {n_left} of {n_left + len(rows) - 1} trials have no run yet." * bool(n_left)
    return (
        "## Sensitivity\n\nEach trial: the best evaluation within the KL, chosen on dev, and the"
        f" last one: mean ± standard error over seeds.{left}\n\n{markdown(rows)}"
    )


def _short(of: Estimate | None) -> str:
    if of is None:
        return "-"
    return f"{of.mean:.3f}" + ("" if of.se is None else f" ± {of.se:.3f}")


def _halving(study: Study, runs: Sequence[StudyRun]) -> str:
    """Which trials went how far, and what was saved."""
    if study.halving is None:
        return ""
    begun = [run for run in runs if run.run]
    head = ["loss", "trial", *(f"{share:.0%} of the run" for share in (*study.halving.rungs, 1.0))]
    counts: Counter = Counter()
    trained = full = 0
    for run in begun:
        ends, seen = stages(study, run.planned), examples_of(study, run.planned)
        trained, full = trained + seen, full + ends[-1]
        for number, end in enumerate(ends):
            counts[run.planned.loss, run.planned.trial, number] += seen >= end
    rows = [
        [loss, trial, *(counts[loss, trial, i] for i in range(len(head) - 2))]
        for loss, arm in study.arms.items()
        for trial in arm.trials
    ]
    share = f" The runs took {trained / full:.0%} of the examples of the full grid." * bool(full)
    kl = compared_kl(study)
    most = "" if kl is None else f", at most {kl:g},"
    return (
        "## Halving\n\nIn how many seeds and cases each trial was trained so far. At each rung,"
        f" the best {study.halving.keep:.0%} continue: by the reward on dev prompts at the largest"
        f" KL{most} that all trials of the loss have reached, of those with at least"
        f" {study.halving.least_kl:.1%} of the furthest one's. The numbers of those that were"
        f" stopped are from before.{share}\n\n{markdown([head, *rows])}"
    )


def _failures(runs: Sequence[StudyRun]) -> str:
    """Runs that failed, and finished ones with numbers that are not finite."""
    lines = [
        f"- `{run.planned.name}`: {run.state}"
        for run in runs
        if run.state.startswith(("failed", "killed"))
    ]
    unread = [r for r in runs if r.run and r.run.finished and not r.evaluations]
    lines += [
        f"- {loss}: the evaluations of {n} finished runs have no reward or no KL of samples, and do"
        " not count. Make these runs again with sample_during_eval=true, temperature=1, topp=1 and"
        " reference.compare=true."
        for loss, n in Counter(run.planned.loss for run in unread).items()
    ]
    for run in runs:
        if run.run and (n := run.run.count_missing()):
            lines.append(f"- `{run.planned.name}`: {n:,} values are null, NaN or infinite")
    return "## Failures\n\n" + ("\n".join(lines) if lines else "None.") + "\n"
