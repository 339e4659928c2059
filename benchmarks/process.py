"""Whole commands: PrefLab and TRL's DPOTrainer on the same model, data and steps, interleaved.

    pip install -r benchmarks/requirements.txt     # TRL; without it TRL is left out
    python benchmarks/process.py --output benchmarks/results [--steps 3 10] [--rounds 3] \\
        [--size 30M | --model FOLDER_OR_GGUF]

A command starts Python, reads a model and pairs of the lengths of TL;DR, trains with 8 pairs a
step, evaluates 16 held-out pairs and saves weights and optimizer. Both use AdamW in fp32, one
thread, and the model at its start as reference. TRL runs at its defaults and at the best settings
we know (reference precomputed, no activation checkpointing, fused optimizer). PrefLab starts with
an empty cache, and also draws its report.

Times are processor seconds of the whole process, split into start, tokens, reference, steps,
evaluation, saving and report. All but the start grow with the number of steps, so that two numbers
of steps give the time of any other: what the table says about 200 steps is computed in this way.
The command writes process-DEVICE.json.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import LENGTHS, MODELS, VOCABULARY, make_job, make_pairs, write_rows
from benchmarks.placement import machine

PAIRS_A_STEP, TEST_PAIRS = 8, 16
OURS, TRL = "PrefLab", ("TRL, defaults", "TRL, best")
COMPUTED = 200  # the number of steps whose time is computed
PHASES = ("start", "tokens", "reference", "steps", "evaluation", "saving", "report")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, nargs=2, default=(3, 10), metavar=("FEW", "MORE"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=MODELS, default="30M", help="a GPT-2 of random weights")
    parser.add_argument("--model", type=Path, help="a folder or a GGUF file, in place of --size")
    arguments = parser.parse_args()
    if not 0 < arguments.steps[0] < arguments.steps[1]:
        parser.error(f"--steps {arguments.steps}: give two numbers, the smaller one first")
    arguments.output.mkdir(parents=True, exist_ok=True)
    here = machine()
    results = {
        "machine": here,
        "model": arguments.model.name if arguments.model else arguments.size,
        "pairs a step": PAIRS_A_STEP,
        "rounds": arguments.rounds,
    }
    with tempfile.TemporaryDirectory() as folder:
        results["commands"] = measure(Path(folder), arguments)
    path = arguments.output / f"process-{'cuda' if here['gpus'] else 'cpu'}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results["commands"]))


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    """{command: {number of steps: medians over rounds, and the ratio to PrefLab's}}."""
    jobs = {steps: _make_job(folder / str(steps), steps, arguments) for steps in arguments.steps}
    commands = [OURS, *(TRL if importlib.util.find_spec("trl") is not None else ())]
    cells = [(command, steps) for steps in arguments.steps for command in commands]
    measured: dict[tuple[str, int], list[dict]] = {cell: [] for cell in cells}
    for number in range(arguments.rounds):
        shift = number % len(cells)
        for command, steps in cells[shift:] + cells[:shift]:
            result = run(jobs[steps], command)
            measured[command, steps].append(result)
            print(f"{command}, {steps} steps: {result['cpu_seconds']:.1f} s", file=sys.stderr)
    return {command: _of_command(command, measured, arguments.steps) for command in commands}


def _make_job(folder: Path, steps: int, arguments: argparse.Namespace) -> dict:
    """The pairs of so many steps, and the model as a folder."""
    n = steps * PAIRS_A_STEP + TEST_PAIRS
    pairs = make_pairs(*LENGTHS["tldr"], n, n)
    train, test = pairs[:-TEST_PAIRS], pairs[-TEST_PAIRS:]
    if arguments.model is None:
        make_job(folder, MODELS[arguments.size], VOCABULARY, "dpo", train, False)
        shutil.rmtree(folder / "pairs")
    else:
        folder.mkdir(parents=True)
        words = _save_model(arguments.model, folder / "model")
        train, test = ([_with_words(row, words) for row in rows] for rows in (train, test))
    write_rows(folder / "pairs", train)
    lines = "".join(json.dumps(row) + "\n" for row in test)
    (folder / "pairs" / "test.jsonl").write_text(lines, encoding="utf-8")
    return {"folder": str(folder), "steps": steps, "pairs": PAIRS_A_STEP}


def _save_model(source: Path, folder: Path) -> list[str]:
    """Write a model in fp32, and its tokenizer; returns words that are one token each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    name = source.parent if given else source
    tokenizer = AutoTokenizer.from_pretrained(name, **given)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **given)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # the weights are dequantised
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = (tokenizer.decode([i]) for i in range(len(tokenizer)))
    return [text[1:] for text in texts if text[:1] == " " and text[1:].isalpha()]


def _with_words(row: dict, words: list[str]) -> dict:
    """A row of `make_pairs` in words of a model's tokenizer."""

    def of(text: str) -> str:
        return " ".join(words[int(word[1:]) % len(words)] for word in text.split())

    return {key: (" " if text[0] == " " else "") + of(text) for key, text in row.items()}


def run(job: dict, command: str) -> dict:
    """Run a command in its own process: its times, split into phases, and its peak memory."""
    work = Path(job["folder"]) / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    script = Path(__file__).with_name("process_commands.py")
    words = [sys.executable, str(script), json.dumps(job | {"command": command})]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with open(work / "output", "w+", encoding="utf-8") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{command} failed:\n{output.read()[-4000:]}")
    result = json.loads((work / "phases.json").read_text(encoding="utf-8"))
    total = usage.ru_utime + usage.ru_stime
    result["phases"]["start"] = total - sum(result["phases"].values())
    return result | {
        "cpu_seconds": total,
        "seconds": seconds,
        "peak_memory": usage.ru_maxrss * 1024,
    }


def _of_command(command: str, measured: dict, steps: tuple[int, int]) -> dict:
    summary: dict = {}
    for n in steps:
        of, ours = measured[command, n], measured[OURS, n]
        keys = ("cpu_seconds", "seconds", "peak_memory", "until_first_step", "loss")
        summary[str(n)] = {key: statistics.median(one[key] for one in of) for key in keys}
        summary[str(n)]["phases"] = {
            phase: statistics.median(one["phases"].get(phase, 0.0) for one in of)
            for phase in PHASES
        }
        summary[str(n)]["times PrefLab"] = _ratios(of, ours)
    of, ours = (
        [_computed(*both, steps) for both in zip(*(measured[name, n] for n in steps), strict=True)]
        for name in (command, OURS)
    )
    summary[f"{COMPUTED}, computed"] = {
        "cpu_seconds": statistics.median(one["cpu_seconds"] for one in of),
        "times PrefLab": _ratios(of, ours),
    }
    return summary


def _computed(few: dict, more: dict, steps: tuple[int, int]) -> dict:
    """The processor seconds of COMPUTED steps, on the line through two measured commands."""
    slope = (more["cpu_seconds"] - few["cpu_seconds"]) / (steps[1] - steps[0])
    return {"cpu_seconds": few["cpu_seconds"] + slope * (COMPUTED - steps[0])}


def _ratios(of: list[dict], ours: list[dict]) -> list[float]:
    """Least, median and greatest ratio of the processor seconds of a round."""
    ratios = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(of, ours, strict=True)]
    return [min(ratios), statistics.median(ratios), max(ratios)]


def table(commands: dict) -> str:
    """What the commands took, for the terminal."""
    lines = [
        "command".ljust(28) + "  cpu s   MiB  times PrefLab".ljust(34) + "  ".join(PHASES),
    ]
    for command, by_steps in commands.items():
        for steps, values in by_steps.items():
            low, ratio, high = values["times PrefLab"]
            memory = f"{values['peak_memory'] / 2**20:.0f}" if "peak_memory" in values else ""
            phases = "  ".join(
                f"{seconds:.1f}".rjust(len(phase))
                for phase, seconds in values.get("phases", {}).items()
            )
            lines.append(
                f"{command}, {steps} steps".ljust(28)
                + f"{values['cpu_seconds']:>7.1f}{memory:>6}"
                + f"  {ratio:.2f} ({low:.2f} to {high:.2f})".ljust(21)
                + phases
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
