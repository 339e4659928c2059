"""What a checkpoint costs: bytes, and the seconds that training stands still for it.

    python benchmarks/checkpoints.py [--against FOLDER] [--rounds 3] [--output FILE]

A random GPT-2 with 124M parameters takes a few steps of DPO with AdamW and saves in between, in a
process of its own each time. With --against, the folder of another checkout of the project, the two
take turns. A save that training does not wait for still takes time of the processor beside the
steps, so the seconds of the whole loop are given too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, BATCH, SAVE_EVERY = 6, 1, 2  # six steps, two saves and the last one

# Runs train.py of the checkout in argv[1], and prints the seconds of each save and of training.
CHILD = """
import json, runpy, sys, time
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[1] + "/train.py", *sys.argv[2:]]
import trainers
from preflab.training.session import Session
saves, save, train = [], Session.save, trainers.BasicTrainer.train

def timed_save(self, **options):
    begun = time.perf_counter()
    save(self, **options)
    saves.append(time.perf_counter() - begun)

def timed_train(self):
    begun = time.perf_counter()
    summary = train(self)
    whole = time.perf_counter() - begun
    print("TIMES", json.dumps({"saves": saves, "loop": whole}))
    return summary

Session.save, trainers.BasicTrainer.train = timed_save, timed_train
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="the folder of another checkout")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--layers", type=int, default=12, help="of the GPT-2 (12)")
    parser.add_argument("--output", type=Path, help="a file for the numbers, JSON")
    arguments = parser.parse_args()
    checkouts = {"here": ROOT}
    if arguments.against:
        checkouts = {"there": arguments.against.resolve()} | checkouts
    rows: dict[str, list[dict]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", arguments.layers)
        for i in range(arguments.rounds):
            for name, checkout in checkouts.items():
                rows[name].append(measure(checkout, model, Path(folder) / f"{name}-{i}"))
                print(f"round {i + 1}, {name}: {rows[name][-1]}", flush=True)
    summary = {name: medians(of_one) for name, of_one in rows.items()}
    for name, values in summary.items():
        print(
            f"{name:<6} {values['bytes'] / 1e6:>8,.0f} MB, training stands still for"
            f" {values['save']:.2f} s a save, {values['last_save']:.2f} s for the last; loop"
            f" {values['loop']:.1f} s"
        )
    if arguments.output:
        content = {"medians": summary, "runs": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def make_model(folder: Path, layers: int) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    config = AutoConfig.for_model(
        "gpt2", n_layer=layers, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(checkout: Path, model: Path, run: Path) -> dict:
    """The numbers of one run; its folder is deleted."""
    command = [
        sys.executable, "-c", CHILD, str(checkout), "model=blank_model",
        f"model.name_or_path={model}", "datasets=[reviews]", "loss=dpo", "optimizer=AdamW",
        f"batch_size={BATCH}", "n_epochs=null", f"n_examples={EXAMPLES}",
        f"save_every={SAVE_EVERY}",
        "max_length=64", "max_prompt_length=32", "do_first_eval=false", "sample_during_eval=false",
        "eval_every=1000000", "n_eval_examples=2", "eval_batch_size=2", "wandb.enabled=false",
        "keep_checkpoints=1", f"local_run_dir={run}", f"cache_dir={run.parent / 'cache'}",
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=checkout)
    [line] = [line for line in output.stdout.splitlines() if line.startswith("TIMES ")]
    times = json.loads(line.removeprefix("TIMES "))
    files = [path for path in (run / "LATEST").resolve().rglob("*") if path.is_file()]
    *saves, last = times["saves"]
    row = {
        "bytes": sum(path.stat().st_size for path in files),
        "save": statistics.mean(saves),
        "last_save": last,
        "loop": times["loop"],
    }
    subprocess.run(["rm", "-r", str(run)], check=True)
    return row


def medians(rows: list[dict]) -> dict:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


if __name__ == "__main__":
    main()
