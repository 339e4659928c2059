"""The parts of benchmarks/gpu.py. Each runs in its own process:

    python benchmarks/gpu_parts.py PART

PART is a JSON file: `do`, a name of PARTS; `outcome`, the file that gets {"result": ...} or
{"error": ...}; `limit`, the seconds that the process has; and what the part reads.
"""

import contextlib
import dataclasses
import faulthandler
import importlib.metadata
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import Tokens, make_job, make_pairs
from benchmarks.placement import machine
from benchmarks.step import largest_difference, matmul_rate
from benchmarks.step_variants import (
    Ours,
    compiled_graphs,
    gradients_of,
    measure,
    open_run,
    synchronize,
)
from utils import atomic_write, first_line

PACKAGES = ("torch", "triton", "transformers", "peft", "trl")

# Free memory that the plan of a step leaves for the libraries and for fragments.
SPARE = 2 * 2**30


def main() -> None:
    part = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # Where it hangs is in the log when the process is ended.
    faulthandler.dump_traceback_later(max(1, part["limit"] - 5))
    try:
        outcome = {"result": PARTS[part["do"]](part)}
    except (Exception, SystemExit) as error:
        import traceback

        outcome = {"error": first_line(error), "log": traceback.format_exc()[-3000:]}
    faulthandler.cancel_dump_traceback_later()
    with atomic_write(part["outcome"]) as f:
        json.dump(outcome, f)


def read_job(part: dict) -> dict:
    """The job of the models of a part, with the part's own entries."""
    job = json.loads(Path(part["job"]).read_text(encoding="utf-8"))
    return job | {"gradients": None, "variant": "prefix_shared"} | part.get("more", {})


# ---------------------------------------------------------------------------------- machine, models


def card(part: dict) -> dict:
    """The machine, its GPU, the versions of the packages, and the measured rate of matrix
    products."""
    import torch

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    result = {"machine": machine(), "packages": versions, "free_bytes": None}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        result |= {"free_bytes": free, "total_bytes": total, "cuda": torch.version.cuda}
        result["matmul_tflops"] = round(matmul_rate(bf16=True) / 1e12, 1)
    return result


def models(part: dict) -> dict:
    """Write the models and the data of a size, and plan the memory of its steps. Returns the file
    of the job, and the planned bytes of each step by name."""
    folder = Path(part["folder"])
    needed = part["bytes"] * (2 if part["reference"] else 1)
    if (free := shutil.disk_usage(folder.parent).free) < 1.2 * needed:
        raise OSError(
            f"{folder.parent} has {free / 2**30:.0f} GiB free, and the models take"
            f" {needed / 2**30:.0f}; set TMPDIR to a folder on another disk"
        )
    lengths = [Tokens(*values) for values in part["lengths"]]
    pairs = make_pairs(*lengths, part["pairs"], part["pairs"], vocabulary=part["vocabulary"])
    options = {"dtype": part["dtype"], "reference": part["reference"]}
    job = make_job(folder, part["model"], part["vocabulary"], "dpo", pairs, True, **options)
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    plans = {name: _planned(job | more) for name, more in part["steps"].items()}
    return {"job": str(path), "planned": plans, "tokens": job["tokens"]["distinct"]}


def _planned(job: dict) -> int | str:
    """The bytes of the project's own plan of a step on a GPU, or why there is none."""
    from preflab.training.memory_plan import make_plan

    more = [*job.get("overrides", []), "plan.gpu_gib=80"]
    try:
        settings, loss, inputs = open_run({"variant": "prefix_shared"} | job | {"overrides": more})
        return make_plan(settings, loss, inputs.data["train"]).total
    except Exception as error:  # the step is tried without a plan
        return first_line(error)


# -------------------------------------------------------------------------------------- correctness


def flex(part: dict) -> dict:
    """FlexAttention against attention by segments: alone, and in the gradients of a whole model;
    and what is compiled while lengths change."""
    from preflab.modeling.layout_choice import choose_layout

    attention = {name: _flex_alone(*shape) for name, shape in part["shapes"].items()}
    job = read_job(part) | {"bf16": False}
    ours = Ours(job)
    layout = ours.learner.layout
    _, reason = choose_layout(ours.learner.settings, ours.learner.policy)
    begun = compiled_graphs()
    with_flex = gradients_of(ours, 2)
    ours.learner.layout = dataclasses.replace(layout, flex=False)
    difference = largest_difference(with_flex, gradients_of(ours, 2))
    ours.learner.layout = layout
    return {
        "attention": attention,
        "layout": layout.name,
        "uses_flex": layout.flex,
        "reason": reason,
        "gradient_difference": difference,
        "ok": layout.flex and difference < 1e-3 and all(r["ok"] for r in attention.values()),
        "lengths": [_step_of(ours, n, begun) for n in _changing(job["n_pairs"])],
    }


def _flex_alone(heads: int, kv_heads: int, head_size: int, dtype: str) -> dict:
    import torch

    from preflab.batching.packed_attention import check_flex, flex_errors

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = (heads, kv_heads, head_size, getattr(torch, dtype), device)
    start = time.perf_counter()
    support = check_flex(*inputs)
    result = {"ok": support.ok, "seconds": time.perf_counter() - start}
    if not support.ok:
        return result | {"reason": support.reason}
    return result | {"largest_difference": max(flex_errors(*inputs))}


def _changing(n: int) -> list[int]:
    """Numbers of pairs of steps that have rows of different lengths."""
    return [n, *range(n // 2, n, max(1, n // 10))]


def _step_of(ours: Ours, n: int, begun: int) -> dict:
    """A step on n pairs: the tokens of its rows, and how many graphs have been compiled by then."""
    start = time.perf_counter()
    widths = [batch.input_ids.shape[1] for batch, _ in ours.microbatches(n)]
    ours.step(n)
    synchronize()
    seconds = time.perf_counter() - start
    return {"tokens": widths, "graphs": compiled_graphs() - begun, "seconds": seconds}


def log_ratios(part: dict) -> dict:
    """Log-ratios of a policy that equals its reference, in bfloat16 and before the first step: the
    largest of a token and of a response, in nats. The reference runs in the step, where both see
    the same rows, or its log-probs come from the cache, for which they were in other rows."""
    job = read_job(part) | {"reference": False}
    variants = ("prefix_shared, reference run", "prefix_shared", "packed", "padded")
    return {
        variant: _log_ratios_of(job | {"variant": variant, "cache": f"cache-{i}"})
        for i, variant in enumerate(variants)
    }


def _log_ratios_of(job: dict) -> dict:
    from preflab.modeling.logprobs import score_responses

    ours = Ours(job)
    learner = ours.learner
    of_token, of_response = [], []
    for batch, _ in ours.microbatches(job["n_pairs"]):
        batch = batch.to(learner.policy.device)
        scores = score_responses(learner.policy, batch, reference=learner.reference)
        of_token.append((scores.token_logps - scores.reference_token_logps).abs().max().item())
        of_response.append((scores.logps - scores.reference_logps).abs().max().item())
        del scores
    return {"token": max(of_token), "response": max(of_response)}


# -------------------------------------------------------------------------------------------- speed


def step(part: dict) -> dict:
    """Time and memory of a step."""
    import torch

    result = measure(read_job(part))
    if torch.cuda.is_available():
        result["peak_reserved"] = torch.cuda.max_memory_reserved()
    return result


def sampling(part: dict) -> dict:
    """Tokens a second, by `sample` and by transformers' `generate`, in bfloat16."""
    import torch

    from benchmarks.sampling import measure as measure_sampling

    return measure_sampling(
        part["model"], "64 tokens", part["rounds"], torch.bfloat16, vocabulary=part["vocabulary"]
    )


PARTS = {
    "card": card,
    "models": models,
    "flex": flex,
    "log-ratios": log_ratios,
    "step": step,
    "sampling": sampling,
}

if __name__ == "__main__":
    main()
