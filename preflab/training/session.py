"""What every loop of a run shares: evaluating, saving, stopping, continuing and ending."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from preflab.distributed.signals import Stopped, StopSignals
from preflab.training.checkpointer import Checkpointer
from preflab.training.learner import Learner
from preflab.training.metrics import MetricLog, rewind
from preflab.training.summary import write_summary

logger = logging.getLogger(__name__)

ROWS = ("metrics.jsonl", "samples.jsonl")  # files of rows that say after how many examples


class Session:
    """A run in its folder, around a learner.

    evaluator: has `evaluate(policy, reference, layout, examples=n) -> dict`. loop_state: what the
    loop wants in a checkpoint, numbers and plain containers. number: of the next checkpoint; it
    grows with what a checkpoint holds. also: what else has `save` and `load` as a learner has, by
    the folder inside a checkpoint that it is saved in.
    """

    def __init__(
        self,
        learner: Learner,
        evaluator: Any,
        checkpointer: Checkpointer,
        log: MetricLog,
        stop: StopSignals,
        *,
        loop_state: Callable[[], dict],
        number: Callable[[], int],
        also: dict[str, Any] | None = None,
    ):
        self.learner, self.evaluator, self.checkpointer = learner, evaluator, checkpointer
        self.log, self.stop = log, stop
        self.loop_state, self.number, self.also = loop_state, number, also or {}
        self.settings, self.world = learner.settings, learner.world
        self.run_dir = checkpointer.run_dir
        self.last_eval: dict | None = None
        self.best_accuracy = -1.0
        self._started = 0.0

    # ------------------------------------------------------------------------------------ evaluate

    def evaluate(self, **more: Any) -> None:
        """Evaluate the learner's policy: a row of metrics.jsonl that starts with `more`."""
        learner = self.learner
        values = more | self.evaluator.evaluate(
            learner.policy,
            learner.reference,
            learner.layout,
            examples=learner.counters.examples,
        )
        self.write("eval", values)
        self.last_eval = {"examples": learner.counters.examples, **values}

    def write(self, split: str, values: dict) -> None:
        """A row of metrics.jsonl that says where the run is."""
        self.log.write_at(self.learner.counters, split, values)

    # ---------------------------------------------------------------------------- saving, resuming

    def save(self, *, wait: bool = False) -> None:
        """Begin a checkpoint; wait: until it is on the disk."""
        self.checkpointer.begin(self.number(), self._fill, best=self._is_best())
        if wait:
            self.checkpointer.finish()

    def _fill(self, folder: Path) -> Future | None:
        state = self.loop_state() | {
            "last_eval": self.last_eval,
            "best_accuracy": self.best_accuracy,
        }
        futures = [self.learner.save(folder, state, self.last_eval or {})]
        for name, other in self.also.items():
            (folder / name).mkdir(exist_ok=True)
            futures.append(other.save(folder / name, {}, {}))
        pending = [future for future in futures if future is not None]
        return _All(pending) if pending else None

    def _is_best(self) -> bool:
        """Whether a reward model orders more held-out pairs correctly than at any earlier save.

        Policies are not ranked by that.
        """
        last = self.last_eval or {}
        current = last.get("examples") == self.learner.counters.examples
        if not self.learner.scalar or not current:
            return False
        if last["rewards_eval/accuracies"] <= self.best_accuracy:
            return False
        self.best_accuracy = last["rewards_eval/accuracies"]
        return True

    def resume(self) -> dict | None:
        """Continue from the checkpoint that the learner was built from, if there was one; returns
        the state of the loop.

        Rows that were written after the checkpoint are dropped, and those of a start that left no
        checkpoint.
        """
        checkpoint, state = self.learner.checkpoint, None
        if checkpoint is not None:
            for name, other in self.also.items():
                other.load(checkpoint / name)
            state = self.learner.load(checkpoint)
            self.last_eval, self.best_accuracy = state["last_eval"], state["best_accuracy"]
            counters = self.learner.counters
            logger.info(
                f"continuing {self.run_dir} from step {counters.steps}"
                f" ({counters.examples:,} examples)"
            )
        if self.world.rank == 0:
            last = self.learner.counters.examples if checkpoint is not None else -1
            for name in ROWS:
                rewind(self.run_dir / name, last)
            (self.run_dir / "summary.json").unlink(missing_ok=True)
        self._started = time.perf_counter() - self.learner.counters.seconds
        return state

    # ---------------------------------------------------------------------------- stopping, ending

    def tick(self) -> None:
        """Note how long the run has taken, over all its parts."""
        self.learner.counters.seconds = time.perf_counter() - self._started

    def stop_if_asked(self) -> None:
        """Save, and raise Stopped, if a signal asked any rank to stop."""
        if signum := self.stop.anywhere(self.world):
            self.save(wait=True)
            self.log.finish()
            raise Stopped(signum)

    def finish(self, *, temperature: float, **more: Any) -> dict:
        """Save, write summary.json and return its content; more: further keys of it."""
        self.save(wait=True)
        summary = write_summary(
            self.run_dir,
            self.settings,
            self.learner.loss.name,
            self.last_eval or {},
            self.learner.counters,
            self.world,
            temperature=temperature,
            state_bytes=self.learner.state_bytes,
            save_peaks=self.checkpointer.peaks,
            **more,
        )
        self.log.finish()
        return summary


class _All:
    """Several futures as one."""

    def __init__(self, futures: list[Future]):
        self._futures = futures

    def result(self) -> None:
        for future in self._futures:
            future.result()
