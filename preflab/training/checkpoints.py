"""Checkpoint folders, each complete or absent, and the state of random generators."""

import contextlib
import json
import logging
import os
import random
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from preflab.distributed.process_group import ALONE, World
from preflab.distributed.signals import Stopped
from utils import ConfigError, finish_directory, wrong_size

logger = logging.getLogger(__name__)

SIZES = "sizes.json"
# Folders that others read, and a run does not continue from; they may be moved or deleted.
EXPORTS = {"hf", "adapter"}


@dataclass
class Counters:
    """Where a run is.

    seconds, train_seconds: wall-clock time so far, in total and in training steps.
    """

    examples: int = 0
    steps: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0


def save_checkpoint(
    run_dir: Path,
    step: int,
    fill: Callable[[Path], Future | None],
    *,
    keep: int | None,
    best: bool = False,
    world: World = ALONE,
) -> "Saving":
    """Write `run_dir/step-N`, point LATEST at it, and delete all but the `keep` newest.

    fill: called on every rank with the folder to fill; returns a future for what it still writes in
    the background. A step that is on disk already is not written again. keep: None keeps all. best:
    point BEST at the checkpoint too; the one that BEST points to is never deleted.

    The folder gets its name, and LATEST its target, by a rename once everything is written, so a
    kill at any moment leaves the previous checkpoint in place.
    """
    folder = run_dir / f"step-{step}"

    def make_temporary() -> Path | None:
        if folder.is_dir():
            return None
        return Path(tempfile.mkdtemp(dir=run_dir, prefix=f".{folder.name}."))

    temporary = world.agree(make_temporary)
    future = None
    if temporary is not None:
        try:
            future = fill(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        world.barrier()  # every rank has written its files
    return Saving(temporary, folder, keep, best, future, commits=world.rank == 0)


class Saving:
    """A checkpoint that is being written, by a thread if part of it is written in the background.

    temporary: the folder that becomes `folder`; None where that exists already. future: what is
    still being written. commits: whether this rank renames, links and deletes.
    """

    def __init__(
        self,
        temporary: Path | None,
        folder: Path,
        keep: int | None,
        best: bool,
        future: Future | None,
        *,
        commits: bool,
    ):
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._finish, args=(temporary, folder, keep, best, future, commits)
        )
        self._thread.start()
        if future is None:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is complete. Raises the error that writing it ended with."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _finish(self, temporary, folder, keep, best, future, commits) -> None:
        try:
            if future is not None:
                future.result()
            if commits:
                if temporary is not None:
                    _write_sizes(temporary)
                    finish_directory(temporary, folder)
                for name in ("LATEST", "BEST") if best else ("LATEST",):
                    _point(folder.parent / name, folder)
                _drop_old(folder, keep)
        except BaseException as error:
            self._error = error
            if temporary is not None and commits:
                shutil.rmtree(temporary, ignore_errors=True)


def _point(link: Path, folder: Path) -> None:
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name)
    os.replace(new, link)


def _drop_old(folder: Path, keep: int | None) -> None:
    if keep is None:
        return
    protected = {folder.resolve(), (folder.parent / "BEST").resolve()}
    for old in _steps(folder.parent)[:-keep]:
        if old.resolve() not in protected:
            shutil.rmtree(old)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, None without one. Deletes what a killed save has written.

    Checkpoints with missing or cut files get a name that is no checkpoint's, with a warning, and
    the one before them is taken. Raises ConfigError if all are damaged.
    """
    for leftover in run_dir.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for link in ("LATEST", "BEST"):
        for leftover in run_dir.glob(f".{link}.*"):
            leftover.unlink()
    steps = _steps(run_dir)
    damages = {}
    while steps and (damage := damage_of(steps[-1])):
        damages[steps.pop()] = damage
    if not damages:
        return steps[-1] if steps else None
    reasons = "; ".join(f"{folder}: {damage}" for folder, damage in damages.items())
    if not steps:
        raise ConfigError(
            f"no checkpoint is complete ({reasons}); restore the files, or delete these folders to"
            " start from the beginning"
        )
    for folder in damages:
        _set_aside(folder)
    _point(run_dir / "LATEST", steps[-1])
    logger.warning(
        f"continuing from {steps[-1].name}, damaged checkpoints are set aside: {reasons}"
    )
    return steps[-1]


def newest_step(run_dir: Path) -> int:
    """N of the newest `step-N` of a run folder, 0 without one."""
    steps = _steps(run_dir)
    return int(steps[-1].name.removeprefix("step-")) if steps else 0


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(f"damaged-{folder.name}")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    best = folder.parent / "BEST"
    if best.is_symlink() and not best.exists():
        best.unlink()


def _write_sizes(folder: Path) -> None:
    """Write the sizes of the files that a run continues from, which are all but the exports."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not EXPORTS.intersection(path.relative_to(folder).parts)
    }
    (folder / SIZES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def damage_of(folder: Path) -> str:
    """The first file of a checkpoint that is missing or has another size than when it was saved;
    empty if there is none, and for a checkpoint of a version that wrote no sizes."""
    path = folder / SIZES
    if not path.is_file():
        return "" if (folder / "policy.pt").is_file() else "it has no policy.pt"
    try:
        sizes = {str(name): int(size) for name, size in json.loads(path.read_bytes()).items()}
    except (ValueError, AttributeError, TypeError):
        return f"{SIZES} is not what was saved"
    for name, size in sizes.items():
        if damage := wrong_size(folder, name, size):
            return damage
    return ""


def _steps(run_dir: Path) -> list[Path]:
    steps = [path for path in run_dir.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


@contextlib.contextmanager
def undone_when_stopped(undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Undo what a signal interrupts inside: `undo()`, and the random numbers that were drawn."""
    before = random_state()
    try:
        yield
    except Stopped:
        undo()
        set_random_state(before)
        raise


def random_state() -> dict:
    """State of all random number generators, as tensors and plain numbers."""
    generator, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [generator, keys.tolist(), *rest],
        "python": [version, list(numbers), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(tuple(state["numpy"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if torch.cuda.is_available() and "cuda" in state:
        here = torch.cuda.device_count()  # there may have been more GPUs
        for i, of_gpu in enumerate(state["cuda"][:here]):
            torch.cuda.set_rng_state(of_gpu, i)
