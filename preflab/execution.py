"""Running a composed config: check it, build what it needs, train or evaluate."""

import contextlib
import importlib
import json
import logging
import os
import socket
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from preflab.batching.examples import PreferenceData
from preflab.batching.summary import counts_line, describe_data
from preflab.batching.token_store import TokenStore, prepare
from preflab.checks import check_config
from preflab.distributed.console import configure_logging
from preflab.distributed.launch import launch, sheltered
from preflab.distributed.process_group import leave, world
from preflab.distributed.signals import Stopped, StopSignals
from preflab.evaluation.evaluator import Evaluator, evaluate_checkpoints
from preflab.evaluation.worklist import draws_samples, finished_like, pending
from preflab.modeling.loading import check_model, load_tokenizer
from preflab.modeling.parallelism import data_ranks, local_workers
from preflab.online.rounds import OnlineTrainer
from preflab.reports.run import write_report
from preflab.rewards.registry import build_rewards
from preflab.settings.run_folder import finished_summary, remove_if_empty, run_dir_for
from preflab.training.memory_plan import describe, make_plan
from preflab.training.metrics import MetricLog
from preflab.training.registry import find_trainer
from preflab.training.trackers import start_wandb
from utils import DataError, atomic_write, seed_everything

logger = logging.getLogger(__name__)

# Modules beside this package that add to its registries. They import the package, so that it names
# them here once and imports them by name.
BUILT_IN = ("losses", "preference_datasets", "trainers")


def register_built_in() -> None:
    """Fill the registries of losses, datasets and trainers."""
    for name in BUILT_IN:
        importlib.import_module(name)


def execute(config: DictConfig, run_dir: Path, stop: StopSignals | None = None) -> dict:
    """Run a composed config in `run_dir`, on the ranks there are or on workers of its own; returns
    the summary.

    Rank 0 prints the table. Raises PrefLabError before any model loads for what cannot work,
    Stopped after a signal.
    """
    register_built_in()
    ranks = world()
    configure_logging(ranks.rank)
    stop = stop or StopSignals()
    loss, sources = ranks.first(lambda: check_config(config))
    if before := ranks.agree(lambda: finished_like(config, config.skip_finished)):
        logger.info(
            f"skipped: {before} is a finished run with these settings"
            f" (skip_finished={config.skip_finished})"
        )
        if ranks.rank == 0:
            remove_if_empty(run_dir)
        return json.loads((before / "summary.json").read_text(encoding="utf-8"))
    run_dir = ranks.agree(lambda: run_dir_for(config, run_dir))
    if summary := ranks.agree(lambda: finished_summary(config, run_dir)):
        logger.info(f"{run_dir} is already finished")
        return _report(run_dir, summary)
    tokenizer, stores, data = ranks.first(lambda: load_inputs(config, sources, loss))
    if config.function == "plan":
        logger.info(describe(make_plan(config, loss, data["train"]), config.plan.gpu_gib))
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
        logger.info(f"run folder: {run_dir}")
    with _status(run_dir, ranks.rank):
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
    workers = local_workers(find_trainer(config.trainer), config)
    if world().size == 1 and workers > 1:
        launch(work, workers, config.fsdp_port, (resolved, run_dir), stop)
        if stop.received and not (run_dir / "summary.json").exists():
            raise Stopped(stop.received)
        return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return _train_or_evaluate(config, run_dir, loss, tokenizer, data, stop)


@contextlib.contextmanager
def _status(run_dir: Path, rank: int):
    """Keep in status.json whether the run is running, finished, stopped or failed, for those who
    look from outside."""

    def write(state: str, **more) -> None:
        if rank == 0:
            where = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
            with atomic_write(run_dir / "status.json") as f:
                json.dump({"state": state, **where, **more}, f)

    write("running")
    try:
        yield
    except Stopped as stopped:
        write("stopped", error=f"by {stopped}")
        raise
    except BaseException as error:
        write("failed", error=f"{type(error).__name__}: {error}"[:500])
        raise
    write("finished")


def work(resolved: dict, run_dir: Path) -> None:
    """One of the workers that `execute` starts: everything was checked and tokenised before."""
    register_built_in()
    stop = StopSignals()
    stop.listen()
    configure_logging(world().rank)
    config = OmegaConf.create(resolved)
    with contextlib.redirect_stdout(None):
        loss, sources = check_config(config)
        tokenizer, _, data = load_inputs(config, sources, loss)
    with contextlib.suppress(Stopped):  # the starting process got the signal as well, and says so
        _train_or_evaluate(config, run_dir, loss, tokenizer, data, stop)
    leave()


def load_inputs(config: DictConfig, sources: dict, loss) -> tuple:
    """The tokenizer and the data, after a look at what the model's settings allow."""
    trainer = find_trainer(config.trainer)
    check_model(config, trainer, scalar_head="scalar_head" in loss.reads)
    tokenizer = load_tokenizer(config.model)
    return tokenizer, *load_data(config, sources, tokenizer, loss)


def _train_or_evaluate(
    config: DictConfig, run_dir: Path, loss, tokenizer, data: dict, stop: StopSignals
) -> dict:
    """The summary of what this rank takes part in."""
    ranks, trainer = world(), find_trainer(config.trainer)
    ranks.peers = trainer.placement.peers(config)
    wandb_run = None
    if not config.debug and ranks.rank == 0:
        with sheltered():
            resolved = OmegaConf.to_container(config, resolve=True)
            wandb_run = start_wandb(config.wandb, run_dir, resolved)
    if config.function == "eval":
        return _evaluate(config, run_dir, loss, tokenizer, data, trainer, wandb_run, stop)
    parts = (config, run_dir, loss, tokenizer, data)
    shared = {"world": ranks, "wandb_run": wandb_run, "stop": stop}
    if config.function == "online":
        return OnlineTrainer(*parts, trainer=trainer, **shared).train()
    return trainer(*parts, **shared).train()


def _evaluate(
    config: DictConfig, run_dir: Path, loss, tokenizer, data: dict, trainer, wandb_run, stop
) -> dict:
    ranks = world()
    seed_everything(config.seed)
    worklist = ranks.agree(lambda: pending(config, run_dir))
    rewards = build_rewards(config) if draws_samples(config, loss) else {}
    evaluator = Evaluator(config, loss, tokenizer, data["test"], rewards, run_dir, ranks)
    interval = config.minimum_log_interval_secs
    log = MetricLog(run_dir, wandb_run, interval, writes=ranks.rank == 0)
    return evaluate_checkpoints(worklist, evaluator, trainer, log, stop)


def load_data(
    config: DictConfig, sources: dict, tokenizer, loss
) -> tuple[dict[str, list[TokenStore]], dict]:
    """Tokenise every split (or map it from the cache), print its counts, and check that it holds
    what the loss reads."""
    lengths = {
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "cache_dir": config.cache_dir,
    }
    stores = {
        split: [prepare(source, tokenizer, **lengths) for source in sources[split]]
        for split in sources
    }
    for store in (store for split in stores.values() for store in split):
        logger.info(counts_line(store.counts))
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
            logger.info(f"{split}: {told}")
        if split == "train" and len(data[split]) < (
            ranks := data_ranks(find_trainer(config.trainer), config, world())
        ):
            raise DataError(
                f"datasets={list(config.datasets)} ({split}) holds {len(data[split])} examples for"
                f" {ranks} ranks; start fewer"
            )
    return stores, data


def _report(run_dir: Path, summary: dict) -> dict:
    if world().rank == 0:
        logger.info(write_report(run_dir))
        logger.info(f"pictures and samples: {run_dir / 'report.html'}")
    return summary
