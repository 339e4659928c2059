"""The launcher `hydra/launcher=local`: runs of a sweep side by side, each in its own process."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import DictConfig

from preflab.distributed.launch import die_with_parent
from preflab.settings.command_line import parse_flags
from preflab.settings.overrides import quoted
from preflab.sweeps.objective import objective_of_run
from utils import PrefLabError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

# Hydra's settings of a sweep, which its runs do not need.
OF_THE_SWEEP = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.mode")


class RunFailedError(PrefLabError):
    """A run ended with an exit code other than 0; the message is the last line that it printed."""


@dataclass
class Running:
    """A started run. slot: its share of cores and GPUs."""

    number: int
    slot: int
    process: subprocess.Popen
    folder: Path
    log: IO[str]
    started: float


class Pool:
    """Starts a process for each run, `n_jobs` at a time, each with its share of cores and GPUs.

    What a run prints goes to NAME.log beside its folder NAME. A run that fails, or is killed, stops
    no other. A signal goes to all running ones, which save; no further run starts then. Where this
    process is killed, so are they; the same command continues them.
    """

    def __init__(self, n_jobs: int | None):
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Run all jobs; returns their results in order. After a signal the process ends with
        128 + its number."""
        gpus = visible_gpus()
        n = self.n_jobs or len(gpus) or 2
        self.slots = shares(n, sorted(os.sched_getaffinity(0)), gpus)
        self.received = 0
        before = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        self.running: list[Running] = []
        results: dict[int, JobReturn] = {}
        waiting = list(enumerate(map(list, job_overrides)))
        try:
            while self.running or (waiting and not self.received):
                if waiting and len(self.running) < n and not self.received:
                    self._start(*waiting.pop(0))
                    continue
                for run in [run for run in self.running if run.process.poll() is not None]:
                    self.running.remove(run)
                    results[run.number] = self._result(run, job_overrides[run.number])
                time.sleep(0.1)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        if self.received:
            print(f"stopped; {len(waiting)} runs were not started", file=sys.stderr, flush=True)
            raise SystemExit(128 + self.received)
        return [results[number] for number in sorted(results)]

    def _on_signal(self, signum, frame) -> None:
        self.received = self.received or signum
        for run in self.running:
            run.process.send_signal(signal.SIGTERM if signum == signal.SIGINT else signum)

    def _start(self, number: int, overrides: list[str]) -> None:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        folder = Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir
        slot = min(set(range(len(self.slots))) - {run.slot for run in self.running})
        cores, gpus = self.slots[slot]
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = open(f"{folder}.log", "w", encoding="utf-8")  # noqa: SIM115  (closed with its run)
        process = subprocess.Popen(
            command_of(overrides, folder, self.config.hydra.overrides.hydra),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
            start_new_session=True,  # Ctrl-C reaches this process, which sends it on
            preexec_fn=functools.partial(end_with, os.getpid()),
        )
        # Torch's threads follow it, those of the workers of a distributed trainer too.
        os.sched_setaffinity(process.pid, cores)
        self.running.append(Running(number, slot, process, folder, log, time.monotonic()))
        on = f"{len(cores)} cores" + (f", GPU {','.join(gpus)}" if gpus else "")
        print(f"started {folder.name} ({on}), which prints to {folder}.log", flush=True)

    def _result(self, run: Running, overrides: Sequence[str]) -> JobReturn:
        run.log.close()
        code = run.process.returncode
        result = JobReturn(overrides=filter_overrides(overrides))
        if code == 0:
            result.status = JobStatus.COMPLETED
            result.return_value = objective_of_run(run.folder)
        else:
            result.status = JobStatus.FAILED
            result.return_value = RunFailedError(reason_of(code, Path(f"{run.folder}.log")))
        seconds = time.monotonic() - run.started
        state = "finished" if code == 0 else f"failed with exit code {code}:"
        print(f"{state} {run.folder.name} after {seconds:.0f} s", flush=True)
        return result


def end_with(parent: int) -> None:
    """In a new process, before its command: end with the process that started it, also where that
    has died already."""
    die_with_parent()
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def shares(n: int, cores: Sequence[int], gpus: Sequence[str]) -> list[tuple[list[int], list[str]]]:
    """The cores and GPUs of each of `n` runs at a time; several share one where there are fewer."""
    return [(_share(i, n, cores), _share(i, n, gpus)) for i in range(n)]


def _share(i: int, n: int, items: Sequence) -> list:
    if len(items) < n:
        return [items[i % len(items)]] if items else []
    size = len(items) // n
    return list(items[i * size : (i + 1) * size])


def visible_gpus() -> list[str]:
    """The GPUs that a run may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [gpu for gpu in given.split(",") if gpu not in ("", "-1")]
    from torch.cuda import device_count

    return [str(gpu) for gpu in range(device_count())]


def command_of(overrides: Sequence[str], folder: Path, of_hydra: Sequence[str]) -> list[str]:
    """The command line of one run. of_hydra: hydra's settings on the command line of the sweep."""
    given = parse_flags(sys.argv[1:])
    flags = {
        "--config-path": given.config_path,
        "--config-dir": given.config_dir,
        "--config-name": given.config_name,
    }
    return [
        sys.executable,
        "-u",
        sys.argv[0],
        *(word for flag, value in flags.items() if value for word in (flag, str(value))),
        *(word for word in of_hydra if not word.startswith(OF_THE_SWEEP)),
        *filter_overrides(overrides),
        f"hydra.run.dir={quoted(str(folder))}",
    ]


def reason_of(code: int, log: Path) -> str:
    """The last line of a log, or the signal that ended the run."""
    where = f"its output is {log}"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; {where}"
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    said = said or (lines[-1] if lines else f"exit code {code}")
    return f"{said.removeprefix('error: ')}; {where}"
