"""The ranks of a run, and the small values that they exchange.

A run in one process has a world of size 1, where every exchange returns at once. Under torchrun,
under srun with several tasks, and in workers that train.py starts, the first call of `world()`
joins the process group.
"""

import atexit
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from preflab.distributed.signals import Stopped, StopSignals
from utils import ConfigError

# How long a rank waits for another: rank 0 may tokenise a large data set first. When a rank dies,
# the others fail at once.
TIMEOUT = timedelta(hours=3)
# Seconds that a rank waits for the others to start. torchrun ends the others when one has died;
# srun may not, and starts ranks on machines of which some read slowly; nobody watches ranks that
# were started by hand.
WAIT_BY_HAND, WAIT_OF_SRUN = 60.0, 600.0
THREAD_SECONDS = 60.0  # that a process which ends beside a library that hangs waits for a thread
CONNECT_SECONDS = 45.0  # that they then have to connect; NCCL may take minutes on many machines


@dataclass
class World:
    """The ranks of a run.

    rank, size: of this process among all. local_rank, local_size: among those of this machine.
    peers: size of a tensor-parallel group. Its ranks are consecutive, hold parts of the same layers
    and see the same examples. stop: the signals that ask this rank to stop.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    peers: int = 1
    stop: StopSignals = field(default_factory=StopSignals, compare=False)

    @property
    def device(self) -> torch.device:
        """This rank's device: its GPU, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @property
    def no_bar(self) -> bool:
        """The `disable` of `Progress`: rank 0 shows the progress of a loop."""
        return self.rank > 0

    @property
    def data_ranks(self) -> int:
        """Number of ranks, or groups of peers, that see different examples."""
        return self.size // self.peers

    @property
    def data_rank(self) -> int:
        """Number of this rank, or of its group of peers, among `data_ranks`."""
        return self.rank // self.peers

    def share(self, items):
        """This rank's part of `items`, which are equal on all ranks. Sizes differ by at most 1."""
        return items[self.data_rank :: self.data_ranks]

    def largest_share(self, n: int) -> int:
        """Number of items of the rank with the largest share of `n` items."""
        return -(-n // self.data_ranks)

    def batches(self, items, size: int) -> Iterator[tuple[Any, int]]:
        """This rank's share of `items` in batches, each with the number of its items that count.

        All ranks get the same number of batches, because a sharded model runs on all of them
        together. A rank with fewer items gets stand-ins, of which 0 items count.
        """
        mine = self.share(items)
        for begin in range(0, self.largest_share(len(items)), size):
            part = mine[begin : begin + size]
            yield (part, len(part)) if len(part) else (items[:1], 0)

    def stop_if_asked(self) -> None:
        """Raise Stopped, on all ranks, if one of them received a signal to stop. All call it."""
        if not self.stop.held and (signum := self.max([self.stop.received or 0])[0]):
            raise Stopped(int(signum))

    def stop_first(self) -> None:
        """`stop_if_asked` for what rank 0 does inside `agree` or `first`; nothing on the others."""
        if self.rank == 0 and self.stop.received:
            raise Stopped(self.stop.received)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the examples of all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM, 1 / self.peers)

    def max(self, values: list[float]) -> list[float]:
        """Maxima over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.MAX, 1.0)

    def _reduce(self, values: list[float], operation, factor: float) -> list[float]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return (tensor * factor).tolist()

    def gather(self, items: list) -> list:
        """The items of all ranks, in the order of the list that `share` was called with."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, items)
        parts = parts[:: self.peers]
        longest = max(map(len, parts))
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def agree(self, decide: Callable[[], Any]) -> Any:
        """The result of `decide()`, called on rank 0, on every rank.

        An error is raised on rank 0; the others exit without a message. Stopped is raised on all.
        """
        decided = error = None
        if self.rank == 0:
            try:
                decided = decide()
            except Exception as raised:
                error = raised
        if self.size > 1:
            box = [decided, error is not None, getattr(error, "signum", None)]
            dist.broadcast_object_list(box, src=0)
            decided, failed, signum = box
            if signum is not None:
                raise Stopped(signum)
            if failed and self.rank > 0:
                raise SystemExit(2)
        if error is not None:
            raise error
        return decided

    def raise_together(self, error: BaseException | None) -> None:
        """Raise the error of the first rank that has one. The others exit without a message. All
        call it."""
        first = self.max([float(self.size - self.rank) if error is not None else 0.0])[0]
        if first == self.size - self.rank:
            raise error
        if first:
            raise SystemExit(2)

    def first(self, function: Callable[[], Any]) -> Any:
        """`function()`, called on rank 0 first and then on the others.

        Rank 0 fills caches for the others. An error is raised on rank 0; the others exit without a
        message.
        """
        if self.size == 1:
            return function()
        results = []
        self.agree(lambda: results.append(function()))
        return results[0] if results else function()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=dist.group.WORLD)


ALONE = World()


_world: World | None = None
_has_had_group = False  # whether this process has been in a process group
_waits = True  # whether its end waits for libraries


def world() -> World:
    """The ranks of this run. The first call joins the process group.

    Raises ConfigError if the ranks cannot meet.
    """
    global _world
    if _world is None:
        _world = _join()
    return _world


def ranks_given() -> tuple[int, int, int, int] | None:
    """(rank, size, local rank, local size) from torchrun or srun; None in a single process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        size = int(env["WORLD_SIZE"])
        return (
            int(env["RANK"]),
            size,
            int(env.get("LOCAL_RANK", 0)),
            int(env.get("LOCAL_WORLD_SIZE", size)),
        )
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"])  # such as 8(x2)
        return (
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env["SLURM_LOCALID"]),
            int(tasks.split("(")[0].split(",")[0]),
        )
    return None


def _join() -> World:
    given = ranks_given()
    if given is None:
        return World()
    rank, size, local_rank, local_size = given
    if "RANK" not in os.environ:  # srun gives the ranks, but no address where they meet
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
        os.environ.setdefault("MASTER_ADDR", _first_host())
        job = int(os.environ.get("SLURM_JOB_ID", 0)) * 7 + int(os.environ.get("SLURM_STEP_ID", 0))
        os.environ.setdefault("MASTER_PORT", str(_port_of_command_line() or 20_000 + job % 20_000))
    joined = World(rank, size, local_rank, local_size)
    try:
        here = {"rank": rank, "world_size": size, "device": joined.device}
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends the ranks when one has died
            _init_process_group(**here)
        else:
            store = _meet(rank, size)
            seconds = CONNECT_SECONDS if joined.device.type == "cpu" else WAIT_OF_SRUN
            with _ends_the_process_after(seconds, rank, size):
                _init_process_group(store=store, **here)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"the ranks cannot meet at {where} ({str(error).splitlines()[0]}); set fsdp_port to a"
            " free port"
        ) from error
    return joined


def _meet(rank: int, size: int) -> dist.Store:
    """The store of a run that torchrun does not watch, once all ranks have come to it.

    Raises ConfigError, with the ranks that are missing, where they have not come in time.
    """
    seconds = WAIT_OF_SRUN if "SLURM_PROCID" in os.environ else WAIT_BY_HAND
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not (port or "").isdigit():
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, and MASTER_ADDR={host} and MASTER_PORT={port} do not say"
            " where the ranks meet; set them, or start the command with torchrun"
        )
    end = time.monotonic() + seconds
    missing = [] if rank == 0 or _answers(host, int(port), end) else ["0"]
    if not missing:
        store = dist.TCPStore(
            host, int(port), size, rank == 0, timedelta(seconds=seconds), wait_for_workers=False
        )
        store.set(f"here/{rank}", "")
        missing = _missing(store, rank, size, end)
    if missing:
        raise ConfigError(
            f"rank {rank} of {size} waited up to {seconds:.0f} s at {host}:{port} for rank"
            f" {', '.join(missing)}, which has not come; look for its error, and start all ranks"
            " together"
        )
    return dist.PrefixStore("ranks", store)


def _answers(host: str, port: int, end: float) -> bool:
    """Wait until somebody listens at a port, at most until `end`; returns whether one does."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5.0) as s:
            # A port of this machine from which connections are made can be connected to itself.
            if s.getsockname() != s.getpeername():
                return True
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # free it
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def _missing(store: dist.Store, rank: int, size: int, end: float) -> list[str]:
    """Wait until all ranks have come to the store; returns those that have not when rank 0's time
    is over."""
    others = [str(other) for other in range(size) if other != rank]
    while others := [other for other in others if not store.check([f"here/{other}"])]:
        if rank == 0 and time.monotonic() > end:
            store.set("missing", ",".join(others))
            time.sleep(2.0)  # the others read it: the store ends with this process
            return others
        if rank > 0 and store.check(["missing"]):
            return store.get("missing").decode().split(",")
        time.sleep(0.05)
    return []


@contextlib.contextmanager
def _ends_the_process_after(seconds: float, rank: int, size: int) -> Iterator[None]:
    """Bound what is done inside, where a rank waits in torch's code for the others: one that has
    come to the store and died since would be waited for as long as for one that tokenises."""

    def end() -> None:
        print(
            f"error: rank {rank} of {size} waited {seconds:.0f} s for the others to connect, one of"
            " which came and has died since; look for its error, and start all ranks together",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def join_alone() -> None:
    """Make a process group of this process alone, for code that needs one, unless there is one."""
    if not dist.is_initialized():
        _init_process_group(rank=0, world_size=1, device=World().device, store=dist.HashStore())


def _init_process_group(*, device: torch.device, **options) -> None:
    global _has_had_group
    _has_had_group = True
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device, **options)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT, **options)
        atexit.register(leave)  # otherwise the threads of gloo abort the process


def leave() -> None:
    """Leave the process group, at the end of a successful run."""
    global _world
    _world = None
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def ends_safely() -> Iterator[None]:
    """Inside is the whole work of a process, which ends with `end_process` if it has been in a
    process group or must not wait, whatever it ends with; its exit code and its messages are those
    of Python."""
    error = None
    try:
        yield
    except BaseException as raised:
        if _waits and not _has_had_group:
            raise
        error = raised
    if _has_had_group or not _waits:
        end_process(exit_code(error))


def exit_code(error: BaseException | None) -> int:
    """The exit code of a process that ends with an error, which is printed as Python does."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    sys.excepthook(type(error), error, error.__traceback__)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def wait_for_no_library() -> None:
    """Have this process end without what libraries do at its end: one of them hangs."""
    global _waits
    _waits = False


def end_process(code: int) -> NoReturn:
    """End this process as Python does, up to the end of the interpreter itself.

    A thread of gloo frees the tensors of an exchange after the exchange is complete, and locks the
    interpreter for that. In one that has ended the lock ends the thread, inside a destructor: that
    aborts the process, also when its work is done. A process group has no call that waits for it.
    """
    try:
        if _waits:
            threading._shutdown()
            atexit._run_exitfuncs()
        else:
            for thread in threading.enumerate():
                if not thread.daemon and thread is not threading.current_thread():
                    thread.join(THREAD_SECONDS)  # such as one that writes a checkpoint
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get(
        "SLURM_JOB_NODELIST", "localhost"
    )
    if int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) == 1:
        return "localhost"
    return subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    ).stdout.split()[0]


def _port_of_command_line() -> str | None:
    """fsdp_port on the command line: under srun the ranks meet before the config is composed."""
    ports = [word.split("=", 1)[1] for word in sys.argv[1:] if word.startswith("fsdp_port=")]
    return ports[-1] if ports and ports[-1].isdigit() else None
