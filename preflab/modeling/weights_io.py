"""Reading weights from archives and saved folders, and the state dict that a checkpoint holds."""

import contextlib
import json
import os
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file, logging

from preflab.modeling.adapters import adapter_files, is_adapter
from utils import ConfigError, first_line

# Masks and rotary tables that old transformers versions saved in checkpoints; they are no weights.
OLD_BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".attn.causal_mask",
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "decoder.version",
)

# In the order of transformers: the first that is there is read, and nothing beside it.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# The file of a checkpoint's weights in the repository of Rafailov et al. (2023) and its forks.
POLICY_PT = "policy.pt"

# What torch.compile, data parallelism, FSDP, DeepSpeed, peft and Lightning put before the names of
# weights.
WRAPPERS = (
    re.compile(r"^(?:(?:_orig_mod|module|_fsdp_wrapped_module|_forward_module)\.)+"),
    re.compile(r"^base_model\.model\."),
    re.compile(r"^model\."),
)


@contextlib.contextmanager
def readable(key: str, path: str):
    """Inside, whatever error transformers raises for a folder or a hub name becomes a ConfigError
    of one line.

    key: the setting that holds `path`, a folder or a hub name.
    """
    try:
        yield
    except ConfigError:  # which says more
        raise
    except torch.OutOfMemoryError:  # the folder is whole
        raise
    except Exception as error:  # of many classes; tokenizers raise the base class itself
        if os.path.exists(path):
            what = "folder" if os.path.isdir(path) else "file"
            problem = f"is a {what} that cannot be read as such"
        else:
            problem = "is neither a folder here nor a name on a reachable hub"
        lines = [line for line in str(error).splitlines() if line.strip()]
        cause = lines[0] if lines else type(error).__name__
        raise ConfigError(f"{key}={path} {problem}: {cause}") from error


def read_archive(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in an archive, on the CPU.

    Accepted: a run folder, a checkpoint folder, a `save_pretrained` folder, a safetensors file, a
    `policy.pt` of this project or of the repository of Rafailov et al. (2023) and its forks
    ({step_idx, state, metrics}), and a plain state dict. Only tensors and plain containers are
    unpickled. Raises ConfigError for anything else.
    """
    state = {}
    for file in archive_files(path):
        state |= _read_tensors(file)
    return state


def archive_files(path: str | Path) -> list[Path]:
    """The files that hold the weights of an archive. Raises ConfigError when there are none."""
    path = archive_place(path)
    if not path.exists():
        beside = "" if path.name != POLICY_PT else ", nor a checkpoint's weights in its folder"
        raise ConfigError(f"archive {path}: no such file or folder{beside}")
    if not path.is_dir():
        return [path]
    if is_adapter(path):
        return adapter_files(path)
    names = [name for name in WEIGHT_FILES if (path / name).is_file()]
    if not names:
        raise ConfigError(
            f"archive {path}: a folder without hf, policy.pt, LATEST, {', '.join(WEIGHT_FILES)};"
            " give a run folder, a checkpoint such as RUN/LATEST, a save_pretrained folder or a"
            " file of weights"
        )
    return _with_shards(path / names[0])


def archive_place(path: str | Path) -> Path:
    """The file or folder that holds the weights of an archive: for a run or a checkpoint the one
    inside it, otherwise the archive itself.

    `RUN/LATEST/policy.pt` stands for its checkpoint where that file was not written.
    """
    path = Path(path)
    if path.name == POLICY_PT and not os.path.exists(path):
        return weights_of(path.parent) or path
    return weights_of(path) or weights_of(path / "LATEST") or path


def weights_of(checkpoint: Path) -> Path | None:
    """What holds the weights of a checkpoint: those of training where there are others too. None
    for a folder that is no checkpoint."""
    for name, file in (
        ("weights", "config.json"),
        (POLICY_PT, ""),
        ("hf", "config.json"),
        ("adapter", "adapter_config.json"),  # on a quantised base
    ):
        # Not by pathlib, which raises for a name that no file can have.
        if os.path.isfile(os.path.join(checkpoint, name, file).rstrip("/")):
            return checkpoint / name
    return None


def trained_weights_of(checkpoint: Path) -> Path | None:
    """What a run continues from: `weights_of`, or with LoRA the adapter alone."""
    adapter = checkpoint / "adapter"
    return adapter if adapter.is_dir() else weights_of(checkpoint)


def model_files(name_or_path: str) -> list[Path]:
    """The files of a model's config and weights, in its folder or in the local hub cache, where
    they are downloaded to if need be."""
    with readable("model.name_or_path", name_or_path):
        config = Path(cached_file(name_or_path, "config.json"))
        for name in WEIGHT_FILES:
            found = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                break
        else:
            return [config]
        if found.endswith(".json"):
            for shard in _shards(Path(found)):
                cached_file(name_or_path, shard)
        return [config, *_with_shards(Path(found))]


def _with_shards(path: Path) -> list[Path]:
    """A file of weights, or the shards that an index names. Raises ConfigError for a shard that is
    not there."""
    if path.suffix != ".json":
        return [path]
    files = [path.parent / name for name in _shards(path)]
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError(f"{path} names {missing[0].name}, which is not there; copy it again")
    return files


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not an index of weights: {first_line(error)}") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ConfigError(f"{index} names {outside[0]}, which is not a file beside it")
    return names


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(
                f"archive {path} is damaged: {first_line(error)}; copy it again"
            ) from error
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # of many classes, with the same meaning for the user
        raise ConfigError(
            f"archive {path} is not a file of tensors that can be read safely (weights_only):"
            f" {str(error).splitlines()[0]}"
        ) from error
    state = content.get("state", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise ConfigError(
            f"archive {path} holds no state dict; expected {{step_idx, state, metrics}} or names to"
            " tensors"
        )
    return state


def load_archive(model: nn.Module, path: str | Path, *, mapped: bool = False) -> None:
    """Copy an archive's weights into a model of the same architecture. mapped: let the model use
    the tensors as they are mapped from the file instead.

    Raises ConfigError with the first tensors that are missing, unknown or of another shape. A model
    with a scalar head keeps its own head where the archive is that of a language model.
    """
    state = {WRAPPERS[0].sub("", key): value for key, value in read_archive(path).items()}
    loaded, info = _fitted(model, state, mapped)
    if info["missing_keys"] and (wrapper := shared_wrapper(info["unexpected_keys"])):
        state = {wrapper.sub("", key): value for key, value in state.items()}
        loaded, info = _fitted(model, state, mapped)
    if differences := _differences(info, has_scalar_head=hasattr(model, "score")):
        raise ConfigError(
            f"archive {path} does not fit {type(model).__name__} ({differences}); set model= to the"
            " model it was trained from"
        )
    model.load_state_dict(loaded.state_dict(), assign=mapped)
    model.tie_weights()  # assigning unties


def _fitted(model: nn.Module, state: dict[str, torch.Tensor], mapped: bool) -> tuple:
    """A model like `model` with the weights of `state`, and what transformers reports about them.

    transformers knows the names that earlier versions gave to the same tensors.
    """
    with only_errors_logged():
        return type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            dtype="auto" if mapped else model.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )


def shared_wrapper(names) -> re.Pattern | None:
    """The pattern of the prefix that all names share with a wrapper, if there is one."""
    for wrapper in WRAPPERS:
        if names and all(wrapper.match(name) for name in names):
            return wrapper
    return None


def _differences(info: dict, *, has_scalar_head: bool) -> str:
    """What transformers reports about tensors that do not fit; empty if all do.

    A reward model that starts from a language model takes its body and has a new head, so the
    archive may have an LM head and lack the scalar head.
    """
    unknown = [key for key in info["unexpected_keys"] if not key.endswith(OLD_BUFFERS)]
    missing = list(info["missing_keys"])
    if has_scalar_head:
        unknown = [key for key in unknown if not key.startswith("lm_head.")]
        missing = [key for key in missing if not key.startswith("score.")]
    other_shapes = [
        f"{key} {tuple(in_archive)} against {tuple(in_model)}"
        for key, in_archive, in_model in info["mismatched_keys"]
    ]
    problems = {
        "of another shape": other_shapes,
        "unknown to the model": unknown,
        "missing from the archive": missing,
    }
    return "; ".join(
        f"{len(names)} {problem}: {', '.join(sorted(names)[:3])}"
        for problem, names in problems.items()
        if names
    )


@contextlib.contextmanager
def only_errors_logged():
    """Inside, transformers logs no table of the tensors that do not fit; our own errors have
    them."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def archive_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict on the CPU, with the tensor names of the model's published checkpoints."""
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    return revert_weight_conversion(model, state)
