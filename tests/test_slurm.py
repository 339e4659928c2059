"""The batch files and hydra's submitit launcher on a real SLURM. Skipped, with a word, where there
is none."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    final_weights,
    read_rows,
    run_command,
    run_here,
    same_weights,
    save_model,
    scored_rows,
    small_run,
    write_jsonl,
)


def reason_to_skip() -> str | None:
    """The reason these tests cannot run here, or None."""
    if shutil.which("sbatch") is None:
        return "no sbatch on this machine, so the SLURM batch files were not tried"
    try:
        state = subprocess.run(
            ["sinfo", "-h", "-o", "%t"], capture_output=True, text=True, timeout=20
        )
    except subprocess.TimeoutExpired:
        return "sinfo does not answer, so the SLURM batch files were not tried"
    if state.returncode or not {"idle", "mix", "alloc"} & set(state.stdout.split()):
        return (
            f"no usable SLURM node ({(state.stderr or state.stdout).strip()[:80]}), so the batch"
            " files were not tried"
        )
    return None


pytestmark = pytest.mark.skipif(bool(reason := reason_to_skip()), reason=str(reason))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    for split, n in (("train", 17), ("test", 4)):
        write_jsonl(folder / "data" / f"imdb-sft-{split}.jsonl", scored_rows(n))
    save_model(folder / "model")
    run_here(*overrides(folder, "warm", "n_examples=8"))  # fills the cache of tokens
    return folder


def overrides(setting: Path, name: str, *more: str) -> list[str]:
    command = small_run(
        setting / "model",
        setting / "data",
        setting / name,
        "n_eval_examples=4",
        "n_eval_model_samples=2",
        "eval_every=136",
        *more,
    )
    return [str(word) for word in command]


class Job:
    """A submitted job, cancelled when the test ends."""

    def __init__(self, number: str, log: Path):
        self.number, self.log = number, log

    def field(self, name: str) -> str:
        shown = subprocess.run(
            ["scontrol", "show", "job", self.number], capture_output=True, text=True
        ).stdout
        return next(
            (word.split("=", 1)[1] for word in shown.split() if word.startswith(f"{name}=")), ""
        )

    def wait(self, *states: str, seconds: int = 120) -> str:
        """Until the job is in one of `states`; a job that waits after a requeue is asked to start
        now."""
        for _ in range(seconds * 4):
            state = self.field("JobState")
            if state in states:
                return state
            if state == "PENDING" and self.field("Reason") == "BeginTime":
                time.sleep(
                    2
                )  # SLURM has just revoked the job's credential, and refuses one of the same second
                control("update", f"JobId={self.number}", "StartTime=now")
            time.sleep(0.25)
        raise AssertionError(
            f"job {self.number} is {self.field('JobState')}, not {states}\n{self.text()}"
        )

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def control(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], check=False, capture_output=True)


def wait_for(condition, seconds: int = 120):
    for _ in range(seconds * 10):
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError("waited in vain")


@pytest.fixture
def submit(setting):
    jobs = []

    def submit(script: str, name: str, *more: str, options=()) -> Job:
        log = setting / f"{name}.out"
        words = [
            word
            for word in overrides(setting, name, *more)
            if not word.startswith("local_run_dir=")
        ]
        environment = os.environ | {"RUN_DIR": str(setting / name), "PYTHON": sys.executable}
        output = f"{log}" if "sweep" not in script else f"{log}.%a"
        command = [
            "sbatch",
            "--parsable",
            f"--output={output}",
            *options,
            f"scripts/slurm/{script}",
            *words,
        ]
        number = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True
        ).stdout.strip()
        jobs.append(Job(number, log))
        return jobs[-1]

    yield submit
    for job in jobs:
        subprocess.run(["scancel", job.number], check=False)


@pytest.mark.parametrize(
    "script, options, more",
    [
        ("one_run.sbatch", (), ("n_epochs=150",)),
        ("one_run.sbatch", (), ("trainer=FSDPTrainer", "world_size=2", "n_epochs=64")),
        (
            "many_nodes.sbatch",
            ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"),
            ("n_epochs=64",),
        ),
    ],
    ids=["one process", "two workers", "srun with two tasks"],
)
def test_a_warned_run_requeues_itself_and_continues_and_a_finished_one_ends_at_once(
    setting, submit, script, options, more, request
):
    name = request.node.callspec.id.replace(" ", "-")
    job = submit(script, name, *more, options=options)
    wait_for(lambda: list((setting / name).glob("step-*")))
    subprocess.run(["scancel", "--signal=USR1", job.number], check=True)
    wait_for(lambda: job.field("Restarts") == "1")
    assert "stopped by SIGUSR1" in job.text()
    assert job.wait("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", job.text()
    assert "continuing" in job.text()
    steps = 3 * int(more[-1].removeprefix("n_epochs="))
    assert [
        row["step"]
        for row in read_rows(setting / name / "metrics.jsonl")
        if row["split"] == "train"
    ] == list(range(1, steps + 1))
    if len(more) == 1 and not options:  # one process is exact
        run_here(*overrides(setting, "whole", *more))
        assert same_weights(final_weights(setting / "whole"), final_weights(setting / name))
    control("requeue", job.number)
    wait_for(lambda: job.field("Restarts") == "2")
    assert job.wait("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", job.text()
    assert "already finished" in job.text()


def test_requeued_by_hand_while_it_runs(setting, submit):
    job = submit("one_run.sbatch", "by-hand", "n_epochs=150")
    wait_for(lambda: list((setting / "by-hand").glob("step-*")))
    control("requeue", job.number)
    wait_for(lambda: job.field("Restarts") == "1")
    assert job.wait("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", job.text()
    assert "stopped by SIGTERM" in job.text() and "continuing" in job.text()


def test_an_array_runs_a_grid(setting, submit):
    job = submit("sweep.sbatch", "grid", "n_examples=16", options=("--array=0,7",))
    wait_for(lambda: len(list((setting / "grid").glob("*/summary.json"))) == 2)
    assert sorted(p.name for p in (setting / "grid").iterdir() if p.is_dir()) == [
        "loss-dpo_loss.beta-0.1_seed-0",
        "loss-odpo_loss.beta-0.1_seed-1",
    ]
    assert job.number


def test_hydras_launcher_submits_a_sweep_and_a_warned_job_goes_back_into_the_queue(setting):
    command = [
        sys.executable,
        "train.py",
        "-m",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.timeout_min=60",
    ]
    words = overrides(setting, "sweep", "loss=dpo,odpo", "n_epochs=80")
    sweep = subprocess.Popen(
        [*command, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        first = wait_for(lambda: next((setting / "sweep").glob("*/step-*"), None))
        array = next(
            p.name for p in (setting / "sweep" / ".submitit").iterdir() if p.name.isdigit()
        )
        tasks = [Job(f"{array}_{i}", first) for i in range(2)]
        running = next(task for task in tasks if task.field("JobState") == "RUNNING")
        subprocess.run(["scancel", "--signal=USR1", running.number], check=True)
        wait_for(lambda: running.field("Restarts") == "1")
        for task in tasks:
            assert task.wait("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
        assert len(list((setting / "sweep").glob("*/summary.json"))) == 2
        logs = "".join(p.read_text() for p in (setting / "sweep" / ".submitit").glob("*/*_log.out"))
        assert "stopped by SIGUSR1" in logs and "continuing" in logs
    finally:
        sweep.kill()
        sweep.communicate()
    result = run_command("report.py", setting / "sweep")
    assert "odpo" in result.stdout and "dpo" in result.stdout
