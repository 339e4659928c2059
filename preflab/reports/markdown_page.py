"""A page that was written in Markdown as report.html: sections with a table each."""

import re
from collections.abc import Sequence
from pathlib import Path

from preflab.reports.charts import Chart
from preflab.reports.page import write_page
from preflab.reports.tables import Table


def write_markdown_page(folder: Path, text: str, charts: Sequence[Chart]) -> None:
    """Write report.html of headings, paragraphs, lists and tables. charts: in place of the
    pictures that the text links."""
    first, *sections = re.split(r"(?m)^#+ ", text.strip().removeprefix("# "))
    title, _, intro = first.partition("\n")
    tables = [_section(f"\n{intro}"), *map(_section, sections)]
    write_page(folder, title, "", [], [table for table in tables if table], charts)


def _section(text: str) -> Table | None:
    """A section: its heading, its table, and as notes what else it says."""
    heading, _, content = text.partition("\n")
    lines = [_plain(line) for line in content.splitlines() if not line.startswith("![")]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|") and not set(line) <= set("|- ")
    ]
    notes = [line for line in lines if line.strip() and not line.startswith("|")]
    if not (heading or cells or notes):
        return None
    head, *rows = cells or [[]]
    return Table(title=_plain(heading), head=head, rows=rows, notes=notes)


def _plain(line: str) -> str:
    """A line without the marks of bold text and of code."""
    return re.sub(r"\*\*|`", "", line)
