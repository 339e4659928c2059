"""Preference pairs of the 48-word language for the studies: two samples of a model for each prompt,
scored by one of three golds.

    python experiments/pairs.py --folder DIR --gold smooth|two_sizes|flipped --model SFT

DIR/words is what words.py wrote. Writes DIR/GOLD/train.jsonl and test.jsonl, {"prompt", "text",
"reward"} with two lines for each prompt. `smooth` and `two_sizes` are the golds of
experiments/README.md. `flipped` has the scores of `smooth`, and exchanges the two of a prompt with
probability 0.2 in the train split.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import atomic_write, json_lines

ROOT = Path(__file__).resolve().parents[1]
FLIPPED = 0.2
GOLDS = {"smooth": "lexicon", "two_sizes": "two_sizes", "flipped": "lexicon"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gold", choices=GOLDS, required=True)
    parser.add_argument("--model", required=True, help="a folder for from_pretrained")
    parser.add_argument("--n_test", type=int, default=800, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.folder / arguments.gold
    _sample(arguments, folder)
    for split in ("train", "test"):
        made = folder / f"made-{split}.jsonl"
        if arguments.gold == "flipped" and split == "train":
            rows = flip([json.loads(line) for line in json_lines(made)], arguments.seed)
            with atomic_write(made) as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(made, folder / f"{split}.jsonl")


def _sample(arguments: argparse.Namespace, folder: Path) -> None:
    """made-train.jsonl and made-test.jsonl, by scripts/build_preferences.py."""
    words = arguments.folder / "words"
    command = [
        *(sys.executable, "scripts/build_preferences.py", "--prompts", words / "prompts.jsonl"),
        *("--output", folder / "made", "--k", 2, "--n_test", arguments.n_test),
        *("--config-dir", ROOT / "experiments" / "config"),
        *(f"reward={GOLDS[arguments.gold]}", f"reward.path={words / 'words.json'}"),
        *("model=blank_model", f"model.name_or_path={arguments.model}", "eval_batch_size=512"),
        *("max_length=24", "max_prompt_length=5", f"seed={arguments.seed}"),
    ]
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)


def flip(rows: list[dict], seed: int) -> list[dict]:
    """Rows in pairs with the same prompt; the scores of a pair are exchanged with probability
    FLIPPED."""
    rng = random.Random(seed)
    flipped = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        rewards = [first["reward"], second["reward"]]
        if rng.random() < FLIPPED:
            rewards.reverse()
        flipped += [first | {"reward": rewards[0]}, second | {"reward": rewards[1]}]
    return flipped


if __name__ == "__main__":
    main()
