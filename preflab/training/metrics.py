"""Means over the examples of a step, and metrics.jsonl."""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from preflab.distributed.process_group import World
from preflab.objective.pushes import with_ratio_and_share
from preflab.reports.run_files import read_lines
from preflab.training.checkpoints import Counters
from utils import atomic_write, drop_incomplete_line


class Sums:
    """Sums of per-example metrics, on the device of the metrics until they are read."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor], n: int) -> None:
        """metrics: (examples,) tensors by name, of which the first `n` count: a batch that stands
        in on a rank without examples has n=0."""
        for name, values in metrics.items():
            total = values[:n].detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + n

    def flush(self, world: World) -> dict[str, float]:
        """Means over all examples that any rank added since the last flush, read back in one
        transfer, and what follows from such means (`with_ratio_and_share`)."""
        if not self._sums:
            return {}
        names = list(self._sums)
        local_sums = torch.stack(list(self._sums.values())).tolist()
        local_counts = map(float, self._counts.values())
        values = world.sum([*local_sums, *local_counts])
        sums, counts = values[: len(names)], values[len(names) :]
        self._sums, self._counts = {}, {}
        means = {
            name: total / count for name, total, count in zip(names, sums, counts, strict=True)
        }
        return with_ratio_and_share(means)


class MetricLog:
    """Writes every row to metrics.jsonl, and to a tracker except for train rows that follow another
    row within `interval` seconds.

    tracker: from `start_tracker`, or None. writes: False on the ranks that write nothing.
    """

    def __init__(self, run_dir: Path, tracker=None, interval: float = 1.0, *, writes: bool = True):
        self.path = run_dir / "metrics.jsonl"
        self.writes = writes
        self.tracker = tracker
        self.interval = interval
        self._last = -math.inf
        if writes:
            drop_incomplete_line(self.path)

    def write(self, row: dict) -> None:
        """Write a row; a float that is NaN or infinite, which JSON does not have, becomes null."""
        if not self.writes:
            return
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        now = time.monotonic()
        if self.tracker is not None and (
            row.get("split") != "train" or now - self._last >= self.interval
        ):
            self._last = now
            numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
            self.tracker.log(numbers, row["step"])

    def write_at(self, counters: Counters, split: str, values: dict) -> None:
        """A row that says where the run is: after how many examples and steps."""
        where = {"examples": counters.examples, "step": counters.steps, "split": split}
        progress = {
            "counters/examples": counters.examples,
            "counters/updates": counters.steps,
        }
        self.write(where | values | progress)


def rewind(path: Path, last: int, by: str = "examples", *, at_most: int | None = None) -> None:
    """Remove the rows of a JSON-lines file whose column `by` is above `last`, those after the first
    `at_most` rows, and a last line that a kill cut short. Raises DataError for another line that is
    no row."""
    if not path.is_file():
        return
    lines = read_lines(path)[:at_most]
    remaining = [line for line, row in lines if row.get(by) is None or row[by] <= last]
    with atomic_write(path) as f:
        f.writelines(line + "\n" for line in remaining)
