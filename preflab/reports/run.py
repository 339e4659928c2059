"""The page of one run."""

import base64
from collections import defaultdict
from pathlib import Path

import jinja2
from omegaconf import OmegaConf

from preflab.reports import plot_style, plots, sweep_plots
from preflab.reports.runs import Run
from preflab.reports.tables import (
    aligned,
    data_table,
    evaluation_table,
    summary_rows,
    summary_table,
    verdict,
    winrate_table,
)
from utils import atomic_write

MAX_SAMPLES = 60  # in a page


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


def sample_columns(sample: dict) -> dict:
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


def write_report(run_dir: Path) -> str:
    """Write the pictures and report.html of a run folder; returns the table of its numbers as
    text."""
    run = Run(Path(run_dir))
    figures = {
        "reward_kl": ("Reward", plots.reward_kl(run) if not run.is_evaluation else None),
        "online": ("Rounds", plots.online_picture({run.loss: [run]})),
        "checkpoints": ("Checkpoints", sweep_plots.checkpoints_picture(run.evaluations)),
        "temperature": (
            "Temperature",
            sweep_plots.temperature_picture(run.evaluations, run.winrates),
        ),
        "curves": ("Training", plots.curves(run) if not run.is_evaluation else None),
        "data": ("Lengths and scores", plots.data_picture(run)),
    }
    summary, samples = run.latest(), run.samples()
    bad = run.not_finite()
    tables = [{"rows": summary_rows(summary)} if len(run.evaluations) < 2 else None]
    tables += [
        evaluation_table(run.evaluations),
        winrate_table(run.winrates),
        data_table(run.data),
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
        pictures=save_pictures(run.folder, figures),
        samples=[sample_columns(s) for s in _spread(samples)],
        config=OmegaConf.to_yaml(OmegaConf.create(run.config)),
    )
    with atomic_write(run.folder / "report.html") as f:
        f.write(page)
    if len(run.evaluations) > 1:
        table = evaluation_table(run.evaluations)
        return aligned([table["head"], *table["rows"]])
    return summary_table(summary)


def _spread(samples: list[dict]) -> list[dict]:
    """As many samples as a page takes, the same prompts of every checkpoint and temperature side by
    side."""
    by_prompt = defaultdict(list)
    for sample in samples:
        by_prompt[sample.get("prompt")].append(sample)
    return [sample for of_prompt in by_prompt.values() for sample in of_prompt][:MAX_SAMPLES]


def save_pictures(folder: Path, figures: dict) -> list[dict]:
    """Each figure as PNG and SVG; returns what a page shows."""
    saved = []
    for name, (title, figure) in figures.items():
        if figure is not None:
            content = plot_style.png(figure)
            for end, data in (("png", content), ("svg", plot_style.svg(figure))):
                with atomic_write(folder / f"{name}.{end}", "wb") as f:
                    f.write(data)
            saved.append({"title": title, "base64": base64.b64encode(content).decode()})
    return saved
