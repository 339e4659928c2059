"""The report of a folder of runs: tables, figures and a page that compare them."""

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from preflab.reports import plots, sweep_plots
from preflab.reports.ceiling import reference_rewards
from preflab.reports.ceiling_table import ceiling_table
from preflab.reports.evaluation_tables import FOLDER, evaluation_tables, winrate_table
from preflab.reports.overoptimization_table import overoptimization_table
from preflab.reports.page import save_figures, write_page
from preflab.reports.run import samples_of, write_report
from preflab.reports.run_files import is_number
from preflab.reports.runs import (
    Group,
    Run,
    differing_settings,
    find_runs,
    group_runs,
    left_out,
)
from preflab.reports.sample_cards import Origin, sample_cards
from preflab.reports.selection import envelopes, has_parts, sampled_evaluations
from preflab.reports.statistics import Estimate, difference, over_seeds
from preflab.reports.tables import (
    Table,
    latex,
    markdown,
    plus_minus,
)
from preflab.reports.why import why_of_groups
from utils import ConfigError, DataError, atomic_write, mean_and_error

# Metrics of summary.json in the comparison.
COMPARED = (
    "policy_reward",
    "reference_reward",
    "kl",
    "eval_accuracy",
    "eval_loss",
    "policy_length",
    "pairs_per_second",
)

# Those that are compared with the baseline, paired by seed.
PAIRED = ("policy_reward", "kl", "eval_accuracy", "eval_loss", "policy_length")

DIGITS = {"pairs_per_second": 1, "policy_length": 1, "kl": 2}  # 3 for other metrics

KL_BUDGETS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)  # nats; columns of the frontier


# What a frontier says of the prompts that chose its points.
PARTS = (
    "Half of the prompts (dev) choose the best evaluations, the other half (test) give the reward."
)
NO_PARTS = (
    "The same prompts choose the best evaluations and give their reward, which is biased upwards:"
    " samples.jsonl does not hold the samples of every evaluation."
)


def report_folder(folder: Path, baseline: dict[str, str] | None = None) -> tuple[str, bool]:
    """Report a run or a folder of runs: its tables as text, and whether a run is still running.

    Raises DataError if the folder contains no run, ConfigError if no group is the baseline.
    """
    if (folder / "config.yaml").is_file():
        return write_report(folder), Run(folder).state == "running"
    runs, problems = find_runs(folder) if folder.is_dir() else ([], [])
    if not runs:
        raise DataError(
            f"{folder}: not a run folder, and no run folder below it can be read. A run folder"
            " has a config.yaml, and a metrics.jsonl or a status.json."
            + "".join(f"\n{problem}" for problem in problems)
        )
    text = write_comparison(folder, runs, baseline, problems)
    return text, any(run.state == "running" for run in runs)


def write_comparison(
    folder: Path,
    runs: list[Run],
    baseline: dict[str, str] | None = None,
    problems: Sequence[str] = (),
) -> str:
    """Write tables, pictures and report.html of a folder of runs; return the tables as text.

    baseline: settings of the group that the others are compared with, seed by seed; by default the
    first group of the table.
    """
    trained = [run for run in runs if not run.is_evaluation]
    groups = group_runs(trained, differing_settings(trained)) if trained else []
    problems = [*problems, *_warnings(trained)]
    evaluations = [
        row | {FOLDER: str(run.folder)}
        for run in runs
        if run.is_evaluation
        for row in run.evaluations
    ]
    rewards = {run.reward for run in runs if run.is_evaluation}
    winrates = _winrates(runs, groups, beside_evaluations=bool(evaluations))
    samples = (
        reference_rewards(runs) if len(rewards | {run.reward for run in trained}) == 1 else None
    )
    tables = [
        *(_write_group_tables(folder, groups, baseline) if groups else []),
        ceiling_table(groups, samples),
        why_of_groups(groups),
        overoptimization_table(groups),
        *evaluation_tables(evaluations, rewards.pop() if len(rewards) == 1 else None),
        winrate_table(winrates, evaluations),
    ]
    tables = [table for table in tables if table]
    states = Counter(run.state.split(":")[0] for run in trained)
    write_page(
        folder,
        title=f"{folder.resolve().name}: {len(trained)} run{'s' * (len(trained) != 1)}",
        subtitle=", ".join(f"{n} {state}" for state, n in states.items()),
        problems=problems,
        tables=tables,
        charts=save_figures(folder, _figures(groups, evaluations, winrates, samples)),
        samples=sample_cards(_samples(runs, groups)),
    )
    return "\n\n".join([*problems, *(table.with_notes() for table in tables if not table.folded)])


def _winrates(runs: list[Run], groups: list[Group], *, beside_evaluations: bool) -> list[dict]:
    """Win rates of all runs; those of no checkpoint get the name of their group and their seed, or
    the folder of an evaluation, for a checkpoint."""
    ending = ", in training" * beside_evaluations  # a checkpoint's loss can have the same name
    owners = {
        run.folder: {"checkpoint": group.name + ending, "seed": run.seed}
        for group in groups
        for run in group.runs
    }
    return [
        rate | {FOLDER: str(run.folder)}
        if rate.get("checkpoint")
        else rate | owners.get(run.folder, {"checkpoint": str(run.folder)})
        for run in runs
        for rate in run.winrates
    ]


def _warnings(runs: list[Run]) -> list[str]:
    """Reasons for which the numbers of a comparison may mislead."""
    warnings = [
        f"{run.folder}: {run.state}" for run in runs if run.state.startswith(("failed", "killed"))
    ]
    for run in runs:
        warnings += run.problems()
    for key, what in (
        ("datasets", "on different data"),
        ("reward.name", "with different rewards"),
        ("model.name_or_path", "of different models"),
        ("temperature", "at different temperatures"),
    ):
        values = sorted({run.setting(key) for run in runs})
        if len(values) > 1:
            warnings.append(
                f"These runs were evaluated {what} ({', '.join(values)}); their numbers are"
                " not comparable."
            )
    if note := left_out(sum(run.n_beside_frontier() for run in runs)):
        warnings.append(f"Reward-KL frontier: {note}.")
    if runs and not any(is_number(run.latest().get("policy_reward")) for run in runs):
        warnings.append(
            "There is no reward to compare: no run has sampled yet, or sampling is off"
            " (sample_during_eval=false)."
        )
    return warnings


def _figures(
    groups: list[Group],
    evaluations: list[dict],
    winrates: list[dict],
    samples: np.ndarray | None,
) -> dict[str, tuple[str, Figure | None]]:
    """{file name: (title, figure)}, in the order of the page."""
    figures = {}
    if groups:
        figures = {
            "frontier": ("Reward-KL frontier", sweep_plots.frontier_figure(groups, samples)),
            "bands": ("Over training", sweep_plots.bands_figure(groups)),
            "lengths": ("Length and reward", sweep_plots.length_figure(groups)),
        }
    return figures | {
        "temperature": ("Temperature", plots.temperature_figure(evaluations, winrates)),
        "checkpoints": ("Checkpoints", plots.checkpoints_figure(evaluations)),
    }


def _write_group_tables(
    folder: Path, groups: list[Group], baseline: dict[str, str] | None
) -> list[Table | None]:
    """Write comparison.csv, .md and .tex, differences.csv and frontier.csv; return their tables for
    the page."""
    baseline_group = _find_baseline(groups, baseline)  # before anything is written
    comparison = _comparison_table(groups)
    rows = [comparison.head, *comparison.rows]
    for suffix, text in (("md", markdown(rows)), ("tex", latex(rows))):
        with atomic_write(folder / f"comparison.{suffix}") as f:
            f.write(text)
    _write_comparison_csv(folder, groups)
    return [
        comparison,
        _write_differences(folder, groups, baseline_group),
        _write_frontier(folder, groups),
    ]


def _write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    with atomic_write(path) as f:
        csv.writer(f).writerows(rows)


def _comparison_table(groups: list[Group]) -> Table:
    """A row for each group: its settings, its seeds where the groups have different ones, and means
    ± standard errors over the seeds of the metrics that some group has."""
    seeds = [[str(run.seed) for run in group.runs] for group in groups]
    differ = any(of_group != seeds[0] for of_group in seeds)
    shown = [name for name in COMPARED if any(group.by_seed(name) for group in groups)]
    rows = []
    for group, of_group in zip(groups, seeds, strict=True):
        means = (
            plus_minus(*mean_and_error(group.by_seed(name).values()), DIGITS.get(name, 3))
            for name in shown
        )
        settings = [*group.settings.values(), *([" ".join(of_group)] if differ else [])]
        rows.append([*settings, *means, group.state])
    over = "over seeds" if differ else f"over seeds {', '.join(seeds[0])}"
    is_single = not differ and len(seeds[0]) == 1
    return Table(
        title="Final evaluations"
        + (f", seed {seeds[0][0]}" if is_single else f": mean ± standard error {over}"),
        head=[
            *groups[0].settings,
            *(["seeds"] if differ else []),
            *_heads(groups, shown),
            "state",
        ],
        rows=rows,
        keys=len(groups[0].settings) + differ,
    )


def _heads(groups: list[Group], metrics: Sequence[str]) -> list[str]:
    """Heads of columns. That of the KL says so where some samples are not the policy's."""
    samplers = sorted({group.sampler for group in groups if group.sampler})
    along = f"kl along samples at {' or '.join(samplers)}" if samplers else "kl"
    return [along if name == "kl" else name for name in metrics]


def _write_comparison_csv(folder: Path, groups: list[Group]) -> None:
    """The comparison in full precision, with t intervals over seeds."""
    columns = [f"{name}{suffix}" for name in COMPARED for suffix in ("", "_se", "_low", "_high")]
    rows = [[*groups[0].settings, "seeds", *columns, "state", "sampler"]]
    for group in groups:
        numbers = []
        for name in COMPARED:
            of = over_seeds(group.by_seed(name).values())
            numbers += [of.mean, of.se, of.low, of.high] if of else [None] * 4
        sampler = group.sampler or "policy"
        rows.append([*group.settings.values(), len(group.runs), *numbers, group.state, sampler])
    _write_csv(folder / "comparison.csv", rows)


def _find_baseline(groups: list[Group], settings: dict[str, str] | None) -> Group:
    """The first group with these settings. Raises ConfigError, with the choices, if there is
    none."""
    if not settings:
        return groups[0]
    for key in settings:
        if key not in groups[0].settings:
            raise ConfigError(
                f"--baseline {key}: the runs do not differ in this setting; they differ in"
                f" {', '.join(groups[0].settings)}"
            )
    for group in groups:
        if all(group.settings[key] == value for key, value in settings.items()):
            return group
    raise ConfigError(
        f"--baseline {' '.join(f'{key}={value}' for key, value in settings.items())}: no group has"
        f" these settings; the groups are {', '.join(group.name for group in groups)}"
    )


def _write_differences(folder: Path, groups: list[Group], baseline: Group) -> Table | None:
    """Every other group minus the baseline, paired by seed and, where all share them, by prompt;
    differences.csv has full precision."""
    of_groups, numbers, spans = {}, [], {}
    for group in groups:
        if group is baseline:
            continue
        cells = {}
        for name in PAIRED:
            cells[name] = estimate = _difference(group, baseline, name)
            if estimate:
                spans.setdefault(estimate.over, {})[name] = None
                numbers.append([group.name, baseline.name, name, *_numbers(estimate)])
        of_groups[group.name] = cells
    if not numbers:
        return None
    known = [name for name in PAIRED if any(cells[name] for cells in of_groups.values())]
    rows = [
        [name, *(_format_difference(cells[metric]) for metric in known)]
        for name, cells in of_groups.items()
    ]
    columns = ["group", "baseline", "metric", *COLUMNS_OF_A_DIFFERENCE]
    _write_csv(folder / "differences.csv", [columns, *numbers])
    return Table(
        title=f"Differences from {baseline.name}: mean ± standard error [95% interval]",
        head=["", *_heads(groups, known)],
        rows=rows,
        notes=_span_notes(spans, [run for group in groups for run in group.runs]),
    )


COLUMNS_OF_A_DIFFERENCE = ("mean", "se", "low", "high", "seeds", "prompts")


def _numbers(estimate: Estimate) -> list[float | None]:
    return [getattr(estimate, column) for column in COLUMNS_OF_A_DIFFERENCE]


def _difference(group: Group, baseline: Group, name: str) -> Estimate | None:
    """`group - baseline` of a metric. None where they share no seed, and of losses that are on
    different scales."""
    if name == "eval_loss" and not group.same_loss(baseline):
        return None
    tables = [_by_seed_and_prompt(of, name) for of in (group, baseline)]
    if all(tables):
        return difference(*tables)
    ours, theirs = group.by_seed(name), baseline.by_seed(name)
    return over_seeds(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))


def _by_seed_and_prompt(group: Group, name: str) -> dict[str, dict[str, float]] | None:
    """The final values of a metric, {seed: {prompt: value}}; None where there is no value for each
    prompt, or several runs of a seed."""
    table: dict[str, dict[str, float]] = {}
    for run in group.runs:
        evaluations = sampled_evaluations(run)
        final = run.latest().get(name)
        values = evaluations[-1].of(name) if evaluations else {}
        is_final = is_number(final) and math.isclose(
            evaluations[-1].mean(name) if values else math.nan, final, abs_tol=1e-6
        )
        if not is_final or str(run.seed) in table:
            return None
        table[str(run.seed)] = values
    return table


def _format_difference(of: Estimate | None) -> str:
    if of is None:
        return "-"
    text = f"{of.mean:+z.3f}"
    if of.low is not None:
        return f"{text} ± {of.se:.3f} [{of.low:+z.3f}, {of.high:+z.3f}]"
    return f"{text} ({of.least:+z.3f} to {of.greatest:+z.3f})" if of.seeds > 1 else text


def _span_notes(spans: dict[str, dict[str, None]], runs: list[Run]) -> list[str]:
    """What the intervals of a table generalise over. spans: metrics by what they are over."""
    notes = [
        f"{', '.join(names)}: over {over}." if over else f"{', '.join(names)}: a single seed."
        for over, names in spans.items()
    ]
    if len({run.seed for run in runs}) == 2:
        notes.append("Two seeds have a range, in parentheses, and no interval.")
    shared = [
        what
        for key, what in (("model.name_or_path", "the start model"), ("datasets", "the data"))
        if len({run.setting(key) for run in runs}) == 1
    ]
    notes.append(
        "A seed draws the order of the data and the samples."
        + (f" All runs share {' and '.join(shared)}." if shared else "")
    )
    if len({tuple(sorted(map(str, run.config["loss"].items()))) for run in runs}) > 1:
        notes.append("Held-out losses are compared where the loss and its settings are the same.")
    return notes


def _write_frontier(folder: Path, groups: list[Group]) -> Table | None:
    """The best reward within a KL over all evaluations of a loss; frontier.csv has it by seed."""
    families: dict[str, list[Run]] = defaultdict(list)
    for group in groups:
        families[group.family] += group.runs
    is_split = all(has_parts(runs) for runs in families.values() if any(r.frontier() for r in runs))
    frontiers = {name: envelopes(runs, KL_BUDGETS) for name, runs in families.items()}
    frontiers = {name: by_seed for name, by_seed in frontiers.items() if by_seed}
    if not frontiers:
        return None
    lines = [
        [name, seed, *rewards]
        for name, by_seed in frontiers.items()
        for seed, rewards in by_seed.items()
    ]
    columns = ["loss", "seed", *(f"kl={kl}" for kl in KL_BUDGETS)]
    _write_csv(folder / "frontier.csv", [columns, *lines])
    # {family: for each KL the rewards of all seeds}
    rewards_at = {
        name: list(zip(*by_seed.values(), strict=True)) for name, by_seed in frontiers.items()
    }
    reached = [
        i
        for i in range(len(KL_BUDGETS))
        if any(None not in rewards[i] for rewards in rewards_at.values())
    ]
    if not reached:
        return None

    def cell(rewards: tuple[float | None, ...]) -> str:
        return "-" if None in rewards else plus_minus(*mean_and_error(rewards))

    return Table(
        title="Best reward within a KL of the policy's samples: mean ± standard error over seeds",
        head=["", *(f"KL {KL_BUDGETS[i]:g}" for i in reached)],
        rows=[[name, *(cell(rewards[i]) for i in reached)] for name, rewards in rewards_at.items()],
        notes=[
            "A cell is empty (-) unless every seed reaches that KL.",
            PARTS if is_split else NO_PARTS,
        ],
    )


def _samples(runs: list[Run], groups: list[Group]) -> Iterator[tuple[Origin, dict]]:
    """Samples of every run of the groups, or of the evaluated checkpoints where there is none."""
    for group in groups:
        for run in group.runs:
            origin = Origin(group.name, group.name, str(run.seed))
            yield from ((origin, row) for row in run.samples())
    if not groups:
        for run in runs:
            yield from samples_of(run)
