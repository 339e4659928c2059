"""The report of one run: report.html and its pictures."""

from pathlib import Path

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from preflab.reports import plots
from preflab.reports.atlas import write_atlas_report
from preflab.reports.evaluation_tables import evaluation_tables, seed_of, trained, winrate_table
from preflab.reports.page import save_figures, write_page
from preflab.reports.runs import Run, left_out
from preflab.reports.sample_cards import Origin, sample_cards
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
    if run.is_atlas:
        return write_atlas_report(run)
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
        charts=save_figures(run.folder, _figures(run)),
        samples=sample_cards(samples_of(run), run.reward),
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


def samples_of(run: Run) -> list[tuple[Origin, dict]]:
    """The samples of a run with the policy that each is of: its own, or an evaluated checkpoint."""
    origins = {}
    for row, group in zip(run.evaluations, trained(run.evaluations), strict=True):
        step = "" if group.step is None else f", step {group.step}"
        origins[row.get("checkpoint")] = Origin(group.name + step, group.name, seed_of(row))
    own = Origin("policy", run.loss, str(run.seed))
    return [(origins.get(row.get("checkpoint"), own), row) for row in run.samples()]
