"""Wall-clock time, peak memory of a process, and traces of training steps."""

import contextlib
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from utils import atomic_write


class Stopwatch:
    """Sums wall-clock time by part of a run: `with stopwatch("sampling"): ...`.

    seconds: by part, since the start of the run.
    """

    def __init__(self, *parts: str):
        self.seconds = dict.fromkeys(parts, 0.0)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start


class HostMemory:
    """Measures the peak growth of this process's memory: `with HostMemory() as memory: ...`.

    `memory.peak` is in bytes; None where /proc is missing. Only anonymous memory counts, because
    the system can drop pages mapped from files at any time.
    """

    def __enter__(self) -> "HostMemory":
        self._before = self._highest = _anonymous_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()
        self._measure()  # the thread may not have run on a busy machine

    @property
    def peak(self) -> int | None:
        """The peak growth in bytes; None where /proc is missing."""
        return None if self._before is None else self._highest - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._measure()

    def _measure(self) -> None:
        if self._before is not None:
            self._highest = max(self._highest, _anonymous_memory())


def peak_memory() -> int:
    """Peak memory of this process in bytes: on its GPU if it has one, else on the host, where
    libraries and mapped files count too."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _anonymous_memory() -> int | None:
    """Bytes of this process's memory that are not mapped from files."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


class Profiler:
    """Records `steps` training steps with torch.profiler, after two for warm-up.

    Writes profile.json, a trace for Perfetto or chrome://tracing, and profile.txt, the slowest
    operations. steps=None records nothing.
    """

    def __init__(self, run_dir: Path, steps: int | None):
        self.run_dir, self._profile = run_dir, None
        if steps:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
            self._profile = torch.profiler.profile(
                activities=activities, schedule=schedule, on_trace_ready=self._write
            )
            self._profile.start()

    def step(self) -> None:
        """Mark the end of a training step."""
        if self._profile is not None:
            self._profile.step()

    def stop(self) -> None:
        """End the recording; call it after the last step."""
        if self._profile is not None:
            self._profile.stop()

    def _write(self, profile) -> None:
        profile.export_chrome_trace(str(self.run_dir / "profile.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        with atomic_write(self.run_dir / "profile.txt") as f:
            f.write(profile.key_averages().table(sort_by=order, row_limit=40))
