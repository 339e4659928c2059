"""A sweep of many short runs against as many commands.

    python benchmarks/many_runs.py --output benchmarks/results [--runs 32] [--commands 4]

The runs train the shipped model on 512 pairs with each of four losses and several seeds, evaluate
and sample twice, and save. Some of them are commands, which share a cache as commands do; the first
finds it empty, and the others that were not run count as much as the mean of those after it. The
sweep makes all of them in one process, with a page for each run and without (`report=false`), and
with two runs at a time (`hydra/launcher=local`), and ends with its report. Each sweep is compared
with commands that draw pages or not, as it does, and has their numbers. Times are processor
seconds, and those of the clock for two runs at a time. Writes many-runs.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.placement import ROOT, machine

LOSSES = ("dpo", "ipo", "odpo", "hinge")
RUN = (
    *("n_epochs=null", "n_examples=512", "batch_size=32", "eval_every=1000000"),
    *("n_eval_examples=64", "n_eval_model_samples=64", "wandb.enabled=false"),
)
SWEEPS = {
    "sweep": (),
    "sweep, two at a time": ("hydra/launcher=local", "hydra.launcher.n_jobs=2"),
}
# What must be equal: weights and samples decide all of it.
NUMBERS = ("policy_reward", "kl", "eval_loss", "eval_accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for many-runs.json")
    parser.add_argument(
        "--runs", type=int, default=32, help=f"a multiple of {len(LOSSES)}, 8 or more"
    )
    parser.add_argument("--commands", type=int, default=4, help="how many runs are commands too")
    arguments = parser.parse_args()
    least = 2 * len(LOSSES)  # with one seed, the folders of the runs have no seed in their names
    if (
        arguments.runs % len(LOSSES)
        or arguments.runs < least
        or not 1 < arguments.commands <= arguments.runs
    ):
        parser.error(
            f"--runs {arguments.runs} --commands {arguments.commands}: give a multiple of"
            f" {len(LOSSES)}, {least} or more, and at most as many commands, two or more"
        )
    seeds = range(arguments.runs // len(LOSSES))
    runs = [(loss, seed) for seed in seeds for loss in LOSSES]
    swept = (f"loss={','.join(LOSSES)}", f"seed={','.join(map(str, seeds))}")
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for pages, name in (((), "commands"), (("report=false",), "commands, report=false")):
            work = Path(folder) / f"pages-{not pages}"
            work.mkdir()
            measured = runs[: arguments.commands]
            results[name] = total = of_commands(work, measured, len(runs), pages)
            for number, (kind, launcher) in enumerate(SWEEPS.items()):
                place = work / f"sweep-{number}"
                sweep = measure(place, f"{place}-cache", "-m", *swept, *launcher, *pages)
                check(measured, work, place)
                results[name.replace("commands", kind)] = sweep | {
                    f"{key} of the commands": sweep[key] / total[key]
                    for key in ("cpu_seconds", "seconds")
                }
    arguments.output.mkdir(parents=True, exist_ok=True)
    written = {"machine": machine(), "runs": len(runs), "results": results}
    path = arguments.output / "many-runs.json"
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(table(len(runs), results))


def of_commands(work: Path, measured: list[tuple[str, int]], n: int, more: tuple) -> dict:
    """What n commands take, of which some are measured."""
    first, *others = [
        measure(work / f"{loss}-{seed}", f"{work}/cache", f"loss={loss}", f"seed={seed}", *more)
        for loss, seed in measured
    ]
    return {"measured": len(measured)} | {
        key: first[key] + (n - 1) * statistics.mean(one[key] for one in others)
        for key in ("cpu_seconds", "seconds")
    }


def measure(folder: Path, cache: str, *words: str) -> dict:
    """What `python train.py` with these words takes."""
    command = [sys.executable, str(ROOT / "train.py"), *words, *RUN, f"local_run_dir={folder}"]
    command.append(f"cache_dir={cache}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with open(f"{folder}.log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(words)} failed:\n{log.read()[-4000:]}")
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": time.perf_counter() - started,
    }


def check(runs: list[tuple[str, int]], work: Path, sweep: Path) -> None:
    """Exit where a run of the sweep has other numbers than its command."""
    for loss, seed in runs:
        command, swept = (
            json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            for folder in (work / f"{loss}-{seed}", sweep / f"loss-{loss}_seed-{seed}")
        )
        differing = [key for key in NUMBERS if command[key] != swept[key]]
        if differing:
            raise SystemExit(f"loss={loss} seed={seed}: the sweep has other {differing}")


def table(n: int, results: dict) -> str:
    lines = [f"{n} runs".ljust(38) + "  cpu s  clock s  of the commands (cpu, clock)"]
    for name, values in results.items():
        line = name.ljust(38) + f"{values['cpu_seconds']:>7.1f}{values['seconds']:>9.1f}"
        if "cpu_seconds of the commands" in values:
            line += (
                f"  {values['cpu_seconds of the commands']:.2f}"
                f"  {values['seconds of the commands']:.2f}"
            )
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
