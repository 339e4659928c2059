"""Starting workers on this machine, telling them to stop, and telling why one of them died."""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

from preflab.distributed.signals import StopSignals
from utils import ConfigError, PrefLabError


@contextlib.contextmanager
def sheltered():
    """Helper processes started in here (wandb's, multiprocessing's) do not get SLURM's SIGUSR1,
    which goes to all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerError(RuntimeError):
    """A worker ended by itself; the others were stopped."""


def launch(worker: Callable, n: int, port: int | None, arguments: tuple, stop: StopSignals) -> None:
    """Run `worker(*arguments)` in `n` processes that find one another, through torch's elastic
    launcher.

    Returns when all have returned. Raises WorkerError, and prints the traceback of the first that
    failed, when one dies; PrefLabError with the worker's own message when that is what it raised.
    The rest are stopped first.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if 0 < torch.cuda.device_count() < n:
        raise ConfigError(
            f"world_size={n}: each worker needs a GPU of its own, and there are"
            f" {torch.cuda.device_count()}; lower it"
        )
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # we say ourselves what went wrong
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
            rdzv_endpoint=f"localhost:{_free_port(port)}",
            signals_to_handle="SIGHUP",  # the others are ours
        )
        try:
            elastic_launch(settings, _guarded)(worker, arguments, folder)
        except ChildFailedError as failed:
            _tell_why(failed, Path(folder), stop)


def _free_port(port: int | None) -> int:
    """`port` if nothing listens there, else ConfigError; for None a free one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port or 0))
        except OSError as error:
            raise ConfigError(
                f"fsdp_port={port} cannot be used ({error.strerror}); take another, or"
                " fsdp_port=null for a free one"
            ) from error
        return probe.getsockname()[1]


def _guarded(worker: Callable, arguments: tuple, folder: str) -> None:
    """In the worker: leave what goes wrong where the starting process finds it."""
    try:
        worker(*arguments)
    except SystemExit:  # another rank says why
        raise
    except BaseException as error:
        known = isinstance(error, PrefLabError)
        told = {
            "message": str(error),
            "known": known,
            "traceback": traceback.format_exc(),
            "time": time.time(),
        }
        (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(told), encoding="utf-8")
        # The starting process prints the error once. The stream stays open until this one ends.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        raise SystemExit(1) from None


def _tell_why(failed, folder: Path, stop: StopSignals) -> None:
    """Raise for the worker that failed first: the errors of the others follow from it."""
    told = [
        (json.loads(path.read_text(encoding="utf-8")), path.stem) for path in folder.glob("*.json")
    ]
    rank, failure = failed.get_first_failure()
    aborted = {
        int(who)
        for _, who in told
        if int(who) in failed.failures and failed.failures[int(who)].exitcode == -signal.SIGABRT
    }
    for other, died in failed.failures.items():
        if died.exitcode < 0 and died.exitcode != -signal.SIGTERM and other not in aborted:
            rank, failure = (
                other,
                died,
            )  # killed from outside; what the others raised follows from it
    if (
        failure.exitcode < 0 and rank not in aborted
    ):  # a rank that said what is wrong may still abort on its way out
        if stop.received is not None and -failure.exitcode == stop.received:
            return  # before it could listen; nothing had begun
        name = signal.Signals(-failure.exitcode).name
        raise WorkerError(
            f"worker {rank} was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''};"
            " all workers were stopped"
        ) from failed
    if not told:
        raise WorkerError(
            f"worker {rank} ended with exit code {failure.exitcode}; all workers were stopped"
        ) from failed
    first, rank = min(told, key=lambda pair: pair[0]["time"])
    if first["known"]:
        raise PrefLabError(first["message"])
    print(first["traceback"], file=sys.stderr)
    raise WorkerError(f"worker {rank} died of the error above; all workers were stopped")
