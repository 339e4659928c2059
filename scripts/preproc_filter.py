"""Reddit posts with their authors' summaries, filtered as in arXiv:2009.01325, as the files of
datasets=[tldr_filtered].

    python scripts/preproc_filter.py DIR/openai-tldr-filtered

The folder holds train.jsonl and test.jsonl (or .json): the splits of the hub dataset
UCL-DARK/openai-tldr-filtered, saved with `to_json`, or the same rows as one JSON list. A row has
subreddit, title, post and summary. The script writes lists of {prompt, chosen} to
data/tldr_filtered/{train,test}.json, both or neither. Rows with an empty summary are left out and
counted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.readers.fields import text
from scripts.preproc_pref import ROOT, post_prompt, response, run


def main() -> None:
    run(__doc__, ROOT / "data" / "tldr_filtered", summary)


def summary(row: dict, where: str) -> dict:
    """{prompt, chosen} of a post and its summary; raises Skip or DataError."""
    return {
        "prompt": post_prompt(row, where),
        "chosen": response(text(row, "summary", where, may_be_empty=True)),
    }


if __name__ == "__main__":
    main()
