"""Who wins, pair by pair: `python judge.py FOLDER --against reference chosen --by reward` compares
samples that a run wrote.

    python judge.py EVAL --against reference chosen --by reward --reward lexicon python judge.py
    EVAL --against OTHER_EVAL --by labels --labels labels.jsonl python judge.py EVAL --against
    reference --by llm --url http://127.0.0.1:8000/v1 --model NAME --max-requests 2000

FOLDER is a run (its last evaluation is judged) or what function=eval wrote (every checkpoint and
temperature is). A labels file has lines {"prompt", "a", "b", "winner": "a" | "b" | "tie"}, in
either order. A language model is asked in both orders; when it names the same place twice, the pair
is a tie. Its key comes from the environment (--key-env), its answers stay in a cache. Writes
judgements.jsonl and winrates.json into FOLDER; `python report.py FOLDER` shows them.

A win counts 1 and a tie 1/2. The interval is Wilson's, 95%, with as many trials as there are
prompts, which is on the safe side where there are ties or several samples of a prompt. No model of
ours is loaded.
"""

import argparse
import json
import sys
from pathlib import Path

from preflab.evaluation.win_rates import (
    JUDGES,
    judged_groups,
    latest_samples,
    merge,
    pair_up,
    table,
    win_rate,
)
from preflab.reports.runs import read_json, read_jsonl
from utils import PrefLabError

ROOT = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--against",
        nargs="+",
        default=["reference"],
        help="reference, chosen (the data's), or another folder of samples",
    )
    parser.add_argument("--by", choices=("reward", "labels", "llm"), required=True)
    parser.add_argument(
        "--reward",
        nargs="+",
        default=["lexicon"],
        metavar="NAME KEY=VALUE",
        help="a file of config/reward/, and settings of it",
    )
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--url", help="of an OpenAI-compatible endpoint, up to and with /v1")
    parser.add_argument("--model", help="what the endpoint calls its model")
    parser.add_argument(
        "--question", type=Path, help="a text with {prompt}, {a} and {b}, instead of ours"
    )
    parser.add_argument("--key-env", default="OPENAI_API_KEY")
    parser.add_argument("--max-requests", type=int, default=1000, help="hard cap, retries included")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds of one attempt")
    parser.add_argument("--retries", type=int, default=4)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "judge.sqlite")
    arguments = parser.parse_args()
    try:
        rates = judge(arguments)
    except PrefLabError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(table(rates))
    if any(rate["unjudged"] for rate in rates):
        print(
            "not everything was judged; answers so far are kept, and the same command goes on from"
            " them",
            file=sys.stderr,
        )
        raise SystemExit(1)


def judge(arguments) -> list[dict]:
    """Judge what the command line asks for; returns the win rates that it adds to winrates.json."""
    rows = latest_samples(arguments.folder)
    pairs = [pair for against in arguments.against for pair in pair_up(rows, against)]
    verdicts, counts, by = JUDGES[arguments.by](pairs, arguments)
    for pair, verdict in zip(pairs, verdicts):
        pair |= verdict | {"by": by}
    rates = [win_rate(group, by) for group in judged_groups(pairs).values()]
    if counts and rates:
        print(", ".join(f"{what} {n:,}" for what, n in counts.items()))
    merge(
        arguments.folder / "judgements.jsonl",
        pairs,
        read_jsonl,
        lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    )
    merge(
        arguments.folder / "winrates.json",
        rates,
        lambda path: read_json(path) or [],
        lambda rows: json.dumps(rows, indent=1) + "\n",
    )
    return rates


if __name__ == "__main__":
    main()
