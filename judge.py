"""Win rates, pair by pair, on the samples that a run wrote:

    python judge.py FOLDER --against reference chosen --by reward
    python judge.py EVAL --against reference chosen --by reward --reward lexicon
    python judge.py EVAL --against OTHER_EVAL --by labels --labels labels.jsonl
    python judge.py EVAL --against reference --by llm --url http://127.0.0.1:8000/v1 --model NAME \\
        --max-requests 2000

FOLDER is a run (its last evaluation is judged) or the folder of a function=eval (every checkpoint
and temperature is judged). A labels file has lines {"prompt", "a", "b", "winner": "a" | "b" |
"tie"}, in either order. A language model sees each pair in both orders; when it names the same
position twice, the pair is a tie. Its key comes from the environment (--key-env), and its answers
are cached. The command writes judgements.jsonl and winrates.json into FOLDER; `python report.py
FOLDER` shows them.

    python judge.py FOLDER --alpaca-eval DIR      writes the samples as AlpacaEval reads them

A win counts 1 and a tie 1/2. The 95% interval is over prompts, of this policy and these samples:
Wilson's, and with several samples of a prompt or ties that of prompts as clusters. The rate of
equal lengths is the length-controlled one (arXiv:2404.04475). No model is loaded, unless the reward
is one.
"""

import argparse
import json
import sys
from pathlib import Path

from preflab.evaluation.alpaca_eval import export_samples
from preflab.evaluation.length_control import length_controlled
from preflab.evaluation.win_rates import (
    QUESTION,
    by_labels,
    by_llm,
    by_reward,
    judged_groups,
    latest_samples,
    merge,
    pair_up,
    win_rate,
)
from preflab.reports.evaluation_tables import winrate_table
from preflab.reports.run_files import read_jsonl, read_winrates
from preflab.rewards.llm_client import Endpoint
from preflab.settings.refused import errors_in_one_line
from preflab.settings.value_types import from_home
from utils import DataError, check_writable, path_argument

ROOT = Path(__file__).resolve().parent
LONGEST_TIMEOUT = 86_400  # a day


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if not arguments.by and not arguments.alpaca_eval:
        parser.error("the following arguments are required: --by")
    with errors_in_one_line():
        if arguments.alpaca_eval:
            rows = latest_samples(arguments.folder)
            print("\n".join(map(str, export_samples(rows, arguments.alpaca_eval))))
        if not arguments.by:
            return
        rates = judge(arguments)
        evaluations = read_jsonl(arguments.folder / "eval.jsonl")
        if rates:
            print(winrate_table(rates, evaluations).with_notes())
    if any(rate["unjudged"] for rate in rates):
        reason = "scores that are no numbers decide nothing"
        if arguments.by == "llm":
            reason = "the answers so far are cached, and the same command continues from them"
        print(f"not everything was judged; {reason}", file=sys.stderr)
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=path_argument, help="a run, or the folder of a function=eval"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=from_home,
        default=["reference"],
        help="reference, chosen (of the data), or another folder of samples",
    )
    parser.add_argument("--by", choices=("reward", "labels", "llm"))
    parser.add_argument(
        "--alpaca-eval",
        type=path_argument,
        metavar="DIR",
        help="write the samples as files that alpaca_eval reads; --by is then optional",
    )
    parser.add_argument(
        "--reward",
        nargs="+",
        default=["lexicon"],
        metavar="NAME KEY=VALUE",
        help="a file of config/reward/, and settings of it",
    )
    parser.add_argument(
        "--labels", type=path_argument, help="JSON lines of labels, for --by labels"
    )
    llm = parser.add_argument_group("--by llm")
    llm.add_argument("--url", help="of an OpenAI-compatible endpoint, up to and including /v1")
    llm.add_argument("--model", help="the name of the model at the endpoint")
    llm.add_argument(
        "--question",
        type=path_argument,
        help="a text with {prompt}, {a} and {b}, instead of the default",
    )
    llm.add_argument(
        "--body",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further fields of a request, such as temperature=1 or reasoning_effort=low; null"
        " leaves a field out (by default: temperature=0.0 max_tokens=256)",
    )
    llm.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable of the key")
    llm.add_argument("--max-requests", type=int, default=1000, help="hard cap, retries included")
    llm.add_argument("--concurrency", type=int, default=8, help="requests at the same time")
    llm.add_argument("--timeout", type=float, default=60.0, help="seconds of one attempt")
    llm.add_argument("--retries", type=int, default=4, help="further attempts of a request")
    llm.add_argument(
        "--cache",
        type=path_argument,
        default=ROOT / ".cache" / "judge.sqlite",
        help="sqlite file of answers",
    )
    return parser


def judge(arguments) -> list[dict]:
    """Judge the pairs that the command line selects; returns the win rates that it adds to
    winrates.json."""
    rows = latest_samples(arguments.folder)
    check_writable(arguments.folder, "FOLDER")
    pairs = [pair for against in arguments.against for pair in pair_up(rows, against)]
    verdicts, counts, by = _verdicts(pairs, arguments)
    for pair, verdict in zip(pairs, verdicts, strict=True):
        pair |= verdict | {"by": by}
    rates = []
    for group in judged_groups(pairs).values():
        controlled = length_controlled(group)
        named = {f"length_controlled_{key}": value for key, value in controlled.items()}
        rates.append(win_rate(group, by) | named)
    if counts and rates:
        print(", ".join(f"{count} {n:,}" for count, n in counts.items()))
    merge(
        arguments.folder / "judgements.jsonl",
        pairs,
        read_jsonl,
        lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    )
    merge(
        arguments.folder / "winrates.json",
        rates,
        read_winrates,
        lambda rows: json.dumps(rows, indent=1) + "\n",
    )
    return rates


def _verdicts(pairs: list[dict], arguments) -> tuple[list[dict], dict[str, int], str]:
    """The verdicts of the chosen judge, its counts, and its name."""
    if arguments.by == "reward":
        name, *settings = arguments.reward
        verdicts = by_reward(pairs, arguments.folder, name, settings)
        return *verdicts, f"reward {' '.join(arguments.reward)}"
    if arguments.by == "labels":
        verdicts = by_labels(pairs, arguments.labels)
        return *verdicts, f"labels {arguments.labels.name}"
    if not arguments.url or not arguments.model:
        raise DataError("--by llm needs --url and --model")
    for name, least in (("max_requests", 0), ("concurrency", 1), ("retries", 0)):
        if (value := getattr(arguments, name)) < least:
            raise DataError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    if not 0 < arguments.timeout <= LONGEST_TIMEOUT:
        raise DataError(
            f"--timeout {arguments.timeout}: must be above 0, and at most {LONGEST_TIMEOUT} seconds"
        )
    template = _question(arguments.question)
    endpoint = Endpoint(
        arguments.url,
        arguments.model,
        cache=arguments.cache,
        key_env=arguments.key_env,
        max_requests=arguments.max_requests,
        concurrency=arguments.concurrency,
        timeout=arguments.timeout,
        retries=arguments.retries,
        body=_body(arguments.body, arguments.url, arguments.model),
    )
    return *by_llm(pairs, endpoint, template), f"llm {arguments.model}"


def _body(pairs: list[str], url: str = "", model: str = "") -> dict:
    """KEY=VALUE as fields of a JSON object. A value that is not JSON is a text. Raises DataError
    for what cannot be sent, also of the other arguments."""
    body = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise DataError(f"--body {pair}: expected KEY=VALUE")
        try:
            body[key] = json.loads(value)
        except ValueError:
            body[key] = value
    try:
        json.dumps([body, url, model], allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise DataError(f"--url {url!r} --model {model!r} --body {body}: {error}") from error
    return body


def _question(path: Path | None) -> str:
    if path is None:
        return QUESTION
    if not path.is_file():
        raise DataError(f"--question {path}: no such file")
    try:
        template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"--question {path}: not UTF-8: {error}") from error
    if missing := [slot for slot in ("{prompt}", "{a}", "{b}") if slot not in template]:
        raise DataError(f"--question {path} has no {', '.join(missing)}")
    return template


if __name__ == "__main__":
    main()
