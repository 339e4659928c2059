"""Checkpoints: complete or absent, the last k kept, and all that a resumed run needs to go on bit
for bit."""

import contextlib
import os
import random
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from preflab.distributed.process_group import ALONE, World
from utils import ConfigError, finish_directory


@dataclass
class Counters:
    """Where a run is. seconds, train_seconds: wall-clock time so far, all of it and in training
    steps."""

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
    """Write `run_dir/step-N` by calling `fill(folder)` on every rank, point LATEST at it, drop all
    but the `keep` newest.

    best: point BEST at it as well; what BEST points to is never dropped.

    What `fill` still writes in the background it returns as a future. The folder gets its name, and
    LATEST its target, by a rename once all is written: a kill at any moment leaves the previous
    checkpoint.
    """
    folder = run_dir / f"step-{step}"
    temporary = world.agree(
        lambda: (
            None
            if folder.is_dir()
            else Path(tempfile.mkdtemp(dir=run_dir, prefix=f".{folder.name}."))
        )
    )
    future = None
    if temporary is not None:
        try:
            future = fill(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        world.barrier()  # what each rank wrote itself is there
    return Saving(temporary, folder, keep, best, future, commits=world.rank == 0)


class Saving:
    """A checkpoint on its way to the disk; `wait` returns when it has its name, and raises what
    went wrong."""

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
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _finish(self, temporary, folder, keep, best, future, commits) -> None:
        try:
            if future is not None:
                future.result()
            if commits:
                if temporary is not None:
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
    stays = {folder.resolve(), (folder.parent / "BEST").resolve()}
    for old in _steps(folder.parent)[:-keep] if keep is not None else ():
        if old.resolve() not in stays:
            shutil.rmtree(old)


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
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, keys.tolist(), *rest],
        "python": [version, list(numbers), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(tuple(state["numpy"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if torch.cuda.is_available() and "cuda" in state:
        for i, of_gpu in enumerate(
            state["cuda"][: torch.cuda.device_count()]
        ):  # there may have been more
            torch.cuda.set_rng_state(of_gpu, i)


def save_optimizer(
    optimizer, names: list[str], folder: Path, group=None
) -> tuple[dict, Future | None]:
    """Write the optimizer's tensors, each rank its own part, and return what is small, with a
    future while writing goes on.

    names: of the parameters, in the optimizer's order. group: a process group for writing in the
    background; without one, this process alone writes, now. The files can be read on any number of
    ranks.
    """
    tensors, small = {}, {}
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                tensors[f"{name}/{key}"] = value
            else:
                small.setdefault(name, {})[key] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    state = {
        "small": small,
        "dtypes": {key: str(value.dtype) for key, value in tensors.items()},
        "settings": groups[0],
    }
    if not tensors:
        return state, None
    if group is None:
        # Nothing is copied ahead: torch would wait for the copies of one GPU, and the tensors may
        # be on several.
        with _quiet():
            dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(str(folder), per_thread_copy_ahead=0),
                no_dist=True,
            )
        return state, None
    # Nor here, where the writing thread would open the first GPU for it, whatever the rank's own.
    return state, dcp.async_save(
        tensors,
        storage_writer=dcp.FileSystemWriter(str(folder), per_thread_copy_ahead=0),
        process_group=group,
    )


def load_optimizer(optimizer, names: list[str], folder: Path, state: dict, *, alone: bool) -> None:
    """Read what `save_optimizer` wrote into an optimizer over the same parameters, however they are
    sharded now.

    Raises ConfigError when the parameters have other names.
    """
    parameters = dict(zip(names, _parameters(optimizer), strict=True))
    saved = {key.rpartition("/")[0] for key in state["dtypes"]} | set(state["small"])
    if saved and saved != set(names):
        raise ConfigError(
            f"{folder.parent} holds the optimizer of parameters such as {min(saved ^ set(names))},"
            " which this run does not train the same way; continue it with the trainer and the"
            " model it was started with"
        )
    tensors = {}
    for key, dtype in state["dtypes"].items():
        tensors[key] = torch.zeros_like(
            parameters[key.rpartition("/")[0]],
            dtype=getattr(torch, dtype.removeprefix("torch.")),
            requires_grad=False,
        )
    if tensors:
        with _quiet():
            dcp.load(tensors, checkpoint_id=str(folder), no_dist=alone)
    loaded = {name: dict(values) for name, values in state["small"].items()}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        loaded.setdefault(name, {})[slot] = tensor
    groups, index = [], {id(parameter): i for i, parameter in enumerate(_parameters(optimizer))}
    for group in optimizer.param_groups:
        kernels = {
            key: group[key] for key in ("fused", "foreach") if key in group
        }  # what can be had here, not where it was saved
        groups.append(
            {
                **group,
                **state["settings"],
                **kernels,
                "params": [index[id(p)] for p in group["params"]],
            }
        )
    optimizer.load_state_dict(
        {
            "state": {names.index(name): values for name, values in loaded.items()},
            "param_groups": groups,
        }
    )


def _parameters(optimizer) -> list:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextlib.contextmanager
def _quiet():
    """torch warns that a checkpoint is written by one process, which is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
