"""Plans against measured peaks of memory, on a CPU: `function=plan` and the same run, side by side.

    python benchmarks/plan_memory.py [--model FOLDER] [--output FILE]

The model is a random GPT-2 with 30M parameters, or the given one. Each of three settings (float32,
bfloat16, LoRA) trains three steps in a process of its own, whose peak is that of its resident
memory.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
    parser.add_argument("--model", type=Path, help="a folder; default: a random GPT-2 of 30M")
    parser.add_argument("--output", type=Path, help="a file for the numbers, JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_model(Path(folder) / "model")
        rows = [measure(name, model.resolve(), Path(folder)) for name in SETTINGS]
    for row in rows:
        print(
            f"{row['setting']:<10} planned {row['planned_mib']:>8,.0f} MiB, measured"
            f" {row['measured_mib']:>8,.0f} MiB: {row['difference']:+.1%}"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def make_model(folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    config = AutoConfig.for_model(
        "gpt2", vocab_size=32_000, n_embd=384, n_layer=10, n_head=6,
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
