"""Reading weights: archives, saved folders, and the state that a checkpoint holds."""

import contextlib
import os
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file, logging

from utils import ConfigError

# Masks and tables that old transformers versions kept in checkpoints; none of them is a weight.
OLD_BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "rotary_emb.inv_freq",
)


@contextlib.contextmanager
def readable(key: str, path: str):
    """Turn the many ways in which a folder or a hub name can fail to load into one message."""
    try:
        yield
    except (OSError, ValueError) as error:
        where = (
            "is a folder that cannot be read as such"
            if os.path.isdir(path)
            else "is neither a folder here nor a name on a reachable hub"
        )
        told = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ConfigError(f"{key}={path} {where}: {told}") from error


def read_archive(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in an archive, on the CPU.

    Accepted: a `policy.pt` of this or of the original family of repositories ({step_idx, state,
    metrics}), a plain state dict, a safetensors file, a `save_pretrained` folder, a run or a
    checkpoint folder of ours. Nothing is unpickled but tensors and plain containers.
    """
    return {
        key: value for file in archive_files(path) for key, value in _read_tensors(file).items()
    }


def archive_files(path: str | Path) -> list[Path]:
    """The files that hold the weights of an archive. Raises ConfigError when there are none."""
    path = Path(path)
    found = next(
        (p for p in (path / "policy.pt", path / "LATEST" / "policy.pt") if p.is_file()), path
    )
    if not found.exists():
        raise ConfigError(f"archive {path}: no such file or folder")
    files = _weight_files(found) if found.is_dir() else [found]
    if not files:
        raise ConfigError(
            f"archive {path}: a folder without policy.pt, LATEST/policy.pt or *.safetensors; give a"
            " policy.pt, a run folder or a save_pretrained folder"
        )
    return files


def model_files(name_or_path: str) -> list[Path]:
    """The config and the weights of a model, in its folder or in the local copy of the hub's."""
    with readable("model.name_or_path", name_or_path):
        config = Path(cached_file(name_or_path, "config.json"))
    return [config, *_weight_files(config.parent)]


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch raises many kinds; all mean the same to the user
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
    """Copy an archive's weights into a model of the same architecture; with `mapped`, map them from
    the file instead.

    Raises ConfigError naming the first tensors that are missing, unknown or of another shape.
    """
    state = {key.removeprefix("module."): value for key, value in read_archive(path).items()}
    # Through transformers, which knows the names that earlier versions gave to the same tensors.
    with _silent():
        loaded, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            dtype="auto" if mapped else model.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    scalar = hasattr(
        model, "score"
    )  # a reward model that starts from a language model keeps its body and has a new head
    unknown = [
        k
        for k in info["unexpected_keys"]
        if not k.endswith(OLD_BUFFERS) and not (scalar and k.startswith("lm_head."))
    ]
    missing = [k for k in info["missing_keys"] if not (scalar and k.startswith("score."))]
    shapes = [
        f"{key} {tuple(theirs)} against {tuple(ours)}"
        for key, theirs, ours in info["mismatched_keys"]
    ]
    problems = [
        ("of another shape", shapes),
        ("unknown to the model", unknown),
        ("missing from the archive", missing),
    ]
    if any(names for _, names in problems):
        told = "; ".join(
            f"{len(names)} {what}: {', '.join(sorted(names)[:3])}"
            for what, names in problems
            if names
        )
        raise ConfigError(
            f"archive {path} does not fit {type(model).__name__} ({told}); is model= the model it"
            " was trained from?"
        )
    model.load_state_dict(loaded.state_dict(), assign=mapped)
    model.tie_weights()  # assigning unties


@contextlib.contextmanager
def _silent():
    """transformers logs a table of what did not fit; our own message says it."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def archive_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights on the CPU, under the names that the model's published checkpoints use."""
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    return revert_weight_conversion(model, state)
