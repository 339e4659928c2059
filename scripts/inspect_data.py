"""What preference data hold, how a tokenizer splits them, and which faults would spoil training. No
model is loaded.

    python scripts/inspect_data.py PATH_OR_NAME --model tiny --max_length 96 \\
        --max_prompt_length 32 --n 3

Further arguments are overrides, as for train.py: `pairing=all`, `dataset_columns.prompt=question`.
The numbers describe the train and the test split as training would read, tokenise and cut them. A
finding is an error where it spoils training or evaluation, else a warning. The exit code is 0, or 1
with an error, or 2 where the data cannot be read. Examples are shown token by token; the tokens
that the loss counts are coloured, or in brackets where there is no terminal or NO_COLOR is set.

--lists reads the data as losses of lists do: how many responses a prompt has, how many pairs of
them are tied, and examples as whole lists, the best response first. max_responses=4 limits them.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import list_losses  # noqa: F401  registers losses
import losses  # noqa: F401  registers losses
import pair_losses  # noqa: F401  registers losses
import preference_datasets  # noqa: F401  registers the datasets
import token_losses  # noqa: F401  registers losses
import trainers  # noqa: F401  registers the trainers
from preflab.batching.chat_template import chat_of, set_chat
from preflab.batching.turn_ends import describe_chat
from preflab.checks import check_config
from preflab.modeling.loading import check_model, load_tokenizer
from preflab.objective.registry import LOSSES
from preflab.settings.compose import compose
from preflab.settings.overrides import model_overrides
from preflab.settings.refused import errors_in_one_line
from preflab.settings.run_folder import register_resolvers
from preflab.training.registry import find_trainer
from scripts.data_checks import CHECKS, COUNTED, SplitStatistics, findings_of
from utils import ConfigError, atomic_write, path_argument


def main() -> None:
    arguments, overrides = _parser().parse_known_args()
    with errors_in_one_line():
        statistics, examples, tokenizer = inspect(arguments, overrides)
        findings = findings_of(statistics, arguments.tolerate)
        if arguments.json:
            with atomic_write(arguments.json) as f:
                json.dump({**statistics, "findings": findings}, f, indent=1)
    sys.stdout.reconfigure(errors="backslashreplace")
    print(table(statistics))
    for level in ("error", "warning"):
        for finding in findings:
            if finding["level"] == level:
                print(f"{level}: {finding['text']}")
    show(examples, tokenizer, colours=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    raise SystemExit(int(any(finding["level"] == "error" for finding in findings)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data",
        metavar="PATH_OR_NAME",
        help="as in datasets=[...]; after --, as the last argument, where it begins with a dash",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a name in config/model/, a folder or a hub name;"
        " only its tokenizer and sizes are read",
    )
    parser.add_argument(
        "--max_length",
        help="tokens of prompt and response together; default: that of the model's settings",
    )
    parser.add_argument(
        "--max_prompt_length",
        help="tokens of a prompt that is cut because the two are too long together;"
        " default: that of the model's settings",
    )
    parser.add_argument("--n", type=int, default=3, help="examples to show")
    parser.add_argument("--lists", action="store_true", help="read lists of scored responses")
    parser.add_argument(
        "--tolerate",
        type=float,
        default=0.01,
        help="share of the pairs or prompts up to which contradictions and the like are warnings",
    )
    parser.add_argument(
        "--json", type=path_argument, help="a file for the numbers and the findings"
    )
    return parser


def inspect(arguments, overrides: list[str]) -> tuple[dict, list, object]:
    """The numbers of both splits, some examples of the train split, and the tokenizer. Raises
    PrefLabError."""
    if arguments.n < 0 or not 0 <= arguments.tolerate <= 1:
        raise ConfigError(
            f"--n {arguments.n} must be at least 0, and --tolerate {arguments.tolerate} a share"
            " between 0 and 1"
        )
    lengths = [
        f"{key}={value}"
        for key in ("max_length", "max_prompt_length")
        if (value := getattr(arguments, key)) is not None
    ]
    register_resolvers()  # the models of config/model/ name their folders by them
    # loss=sft accepts all data, with pairs and without.
    of_lists = next(name for name, loss in LOSSES.items() if loss.examples == "lists")
    loss = f"loss={of_lists}" if arguments.lists else "loss=sft"
    config = compose([loss, *model_overrides(arguments.model), *lengths, *overrides])
    config.datasets = [arguments.data]
    sources = {split: several[0] for split, several in check_config(config)[1].items()}
    rows = check_model(config, find_trainer(config.trainer))
    tokenizer = load_tokenizer(config.model, rows)
    set_chat(tokenizer, chat_of(config))
    lengths = (config.max_length, config.max_prompt_length)
    splits: dict[str, SplitStatistics] = {}
    for split, source in sources.items():
        splits[split] = SplitStatistics(tokenizer, *lengths, arguments.n, config.seed)
        splits[split].read(source)
    leaked = splits["test"].prompts & splits["train"].prompts
    splits["test"].counts["leaked_prompts"] = len(leaked)
    statistics = {
        "data": arguments.data,
        "model": config.model.name_or_path,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "chat": describe_chat(tokenizer) if any(of.chats for of in splits.values()) else "",
        "splits": {split: of_split.numbers() for split, of_split in splits.items()},
    }
    return statistics, splits["train"].examples, tokenizer


# ----------------------------------------------------------------------------------------- printing


def table(statistics: dict) -> str:
    """The numbers of both splits side by side."""
    splits = list(statistics["splits"].values())
    present = [check for check in CHECKS if any(n[check] for n in splits)]
    skipped = dict.fromkeys(reason for n in splits for reason in n["skipped"])
    rows = [("", list(statistics["splits"]))]
    rows += [(count, [f"{n[count]:,}" for n in splits]) for count in COUNTED]
    rows += [
        (f"left out: {reason}", [f"{n['skipped'].get(reason, 0):,}" for n in splits])
        for reason in skipped
    ]
    rows += [(_title(check), [f"{n[check]:,}" for n in splits]) for check in present]
    for quantity in ("prompt_tokens", "response_tokens", "score_gap", "list_length"):
        if any(n[quantity] for n in splits):
            cells = [_quantiles_cell(n[quantity]) for n in splits]
            rows.append((f"{_title(quantity)}: 5%, median, 95%, max", cells))
    if any(n["list_length"] for n in splits):
        rows.append(("pairs of equal score", [f"{n['tied_pairs']:,}" for n in splits]))
    cells = [_interval_cell(n["longer_wins"]) for n in splits]
    rows.append(("longer response chosen, 95% interval", cells))

    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(splits))]
    width = max(len(title) for title, _ in rows)
    lines = [
        f"{statistics['data']}, tokens of {statistics['model']},"
        f" max_length {statistics['max_length']},"
        f" max_prompt_length {statistics['max_prompt_length']}"
    ]
    for title, cells in rows:
        padded = [cell.rjust(w + 3) for cell, w in zip(cells, widths, strict=True)]
        lines.append(title.ljust(width) + "".join(padded))
    lines.append("none: " + ", ".join(_title(check) for check in CHECKS if check not in present))
    if statistics["chat"]:
        lines.append(f"conversations: {statistics['chat']}")
    notes = [n["note"] for n in splits if n["note"]]
    return "\n".join(lines + notes[:1])


def _quantiles_cell(quantiles: dict | None) -> str:
    if not quantiles:
        return "-"
    return ", ".join(f"{quantiles[q]:.4g}" for q in ("5%", "median", "95%", "max"))


def _interval_cell(wins: dict | None) -> str:
    if not wins:
        return "-"
    low, high = wins["interval"]
    return f"{wins['share']:.3f} [{low:.3f}, {high:.3f}]"


def _title(key: str) -> str:
    return key.replace("_", " ").replace("eos", "EOS").replace("bos", "BOS")


def show(examples: list, tokenizer, colours: bool) -> None:
    """Print examples as training sees them."""
    if examples:
        style = "in colour" if colours else "in brackets"
        print(f"\nexamples of the train split; {style}: tokens that the loss counts")
    for record, (prompt, responses, (prompt_cut, cuts)), masks, members in examples:
        print(f"\n{record.source}{' (prompt cut)' if prompt_cut else ''}")
        print("  prompt: " + painted(prompt, tokenizer, "plain", colours))
        roles = ("chosen", *["rejected"] * (len(members) - 1)) if len(members) > 1 else ("target",)
        for place, (role, member) in enumerate(zip(roles, members, strict=True), 1):
            label = role if len(members) < 3 else f"response {place} of {len(members)}"
            score = f", score {record.scores[member]:.4g}" if record.scores else ""
            ending = " (cut, so without its end)" if cuts[member] else ""
            text = painted_turns(responses[member], masks[member], tokenizer, role, colours)
            print(f"  {label}{score}: {text}{ending}")


# ANSI colours of the tokens of each role: two shades, for neighbours.
SHADES = {
    "plain": ("2", "2"),
    "chosen": ("32", "92"),
    "target": ("32", "92"),
    "rejected": ("33", "93"),
    "special": ("7", "7"),
}


def painted_turns(
    tokens: list[int], mask: list[bool] | None, tokenizer, role: str, colours: bool
) -> str:
    """A response, with the turns of a user in between as the prompt is painted."""
    runs = itertools.groupby(
        zip(tokens, mask or [True] * len(tokens), strict=False), lambda t: t[1]
    )
    return "".join(
        painted([token for token, _ in run], tokenizer, role if counted else "plain", colours)
        for counted, run in runs
    )


def painted(
    tokens: list[int], tokenizer, role: str, colours: bool, head: int = 40, tail: int = 40
) -> str:
    """The text of each token, neighbours in two shades or each in brackets. The middle of a long
    list is left out."""
    pieces = []
    for i, token in enumerate(tokens):
        if head <= i < len(tokens) - tail:
            if i == head:
                pieces.append(f" … {len(tokens) - head - tail} tokens … ")
            continue
        # What is not printable is escaped, so that a text cannot control the terminal.
        text = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode()
            for c in tokenizer.decode([token])
        )
        if colours:
            shades = SHADES["special" if token in tokenizer.all_special_ids else role]
            pieces.append(f"\033[{shades[i % 2]}m{text}\033[0m")
        else:
            pieces.append(text if role == "plain" else f"[{text}]")
    return "".join(pieces)


if __name__ == "__main__":
    main()
