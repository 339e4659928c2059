"""What `model.name_or_path` names: a folder or a hub name, a GGUF file, or a LoRA adapter."""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from preflab.modeling.adapters import CONFIG, adapter_files, base_of, is_adapter
from preflab.modeling.weights_io import archive_files, archive_place, model_files, readable
from utils import ConfigError


@dataclass(frozen=True)
class ModelSource:
    """Where a model is read from.

    path: a folder or a hub name, for `from_pretrained`. options: its further arguments. adapter:
    the folder of a LoRA adapter to merge into the model, None without one.
    """

    path: str
    options: dict = field(default_factory=dict)
    adapter: Path | None = None


def model_source(name_or_path: str, key: str = "model.name_or_path") -> ModelSource:
    """The source that a setting names.

    An adapter folder stands for its base with the adapter merged into it. Raises ConfigError for a
    run folder or a file of weights, with the folder to give instead, and for a GGUF file without
    the package that reads it.
    """
    path = Path(name_or_path)
    if path.suffix.lower() == ".gguf":
        return _gguf(path, key)
    if is_adapter(path):
        base = model_source(base_of(path, f"{key}={path}"), key)
        if base.adapter is not None:
            raise ConfigError(
                f"{key}={path} is an adapter on {base.adapter}, which is an adapter too; merge that"
                " one into its base with scripts/merge_adapter.py, and train on the result"
            )
        return ModelSource(base.path, base.options, path)
    if os.path.isfile(path):
        raise ConfigError(
            f"{key}={path} is a file; {_instead(path.parent) or 'give the folder of a model'}, or"
            f" set model.archive={path} beside the model that it was trained from"
        )
    if os.path.isdir(path) and not (path / "config.json").is_file() and (hint := _instead(path)):
        raise ConfigError(f"{key}={path} is a run or a checkpoint of one; {hint}")
    if os.path.isfile(path / CONFIG):
        raise ConfigError(
            f"{key}={path} holds a whole model and an adapter ({CONFIG}), and transformers would"
            " load both; move the adapter to its own folder"
        )
    return ModelSource(name_or_path)


def model_config(model, **more) -> PretrainedConfig:
    """The config of transformers for the settings of a model. more: further values of it."""
    source = model_source(model.name_or_path)
    with readable("model.name_or_path", source.path):
        return AutoConfig.from_pretrained(
            source.path, trust_remote_code=model.trust_remote_code, **source.options, **more
        )


def weight_files(model, archive: str | Path | None) -> list[Path]:
    """The files that determine the weights of a model. model: its settings. archive: as in
    `model.archive`."""
    source = model_source(model.name_or_path)
    file = source.options.get("gguf_file")
    files = [Path(source.path) / file] if file else model_files(source.path)
    if source.adapter is not None:
        files += adapter_files(source.adapter)
    if not archive:
        return files
    if not is_adapter(archive_place(archive)) and not source.options:  # it replaces all weights
        files = [path for path in files if path.name == "config.json"]
    return files + archive_files(archive)


def instead_of_run(path: str) -> str:
    """What to give in place of a run, a checkpoint or a file of one; empty for anything else."""
    if os.path.isdir(path):
        return _instead(Path(path))
    return _instead(Path(path).parent) if os.path.isfile(path) else ""


def _instead(folder: Path) -> str:
    for inner in ("LATEST/hf", "hf"):
        if (folder / inner).is_dir():
            return f"give {folder / inner}"
    return ""


def _gguf(path: Path, key: str) -> ModelSource:
    if not path.is_file():
        raise ConfigError(f"{key}={path}: no such file")
    if find_spec("gguf") is None:
        raise ConfigError(
            f"{key}={path} is read by the package gguf, which is not installed; pip install gguf"
        )
    return ModelSource(str(path.parent), {"gguf_file": path.name})
