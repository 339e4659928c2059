"""The commands that benchmarks/process.py compares. Each runs in its own process:

    python benchmarks/process_commands.py JOB

JOB is JSON: the folder with `model` and `pairs`, the number of steps, the pairs of a step and the
command. `FOLDER/work/phases.json` gets the processor seconds of each phase, those until the first
step was done, and the loss of the held-out pairs.
"""

import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import BETA


class Phases:
    """Processor seconds of phases. One inside another counts for the inner one alone."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.until_first_step: float | None = None
        self._open: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        """Count the time since the last turn for the phase that is open."""
        now = time.process_time()
        if self._open:
            phase = self._open[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def watch(self, owner, name: str, phase: str) -> None:
        """Count what a function or method takes for a phase."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def watched(*args, **kwargs):
            self._turn()
            self._open.append(phase)
            try:
                return inner(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()
                if phase == "steps" and self.until_first_step is None:
                    self.until_first_step = time.process_time()

        setattr(owner, name, watched)


def main() -> None:
    job = json.loads(sys.argv[1])
    phases, work = Phases(), Path(job["folder"]) / "work"
    run = run_ours if job["command"] == "PrefLab" else run_trl
    loss = run(job, work, phases)
    result = {
        "phases": phases.seconds,
        "until_first_step": phases.until_first_step,
        "loss": loss,
    }
    (work / "phases.json").write_text(json.dumps(result), encoding="utf-8")


def run_ours(job: dict, work: Path, phases: Phases) -> float:
    """`python train.py` with the words below."""
    folder = Path(job["folder"])
    sys.argv = [
        "train.py",
        *("model=blank_model", f"model.name_or_path={folder / 'model'}"),
        *(f"datasets=[{folder / 'pairs'}]", "loss=dpo", f"loss.beta={BETA}", "n_epochs=1"),
        *(f"batch_size={job['pairs']}", "optimizer=AdamW", "lr=1e-6", "warmup_steps=0"),
        *("max_length=1024", "max_prompt_length=900", "eval_every=1000000", "do_first_eval=false"),
        *("sample_during_eval=false", "wandb.enabled=false"),
        *(f"local_run_dir={work / 'run'}", f"cache_dir={work / 'cache'}"),
    ]
    from preflab import execution
    from preflab.reports import run as reports
    from preflab.training.learner import Learner
    from preflab.training.session import Session
    from train import main as train

    phases.watch(execution, "load_inputs", "tokens")
    phases.watch(Learner, "cache_reference", "reference")
    phases.watch(Session, "step", "steps")
    phases.watch(Session, "evaluate", "evaluation")
    phases.watch(Session, "save", "saving")
    phases.watch(reports, "write_report", "report")
    train()
    return json.loads((work / "run" / "summary.json").read_text(encoding="utf-8"))["eval_loss"]


def run_trl(job: dict, work: Path, phases: Phases) -> float:
    """A script with TRL's DPOTrainer, which trains, evaluates and saves."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder = Path(job["folder"])
    best = job["command"] == "TRL, best"
    more = {}
    if best:
        more = {
            "precompute_ref_log_probs": True,
            "gradient_checkpointing": False,
            "optim": "adamw_torch_fused",
        }
    config = DPOConfig(
        output_dir=str(work / "trl"),
        max_steps=job["steps"],
        per_device_train_batch_size=job["pairs"],
        max_length=1024,
        learning_rate=1e-6,
        beta=BETA,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        save_steps=job["steps"],
        **more,
    )
    phases.watch(DPOTrainer, "_prepare_dataset", "tokens")
    phases.watch(DPOTrainer, "_precompute_ref_logps", "reference")
    phases.watch(DPOTrainer, "_inner_training_loop", "steps")
    phases.watch(DPOTrainer, "training_step", "steps")
    phases.watch(DPOTrainer, "evaluate", "evaluation")
    phases.watch(DPOTrainer, "_save_checkpoint", "saving")
    rows = load_dataset(
        "json",
        data_files={s: str(folder / "pairs" / f"{s}.jsonl") for s in ("train", "test")},
        cache_dir=str(work / "datasets"),
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    return trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    main()
