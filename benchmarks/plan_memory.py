"""Plans against measured peaks of memory, on a CPU: `function=plan` and the same run, side by side.

    python benchmarks/plan_memory.py [--sizes tiny 30M 124M] [--model FOLDER] [--output FILE]

The models are the small one in data/tiny and random GPT-2s, or the given one. Each of three
settings (float32, bfloat16, LoRA) trains three steps in its own process, whose peak is that of
its resident memory.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.placement import ROOT, machine

# vocabulary, hidden size, layers, heads
SIZES = {"tiny": None, "30M": (32_000, 384, 10, 6), "124M": (50_257, 768, 12, 12)}
SETTINGS = {
    "float32": (),
    "bfloat16": ("model.policy_dtype=bfloat16", "model.reference_dtype=bfloat16"),
    "LoRA": ("model.lora.r=16",),
}
# Prints the peak of the command that it runs.
PEAK = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode;"
    " print('PEAK', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--model", type=Path, help="a folder of a model, instead of all sizes")
    parser.add_argument("--output", type=Path, help="a file for the numbers, JSON")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {size: make_model(Path(folder) / size, size) for size in arguments.sizes}
        if arguments.model:
            models = {arguments.model.name: arguments.model.resolve()}
        for size, model in models.items():
            for name in SETTINGS:
                row = {"model": size, **measure(name, model, Path(folder) / f"{size}-runs")}
                rows.append(row)
                print(
                    f"{size:<10} {name:<10} planned {row['planned_mib']:>8,.0f} MiB, measured"
                    f" {row['measured_mib']:>8,.0f} MiB: {row['difference']:+.1%}",
                    flush=True,
                )
    if arguments.output:
        results = {"machine": machine(), "rows": rows}
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def make_model(folder: Path, size: str) -> Path:
    if SIZES[size] is None:
        return ROOT / "data" / "tiny"
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    vocabulary, hidden, layers, heads = SIZES[size]
    config = AutoConfig.for_model(
        "gpt2", vocab_size=vocabulary, n_embd=hidden, n_layer=layers, n_head=heads,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(name: str, model: Path, folder: Path) -> dict:
    command = [
        sys.executable, str(ROOT / "train.py"), "model=blank_model", f"model.name_or_path={model}",
        "datasets=[reviews]", "loss=dpo", "optimizer=AdamW", "batch_size=16", "n_epochs=null",
        "n_examples=48", "max_length=96", "max_prompt_length=32", "do_first_eval=false",
        "sample_during_eval=false", "eval_every=1000000", "n_eval_examples=8", "eval_batch_size=8",
        "wandb.enabled=false", "debug=true", f"local_run_dir={folder / name}",
        f"cache_dir={folder / 'cache'}", *SETTINGS[name],
    ]  # fmt: skip
    plan = subprocess.run(
        [*command, "function=plan"], capture_output=True, text=True, check=True
    ).stdout
    planned = float(re.search(r"together +([\d,.]+)", plan)[1].replace(",", ""))
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *command], capture_output=True, text=True, check=True
    ).stdout
    measured = int(re.search(r"PEAK (\d+)", run)[1]) / 1024
    return {
        "setting": name,
        "planned_mib": planned,
        "measured_mib": measured,
        "difference": planned / measured - 1,
    }


if __name__ == "__main__":
    main()
