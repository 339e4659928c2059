"""Several workers of a study side by side on this machine, and their progress."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preflab.settings.keys import ROOT
from preflab.study.halving import count_stages
from preflab.study.plan import Study
from preflab.sweeps.pool import SIGNALS, end_with, shares, visible_gpus
from utils import Progress


@dataclass
class Team:
    """Workers, each with its share of the cores and GPUs. A signal is sent on to all of them."""

    study: Study
    command: Sequence[str]  # of a worker, without its number
    n_jobs: int | None

    def run(self) -> int:
        """Start the workers and wait for them; returns 128 + the number of a signal, or 0."""
        gpus = visible_gpus()
        n = self.n_jobs or len(gpus) or 2
        self.received = 0
        self.processes: list[subprocess.Popen] = []
        before = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        try:
            for number, share in enumerate(shares(n, sorted(os.sched_getaffinity(0)), gpus)):
                self.processes.append(self._start(number, *share))
            self._wait()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        return 128 + self.received if self.received else 0

    def _on_signal(self, signum, frame) -> None:
        self.received = self.received or signum
        for process in self.processes:
            process.send_signal(signal.SIGTERM if signum == signal.SIGINT else signum)

    def _start(self, number: int, cores: list[int], gpus: list[str]) -> subprocess.Popen:
        log = self.study.work / "logs" / f"worker-{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "WANDB_MODE": "disabled"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        with open(log, "a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [*self.command, "--worker", str(number)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process, which sends it on
                preexec_fn=functools.partial(end_with, os.getpid()),
            )
        os.sched_setaffinity(process.pid, cores)
        print(f"worker {number} ({len(cores)} cores) prints to {log}", flush=True)
        return process

    def _wait(self) -> None:
        first, total = count_stages(self.study)
        with Progress(total=total - first, desc=f"study {self.study.name}") as bar:
            next_count = 0.0
            while any(process.poll() is None for process in self.processes):
                time.sleep(1.0)
                if (started := time.monotonic()) < next_count:
                    continue
                bar.update(count_stages(self.study)[0] - first - bar.n)
                # Counting reads every run's folder, and the workers need the cores.
                next_count = time.monotonic() + 50 * (time.monotonic() - started)
            bar.update(count_stages(self.study)[0] - first - bar.n)


def worker_command(name: str, session: str, *more: str) -> list[str]:
    """The command line of a worker of this session."""
    return [
        sys.executable,
        "-u",
        str(Path(ROOT) / "study.py"),
        name,
        "--session",
        session,
        *more,
    ]
