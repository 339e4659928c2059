"""Writes the checkpoints of a run, and finds the one it continues from."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from preflab.distributed.process_group import World
from preflab.training.checkpoints import Saving, latest_checkpoint, save_checkpoint
from preflab.training.profiling import HostMemory


class Checkpointer:
    """The checkpoints of a run folder.

    keep: how many to keep, None for all. enabled: False for a run that saves nothing.
    """

    def __init__(self, run_dir: Path, world: World, *, keep: int | None, enabled: bool = True):
        self.run_dir, self.world, self.keep, self.enabled = run_dir, world, keep, enabled
        self.peaks: list[int] = []  # peak bytes of host memory of each save
        self._saving: Saving | None = None

    def latest(self) -> Path | None:
        """The newest complete checkpoint, the same on every rank."""
        return self.world.agree(lambda: latest_checkpoint(self.run_dir))

    def begin(
        self, number: int, fill: Callable[[Path], Future | None], *, best: bool = False
    ) -> None:
        """Write `step-<number>` by `fill(folder)`, as `save_checkpoint` does.

        Waits for an earlier save first. A future that `fill` returns is pending after this returns.
        """
        if not self.enabled:
            return
        self.finish()
        with HostMemory() as memory:
            self._saving = save_checkpoint(
                self.run_dir, number, fill, keep=self.keep, best=best, world=self.world
            )
        if memory.peak is not None:
            self.peaks.append(memory.peak)

    def finish(self) -> None:
        """Wait until the last save is complete. Raises the error that it ended with."""
        if self._saving is not None:
            self._saving.wait()
            self._saving = None

    def where(self) -> str:
        """Where the newest weights are, as a clause of an error message."""
        if not self.enabled:
            return "no checkpoint was written (debug=true)"
        return f"the last good weights are in {self.run_dir / 'LATEST'}"
