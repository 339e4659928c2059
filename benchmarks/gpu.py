"""All that a GPU can show, on one GPU in at most nine minutes: tests, FlexAttention, bfloat16, and
time and memory of a step with models of three sizes, beside TRL's where TRL is installed.

    bash benchmarks/gpu.sh [--output FOLDER] [--parts flex,tests,...] [--minutes 9]
    bash benchmarks/gpu.sh --dry-run          # tiny models on the CPU: does every part run?

Every part runs in its own process with its own time limit, in the order of PARTS, and its result is
written when it ends. A part that fails, hangs or does not fit is a row with its reason. Nothing is
downloaded: weights and texts are random, with the shapes of GPT-2 124M and of Llamas of 1B and 8B,
and with the lengths of TL;DR.

* flex: FlexAttention against attention by segments, values and gradients; the number of compiled
  graphs while the lengths of rows change.
* log-ratios: in bfloat16, of a policy that equals its reference. They must be 0 where the reference
  runs in the step.
* 124M, 1B, 8B: seconds, peak memory and MFU of a step. A step whose planned memory (function=plan)
  is more than the GPU has is left out. MFU counts the operations of each distinct token once,
  against the peak of the card in its data sheet. TRL steps on the same pairs, with the largest of
  several numbers of pairs in a forward pass that fits.
* tests: tests/test_gpu.py, on several processes where pytest-xdist is installed.
* sampling: ours and transformers' `generate`.

The command writes gpu-CARD.json and gpu-CARD.md, by default into benchmarks/results; a second
command on the same machine adds its parts. A dry run writes to the folder of --output, or nowhere.
The exit code is 1 if any part has an error.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import LENGTHS, MODELS, VOCABULARY, Tokens, flop_floor
from benchmarks.gpu_parts import SPARE
from benchmarks.gpu_report import markdown
from utils import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}
SIZES = {  # models, and the pairs of a step
    "124M": {"model": MODELS["124M"], "vocabulary": VOCABULARY, "pairs": 64},
    "1B": {
        "model": LLAMA
        | {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192}
        | {"max_position_embeddings": 8192, "tie_word_embeddings": True},
        "vocabulary": 128256,
        "pairs": 64,
    },
    "8B": {
        "model": LLAMA
        | {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336}
        | {"max_position_embeddings": 8192, "tie_word_embeddings": False},
        "vocabulary": 128256,
        "pairs": 32,
        "dtype": "bfloat16",
        "reference": False,
    },
}
# Bytes of the weights on disk, about; the folder of temporary files must have as much.
BYTES = {"124M": 0.5e9, "1B": 5e9, "8B": 16.1e9}
SHAPES = {  # of attention: heads, heads of keys and values, head size, dtype
    "124M, bfloat16": [12, 12, 64, "bfloat16"],
    "124M, float32": [12, 12, 64, "float32"],
    "1B, bfloat16": [32, 8, 64, "bfloat16"],
    "8B, bfloat16": [32, 8, 128, "bfloat16"],
}
BF16_WEIGHTS = ["model.policy_dtype=bfloat16", "model.reference_dtype=bfloat16"]
# Steps by size: what a job gets. `microbatch`: pairs in a forward pass of TRL.
STEPS: dict[str, dict[str, dict]] = {
    "124M": {
        "ours": {"ahead": True},
        "TRL at its best, 16 pairs at a time": {"variant": "TRL, best", "microbatch": 16},
        "TRL at its best, 64 pairs at a time": {"variant": "TRL, best", "microbatch": 64},
        "ours, attention by segments": {"ahead": True, "segments": True},
        "ours, reference run": {"ahead": True, "variant": "prefix_shared, reference run"},
        "ours, padded": {"ahead": True, "variant": "padded"},
    },
    "1B": {
        "ours": {"ahead": True},
        "TRL at its best, 8 pairs at a time": {"variant": "TRL, best", "microbatch": 8},
        "TRL at its best, 16 pairs at a time": {"variant": "TRL, best", "microbatch": 16},
        "ours, compiled": {"ahead": True, "overrides": ["compile=true"]},
        "ours, weights in bfloat16": {"ahead": True, "overrides": BF16_WEIGHTS},
    },
    "8B": {
        "ours, LoRA": {
            "ahead": True,
            "lora": True,
            "overrides": [*BF16_WEIGHTS, "model.lora.r=16", "microbatch_tokens=4096"],
        },
        "ours, all weights in bfloat16": {
            "ahead": True,
            "overrides": [
                *BF16_WEIGHTS,
                "activation_checkpointing=true",
                "microbatch_tokens=4096",
            ],
        },
    },
}
TINY_SIZES = {
    size: one
    | {"vocabulary": 256, "pairs": 6}
    | {
        "model": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 1024}
        if size == "124M"
        else one["model"]
        | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
        | {"num_attention_heads": 4, "num_key_value_heads": 2}
    }
    for size, one in SIZES.items()
}
TINY_LENGTHS = (Tokens(12, 0.3, 4, 24), Tokens(5, 0.3, 2, 9))
TINY_MICROBATCH = 2

# The parts in the order of their importance, and the seconds of each process in them.
PARTS = {
    "flex": 120,
    "log-ratios": 60,
    "124M": 60,
    "1B": 120,
    "tests": 150,
    "sampling": 60,
    "8B": 150,
}
LOG_CHARACTERS = 8000  # of the output of a part that fails, in the results
LAST_WORDS = 5.0  # seconds that an interrupted process has to say where it was
CARD_LIMIT, MODELS_LIMIT = 60, 150


def main() -> None:
    arguments = _parser().parse_args()
    selected = [name for name in arguments.parts.split(",") if name]
    if unknown := set(selected) - PARTS.keys():
        raise SystemExit(f"--parts: {', '.join(sorted(unknown))}; accepted: {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the process of the part too
    with tempfile.TemporaryDirectory() as temporary:
        output = arguments.output or (Path(temporary) if arguments.dry_run else RESULTS)
        if arguments.dry_run and output.resolve().is_relative_to(RESULTS):
            raise SystemExit(f"--output {output}: a dry run measures nothing; name another folder")
        work = Path(temporary) / "work"
        benchmark = Benchmark(
            work, output, dry_run=arguments.dry_run, seconds=60 * arguments.minutes
        )
        for name in PARTS:
            if name in selected:
                benchmark.add(name)
        print(markdown(benchmark.results))
    if any("error" in part for part in benchmark.results["parts"].values()):
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of the whole command")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    return parser


class Benchmark:
    """The parts that have run, and their results in `output`.

    work: a new folder for models, logs and outcomes. seconds: limit of everything. Raises
    SystemExit where the packages or a GPU are not there.
    """

    def __init__(self, work: Path, output: Path, *, dry_run: bool, seconds: float):
        self.work, self.output, self.dry_run = work, output, dry_run
        self.ends_at = time.monotonic() + seconds
        self.models: dict[str, dict] = {}  # the outcomes of writing them, by size
        self.results: dict = {"parts": {}}
        work.mkdir(parents=True)
        card = self._run("card", {"do": "card"}, CARD_LIMIT)
        if "error" in card:
            raise SystemExit(f"{card['error']}\n{card.get('log', '')}")
        self.card = card["result"]
        if not dry_run and not self.card["machine"]["gpus"]:
            raise SystemExit(
                "torch finds no GPU here; benchmarks/gpu.sh --dry-run runs on the CPU, and"
                " benchmarks/step.py measures steps on it"
            )
        self.results = self._earlier() or {**self.card, "parts": {}}

    def add(self, name: str) -> None:
        """Run a part and write its results."""
        if name in SIZES:
            for step in STEPS[name]:
                self._save(f"{name}, {step}", self._step(name, step))
        else:
            run = {"tests": self._tests, "sampling": self._sampling}.get(name, self._of_124m)
            self._save(name, run(name))

    # -------------------------------------------------------------------------------------- results

    def _path(self) -> Path:
        gpus = self.card["machine"]["gpus"]
        name = re.sub(r"[^a-z0-9]+", "-", gpus[0].lower()).strip("-") if gpus else "dry-run"
        return self.output / f"gpu-{name}.json"

    def _earlier(self) -> dict | None:
        """The results of other parts on this machine, to which this command adds."""
        path = self._path()
        if not path.is_file():
            return None
        earlier = json.loads(path.read_text(encoding="utf-8"))
        # Packages may have come, as TRL may, but none may have another version.
        is_same = earlier["machine"] == self.card["machine"] and (
            earlier["packages"].items() <= self.card["packages"].items()
        )
        if is_same:
            return earlier | {"packages": self.card["packages"]}
        for file in (path, path.with_suffix(".md")):
            if file.is_file():
                before = f"{file.stem}-{file.stat().st_mtime:.0f}{file.suffix}"
                print(f"{file} is of another machine or versions; kept as {before}", flush=True)
                file.rename(file.with_name(before))
        return None

    def _save(self, name: str, outcome: dict) -> None:
        self.results["parts"][name] = outcome
        said = outcome.get("error") or outcome.get("skipped") or f"{outcome['process_seconds']} s"
        print(f"{name}: {said}", file=sys.stderr, flush=True)
        path = self._path()
        with atomic_write(path) as f:
            f.write(json.dumps(self.results, indent=1) + "\n")
        with atomic_write(path.with_suffix(".md")) as f:
            f.write(markdown(self.results))

    # ---------------------------------------------------------------------------------------- parts

    def _of_124m(self, name: str) -> dict:
        """A part that reads the models of 124M."""
        models = self._models("124M")
        if "result" not in models:
            return {"skipped": f"without models of 124M: {_reason(models)}"}
        part = {"do": name, "job": models["result"]["job"]}
        if name == "flex":
            part["shapes"] = {"tiny": [2, 2, 16, "float32"]} if self.dry_run else SHAPES
        outcome = self._run(name, part, PARTS[name])
        problem = find_problem(name, outcome.get("result"), on_gpu=not self.dry_run)
        return outcome | ({"error": problem} if problem else {})

    def _step(self, size: str, step: str) -> dict:
        more = dict(STEPS[size][step])
        if more.get("variant") == "TRL, best" and importlib.util.find_spec("trl") is None:
            return {"skipped": "TRL is not installed: pip install -r benchmarks/requirements.txt"}
        models = self._models(size)
        if "result" not in models:
            return {"skipped": f"without models of {size}: {_reason(models)}"}
        written = models["result"]
        planned, free = written["planned"].get(step), self.card["free_bytes"]
        if isinstance(planned, int) and free is not None and planned > free - SPARE:
            return {
                "skipped": f"its plan is {planned / 2**30:.1f} GiB, and the GPU has"
                f" {free / 2**30:.1f} free"
            }
        more["steps"] = 1 if self.dry_run else 5
        if self.dry_run and "microbatch" in more:
            more["microbatch"] = TINY_MICROBATCH
        part = {"do": "step", "job": written["job"], "more": more}
        outcome = self._run(f"{size}, {step}", part, PARTS[size])
        job = json.loads(Path(written["job"]).read_text(encoding="utf-8")) | more
        outcome |= {"pairs": job["n_pairs"], "tokens": job["tokens"]["distinct"]}
        outcome |= {"floor": flop_floor(job), "planned": planned}
        return outcome | self._disagreement(size, outcome)

    def _disagreement(self, size: str, outcome: dict) -> dict:
        """An error where a step has another loss than the first one of this size."""
        losses = [
            part["result"]["loss"]
            for name, part in self.results["parts"].items()
            if name.startswith(f"{size}, ") and "result" in part
        ]
        loss = outcome.get("result", {}).get("loss")
        if loss is None or not losses or abs(loss - losses[0]) <= 0.02 * max(1.0, losses[0]):
            return {}
        return {"error": f"its loss is {loss:.4f}, and that of the first step {losses[0]:.4f}"}

    def _models(self, size: str) -> dict:
        """Write the models of a size, once."""
        if size in self.models:
            return self.models[size]
        one = (TINY_SIZES if self.dry_run else SIZES)[size]
        part = {"do": "models", "folder": str(self.work / size), "dtype": "float32"}
        part |= {"reference": True, "bytes": 0 if self.dry_run else BYTES[size]} | one
        part["lengths"] = TINY_LENGTHS if self.dry_run else LENGTHS["tldr"]
        part["steps"] = {
            step: more for step, more in STEPS[size].items() if not step.startswith("TRL")
        }
        self.models[size] = self._run(f"models of {size}", part, MODELS_LIMIT)
        return self.models[size]

    def _sampling(self, name: str) -> dict:
        one = (TINY_SIZES if self.dry_run else SIZES)["124M"]
        part = {"do": "sampling", "model": one["model"], "vocabulary": one["vocabulary"]}
        return self._run(name, part | {"rounds": 1 if self.dry_run else 3}, PARTS[name])

    def _tests(self, name: str) -> dict:
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "--tb=short"]
        command += ["-p", "no:cacheprovider", "--show-capture=no", "tests/test_gpu.py"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(max(1, min(8, self.card["machine"]["cores"] // 2)))]
        log = self.work / "tests.log"
        outcome = self._timed(name, command, log, PARTS[name], one_gpu=False)
        if "skipped" not in outcome:
            outcome["result"] = read_tests(log.read_text(encoding="utf-8", errors="replace"))
        return outcome

    # ------------------------------------------------------------------------------------ processes

    def _run(self, name: str, part: dict, limit: float) -> dict:
        """A part of gpu_parts.py in its own process."""
        stem = re.sub(r"\W+", "-", name)
        paths = {end: self.work / f"{stem}.{end}" for end in ("json", "outcome", "log")}
        limit = min(limit, self.ends_at - time.monotonic())
        part = part | {"outcome": str(paths["outcome"]), "limit": limit}
        paths["json"].write_text(json.dumps(part), encoding="utf-8")
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_parts.py"), str(paths["json"])]
        timed = self._timed(name, command, paths["log"], limit)
        if not paths["outcome"].is_file():
            return timed
        outcome = json.loads(paths["outcome"].read_text(encoding="utf-8"))
        return outcome | {"process_seconds": timed["process_seconds"]}

    def _timed(
        self, name: str, command: list[str], log: Path, limit: float, *, one_gpu: bool = True
    ) -> dict:
        """Run a command, and say how long it took, and what went wrong as far as its exit shows."""
        limit = min(limit, self.ends_at - time.monotonic())
        if limit < 2 * LAST_WORDS:
            return {"skipped": "the time of the whole command was up", "process_seconds": 0}
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        code = run_process(command, limit, log, self._environment(one_gpu))
        outcome = {"process_seconds": round(time.monotonic() - start, 1)}
        if code == 0:
            return outcome
        said = f"ended with exit code {code}" if code is not None else f"took over {limit:.0f} s"
        tail = log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]
        return outcome | {"error": said, "log": tail}

    def _environment(self, one_gpu: bool) -> dict[str, str]:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
        environment = os.environ | offline | {"TOKENIZERS_PARALLELISM": "false"}
        visible = environment.get("CUDA_VISIBLE_DEVICES", "0")
        if self.dry_run:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif one_gpu:  # models would be spread over several
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
        return environment


def run_process(
    command: list[str], limit: float, log: Path, environment: dict[str, str]
) -> int | None:
    """Run a command with its output in a file; returns its exit code, or None where it was ended
    after `limit` seconds. All processes that it has started end with it."""
    with open(log, "w", encoding="utf-8") as f:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=f,
            stderr=f,
            env=environment,
            start_new_session=True,
            # A shell's background jobs ignore it, and so would all that they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest says what has failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def find_problem(name: str, result: dict | None, *, on_gpu: bool) -> str:
    """What is wrong with the result of a part; empty if nothing is."""
    if name == "log-ratios" and result:
        largest = result["prefix_shared, reference run"]["response"]
        return f"the log-ratio of a response is {largest:.2g}, and must be 0" if largest else ""
    if name == "flex" and result and on_gpu:
        graphs = [one["graphs"] for one in result["lengths"]]
        if not result["ok"]:
            return "FlexAttention is not used, or differs from attention by segments"
        if graphs[-1] > graphs[1]:
            return f"lengths go on to compile graphs, {graphs[-1] - graphs[1]} after the second one"
    return ""


def read_tests(log: str) -> dict:
    """Counts by outcome, and the names of tests that failed, from what `pytest -v` has printed,
    with xdist or without, to its end or not."""
    outcomes = {}
    word = "(PASSED|FAILED|ERROR|SKIPPED)"
    for line in log.splitlines():
        if match := re.search(rf"{word} (tests/\S.*?)\s*$", line):
            outcomes[match[2].partition(" - ")[0]] = match[1]
        elif match := re.search(rf"^(tests/.*?) {word}\b", line):
            outcomes[match[1]] = match[2]
    counts = Counter(outcome.lower() for outcome in outcomes.values())
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    return {"counts": dict(counts), "failed": failed}


def _reason(outcome: dict) -> str:
    return outcome.get("error") or outcome.get("skipped", "")


if __name__ == "__main__":
    main()
