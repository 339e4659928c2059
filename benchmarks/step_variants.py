"""The variants of a training step that benchmarks/step.py compares. Each runs in its own process:

    python benchmarks/step_variants.py JOB

JOB is the JSON of a job (see `cases.make_job`) with a `variant`, and `gradients`: null, or the file
that gets the gradients of the first step. The process prints time, peak memory and loss as JSON.

A job may also have `steps`, the number of timed steps, whose medians are taken (1); `microbatch`,
pairs in a forward pass of TRL (all of them); and for our own variants `overrides` of the config,
`cache`, the folder of the reference's log-probs, `ahead`, to prepare the rows of the next step in a
thread as training does, and `segments`, to attend segment by segment on a GPU too.
"""

import dataclasses
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import BETA, OURS, reads


def main() -> None:
    print(json.dumps(measure(json.loads(sys.argv[1]))))


def measure(job: dict) -> dict:
    """Build a variant, warm up, and take the timed step."""
    import torch

    _import_everything(job["variant"])
    torch.manual_seed(0)
    before = memory_now()
    variant = _variant_class(job["variant"])(job)
    if job["gradients"]:
        torch.save(gradients_of(variant, min(2, job["n_pairs"])), job["gradients"])
    else:
        variant.step(min(2, job["n_pairs"]))
    variant.step(job["n_pairs"])  # at full size once, so that the allocator has its blocks
    synchronize()
    reset_peak()
    graphs, seconds, cpu_seconds = compiled_graphs(), [], []
    for _ in range(job.get("steps", 1)):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = variant.step(job["n_pairs"])
        synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "peak_memory": peak_memory() - before,
        "loss": loss,
        "compiled_while_timed": compiled_graphs() - graphs,
    }


def gradients_of(variant, n: int) -> dict:
    """The gradient of every parameter in a step on n pairs."""
    gradients: dict = {}
    handle = variant.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(variant.gradients())
    )
    variant.step(n)
    handle.remove()
    return gradients


def compiled_graphs() -> int:
    """How many graphs torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _import_everything(variant: str) -> None:
    """Import the same modules in every variant, so that their memory does not count."""
    modules = [
        "trainers",
        "transformers",
        "tokenizers",
        "hydra",
        "preflab.execution",
        "torch._dynamo",
    ]
    modules.append("datasets")
    if variant.startswith("TRL"):
        modules += ["trl.trainer.dpo_trainer", "trl.trainer.sft_trainer"]
    for module in modules:
        __import__(module)


def _variant_class(variant: str) -> type:
    if variant == "classic":
        return Classic
    if variant.startswith("TRL SFT"):
        return TrlSft
    return Trl if variant.startswith("TRL") else Ours


def memory_now() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def open_run(job: dict):
    """Settings, loss and inputs of a job, as `python train.py` makes them; no weight is read."""
    from preflab.checks import check_settings
    from preflab.execution import load_inputs, register_built_in
    from preflab.settings.compose import compose
    from preflab.settings.load import validate

    layout, cache = OURS.get(job["variant"]) or (job["variant"].split(",")[0], "auto")
    folder = Path(job["folder"])
    reference = folder / "reference" if job.get("reference", True) else "null"
    overrides = [
        "model=blank_model",
        f"model.name_or_path={folder / 'model'}",
        f"model.reference_archive={reference}",
        f"model.fsdp_policy_mp={'bfloat16' if job['bf16'] else 'null'}",
        f"datasets=[{folder / job.get('data', 'pairs')}]",
        f"loss={job['loss']}",
        *([] if job["loss"] == "sft" else [f"loss.beta={BETA}"]),
        f"layout={layout}",
        f"reference.cache={cache}",
        f"cache_dir={folder / job.get('cache', 'cache')}",
        f"batch_size={job['n_pairs']}",
        "optimizer=AdamW",
        "sample_during_eval=false",
        "max_grad_norm=1e9",
        "max_length=1024",
        "max_prompt_length=800",
        "order=prompts",
        "lr=1e-12",
        "debug=true",
        "n_eval_examples=1",
        *job.get("overrides", []),
    ]
    register_built_in()
    config = compose(overrides)
    config.local_run_dir = str(folder / "run")
    (folder / "run").mkdir(exist_ok=True)
    settings = validate(config)
    loss, sources = check_settings(settings)
    return settings, loss, load_inputs(settings, sources, loss)


class Ours:
    """The project's own trainer, as `python train.py` builds it."""

    def __init__(self, job: dict):
        from trainers import BasicTrainer

        settings, loss, inputs = open_run(job)
        self.data = inputs.data["train"]
        parts = (settings, Path(settings.local_run_dir), loss, inputs.tokenizer, inputs.data)
        self.learner = BasicTrainer(*parts).learner
        self.learner.prepare()
        self.optimizer = self.learner.optimizer
        if job.get("segments"):
            self.learner.layout = dataclasses.replace(self.learner.layout, flex=False)
        self._thread = ThreadPoolExecutor(1) if job.get("ahead") else None
        self._upcoming: dict = {}  # by the number of pairs

    def gradients(self) -> dict:
        return {name: p.grad.clone() for name, p in self.learner.policy.model.named_parameters()}

    def microbatches(self, n: int) -> list:
        import numpy as np

        return self.learner.microbatches(self.data, np.arange(n))

    def step(self, n: int) -> float:
        prepared = self._upcoming.pop(n).result() if n in self._upcoming else self.microbatches(n)
        if self._thread is not None:
            self._upcoming[n] = self._thread.submit(self.microbatches, n)
        return self.learner.step(self.data, prepared, n)["loss/train"]


class Classic:
    """Each response of a pair with a copy of the prompt, padded; the whole float32 log-softmax; the
    reference is run in every step."""

    def __init__(self, job: dict):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = Path(job["folder"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.kl, self.bf16 = "token_kl" in reads(job["loss"]), job["bf16"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        self.pairs = read_pairs(folder)
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(folder / name).to(self.device).eval()
            for name in ("model", "reference")
        )
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-12)

    def gradients(self) -> dict:
        return {name: p.grad.clone() for name, p in self.policy.named_parameters()}

    def _rows(self, pairs: list[dict]):
        """ids, mask and labels, (2 pairs, tokens): first the chosen responses, then the rejected
        ones."""
        import torch

        eos = self.tokenizer.eos_token_id
        sequences = []
        for side in ("chosen", "rejected"):
            for pair in pairs:
                prompt = self.tokenizer(pair["prompt"])["input_ids"]
                sequences.append((prompt, [*self.tokenizer(pair[side])["input_ids"], eos]))
        width = max(len(p) + len(r) for p, r in sequences)
        ids = torch.full((len(sequences), width), eos)
        labels = torch.full((len(sequences), width), -100)
        mask = torch.zeros_like(ids)
        for i, (p, r) in enumerate(sequences):
            ids[i, : len(p) + len(r)], mask[i, : len(p) + len(r)] = torch.tensor(p + r), 1
            labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        return ids.to(self.device), mask.to(self.device), labels.to(self.device)

    def _log_softmax(self, model, ids, mask):
        import torch

        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits.float()[:, :-1].log_softmax(-1)

    def step(self, n: int) -> float:
        import torch
        from torch.nn.functional import logsigmoid

        ids, mask, labels = self._rows(self.pairs[:n])
        targets, scored = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        policy = self._log_softmax(self.policy, ids, mask)
        with torch.no_grad():
            reference = self._log_softmax(self.reference, ids, mask)
        ours, theirs = (
            (logps.gather(2, targets[..., None])[..., 0] * scored).sum(1)
            for logps in (policy, reference)
        )
        chosen, rejected = (ours - theirs).split(n)
        margin = chosen - rejected
        if self.kl:
            kl_chosen, kl_rejected = (
                ((reference.exp() * (reference - policy)).sum(2) * scored).sum(1).split(n)
            )
            margin = margin - 0.5 * (kl_rejected - kl_chosen.detach())
        loss = -logsigmoid(BETA * margin).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Trl:
    """TRL's DPOTrainer, one step at a time, with the calls of its train()."""

    def __init__(self, job: dict):
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        folder = Path(job["folder"])
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        best = job["variant"] == "TRL, best"
        more = {}
        if best:
            more = {
                "precompute_ref_log_probs": True,
                "precompute_ref_batch_size": 8,
                "gradient_checkpointing": False,
                "optim": "adamw_torch_fused",
            }
        config = DPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=job.get("microbatch") or job["n_pairs"],
            max_length=1024,
            learning_rate=1e-12,
            beta=BETA,
            bf16=job["bf16"],
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            max_grad_norm=1e9,
            **more,
        )
        weights = ("model", "reference" if job.get("reference", True) else "model")
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(folder / name) for name in weights
        )
        self.trainer = DPOTrainer(
            policy,
            reference,
            args=config,
            train_dataset=Dataset.from_list(read_pairs(folder)),
            processing_class=tokenizer,
        )
        self.model = self.trainer.model
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        if best:
            self.trainer.get_train_dataloader()  # computes the reference's log-probs
            self.trainer.ref_model = None
        del reference
        self._prepare(job)

    def _prepare(self, job: dict) -> None:
        """As train() does before its first step. Accelerate puts autocast around the forward pass,
        without which a step would be in float32."""
        self.trainer.accelerator.prepare_model(self.model)
        self.model.train()
        self.trainer.create_optimizer()
        self.optimizer = self.trainer.optimizer
        self.rows = list(self.trainer.train_dataset)
        self.microbatch = job.get("microbatch") or job["n_pairs"]

    def gradients(self) -> dict:
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def step(self, n: int) -> float:
        import torch

        begins = range(0, n, self.microbatch)
        # training_step divides the loss by it: the losses add up to the mean over the microbatches
        self.trainer.current_gradient_accumulation_steps = len(begins)
        losses = [
            self.trainer.training_step(
                self.model, self.trainer.data_collator(self.rows[begin : begin + self.microbatch])
            )
            for begin in begins
        ]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
        self.optimizer.step()
        self.model.zero_grad()
        return torch.stack(losses).sum().item()


class TrlSft(Trl):
    """TRL's SFTTrainer on prompts and completions, one step at a time; the loss is the mean over
    the tokens of the completions."""

    def __init__(self, job: dict):
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        folder = Path(job["folder"])
        more = {}
        if job["variant"] == "TRL SFT, best":
            # padded: one row of all tokens without padding takes more than 19 GiB
            more = {"gradient_checkpointing": False, "optim": "adamw_torch_fused"}
        config = SFTConfig(
            output_dir=str(folder / "trl-sft"),
            per_device_train_batch_size=job["n_pairs"],
            max_length=1024,
            learning_rate=1e-12,
            bf16=job["bf16"],
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            max_grad_norm=1e9,
            **more,
        )
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen"]}
            for row in read_pairs(folder, "targets")
        ]
        self.trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(folder / "model"),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        )
        self.model = self.trainer.model
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        self._prepare(job)


def read_pairs(folder: Path, name: str = "pairs") -> list[dict]:
    lines = (folder / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
