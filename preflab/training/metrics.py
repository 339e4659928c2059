"""Means of a step, and metrics.jsonl."""

import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from preflab.distributed.process_group import World
from preflab.training.checkpoints import Counters
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

    def write_at(self, counters: Counters, split: str, values: dict) -> None:
        """A row that says where the run is: after how many examples and steps."""
        where = {"examples": counters.examples, "step": counters.steps, "split": split}
        progress = {
            "counters/examples": counters.examples,
            "counters/updates": counters.steps,
        }
        self.write(where | values | progress)

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
