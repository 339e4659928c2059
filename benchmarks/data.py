"""Data loading: time from the command to the first training step, and peak memory, as the number of
dialogues grows.

    python benchmarks/data.py --output benchmarks/results [--rows 20000 160000]

Dialogues of random words in a JSON-lines file are read, tokenised, paired and ordered by `python
train.py` with the shipped model: with an empty cache (cold), again with the cache of that run
(warm), and with `loss=sft`. Time is from the start of the process to the first row of
metrics.jsonl; memory is the process's anonymous memory, without mapped files. The command writes
data.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.placement import ROOT, machine, own_memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for data.json")
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 160_000])
    arguments = parser.parse_args()
    results = {"machine": machine(), "runs": []}
    with tempfile.TemporaryDirectory() as work:
        for n in arguments.rows:
            folder = Path(work) / str(n)
            size = write_dialogues(folder, n)
            for name, loss in (("cold", "dpo"), ("warm", "dpo"), ("warm, sft", "sft")):
                seconds, peak = first_step(folder, name, loss)
                file_mib, peak_mib = round(size / 2**20), round(peak / 2**20)
                results["runs"].append(
                    {
                        "rows": n,
                        "file_mib": file_mib,
                        "run": name,
                        "seconds": seconds,
                        "peak_mib": peak_mib,
                    }
                )
                print(
                    f"{n:>9,} dialogues ({file_mib} MiB), {name:<10}"
                    f" first step after {seconds:6.1f} s, {peak_mib:6} MiB",
                    flush=True,
                )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "data.json").write_text(
        json.dumps(results, indent=1) + "\n", encoding="utf-8"
    )


def write_dialogues(folder: Path, n: int) -> int:
    """Dialogues of one to four turns with two answers each, about 150 words; returns the bytes
    written."""
    rng = np.random.default_rng(0)
    words = np.array(
        ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(5000)]
    )
    folder.mkdir(parents=True)

    def text(low: int, high: int) -> str:
        return " ".join(words[rng.integers(0, len(words), rng.integers(low, high))])

    for split, rows in (("train", n), ("test", 100)):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as f:
            for _ in range(rows):
                turns = [
                    f"\n\n{who}: {text(5, 30)}"
                    for _ in range(rng.integers(0, 4))
                    for who in ("Human", "Assistant")
                ]
                row = {
                    "prompt": "".join(turns) + f"\n\nHuman: {text(5, 40)}\n\nAssistant:",
                    "chosen": " " + text(10, 80),
                    "rejected": " " + text(10, 80),
                }
                f.write(json.dumps(row) + "\n")
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))


def first_step(folder: Path, name: str, loss: str) -> tuple[float, int]:
    """Seconds until the first training step is logged, and the peak memory by then."""
    run_dir = folder / name.replace(", ", "-")
    overrides = [
        f"datasets=[{folder}]",
        f"loss={loss}",
        f"cache_dir={folder / 'cache'}",
        f"local_run_dir={run_dir}",
        "batch_size=8",
        "n_examples=64",
        "do_first_eval=false",
        "sample_during_eval=false",
        "n_eval_examples=8",
        "eval_every=1000000",
        "debug=true",
        "wandb.enabled=false",
    ]
    rows, peak = run_dir / "metrics.jsonl", 0
    start = time.perf_counter()
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(
            [sys.executable, "train.py", *overrides], cwd=ROOT, stdout=log, stderr=log
        ) as process,
    ):
        while not (rows.is_file() and rows.stat().st_size):
            if process.poll() not in (None, 0):
                raise SystemExit((folder / "log").read_text())
            peak = max(peak, own_memory(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        process.wait()
    return seconds, peak


if __name__ == "__main__":
    main()
