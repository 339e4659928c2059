"""Tables for the console, Markdown, LaTeX and the pages."""

from collections.abc import Sequence
from dataclasses import dataclass

from preflab.reports.run_files import is_number
from preflab.reports.runs import SAMPLER, other_sampler, training_names


@dataclass(frozen=True)
class Table:
    """A table of a page or of the console; the cells of a page are converted to text."""

    rows: list[Sequence]
    title: str = ""
    head: Sequence[str] = ()
    notes: Sequence[str] = ()

    def as_text(self) -> str:
        return aligned([self.head, *self.rows])


def plus_minus(value: float | None, error: float | None = None, digits: int = 3) -> str:
    """`value ± error`, without the error if there is none, and "-" if there is no value."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def summary_rows(summary: dict) -> list[tuple[str, str]]:
    """The numbers of a summary.json with their names, standard errors where there are some."""

    def with_error(name: str, digits: int = 3) -> str:
        return plus_minus(summary.get(name), summary.get(f"{name}_se"), digits)

    reward = f" ({summary['reward']})" if summary.get("reward") else ""
    reference = "initial reference" if summary.get("reference_update") else "reference"
    rate, examples = summary.get("pairs_per_second"), summary.get("examples")
    return [
        (f"reward of the {reference}'s samples{reward}", with_error("reference_reward")),
        (f"reward of the policy's samples{reward}", with_error("policy_reward")),
        ("gain, paired by prompt", with_error("reward_gain")),
        (f"KL to the {reference}{_along(summary)} (nats)", with_error("kl", digits=2)),
        ("eval accuracy", plus_minus(summary.get("eval_accuracy"))),
        ("eval loss", plus_minus(summary.get("eval_loss"), digits=4)),
        ("pairs/s in training", f"{rate:.1f}" if rate else "-"),
        ("examples seen", f"{examples:,}" if examples is not None else "-"),
        *_online_rows(summary),
    ]


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
    total = sum(seconds.values()) or 1
    return [
        ("rounds", f"{summary.get('rounds', 0):,}"),
        ("gold labels bought", f"{summary['labels_bought']:,}"),
        *((f"time {name}", f"{100 * value / total:.0f}%") for name, value in seconds.items()),
    ]


ERRORS = "± is the standard error over prompts, of this run alone"


def summary_table(summary: dict) -> str:
    """The numbers of a run as aligned text, with standard errors; "-" for a missing number."""
    rows = summary_rows(summary)
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
        f"The policy's samples score {direction}, {scores}: {gain:+.3f} ± {error:.3f}"
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


WINRATE_COUNTS = ("wins", "ties", "losses", "contradictions", "unjudged")


def winrate_table(winrates: list[dict]) -> Table | None:
    """Entries of winrates.json with their intervals and counts."""
    if not winrates:
        return None
    rows = []
    for rate in winrates:
        win_rate = "-"
        if all(is_number(rate.get(key)) for key in ("win_rate", "low", "high")):
            win_rate = f"{rate['win_rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
        rows.append(
            [
                rate.get("checkpoint") or "policy",
                rate.get("temperature"),
                rate["against"],
                rate["by"],
                win_rate,
                *(rate.get(count, 0) for count in WINRATE_COUNTS),
            ]
        )
    return Table(
        title="Win rates",
        head=["", "temperature", "against", "by", "win rate [95%]", *WINRATE_COUNTS],
        rows=rows,
        notes=[
            "A tie counts one half, and so does a pair whose two orders contradict each other."
            " Intervals are over prompts, of one policy and its samples."
        ],
    )


EVALUATION_COLUMNS = {  # head of the column -> metric of eval.jsonl
    "reward": "samples_eval/policy_reward",
    "reference's": "samples_eval/reference_reward",
    "KL": "samples_eval/kl",
    "KL along samples": "samples_eval/kl along samples",
    "tokens": "samples_eval/policy_length",
    "ended": "samples_eval/policy_ended",
    "entropy": "samples_eval/entropy",
    "repetition": "samples_eval/repetition",
    "distinct-2": "samples_eval/policy_distinct_2",
    "accuracy": "rewards_eval/accuracies",
}


def evaluation_table(evaluations: list[dict], reward: str | None = None) -> Table | None:
    """A row for each evaluated checkpoint and temperature of eval.jsonl. The KL of the policy's
    samples and that along samples of another sampler are in columns of their own. reward: its name,
    for the head of its column."""
    if not evaluations:
        return None
    names = training_names(evaluations)
    evaluations = [_with_kl_named(row) for row in evaluations]
    metrics = list(dict.fromkeys(key for row in evaluations for key in row))
    further_rewards = {
        metric.removeprefix("samples_eval/policy_reward"): metric
        for metric in metrics
        if metric.startswith("samples_eval/policy_reward[") and metric.endswith("]")
    }
    accuracies = {
        f"accuracy on {metric.split('@')[1]}": metric
        for metric in metrics
        if metric.startswith("rewards_eval/accuracies@")
    }
    columns = EVALUATION_COLUMNS | further_rewards | accuracies
    if columns["KL along samples"] not in metrics:
        del columns["KL along samples"]
    elif columns["KL"] not in metrics:
        del columns["KL"]
    limits = [
        name
        for name, plain in SAMPLER.items()
        if name != "temperature" and any(row.get(name, plain) != plain for row in evaluations)
    ]
    rows = [
        [
            row["name"],
            name,
            row["temperature"],
            *(row.get(limit, "-") for limit in limits),
            *(plus_minus(row.get(key), row.get(f"{key}_se")) for key in columns.values()),
        ]
        for name, row in zip(names, evaluations, strict=True)
    ]
    heads = [f"reward ({reward})" if name == "reward" and reward else name for name in columns]
    settings = ["temperature", *(limit.replace("_", "-") for limit in limits)]
    return Table(
        title="Checkpoints",
        head=["checkpoint", "trained with", *settings, *heads],
        rows=rows,
        notes=[
            "Values are means over prompts ± standard errors. KL is KL(policy || reference) of the"
            " policy's samples. KL along samples is the same sum along samples at another"
            " temperature, top-p, top-k or min-p: the KL neither of the policy nor of that sampler."
        ],
    )


def _with_kl_named(row: dict) -> dict:
    """A row whose KL is that along samples, under this name, unless they are the policy's."""
    if not other_sampler(row):
        return row
    kl, along = (EVALUATION_COLUMNS[name] for name in ("KL", "KL along samples"))
    renamed = {kl: along, f"{kl}_se": f"{along}_se"}
    return {renamed.get(key, key): value for key, value in row.items()}


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
