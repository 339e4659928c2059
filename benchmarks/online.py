"""Time of a round of online DPO, ours and TRL's OnlineDPOTrainer, interleaved.

    pip install -r benchmarks/requirements.txt     # TRL; without it TRL is left out
    python benchmarks/online.py --output benchmarks/results [--rounds 3] [--cases tldr-30M,...]
    python benchmarks/online.py --output benchmarks/results --model FOLDER     # one of your own

A round samples two responses of 53 tokens to each of 8 prompts at temperature 1, scores them, and
takes one DPO step of AdamW on the pairs, with the reference in every step. The score is a hash of
the response, so no two are equal and both sides learn from every pair. Ours also measures the KL of
the whole vocabulary, TRL that of the sampled tokens. TRL runs at its defaults (in fp32) and at the
best settings we know (no activation checkpointing, fused optimizer). `ahead` is online.ahead=true.

Every round of the benchmark runs each variant in a fresh process, in an order that rotates; a
process has a round of online DPO to warm up and then STEPS timed ones. Ratios are those of the same
round, and times those of the processor (on a GPU, and for `ahead`, of a clock). The command writes
online-DEVICE.json.
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

from benchmarks.cases import BETA, LENGTHS, MODELS, VOCABULARY, make_job, make_pairs
from benchmarks.placement import machine

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, NEW_TOKENS, STEPS, LEARNING_RATE = 8, 53, 2, 1e-6
CASES = {f"{lengths}-{model}": (lengths, model) for model in MODELS for lengths in ("imdb", "tldr")}
OURS, TRL = ("ours", "ours, ahead"), ("TRL, defaults", "TRL, best")
REWARD = """
import zlib
from rewards import register_reward

@register_reward("hashed")
def hashed():
    return lambda prompts, responses: [zlib.crc32(r.encode()) / 2**32 for r in responses]
"""


def main() -> None:
    if sys.argv[1:2] == ["--variant"]:
        print(json.dumps(measure_variant(sys.argv[2], json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--model", type=Path, help="folder of a model, in place of the cases")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    here = machine()
    path = arguments.output / f"online-{'cuda' if here['gpus'] else 'cpu'}.json"
    sizes = {"prompts": arguments.prompts, "new_tokens": arguments.new_tokens}
    results = {"machine": here, **sizes, "steps": STEPS, "cases": {}}
    cases = [str(arguments.model)] if arguments.model else arguments.cases.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        for number, case in enumerate(filter(None, cases)):
            job = write_job(Path(temporary) / str(number), case, arguments.model) | sizes
            results["cases"][Path(case).name] = measured = measure(job, arguments.rounds)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(table(case, measured))


def write_job(folder: Path, case: str, model: Path | None) -> dict:
    """Write the model, the prompts and the reward of a case."""
    lengths, size = ("imdb", "30M") if model else CASES[case]
    pairs = make_pairs(*LENGTHS[lengths], 64, 64)
    make_job(folder, MODELS[size], VOCABULARY, "dpo", pairs, bf16=False)
    if model:  # texts, in place of the words of the made tokenizer
        rows = (ROOT / "data" / "reviews-train.jsonl").read_text(encoding="utf-8").splitlines()
        texts = list(dict.fromkeys(json.loads(row)["prompt"] for row in rows))[:64]
    else:
        texts = [pair["prompt"] for pair in pairs]
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "hashed.py").write_text(REWARD, encoding="utf-8")
    return {"folder": str(folder), "model": str(model or folder / "model")}


def measure(job: dict, rounds: int) -> dict:
    """Medians over rounds of each variant, and of its time in that of ours."""
    variants = [*OURS, *(TRL if importlib.util.find_spec("trl") else ())]
    measured: dict[str, list[dict]] = {variant: [] for variant in variants}
    for number in range(rounds):
        shift = number % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            measured[variant].append(run(variant, job))
            print(f"{variant}: {measured[variant][-1]['cpu_seconds']:.2f} s", file=sys.stderr)
    return {variant: _summary(variant, measured) for variant in variants}


def _summary(variant: str, measured: dict[str, list[dict]]) -> dict:
    on_clock = machine()["gpus"] or variant == "ours, ahead"
    key = "seconds" if on_clock else "cpu_seconds"
    ratios = [a[key] / b[key] for a, b in zip(measured[variant], measured["ours"], strict=True)]
    summary = {k: statistics.median(of[k] for of in measured[variant]) for k in measured["ours"][0]}
    return summary | {"times_ours": statistics.median(ratios), "ratios": ratios}


def table(case: str, measured: dict) -> str:
    lines = [f"{case}, a round".ljust(28) + "  cpu s  seconds  times ours"]
    lines += [
        f"  {name:<26}{values['cpu_seconds']:>7.2f}{values['seconds']:>9.2f}"
        f"  {values['times_ours']:.2f} ({min(values['ratios']):.2f} to {max(values['ratios']):.2f})"
        for name, values in measured.items()
    ]
    return "\n".join(lines)


def run(variant: str, job: dict) -> dict:
    """One variant in its own process: seconds of a round, by a clock and of the processor."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, __file__, "--variant", variant, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{variant} failed\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


class Clock:
    """Times of the rounds of a process."""

    def __init__(self):
        self.rounds: list[tuple[float, float]] = []

    def begin(self) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def end(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.rounds.append(tuple(b - a for a, b in zip(self._begun, now, strict=True)))

    def means(self) -> dict:
        """Of all rounds but the first."""
        seconds, cpu_seconds = map(statistics.mean, zip(*self.rounds[1:], strict=True))
        return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def measure_variant(variant: str, job: dict) -> dict:
    return (measure_ours if variant in OURS else measure_trl)(variant, job, Clock())


def measure_ours(variant: str, job: dict, clock: Clock) -> dict:
    """Rounds of `train.py function=online`."""
    import train
    from preflab.online.rounds import OnlineTrainer

    learn, folder = OnlineTrainer._learn_from_a_round, Path(job["folder"])

    def timed(self, bar) -> None:
        clock.begin()
        learn(self, bar)
        clock.end()

    OnlineTrainer._learn_from_a_round = timed
    with tempfile.TemporaryDirectory() as run_dir:
        sys.argv[1:] = [
            "function=online", "model=blank_model", f"model.name_or_path={job['model']}",
            f"datasets=[{folder / 'prompts.jsonl'}]", "loss=dpo", f"loss.beta={BETA}",
            "reward=length", "~reward.unit", "reward.name=hashed",
            f"reward.module={folder / 'hashed.py'}", f"batch_size={job['prompts']}",
            f"eval_batch_size={2 * job['prompts']}", f"online.max_new_tokens={job['new_tokens']}",
            "max_length=1024", "max_prompt_length=512", "optimizer=AdamW", f"lr={LEARNING_RATE}",
            "warmup_steps=0", f"online.rounds={1 + STEPS}", "online.save_every=1000",
            "sample_during_eval=false", "do_first_eval=false", "wandb.enabled=false",
            f"online.ahead={str(variant == 'ours, ahead').lower()}", "debug=true",
            f"local_run_dir={run_dir}/run", f"cache_dir={folder / 'cache'}",
        ]  # fmt: skip
        train.main()
    return clock.means()


def measure_trl(variant: str, job: dict, clock: Clock) -> dict:
    """Steps of TRL's OnlineDPOTrainer."""
    import zlib

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    class Timing(TrainerCallback):
        def on_step_begin(self, *arguments, **more) -> None:
            clock.begin()

        def on_step_end(self, *arguments, **more) -> None:
            clock.end()

    def hashed(completions: list[str], **more) -> list[float]:
        return [zlib.crc32(text.encode()) / 2**32 for text in completions]

    more = {}
    if variant == "TRL, best":
        more = {"gradient_checkpointing": False, "optim": "adamw_torch_fused"}
    rows = (Path(job["folder"]) / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["model"]) for _ in range(2))
    trainer = OnlineDPOTrainer(
        policy,
        reference,
        reward_funcs=hashed,
        args=OnlineDPOConfig(
            output_dir=job["folder"] + "/trl",
            per_device_train_batch_size=job["prompts"],
            max_new_tokens=job["new_tokens"],
            max_length=1024,
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            beta=BETA,
            max_steps=1 + STEPS,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            **more,
        ),
        train_dataset=Dataset.from_list([json.loads(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Timing()],
    )
    trainer.train()
    return clock.means()


if __name__ == "__main__":
    main()
