"""The report of an atlas: a map, a table and, along a run, how losses diverge.

Everything is read from atlas.jsonl; docs/atlas.md says what the numbers mean.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from preflab.reports.page import save_figures, write_page
from preflab.reports.plot_style import (
    COLOR_CYCLE,
    label_axes,
    legend_below,
    marker,
    new_axes,
    style,
    unlisted,
)
from preflab.reports.run_files import WRONG_TYPES, read_jsonl
from preflab.reports.runs import Run
from preflab.reports.tables import Table, plus_minus
from utils import DataError, PrefLabError

ROWS = "atlas.jsonl"
MARKERS = "os^Dv"
MAX_LINES = 24  # of a figure
LONGEST_SETTINGS = 50  # characters in the table; atlas.csv has all
NEAR = 0.07  # of the width or height of a map: a cluster this near to a named one has no name there
NAMED_MEMBERS = 8  # losses of a cluster that its line of the legend lists

NOTES = (
    "Cosine: between the update of a loss and that of {baseline}; 1 is the same direction, whatever"
    " the size. Chosen and rejected: the predicted change of their mean log-prob, in nats, for an"
    " update of length 1. Ratio: the size of the pushes on rejected responses over those on chosen"
    " ones. Share: of the pairs that carry the update. Length: of the gradient.",
    "An update is minus the gradient of the mean loss over the {pairs} pairs, as plain SGD takes"
    " it; an optimizer that scales each weight turns it.",
)


def write_atlas_report(run: Run) -> str:
    """Write the pictures and report.html of an atlas; return its table as text. Raises DataError
    for rows that no atlas has written."""
    rows = read_jsonl(run.folder / ROWS)
    if not rows:
        raise DataError(f"{run.folder}: no checkpoint of this atlas is measured yet")
    try:
        return _write(run, rows)
    except PrefLabError:
        raise
    except (*WRONG_TYPES, StopIteration, OverflowError, IndexError) as error:
        raise DataError(
            f"{run.folder / ROWS}: not what was written there ({type(error).__name__}: {error});"
            " delete the file, and function=atlas measures again"
        ) from error


def _write(run: Run, rows: list[dict]) -> str:
    last = rows[-1]
    figures = {
        "atlas": (f"Map{_at(last, rows)}", map_figure(last)),
        "atlas_steps": ("Along the run", steps_figure(rows)),
    }
    table = atlas_table(last, _at(last, rows))
    tables = [table, cluster_table(last), steps_table(rows), left_out_table(last)]
    name = run.config.get("exp_name", run.folder.name)
    write_page(
        run.folder,
        title=f"{name}: atlas of {len(last['updates'])} losses",
        subtitle=_subtitle(last),
        problems=[],
        tables=[table for table in tables if table],
        charts=save_figures(run.folder, figures),
        config=OmegaConf.to_yaml(OmegaConf.create(run.config)),
    )
    return "\n".join([table.as_text(), _subtitle(last)])


def _at(row: dict, rows: list[dict]) -> str:
    return f" at {_name(row)}" if len(rows) > 1 else ""


def _name(row: dict) -> str:
    return f"step {row['step']:,}" if "step" in row else str(row["name"])


def _subtitle(row: dict) -> str:
    text = (
        f"{row['pairs']} pairs, gradients of {row['responses']} responses with respect to"
        f" {row['weights']:,} weights."
    )
    if error := row["sketch_error"]:
        text += (
            f" They are projected to {row['sketch']:,} numbers: cosines of gradients are off by"
            f" {error['rms']:.4f} (root mean square of {error['n']}), at most by"
            f" {error['largest']:.4f}."
        )
    return text


def atlas_table(row: dict, at: str = "") -> Table:
    """A line for each loss, the nearest to the baseline first."""
    losses = sorted(
        row["updates"], key=lambda loss: (-round(_or(loss["cosine"], -2), 6), loss["loss"])
    )
    error = row["sketch_error"]["rms"] if row["sketch_error"] else None
    lines = [
        [
            loss["loss"] + (" *" if loss["own_gradient"] else ""),
            plus_minus(loss["cosine"], error),
            *(_signed(loss[side]) for side in ("chosen", "rejected")),
            plus_minus(loss["ratio"], digits=2),
            f"{loss['share']:.0%}",
            f"{loss['length']:.3g}",
            _settings(loss),
        ]
        for loss in losses
    ]
    notes = [note.format(baseline=row["baseline"], pairs=row["pairs"]) for note in NOTES]
    if any(loss["own_gradient"] for loss in losses):
        notes.append(
            "* It reads whole distributions or weighs tokens, and has its own gradient instead"
            " of coefficients of responses."
        )
    heads = ["cosine", "chosen", "rejected", "ratio", "share", "length", "settings"]
    return Table(title=f"Atlas{at}", head=["", *heads], rows=lines, notes=notes)


def _settings(loss: dict) -> str:
    text = " ".join(f"{key}={value}" for key, value in loss["settings"].items())
    return text if len(text) <= LONGEST_SETTINGS else f"{text[: LONGEST_SETTINGS - 1]}…"


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def cluster_table(row: dict) -> Table:
    """The losses of each cluster, and those that are alone in one."""
    joined = [c for c in row["clusters"] if len(c["losses"]) > 1]
    alone = [c["losses"][0] for c in row["clusters"] if len(c["losses"]) == 1]
    rows = [[f"{c['name']}: {', '.join(c['losses'])}"] for c in joined]
    return Table(
        title="Clusters",
        rows=rows + ([[f"unlike any other: {', '.join(alone)}"]] if alone else []),
        notes=[
            f"All cosines within a cluster are at least {row['same']:g}. It has the name of its"
            " most central loss, with what that loss does to these pairs."
        ],
    )


def left_out_table(row: dict) -> Table | None:
    """The losses that cannot be computed on these pairs, with the reason."""
    if not row["left_out"]:
        return None
    rows = [[f"{label}: {reason}"] for label, reason in sorted(row["left_out"].items())]
    return Table(title="Left out", rows=rows)


def steps_table(rows: list[dict]) -> Table | None:
    """The cosine of each loss with the baseline at every checkpoint; None for a single one."""
    if len(rows) < 2:
        return None
    at = [{loss["loss"]: loss["cosine"] for loss in row["updates"]} for row in rows]
    names = list(dict.fromkeys(name for of in at for name in of))
    return Table(
        title=f"Cosine with {rows[-1]['baseline']} along the run",
        head=["", *map(_name, rows)],
        rows=[[name, *(plus_minus(of.get(name)) for of in at)] for name in names],
        folded=True,
    )


def map_figure(row: dict) -> Figure:
    """The updates of the losses in the plane that shows most of their spread, by cluster."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    [ax] = new_axes(figure, 1, 1)
    drawn = {loss["loss"]: loss for loss in row["updates"] if loss["x"] is not None}
    named: list[tuple[float, float]] = []
    for number, cluster in enumerate(row["clusters"]):
        members = [drawn[name] for name in cluster["losses"]]
        look = {
            "color": COLOR_CYCLE[number % len(COLOR_CYCLE)],
            "marker": MARKERS[number // len(COLOR_CYCLE) % len(MARKERS)],
            "linestyle": "",
            "markersize": 7,
            "alpha": 0.85,
        }
        ax.plot([], [], **look, label=_legend(cluster))
        for loss in members:
            label = unlisted(_legend(cluster), loss["loss"])
            ax.plot(loss["x"], loss["y"], **look, label=label)
        _name_cluster(ax, cluster, members, named, list(drawn.values()))
    label_axes(
        ax,
        f"updates of length 1, origin: {row['baseline']}; the plane shows"
        f" {row['plane_shows']:.0%} of their spread",
        "first principal component",
        "second principal component",
    )
    if legend := ax.get_legend():
        legend.remove()
    figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return figure


def _legend(cluster: dict) -> str:
    names = cluster["losses"]
    if len(names) == 1:
        return cluster["name"]
    more = f", +{len(names) - NAMED_MEMBERS}" if len(names) > NAMED_MEMBERS else ""
    return f"{cluster['name']} ({', '.join(names[:NAMED_MEMBERS])}{more})"


def _name_cluster(
    ax: Axes,
    cluster: dict,
    members: list[dict],
    named: list[tuple[float, float]],
    all_losses: list[dict],
) -> None:
    """The name of a cluster beside its center, unless it would cover one of `named`, the places of
    names so far; the legend has all."""
    center = next(loss for loss in members if loss["loss"] == cluster["center"])
    place = center["x"], center["y"]
    spans = [_spread([loss[axis] for loss in all_losses]) or 1.0 for axis in ("x", "y")]
    if any(
        all(abs(a - b) < NEAR * s for a, b, s in zip(place, at, spans, strict=True)) for at in named
    ):
        return
    named.append(place)
    more = f" +{len(members) - 1}" if len(members) > 1 else ""
    ax.annotate(center["loss"] + more, place, textcoords="offset points", xytext=(6, 5), fontsize=8)


def steps_figure(rows: list[dict]) -> Figure | None:
    """The cosine of each loss with the baseline over the checkpoints of a run: those that change
    most; None for a single checkpoint."""
    if len(rows) < 2:
        return None
    series: dict[str, list[tuple[int, float]]] = {}
    for number, row in enumerate(rows):
        for loss in row["updates"]:
            if loss["cosine"] is not None:
                place = row.get("step", number)
                series.setdefault(loss["loss"], []).append((place, loss["cosine"]))
    spread = {name: _spread([y for _, y in points]) for name, points in series.items()}
    names = sorted(series, key=lambda name: -spread[name])[:MAX_LINES]
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    [ax] = new_axes(figure, 1, 1)
    for i, name in enumerate(names):
        points = zip(*sorted(series[name]), strict=True)
        ax.plot(*points, **style(i), marker=marker(i), markersize=4, label=unlisted(name))
    x_label = "steps" if all("step" in row for row in rows) else "checkpoints"
    note = f", the {len(names)} that change most" if len(series) > len(names) else ""
    label_axes(ax, f"cosine with {rows[-1]['baseline']}{note}", x_label, "cosine")
    legend_below(figure, names)
    return figure


def _spread(values: list[float]) -> float:
    return max(values) - min(values)
