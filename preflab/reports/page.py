"""report.html: the template, its pictures and its samples, for a run and for a sweep."""

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from preflab.reports.charts import Chart, chart_of
from preflab.reports.plot_style import png, svg
from preflab.reports.sample_cards import Samples
from preflab.reports.tables import Table
from utils import atomic_write

HERE = Path(__file__).parent

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE),
    autoescape=True,  # samples are text of models and of data sets, never HTML
    trim_blocks=True,
    lstrip_blocks=True,
)

NUMBER = re.compile(r"[-+<>(]?\d|-$|beyond \d")


def _number_columns(table: Table) -> list[bool]:
    """Which columns have numbers, which are aligned at the right and not broken."""
    columns = zip(*table.rows, strict=True)
    return [all(NUMBER.match(str(cell)) for cell in column) for column in columns]


TEMPLATES.filters["number_columns"] = _number_columns


def write_page(
    folder: Path,
    title: str,
    subtitle: str,
    problems: Sequence[str],
    tables: Sequence[Table],
    charts: Sequence[Chart],
    samples: Samples | None = None,
    config: str = "",
) -> None:
    """Write report.html, one file with everything in it. config: YAML."""
    html = TEMPLATES.get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle,
        problems=problems,
        tables=tables,
        charts=charts,
        samples=samples,
        config=config,
        css=Markup((HERE / "page.css").read_text()),
        script=Markup((HERE / "page.js").read_text()),
    )
    with atomic_write(folder / "report.html") as f:
        f.write(html.encode(errors="replace").decode())


def save_figures(folder: Path, figures: dict[str, tuple[str, Figure | None]]) -> list[Chart]:
    """Write each figure, {file name: (title, figure)}, as PNG and SVG; return the charts of the
    page."""
    charts = []
    for name, (title, figure) in figures.items():
        if figure is None:
            continue
        for suffix, data in (("png", png(figure)), ("svg", svg(figure))):
            with atomic_write(folder / f"{name}.{suffix}", "wb") as f:
                f.write(data)
        charts.append(chart_of(title, figure))
    return charts
