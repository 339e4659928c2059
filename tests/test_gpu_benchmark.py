"""benchmarks/gpu.sh without a GPU: its dry run, and what it does with parts that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT
from warm_python import run_script

from benchmarks import gpu, gpu_parts
from benchmarks.cases import flop_floor
from benchmarks.gpu_report import PEAKS, markdown, mfu

H100 = "NVIDIA H100 80GB HBM3"


def in_a_fork(command, limit, log, environment):
    """`run_process` in a process that has imported the project already."""
    with mock.patch.dict(os.environ, environment):
        done = run_script(command[1:], cwd=ROOT, timeout=200)
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    return done.returncode


@pytest.fixture
def fast(monkeypatch):
    """One step of each sort, without compilation, in forks; TRL is not there."""
    steps = {
        "124M": {k: v for k, v in gpu.STEPS["124M"].items() if "padded" in k or "TRL" in k},
        "1B": {"ours, weights in bfloat16": gpu.STEPS["1B"]["ours, weights in bfloat16"]},
        "8B": gpu.STEPS["8B"],
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "run_process", in_a_fork)
    found = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name == "trl" else found(name)
    )


def test_a_dry_run_goes_through_every_part(fast, tmp_path):
    benchmark = gpu.Benchmark(tmp_path / "work", tmp_path / "out", dry_run=True, seconds=10_000)
    for name in set(gpu.PARTS) - {"tests"}:
        benchmark.add(name)
    written = json.loads((tmp_path / "out" / "gpu-dry-run.json").read_text())
    assert written == json.loads(json.dumps(benchmark.results))
    parts = written["parts"]
    errors = {name: part for name, part in parts.items() if "error" in part}
    assert not errors
    assert all("TRL is not installed" in parts[name]["skipped"] for name in parts if "TRL" in name)
    steps = [name for name in parts if ", ours" in name]
    assert len(steps) == 4
    for name in steps:
        assert parts[name]["result"]["loss"] == pytest.approx(0.69, abs=0.02), name
        assert parts[name]["planned"] > 0 and parts[name]["floor"] > 0, name
    # LoRA has no gradients of the base: fewer operations and less memory
    lora, full = parts["8B, ours, LoRA"], parts["8B, ours, all weights in bfloat16"]
    assert lora["floor"] < full["floor"]
    ratios = parts["log-ratios"]["result"]
    assert ratios["prefix_shared, reference run"] == {"token": 0.0, "response": 0.0}
    assert "padded" in ratios
    flex = parts["flex"]["result"]
    assert "not support backward on CPU" in flex["attention"]["tiny"]["reason"]
    assert not flex["ok"] and flex["gradient_difference"] == 0 and len(flex["lengths"]) > 2
    assert parts["sampling"]["result"]["greedy_agreement"] > 0.98
    page = (tmp_path / "out" / "gpu-dry-run.md").read_text()
    assert "a dry run on" in page and all(name in page for name in steps)
    assert not list((ROOT / "benchmarks" / "results").glob("gpu-dry-run*"))


def test_a_dry_run_is_never_written_to_the_results(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--output", "benchmarks/results"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="a dry run measures nothing; name another folder"):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "flexx"])
    with pytest.raises(SystemExit, match="flexx; accepted: flex, log-ratios"):
        gpu.main()


# --------------------------------------------------------------------------------- parts that fail

CARD = {
    "machine": {"processor": "p", "cores": 4, "gpus": [H100], "torch": "2"},
    "packages": {"torch": "2"},
    "free_bytes": 70 * 2**30,
}
SIZE = {"linear": 100, "head": 10, "width": 8, "layers": 2}
TOKENS = {"distinct": 50, "scored": 10, "attended": [(5, [2, 3])]}


@pytest.fixture
def benchmark_of(monkeypatch, tmp_path):
    """Makes a benchmark whose processes are replaced by their outcomes, by what they `do`: an
    outcome, or an exit code."""

    def benchmark_of(outcomes: dict, **options):
        job = tmp_path / "job.json"
        job.write_text(json.dumps({"n_pairs": 6, "loss": "dpo", "size": SIZE, "tokens": TOKENS}))
        models = {"result": {"job": str(job), "planned": {"ours": 2**30}}}
        known = {"card": {"result": CARD}, "models": models} | outcomes

        def run(command, limit, log, environment):
            log.write_text("the last lines")
            part = json.loads(Path(command[-1]).read_text())
            outcome = known[part["do"]]
            outcome = outcome(part) if callable(outcome) else outcome
            if not isinstance(outcome, dict):
                return outcome
            Path(part["outcome"]).write_text(json.dumps(outcome))
            return 0

        monkeypatch.setattr(gpu, "run_process", run)
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: SimpleNamespace())
        options = {"dry_run": False, "seconds": 100} | options
        work = tmp_path / f"work{len(list(tmp_path.iterdir()))}"
        return gpu.Benchmark(work, tmp_path / "out", **options)

    return benchmark_of


def measured(seconds: float, loss: float = 0.7) -> dict:
    return {"result": {"seconds": seconds, "loss": loss, "peak_memory": 2**30}}


def test_a_step_that_fails_or_does_not_fit_is_a_row_and_the_others_are_measured(benchmark_of):
    outcomes = {
        "TRL at its best, 16": {"error": "OutOfMemoryError: CUDA out of memory"},
        "TRL at its best, 64": measured(0.6),
        "by segments": None,  # ended at its limit
        "reference run": -9,
        "padded": measured(0.2, loss=0.9),
    }

    def step(part):
        more = part["more"]
        name = next(name for name, m in gpu.STEPS["124M"].items() if {**m, "steps": 5} == more)
        return next((o for key, o in outcomes.items() if key in name), measured(0.2))

    benchmark = benchmark_of({"step": step})
    benchmark.add("124M")
    parts = benchmark.results["parts"]
    assert parts["124M, ours"]["result"]["seconds"] == 0.2
    assert "CUDA out of memory" in parts["124M, TRL at its best, 16 pairs at a time"]["error"]
    hung = parts["124M, ours, attention by segments"]
    assert "took over" in hung["error"] and hung["log"] == "the last lines"
    assert "exit code -9" in parts["124M, ours, reference run"]["error"]
    assert (
        "loss is 0.9000, and that of the first step 0.7000" in parts["124M, ours, padded"]["error"]
    )
    page = markdown(benchmark.results)
    [row] = [line for line in page.splitlines() if line.startswith("| 124M, ours |")]
    share = parts["124M, ours"]["floor"] / 0.2 / 989e12
    assert row.endswith(f"| {share:.1%} | 1.0 | 1.0 | 3.00 |")  # TRL's best is the one that fits
    assert "| 124M, ours, reference run | ended with exit code -9 |" in page


def test_what_cannot_be_measured_is_skipped_with_its_reason(benchmark_of):
    large = {"result": {"job": "no file", "planned": {"ours, LoRA": 69 * 2**30}}}
    benchmark = benchmark_of({"models": large, "step": lambda part: 1 / 0})
    assert benchmark._step("8B", "ours, LoRA") == {
        "skipped": "its plan is 69.0 GiB, and the GPU has 70.0 free"
    }
    benchmark = benchmark_of({"models": {"error": "OSError: 3 GiB free"}})
    benchmark.add("flex")
    benchmark.add("1B")
    skipped = [part["skipped"] for part in benchmark.results["parts"].values()]
    assert len(skipped) == 1 + len(gpu.STEPS["1B"])
    assert all("OSError: 3 GiB free" in reason for reason in skipped)
    benchmark = benchmark_of({"sampling": {"result": {}}})
    benchmark.ends_at = 0.0
    benchmark.add("sampling")
    assert "time of the whole command" in benchmark.results["parts"]["sampling"]["skipped"]


def test_a_wrong_result_is_an_error_beside_its_numbers(benchmark_of):
    def ratios(response):
        return {"prefix_shared, reference run": {"token": 0.0, "response": response}}

    def flex(ok, *graphs):
        return {"ok": ok, "lengths": [{"graphs": n} for n in graphs]}

    assert "log-ratio of a response is 0.5" in gpu.find_problem(
        "log-ratios", ratios(0.5), on_gpu=True
    )
    assert not gpu.find_problem("log-ratios", ratios(0.0), on_gpu=True)
    assert "differs" in gpu.find_problem("flex", flex(False, 2, 2, 2), on_gpu=True)
    assert "2 after the second" in gpu.find_problem("flex", flex(True, 2, 3, 4, 5), on_gpu=True)
    assert not gpu.find_problem("flex", flex(True, 2, 3, 3, 3), on_gpu=True)
    assert not gpu.find_problem("flex", None, on_gpu=True)
    benchmark = benchmark_of({"log-ratios": {"result": ratios(0.5)}})
    benchmark.add("log-ratios")
    outcome = benchmark.results["parts"]["log-ratios"]
    assert "must be 0" in outcome["error"] and outcome["result"]


def test_a_second_command_adds_to_the_results_of_the_same_machine(benchmark_of):
    rates = {"result": {"ours": 3.0, "generate": 1.0, "times_as_fast": 3.0}}
    benchmark_of({"sampling": rates}).add("sampling")
    ratios = {"prefix_shared, reference run": {"token": 0.0, "response": 0.0}}
    second = benchmark_of({"log-ratios": {"result": ratios}})
    second.add("log-ratios")
    name = "gpu-nvidia-h100-80gb-hbm3"
    written = json.loads((second.output / f"{name}.json").read_text())
    assert set(written["parts"]) == {"sampling", "log-ratios"}
    assert "3.00 times as fast" in (second.output / f"{name}.md").read_text()
    other = CARD | {"packages": {"torch": "3"}}
    assert not benchmark_of({"card": {"result": other}}).results["parts"]


def test_without_a_gpu_or_packages_nothing_starts(benchmark_of):
    no_gpu = CARD | {"machine": CARD["machine"] | {"gpus": []}}
    with pytest.raises(SystemExit, match="no GPU here"):
        benchmark_of({"card": {"result": no_gpu}})
    with pytest.raises(SystemExit, match="No module named 'torch'"):
        benchmark_of({"card": {"error": "ModuleNotFoundError: No module named 'torch'"}})


def test_a_part_writes_its_error(monkeypatch, tmp_path):
    def fails(part):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    part = {"do": "fails", "outcome": str(tmp_path / "outcome"), "limit": 100}
    (tmp_path / "part").write_text(json.dumps(part))
    monkeypatch.setitem(gpu_parts.PARTS, "fails", fails)
    monkeypatch.setattr(sys, "argv", ["gpu_parts.py", str(tmp_path / "part")])
    gpu_parts.main()
    outcome = json.loads((tmp_path / "outcome").read_text())
    assert outcome["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert "in fails" in outcome["log"]


def test_a_process_over_its_limit_ends_with_all_that_it_has_started(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LAST_WORDS", 1.5)
    log = tmp_path / "log"
    script = "trap 'echo asked' INT; sleep 300 & echo $!; while true; do sleep 0.05; done"
    assert gpu.run_process(["bash", "-c", script], 1.0, log, dict(os.environ)) is None
    child, *said = log.read_text().split()
    assert said == ["asked"]
    state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z")
    assert gpu.run_process(["bash", "-c", "exit 3"], 10.0, log, dict(os.environ)) == 3


# ----------------------------------------------------------------------------------------- numbers


def test_what_pytest_prints_is_counted_with_xdist_and_without():
    assert gpu.read_tests(
        "tests/test_gpu.py::test_a[dpo-BasicTrainer] PASSED          [ 10%]\n"
        "tests/test_gpu.py::test_b SKIPPED (fewer than two GPUs here)  [ 20%]\n"
        "tests/test_gpu.py::test_c FAILED [ 30%]\n"
        "FAILED tests/test_gpu.py::test_c - AssertionError: assert False\n"
    ) == {
        "counts": {"passed": 1, "skipped": 1, "failed": 1},
        "failed": ["tests/test_gpu.py::test_c"],
    }
    assert gpu.read_tests(
        "tests/test_gpu.py::test_a \n"
        "[gw0] [ 50%] PASSED tests/test_gpu.py::test_a \n"
        "tests/test_gpu.py::test_b[x] \n"
        "[gw1] [100%] ERROR tests/test_gpu.py::test_b[x] \n"
        "tests/test_gpu.py::test_that_was_interrupted \n"
    ) == {"counts": {"passed": 1, "error": 1}, "failed": ["tests/test_gpu.py::test_b[x]"]}


def test_mfu_is_of_the_card_by_its_whole_name_and_none_for_an_unknown_one():
    part = {"floor": 989e12, "result": {"seconds": 2.0}}
    assert mfu(part, [H100]) == 0.5
    assert mfu(part, [f"{H100} MIG 1g.10gb"]) is None
    assert mfu(part, []) is None
    assert all(1e14 < peak < 1e15 for peak in PEAKS.values())


def test_lora_leaves_out_the_gradients_of_the_matrices_only():
    job = {"loss": "dpo", "size": SIZE, "tokens": TOKENS}
    matrices = 2 * 100 * 50 + 2 * 10 * 10
    assert flop_floor(job) - flop_floor(job | {"lora": True}) == matrices


def test_the_script_starts_the_command_with_the_python_that_it_is_given():
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--help"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0 and "--dry-run" in done.stdout, done.stderr
