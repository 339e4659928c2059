"""When a run saves, and from which checkpoint it continues."""

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
        self.peaks: list[int] = []  # bytes of host memory that each save took
        self._saving: Saving | None = None

    def latest(self) -> Path | None:
        """The newest complete checkpoint, the same on every rank."""
        return self.world.agree(lambda: latest_checkpoint(self.run_dir))

    def begin(
        self, number: int, fill: Callable[[Path], Future | None], *, best: bool = False
    ) -> None:
        """Begin to write `step-<number>` by `fill(folder)`, after an earlier save has ended.

        What `fill` returns as a future is written while training continues.
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
        """Wait until what was begun is on the disk; raises what went wrong."""
        if self._saving is not None:
            self._saving.wait()
            self._saving = None

    def where(self) -> str:
        """For messages: where the newest weights are."""
        if not self.enabled:
            return "no checkpoint was written (debug=true)"
        return f"the last good weights are in {self.run_dir / 'LATEST'}"
