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
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from preflab.distributed.process_group import ALONE, World
from preflab.distributed.signals import Stopped
from preflab.modeling.weights_io import trained_weights_of
from utils import ConfigError, finish_directory, wrong_size

logger = logging.getLogger(__name__)

SIZES = "sizes.json"
# Folders that others read too. A run continues from the weights of one of them at most; everything
# else in them may be edited or deleted.
EXPORTS = {"hf", "adapter"}
WEIGHTS = re.compile(r"\.safetensors(\.index\.json)?$")


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
    fill: Callable[[Path], Callable[[], None] | None],
    *,
    keep: int | None,
    keep_steps: Collection[int] = (),
    best: bool = False,
    world: World = ALONE,
) -> "Saving":
    """Write `run_dir/step-N`, point LATEST at it, and delete all but the `keep` newest.

    fill: called on every rank with the folder to fill; returns what writes the rest of it, which a
    thread of each rank calls; None where nothing is left to write. A step that is on disk already
    is not written again. keep: None keeps all. keep_steps: numbers of checkpoints that are never
    deleted. best: point BEST at the checkpoint too; the one that BEST points to is never deleted.

    The folder gets its name, and LATEST its target, by a rename once everything is written, so a
    kill at any moment leaves the previous checkpoint in place.
    """
    folder = run_dir / f"step-{step}"

    def make_temporary() -> Path | None:
        if folder.is_dir():
            return None
        return Path(tempfile.mkdtemp(dir=run_dir, prefix=f".{folder.name}."))

    temporary = world.agree(make_temporary)
    write = None
    if temporary is not None:
        try:
            write = fill(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        world.barrier()  # every rank has written its files
    drop = partial(_drop_old, folder, keep, keep_steps) if world.rank == 0 else None
    return Saving(temporary, folder, write, drop, best=best)


def in_order(writes: list[Callable[[], None]]) -> Callable[[], None]:
    """Several functions as one."""

    def write() -> None:
        for one in writes:
            one()

    return write


class Saving:
    """A checkpoint that a thread writes.

    temporary: the folder that becomes `folder`; None where that exists already. write: writes what
    is not in it yet; None if all is. drop: deletes old checkpoints; None on a rank that neither
    renames nor links. `seconds` and `n_bytes` are what it took, known once it is complete.
    `is_new` is False where nothing was to be written. `error`: what writing has ended with, if not
    with a complete checkpoint.
    """

    def __init__(
        self,
        temporary: Path | None,
        folder: Path,
        write: Callable[[], None] | None,
        drop: Callable[[], None] | None,
        *,
        best: bool,
    ):
        self.is_new = temporary is not None
        self.seconds, self.n_bytes = 0.0, 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._finish, args=(temporary, folder, write, drop, best)
        )
        self._thread.start()
        if write is None:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is complete. Raises the error that writing it ended with."""
        self.join()
        if self.error is not None:
            raise self.error

    def join(self) -> None:
        """Wait until writing has ended, with an error or without."""
        self._thread.join()

    def _finish(self, temporary, folder, write, drop, best) -> None:
        begun = time.perf_counter()
        try:
            if write is not None:
                write()
            if drop is not None:
                if temporary is not None:
                    _write_sizes(temporary)
                    finish_directory(temporary, folder)
                for name in ("LATEST", "BEST") if best else ("LATEST",):
                    _point(folder.parent / name, folder)
                self.n_bytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
                drop()
        except BaseException as error:
            self.error = error
            if temporary is not None and drop is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        self.seconds = time.perf_counter() - begun


def _point(link: Path, folder: Path) -> None:
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name)
    os.replace(new, link)


def _drop_old(folder: Path, keep: int | None, keep_steps: Collection[int]) -> None:
    if keep is None:
        return
    named = (folder.parent / f"step-{step}" for step in keep_steps)
    protected = {path.resolve() for path in (folder, folder.parent / "BEST", *named)}
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
    """Write the sizes of the files that a run continues from."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _is_read_again(path)
    }
    (folder / SIZES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _is_read_again(file: Path) -> bool:
    """Whether a run reads a file of a checkpoint when it continues."""
    export = next((parent for parent in file.parents if parent.name in EXPORTS), None)
    if export is None:
        return True
    is_weight = file.parent == export and WEIGHTS.search(file.name)
    return bool(is_weight) and export == trained_weights_of(export.parent)


def damage_of(folder: Path) -> str:
    """The first file of a checkpoint that is missing or has another size than when it was saved;
    empty if there is none, and for a checkpoint of a version that wrote no sizes."""
    path = folder / SIZES
    if not path.is_file():
        return "" if (folder / "policy.pt").is_file() else f"it has no {SIZES}"
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
