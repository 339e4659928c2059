"""What every training loop shares: evaluating, saving, stopping, resuming and finishing."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Batch
from preflab.distributed.signals import Stopped
from preflab.training.best import Best, metric_of
from preflab.training.checkpointer import Checkpointer
from preflab.training.checkpoints import in_order, undone_when_stopped
from preflab.training.learner import Learner, NonFiniteLossError, NonFiniteStepError
from preflab.training.metrics import MetricLog, rewind
from preflab.training.profiling import Profiler
from preflab.training.summary import write_summary
from utils import Progress, json_lines

logger = logging.getLogger(__name__)

# Files whose rows say after how many examples they were written.
ROWS = ("metrics.jsonl", "samples.jsonl")


class Session:
    """A learner in its run folder.

    evaluator: has `evaluate(policy, reference, layout, ...) -> dict`. loop_state: returns
    the state of the loop for a checkpoint, numbers and plain containers. number: returns N of the
    next checkpoint `step-N`, which must grow whenever the state changes. also: further objects with
    a learner's `save` and `load`, by the folder inside a checkpoint that they are saved in.
    """

    def __init__(
        self,
        learner: Learner,
        evaluator: Any,
        checkpointer: Checkpointer,
        log: MetricLog,
        *,
        loop_state: Callable[[], dict],
        number: Callable[[], int],
        also: dict[str, Any] | None = None,
    ):
        self.learner, self.evaluator, self.checkpointer = learner, evaluator, checkpointer
        self.log = log
        self.loop_state, self.number, self.also = loop_state, number, also or {}
        self.settings, self.world = learner.settings, learner.world
        self.run_dir = checkpointer.run_dir
        self.last_eval: dict | None = None
        self.best = Best(metric_of(self.settings, scalar=learner.scalar), self.settings.patience)
        self.owes_evaluation = False  # whether a signal interrupted the one that was due
        profile_steps = self.settings.profile_steps if self.world.rank == 0 else None
        self.profiler = Profiler(self.run_dir, profile_steps)
        self._started = 0.0

    # ------------------------------------------------------------------------------------- a step

    def step(
        self, data: PreferenceData, microbatches: list[tuple[Batch, int]], examples, bar: Progress
    ) -> None:
        """One optimizer step on `examples` of `data`, and its row of metrics.jsonl.

        Raises NonFiniteStepError and Stopped before the weights change.
        """
        self.checkpointer.raise_failure()
        metrics = self.learner.step(data, microbatches, len(examples))
        self.write("train", metrics)
        speed = f"{metrics['tokens_per_second']:,.0f} tokens/s"
        bar.set_postfix_str(f"loss {metrics['loss/train']:.4g}, {speed}", refresh=False)
        self.profiler.step()

    # ------------------------------------------------------------------------------------ evaluate

    def evaluate(self, **more: Any) -> None:
        """Evaluate the learner's policy, and write a row of metrics.jsonl with `more` first.

        Stopped in between, it leaves no row, and a resumed run owes it.
        """
        learner = self.learner
        self.owes_evaluation = True
        with undone_when_stopped():
            values = more | self.evaluator.evaluate(
                learner.policy,
                learner.reference,
                learner.layout,
                initial_reference=learner.initial_reference,
                examples=learner.counters.examples,
            )
        self.write("eval", values)
        self.last_eval = {"examples": learner.counters.examples, **values}
        self.best = self.world.agree(lambda: self.best.after(values, learner.counters.examples))
        self.owes_evaluation = False

    def write(self, split: str, values: dict) -> None:
        """Write a row of metrics.jsonl with the learner's counters."""
        self.log.write_at(self.learner.counters, split, values)

    # ---------------------------------------------------------------------------- saving, resuming

    def must_save(self) -> bool:
        """Whether the state of now is the best, or a checkpoint that `keep_steps` names."""
        return self.best.is_unsaved or self.checkpointer.is_named(self.number())

    def save(self, *, wait: bool = False) -> None:
        """Begin a checkpoint. wait: return only when it is complete."""
        is_best = self.best.is_unsaved and self.best.examples == self.learner.counters.examples
        self.best.is_unsaved = False
        self.checkpointer.begin(self.number(), self._fill, best=is_best, wait=wait)

    def _fill(self, folder: Path) -> Callable[[], None]:
        state = self.loop_state() | {
            "last_eval": self.last_eval,
            "best": self.best.state_dict(),
            "rows_without_evaluation": self._count_rows() if self.owes_evaluation else None,
        }
        writes = [self.learner.save(folder, state, self.last_eval or {})]
        for name, other in self.also.items():
            (folder / name).mkdir(exist_ok=True)
            writes.append(other.save(folder / name, {}, {}))
        return in_order(writes)

    def _count_rows(self) -> dict[str, int]:
        """Rows of each file, to which none of the evaluation that is due was added."""
        paths = [self.run_dir / name for name in ROWS]
        return {path.name: len(json_lines(path)) for path in paths if path.is_file()}

    def resume(self) -> dict | None:
        """Continue from the checkpoint that the learner was built from.

        Returns the state of the loop; None without a checkpoint. Rows written after the checkpoint
        are deleted, all of them where there is none, and so is summary.json.
        """
        checkpoint, state, rows = self.learner.checkpoint, None, None
        if checkpoint is not None:
            for name, other in self.also.items():
                other.load(checkpoint / name)
            state = self.learner.load(checkpoint)
            self.last_eval = state["last_eval"]
            self.best.load_state_dict(state.get("best") or _best_of_earlier_version(state))
            rows = state.get("rows_without_evaluation")  # unknown to earlier versions
            self.owes_evaluation = rows is not None
            counters = self.learner.counters
            logger.info(
                f"continuing {self.run_dir} from step {counters.steps}"
                f" ({counters.examples:,} examples)"
            )
        if self.world.rank == 0:
            last = self.learner.counters.examples if checkpoint is not None else -1
            for name in ROWS:
                at_most = None if rows is None else rows.get(name, 0)
                rewind(self.run_dir / name, last, at_most=at_most)
            (self.run_dir / "summary.json").unlink(missing_ok=True)
        self._started = time.perf_counter() - self.learner.counters.seconds
        return state

    # ---------------------------------------------------------------------------- stopping, ending

    def tick(self) -> None:
        """Update the wall-clock time of the run, which includes the time before a resume."""
        self.learner.counters.seconds = time.perf_counter() - self._started

    def stop_at_non_finite(
        self, error: NonFiniteStepError, data: PreferenceData, examples
    ) -> NoReturn:
        """Save the weights of the last good step and raise NonFiniteLossError.

        examples: those of the step, which are named where no single loss is to blame.
        """
        self.save(wait=True)
        bad = (error.examples or [int(example) for example in examples])[:8]
        names = ", ".join(data.describe(example) for example in bad)
        raise NonFiniteLossError(
            f"the {error.what} of step {self.learner.counters.steps + 1} is not finite, from"
            f" {names}; {self.checkpointer.where()}; try a smaller lr or max_grad_norm, or look at"
            " these examples"
        ) from None

    @contextlib.contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save before Stopped, raised inside, ends the run. What is being written is completed
        before any other error does."""
        try:
            yield
        except Stopped:
            self.save(wait=True)
            raise
        except BaseException:
            self.checkpointer.wait_here()  # other ranks may have no error
            raise

    def finish(self, *, temperature: float, **more: Any) -> dict:
        """Save, write summary.json and return its content.

        temperature: of the samples in the last evaluation. more: further keys of the summary.
        """
        self.save(wait=True)
        return write_summary(
            self.run_dir,
            self.settings,
            self.learner.loss.name,
            self.last_eval or {},
            self.learner.counters,
            self.world,
            temperature=temperature,
            state_bytes=self.learner.state_bytes,
            **self.checkpointer.summary(),
            **self.best.summary(),
            **more,
        )


def _best_of_earlier_version(state: dict) -> dict:
    """The state of `Best` in a checkpoint that knew the accuracy of reward models alone."""
    accuracy = state.get("best_accuracy", -1.0)
    return {"value": accuracy if accuracy >= 0 else None, "examples": 0, "misses": 0}
