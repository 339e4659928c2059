"""Human comparisons of Reddit summaries (arXiv:2009.01325) as the files of datasets=[tldr].

    python scripts/preproc_pref.py DIR/summarize_from_feedback

The folder holds train.json and test.json: train and validation of the comparisons of the hub
dataset openai/summarize_from_feedback, saved with `to_json`, or the same rows as one JSON list. A
row has info.{subreddit, title, post}, two summaries with a text each, and choice, the number of the
better one. The script writes lists of {prompt, chosen, rejected} to data/tldr/{train,test}.json,
both or neither. Validation also compares summaries of news articles, which have no post: these
rows, and those with an empty summary, are left out and counted.
"""

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.readers.fields import items, number, present, text
from preflab.readers.json_text import as_object, streamed_rows
from preflab.readers.records import Skip
from preflab.settings.refused import errors_in_one_line
from utils import DataError, atomic_write, path_argument

ROOT = Path(__file__).resolve().parent.parent
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


# -------------------------------------------------- also imported by scripts/preproc_filter.py


def run(description: str, default: Path, make: Callable[[dict, str], dict]) -> None:
    """The command of a script: `make` turns each row of DIR/{train,test} into one of
    OUTPUT/{train,test}.json."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=path_argument, metavar="DIR", help="holds train and test, as .json or .jsonl"
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        default=default,
        help="folder to write train.json and test.json to",
    )
    arguments = parser.parse_args()
    with errors_in_one_line():
        for summary in convert(arguments.folder, arguments.output, make):
            print(summary)


def convert(folder: Path, output: Path, make: Callable[[dict, str], dict]) -> list[str]:
    """Write both splits, or nothing, with one row in memory at a time. Returns one line for each
    split: rows written, rows left out."""
    sources = {split: _file_of(folder, split) for split in SPLITS}
    summaries = []
    with contextlib.ExitStack() as files:
        for split, path in sources.items():
            out = files.enter_context(atomic_write(output / f"{split}.json"))
            written, skipped = _convert_file(path, out, make)
            left_out = "".join(f"; {n:,} left out: {reason}" for reason, n in skipped.items())
            if not written:
                raise DataError(f"{path} holds no usable row{left_out}")
            summaries.append(f"{output / split}.json: {written:,} rows{left_out}")
    return summaries


def _convert_file(
    path: Path, out: TextIO, make: Callable[[dict, str], dict]
) -> tuple[int, Counter]:
    """Write the rows of a file as one JSON list; returns the number of rows written, and of rows
    left out by reason."""
    written, skipped = 0, Counter()
    bar = tqdm(
        total=path.stat().st_size,
        desc=path.name,
        unit="B",
        unit_scale=True,
        mininterval=1.0,
        delay=2.0,
    )
    with open(path, "rb") as f, bar:
        for row, where in streamed_rows(f, path):
            try:
                line = json.dumps(make(row, where), ensure_ascii=False)
            except Skip as reason:
                skipped[str(reason)] += 1
            else:
                out.write((",\n" if written else "[\n") + line)
                written += 1
            bar.update(f.tell() - bar.n)
    out.write("\n]\n")
    return written, skipped


def _file_of(folder: Path, split: str) -> Path:
    for path in (folder / f"{split}.json", folder / f"{split}.jsonl"):
        if path.is_file():
            return path
    there = "no such folder"
    if folder.is_dir():
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise DataError(f"{folder}: no {split}.json or {split}.jsonl; there is: {there}")


def post_prompt(post: dict, where: str) -> str:
    """The prompt of a Reddit post, which its summary follows. Title and post may be empty."""
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
