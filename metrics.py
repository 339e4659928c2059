"""Metrics: sums on the device, one read-back a flush; JSON lines first, then wandb and the progress
bar."""

import json
import math
import netrc
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from distributed import World
from utils import atomic_write, json_lines


class Sums:
    """Sums of per-example metrics, kept on the device until they are read."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor], n: int) -> None:
        """metrics: (examples,) tensors by name, of which the first `n` count."""
        for name, values in metrics.items():
            total = values[:n].detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + n

    def flush(self, world: World) -> dict[str, float]:
        """Means over all examples that any rank added since the last flush, read back in one
        transfer."""
        if not self._sums:
            return {}
        totals = torch.stack(list(self._sums.values())).tolist()
        both = world.sum([*totals, *map(float, self._counts.values())])
        means = {name: total / n for name, total, n in zip(self._sums, both, both[len(totals) :])}
        self._sums, self._counts = {}, {}
        return means


class Profiler:
    """Records `steps` training steps after two of warm-up, with torch.profiler; None records
    nothing.

    Writes profile.json, a trace that Perfetto and chrome://tracing show, and profile.txt, the
    operations that took longest.
    """

    def __init__(self, run_dir: Path, steps: int | None):
        self.run_dir, self._profile = run_dir, None
        if steps:
            kinds = [torch.profiler.ProfilerActivity.CPU] + [
                torch.profiler.ProfilerActivity.CUDA
            ] * torch.cuda.is_available()
            schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
            self._profile = torch.profiler.profile(
                activities=kinds, schedule=schedule, on_trace_ready=self._write
            )
            self._profile.start()

    def step(self) -> None:
        """To be called after each step."""
        if self._profile is not None:
            self._profile.step()

    def stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()

    def _write(self, profile) -> None:
        profile.export_chrome_trace(str(self.run_dir / "profile.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        with atomic_write(self.run_dir / "profile.txt") as f:
            f.write(profile.key_averages().table(sort_by=order, row_limit=40))


class MetricLog:
    """metrics.jsonl, every row; wandb, at most once in `interval` seconds for train rows. Ranks
    other than 0 write nothing."""

    def __init__(
        self, run_dir: Path, wandb_run=None, interval: float = 1.0, *, writes: bool = True
    ):
        self.path, self.writes = run_dir / "metrics.jsonl", writes
        self.wandb_run, self.interval = wandb_run, interval
        self._last = -math.inf

    def write(self, row: dict) -> None:
        if not self.writes:
            return
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        now = time.monotonic()
        if self.wandb_run is not None and (
            row.get("split") != "train" or now - self._last >= self.interval
        ):
            self._last = now
            numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
            self._tell_wandb(lambda run: run.log(numbers, step=row["step"]))

    def finish(self) -> None:
        self._tell_wandb(lambda run: run.finish())

    def _tell_wandb(self, what) -> None:
        """What goes wrong at wandb's end, its service killed for example, ends the mirror and not
        the run."""
        if self.wandb_run is None:
            return
        try:
            what(self.wandb_run)
        except Exception as error:
            self.wandb_run = None
            print(f"wandb stopped, the run goes on without it: {error}", file=sys.stderr)


def rewind(path: Path, last: int, by: str = "examples") -> None:
    """Drop the rows of a JSON-lines file written after `last` examples (or rounds), and a last line
    that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in json_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.get(by, last) <= last:
            kept.append(line)
    with atomic_write(path) as f:
        f.writelines(line + "\n" for line in kept)


def start_wandb(config, run_dir: Path, resolved: dict):
    """A wandb run, or None when it is off or does not start: logging elsewhere never stops a run,
    nor asks anything.

    Without a configured key it runs offline, into the run folder; `wandb sync` uploads it later.
    """
    if not config.enabled:
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    if "WANDB_MODE" not in os.environ and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
    try:
        import wandb  # slow to import

        return wandb.init(
            entity=config.entity,
            project=config.project,
            name=run_dir.name,
            dir=str(run_dir),
            config=resolved,
            resume="allow",
            settings=wandb.Settings(init_timeout=30, console="off", x_disable_stats=True),
        )
    except Exception as error:  # whatever goes wrong there, the run and its metrics.jsonl go on
        print(f"wandb did not start, the run goes on without it: {error}", file=sys.stderr)
        return None


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
