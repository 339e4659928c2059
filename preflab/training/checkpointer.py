"""Writes the checkpoints of a run, and finds the one it continues from."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

from preflab.distributed.process_group import World
from preflab.training.checkpoints import Saving, latest_checkpoint, save_checkpoint
from preflab.training.profiling import HostMemory


class Checkpointer:
    """The checkpoints of a run folder.

    keep: how many of the newest to keep, None for all. keep_steps: numbers of checkpoints that are
    kept beside them. enabled: False for a run that saves nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        *,
        keep: int | None,
        keep_steps: Collection[int] = (),
        enabled: bool = True,
    ):
        self.run_dir, self.world, self.enabled = run_dir, world, enabled
        self.keep, self.keep_steps = keep, keep_steps
        self._saving: Saving | None = None
        self._peaks: list[int] = []  # peak bytes of host memory of each save
        # Of this process: checkpoints, bytes of the last, seconds of writing and of waiting for it.
        self._saves, self._n_bytes = 0, 0
        self._write_seconds, self._wait_seconds = 0.0, 0.0

    def latest(self) -> Path | None:
        """The newest complete checkpoint, the same on every rank."""
        return self.world.agree(lambda: latest_checkpoint(self.run_dir))

    def begin(
        self,
        number: int,
        fill: Callable[[Path], Callable[[], None] | None],
        *,
        best: bool = False,
        wait: bool = False,
    ) -> None:
        """Write `step-<number>` by `fill(folder)`, as `save_checkpoint` does.

        Waits for an earlier save first. What `fill` returns is called in the background, unless
        `wait` asks to return only when the checkpoint is complete.
        """
        if not self.enabled:
            return
        self.finish()
        begun = time.perf_counter()
        with HostMemory() as memory:
            self._saving = save_checkpoint(
                self.run_dir,
                number,
                fill,
                keep=self.keep,
                keep_steps=self.keep_steps,
                best=best,
                world=self.world,
            )
            self._wait_seconds += time.perf_counter() - begun
            if wait:
                self.finish()
        if memory.peak is not None:
            self._peaks.append(memory.peak)

    def is_named(self, number: int) -> bool:
        """Whether `step-<number>` is one of those that the settings name."""
        return number in self.keep_steps

    def raise_failure(self) -> None:
        """Raise the error that the last save has ended with on some rank, if it has. All ranks call
        it. Does not wait."""
        if self._saving is not None:
            self.world.raise_together(self._saving.error)

    def finish(self) -> None:
        """Wait until the last save is complete on all ranks, which call it. Raises the error that
        it ended with."""
        saving = self._saving
        if saving is None:
            return
        begun = time.perf_counter()
        self.wait_here()
        self.world.raise_together(saving.error)
        self._wait_seconds += time.perf_counter() - begun
        self._write_seconds += saving.seconds
        self._saves, self._n_bytes = self._saves + saving.is_new, saving.n_bytes

    def wait_here(self) -> None:
        """Wait until this rank has written its part of the last save, without an error."""
        if self._saving is not None:
            self._saving.join()
        self._saving = None

    def summary(self) -> dict:
        """Keys of summary.json, of the saves of this process."""
        return {
            "saves": self._saves,
            "checkpoint_bytes": self._n_bytes,
            "checkpoint_write_seconds": self._write_seconds,
            "checkpoint_wait_seconds": self._wait_seconds,
            "save_peak_host_mib": max(self._peaks) / 2**20 if self._peaks else None,
        }

    def where(self) -> str:
        """Where the newest weights are, as a clause of an error message."""
        if not self.enabled:
            return "no checkpoint was written (debug=true)"
        return f"the last good weights are in {self.run_dir / 'LATEST'}"
