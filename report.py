"""Run folders to tables and pictures: `python report.py RUN`, or a folder of runs. Needs no torch and starts in a second.

A single run gets PNGs and a self-contained report.html; a sweep gets a comparison table and its reward-KL frontier.
Both work while runs are still going.
"""

import argparse
import base64
import csv
import io
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import jinja2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from utils import DataError, PrefLabError, atomic_write

# The Okabe-Ito palette, which colour-blind readers can tell apart.
COLOURS = {"policy": "#0072B2", "reference": "#7F7F7F", "chosen": "#009E73", "rejected": "#D55E00", "train": "#56B4E9", "eval": "#CC3311"}
CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]
MAX_POINTS = 2000  # of a curve; longer ones are thinned, the eye sees no difference


# ------------------------------------------------------------------------------------------------- reading runs


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON-lines file; a last line that a running or killed process has not finished is left out."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(f"{path}:{number}: not JSON, though more lines follow: {error}") from error
    return rows


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class Run:
    """What a run folder holds so far."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        self.rows = read_jsonl(folder / "metrics.jsonl")
        self.summary = read_json(folder / "summary.json")
        self.data = read_json(folder / "data.json")

    @property
    def finished(self) -> bool:
        return bool(self.summary.get("finished"))

    def series(self, split: str, name: str) -> tuple[list, list]:
        """(examples, values) of a metric, where it has a value."""
        points = [(row["examples"], row[name]) for row in self.rows if row.get("split") == split and row.get(name) is not None]
        points = points[:: max(1, len(points) // MAX_POINTS)]
        return [x for x, _ in points], [y for _, y in points]

    def frontier(self) -> list[tuple[float, float, float]]:
        """(KL, reward, examples) of every evaluation that sampled."""
        names = ("samples_eval/kl", "samples_eval/policy_reward", "examples")
        return [tuple(row[n] for n in names) for row in self.rows if row.get("split") == "eval" and all(row.get(n) is not None for n in names)]

    def latest(self) -> dict:
        """The summary of a finished run, or the same numbers from the last evaluation of a running one."""
        if self.summary:
            return self.summary
        evals = [row for row in self.rows if row.get("split") == "eval"]
        last = evals[-1] if evals else {}
        found = {key.split("/")[1]: value for key, value in last.items() if key.startswith("samples_eval/")}
        trained = [row for row in self.rows if row.get("split") == "train"]
        found["pairs_per_second"] = trained[-1].get("examples_per_second") if trained else None
        return found | {"eval_accuracy": last.get("rewards_eval/accuracies"), "eval_loss": last.get("loss/eval"), "examples": last.get("examples")}


# -------------------------------------------------------------------------------------------------------- tables


def plus_minus(value, error=None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def summary_rows(summary: dict) -> list[tuple[str, str]]:
    get = summary.get
    reward = f" ({summary['reward']})" if get("reward") else ""
    rate, examples = get("pairs_per_second"), get("examples")
    return [
        (f"reward of the reference's samples{reward}", plus_minus(get("reference_reward"), get("reference_reward_se"))),
        (f"reward of the policy's samples{reward}", plus_minus(get("policy_reward"), get("policy_reward_se"))),
        ("gain, paired by prompt", plus_minus(get("reward_gain"), get("reward_gain_se"))),
        ("KL to the reference (nats)", plus_minus(get("kl"), get("kl_se"), 2)),
        ("eval accuracy", plus_minus(get("eval_accuracy"))),
        ("eval loss", plus_minus(get("eval_loss"), digits=4)),
        ("pairs/s in training", f"{rate:.1f}" if rate else "-"),
        ("examples seen", f"{examples:,}" if examples is not None else "-"),
    ]


def summary_table(summary: dict) -> str:
    """The numbers of a run as aligned text, with standard errors, and "-" where there is none."""
    rows = summary_rows(summary)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>16}" for name, value in rows)


def verdict(summary: dict) -> str:
    """What happened to the reward, in a sentence that does not claim more than the standard error allows."""
    gain, error = summary.get("reward_gain"), summary.get("reward_gain_se")
    if gain is None:
        return "No samples of policy and reference to compare."
    kl = plus_minus(summary.get("kl"), summary.get("kl_se"), 2)
    told = f"{plus_minus(summary['policy_reward'])} against the reference's {plus_minus(summary['reference_reward'])}, at KL {kl} nats"
    if error is None or abs(gain) <= 2 * error:
        return f"The policy's samples score {told}: a difference within two standard errors."
    return f"The policy's samples score {'higher' if gain > 0 else 'lower'}, {told}: {gain:+.3f} ± {error:.3f}."


# ------------------------------------------------------------------------------------------------------ pictures


def _axes(figure: Figure, rows: int, columns: int) -> list:
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.tick_params(labelsize=9)
    return axes


def _label(ax, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=11, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8, frameon=False)


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed


def curves(run: Run) -> Figure | None:
    """Loss, accuracy, rewards, log-ratios, and what else the run logged, against examples."""
    panels = [("loss", "loss per example", [("loss/{}", "eval", "")])]
    panels += [("accuracy of the implicit reward", "share of pairs", [("rewards_{}/accuracies", "eval", "")])]
    pair = [("/chosen", "chosen"), ("/rejected", "rejected")]
    panels += [("implicit rewards", "beta x log-ratio", [(f"rewards_{{}}{end}", role, role) for end, role in pair])]
    panels += [("log-ratios", "log pi - log ref (nats)", [(f"logratios_{{}}{end}", role, role) for end, role in pair])]
    panels += [("KL along the data's responses", "nats", [(f"kl_{{}}{end}", role, role) for end, role in pair])]
    panels += [("gradient norm, before clipping", "norm", [("grad_norm", "train", "")])]
    panels = [p for p in panels if any(run.series(split, name.format(split))[0] for name, *_ in p[2] for split in ("train", "eval"))]
    if not panels:
        return None
    n_rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 3.1 * n_rows), layout="constrained")
    axes = _axes(figure, n_rows, 2)
    for ax, (title, unit, lines) in zip(axes, panels):
        for name, colour, role in lines:
            x, y = run.series("train", name.format("train"))
            ax.plot(x, y, color=COLOURS["train" if not role else colour], alpha=0.25, linewidth=0.8)
            ax.plot(x, smooth(y), color=COLOURS["train" if not role else colour], linewidth=1.2, label=f"{role} train".strip() if x else None)
            x, y = run.series("eval", name.format("eval"))
            if x and name != "grad_norm":
                ax.plot(x, y, color=COLOURS[colour], marker="o", markersize=4, linewidth=1.5, label=f"{role} eval".strip())
        _label(ax, title, "examples", unit)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def reward_kl(run: Run) -> Figure | None:
    """Reward of the samples against examples, and against KL: the run's own frontier."""
    points = run.frontier()
    x, y = run.series("eval", "samples_eval/policy_reward")
    if not x:
        return None
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = _axes(figure, 1, 2)
    for who in ("policy", "reference"):
        x, y = run.series("eval", f"samples_eval/{who}_reward")
        errors = run.series("eval", f"samples_eval/{who}_reward_se")[1]
        if x:
            bars = [1.96 * e for e in errors] if len(errors) == len(x) else None
            left.errorbar(x, y, yerr=bars, color=COLOURS[who], marker="o", markersize=4, capsize=2, linewidth=1.5, label=who)
    name = run.config.get("reward", {}).get("name", "reward")
    _label(left, "reward of samples (bars: 95%)", "examples", name)
    if points:
        right.plot([p[0] for p in points], [p[1] for p in points], color=COLOURS["policy"], marker="o", markersize=4, linewidth=1.2)
        for kl, reward, examples in (points[0], points[-1]):
            right.annotate(f"{examples:,}", (kl, reward), textcoords="offset points", xytext=(6, -10), fontsize=8)
        _label(right, "reward against KL, labelled by examples", "KL(policy || reference) of samples (nats)", name)
    else:
        right.set_visible(False)
    return figure


def data_picture(run: Run) -> Figure | None:
    """Histograms of prompt and response lengths and score gaps, train and test."""
    names = [n for n in ("prompt_tokens", "response_tokens", "score_gap") if any(n in s.get("histograms", {}) for s in run.data.values())]
    if not names:
        return None
    units = {"prompt_tokens": "tokens of a prompt", "response_tokens": "tokens of a response", "score_gap": "score gap of a pair"}
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for ax, name in zip(_axes(figure, 1, len(names)), names):
        for split, colour in (("train", "train"), ("test", "eval")):
            h = run.data.get(split, {}).get("histograms", {}).get(name)
            if h:
                total = sum(h["counts"]) or 1
                ax.stairs([c / total for c in h["counts"]], h["edges"], color=COLOURS[colour], label=split, fill=split == "train", alpha=0.7)
        _label(ax, units[name], units[name], "share")
    return figure


def frontier_picture(runs: list[Run]) -> Figure | None:
    """Reward against KL for every sampled evaluation of every run; a colour a loss, a line a run, final ones larger."""
    runs = [run for run in runs if run.frontier()]
    if not runs:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    (ax,) = _axes(figure, 1, 1)
    losses = sorted({run.config["loss"]["name"] for run in runs})
    for run in runs:
        loss, points = run.config["loss"]["name"], run.frontier()
        colour = CYCLE[losses.index(loss) % len(CYCLE)]
        first = loss not in ax.get_legend_handles_labels()[1]
        ax.plot([p[0] for p in points], [p[1] for p in points], color=colour, marker=".", linewidth=0.8, alpha=0.6, label=loss if first else None)
        ax.plot(*points[-1][:2], color=colour, marker="o", markersize=8)
    _label(ax, "reward against KL; large points are the ends of runs", "KL(policy || reference) of samples (nats)", "reward of samples")
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------- pages

PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
img { width: 100%; min-width: 44rem; height: auto; background: white; border-radius: 6px; margin: .4rem 0 }
table { border-collapse: collapse } td, th { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8884 }
.scroll { overflow-x: auto } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.sample { border-bottom: 1px solid #8884; padding: .7rem 0 } .three { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem }
@media (max-width: 45rem) { .three { grid-template-columns: 1fr; gap: .4rem } }
.who { font-size: .8rem; opacity: .7 } .text { white-space: pre-wrap; overflow-wrap: anywhere }
input { width: 100%; box-sizing: border-box; padding: .5rem; font: inherit } pre { overflow-x: auto; font-size: .85rem }
</style></head><body>
<h1>{{ title }}</h1>
{% if subtitle %}<p>{{ subtitle }}</p>{% endif %}
{% for table in tables %}
{% if table.title %}<h2>{{ table.title }}</h2>{% endif %}
<div class="scroll"><table>
{% if table.head %}<tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr>{% endif %}
{% for row in table.rows %}<tr>{% for cell in row %}<td{% if not loop.first %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% for line in table.notes %}<p>{{ line }}</p>{% endfor %}
{% endfor %}
{% for picture in pictures %}<h2>{{ picture.title }}</h2><div class="scroll"><img alt="{{ picture.title }}" src="data:image/png;base64,{{ picture.base64 }}"></div>
{% endfor %}
{% if samples %}<h2>Samples of the last evaluation</h2>
<input id="search" placeholder="search in {{ samples|length }} samples" aria-label="search samples">
{% for s in samples %}<div class="sample"><div class="text"><b>{{ s.prompt }}</b></div><div class="three">
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
""")


def _sample_columns(sample: dict) -> dict:
    def scores(rewards: dict | None) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in (rewards or {}).items())

    policy = scores(sample.get("policy_reward")) + (f", KL {sample['kl']:.2f}" if sample.get("kl") is not None else "")
    columns = [("reference", sample.get("reference"), scores(sample.get("reference_reward"))), ("policy", sample.get("policy"), policy)]
    columns.append(("best in the data", sample.get("chosen"), ""))
    return {"prompt": sample.get("prompt", ""), "columns": [c for c in columns if c[1] is not None]}


def _data_table(data: dict) -> dict | None:
    parts = [part for split in data.values() for part in split.get("datasets", [])]
    if not parts:
        return None
    keys = ("rows", "prompts", "responses", "pairs", "truncated_prompts", "truncated_responses")
    rows = [[f"{p.get('name')} {p.get('split')}", *(f"{p.get(key, 0):,}" for key in keys)] for p in parts]
    notes = [f"{p['name']} {p['split']}: skipped {n:,}, {why}" for p in parts for why, n in p.get("skipped", {}).items()]
    notes += [f"{p['name']} {p['split']}: {p['note']}" for p in parts if p.get("note")]
    return {"title": "Data", "head": ["", *(key.replace("_", " ") for key in keys)], "rows": rows, "notes": notes}


def write_report(run_dir: Path) -> str:
    """Write the PNGs and report.html of a run folder; returns the table of its numbers as text."""
    run = Run(Path(run_dir))
    figures = {"reward_kl": ("Reward", reward_kl(run)), "curves": ("Training", curves(run)), "data": ("Lengths and scores", data_picture(run))}
    pictures = _save_pictures(run.folder, figures)
    summary, samples = run.latest(), read_jsonl(run.folder / "samples.jsonl")
    last = [s for s in samples if s.get("examples") == samples[-1].get("examples")][:50] if samples else []
    state = "" if run.finished else "This run has not finished. "
    tables = [{"rows": summary_rows(summary)}, _data_table(run.data)]
    page = PAGE.render(
        title=f"{run.config.get('exp_name', run.folder.name)}: {run.config['loss']['name']}",
        subtitle=state + verdict(summary),
        tables=[table for table in tables if table],
        pictures=pictures,
        samples=[_sample_columns(s) for s in last],
        config=OmegaConf.to_yaml(OmegaConf.create(run.config)),
    )
    with atomic_write(run.folder / "report.html") as f:
        f.write(page)
    return summary_table(summary)


def _save_pictures(folder: Path, figures: dict) -> list[dict]:
    pictures = []
    for name, (title, figure) in figures.items():
        if figure is not None:
            content = png(figure)
            with atomic_write(folder / f"{name}.png", "wb") as f:
                f.write(content)
            pictures.append({"title": title, "base64": base64.b64encode(content).decode()})
    return pictures


# -------------------------------------------------------------------------------------------------------- sweeps

COMPARED = ("policy_reward", "reference_reward", "kl", "eval_accuracy", "pairs_per_second")
NOT_SETTINGS = ("local_run_dir", "exp_name", "local_dirs", "seed", "cache_dir", "wandb")


def write_comparison(folder: Path, runs: list[Run]) -> str:
    """comparison.csv, comparison.md, frontier.png and report.html of a folder of runs; returns the table as text."""
    differing = _differing_settings(runs)
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(_setting(run, key) for key in differing)].append(run)
    head = [*differing, "seeds", *COMPARED, "state"]
    rows = []
    for settings, members in sorted(groups.items(), key=lambda item: str(item[0])):
        seeds = sorted(str(run.config.get("seed")) for run in members)
        state = "finished" if all(run.finished for run in members) else f"{sum(run.finished for run in members)} of {len(members)} finished"
        rows.append([*settings, " ".join(seeds), *(_over_seeds([run.latest().get(name) for run in members]) for name in COMPARED), state])
    with atomic_write(folder / "comparison.csv") as f:
        csv.writer(f).writerows([head, *rows])
    table = _aligned([head, *rows])
    with atomic_write(folder / "comparison.md") as f:
        f.write("\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n")
    pictures = _save_pictures(folder, {"frontier": ("Reward-KL frontier", frontier_picture(runs))})
    with atomic_write(folder / "report.html") as f:
        f.write(PAGE.render(title=f"{folder.name}: {len(runs)} runs", tables=[{"head": head, "rows": rows}], pictures=pictures))
    return table


def _differing_settings(runs: list[Run]) -> list[str]:
    """Dotted keys whose values differ among the runs that have them, the loss first; seeds are aggregated over."""
    flat = [_flatten(run.config) for run in runs]
    keys = sorted({key for f in flat for key in f}, key=lambda key: (key != "loss.name", key))
    return [key for key in keys if key.split(".")[0] not in NOT_SETTINGS and len({str(f[key]) for f in flat if key in f}) > 1] or ["loss.name"]


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _setting(run: Run, key: str) -> str:
    return str(_flatten(run.config).get(key, "-"))


def _over_seeds(values: list) -> str:
    """Mean over seeds, with its standard error from two on."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return plus_minus(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)))


def _aligned(rows: list[list]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def find_runs(folder: Path) -> list[Run]:
    """Run folders below `folder`: those with a config.yaml and a metrics.jsonl."""
    found = [p.parent for p in sorted(folder.rglob("config.yaml")) if (p.parent / "metrics.jsonl").is_file()]
    return [Run(path) for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a run folder, or a folder of run folders")
    folder = parser.parse_args().folder
    try:
        if (folder / "config.yaml").is_file():
            print(write_report(folder))
        else:
            runs = find_runs(folder) if folder.is_dir() else []
            if not runs:
                raise DataError(f"{folder}: no run there; looked for folders with a config.yaml and a metrics.jsonl")
            print(write_comparison(folder, runs))
        print(f"{folder / 'report.html'}")
    except PrefLabError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
