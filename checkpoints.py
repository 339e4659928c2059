"""Checkpoints: complete or absent, the last k kept, and all that a resumed run needs to go on bit for bit."""

import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils import atomic_directory


@dataclass
class Counters:
    """Where a run is. seconds, train_seconds: wall-clock time so far, all of it and in training steps."""

    examples: int = 0
    steps: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0


def save_checkpoint(run_dir: Path, step: int, fill: Callable[[Path], None], *, keep: int | None) -> Path:
    """Write `run_dir/step-N` by calling `fill(folder)`, point LATEST at it, then drop all but the `keep` newest.

    The folder gets its name, and LATEST its target, by a rename: a kill at any moment leaves the previous checkpoint.
    """
    folder = run_dir / f"step-{step}"
    if not folder.is_dir():
        with atomic_directory(folder) as temporary:
            fill(temporary)
    link = run_dir / f".LATEST.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, run_dir / "LATEST")
    if keep is not None:
        for old in _steps(run_dir)[:-keep]:
            if old != folder:
                shutil.rmtree(old)
    return folder


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint; clears what a killed save left behind."""
    for leftover in run_dir.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    steps = _steps(run_dir)
    return steps[-1] if steps else None


def _steps(run_dir: Path) -> list[Path]:
    found = [path for path in run_dir.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def random_state() -> dict:
    """State of all random number generators, as tensors and plain numbers."""
    kind, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "numpy": [kind, keys.tolist(), *rest], "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(tuple(state["numpy"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
