"""Checkpoint folders, each complete or absent, and the state of optimizer and random generators."""

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
    """The newest complete checkpoint, None without one. Deletes what a killed save has written."""
    for leftover in run_dir.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    steps = _steps(run_dir)
    return steps[-1] if steps else None


def _steps(run_dir: Path) -> list[Path]:
    steps = [path for path in run_dir.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


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


def save_optimizer(
    optimizer, names: list[str], folder: Path, group=None
) -> tuple[dict, Future | None]:
    """Write the optimizer's tensors to `folder`, each rank its shards.

    names: of the parameters, in the optimizer's order. group: a process group for writing in the
    background; without one, this process writes alone and at once. Returns the rest of the state,
    for `load_optimizer`, and a future if tensors are still being written. The files can be read on
    any number of ranks.
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
    # Nothing is copied ahead. torch would wait for the copies of one GPU only, and the tensors may
    # be on several; in the background its thread would open the first GPU instead of the rank's.
    writer = dcp.FileSystemWriter(str(folder), per_thread_copy_ahead=0)
    if group is None:
        with _without_warnings():
            dcp.save(tensors, storage_writer=writer, no_dist=True)
        return state, None
    return state, dcp.async_save(tensors, storage_writer=writer, process_group=group)


def load_optimizer(optimizer, names: list[str], folder: Path, state: dict, *, alone: bool) -> None:
    """Read what `save_optimizer` wrote, into an optimizer over the same parameters.

    They may be sharded differently now. state: what `save_optimizer` returned. alone: whether this
    process reads by itself. Raises ConfigError when the parameters have other names.
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
        with _without_warnings():
            dcp.load(tensors, checkpoint_id=str(folder), no_dist=alone)
    loaded = {name: dict(values) for name, values in state["small"].items()}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        loaded.setdefault(name, {})[slot] = tensor
    by_index = {names.index(name): values for name, values in loaded.items()}
    groups = _param_groups(optimizer, state["settings"])
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def _param_groups(optimizer, settings: dict) -> list[dict]:
    """The optimizer's groups as in its state dict, with saved settings such as betas."""
    index = {id(parameter): i for i, parameter in enumerate(_parameters(optimizer))}
    groups = []
    for group in optimizer.param_groups:
        # Which kernels there are depends on this machine, not on the one that saved.
        kernels = {key: group[key] for key in ("fused", "foreach") if key in group}
        parameters = [index[id(parameter)] for parameter in group["params"]]
        groups.append({**group, **settings, **kernels, "params": parameters})
    return groups


def _parameters(optimizer) -> list:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextlib.contextmanager
def _without_warnings():
    """torch warns when one process writes or reads a checkpoint alone, which is intended here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
