"""Entry point: `python train.py loss=odpo loss.alpha=0.5`. See config/config.yaml for every key."""

import itertools
import json
import os
import signal
import sys
import threading
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from batching import PreferenceData, TokenStore, counts_line, describe_data, prepare
from configuration import (
    check_config,
    check_overrides,
    fail,
    must_match,
    register_resolvers,
)
from metrics import start_wandb
from models import check_model, load_tokenizer
from report import write_report
from trainers import TRAINERS, Stopped
from utils import PrefLabError, atomic_write

register_resolvers()  # here and not in main(): hydra's launchers import this module in processes of their own


def main() -> None:
    try:
        check_overrides(sys.argv[1:])
    except PrefLabError as error:
        fail(error)
    run()


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def run(config: DictConfig) -> None:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    try:
        config = _saved_config(config, run_dir) if config.resume else config
        execute(config, run_dir)
    except PrefLabError as error:
        _remove_if_empty(run_dir)
        fail(error)


def execute(config: DictConfig, run_dir: Path) -> dict:
    """Run a composed config in `run_dir`; prints the table and returns the summary."""
    loss, sources = check_config(config, TRAINERS)
    run_dir = _run_dir_for(config, run_dir)
    if summary := _finished(config, run_dir):
        print(f"{run_dir} is already finished")
        return _report(run_dir, summary)
    check_model(config)
    tokenizer = load_tokenizer(config.model)
    stores, data = load_data(config, sources, tokenizer, loss)
    resolved = OmegaConf.to_container(config, resolve=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(run_dir / "config.yaml") as f:
        f.write(OmegaConf.to_yaml(OmegaConf.create(resolved)))
    with atomic_write(run_dir / "data.json") as f:
        json.dump({split: describe_data(stores[split]) for split in stores}, f)
    print(f"run folder: {run_dir}")
    wandb_run = None if config.debug else start_wandb(config.wandb, run_dir, resolved)
    trainer = TRAINERS[config.trainer](config, run_dir, loss, tokenizer, data, wandb_run)
    if config.function == "eval":
        trainer.evaluate()
        return _report(run_dir, trainer.summarize())
    _stop_on_signals(trainer)
    try:
        summary = trainer.train()
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command, or resume={run_dir}, continues", file=sys.stderr)
        raise SystemExit(128 + stopped.signum) from None
    return _report(run_dir, summary)


def load_data(config: DictConfig, sources: dict, tokenizer, loss) -> tuple[dict[str, list[TokenStore]], dict]:
    """Tokenise every split (or map it from the cache), print its counts, and check that it holds what the loss reads."""
    lengths = dict(max_length=config.max_length, max_prompt_length=config.max_prompt_length, cache_dir=config.cache_dir)
    stores = {split: [prepare(source, tokenizer, **lengths) for source in sources[split]] for split in sources}
    for store in (store for split in stores.values() for store in split):
        print(counts_line(store.counts))
    name = ", ".join(config.datasets)
    data = {split: PreferenceData(stores[split], loss.examples, f"{name} ({split})") for split in stores}
    for split in data:
        if told := data[split].check_for(loss):
            print(f"{split}: {told}")
    return stores, data


def _report(run_dir: Path, summary: dict) -> dict:
    print(write_report(run_dir))
    print(f"pictures and samples: {run_dir / 'report.html'}")
    return summary


def _stop_on_signals(trainer) -> None:
    """SIGTERM and Ctrl-C let the running step finish, save, and stop; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        return

    def request_stop(signum, frame):
        if trainer.stop_signal is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stop_signal = signum

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, request_stop)


# --------------------------------------------------------------------------------------------------- run folders


def _saved_config(config: DictConfig, run_dir: Path) -> DictConfig:
    """The config a run was started with, with the plain overrides of this command line on top."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise PrefLabError(f"resume={run_dir}: no config.yaml there; give the run folder itself")
    saved = OmegaConf.load(path)
    for override in HydraConfig.get().overrides.task:
        key = override.split("=")[0].lstrip("+")
        if key in ("model", "loss", "reward"):
            raise PrefLabError(f"resume={run_dir} keeps the {key} it was started with; leave {override} out")
        OmegaConf.update(saved, key, OmegaConf.select(config, key))
    return saved


def _run_dir_for(config: DictConfig, run_dir: Path) -> Path:
    """`run_dir`, or for an evaluation a folder inside it when another run lives there."""
    if config.function == "eval":
        folders = itertools.chain([run_dir], (run_dir / f"eval-{n}" for n in itertools.count(1)))
        return next(folder for folder in folders if not (folder / "config.yaml").exists())
    path = run_dir / "config.yaml"
    if path.is_file():
        must_match(OmegaConf.load(path), config)
    return run_dir


def _finished(config: DictConfig, run_dir: Path) -> dict | None:
    """The summary of a run that already did all that this command asks for."""
    summary, saved = run_dir / "summary.json", run_dir / "config.yaml"
    if config.function != "train" or not (summary.is_file() and saved.is_file()):
        return None
    before = OmegaConf.load(saved)
    if (before.n_epochs, before.n_examples) != (config.n_epochs, config.n_examples):
        return None
    return json.loads(summary.read_text(encoding="utf-8"))


def _remove_if_empty(folder: Path) -> None:
    """A refused command leaves no empty run folder behind."""
    if folder.is_dir() and not os.listdir(folder):
        folder.rmdir()


if __name__ == "__main__":
    main()
