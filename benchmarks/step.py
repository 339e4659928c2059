"""Time, memory and agreement of one training step: PrefLab in every layout, the classic step, and
TRL, interleaved.

    pip install -r benchmarks/requirements.txt     # TRL; leave out to do without it python
    benchmarks/step.py --output benchmarks/results [--rounds 3] [--cases tldr-30M-dpo,...]
    [--no-curves]

A case is a model, a loss, and lengths like those of a data set. Every round runs each variant of a
case once, in a fresh process and in an order that rotates, on the same pairs, from the same weights
of policy and reference. A process takes a small step and a full one to warm up, then the timed one.
Compared are medians over rounds of the ratio to the classic step of the same round; memory is the
peak of a process above what it held when everything was imported, `extra` what is left of that
without weights, gradients and the optimizer's state (and the reference's weights, where it is
kept). On a small batch of two pairs, all losses and all gradients are compared with those of the
classic step.

The classic step is what the first DPO code did, written out in `Classic`: chosen and rejected as
two padded copies of the prompt, the whole float32 log-softmax of both models, the reference run in
every step. TRL runs at its defaults (in fp32) and at its best settings known to us (reference
precomputed, no recomputation of activations, fused optimizer). All take AdamW. Writes
step-DEVICE.json, step-DEVICE.md (the table of the README) and step-DEVICE.png.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 50257
MODELS = {  # GPT-2 of two sizes with the same vocabulary
    "30M": {"n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 1024},
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
}
# (median, spread of the logarithm, least, most) of the tokens of prompts and of responses
LENGTHS = {
    "tldr": ((300, 0.38, 60, 512), (33, 0.32, 8, 80)),  # a post and its summary
    "hh": ((110, 0.8, 10, 400), (60, 0.8, 4, 256)),  # a dialogue and its last turn
    "imdb": ((5, 0.2, 3, 8), (78, 0.16, 20, 110)),  # the begin of a review and the rest
}
CASES = {  # model, lengths, loss, pairs, how many prompts they have, whether TRL has this loss
    "tldr-124M-dpo": ("124M", "tldr", "dpo", 8, 8, True),
    "tldr-30M-dpo": ("30M", "tldr", "dpo", 8, 8, True),
    "hh-30M-dpo": ("30M", "hh", "dpo", 8, 8, True),
    "imdb-30M-dpo": ("30M", "imdb", "dpo", 8, 8, True),
    "tldr-30M-tdpo": ("30M", "tldr", "tdpo2", 8, 8, False),
    "hh-30M-tdpo": ("30M", "hh", "tdpo2", 8, 8, False),
    "hh-124M-dpo": ("124M", "hh", "dpo", 8, 8, True),
    "tldr-124M-tdpo": ("124M", "tldr", "tdpo2", 8, 8, False),
    "hh-124M-tdpo": ("124M", "hh", "tdpo2", 8, 8, False),
    "tldr-30M-rated": (
        "30M",
        "tldr",
        "dpo",
        16,
        1,
        False,
    ),  # 16 of the pairs of seven rated responses to one prompt
}
OURS = {  # layout and reference cache
    "prefix_shared": ("prefix_shared", "auto"),
    "prefix_shared, reference run": ("prefix_shared", "false"),
    "packed": ("packed", "auto"),
    "padded": ("padded", "auto"),
}
BETA = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="forward and backward pass in bfloat16, for hardware that has it",
    )
    parser.add_argument("--no-curves", action="store_true", help="leave out how the cost grows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(json.loads(arguments.worker))
    if arguments.output is None:
        parser.error("--output is required")
    from benchmarks.placement import machine

    arguments.output.mkdir(parents=True, exist_ok=True)
    here = machine()
    path = arguments.output / (
        "step-"
        + ("cuda" if here["gpus"] else "cpu")
        + ("-bf16" if arguments.bf16 else "")
        + ".json"
    )
    results = {"machine": here, "cases": {}}
    if (
        path.is_file()
        and (before := json.loads(path.read_text(encoding="utf-8")))["machine"] == here
    ):
        results = before

    def keep(part: str, name: str, value) -> None:
        results.setdefault(part, {})[name] = value
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        draw(results, path.with_suffix(".png"))

    with tempfile.TemporaryDirectory() as folder:
        for case in filter(None, arguments.cases.split(",")):
            keep("cases", case, measure_case(Path(folder), case, arguments.rounds, arguments.bf16))
        measured = {}
        for what in () if arguments.no_curves else GROWTH:
            keep("curves", what, measure_curve(Path(folder), what, arguments.bf16, measured))
    for case, result in results["cases"].items():
        print(table(case, result))
    draw(results, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


# ------------------------------------------------------------------------------------------- a case


def measure_case(folder: Path, case: str, rounds: int, bf16: bool) -> dict:
    rate = matmul_rate(bf16)
    model, lengths, loss, n_pairs, n_prompts, in_trl = CASES[case]
    job = make_job(
        folder / case,
        MODELS[model],
        VOCABULARY,
        loss,
        make_pairs(*LENGTHS[lengths], n_pairs, n_prompts),
        bf16,
    )
    variants = ["classic", *OURS]
    if "token_kl" in reads(loss):  # the reference always runs
        variants = ["classic", "prefix_shared", "packed", "padded"]
    if in_trl and has_trl():
        variants += ["TRL, defaults", "TRL, best"]
    measured = {variant: [] for variant in variants}
    for number in range(rounds):
        shift = number % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            measured[variant].append(
                run(
                    job
                    | {
                        "variant": variant,
                        "gradients": str(folder / "gradients") if number == 0 else None,
                    }
                )
            )
            print(
                f"{case}, round {number + 1}, {variant}: {measured[variant][-1]['seconds']:.2f} s",
                file=sys.stderr,
            )
            if number == 0:
                measured[variant][0] |= compare_gradients(folder / "gradients", variant)
    tokens = {key: job["tokens"][key] for key in ("padded", "distinct", "scored")}
    known = {
        "rounds": rounds,
        "pairs": n_pairs,
        "prompts": n_prompts,
        "tokens": tokens,
        "matmul_gflops": round(rate / 1e9, 1),
        "floor_seconds": floor(job) / rate,
    }
    return known | {"variants": summarise(measured, 0.02 if bf16 else 1e-4)}


def make_pairs(
    prompt, response, n_pairs: int, n_prompts: int, seed: int = 0, vocabulary: int = VOCABULARY
) -> list[dict]:
    """Random words of the given lengths; with one prompt, the pairs are of seven responses to
    it."""
    import numpy as np

    rng = np.random.default_rng(seed)

    def words(middle, spread, low, high):
        n = int(np.clip(round(middle * np.exp(spread * rng.standard_normal())), low, high))
        return " ".join(f"w{i}" for i in rng.integers(0, vocabulary - 1, n))

    if n_prompts == 1:
        text, answers = words(*prompt), [" " + words(*response) for _ in range(7)]
        both = [(i, j) for i in range(7) for j in range(i)][:n_pairs]
        return [{"prompt": text, "chosen": answers[i], "rejected": answers[j]} for i, j in both]
    return [
        {
            "prompt": words(*prompt),
            "chosen": " " + words(*response),
            "rejected": " " + words(*response),
        }
        for _ in range(n_pairs)
    ]


def make_job(
    folder: Path, model: dict, vocabulary: int, loss: str, pairs: list[dict], bf16: bool
) -> dict:
    """Writes the model, the weights of policy and reference, the tokenizer (a word is a token) and
    the pairs."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    body = Tokenizer(
        models.WordLevel(
            {f"w{i}": i for i in range(vocabulary - 1)} | {"<eos>": vocabulary - 1}, unk_token="w0"
        )
    )
    body.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=body, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, eos_token_id=vocabulary - 1, bos_token_id=None, **model
    )
    policy = AutoModelForCausalLM.from_config(config)
    policy.save_pretrained(folder / "model")
    with torch.no_grad():
        for p in policy.parameters():  # a reference that differs, or every loss would be log 2
            p.add_(0.02 * p.std() * torch.randn_like(p) if p.ndim > 1 else 0)
    policy.save_pretrained(folder / "reference")
    (folder / "pairs").mkdir()
    for split, rows in (("train", pairs), ("test", pairs[:1])):
        (folder / "pairs" / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    prompts = {pair["prompt"] for pair in pairs}
    answers = {(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")}
    count = lambda text: len(text.split())  # noqa: E731
    tokens = {
        "padded": 2 * len(pairs) * max(count(p) + count(a) + 1 for p, a in answers),
        "distinct": sum(map(count, prompts)) + sum(count(a) for _, a in answers),
        "scored": sum(count(a) + 1 for _, a in answers),
        "attended": [(count(p), [count(a) for q, a in answers if q == p]) for p in sorted(prompts)],
    }
    linear = sum(p.numel() for name, p in policy.transformer.h.named_parameters() if p.ndim == 2)
    size = {
        "linear": linear,
        "head": vocabulary * model["n_embd"],
        "width": model["n_embd"],
        "layers": model["n_layer"],
    }
    return {
        "folder": str(folder),
        "loss": loss,
        "n_pairs": len(pairs),
        "bf16": bf16,
        "tokens": tokens,
        "size": size,
    }


def floor(job: dict) -> float:
    """Floating point operations that a step cannot do without: forward and backward pass of each
    distinct token through the body, of scored tokens through the head, attention of what is seen.
    tdpo also runs the reference forward.
    """
    tokens, size = job["tokens"], job["size"]
    seen = sum(
        p * p / 2 + sum(r * p + r * r / 2 for r in responses) for p, responses in tokens["attended"]
    )
    forward = (
        2 * size["linear"] * tokens["distinct"]
        + 2 * size["head"] * tokens["scored"]
        + 4 * seen * size["width"] * size["layers"]
    )
    return forward * (4 if "token_kl" in reads(job["loss"]) else 3)


def reads(loss: str) -> set:
    from preflab.objective.registry import LOSSES

    return set(LOSSES[loss].reads({}))


def matmul_rate(bf16: bool) -> float:
    """Multiply-adds count two: the best of several products of the shapes of an MLP, in the dtype
    of the steps."""
    import torch

    device, dtype = (
        "cuda" if torch.cuda.is_available() else "cpu",
        torch.bfloat16 if bf16 else torch.float32,
    )
    a, b = (
        torch.randn(2048, 768, device=device, dtype=dtype),
        torch.randn(768, 3072, device=device, dtype=dtype),
    )
    times = []
    for _ in range(15):
        begun = time.perf_counter()
        for _ in range(10):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 10 * 2 * 2048 * 768 * 3072 / min(times)


def run(job: dict) -> dict:
    """One variant in a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{job['variant']} failed\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_gradients(path: Path, variant: str) -> dict:
    """Largest difference of any gradient from the classic step's, relative to the largest gradient
    of that parameter."""
    import torch

    if not path.exists():
        return {}
    ours = torch.load(path, weights_only=True)
    base = path.with_name("classic-gradients")
    if variant == "classic":
        path.rename(base)
        return {"gradient_error": 0.0}
    theirs = torch.load(base, weights_only=True)
    assert ours.keys() == theirs.keys(), (variant, ours.keys() ^ theirs.keys())
    return {
        "gradient_error": max(
            ((ours[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in theirs
        )
    }


def summarise(measured: dict[str, list[dict]], tolerance: float) -> dict[str, dict]:
    summary = {}
    for variant, rounds in measured.items():
        middle = {
            key: statistics.median(r[key] for r in rounds)
            for key in ("seconds", "peak_memory", "loss")
        }
        pairs = list(zip(rounds, measured["classic"]))
        middle["times_as_fast"] = statistics.median(c["seconds"] / r["seconds"] for r, c in pairs)
        middle["memory_ratio"] = statistics.median(
            r["peak_memory"] / c["peak_memory"] for r, c in pairs
        )
        middle["gradient_error"] = rounds[0].get("gradient_error")
        summary[variant] = middle
    losses = [values["loss"] for values in summary.values()]
    if max(losses) - min(losses) > tolerance * max(1.0, max(losses)):
        raise SystemExit(f"the losses disagree: { {v: s['loss'] for v, s in summary.items()} }")
    return summary


# ------------------------------------------------------------------------------------------ workers


def work(job: dict) -> None:
    """Build a variant, warm up, take the timed step; prints its time, peak memory and loss as
    JSON."""
    import torch

    for name in (
        "trainers",
        "transformers",
        "tokenizers",
        "hydra",
        "train",
        "torch._dynamo",
        "datasets",
    ):
        __import__(name)
    if job["variant"].startswith("TRL"):
        __import__("trl.trainer.dpo_trainer")
    torch.manual_seed(0)
    kind = (
        Classic
        if job["variant"] == "classic"
        else Trl
        if job["variant"].startswith("TRL")
        else Ours
    )
    before = memory_now()
    variant = kind(job)
    gradients = {}
    if job["gradients"]:
        keep = lambda *_: gradients.update(variant.gradients())  # noqa: E731
        handle = variant.optimizer.register_step_pre_hook(keep)
    variant.step(2)
    if job["gradients"]:
        handle.remove()
        torch.save(gradients, job["gradients"])
        gradients.clear()
    variant.step(
        job["n_pairs"]
    )  # at its full size once, so that what the allocator will reuse is there
    reset_peak()
    begun = time.perf_counter()
    loss = variant.step(job["n_pairs"])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "peak_memory": peak_memory() - before, "loss": loss}))


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
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


class Ours:
    """The project's own trainer, as `python train.py` builds it."""

    def __init__(self, job: dict):
        import hydra
        from tqdm import tqdm

        from preflab.checks import check_config
        from preflab.execution import load_inputs, register_built_in
        from preflab.settings.keys import CONFIG_DIR
        from preflab.settings.run_folder import register_resolvers
        from trainers import BasicTrainer

        layout, cache = OURS.get(job["variant"]) or (job["variant"].split(",")[0], "auto")
        folder = Path(job["folder"])
        overrides = [
            "model=blank_model",
            f"model.name_or_path={folder / 'model'}",
            f"model.reference_archive={folder / 'reference'}",
            f"model.fsdp_policy_mp={'bfloat16' if job['bf16'] else 'null'}",
            f"datasets=[{folder / 'pairs'}]",
            f"loss={job['loss']}",
            f"loss.beta={BETA}",
            f"layout={layout}",
            f"reference.cache={cache}",
            f"cache_dir={folder / 'cache'}",
            "optimizer=AdamW",
            "sample_during_eval=false",
            "max_grad_norm=1e9",
            "max_length=1024",
            "max_prompt_length=800",
            "order=prompts",
            "lr=1e-12",
            "debug=true",
            "n_eval_examples=1",
        ]
        register_built_in()
        register_resolvers()
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = hydra.compose("config", overrides=overrides)
        config.local_run_dir = str(folder / "run")
        (folder / "run").mkdir(exist_ok=True)
        loss, sources = check_config(config)
        tokenizer, _, data = load_inputs(config, sources, loss)
        self.run_dir = folder / "run"
        self.trainer = BasicTrainer(config, self.run_dir, loss, tokenizer, data)
        self.learner = self.trainer.learner
        self.learner.prepare()
        self.optimizer, self.bar = self.learner.optimizer, tqdm(disable=True)

    def gradients(self) -> dict:
        return {name: p.grad.clone() for name, p in self.learner.policy.model.named_parameters()}

    def step(self, n: int) -> float:
        import numpy as np

        examples = np.arange(n)
        rows = self.run_dir / "metrics.jsonl"
        rows.unlink(missing_ok=True)
        self.trainer.train_step(examples, self.trainer._collate(examples), self.bar)
        return json.loads(rows.read_text(encoding="utf-8").splitlines()[-1])["loss/train"]


class Classic:
    """Both responses of each pair with a copy of the prompt, padded; whole float32 log-softmax;
    reference in every step."""

    def __init__(self, job: dict):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = Path(job["folder"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer, self.kl, self.bf16 = (
            AutoTokenizer.from_pretrained(folder / "model"),
            "token_kl" in reads(job["loss"]),
            job["bf16"],
        )
        self.pairs = [
            json.loads(line)
            for line in (folder / "pairs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(folder / name).to(self.device).eval()
            for name in ("model", "reference")
        )
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-12)

    def gradients(self) -> dict:
        return {name: p.grad.clone() for name, p in self.policy.named_parameters()}

    def _rows(self, pairs: list[dict]):
        import torch

        sequences = []
        for side in ("chosen", "rejected"):
            for pair in pairs:
                prompt, response = (
                    self.tokenizer(pair["prompt"])["input_ids"],
                    self.tokenizer(pair[side])["input_ids"],
                )
                sequences.append((prompt, [*response, self.tokenizer.eos_token_id]))
        width = max(len(p) + len(r) for p, r in sequences)
        ids, labels = (
            torch.full((len(sequences), width), self.tokenizer.eos_token_id),
            torch.full((len(sequences), width), -100),
        )
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
        import torch.nn.functional as F

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
        loss = -F.logsigmoid(BETA * margin).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Trl:
    """TRL's DPOTrainer, a step at a time, as its train() takes it."""

    def __init__(self, job: dict):
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        folder = Path(job["folder"])
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        rows = [
            json.loads(line)
            for line in (folder / "pairs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        best = job["variant"] == "TRL, best"
        more = (
            {
                "precompute_ref_log_probs": True,
                "precompute_ref_batch_size": 8,
                "gradient_checkpointing": False,
                "optim": "adamw_torch_fused",
            }
            if best
            else {}
        )
        config = DPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=job["n_pairs"],
            max_length=1024,
            learning_rate=1e-12,
            beta=BETA,
            bf16=job["bf16"],
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            max_grad_norm=1e9,
            **more,
        )
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(folder / name) for name in ("model", "reference")
        )
        self.trainer = DPOTrainer(
            policy,
            reference,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        self.model = self.trainer.model
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        if best:
            self.trainer.get_train_dataloader()  # computes the reference's log-probs
            self.trainer.ref_model = None
        del reference
        self.model.train()
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.optimizer = self.trainer.optimizer
        self.rows = list(self.trainer.train_dataset)

    def gradients(self) -> dict:
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def step(self, n: int) -> float:
        import torch

        batch = self.trainer.data_collator(self.rows[:n])
        loss = self.trainer.training_step(self.model, batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
        self.optimizer.step()
        self.model.zero_grad()
        return loss.item()


def has_trl() -> bool:
    import importlib.util

    return importlib.util.find_spec("trl") is not None


# ------------------------------------------------------------------------------------------- curves

GROWTH = {  # what grows: its values; the others stay as in `STANDARD`
    "response length": [16, 64, 192],
    "prompt length": [32, 128, 384],
    "vocabulary": [8192, 32768, 98304],
    "pairs": [2, 8, 24],
}
STANDARD = {"response length": 64, "prompt length": 128, "vocabulary": 32768, "pairs": 8}


def measure_curve(folder: Path, what: str, bf16: bool, measured: dict) -> list[dict]:
    """Pairs a second of our step and of the classic one where one thing grows. measured: by
    setting, for curves that cross."""
    points = []
    for value in GROWTH[what]:
        at = STANDARD | {what: value}
        if (setting := tuple(at.values())) in measured:
            points.append({"value": value, **measured[setting]})
            continue
        exactly = [(at[f"{side} length"], 0.0, 1, 10**6) for side in ("prompt", "response")]
        pairs = make_pairs(*exactly, at["pairs"], at["pairs"], vocabulary=at["vocabulary"])
        job = make_job(
            folder / f"{what}-{value}".replace(" ", "-"),
            MODELS["30M"],
            at["vocabulary"],
            "dpo",
            pairs,
            bf16,
        )
        point = {
            name: at["pairs"] / run(job | {"variant": name, "gradients": None})["seconds"]
            for name in ("prefix_shared", "classic")
        }
        measured[setting] = point
        points.append({"value": value, **point})
        print(
            f"{what} {value}: {point['prefix_shared']:.2f} pairs/s, classic {point['classic']:.2f}",
            file=sys.stderr,
        )
    return points


# ------------------------------------------------------------------------------ tables and pictures


def table(case: str, result: dict) -> str:
    lines = [
        f"{case} ({result['pairs']} pairs)".ljust(44)
        + f"{'seconds':>9}{'times':>8}{'memory':>8}{'extra':>8}{'floors':>8}{'gradient':>10}"
    ]
    extra = {
        variant: values["peak_memory"] - held(case, variant)
        for variant, values in result["variants"].items()
    }
    for variant, values in result["variants"].items():
        error = values["gradient_error"]
        lines.append(
            f"  {variant:<42}{values['seconds']:>9.2f}{values['times_as_fast']:>8.2f}{values['memory_ratio']:>8.3f}{extra[variant] / extra['classic']:>8.3f}"
            f"{values['seconds'] / result['floor_seconds']:>8.2f}{'' if error is None else f'{error:.1e}':>10}"
        )
    return "\n".join(lines)


def markdown(results: dict) -> str:
    """Our default step in every case: seconds, how many times as fast as the others, peak memory
    and share of the floor."""
    lines = [
        (
            "| one step | seconds | times as fast as the classic step | the same, reference run in"
            " the step | as TRL at its best | as TRL's defaults | memory against classic | times"
            " the FLOP floor |"
        ),
        "|" + " --- |" * 8,
    ]
    for case, result in results["cases"].items():
        model, lengths, loss, pairs, prompts, _ = CASES[case]
        variants, ours = result["variants"], result["variants"]["prefix_shared"]
        against = lambda name: (
            f"{ours['times_as_fast'] / variants[name]['times_as_fast']:.1f}"
            if name in variants
            else ""
        )  # noqa: E731
        run = variants.get("prefix_shared, reference run")
        name = f"{loss}, {model}, {lengths} lengths, {pairs} pairs" + (
            " of one prompt" if prompts == 1 else ""
        )
        cells = [
            f"{ours['seconds']:.2f}",
            f"{ours['times_as_fast']:.1f}",
            f"{run['times_as_fast']:.1f}" if run else "",
            against("TRL, best"),
            against("TRL, defaults"),
        ]
        lines.append(
            "| "
            + " | ".join(
                [
                    name,
                    *cells,
                    f"{ours['memory_ratio']:.2f}",
                    f"{ours['seconds'] / result['floor_seconds']:.2f}",
                ]
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def held(case: str, variant: str) -> int:
    """Bytes in float32 of weights, gradients, AdamW's state, and of the reference's weights where
    the variant keeps them."""
    model, _, loss, *_ = CASES[case]
    width, layers, positions = (MODELS[model][key] for key in ("n_embd", "n_layer", "n_positions"))
    parameters = (VOCABULARY + positions + 2) * width + layers * (
        12 * width * width + 13 * width
    )  # of a GPT-2 with a tied head
    without_reference = variant == "TRL, best" or (
        OURS.get(variant, ("", "false"))[1] == "auto" and "token_kl" not in reads(loss)
    )
    return 4 * parameters * (4 if without_reference else 5)


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    cases, curves = results["cases"], results.get("curves", {})
    figure = plt.figure(figsize=(12, 3.8 + (3.2 if curves else 0)), layout="constrained")
    top, *rest = figure.subfigures(
        2 if curves else 1, 1, height_ratios=[3.8, 3.2] if curves else None, squeeze=False
    )[:, 0]
    axes = top.subplots()
    names = list(dict.fromkeys(variant for case in cases.values() for variant in case["variants"]))
    colours = dict(zip(names, plt.get_cmap("tab10").colors))
    place = 0.0
    for case in cases.values():
        case["at"] = place + (len(case["variants"]) - 1) / 2
        for variant, values in case["variants"].items():
            bar = axes.bar(
                place, values["times_as_fast"], 0.9, color=colours[variant], label=variant
            )
            axes.bar_label(bar, fmt="%.1f", fontsize=7)
            place += 1
        place += 1
    axes.set_xticks([case.pop("at") for case in cases.values()], list(cases), fontsize=8)
    axes.set(ylabel="times as fast as the classic step", yscale="log")
    axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"], minor=False)
    axes.yaxis.set_minor_locator(NullLocator())
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    axes.legend(unique.values(), unique, fontsize=7, frameon=False, ncols=2)
    machine = results["machine"]
    axes.set_title(
        "One training step on"
        f" {', '.join(machine['gpus']) or str(machine['cores']) + ' cores of ' + machine['processor']}",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        for axes, (what, points) in zip(
            rest[0].subplots(1, len(curves), squeeze=False)[0], curves.items()
        ):
            for name in ("prefix_shared", "classic"):
                axes.plot([p["value"] for p in points], [p[name] for p in points], "o-", label=name)
            axes.set(xscale="log", yscale="log", xlabel=what, ylabel="pairs a second")
            axes.set_xticks([p["value"] for p in points], [f"{p['value']:,}" for p in points])
            axes.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
