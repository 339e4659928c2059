"""Starts the workers of a run on this machine, and reports the error of one that failed."""

import atexit
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

from preflab.distributed.signals import Stopped, StopSignals
from utils import ConfigError, PrefLabError, machine_error


@contextlib.contextmanager
def sheltered():
    """Block SIGUSR1 and SIGUSR2 in processes started inside, such as those of wandb.

    SLURM sends the signals to all processes of a job, and they would end these.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Linux: the signal that a process receives when its parent dies, see prctl(2).
PR_SET_PDEATHSIG = 1
SECONDS_TO_BE_STOPPED = 10.0  # that a worker which has lost another waits for the launcher


class WorkerError(RuntimeError):
    """A worker ended with an error or was killed; the others were stopped."""


def launch(worker: Callable, n: int, port: int | None, arguments: tuple, stop: StopSignals) -> None:
    """Run `worker(*arguments, stop=...)` in `n` processes with torch's elastic launcher.

    port: where the workers meet; None for a free port. stop: of this process; each worker gets its
    own. Returns when all workers have returned, and raises Stopped if a signal made them. When one
    fails, stops the others, and raises PrefLabError with its message if it raised a PrefLabError;
    otherwise prints its traceback and raises WorkerError.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if 0 < torch.cuda.device_count() < n:
        raise ConfigError(
            f"world_size={n}: each worker needs its own GPU, and there are"
            f" {torch.cuda.device_count()}; lower it"
        )
    # _raise_first_error reports errors instead.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // n)))
    with sheltered():
        resource_tracker.ensure_running()
    with tempfile.TemporaryDirectory(prefix="preflab-workers-") as folder:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n,
            max_restarts=0,
            start_method="spawn",
            monitor_interval=0.1,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint=f"localhost:{_usable(port)}",
            signals_to_handle="SIGQUIT",  # StopSignals handles the others
        )
        stop.note = Path(folder) / "signal"
        try:
            if stop.received:
                raise Stopped(stop.received)
            start = elastic_launch(settings, _run_worker)
            by_worker = start(worker, arguments, folder, os.getpid())
        except ChildFailedError as failed:
            _raise_first_error(failed, Path(folder), stop)
            raise Stopped(stop.received) from None
        finally:
            stop.note = None
    if any(by_worker.values()):
        raise Stopped(stop.received or max(filter(None, by_worker.values())))


def _usable(port: int | None) -> int:
    """`port`, or 0 for None: the store of the workers then takes a free one when it opens it.
    Raises ConfigError if the port cannot be used."""
    if port is None:
        return 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except OSError as error:
            raise ConfigError(
                f"fsdp_port={port} cannot be used ({error.strerror}); take another, or"
                " fsdp_port=null for a free one"
            ) from error
    return port


def _run_worker(worker: Callable, arguments: tuple, folder: str, launcher: int) -> int | None:
    """Run the worker; write an error to `folder`, where the launching process reads it.

    launcher: its process id. The worker ends with it, however it dies. Returns the signal that
    stopped the worker, if one did.
    """
    from preflab.distributed.process_group import end_process, exit_code

    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    stop = StopSignals()
    stop.listen()
    if (note := Path(folder) / "signal").exists():  # it came before this process could hear it
        stop.received = int(note.read_text(encoding="utf-8") or signal.SIGTERM)
    try:
        worker(*arguments, stop=stop)
        signum = None
    except Stopped as stopped:
        signum = stopped.signum
    except SystemExit as exited:  # another rank reports the error
        end_process(exit_code(exited))
    except BaseException as error:
        report = {
            "message": machine_error(error) or str(error),
            "known": isinstance(error, PrefLabError) or bool(machine_error(error)),
            "traceback": traceback.format_exc(),
            "time": time.time(),
        }
        path = Path(folder) / f"{os.environ['RANK']}.json"
        path.write_text(json.dumps(report), encoding="utf-8")
        if _lost_a_peer(error):
            _wait_to_be_stopped(stop)
        # The launching process prints the error.
        end_process(1)
    # After torch has handed over what this function returns, for the reason in `end_process`.
    atexit.register(os._exit, 0)
    return signum


def _lost_a_peer(error: BaseException) -> bool:
    """Whether an exchange failed, which is so where another rank has died or is dying."""
    return any(sign in str(error) for sign in ("gloo/", "ncclRemoteError"))


def _wait_to_be_stopped(stop: StopSignals) -> None:
    """Return when the launcher has asked this worker to stop, or after SECONDS_TO_BE_STOPPED.

    The launcher learns of one worker that failed. If this one ended within the same tenth of a
    second as the rank that it lost, that one could be it, and a kill would go unreported.
    """
    give_up = time.monotonic() + SECONDS_TO_BE_STOPPED
    while stop.received is None and time.monotonic() < give_up:
        time.sleep(0.05)


def _end_with(launcher: int) -> None:
    """Kill this process within a second after its parent has died.

    Nobody would read the worker's errors, and the next start of the run would find it at work.
    A kill is safe at any moment: checkpoints are complete or absent.
    """
    die_with_parent()  # at once, also while this thread cannot run
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _raise_first_error(failed, folder: Path, stop: StopSignals) -> None:
    """Raise the error of the worker that failed first, which made the others fail.

    failed: torch's ChildFailedError. folder: has the reports of `_run_worker`. Returns if a worker
    was only killed by the signal that this process received too.
    """
    reports = {
        int(path.stem): json.loads(path.read_text(encoding="utf-8"))
        for path in folder.glob("*.json")
    }
    rank, failure = failed.get_first_failure()
    # A rank that reported an error may still abort while it exits: that is no kill.
    aborted = {
        other
        for other in reports.keys() & failed.failures.keys()
        if failed.failures[other].exitcode == -signal.SIGABRT
    }
    for other, died in failed.failures.items():
        # A rank that was killed from outside made the others fail.
        if died.exitcode < 0 and died.exitcode != -signal.SIGTERM and other not in aborted:
            rank, failure = other, died
    if failure.exitcode < 0 and rank not in aborted:
        if stop.received is not None and -failure.exitcode == stop.received:
            return  # before the worker handled signals; it had done nothing yet
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        raise WorkerError(
            f"worker {rank} was killed by {name}{hint}; all workers were stopped"
        ) from failed
    if not reports:
        raise WorkerError(
            f"worker {rank} ended with exit code {failure.exitcode}; all workers were stopped"
        ) from failed
    rank = min(reports, key=lambda other: reports[other]["time"])
    if reports[rank]["known"]:
        raise PrefLabError(reports[rank]["message"])
    print(reports[rank]["traceback"], file=sys.stderr)
    raise WorkerError(f"worker {rank} failed with the error above; all workers were stopped")
