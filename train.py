"""Entry point: `python train.py loss=odpo loss.alpha=0.5`. See config/config.yaml for every key."""

import contextlib
import sys
import time
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from preflab.settings.command_line import (
    check_command_line,
    large_imports,
    run_config,
    words_for_hydra,
)
from preflab.settings.keys import CONFIG_DIR
from preflab.settings.overrides import fail
from preflab.settings.refused import machine_errors_named
from preflab.settings.run_folder import register_resolvers, remove_if_empty, saved_config
from utils import PrefLabError

# Modules that import torch are imported inside functions, so that --help, --cfg job and a misspelt
# key are answered at once.

# here and not in main(): hydra's launchers import this module in processes of their own
register_resolvers()


def main() -> None:
    # Our launcher settings carry the name of hydra's own, on purpose: it is the name that users
    # know.
    warnings.filterwarnings(
        "ignore",
        message="(?s).*hydra/launcher/submitit_slurm' is validated against ConfigStore schema",
    )
    with contextlib.ExitStack() as stack:
        if check_command_line(sys.argv[1:]):
            join_ranks(stack)
        sys.argv[1:] = words_for_hydra(sys.argv[1:])
        run_config(run)


def join_ranks(stack: contextlib.ExitStack) -> None:
    """Ranks meet before hydra asks them for a folder. How they end is that of the stack."""
    from preflab.distributed.process_group import ends_safely, world

    stack.enter_context(ends_safely())
    try:
        world()
    except PrefLabError as error:
        fail(error)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
def run(config: DictConfig) -> float | list[float] | None:
    """Run a config; returns the number that a search optimises, see `objective`."""
    with large_imports():
        from preflab.distributed.launch import WorkerError
        from preflab.distributed.process_group import leave, world
        from preflab.distributed.signals import Stopped, StopSignals
        from preflab.execution import execute
        from preflab.modeling.shared_samples import share_samples
        from preflab.sweeps.objective import objective_of

    stop = StopSignals()
    stop.listen()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    try:
        config = saved_config(config, run_dir) if config.resume else config
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            share_samples()
        with machine_errors_named():
            summary = execute(config, run_dir, stop)
        leave()
        return objective_of(config.get("objective") or "policy_reward", summary)
    except PrefLabError as error:
        if world().rank == 0:
            remove_if_empty(run_dir)
        if world().rank > 0 and error.everywhere:
            raise SystemExit(2) from None
        _fail_unless_others_follow(error)
        fail(error)
    except WorkerError as error:
        _fail_unless_others_follow(error)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Stopped as stopped:
        if world().rank == 0:
            begun = (run_dir / "config.yaml").is_file()
            resume = f", or resume={run_dir}, continues" if begun else " starts again"
            print(f"stopped by {stopped}; the same command{resume}", file=sys.stderr)
            remove_if_empty(run_dir)
        _leave_with(128 + stopped.signum, stop)


def _fail_unless_others_follow(error: Exception) -> None:
    """In a sweep, raise an error for its end and go on with the next run."""
    from preflab.distributed.process_group import world

    alone = world().size == 1 or getattr(error, "everywhere", False)
    if HydraConfig.get().mode is RunMode.MULTIRUN and alone:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # The frames of the traceback would keep the models of the run in memory.
        raise error.with_traceback(None) from None


def _leave_with(code: int, stop) -> None:
    """End a run that saved itself, rank 0 last: srun's code must be its, and not that of a rank
    killed on its way out."""
    from preflab.distributed.process_group import leave, ranks_given, world

    rank = world().rank
    leave()
    stop.hand_over()
    if rank > 0:
        raise SystemExit(0)
    if ranks_given() is not None:
        time.sleep(2.0)
    raise SystemExit(code) from None


if __name__ == "__main__":
    from train import main

    main()
