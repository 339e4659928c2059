"""Human comparisons of Reddit summaries (arXiv:2009.01325) as the files of datasets=[tldr].

    python scripts/preproc_pref.py DIR/summarize_from_feedback

The folder holds train.json and test.json: train and validation of the comparisons of the hub set
openai/summarize_from_feedback, saved with `to_json`, or the same rows as one JSON list. A row has
info.{subreddit, title, post}, two summaries with a text each, and choice, the number of the better
one. Writes lists of {prompt, chosen, rejected} to data/tldr/{train,test}.json, both or neither.
Validation also compares summaries of news articles, which have no post: these rows, and those with
an empty summary, are left out and counted.
"""

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from preflab.readers.fields import items, number, present, text  # noqa: E402
from preflab.readers.files import as_object, streamed_rows  # noqa: E402
from preflab.readers.records import Skip  # noqa: E402
from utils import DataError, PrefLabError, atomic_write  # noqa: E402

SPLITS = ("train", "test")


def main() -> None:
    run(__doc__, ROOT / "data" / "tldr", comparison)


def comparison(row: dict, where: str) -> dict:
    """{prompt, chosen, rejected} of two summaries of a post; raises Skip or DataError."""
    info = as_object(present(row, "info", where), f"{where}, 'info'")
    if info.get("post") is None and info.get("article"):
        raise Skip("a news article, not a post")
    prompt = post_prompt(info, f"{where}, 'info'")
    summaries = [
        as_object(summary, f"{where}, a summary") for summary in items(row, "summaries", where)
    ]
    if len(summaries) != 2:
        raise DataError(f"{where}: {len(summaries)} summaries, expected 2")
    texts = [
        text(summary, "text", f"{where}, a summary", may_be_empty=True) for summary in summaries
    ]
    choice = number(row, "choice", where)
    if choice not in (0, 1):
        raise DataError(
            f"{where}: 'choice' is {row['choice']}, expected 0 or 1, the number of the better"
            " summary"
        )
    return {
        "prompt": prompt,
        "chosen": response(texts[int(choice)]),
        "rejected": response(texts[1 - int(choice)]),
    }


# ----------------------------------------------------- what scripts/preproc_filter.py needs as well


def run(description: str, default: Path, make: Callable[[dict, str], dict]) -> None:
    """The command of a script: `make` turns each row of DIR/{train,test} into one of
    OUTPUT/{train,test}.json."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="holds train and test, as .json or .jsonl"
    )
    parser.add_argument(
        "--output", type=Path, default=default, help="folder to write train.json and test.json to"
    )
    arguments = parser.parse_args()
    try:
        for told in convert(arguments.folder, arguments.output, make):
            print(told)
    except (PrefLabError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def convert(folder: Path, output: Path, make: Callable[[dict, str], dict]) -> list[str]:
    """Write both splits, or nothing; a row is in memory at a time. Returns a line for each: rows
    written, rows left out."""
    told = []
    with contextlib.ExitStack() as files:
        for split, path in {split: _file_of(folder, split) for split in SPLITS}.items():
            written, skipped = 0, Counter()
            out = files.enter_context(atomic_write(output / f"{split}.json"))
            with (
                open(path, "rb") as f,
                tqdm(
                    total=path.stat().st_size,
                    desc=path.name,
                    unit="B",
                    unit_scale=True,
                    mininterval=1.0,
                    delay=2.0,
                ) as bar,
            ):
                for row, where in streamed_rows(f, path):
                    try:
                        made = json.dumps(make(row, where), ensure_ascii=False)
                    except Skip as reason:
                        skipped[str(reason)] += 1
                    else:
                        out.write((",\n" if written else "[\n") + made)
                        written += 1
                    bar.update(f.tell() - bar.n)
            if not written:
                raise DataError(
                    f"{path} holds no usable row"
                    + "".join(f"; {n:,} left out: {why}" for why, n in skipped.items())
                )
            out.write("\n]\n")
            told.append(
                f"{output / split}.json: {written:,} rows"
                + "".join(f"; {n:,} left out: {why}" for why, n in skipped.items())
            )
    return told


def _file_of(folder: Path, split: str) -> Path:
    for path in (folder / f"{split}.json", folder / f"{split}.jsonl"):
        if path.is_file():
            return path
    there = (
        ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        if folder.is_dir()
        else "no such folder"
    )
    raise DataError(f"{folder}: no {split}.json or {split}.jsonl; there is: {there}")


def post_prompt(post: dict, where: str) -> str:
    """A Reddit post as it stands before its summary; the title and the post itself may be empty."""
    title, body = (text(post, key, where, may_be_empty=True) for key in ("title", "post"))
    return f"SUBREDDIT: r/{text(post, 'subreddit', where)}\nTITLE: {title}\nPOST: {body}\nTL;DR:"


def response(summary: str) -> str:
    """A space and the stripped summary, so that it follows the colon of the prompt; raises Skip
    where it is empty."""
    if not summary.strip():
        raise Skip("an empty summary")
    return f" {summary.strip()}"


if __name__ == "__main__":
    main()
