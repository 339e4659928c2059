"""Tables for the console, Markdown, LaTeX and the pages."""

from preflab.reports import sweep_plots
from preflab.reports.runs import is_number


def plus_minus(value, error=None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def summary_rows(summary: dict) -> list[tuple[str, str]]:
    get = summary.get
    reward = f" ({summary['reward']})" if get("reward") else ""
    rate, examples = get("pairs_per_second"), get("examples")
    return [
        (
            f"reward of the reference's samples{reward}",
            plus_minus(get("reference_reward"), get("reference_reward_se")),
        ),
        (
            f"reward of the policy's samples{reward}",
            plus_minus(get("policy_reward"), get("policy_reward_se")),
        ),
        ("gain, paired by prompt", plus_minus(get("reward_gain"), get("reward_gain_se"))),
        ("KL to the reference (nats)", plus_minus(get("kl"), get("kl_se"), 2)),
        ("eval accuracy", plus_minus(get("eval_accuracy"))),
        ("eval loss", plus_minus(get("eval_loss"), digits=4)),
        ("pairs/s in training", f"{rate:.1f}" if rate else "-"),
        ("examples seen", f"{examples:,}" if examples is not None else "-"),
    ] + _online_rows(summary)


def _online_rows(summary: dict) -> list[tuple[str, str]]:
    """Of an online run: its rounds, what it bought, and where its time went."""
    if "labels_bought" not in summary:
        return []
    seconds = {
        key.removeprefix("seconds_"): value
        for key, value in summary.items()
        if key.startswith("seconds_")
    }
    shares = [
        (f"time {name}", f"{100 * value / (sum(seconds.values()) or 1):.0f}%")
        for name, value in seconds.items()
    ]
    return [
        ("rounds", f"{summary['rounds']:,}"),
        ("gold labels bought", f"{summary['labels_bought']:,}"),
        *shares,
    ]


def summary_table(summary: dict) -> str:
    """The numbers of a run as aligned text, with standard errors, and "-" where there is none."""
    rows = summary_rows(summary)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>16}" for name, value in rows)


def verdict(summary: dict) -> str:
    """What happened to the reward, in a sentence that does not claim more than the standard error
    allows."""
    gain, error = summary.get("reward_gain"), summary.get("reward_gain_se")
    if gain is None:
        return "No samples of policy and reference to compare."
    kl = plus_minus(summary.get("kl"), summary.get("kl_se"), 2)
    told = (
        f"{plus_minus(summary['policy_reward'])} against the reference's"
        f" {plus_minus(summary['reference_reward'])}, at KL {kl} nats"
    )
    if error is None or abs(gain) <= 2 * error:
        return f"The policy's samples score {told}: a difference within two standard errors."
    return (
        f"The policy's samples score {'higher' if gain > 0 else 'lower'}, {told}: {gain:+.3f} ±"
        f" {error:.3f}."
    )


def data_table(data: dict) -> dict | None:
    parts = [part for split in data.values() for part in split.get("datasets", [])]
    if not parts:
        return None
    keys = ("rows", "prompts", "responses", "pairs", "truncated_prompts", "truncated_responses")
    rows = [
        [f"{p.get('name')} {p.get('split')}", *(f"{p.get(key, 0):,}" for key in keys)]
        for p in parts
    ]
    notes = [
        f"{p['name']} {p['split']}: skipped {n:,}, {why}"
        for p in parts
        for why, n in p.get("skipped", {}).items()
    ]
    notes += [f"{p['name']} {p['split']}: {p['note']}" for p in parts if p.get("note")]
    return {
        "title": "Data",
        "head": ["", *(key.replace("_", " ") for key in keys)],
        "rows": rows,
        "notes": notes,
    }


def winrate_table(winrates: list[dict]) -> dict | None:
    if not winrates:
        return None
    rows = []
    for rate in winrates:
        told = (
            f"{rate['win_rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
            if is_number(rate.get("win_rate"))
            else "-"
        )
        counts = (
            rate.get(key, 0) for key in ("wins", "ties", "losses", "contradictions", "unjudged")
        )
        rows.append(
            [
                rate.get("checkpoint") or "policy",
                rate.get("temperature"),
                rate["against"],
                rate["by"],
                told,
                *counts,
            ]
        )
    head = [
        "",
        "temperature",
        "against",
        "by",
        "win rate, 95%",
        "wins",
        "ties",
        "losses",
        "contradictions",
        "unjudged",
    ]
    return {
        "title": "Win rates",
        "head": head,
        "rows": rows,
        "notes": [
            "A tie counts one half; so does a pair on which the two orders contradict each other."
        ],
    }


EVALUATED = {  # columns of the table of checkpoints
    "reward": "samples_eval/policy_reward",
    "reference's": "samples_eval/reference_reward",
    "KL": "samples_eval/kl",
    "tokens": "samples_eval/policy_length",
    "ended": "samples_eval/policy_ended",
    "entropy": "samples_eval/entropy",
    "repetition": "samples_eval/repetition",
    "distinct-2": "samples_eval/policy_distinct_2",
    "accuracy": "rewards_eval/accuracies",
}


def evaluation_table(evaluations: list[dict]) -> dict | None:
    if not evaluations:
        return None
    extra = {
        key.removeprefix("samples_eval/policy_reward"): key
        for row in evaluations
        for key in row
        if key.startswith("samples_eval/policy_reward[") and key.endswith("]")
    }
    extra |= {
        f"accuracy on {key.split('@')[1]}": key
        for row in evaluations
        for key in row
        if key.startswith("rewards_eval/accuracies@")
    }
    columns = EVALUATED | extra
    rows = [
        [
            row["name"],
            sweep_plots.training_name(row),
            row["temperature"],
            *(plus_minus(row.get(key), row.get(f"{key}_se")) for key in columns.values()),
        ]
        for row in evaluations
    ]
    notes = [
        "Rewards, KL and the rest are means over prompts with standard errors; the KL is that of"
        " the sampled distribution only at temperature 1 and top-p 1."
    ]
    return {
        "title": "Checkpoints",
        "head": ["checkpoint", "trained with", "temperature", *columns],
        "rows": rows,
        "notes": notes,
    }


def latex(rows: list[list[str]]) -> str:
    """A tabular for booktabs; the first row is its head."""
    special = {
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
    lines = [
        " & ".join("".join(special.get(c, c) for c in str(cell)) for cell in row) + r" \\"
        for row in rows
    ]
    return "\n".join(
        [
            r"\begin{tabular}{" + "l" * len(rows[0]) + "}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def aligned(rows: list[list]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )
