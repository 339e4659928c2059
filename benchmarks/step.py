"""Time, memory and agreement of one training step: PrefLab in every layout, the classic step, and
TRL, interleaved.

    pip install -r benchmarks/requirements.txt     # TRL; without it TRL is left out
    python benchmarks/step.py --output benchmarks/results [--rounds 3] [--cases tldr-30M-dpo,...] \\
        [--no-curves]

A case is a model, a loss, and lengths like those of a dataset. Every round runs each variant of a
case once, in a fresh process and in an order that rotates, on the same pairs, from the same weights
of policy and reference. A process takes a small step and a full one to warm up, then the timed one.
The comparison is the median over rounds of the ratio to the classic step of the same round. Memory
is the peak of a process above its memory when everything was imported; `extra` is that without
weights, gradients and the optimizer's state (and the reference's weights, where they are in
memory). On a small batch of two pairs, all losses and all gradients are compared with those of the
classic step.

The classic step is that of the first DPO code, written out in `step_variants.Classic`: chosen and
rejected as two padded copies of the prompt, the whole float32 log-softmax of both models, the
reference run in every step. TRL runs at its defaults (in fp32) and at the best settings we know
(reference precomputed, no activation checkpointing, fused optimizer). All use AdamW.

The command writes step-DEVICE.json, step-DEVICE.md (the table of the README) and step-DEVICE.png.

    python benchmarks/step.py --lists --output benchmarks/results [--rounds 3]

compares a step on lists of eight scored responses with one on two of them, and with one on all 28
pairs of each prompt, and writes lists-DEVICE.json. The classic step gets four of the pairs: it
would hold 20 GB for all, in seven times the time. Times are those of the processor, which other
work on the machine changes less than those of a clock.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import (
    CASES,
    LENGTHS,
    MODELS,
    OURS,
    VOCABULARY,
    Tokens,
    flop_floor,
    make_job,
    make_lists,
    make_pairs,
    pairs_of,
    reads,
    token_counts,
    write_rows,
)
from benchmarks.placement import machine
from benchmarks.step_report import draw, markdown, table

ROOT = Path(__file__).resolve().parent.parent
GROWTH = {  # what grows: its values; the other quantities stay as in `STANDARD`
    "response length": [16, 64, 192],
    "prompt length": [32, 128, 384],
    "vocabulary": [8192, 32768, 98304],
    "pairs": [2, 8, 24],
}
STANDARD = {"response length": 64, "prompt length": 128, "vocabulary": 32768, "pairs": 8}


def main() -> None:
    arguments = _parser().parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    here = machine()
    device = ("cuda" if here["gpus"] else "cpu") + ("-bf16" if arguments.bf16 else "")
    if arguments.lists:
        compare_lists(arguments.output / f"lists-{device}.json", here, arguments)
        return
    path = arguments.output / f"step-{device}.json"
    results = _earlier_results(path, here) or {"machine": here, "cases": {}}

    def save(part: str, key: str, value) -> None:
        results.setdefault(part, {})[key] = value
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        draw(results, path.with_suffix(".png"))

    with tempfile.TemporaryDirectory() as temporary:
        folder, bf16 = Path(temporary), arguments.bf16
        for case in filter(None, arguments.cases.split(",")):
            save("cases", case, measure_case(folder, case, arguments.rounds, bf16))
        measured: dict[tuple, dict] = {}
        for quantity in () if arguments.no_curves else GROWTH:
            save("curves", quantity, measure_curve(folder, quantity, bf16, measured))
    for case, result in results["cases"].items():
        print(table(case, result))
    draw(results, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="forward and backward pass in bfloat16, for hardware that has it",
    )
    parser.add_argument("--lists", action="store_true", help="measure lists of responses only")
    parser.add_argument(
        "--no-curves", action="store_true", help="do not measure how the cost grows"
    )
    return parser


def _earlier_results(path: Path, here: dict) -> dict | None:
    """The results of other cases on this machine, to which this run adds."""
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    return results if results["machine"] == here else None


# ------------------------------------------------------------------------------------------- a case


def measure_case(folder: Path, name: str, rounds: int, bf16: bool) -> dict:
    rate = matmul_rate(bf16)
    case = CASES[name]
    pairs = make_pairs(*LENGTHS[case.lengths], case.pairs, case.prompts)
    job = make_job(folder / name, MODELS[case.model], VOCABULARY, case.loss, pairs, bf16)
    variants = ["classic", *OURS]
    if "token_kl" in reads(case.loss):  # the reference always runs
        variants = ["classic", "prefix_shared", "packed", "padded"]
    if case.in_trl and importlib.util.find_spec("trl") is not None:
        variants += ["TRL, defaults", "TRL, best"]
    gradients = folder / "gradients"
    measured: dict[str, list[dict]] = {variant: [] for variant in variants}
    for number in range(rounds):
        shift = number % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            result = run(job, variant, gradients if number == 0 else None)
            print(
                f"{name}, round {number + 1}, {variant}: {result['seconds']:.2f} s",
                file=sys.stderr,
            )
            if number == 0:
                result |= compare_gradients(gradients, variant)
            measured[variant].append(result)
    return {
        "rounds": rounds,
        "pairs": case.pairs,
        "prompts": case.prompts,
        "tokens": {key: job["tokens"][key] for key in ("padded", "distinct", "scored")},
        "matmul_gflops": round(rate / 1e9, 1),
        "floor_seconds": flop_floor(job) / rate,
        "variants": summarise(measured, 0.02 if bf16 else 1e-4),
    }


def compare_lists(path: Path, here: dict, arguments: argparse.Namespace) -> None:
    """Measure steps on lists, and write and print what they take."""
    results = {"machine": here, "model": "30M", "lengths": "tldr", "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 4):
            key = "1 prompt" if n == 1 else f"{n} prompts"
            results[key] = measure_lists(Path(folder) / key, n, arguments.rounds, arguments.bf16)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(lists_table(key, results[key]))


def measure_lists(folder: Path, n_prompts: int, rounds: int, bf16: bool) -> dict:
    """Steps on the same prompts with 8 and with 2 responses, and on all 28 pairs of the 8; with one
    prompt also the classic step on four of the pairs."""
    prompt, response = LENGTHS["tldr"]
    lists = {k: make_lists(prompt, response, n_prompts, k) for k in (8, 2)}
    pairs = pairs_of(lists[8])
    job = make_job(folder, MODELS["30M"], VOCABULARY, "dpo", pairs, bf16)
    jobs = {"28 pairs, prefix_shared": (job, "prefix_shared")}
    if n_prompts == 1:
        jobs["4 of the pairs, classic"] = (job | {"n_pairs": 4}, "classic")
    operations = {}
    for k, rows in lists.items():
        write_rows(folder / f"lists-{k}", rows)
        more = {"loss": "plackett-luce", "data": f"lists-{k}", "n_pairs": n_prompts}
        jobs[f"lists of {k}"] = (job | more, "prefix_shared")
        operations[f"lists of {k}"] = flop_floor(job | {"tokens": token_counts(pairs_of(rows))})
    measured = run_rounds(jobs, rounds)
    return {
        name: _of_lists(results, measured["lists of 8"], operations.get(name))
        for name, results in measured.items()
    }


def run_rounds(jobs: dict[str, tuple[dict, str]], rounds: int) -> dict[str, list[dict]]:
    """What each job with its variant took in each round, in an order that rotates."""
    measured: dict[str, list[dict]] = {name: [] for name in jobs}
    names = list(jobs)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            measured[name].append(run(*jobs[name]))
            print(f"{name}: {measured[name][-1]['cpu_seconds']:.2f} s", file=sys.stderr)
    return measured


def _of_lists(results: list[dict], eight: list[dict], operations: float | None) -> dict:
    """Medians over rounds of a variant of `measure_lists`, and of its ratio to lists of 8."""
    ratios = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(results, eight, strict=True)]
    summary = {
        key: statistics.median(one[key] for one in results)
        for key in ("seconds", "cpu_seconds", "peak_memory")
    }
    summary["times_lists_of_8"] = statistics.median(ratios)
    return summary if operations is None else summary | {"operations": operations}


def lists_table(case: str, result: dict) -> str:
    """The steps of `measure_lists`, for the terminal."""
    lines = [f"{case}, TL;DR lengths, 30M".ljust(34) + "  cpu s   MiB  times the lists of 8"]
    lines += [
        f"  {name:<32}{values['cpu_seconds']:>7.2f}{values['peak_memory'] / 2**20:>6.0f}"
        f"{values['times_lists_of_8']:>8.2f}"
        for name, values in result.items()
    ]
    return "\n".join(lines)


def matmul_rate(bf16: bool) -> float:
    """Floating point operations per second (a multiply-add is two): the best of several products
    with the shapes of an MLP, in the dtype of the steps. On a GPU those of a large one, since small
    ones do not fill it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, width, inner = (16384, 4096, 14336) if device == "cuda" else (2048, 768, 3072)
    dtype = torch.bfloat16 if bf16 else torch.float32
    a = torch.randn(rows, width, device=device, dtype=dtype)
    b = torch.randn(width, inner, device=device, dtype=dtype)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(10):
            torch.matmul(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 10 * 2 * rows * width * inner / min(times)


def run(job: dict, variant: str, gradients: Path | None = None) -> dict:
    """One variant in its own process."""
    job = job | {"variant": variant, "gradients": str(gradients) if gradients else None}
    command = [sys.executable, str(ROOT / "benchmarks" / "step_variants.py"), json.dumps(job)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{variant} failed\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_gradients(path: Path, variant: str) -> dict:
    """The largest relative difference, in norm, of a parameter's gradient from that of the classic
    step."""
    import torch

    if not path.exists():
        return {}
    base = path.with_name("classic-gradients")
    if variant == "classic":
        path.rename(base)
        return {"gradient_error": 0.0}
    ours, theirs = (torch.load(file, weights_only=True) for file in (path, base))
    if different := ours.keys() ^ theirs.keys():
        raise SystemExit(f"{variant} has other parameters than the classic step: {different}")
    return {"gradient_error": largest_difference(ours, theirs)}


def largest_difference(ours: dict, theirs: dict) -> float:
    """The largest difference of tensors of the same name, relative in norm to `theirs`; NaN if any
    is."""
    import torch

    differences = [((ours[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in theirs]
    return torch.tensor(differences).max().item()


def summarise(measured: dict[str, list[dict]], tolerance: float) -> dict[str, dict]:
    """Medians over rounds by variant. Exits where the losses differ by more than the tolerance."""
    summary = {}
    for variant, rounds in measured.items():
        pairs = list(zip(rounds, measured["classic"], strict=True))
        speedups = [classic["seconds"] / ours["seconds"] for ours, classic in pairs]
        memory_ratios = [ours["peak_memory"] / classic["peak_memory"] for ours, classic in pairs]
        summary[variant] = {
            **{
                key: statistics.median(result[key] for result in rounds)
                for key in ("seconds", "peak_memory", "loss")
            },
            "times_as_fast": statistics.median(speedups),
            "memory_ratio": statistics.median(memory_ratios),
            "gradient_error": rounds[0].get("gradient_error"),
        }
    losses = {variant: values["loss"] for variant, values in summary.items()}
    low, high = min(losses.values()), max(losses.values())
    if high - low > tolerance * max(1.0, high):
        raise SystemExit(f"the losses disagree: {losses}")
    return summary


# ------------------------------------------------------------------------------------------- curves


def measure_curve(
    folder: Path, quantity: str, bf16: bool, measured: dict[tuple, dict]
) -> list[dict]:
    """Pairs per second of our step and of the classic one, as one quantity grows. measured: the
    points so far by setting; curves share some."""
    points = []
    for value in GROWTH[quantity]:
        setting = STANDARD | {quantity: value}
        key = tuple(setting.values())
        if key not in measured:
            name = f"{quantity}-{value}".replace(" ", "-")
            measured[key] = _measure_point(folder / name, setting, bf16)
            ours, classic = measured[key]["prefix_shared"], measured[key]["classic"]
            print(f"{quantity} {value}: {ours:.2f} pairs/s, classic {classic:.2f}", file=sys.stderr)
        points.append({"value": value, **measured[key]})
    return points


def _measure_point(folder: Path, setting: dict, bf16: bool) -> dict[str, float]:
    n, vocabulary = setting["pairs"], setting["vocabulary"]
    lengths = [Tokens(setting[f"{side} length"], 0.0, 1, 10**6) for side in ("prompt", "response")]
    pairs = make_pairs(*lengths, n, n, vocabulary=vocabulary)
    job = make_job(folder, MODELS["30M"], vocabulary, "dpo", pairs, bf16)
    return {variant: n / run(job, variant)["seconds"] for variant in ("prefix_shared", "classic")}


if __name__ == "__main__":
    main()
