"""Tables for the console, Markdown, LaTeX and the pages."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from preflab.reports.runs import other_sampler

CONSOLE_WIDTH = 120  # columns of a terminal
MAX_CELL = 50  # characters of a cell in the console


@dataclass(frozen=True)
class Table:
    """A table of a page or of the console; the cells of a page are converted to text.

    keys: how many columns say what a row is about. folded: whether a page shows the table only on a
    click, and the console not at all.
    """

    rows: list[Sequence]
    title: str = ""
    head: Sequence[str] = ()
    notes: Sequence[str] = ()
    keys: int = 1
    folded: bool = False

    def as_text(self) -> str:
        """Aligned columns. Those that a terminal has no room for follow below, beside the keys."""
        rows = [[shorten(str(cell), MAX_CELL) for cell in row] for row in (self.head, *self.rows)]
        columns = list(zip(*rows, strict=True))
        widths = [max(map(len, column)) + 2 for column in columns]
        keys = list(range(self.keys))
        parts = [keys]
        for i in range(self.keys, len(columns)):
            if sum(widths[j] for j in parts[-1]) + widths[i] > CONSOLE_WIDTH + 2:
                parts.append(keys)
            parts[-1] = [*parts[-1], i]
        return "\n\n".join(aligned([[row[i] for i in part] for row in rows]) for part in parts)

    def with_notes(self) -> str:
        """The table with its title and its notes, as wide as a terminal."""
        title, *notes = (textwrap.fill(text, CONSOLE_WIDTH) for text in (self.title, *self.notes))
        return "\n".join(filter(None, [title, self.as_text(), *notes]))


def shorten(text: str, max_length: int = 40) -> str:
    """The end of a text, after an ellipsis, if the text is too long."""
    return text if len(text) <= max_length else "…" + text[1 - max_length :]


def plus_minus(value: float | None, error: float | None = None, digits: int = 3) -> str:
    """`value ± error`, without the error if there is none, and "-" if there is no value."""
    if value is None:
        return "-"
    text = f"{value:z.{digits}f}"  # z: a value that rounds to zero has no sign
    return text if error is None else f"{text} ± {error:.{digits}f}"


def summary_rows(summary: dict) -> list[tuple[str, str]]:
    """The numbers that a summary.json has, with their names, and standard errors where there are
    some."""

    def with_error(name: str, digits: int = 3) -> str:
        return plus_minus(summary.get(name), summary.get(f"{name}_se"), digits)

    reward = f" ({summary['reward']})" if summary.get("reward") else ""
    reference = "initial reference" if summary.get("reference_update") else "reference"
    rate, examples = summary.get("pairs_per_second"), summary.get("examples")
    rows = [
        (f"reward of the {reference}'s samples{reward}", with_error("reference_reward")),
        (f"reward of the policy's samples{reward}", with_error("policy_reward")),
        ("gain, paired by prompt", with_error("reward_gain")),
        (
            f"KL to the {reference}{_along(summary)} (nats){_at(summary)}",
            with_error("kl", digits=2),
        ),
        ("eval accuracy", plus_minus(summary.get("eval_accuracy"))),
        ("eval loss", plus_minus(summary.get("eval_loss"), digits=4)),
        ("pairs/s in training", f"{rate:.1f}" if rate else "-"),
        ("examples seen", f"{examples:,}" if examples is not None else "-"),
        *_online_rows(summary),
    ]
    return [(name, value) for name, value in rows if value != "-"]


def _at(row: dict) -> str:
    """The temperature of samples of the policy, where it is known; `_along` says other samplers."""
    is_policy = row.get("temperature") is not None and not other_sampler(row)
    return f", samples at temperature {row['temperature']:g}" if is_policy else ""


def _along(row: dict) -> str:
    """What follows the word KL where the samples are not the policy's."""
    sampler = other_sampler(row)
    return f" along samples at {sampler}" if sampler else ""


def _online_rows(summary: dict) -> list[tuple[str, str]]:
    """Rounds, labels bought and shares of the time of an online run; none for other runs."""
    if "labels_bought" not in summary:
        return []
    seconds = {
        key.removeprefix("seconds_"): value
        for key, value in summary.items()
        if key.startswith("seconds_")
    }
    total, n_rounds = sum(seconds.values()) or 1, summary.get("rounds", 0)
    in_rounds = total - seconds.get("evaluating", 0.0)
    return [
        ("rounds", f"{n_rounds:,}"),
        ("gold labels bought", f"{summary['labels_bought']:,}"),
        ("seconds of a round", f"{in_rounds / n_rounds:.3g}" if seconds and n_rounds else "-"),
        *((f"time {name}", f"{100 * value / total:.0f}%") for name, value in seconds.items()),
    ]


ERRORS = "± is the standard error over prompts, of this run alone"


def summary_table(summary: dict) -> str:
    """The numbers of a run as aligned text, with standard errors."""
    rows = summary_rows(summary)
    if not rows:
        return "no number yet"
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value:>16}" for name, value in rows]
    if any("±" in value for _, value in rows):
        lines.append(ERRORS)
    return "\n".join(lines)


def verdict(summary: dict) -> str:
    """A sentence on the change of the reward, which claims no difference within two standard
    errors."""
    gain, error = summary.get("reward_gain"), summary.get("reward_gain_se")
    if gain is None:
        return "There are no samples of the policy and the reference to compare."
    policy = plus_minus(summary.get("policy_reward"))
    reference = plus_minus(summary.get("reference_reward"))
    kl = plus_minus(summary.get("kl"), summary.get("kl_se"), 2)
    along = _along(summary)
    scores = f"{policy} against the reference's {reference}, at KL {kl} nats{along}"
    if error is None or abs(gain) <= 2 * error:
        return (
            f"The policy's samples score {scores}; the difference is within two standard errors"
            " over prompts."
        )
    direction = "higher" if gain > 0 else "lower"
    return (
        f"The policy's samples score {direction}, {scores}: {gain:+z.3f} ± {error:.3f}"
        " (standard errors over prompts)."
    )


DATA_COLUMNS = (
    "rows",
    "prompts",
    "responses",
    "pairs",
    "truncated_prompts",
    "truncated_responses",
)


def data_table(data: dict) -> Table | None:
    """Counts of each dataset and split of data.json; skipped records, with the reason, as notes."""
    datasets = [part for split in data.values() for part in split.get("datasets", [])]
    if not datasets:
        return None
    rows = [
        [f"{part.get('name')} {part.get('split')}"]
        + [f"{part.get(column, 0):,}" for column in DATA_COLUMNS]
        for part in datasets
    ]
    skipped = [
        f"{part['name']} {part['split']}: skipped {n:,}, {reason}"
        for part in datasets
        for reason, n in part.get("skipped", {}).items()
    ]
    notes = [
        f"{part['name']} {part['split']}: {part['note']}" for part in datasets if part.get("note")
    ]
    return Table(
        title="Data",
        head=["", *(column.replace("_", " ") for column in DATA_COLUMNS)],
        rows=rows,
        notes=[*skipped, *notes],
    )


LATEX_ESCAPES = str.maketrans(
    {
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
)


def latex(rows: list[Sequence]) -> str:
    """A tabular for the package booktabs; the first row is its head."""
    head, *body = (
        " & ".join(str(cell).translate(LATEX_ESCAPES) for cell in row) + r" \\" for row in rows
    )
    lines = [
        r"\begin{tabular}{" + "l" * len(rows[0]) + "}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def markdown(rows: list[Sequence]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def aligned(rows: list[Sequence]) -> str:
    """Text with columns aligned at the left."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
