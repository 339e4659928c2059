"""Running what is missing of a study: any number of workers, here or on machines that share a disk.

A worker takes one run after the other and leaves out what is finished and what another worker
holds, which a lock file says. Nothing else has to be kept: whoever starts later, or again after a
kill, finds the runs in their folders. With halving, a worker waits for the runs of others where the
next ones depend on them.
"""

import contextlib
import functools
import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from preflab.distributed.signals import Stopped, StopSignals
from preflab.execution import execute
from preflab.settings.compose import compose
from preflab.settings.keys import ROOT
from preflab.settings.load import validate
from preflab.study.halving import due
from preflab.study.plan import PlannedRun, Step, Study
from preflab.sweeps.pool import end_with
from utils import (
    ConfigError,
    DataError,
    PrefLabError,
    atomic_write,
    content_hash,
    first_line,
    json_lines,
    machine_error,
    one_at_a_time,
    say_without_locks,
)

# In the folder of a study: its file as it was at the first start, and what was run and when.
COPY = "study.yaml"
LOG = "log.jsonl"


def begin(study: Study, *, amended: bool) -> Path:
    """The copy of the study's file in its folder, which is the criterion of its runs.

    Raises ConfigError where the file has changed since the first start; with `amended`, the copy of
    the new one has its own name, and the report names both.
    """
    copies = sorted(study.work.glob("study*.yaml"), key=lambda path: (len(path.name), path.name))
    for copy in copies:
        if copy.read_text(encoding="utf-8", errors="replace") == study.text:
            return copy
    if copies and not amended:
        raise ConfigError(
            f"{study.name}: the file differs from {copies[-1]}, with which runs of this study were"
            " started. A criterion is fixed before the runs: restore the file, or set another work"
            " folder, or give --amended to continue with the new one, which the report will say"
        )
    path = study.work / (f"study-{len(copies) + 1}.yaml" if copies else COPY)
    study.work.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as f:
        f.write(study.text)
    return path


def missing(study: Study) -> list[PlannedRun]:
    """What can be run now, or is damaged. With halving, more follows once it is done."""
    runs: list[PlannedRun] = []
    for cell in study.cells():
        try:
            runs += due(study, cell)
        except DataError:  # nobody can say which; workers and the page name the file
            runs += cell
    return runs


def compose_run(study: Study, run: PlannedRun, criterion: Path) -> tuple:
    """The composed config of a run and its folder. Raises ConfigError for settings that train.py
    does not accept."""
    folder = study.runs_dir / run.name
    own = [f"local_run_dir={_quoted(folder)}", f"criterion={_quoted(criterion)}"]
    try:
        config = compose([*run.overrides, *own], study.config_dir)
        validate(config)
    except PrefLabError as error:
        raise ConfigError(f"study {study.name}, run {run.name}: {error}") from error
    return config, folder


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


class Worker:
    """Works on a study until nothing is left that it may take.

    number: workers begin with different seeds, so that they do not wait for the same preparation.
    session: of the command that started it; a run that failed in this session is not tried again.
    limit: the number of runs after which it ends; None for no limit.
    """

    def __init__(
        self, study: Study, criterion: Path, number: int, session: str, limit: int | None = None
    ):
        self.study, self.criterion, self.session, self.limit = study, criterion, session, limit
        first = number % len(study.seeds)
        seeds = [*study.seeds[first:], *study.seeds[:first]]
        cases = list(study.cases)
        self.cells = sorted(
            study.cells(), key=lambda cell: (cases.index(cell[0].case), seeds.index(cell[0].seed))
        )
        self.done = 0
        self._damages: set[str] = set()  # that it has named

    def work(self, stop: StopSignals) -> None:
        """Run what is missing. stop: listens. Raises Stopped after a signal."""
        while True:
            before, held = self.done, 0
            for cell in self.cells:
                held += self._work_on(cell, stop)
            if self.study.halving is None or self.done == self.limit:
                return
            if self.done == before:
                if not held:
                    return
                _wait(stop)

    def _work_on(self, cell: Sequence[PlannedRun], stop: StopSignals) -> int:
        """Run what is due in a cell, until there is nothing; returns how many runs others hold."""
        while True:
            before, held = self.done, 0
            try:
                runs = due(self.study, cell, self._has_failed)
            except DataError as error:  # stops no other cell
                self._name_damage(str(error))
                return 0
            for run in runs:
                if self.done == self.limit:
                    return 0
                held += not self._take(run, cell, stop)
            if self.done == before or self.study.halving is None:
                return held

    def _take(self, run: PlannedRun, cell: Sequence[PlannedRun], stop: StopSignals) -> bool:
        """Make a run that is still due; returns whether no other worker holds it."""
        with claimed(self.study.work / "locks" / f"{run.name}.lock") as is_mine:
            if is_mine and run in due(self.study, cell, self._has_failed):
                self._run(run, stop)
                self.done += 1
        return is_mine

    def _name_damage(self, error: str) -> None:
        if error not in self._damages:
            self._damages.add(error)
            print(f"no trial of this loss, seed and case continues: {error}", flush=True)

    def _run(self, run: PlannedRun, stop: StopSignals) -> None:
        """A run, and its line in the log; what it raises stops no other."""
        started, error = time.time(), None
        try:
            prepare(self.study, run, stop)
            prepared = time.time()
            config, folder = compose_run(self.study, run, self.criterion)
            folder.parent.mkdir(parents=True, exist_ok=True)
            execute(config, folder, stop)
        except PrefLabError as refused:
            error = str(refused)
        except Exception as failed:
            if isinstance(failed, Stopped):
                raise
            if not (error := machine_error(failed)):
                traceback.print_exc()
                error = first_line(failed)
        if error:
            print(f"{run.name}: {error}", flush=True)
        seconds = time.time() - (prepared if error is None else started)
        write_log(self.study, run=run.name, session=self.session, error=error, seconds=seconds)

    def _has_failed(self, run: PlannedRun) -> bool:
        return any(
            row["run"] == run.name and row["session"] == self.session and row["error"]
            for row in read_log(self.study)
        )


def _wait(stop: StopSignals, seconds: float = 2.0) -> None:
    """Raises Stopped after a signal."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if stop.received:
            raise Stopped(stop.received)
        time.sleep(0.2)


def read_log(study: Study) -> list[dict]:
    """The lines of the log. One that is none, because a disk was full, is passed over: it would
    say that a run has failed, or how long it took."""
    path, rows = study.work / LOG, []
    for line in json_lines(path) if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("seconds"), (int, float)):
                rows.append({"run": None, "session": None, "error": None} | row)
    return rows


def write_log(study: Study, **row) -> None:
    """Append a line to the log. One write of a line is whole where several processes append; it
    begins with a newline, in case that an earlier one was cut short."""
    line = "\n" + json.dumps(row | {"time": time.time()}, ensure_ascii=False) + "\n"
    descriptor = os.open(study.work / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has got a lock file, which it holds inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    is_mine = True
    try:
        lock.acquire(timeout=0)
    except Timeout:
        is_mine = False
    except NotImplementedError:
        say_without_locks(path.parent)
    try:
        yield is_mine
    finally:
        lock.release()


def prepare(study: Study, run: PlannedRun, stop: StopSignals) -> None:
    """Make what a run needs and is not there yet; of several workers one does it.

    Raises ConfigError where a step fails, Stopped after a signal, which is sent on to the step.
    """
    for step in study.steps_of(run):
        made = ROOT / step.makes
        if made.exists():
            continue
        lock = study.work / "locks" / f"step-{content_hash(step.makes, step.run)[:12]}.lock"
        with one_at_a_time(lock, f"another worker makes {made}; this one waits"):
            if not made.exists():
                _make(step, made, stop)


def _make(step: Step, made: Path, stop: StopSignals) -> None:
    words = shlex.split(step.run)
    if words[0] == "python":
        words[0] = sys.executable
    print(f"prepare: {step.run}", flush=True)
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        preexec_fn=functools.partial(end_with, os.getpid()),
    )
    while process.poll() is None:
        if stop.received:
            process.terminate()
            process.wait()
            raise Stopped(stop.received)
        time.sleep(0.2)
    if process.returncode or not made.exists():
        problem = f"ended with {process.returncode}" if process.returncode else f"made no {made}"
        raise ConfigError(f"prepare: {step.run}: {problem}; the worker's log has its output")
