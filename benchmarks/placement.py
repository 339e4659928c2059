"""Speed and memory of one training step by placement: BasicTrainer, FSDPTrainer and
TensorParallelTrainer, interleaved.

    python benchmarks/placement.py --output benchmarks/results [--rounds 3] [--devices 2]
    [OVERRIDES]

Every round runs each placement once, in fresh processes and in an order that rotates, on the same
pairs with the same model of random weights. The comparison is of medians over rounds: tokens/s
after the first step, the peak memory of the largest process (of its GPU, or on a CPU its anonymous
memory, without mapped files), and the bytes of weights, gradients and optimizer state of one rank
or device. The command writes placement.json and placement.png, and prints the table. OVERRIDES are
those of train.py, for another model or longer texts.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH = 5, 8

# A model whose state outweighs the libraries, on the data and with the tokenizer that ship.
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for placement.json and placement.png"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--devices",
        type=int,
        default=2,
        help="ranks of FSDPTrainer, devices of TensorParallelTrainer",
    )
    arguments, overrides = parser.parse_known_args()
    measured = measure_all(placements(arguments.devices), arguments.rounds, overrides)
    results = {
        "machine": machine(),
        "model": MODEL,
        "overrides": overrides,
        "rounds": arguments.rounds,
        "placements": summarise(measured),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = json.dumps(results, indent=1) + "\n"
    (arguments.output / "placement.json").write_text(content, encoding="utf-8")
    draw(results, arguments.output / "placement.png")
    print(table(results))


def placements(n: int) -> dict[str, list[str]]:
    """The overrides of each placement on n ranks or devices."""
    fsdp = ["trainer=FSDPTrainer", f"world_size={n}"]
    return {
        "Basic": ["trainer=BasicTrainer"],
        f"FSDP x{n}": fsdp,
        f"tensor parallel x{n}": ["trainer=TensorParallelTrainer", f"world_size={n}"],
        f"FSDP x{n} with split layers": [*fsdp, f"tensor_parallel_size={n}"],
    }


def measure_all(
    placements: dict[str, list[str]], rounds: int, overrides: list[str]
) -> dict[str, list[dict]]:
    """One measurement of each placement per round."""
    names = list(placements)
    measured: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work) / "model")
        for number in range(rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                run_dir = Path(work) / f"{names.index(name)}-{number}"
                result = measure(model, run_dir, [*placements[name], *overrides])
                measured[name].append(result)
                speed = result["tokens_per_second"]
                print(f"round {number + 1}, {name}: {speed:,.0f} tokens/s", file=sys.stderr)
    return measured


def make_model(folder: Path) -> Path:
    """A Llama of random weights with the shipped tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    config = AutoConfig.from_pretrained(ROOT / "data" / "tiny")
    config.update(MODEL | {"head_dim": MODEL["hidden_size"] // MODEL["num_attention_heads"]})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(model: Path, run_dir: Path, overrides: list[str]) -> dict:
    """One short run: its speed after the first step, and the memory of its largest rank."""
    settings = [
        f"model.name_or_path={model}",
        f"local_run_dir={run_dir}",
        "loss=dpo",
        f"batch_size={BATCH}",
        f"n_examples={BATCH * STEPS}",
        "do_first_eval=false",
        "eval_every=1000000",
        "n_eval_examples=1",
        "sample_during_eval=false",
        "wandb.enabled=false",
        "debug=true",
    ]
    command = [sys.executable, str(ROOT / "train.py"), *settings, *overrides]
    with (
        open(f"{run_dir}.log", "w") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process,
    ):
        peak = 0
        while process.poll() is None:
            peak = max([peak, *map(own_memory, family(process.pid))])
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{Path(log.name).read_text()}")
    rows = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    speeds = [row["tokens_per_second"] for row in rows if row["split"] == "train"][1:]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    peak = summary["peak_memory_bytes"] if machine()["gpus"] else peak
    return {
        "tokens_per_second": statistics.median(speeds),
        "peak_memory": peak,
        **summary["rank_bytes"],
    }


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:  # it has ended
        return []
    return [pid, *(member for child in children for member in family(child))]


def own_memory(pid: int) -> int:
    """Bytes of a process's anonymous memory, without mapped files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])
    except (OSError, IndexError):
        return 0


def summarise(measured: dict[str, list[dict]]) -> dict[str, dict]:
    """Medians over rounds, and the median over rounds of the ratio to Basic of the same round."""
    base, summary = measured["Basic"], {}
    for name, rounds in measured.items():
        summary[name] = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for key in rounds[0]:
            ratios = [ours[key] / basic[key] for ours, basic in zip(rounds, base, strict=True)]
            summary[name][f"{key}_ratio"] = statistics.median(ratios)
    return summary


def machine() -> dict:
    import torch

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "torch": torch.__version__,
    }


COLUMNS = {
    "tokens_per_second": "tokens/s",
    "peak_memory": "peak memory",
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
}


def table(results: dict) -> str:
    lines = [
        f"{'of a rank or device, ratio to Basic':<36}"
        + "".join(f"{title:>14}" for title in COLUMNS.values())
    ]
    for name, values in results["placements"].items():
        lines.append(f"{name:<36}" + "".join(f"{values[f'{key}_ratio']:>14.2f}" for key in COLUMNS))
    basic = results["placements"]["Basic"]
    sizes = [
        f"{basic['tokens_per_second']:,.0f}",
        *(f"{basic[key] / 2**20:,.0f} MiB" for key in list(COLUMNS)[1:]),
    ]
    lines.append(f"{'Basic itself':<36}" + "".join(f"{size:>14}" for size in sizes))
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results["placements"])
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        values = [results["placements"][name][f"{key}_ratio"] for key in COLUMNS]
        offset = (i - (len(names) - 1) / 2) * width
        places = [x + offset for x in range(len(COLUMNS))]
        bars = axes.bar(places, values, width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(COLUMNS)), COLUMNS.values())
    axes.set_ylabel("of a rank, ratio to Basic")
    machine = results["machine"]
    device = ", ".join(machine["gpus"]) or f"{machine['cores']} cores of {machine['processor']}"
    axes.set_title(f"One DPO step on {device}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
