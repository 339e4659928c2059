"""Running a composed config: check it, build what it needs, train or evaluate."""

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from preflab.batching.chat_template import chat_of, set_chat
from preflab.batching.examples import PreferenceData
from preflab.batching.loader import count_steps
from preflab.batching.summary import check_same_data, counts_line, describe_data
from preflab.batching.token_store import TokenStore, prepare
from preflab.checks import check_settings
from preflab.distributed.console import configure_logging, logged_to
from preflab.distributed.launch import launch
from preflab.distributed.process_group import leave, world
from preflab.distributed.signals import Stopped, StopSignals
from preflab.evaluation.evaluator import Evaluator, evaluate_checkpoints
from preflab.evaluation.worklist import (
    covered,
    draws_samples,
    pending,
    says_compared_with_itself,
)
from preflab.modeling.loading import check_model, load_tokenizer
from preflab.modeling.model_checks import check_ids
from preflab.modeling.parallelism import data_ranks, local_workers
from preflab.modeling.reference_cache import cannot_write
from preflab.objective.registry import BoundLoss
from preflab.online.rounds import OnlineTrainer
from preflab.readers.records import Source
from preflab.reports.run_files import read_config, read_data, read_jsonl, read_summary
from preflab.reports.tables import summary_table
from preflab.rewards.registry import build_rewards
from preflab.settings.identity import same_settings
from preflab.settings.load import validate
from preflab.settings.run_folder import (
    COMPARING,
    WORKERS_LOCK,
    finished_summary,
    owned,
    remove_if_empty,
    run_dir_for,
)
from preflab.settings.schema import Settings
from preflab.settings.values import dataset_names, dataset_weights
from preflab.training.checkpoints import newest_step
from preflab.training.memory_plan import describe, make_plan
from preflab.training.metrics import MetricLog
from preflab.training.provenance import NAME as PROVENANCE
from preflab.training.provenance import describe as describe_provenance
from preflab.training.provenance import write_provenance
from preflab.training.reference import reference_plan
from preflab.training.registry import find_trainer
from preflab.training.schedules import Schedule, check_continues, schedule_of
from preflab.training.trackers import start_tracker
from utils import DataError, atomic_write, in_use, seed_everything

logger = logging.getLogger(__name__)

# Modules beside this package that add to its registries. They import the package, so that it names
# them here once and imports them by name.
BUILT_IN = (
    "losses",
    "pair_losses",
    "list_losses",
    "token_losses",
    "preference_datasets",
    "trainers",
)
LOG = "train.log"


def register_built_in() -> None:
    """Fill the registries of losses, datasets and trainers."""
    for name in BUILT_IN:
        importlib.import_module(name)


@dataclass(frozen=True)
class Inputs:
    """What a run works on. stores, data: tokenised data sets, and examples over them, by split."""

    loss: BoundLoss
    tokenizer: Any
    stores: dict[str, list[TokenStore]]
    data: dict[str, PreferenceData]


def execute(config: DictConfig, run_dir: Path, stop: StopSignals | None = None) -> dict:
    """Run a composed config in `run_dir`, on the ranks there are or on workers that it starts;
    returns the summary.

    Rank 0 prints the table. Raises PrefLabError before any model loads for what cannot work,
    Stopped after a signal.
    """
    register_built_in()
    ranks = world()
    configure_logging(ranks.rank)
    ranks.stop = stop = stop or StopSignals()
    settings = ranks.first(lambda: validate(config))
    loss, sources = ranks.first(lambda: check_settings(settings))
    if earlier := ranks.agree(lambda: _finished_like(config, settings)):
        logger.info(
            f"skipped: {earlier} is a finished run with these settings"
            f" (skip_finished={settings.skip_finished})"
        )
        if ranks.rank == 0:
            remove_if_empty(run_dir)
        return read_summary(earlier)
    run_dir = ranks.agree(lambda: run_dir_for(config, run_dir))
    if summary := ranks.agree(lambda: finished_summary(config, run_dir)):
        logger.info(f"{run_dir} is already finished")
        return _report(settings, run_dir, summary)
    if settings.function == "plan":
        inputs = ranks.first(lambda: load_inputs(settings, sources, loss))
        plan = make_plan(settings, loss, inputs.data["train"])
        logger.info(describe(plan, settings.plan.gpu_gib))
        remove_if_empty(run_dir)
        return {}
    with contextlib.ExitStack() as stack:
        ranks.agree(lambda: stack.enter_context(owned(run_dir)))
        if reference_plan(settings, loss).cached:
            ranks.agree(lambda: cannot_write(Path(settings.cache_dir)))
        inputs = ranks.first(lambda: load_inputs(settings, sources, loss))
        ranks.agree(lambda: _check_continued(run_dir, inputs))
        ranks.agree(lambda: _check_schedule(settings, run_dir, inputs))
        if ranks.rank == 0:
            _begin_folder(config, run_dir, inputs)
        with logged_to(run_dir / LOG, writes=ranks.rank == 0), _status(run_dir, ranks.rank):
            return _run_here_or_on_workers(settings, run_dir, inputs, stop)


def _check_continued(run_dir: Path, inputs: Inputs) -> None:
    """Refuse to continue on other data, or with files that somebody has damaged."""
    for file in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl"):
        read_jsonl(run_dir / file)
    path = run_dir / "data.json"
    if path.is_file():
        check_same_data(read_data(run_dir), inputs.stores, run_dir)


def _check_schedule(settings: Settings, run_dir: Path, inputs: Inputs) -> None:
    """Refuse a learning rate schedule that does not fit the length of the run, or the steps that
    the run in this folder has taken."""
    if settings.function != "train":
        return
    n, path = len(inputs.data["train"]), run_dir / "config.yaml"

    def schedule(n_epochs: int | None, n_examples: int | None) -> Schedule:
        length = {"n_epochs": n_epochs, "n_examples": n_examples}
        return schedule_of(settings, count_steps(n, batch_size=settings.batch_size, **length)[1])

    now = schedule(settings.n_epochs, settings.n_examples)
    if path.is_file():
        saved = OmegaConf.load(path)
        check_continues(schedule(saved.n_epochs, saved.n_examples), now, newest_step(run_dir))


def _begin_folder(config: DictConfig, run_dir: Path, inputs: Inputs) -> None:
    """Write what a run folder holds from the start."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if config.function in ("train", "online"):
        (run_dir / "summary.json").unlink(missing_ok=True)  # that run is not finished any more
    with atomic_write(run_dir / "config.yaml") as f:
        f.write(OmegaConf.to_yaml(config, resolve=True))
    data = {split: describe_data(stores) for split, stores in inputs.stores.items()}
    with atomic_write(run_dir / "data.json") as f:
        json.dump(data, f)
    different = write_provenance(run_dir, describe_provenance(data, config.get("criterion")))
    with logged_to(run_dir / LOG):
        logger.info(f"run folder: {run_dir}")
        if different:
            logger.warning(f"since the last start of this run, {different}")


def _finished_like(config: DictConfig, settings: Settings) -> Path | None:
    """A finished run below `skip_finished` with these settings, if there is one."""
    folder = settings.skip_finished
    for path in sorted(Path(folder).rglob("config.yaml")) if folder else ():
        if not (path.parent / "summary.json").is_file():
            continue
        if not same_settings(read_config(path), config):
            continue
        if settings.function not in COMPARING or covered(settings, path.parent):
            return path.parent
    return None


def _run_here_or_on_workers(
    settings: Settings, run_dir: Path, inputs: Inputs, stop: StopSignals
) -> dict:
    workers = local_workers(find_trainer(settings.trainer), settings)
    if world().size > 1 or workers == 1:
        return _run(settings, run_dir, inputs)
    launch(work, workers, settings.fsdp_port, (settings, run_dir), stop)
    return read_summary(run_dir)


def work(settings: Settings, run_dir: Path, *, stop: StopSignals) -> None:
    """One of the workers that `execute` starts: everything was checked and tokenised before."""
    register_built_in()
    world().stop = stop
    configure_logging(world().rank)
    with contextlib.redirect_stdout(None):  # the starting process has printed it
        loss, sources = check_settings(settings)
        inputs = load_inputs(settings, sources, loss)
    with contextlib.ExitStack() as stack:
        world().agree(lambda: stack.enter_context(in_use(run_dir / WORKERS_LOCK)))
        try:
            with logged_to(run_dir / LOG, writes=world().rank == 0):
                _run(settings, run_dir, inputs)
        except Stopped:  # all ranks are here
            leave()
            raise
    leave()


def _run(settings: Settings, run_dir: Path, inputs: Inputs) -> dict:
    """Train or evaluate on this rank, and report; returns the summary."""
    ranks = world()
    ranks.peers = find_trainer(settings.trainer).placement.peers(settings)
    tracker = None
    if ranks.rank == 0:
        tracker = start_tracker(settings, run_dir, _shown_config(settings, run_dir))
    try:
        summary = _report(settings, run_dir, _train_or_evaluate(settings, run_dir, inputs, tracker))
        if tracker is not None:
            tracker.show_report(run_dir)
        return summary
    finally:
        if tracker is not None:
            tracker.finish()


def _shown_config(settings: Settings, run_dir: Path) -> dict:
    """The settings, and the code, packages and hardware, as a tracker shows them."""
    starts = json.loads((run_dir / PROVENANCE).read_text(encoding="utf-8"))["starts"]
    return dataclasses.asdict(settings) | {"provenance": starts[-1]}


def _train_or_evaluate(settings: Settings, run_dir: Path, inputs: Inputs, tracker) -> dict:
    trainer = find_trainer(settings.trainer)
    if settings.function == "eval":
        return _evaluate(settings, run_dir, inputs, trainer, tracker)
    if settings.function == "atlas":
        from preflab.atlas.run import run_atlas  # matplotlib takes a second to import

        pairs = inputs.data["train"]
        return run_atlas(settings, inputs.loss, inputs.tokenizer, pairs, run_dir, world())
    parts = (settings, run_dir, inputs.loss, inputs.tokenizer, inputs.data)
    shared = {"world": world(), "tracker": tracker}
    if settings.function == "online":
        return OnlineTrainer(*parts, trainer=trainer, **shared).train()
    return trainer(*parts, **shared).train()


def _evaluate(settings: Settings, run_dir: Path, inputs: Inputs, trainer: type, tracker) -> dict:
    ranks = world()
    seed_everything(settings.seed)
    remark = says_compared_with_itself(settings.model)
    if remark and "scalar_head" not in inputs.loss.reads:
        logger.warning(remark)
    worklist = ranks.agree(lambda: pending(settings, run_dir))
    rewards = build_rewards(settings) if draws_samples(settings, inputs.loss) else {}
    evaluator = Evaluator(
        settings, inputs.loss, inputs.tokenizer, inputs.data["test"], rewards, run_dir, ranks
    )
    interval = settings.minimum_log_interval_secs
    log = MetricLog(run_dir, tracker, interval, writes=ranks.rank == 0)
    return evaluate_checkpoints(worklist, evaluator, trainer, log)


# ---------------------------------------------------------------------------------- data, reports


def load_inputs(settings: Settings, sources: dict[str, list[Source]], loss: BoundLoss) -> Inputs:
    """The tokenizer and the tokenised data, after a check of the model's settings.

    sources: opened data sets by split. Prints the counts of each. Raises ConfigError or DataError
    for a model, or data, that the run cannot use.
    """
    trainer = find_trainer(settings.trainer)
    rows = check_model(settings, trainer, scalar_head="scalar_head" in loss.reads)
    tokenizer = load_tokenizer(settings.model, rows)
    set_chat(tokenizer, chat_of(settings))
    stores = {
        split: [
            prepare(
                source,
                tokenizer,
                max_length=settings.max_length,
                max_prompt_length=settings.max_prompt_length,
                cache_dir=settings.cache_dir,
                between_chunks=world().stop_first,
            )
            for source in of_split
        ]
        for split, of_split in sources.items()
    }
    for store in (store for of_split in stores.values() for store in of_split):
        logger.info(counts_line(store.counts))
        if rows is not None:
            check_ids(store, tokenizer, rows, settings.model.name_or_path)
    only_prompts = settings.function == "online" or any(
        source.only_prompts for of_split in sources.values() for source in of_split
    )
    kind = "prompts" if only_prompts else loss.examples
    names = ", ".join(dataset_names(settings))
    weights = {"train": dataset_weights(settings)}  # held-out data are those of an unweighted mix
    data = {
        split: PreferenceData(of_split, kind, f"{names} ({split})", weights.get(split))
        for split, of_split in stores.items()
    }
    if not only_prompts:
        for split, examples in data.items():
            if remark := examples.check_for(loss):
                logger.info(f"{split}: {remark}")
    if "train" in data:
        for line in data["train"].shares():
            logger.info(line)
        ranks = data_ranks(trainer, settings, world())
        if len(data["train"]) < ranks:
            raise DataError(
                f"datasets=[{names}] (train) holds {len(data['train'])} examples"
                f" for {ranks} ranks; start fewer"
            )
    return Inputs(loss, tokenizer, stores, data)


@contextlib.contextmanager
def _status(run_dir: Path, rank: int):
    """Keep status.json: whether the run is running, finished, stopped or failed."""

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


def _report(settings: Settings, run_dir: Path, summary: dict) -> dict:
    if world().rank == 0 and settings.report:
        from preflab.reports.run import write_report  # matplotlib takes a second to import

        logger.info(write_report(run_dir))
        logger.info(f"pictures and samples: {run_dir / 'report.html'}")
    elif world().rank == 0:
        logger.info(summary_table(summary))
    return summary
