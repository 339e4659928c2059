"""The folder of a run."""

import contextlib
import getpass
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from preflab.reports.run_files import read_config, read_summary
from preflab.settings.identity import must_match, same_settings
from preflab.settings.keys import GROUPS, ROOT
from preflab.settings.schema import parse_value
from utils import ConfigError, PrefLabError, in_use, remove_leftovers

# Who has a run folder: the process of the command, and the first of the workers that it starts.
LOCK, WORKERS_LOCK = ".lock", ".lock-workers"

# Functions that look at checkpoints of runs, and train nothing.
COMPARING = ("eval", "atlas")


def register_resolvers(purpose: str | None = None) -> None:
    """The `${here:...}` and `${run_dir:...}` of config.yaml.

    purpose: what a new run folder's name begins with, in place of what `function` says.
    """

    def run_dir(*settings) -> str:
        return choose_run_dir(*settings, purpose=purpose)

    OmegaConf.register_new_resolver("here", lambda path: str(ROOT / path), replace=True)
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True, use_cache=True)


def choose_run_dir(
    local_run_dir: str | None,
    resume: str | None,
    local_dirs: Sequence[str],
    exp_name: str,
    function: str = "train",
    *,
    purpose: str | None = None,
) -> str:
    """`resume`, else `local_run_dir`, else a new folder `<first usable of
    local_dirs>/<user>/<exp_name>_<timestamp>`; the name of an evaluation's begins with `eval_`,
    that of an atlas with `atlas_`."""
    if resume:
        return parse_value("resume", resume)
    if local_run_dir:
        return parse_value("local_run_dir", local_run_dir)
    local_dirs = parse_value(
        "local_dirs",
        OmegaConf.to_container(local_dirs) if OmegaConf.is_config(local_dirs) else local_dirs,
    )
    exp_name = parse_value("exp_name", exp_name)
    purpose = purpose or (function if function in COMPARING else None)
    name = f"{purpose}_{exp_name}" if purpose else exp_name
    from preflab.distributed.process_group import world  # here, for it imports torch

    # Ranks that each read the clock would not meet.
    return world().agree(lambda: _new_run_dir(local_dirs, name))


def _new_run_dir(local_dirs: Sequence[str], name: str) -> str:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S") + f"_{time.time_ns() // 1000 % 10**6:06d}"
    for base in local_dirs:
        folder = Path(base) / getpass.getuser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".write-{stamp}").touch()
            (folder / f".write-{stamp}").unlink()
        except OSError:
            continue
        return str(folder / f"{name}_{stamp}")
    raise ConfigError(
        f"local_dirs={list(local_dirs)}: none of these can be written to; give local_run_dir=DIR"
    )


def saved_config(config: DictConfig, run_dir: Path) -> DictConfig:
    """The config a run was started with, with the plain overrides of this command line on top."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise PrefLabError(f"resume={run_dir}: no config.yaml there; give the run folder itself")
    saved = read_config(path)
    for override in HydraConfig.get().overrides.task:
        key = override.split("=")[0].lstrip("+")
        if key in GROUPS:
            raise PrefLabError(
                f"resume={run_dir} keeps the {key} it was started with; leave {override} out"
            )
        OmegaConf.update(saved, key, OmegaConf.select(config, key))
    return saved


def run_dir_for(config: DictConfig, run_dir: Path) -> Path:
    """`run_dir`, or for an evaluation or an atlas a folder inside it when another run lives there;
    one that was cut short continues."""
    if config.function in COMPARING:
        inner = (run_dir / f"{config.function}-{n}" for n in itertools.count(1))
        folders = itertools.chain([run_dir], inner)
        return next(
            folder
            for folder in folders
            if not (folder / "config.yaml").exists() or _cut_short(folder, config)
        )
    path = run_dir / "config.yaml"
    if config.function in ("train", "online") and path.is_file():
        must_match(read_config(path), config)
    return run_dir


def _cut_short(folder: Path, config: DictConfig) -> bool:
    return not (folder / "summary.json").exists() and same_settings(
        read_config(folder / "config.yaml"), config
    )


def finished_summary(config: DictConfig, run_dir: Path) -> dict | None:
    """The summary of a run that already did all that this command asks for."""
    summary, saved = run_dir / "summary.json", run_dir / "config.yaml"
    if config.function not in ("train", "online") or not (summary.is_file() and saved.is_file()):
        return None
    before = read_config(saved)
    if any(
        OmegaConf.select(before, key) != OmegaConf.select(config, key)
        for key in ("n_epochs", "n_examples", "online.rounds", "online.budget")
    ):
        return None
    return read_summary(run_dir)


@contextlib.contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Inside, no other process on any machine that shares the disk writes to the run folder.

    Raises ConfigError, with who has it, where another one does. A folder in which nothing was
    written is deleted at the end: a refused command leaves none behind.
    """
    with in_use(run_dir / LOCK):
        if (run_dir / WORKERS_LOCK).exists():
            # Workers may outlive the process that started them, for some seconds.
            with in_use(run_dir / WORKERS_LOCK):
                pass
        remove_leftovers(run_dir)
        try:
            yield
        finally:
            if not set(os.listdir(run_dir)) - {LOCK, WORKERS_LOCK}:
                for lock in (LOCK, WORKERS_LOCK):
                    (run_dir / lock).unlink(missing_ok=True)
                run_dir.rmdir()


def remove_if_empty(folder: Path) -> None:
    """A refused command leaves no empty run folder behind."""
    if folder.is_dir() and not os.listdir(folder):
        folder.rmdir()
