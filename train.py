"""Entry point: `python train.py loss=odpo loss.alpha=0.5`. See config/config.yaml for every key."""

import contextlib
import json
import os
import socket
import sys
import time
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import losses  # noqa: F401  registers the losses
import preference_datasets  # noqa: F401  registers the datasets
from preflab.batching.examples import PreferenceData
from preflab.batching.summary import counts_line, describe_data
from preflab.batching.token_store import TokenStore, prepare
from preflab.checks import check_config
from preflab.distributed.launch import WorkerDied, launch, sheltered
from preflab.distributed.process_group import leave, ranks_given, world
from preflab.distributed.signals import Stopped, StopSignals
from preflab.evaluation.worklist import finished_like, pending
from preflab.modeling.loading import check_model, load_tokenizer
from preflab.modeling.parallelism import data_ranks, local_workers
from preflab.online.rounds import online_trainer
from preflab.reports.run import write_report
from preflab.settings.keys import CONFIG_DIR
from preflab.settings.overrides import check_overrides, fail
from preflab.settings.run_folder import (
    finished_summary,
    register_resolvers,
    remove_if_empty,
    run_dir_for,
    saved_config,
)
from preflab.training.memory_plan import describe, make_plan
from preflab.training.trackers import start_wandb
from trainers import TRAINERS
from utils import DataError, PrefLabError, atomic_write

# here and not in main(): hydra's launchers import this module in processes of their own
register_resolvers()


def main() -> None:
    # Our launcher settings carry the name of hydra's own, on purpose: it is the name that users
    # know.
    warnings.filterwarnings(
        "ignore",
        message="(?s).*hydra/launcher/submitit_slurm' is validated against ConfigStore schema",
    )
    try:
        check_overrides(sys.argv[1:])
        world()  # ranks meet before hydra asks them for a folder
    except PrefLabError as error:
        fail(error)
    run()


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
def run(config: DictConfig) -> None:
    stop = StopSignals()
    stop.listen()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    try:
        config = saved_config(config, run_dir) if config.resume else config
        execute(config, run_dir, stop)
        leave()
    except PrefLabError as error:
        if world().rank == 0:
            remove_if_empty(run_dir)
        if world().rank > 0 and error.everywhere:
            raise SystemExit(2) from None
        fail(error)
    except WorkerDied as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Stopped as stopped:
        if world().rank == 0:
            print(
                f"stopped by {stopped}; the same command, or resume={run_dir}, continues",
                file=sys.stderr,
            )
        _leave_with(128 + stopped.signum, stop)


def _leave_with(code: int, stop: StopSignals) -> None:
    """End a run that saved itself, rank 0 last: srun's code must be its, and not that of a rank
    killed on its way out."""
    rank = world().rank
    leave()
    stop.hand_over()
    if rank > 0:
        raise SystemExit(0)
    if ranks_given() is not None:
        time.sleep(2.0)
    raise SystemExit(code) from None


def execute(config: DictConfig, run_dir: Path, stop: StopSignals | None = None) -> dict:
    """Run a composed config in `run_dir`, on the ranks there are or on workers of its own; returns
    the summary.

    Rank 0 prints the table. Raises PrefLabError before any model loads for what cannot work,
    Stopped after a signal.
    """
    ranks = world()
    stop = stop or StopSignals()
    loss, sources = ranks.first(lambda: check_config(config, TRAINERS))
    if before := ranks.agree(lambda: finished_like(config, config.skip_finished)):
        print(
            f"skipped: {before} is a finished run with these settings"
            f" (skip_finished={config.skip_finished})"
        )
        if ranks.rank == 0:
            remove_if_empty(run_dir)
        return json.loads((before / "summary.json").read_text(encoding="utf-8"))
    run_dir = ranks.agree(lambda: run_dir_for(config, run_dir))
    if summary := ranks.agree(lambda: finished_summary(config, run_dir)):
        print(f"{run_dir} is already finished")
        return _report(run_dir, summary)
    tokenizer, stores, data = ranks.first(lambda: _load(config, sources, loss))
    if config.function == "plan":
        print(describe(make_plan(config, loss, data["train"]), config.plan.gpu_gib))
        remove_if_empty(run_dir)
        return {}
    resolved = OmegaConf.to_container(config, resolve=True)
    if ranks.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        if config.function in ("train", "online"):
            (run_dir / "summary.json").unlink(
                missing_ok=True
            )  # what is there is not finished from here on
        with atomic_write(run_dir / "config.yaml") as f:
            f.write(OmegaConf.to_yaml(OmegaConf.create(resolved)))
        with atomic_write(run_dir / "data.json") as f:
            json.dump({split: describe_data(stores[split]) for split in stores}, f)
        print(f"run folder: {run_dir}")
    with _told(run_dir, ranks.rank):
        return _report(
            run_dir, _run_here_or_on_workers(config, resolved, run_dir, loss, tokenizer, data, stop)
        )


def _run_here_or_on_workers(
    config: DictConfig,
    resolved: dict,
    run_dir: Path,
    loss,
    tokenizer,
    data: dict,
    stop: StopSignals,
) -> dict:
    workers = local_workers(config)
    if world().size == 1 and workers > 1:
        launch(work, workers, config.fsdp_port, (resolved, run_dir), stop)
        if stop.received and not (run_dir / "summary.json").exists():
            raise Stopped(stop.received)
        return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return _train_or_evaluate(config, run_dir, loss, tokenizer, data, stop)


@contextlib.contextmanager
def _told(run_dir: Path, rank: int):
    """Keep in status.json whether the run is running, finished, stopped or failed, for those who
    look from outside."""

    def tell(state: str, **more) -> None:
        if rank == 0:
            where = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
            with atomic_write(run_dir / "status.json") as f:
                json.dump({"state": state, **where, **more}, f)

    tell("running")
    try:
        yield
    except Stopped as stopped:
        tell("stopped", error=f"by {stopped}")
        raise
    except BaseException as error:
        tell("failed", error=f"{type(error).__name__}: {error}"[:500])
        raise
    tell("finished")


def work(resolved: dict, run_dir: Path) -> None:
    """One of the workers that `execute` starts: everything was checked and tokenised before."""
    stop = StopSignals()
    stop.listen()
    world()  # joined here, so that ranks other than 0 stay silent after the next lines
    config = OmegaConf.create(resolved)
    with contextlib.redirect_stdout(None):
        loss, sources = check_config(config, TRAINERS)
        tokenizer, _, data = _load(config, sources, loss)
    with contextlib.suppress(Stopped):  # the starting process got the signal as well, and says so
        _train_or_evaluate(config, run_dir, loss, tokenizer, data, stop)
    leave()


def _load(config: DictConfig, sources: dict, loss) -> tuple:
    """The tokenizer and the data, after a look at what the model's settings allow."""
    check_model(config, scalar_head="scalar_head" in loss.reads)
    tokenizer = load_tokenizer(config.model)
    return tokenizer, *load_data(config, sources, tokenizer, loss)


def _train_or_evaluate(
    config: DictConfig, run_dir: Path, loss, tokenizer, data: dict, stop: StopSignals
) -> dict:
    """The summary of what this rank takes part in."""
    ranks = world()
    ranks.peers = config.tensor_parallel_size if config.trainer == "FSDPTrainer" else 1
    wandb_run = None
    if not config.debug and ranks.rank == 0:
        with sheltered():
            wandb_run = start_wandb(
                config.wandb, run_dir, OmegaConf.to_container(config, resolve=True)
            )
    if config.function == "eval":
        left = ranks.agree(lambda: pending(config, run_dir))
        config = OmegaConf.merge(config, {"model": {"archive": left[0][0].source}})
    kind = TRAINERS[config.trainer]
    kind = online_trainer(kind) if config.function == "online" else kind
    trainer = kind(
        config, run_dir, loss, tokenizer, data, world=ranks, wandb_run=wandb_run, stop=stop
    )
    if config.function == "eval":
        trainer.evaluate_checkpoints(left)
        return trainer.summarize()
    return trainer.train()


def load_data(
    config: DictConfig, sources: dict, tokenizer, loss
) -> tuple[dict[str, list[TokenStore]], dict]:
    """Tokenise every split (or map it from the cache), print its counts, and check that it holds
    what the loss reads."""
    lengths = dict(
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        cache_dir=config.cache_dir,
    )
    stores = {
        split: [prepare(source, tokenizer, **lengths) for source in sources[split]]
        for split in sources
    }
    for store in (store for split in stores.values() for store in split):
        print(counts_line(store.counts))
    name = ", ".join(config.datasets)
    alone = config.function == "online" or any(
        source.only_prompts for split in sources.values() for source in split
    )
    data = {
        split: PreferenceData(
            stores[split], "prompts" if alone else loss.examples, f"{name} ({split})"
        )
        for split in stores
    }
    for split in data:
        if not alone and (told := data[split].check_for(loss)):
            print(f"{split}: {told}")
        if split == "train" and len(data[split]) < (ranks := data_ranks(config, world())):
            raise DataError(
                f"datasets={list(config.datasets)} ({split}) holds {len(data[split])} examples for"
                f" {ranks} ranks; start fewer"
            )
    return stores, data


def _report(run_dir: Path, summary: dict) -> dict:
    if world().rank == 0:
        print(write_report(run_dir))
        print(f"pictures and samples: {run_dir / 'report.html'}")
    return summary


if __name__ == "__main__":
    from train import main

    main()
