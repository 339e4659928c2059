"""Training and evaluating from Python, for scripts and notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from preflab.execution import execute
from preflab.reports.run_files import read_config, read_jsonl
from preflab.settings.compose import compose
from preflab.settings.overrides import quoted
from preflab.settings.run_folder import choose_run_dir, run_dir_for
from utils import ConfigError

# What an evaluation takes over from the run that it evaluates, where no override says otherwise.
FROM_THE_RUN = (
    "model",
    "loss",
    "reward",
    "more_rewards",
    "datasets",
    "dataset_module",
    "data_dir",
    "dataset_columns",
    "pairing",
    "min_gap",
    "max_responses",
    "choose_responses",
    "test_fraction",
    "train_split",
    "test_split",
    "prompt_template",
    "train_on",
    "chat_template_kwargs",
    "chat_date",
    "max_length",
    "max_prompt_length",
    "max_new_tokens",
    "seed",
)


@dataclass(frozen=True)
class Result:
    """What a run leaves. folder: the run folder. summary: the content of its summary.json."""

    folder: Path
    summary: dict

    @property
    def metrics(self) -> list[dict]:
        """Rows of metrics.jsonl: every step and every evaluation."""
        return list(read_jsonl(self.folder / "metrics.jsonl"))

    @property
    def samples(self) -> list[dict]:
        """Rows of samples.jsonl; empty for a run that draws none."""
        path = self.folder / "samples.jsonl"
        return list(read_jsonl(path)) if path.is_file() else []

    @property
    def model(self) -> Path:
        """A folder for `AutoModelForCausalLM.from_pretrained`: the newest checkpoint."""
        return self.folder / "LATEST" / "hf"


def train(*overrides: str, **settings: Any) -> Result:
    """Run `python train.py OVERRIDES` in this process.

    overrides: as on the command line, such as "loss=odpo" or "loss.alpha=0.5". settings: the same
    as keywords, for keys without a dot, such as `n_examples=512`. Raises ConfigError or DataError,
    which the command line prints as one line, and NonFiniteLossError.
    """
    return _run(compose(_overrides(overrides, settings)))


def evaluate(run: str | Path | Result, *overrides: str, **settings: Any) -> Result:
    """Run `function=eval` for the newest checkpoint of a run, in this process.

    run: a `Result` or a run folder. Model, data, reward, lengths and seed are those of the run
    where no override says otherwise, and the reference is where its training started. The rows of
    the evaluation are in `samples` and `summary`.
    """
    folder = run.folder if isinstance(run, Result) else Path(run)
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder}: no config.yaml there; give a run folder")
    given = _overrides(overrides, settings)
    config = compose(["function=eval", f"exp_name={quoted(folder.name)}", *given])
    trained = read_config(path)
    named = {override.split("=")[0].split(".")[0] for override in given}
    for key in FROM_THE_RUN:
        if key not in named and key in trained:
            OmegaConf.update(config, key, trained[key], merge=False, force_add=True)
    if "model" not in named:
        start = trained.model.reference_archive or trained.model.archive
        config.model.reference_archive, config.model.archive = start, str(folder)
    return _run(config)


def _overrides(overrides: tuple[str, ...], settings: dict[str, Any]) -> list[str]:
    return [*overrides, *(f"{key}={_as_override(value)}" for key, value in settings.items())]


def _as_override(value: Any) -> str:
    """A value as hydra's command line writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_as_override(item) for item in value) + "]"
    if isinstance(value, (str, Path)):
        return quoted(str(value))
    return str(value)


def _run(config: DictConfig) -> Result:
    if config.resume:
        raise ConfigError(
            f"resume={config.resume} is for the command line; from Python, give the folder as"
            " local_run_dir with the settings of the run"
        )
    if not config.local_run_dir:
        config.local_run_dir = choose_run_dir(None, None, config.local_dirs, config.exp_name)
    folder = run_dir_for(config, Path(config.local_run_dir))
    return Result(folder, execute(config, folder))
