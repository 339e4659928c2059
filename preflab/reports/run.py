"""The report of one run: report.html and its pictures."""

from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from preflab.reports import plots
from preflab.reports.evaluation_tables import evaluation_tables, winrate_table
from preflab.reports.page import sample_columns, save_figures, write_page
from preflab.reports.runs import Run, left_out
from preflab.reports.tables import (
    Table,
    data_table,
    summary_rows,
    summary_table,
    verdict,
)
from preflab.reports.why import why, why_figure, why_table


def write_report(run_dir: Path) -> str:
    """Write the pictures and report.html of a run folder; return the table of its numbers as
    text."""
    run = Run(Path(run_dir))
    summary = run.latest()
    # A folder with one evaluation is summarised like a run; several need a table.
    is_several = len(run.evaluations) > 1
    evaluations = evaluation_tables(run.evaluations, run.reward)
    tables = [
        None if is_several else Table(rows=summary_rows(summary)),
        why_table(run),
        *evaluations,
        winrate_table(run.winrates, run.evaluations),
        data_table(run.data),
    ]
    name = run.config.get("exp_name", run.folder.name)
    unfinished = "" if run.finished else f"This run has not finished ({run.state}). "
    write_page(
        run.folder,
        title=f"{name}: {'evaluation' if run.is_evaluation else run.loss}",
        subtitle=unfinished + ("" if is_several else verdict(summary)),
        problems=_problems(run),
        tables=[table for table in tables if table and table.rows],
        pictures=save_figures(run.folder, _figures(run)),
        samples=[sample_columns(sample) for sample in _grouped_by_prompt(run.samples())],
        config=OmegaConf.to_yaml(OmegaConf.create(run.config)),
    )
    texts = [evaluations[0].with_notes()] if is_several else [summary_table(summary), why(run)]
    return "\n".join([*run.damaged, *filter(None, texts)])


def _figures(run: Run) -> dict[str, tuple[str, Figure | None]]:
    """{file name: (title, figure)}, in the order of the page."""
    has_training = not run.is_evaluation
    return {
        "reward_kl": ("Reward", plots.reward_figure(run) if has_training else None),
        "online": ("Rounds", plots.online_figure({run.loss: [run]})),
        "checkpoints": ("Checkpoints", plots.checkpoints_figure(run.evaluations)),
        "temperature": (
            "Temperature",
            plots.temperature_figure(run.evaluations, run.winrates),
        ),
        "why": ("Why", why_figure(run)),
        "curves": ("Training", plots.training_figure(run) if has_training else None),
        "data": ("Lengths and scores", plots.data_figure(run)),
    }


def _problems(run: Run) -> list[str]:
    problems = run.problems()
    if not run.is_evaluation and (note := left_out(run.n_beside_frontier())):
        problems.append(f"Reward against KL: {note}.")
    return problems


def _grouped_by_prompt(samples: list[dict]) -> list[dict]:
    """Samples in the order of their prompts, so that the checkpoints and temperatures of one prompt
    are side by side."""
    by_prompt = defaultdict(list)
    for sample in samples:
        by_prompt[sample.get("prompt")].append(sample)
    return [sample for of_prompt in by_prompt.values() for sample in of_prompt]
