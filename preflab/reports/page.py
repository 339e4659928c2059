"""report.html: the template, its pictures and its samples, for a run and for a sweep."""

import base64
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from preflab.reports.plot_style import png, svg
from preflab.reports.runs import other_sampler
from preflab.reports.tables import Table
from utils import atomic_write

MAX_SAMPLES = 60  # on a page

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # samples are text of models and of data sets, never HTML
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(
    folder: Path,
    title: str,
    subtitle: str,
    problems: list[str],
    tables: list[Table],
    pictures: list[dict[str, str]],
    samples: list[dict],
    config: str = "",
) -> None:
    """Write report.html, one file with all pictures in it.

    pictures: as `save_figures` returns them; samples: as `sample_columns` returns them; config:
    YAML.
    """
    html = TEMPLATES.get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle,
        problems=problems,
        tables=tables,
        pictures=pictures,
        samples=samples[:MAX_SAMPLES],
        config=config,
    )
    with atomic_write(folder / "report.html") as f:
        f.write(html.encode(errors="replace").decode())


def save_figures(
    folder: Path, figures: dict[str, tuple[str, Figure | None]]
) -> list[dict[str, str]]:
    """Write each figure, {file name: (title, figure)}, as PNG and SVG; return the pictures of the
    page."""
    pictures = []
    for name, (title, figure) in figures.items():
        if figure is None:
            continue
        content = png(figure)
        for suffix, data in (("png", content), ("svg", svg(figure))):
            with atomic_write(folder / f"{name}.{suffix}", "wb") as f:
                f.write(data)
        pictures.append({"title": title, "base64": base64.b64encode(content).decode()})
    return pictures


def sample_columns(sample: dict) -> dict:
    """A row of samples.jsonl for the page: the prompt, the checkpoint and temperature it is of,
    and columns (name, text, scores) for the reference, the policy and the data."""

    def scores(rewards: dict | None) -> str:
        return ", ".join(f"{name} {value:z.3f}" for name, value in (rewards or {}).items())

    policy_scores = scores(sample.get("policy_reward"))
    if sample.get("kl") is not None:
        along = f" along a sample at {sampler}" if (sampler := other_sampler(sample)) else ""
        policy_scores += f", KL {sample['kl']:z.2f}{along}"
    columns = [
        ("reference", sample.get("reference"), scores(sample.get("reference_reward"))),
        ("policy", sample.get("policy"), policy_scores),
        ("best in the data", sample.get("chosen"), ""),
    ]
    source = []
    if "checkpoint" in sample:
        source = [
            f"{key} {sample[key]}"
            for key in ("checkpoint", "temperature")
            if sample.get(key) is not None
        ]
    return {
        "prompt": sample.get("prompt", ""),
        "source": ", ".join(source),
        "columns": [column for column in columns if column[1] is not None],
    }
