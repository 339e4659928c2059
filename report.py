"""Run folders to tables and pictures: `python report.py RUN`, or a folder of runs. Needs no torch
and starts in a second.

    python report.py RUN                     a run, finished or not: report.html and pictures; also
    of what function=eval wrote python report.py SWEEP_DIR               a folder of runs: one
    table, paired differences, frontiers, curves with bands, samples python report.py SWEEP_DIR
    --baseline loss.name=dpo loss.beta=0.1
    python report.py RUN --watch [SECONDS]   again and again, until all runs there are done

A sweep gets comparison.csv (numbers), comparison.md and comparison.tex (mean ± standard error over
seeds), differences.csv (from the baseline, paired by seed, with bootstrap intervals), frontier.csv
(the best reward within a KL, by seed) and report.html.
"""

import argparse
import base64
import csv
import sys
import time
from collections import defaultdict
from pathlib import Path

import jinja2
from omegaconf import OmegaConf

import pictures
from runs import (
    Group,
    Run,
    bootstrap,
    differing_settings,
    envelopes,
    find_runs,
    group_runs,
    is_number,
    paired_difference,
)
from utils import ConfigError, DataError, PrefLabError, atomic_write, mean_and_error

MAX_SAMPLES = 60  # in a page


# ------------------------------------------------------------------------------------------- tables


def plus_minus(value, error=None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def summary_rows(summary: dict) -> list[tuple[str, str]]:
    get = summary.get
    reward = f" ({summary['reward']})" if get("reward") else ""
    rate, examples = get("pairs_per_second"), get("examples")
    return [
        (
            f"reward of the reference's samples{reward}",
            plus_minus(get("reference_reward"), get("reference_reward_se")),
        ),
        (
            f"reward of the policy's samples{reward}",
            plus_minus(get("policy_reward"), get("policy_reward_se")),
        ),
        ("gain, paired by prompt", plus_minus(get("reward_gain"), get("reward_gain_se"))),
        ("KL to the reference (nats)", plus_minus(get("kl"), get("kl_se"), 2)),
        ("eval accuracy", plus_minus(get("eval_accuracy"))),
        ("eval loss", plus_minus(get("eval_loss"), digits=4)),
        ("pairs/s in training", f"{rate:.1f}" if rate else "-"),
        ("examples seen", f"{examples:,}" if examples is not None else "-"),
    ] + _online_rows(summary)


def _online_rows(summary: dict) -> list[tuple[str, str]]:
    """Of an online run: its rounds, what it bought, and where its time went."""
    if "labels_bought" not in summary:
        return []
    seconds = {
        key.removeprefix("seconds_"): value
        for key, value in summary.items()
        if key.startswith("seconds_")
    }
    shares = [
        (f"time {name}", f"{100 * value / (sum(seconds.values()) or 1):.0f}%")
        for name, value in seconds.items()
    ]
    return [
        ("rounds", f"{summary['rounds']:,}"),
        ("gold labels bought", f"{summary['labels_bought']:,}"),
        *shares,
    ]


def summary_table(summary: dict) -> str:
    """The numbers of a run as aligned text, with standard errors, and "-" where there is none."""
    rows = summary_rows(summary)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>16}" for name, value in rows)


def verdict(summary: dict) -> str:
    """What happened to the reward, in a sentence that does not claim more than the standard error
    allows."""
    gain, error = summary.get("reward_gain"), summary.get("reward_gain_se")
    if gain is None:
        return "No samples of policy and reference to compare."
    kl = plus_minus(summary.get("kl"), summary.get("kl_se"), 2)
    told = (
        f"{plus_minus(summary['policy_reward'])} against the reference's"
        f" {plus_minus(summary['reference_reward'])}, at KL {kl} nats"
    )
    if error is None or abs(gain) <= 2 * error:
        return f"The policy's samples score {told}: a difference within two standard errors."
    return (
        f"The policy's samples score {'higher' if gain > 0 else 'lower'}, {told}: {gain:+.3f} ±"
        f" {error:.3f}."
    )


# -------------------------------------------------------------------------------------------- pages

PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
img { width: 100%; min-width: 44rem; height: auto; background: white; border-radius: 6px; margin: .4rem 0 }
table { border-collapse: collapse } td, th { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8884 }
.scroll { overflow-x: auto } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.sample { border-bottom: 1px solid #8884; padding: .7rem 0 } .three { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .4rem 1rem }
.bad { color: #c33 }
.who { font-size: .8rem; opacity: .7 } .text { white-space: pre-wrap; overflow-wrap: anywhere }
input { width: 100%; box-sizing: border-box; padding: .5rem; font: inherit } pre { overflow-x: auto; font-size: .85rem }
</style></head><body>
<h1>{{ title }}</h1>
{% if subtitle %}<p>{{ subtitle }}</p>{% endif %}
{% for line in problems %}<p class="bad">{{ line }}</p>{% endfor %}
{% for table in tables %}
{% if table.title %}<h2>{{ table.title }}</h2>{% endif %}
<div class="scroll"><table>
{% if table.head %}<tr>{% for cell in table.head %}<th{% if not loop.first %} class="number"{% endif %}>{{ cell }}</th>{% endfor %}</tr>{% endif %}
{% for row in table.rows %}<tr>{% for cell in row %}<td{% if not loop.first %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% for line in table.notes %}<p>{{ line }}</p>{% endfor %}
{% endfor %}
{% for picture in pictures %}<h2>{{ picture.title }}</h2><div class="scroll"><img alt="{{ picture.title }}" src="data:image/png;base64,{{ picture.base64 }}"></div>
{% endfor %}
{% if samples %}<h2>Samples</h2>
<input id="search" placeholder="search in {{ samples|length }} samples" aria-label="search samples">
{% for s in samples %}<div class="sample"><div class="text"><b>{{ s.prompt }}</b></div>{% if s.where %}<div class="who">{{ s.where }}</div>{% endif %}<div class="three">
{% for who, text, score in s.columns %}<div><div class="who">{{ who }}{% if score %} · {{ score }}{% endif %}</div><div class="text">{{ text|trim }}</div></div>
{% endfor %}</div></div>
{% endfor %}
<script>
document.getElementById("search").addEventListener("input", function () {
  const wanted = this.value.toLowerCase();
  for (const s of document.querySelectorAll(".sample")) s.hidden = !s.textContent.toLowerCase().includes(wanted);
});
</script>{% endif %}
{% if config %}<h2>Config</h2><details><summary>as resolved</summary><pre>{{ config }}</pre></details>{% endif %}
</body></html>
"""
)


def _sample_columns(sample: dict) -> dict:
    def scores(rewards: dict | None) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in (rewards or {}).items())

    policy = scores(sample.get("policy_reward")) + (
        f", KL {sample['kl']:.2f}" if sample.get("kl") is not None else ""
    )
    columns = [
        ("reference", sample.get("reference"), scores(sample.get("reference_reward"))),
        ("policy", sample.get("policy"), policy),
    ]
    columns.append(("best in the data", sample.get("chosen"), ""))
    where = (
        [
            f"{key} {sample[key]}"
            for key in ("checkpoint", "temperature")
            if sample.get(key) is not None
        ]
        if "checkpoint" in sample
        else []
    )
    return {
        "prompt": sample.get("prompt", ""),
        "where": ", ".join(where),
        "columns": [c for c in columns if c[1] is not None],
    }


def _data_table(data: dict) -> dict | None:
    parts = [part for split in data.values() for part in split.get("datasets", [])]
    if not parts:
        return None
    keys = ("rows", "prompts", "responses", "pairs", "truncated_prompts", "truncated_responses")
    rows = [
        [f"{p.get('name')} {p.get('split')}", *(f"{p.get(key, 0):,}" for key in keys)]
        for p in parts
    ]
    notes = [
        f"{p['name']} {p['split']}: skipped {n:,}, {why}"
        for p in parts
        for why, n in p.get("skipped", {}).items()
    ]
    notes += [f"{p['name']} {p['split']}: {p['note']}" for p in parts if p.get("note")]
    return {
        "title": "Data",
        "head": ["", *(key.replace("_", " ") for key in keys)],
        "rows": rows,
        "notes": notes,
    }


def _winrate_table(winrates: list[dict]) -> dict | None:
    if not winrates:
        return None
    rows = []
    for rate in winrates:
        told = (
            f"{rate['win_rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
            if is_number(rate.get("win_rate"))
            else "-"
        )
        counts = (
            rate.get(key, 0) for key in ("wins", "ties", "losses", "contradictions", "unjudged")
        )
        rows.append(
            [
                rate.get("checkpoint") or "policy",
                rate.get("temperature"),
                rate["against"],
                rate["by"],
                told,
                *counts,
            ]
        )
    head = [
        "",
        "temperature",
        "against",
        "by",
        "win rate, 95%",
        "wins",
        "ties",
        "losses",
        "contradictions",
        "unjudged",
    ]
    return {
        "title": "Win rates",
        "head": head,
        "rows": rows,
        "notes": [
            "A tie counts one half; so does a pair on which the two orders contradict each other."
        ],
    }


EVALUATED = {  # columns of the table of checkpoints
    "reward": "samples_eval/policy_reward",
    "reference's": "samples_eval/reference_reward",
    "KL": "samples_eval/kl",
    "tokens": "samples_eval/policy_length",
    "ended": "samples_eval/policy_ended",
    "entropy": "samples_eval/entropy",
    "repetition": "samples_eval/repetition",
    "distinct-2": "samples_eval/policy_distinct_2",
    "accuracy": "rewards_eval/accuracies",
}


def _evaluation_table(evaluations: list[dict]) -> dict | None:
    if not evaluations:
        return None
    extra = {
        key.removeprefix("samples_eval/policy_reward"): key
        for row in evaluations
        for key in row
        if key.startswith("samples_eval/policy_reward[") and key.endswith("]")
    }
    extra |= {
        f"accuracy on {key.split('@')[1]}": key
        for row in evaluations
        for key in row
        if key.startswith("rewards_eval/accuracies@")
    }
    columns = EVALUATED | extra
    rows = [
        [
            row["name"],
            pictures.training_name(row),
            row["temperature"],
            *(plus_minus(row.get(key), row.get(f"{key}_se")) for key in columns.values()),
        ]
        for row in evaluations
    ]
    notes = [
        "Rewards, KL and the rest are means over prompts with standard errors; the KL is that of"
        " the sampled distribution only at temperature 1 and top-p 1."
    ]
    return {
        "title": "Checkpoints",
        "head": ["checkpoint", "trained with", "temperature", *columns],
        "rows": rows,
        "notes": notes,
    }


def write_report(run_dir: Path) -> str:
    """Write the pictures and report.html of a run folder; returns the table of its numbers as
    text."""
    run = Run(Path(run_dir))
    figures = {
        "reward_kl": ("Reward", pictures.reward_kl(run) if not run.is_evaluation else None),
        "online": ("Rounds", pictures.online_picture({run.loss: [run]})),
        "checkpoints": ("Checkpoints", pictures.checkpoints_picture(run.evaluations)),
        "temperature": ("Temperature", pictures.temperature_picture(run.evaluations, run.winrates)),
        "curves": ("Training", pictures.curves(run) if not run.is_evaluation else None),
        "data": ("Lengths and scores", pictures.data_picture(run)),
    }
    summary, samples = run.latest(), run.samples()
    bad = run.not_finite()
    tables = [{"rows": summary_rows(summary)} if len(run.evaluations) < 2 else None]
    tables += [
        _evaluation_table(run.evaluations),
        _winrate_table(run.winrates),
        _data_table(run.data),
    ]
    page = PAGE.render(
        title=f"{run.config.get('exp_name', run.folder.name)}: "
        + ("evaluation" if run.is_evaluation else run.loss),
        subtitle=("" if run.finished else f"This run has not finished ({run.state}). ")
        + (verdict(summary) if len(run.evaluations) < 2 else ""),
        problems=(
            [
                f"{bad:,} values of metrics.jsonl are missing or no numbers; they are left out of"
                " the curves."
            ]
            if bad
            else []
        ),
        tables=[table for table in tables if table],
        pictures=_save_pictures(run.folder, figures),
        samples=[_sample_columns(s) for s in _spread(samples)],
        config=OmegaConf.to_yaml(OmegaConf.create(run.config)),
    )
    with atomic_write(run.folder / "report.html") as f:
        f.write(page)
    if len(run.evaluations) > 1:
        table = _evaluation_table(run.evaluations)
        return _aligned([table["head"], *table["rows"]])
    return summary_table(summary)


def _spread(samples: list[dict]) -> list[dict]:
    """As many samples as a page takes, the same prompts of every checkpoint and temperature side by
    side."""
    by_prompt = defaultdict(list)
    for sample in samples:
        by_prompt[sample.get("prompt")].append(sample)
    return [sample for of_prompt in by_prompt.values() for sample in of_prompt][:MAX_SAMPLES]


def _save_pictures(folder: Path, figures: dict) -> list[dict]:
    """Each figure as PNG and SVG; returns what a page shows."""
    saved = []
    for name, (title, figure) in figures.items():
        if figure is not None:
            content = pictures.png(figure)
            for end, data in (("png", content), ("svg", pictures.svg(figure))):
                with atomic_write(folder / f"{name}.{end}", "wb") as f:
                    f.write(data)
            saved.append({"title": title, "base64": base64.b64encode(content).decode()})
    return saved


# ------------------------------------------------------------------------------------------- sweeps

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
            "frontier": ("Reward-KL frontier", pictures.frontier_picture(groups)),
            "bands": ("Over training", pictures.bands_picture(groups)),
            "lengths": ("Length and reward", pictures.length_picture(groups)),
        }
    rows_of_evaluations, winrates = (
        [row for run in evaluations for row in run.evaluations],
        [rate for run in runs for rate in run.winrates],
    )
    tables += [_evaluation_table(rows_of_evaluations), _winrate_table(winrates)]
    figures["temperature"] = (
        "Temperature",
        pictures.temperature_picture(rows_of_evaluations, winrates),
    )
    figures["checkpoints"] = ("Checkpoints", pictures.checkpoints_picture(rows_of_evaluations))
    tables = [table for table in tables if table]
    states = defaultdict(int)
    for run in trained:
        states[run.state.split(":")[0]] += 1
    page = PAGE.render(
        title=f"{folder.resolve().name}: {len(trained)} runs",
        subtitle=", ".join(f"{n} {state}" for state, n in states.items()),
        problems=problems,
        tables=tables,
        pictures=_save_pictures(folder, figures),
        samples=_side_by_side(groups),
    )
    with atomic_write(folder / "report.html") as f:
        f.write(page)
    return "\n\n".join(
        [
            *problems,
            *(
                table["title"] + "\n" + _aligned([table["head"], *table["rows"]])
                for table in tables
            ),
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


def latex(rows: list[list[str]]) -> str:
    """A tabular for booktabs; the first row is its head."""
    special = {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
    }
    lines = [
        " & ".join("".join(special.get(c, c) for c in str(cell)) for cell in row) + r" \\"
        for row in rows
    ]
    return "\n".join(
        [
            r"\begin{tabular}{" + "l" * len(rows[0]) + "}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
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
                columns = _sample_columns(row)["columns"]
                entry["columns"] += [
                    c
                    for c in columns
                    if c[0] != "policy" and c[0] not in [k[0] for k in entry["columns"]]
                ]
                entry["columns"] += [(group.name, *c[1:]) for c in columns if c[0] == "policy"]
    return list(found.values())[:MAX_SAMPLES]


def _aligned(rows: list[list]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )


# ------------------------------------------------------------------------------------------ command


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a run folder, or a folder of run folders")
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the group to compare with",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="write it anew every so often while runs go on",
    )
    arguments = parser.parse_args()
    try:
        while True:
            table, running = report(
                arguments.folder, dict(pair.partition("=")[::2] for pair in arguments.baseline)
            )
            print(table)
            print(f"{arguments.folder / 'report.html'}", flush=True)
            if not (arguments.watch and running):
                break
            time.sleep(arguments.watch)
    except KeyboardInterrupt:
        pass
    except PrefLabError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
