"""Time of a DPO step on pairs against an SFT step on the same responses, interleaved.

    pip install -r benchmarks/requirements.txt     # TRL; without it TRL is left out
    python benchmarks/sft_step.py --output benchmarks/results [--rounds 3] [--cases tldr-30M,...]

The DPO step has 8 pairs. The SFT step has their 16 responses, each behind its own copy of the
prompt and without padding, and scores the tokens of the responses. Model, weights, optimizer and
machine are the same. The reference's log-probs are read from the cache, as in every epoch but the
first; `reference run` computes them in the step, which is what a first epoch takes. TRL's
SFTTrainer runs at its defaults and at the best settings we know (no activation checkpointing, fused
optimizer). The losses of the SFT steps must be equal.

Every round runs each variant in a fresh process, in an order that rotates. Ratios are those of the
same round, and times those of the processor (on a GPU, of a clock). The command writes
sft-step-DEVICE.json.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import LENGTHS, MODELS, VOCABULARY, make_job, make_pairs, write_rows
from benchmarks.placement import machine
from benchmarks.step import run_rounds

PAIRS = 8
CASES = {f"{lengths}-{model}": (lengths, model) for model in MODELS for lengths in ("tldr", "hh")}
DPO, FIRST_EPOCH = "DPO", "DPO, reference run"
SFT = "SFT"
TRL = ("TRL SFT, defaults", "TRL SFT, best")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16, for hardware that has it")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    here = machine()
    name = f"sft-step-{'cuda' if here['gpus'] else 'cpu'}{'-bf16' if arguments.bf16 else ''}.json"
    results = {"machine": here, "pairs": PAIRS, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        for case in filter(None, arguments.cases.split(",")):
            measured = measure(Path(folder) / case, case, arguments.rounds, arguments.bf16)
            results["cases"][case] = measured
            (arguments.output / name).write_text(
                json.dumps(results, indent=1) + "\n", encoding="utf-8"
            )
            print(table(case, measured))


def measure(folder: Path, case: str, rounds: int, bf16: bool) -> dict:
    """Medians over rounds of each variant, and of its ratio to the SFT step."""
    lengths, model = CASES[case]
    pairs = make_pairs(*LENGTHS[lengths], PAIRS, PAIRS)
    dpo = make_job(folder, MODELS[model], VOCABULARY, "dpo", pairs, bf16)
    targets = [
        {"prompt": pair["prompt"], "chosen": pair[side]}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    write_rows(folder / "targets", targets)
    sft = dpo | {"loss": "sft", "data": "targets", "n_pairs": len(targets)}
    jobs = {
        DPO: (dpo, "prefix_shared"),
        FIRST_EPOCH: (dpo, "prefix_shared, reference run"),
        SFT: (sft, "packed"),
    }
    if importlib.util.find_spec("trl") is not None:
        jobs |= {name: (sft, name) for name in TRL}
    measured = run_rounds(jobs, rounds)
    _check_losses(measured, dpo["tokens"]["scored"] / len(targets))
    return {name: _summary(results, measured[SFT]) for name, results in measured.items()}


def _check_losses(measured: dict[str, list[dict]], tokens_per_response: float) -> None:
    """Exit where the SFT steps do not compute the same: ours sums over the tokens of a response,
    TRL's loss is the mean over all tokens."""
    losses = {name: results[0]["loss"] for name, results in measured.items() if "SFT" in name}
    for name in TRL:
        if name in losses:
            losses[name] *= tokens_per_response
    if max(losses.values()) - min(losses.values()) > 0.01 * min(losses.values()):
        raise SystemExit(f"the losses disagree: {losses}")


def _summary(results: list[dict], sft: list[dict]) -> dict:
    seconds = "seconds" if machine()["gpus"] else "cpu_seconds"
    ratios = [ours[seconds] / other[seconds] for ours, other in zip(results, sft, strict=True)]
    summary = {
        key: statistics.median(one[key] for one in results)
        for key in ("seconds", "cpu_seconds", "peak_memory")
    }
    return summary | {"times_sft": statistics.median(ratios), "ratios": ratios}


def table(case: str, result: dict) -> str:
    lines = [f"{case}, {PAIRS} pairs".ljust(28) + "  cpu s   MiB  of the SFT step"]
    lines += [
        f"  {name:<26}{values['cpu_seconds']:>7.2f}{values['peak_memory'] / 2**20:>6.0f}"
        f"  {values['times_sft']:.2f} ({min(values['ratios']):.2f} to {max(values['ratios']):.2f})"
        for name, values in result.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
