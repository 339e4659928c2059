"""The page that compares the runs of a folder."""

import csv
from collections import defaultdict
from pathlib import Path

from preflab.reports import sweep_plots
from preflab.reports.run import MAX_SAMPLES, PAGE, sample_columns, save_pictures, write_report
from preflab.reports.runs import Group, Run, differing_settings, find_runs, group_runs, is_number
from preflab.reports.statistics import bootstrap, envelopes, paired_difference
from preflab.reports.tables import aligned, evaluation_table, latex, plus_minus, winrate_table
from utils import ConfigError, DataError, atomic_write, mean_and_error

COMPARED = (
    "policy_reward",
    "reference_reward",
    "kl",
    "eval_accuracy",
    "eval_loss",
    "policy_length",
    "pairs_per_second",
)


PAIRED = ("policy_reward", "kl", "eval_accuracy", "eval_loss", "policy_length")


AT_KL = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


def write_comparison(
    folder: Path, runs: list[Run], baseline: dict[str, str] | None = None, problems: list[str] = ()
) -> str:
    """Tables, pictures and report.html of a folder of runs; returns the tables as text.

    baseline: settings of the group that others are compared with, seed by seed; by default the
    first of the table.
    """
    trained, evaluations = (
        [run for run in runs if not run.is_evaluation],
        [run for run in runs if run.is_evaluation],
    )
    keys = differing_settings(trained) if trained else []
    groups = group_runs(trained, keys)
    problems = [*problems, *_doubts(trained)]
    tables, figures = [], {}
    if groups:
        head, rows = comparison(groups, keys)
        tables.append(
            {
                "title": "Final evaluations: mean ± standard error over seeds",
                "head": head,
                "rows": rows,
            }
        )
        differences = _differences(groups, _baseline(groups, baseline))
        tables += [differences["table"]] if differences else []
        tables += [_frontier_table(folder, groups)]
        _write_tables(folder, groups, keys, head, rows, differences)
        figures |= {
            "frontier": ("Reward-KL frontier", sweep_plots.frontier_picture(groups)),
            "bands": ("Over training", sweep_plots.bands_picture(groups)),
            "lengths": ("Length and reward", sweep_plots.length_picture(groups)),
        }
    rows_of_evaluations, winrates = (
        [row for run in evaluations for row in run.evaluations],
        [rate for run in runs for rate in run.winrates],
    )
    tables += [evaluation_table(rows_of_evaluations), winrate_table(winrates)]
    figures["temperature"] = (
        "Temperature",
        sweep_plots.temperature_picture(rows_of_evaluations, winrates),
    )
    figures["checkpoints"] = ("Checkpoints", sweep_plots.checkpoints_picture(rows_of_evaluations))
    tables = [table for table in tables if table]
    states = defaultdict(int)
    for run in trained:
        states[run.state.split(":")[0]] += 1
    page = PAGE.render(
        title=f"{folder.resolve().name}: {len(trained)} runs",
        subtitle=", ".join(f"{n} {state}" for state, n in states.items()),
        problems=problems,
        tables=tables,
        pictures=save_pictures(folder, figures),
        samples=_side_by_side(groups),
    )
    with atomic_write(folder / "report.html") as f:
        f.write(page)
    return "\n\n".join(
        [
            *problems,
            *(table["title"] + "\n" + aligned([table["head"], *table["rows"]]) for table in tables),
        ]
    )


def _doubts(runs: list[Run]) -> list[str]:
    """What a reader of a comparison has to know before believing it."""
    told = [
        f"{run.folder}: {run.state}" for run in runs if run.state.startswith(("failed", "killed"))
    ]
    told += [
        f"{run.folder}: {n:,} values of metrics.jsonl are missing or no numbers"
        for run in runs
        if (n := run.not_finite())
    ]
    for key, what in (
        ("datasets", "on different data"),
        ("reward.name", "with different rewards"),
        ("model.name_or_path", "of different models"),
        ("temperature", "at different temperatures"),
    ):
        if len(found := sorted({run.setting(key) for run in runs})) > 1:
            told.append(
                f"These runs were evaluated {what} ({', '.join(found)}): their numbers do not"
                " compare."
            )
    if runs and not any(is_number(run.latest().get("policy_reward")) for run in runs):
        told.append(
            "No run has sampled yet, or sampling was off (sample_during_eval=false): there is no"
            " reward to compare."
        )
    return told


def comparison(groups: list[Group], keys: list[str]) -> tuple[list[str], list[list[str]]]:
    """The table for people: a row a group, mean ± standard error over its seeds."""
    digits = {"pairs_per_second": 1, "policy_length": 1, "kl": 2}
    rows = []
    for group in groups:
        cells = (
            plus_minus(*mean_and_error(group.by_seed(name).values()), digits.get(name, 3))
            for name in COMPARED
        )
        rows.append(
            [
                *group.settings.values(),
                " ".join(str(run.seed) for run in group.runs),
                *cells,
                group.state,
            ]
        )
    return [*keys, "seeds", *COMPARED, "state"], rows


def _baseline(groups: list[Group], wanted: dict[str, str] | None) -> Group:
    if not wanted:
        return groups[0]
    for key in wanted:
        if key not in groups[0].settings:
            raise ConfigError(
                f"--baseline {key}: the runs do not differ in it; they differ in"
                f" {', '.join(groups[0].settings)}"
            )
    found = [
        group
        for group in groups
        if all(group.settings[key] == value for key, value in wanted.items())
    ]
    if not found:
        raise ConfigError(
            f"--baseline: no group has {wanted}; there are"
            f" {', '.join(group.name for group in groups)}"
        )
    return found[0]


def _differences(groups: list[Group], baseline: Group) -> dict | None:
    """Every other group against the baseline, paired by seed."""
    rows, numbers = [], []
    for group in (g for g in groups if g is not baseline):
        cells = []
        for name in PAIRED:
            d = paired_difference(group.by_seed(name), baseline.by_seed(name))
            interval = f" [{d['low']:+.3f}, {d['high']:+.3f}]" if d and d["low"] is not None else ""
            cells.append(
                f"{d['mean']:+.3f}"
                + (f" ± {d['se']:.3f}" if d["se"] is not None else "")
                + interval
                if d
                else "-"
            )
            if d:
                numbers.append([group.name, baseline.name, name, *d.values()])
        rows.append([group.name, *cells])
    if not numbers:
        return None
    title = (
        f"Differences from {baseline.name}, paired by seed: mean ± standard error [bootstrap 95%]"
    )
    return {"table": {"title": title, "head": ["", *PAIRED], "rows": rows}, "numbers": numbers}


def _frontier_table(folder: Path, groups: list[Group]) -> dict | None:
    """The best reward within a KL, over all checkpoints of a loss; frontier.csv has it by seed."""
    families: dict[str, list[Run]] = defaultdict(list)
    for group in groups:
        families[group.family] += group.runs
    found = {name: envelopes(runs, AT_KL) for name, runs in families.items()}
    if not any(found.values()):
        return None
    with atomic_write(folder / "frontier.csv") as f:
        csv.writer(f).writerows(
            [
                ["loss", "seed", *(f"kl={kl}" for kl in AT_KL)],
                *(
                    [name, seed, *values]
                    for name, by_seed in found.items()
                    for seed, values in by_seed.items()
                ),
            ]
        )
    reached = [
        i
        for i in range(len(AT_KL))
        if any(None not in [best[i] for best in by_seed.values()] for by_seed in found.values())
    ]
    cell = lambda at: plus_minus(*mean_and_error(at)) if None not in at else "-"  # noqa: E731
    rows = [
        [name, *(cell([best[i] for best in by_seed.values()]) for i in reached)]
        for name, by_seed in found.items()
        if by_seed
    ]
    notes = ["Where all seeds got that far."]
    return (
        {
            "title": "Best reward within a KL to the reference: mean ± standard error over seeds",
            "head": ["", *(f"KL {AT_KL[i]:g}" for i in reached)],
            "rows": rows,
            "notes": notes,
        }
        if reached
        else None
    )


def _write_tables(
    folder: Path,
    groups: list[Group],
    keys: list[str],
    head: list[str],
    rows: list[list[str]],
    differences: dict | None,
) -> None:
    numbers = []
    for group in groups:
        values = [group.by_seed(name).values() for name in COMPARED]
        numbers.append(
            [
                *group.settings.values(),
                len(group.runs),
                *(n for v in values for n in (*mean_and_error(v), *bootstrap(v))),
                group.state,
            ]
        )
    columns = [f"{name}{end}" for name in COMPARED for end in ("", "_se", "_low", "_high")]
    with atomic_write(folder / "comparison.csv") as f:
        csv.writer(f).writerows([[*keys, "seeds", *columns, "state"], *numbers])
    with atomic_write(folder / "comparison.md") as f:
        f.write(
            "\n".join(
                "| " + " | ".join(map(str, row)) + " |"
                for row in [head, ["---"] * len(head), *rows]
            )
            + "\n"
        )
    with atomic_write(folder / "comparison.tex") as f:
        f.write(latex([head, *rows]))
    if differences:
        with atomic_write(folder / "differences.csv") as f:
            csv.writer(f).writerows(
                [
                    ["group", "baseline", "metric", "mean", "se", "low", "high", "seeds"],
                    *differences["numbers"],
                ]
            )


def _side_by_side(groups: list[Group]) -> list[dict]:
    """For each prompt what every group answered in its first seed, beside the reference and the
    data."""
    found: dict[str, dict] = {}
    for group in groups:
        for row in group.runs[0].samples():
            if row.get("sample", 0) == 0 and row.get("policy") is not None:
                entry = found.setdefault(
                    row["prompt"], {"prompt": row["prompt"], "where": "", "columns": []}
                )
                columns = sample_columns(row)["columns"]
                entry["columns"] += [
                    c
                    for c in columns
                    if c[0] != "policy" and c[0] not in [k[0] for k in entry["columns"]]
                ]
                entry["columns"] += [(group.name, *c[1:]) for c in columns if c[0] == "policy"]
    return list(found.values())[:MAX_SAMPLES]


def report(folder: Path, baseline: dict[str, str] | None = None) -> tuple[str, bool]:
    """The report of a run or of a folder of runs: its table as text, and whether something there is
    still running."""
    if (folder / "config.yaml").is_file():
        return write_report(folder), Run(folder).state == "running"
    runs, problems = find_runs(folder) if folder.is_dir() else ([], [])
    if not runs:
        raise DataError(
            f"{folder}: no run there; looked for folders with a config.yaml and a metrics.jsonl"
            + "".join(f"; {p}" for p in problems)
        )
    return write_comparison(folder, runs, baseline, problems), any(
        run.state == "running" for run in runs
    )
