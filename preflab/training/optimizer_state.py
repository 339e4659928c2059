"""The state of an optimizer on disk: each rank writes its shards, any number of ranks reads them.

A checkpoint may come from a stranger, and torch's reader unpickles its index, which can run code.
Here only the classes that an index consists of are unpickled.
"""

import contextlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from utils import ConfigError, first_line

# What an index consists of beside dtypes, by module and name.
INDEX_CLASSES = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.TensorStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        metadata.StorageMeta,
        filesystem._StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
    )
} | {("pathlib", name): Path for name in ("PosixPath", "WindowsPath")}


def save_optimizer(
    optimizer, names: list[str], folder: Path, group=None
) -> tuple[dict, Callable[[], None]]:
    """Copy the optimizer's tensors on the CPU, each rank its shards.

    names: of the parameters, in the optimizer's order. group: as in `write_shards`. Returns the
    rest of the state, for `load_optimizer`, and what writes the copies to `folder`, in any thread.
    The files can be read on any number of ranks.
    """
    tensors, small = {}, {}
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                tensors[f"{name}/{key}"] = value
            else:
                small.setdefault(name, {})[key] = value
    state = {
        "small": small,
        "dtypes": {key: str(value.dtype) for key, value in tensors.items()},
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
    }
    return state, write_shards(tensors, folder, group)


def write_shards(tensors: dict[str, Tensor], folder: Path, group=None) -> Callable[[], None]:
    """Copy tensors on the CPU, each rank its shards, and return what writes the copies to `folder`.

    group: a process group of the CPU whose ranks all write, in the same order; without one, this
    process writes alone. Any number of ranks can read the files, by `read_shards`.
    """
    if not tensors:
        return lambda: None
    writer = _writer(folder)
    copies = writer.stage(tensors)

    def write() -> None:
        try:
            with _without_warnings():
                dcp.save(copies, storage_writer=writer, process_group=group, no_dist=group is None)
        except CheckpointException as failed:  # which no `except Exception` catches
            raise _first_failure(failed) from failed

    return write


def _writer(folder: Path) -> dcp.FileSystemWriter:
    # Nothing is copied ahead. torch would wait for the copies of one GPU only, and the tensors may
    # be on several; in the background its thread would open the first GPU instead of the rank's.
    return dcp.FileSystemWriter(str(folder), per_thread_copy_ahead=0)


def load_optimizer(optimizer, names: list[str], folder: Path, state: dict, *, alone: bool) -> None:
    """Read what `save_optimizer` wrote, into an optimizer over the same parameters.

    They may be sharded differently now. state: what `save_optimizer` returned. alone: whether this
    process reads by itself. Raises ConfigError when the parameters have other names, or the index
    of the shards holds anything else than an index.
    """
    parameters = dict(zip(names, _parameters(optimizer), strict=True))
    saved = {key.rpartition("/")[0] for key in state["dtypes"]} | set(state["small"])
    if saved and saved != set(names):
        raise ConfigError(
            f"{folder.parent} holds the optimizer of parameters such as {min(saved ^ set(names))},"
            " which this run does not train the same way; continue it with the trainer and the"
            " model it was started with"
        )
    tensors = {}
    for key, dtype in state["dtypes"].items():
        tensors[key] = torch.zeros_like(
            parameters[key.rpartition("/")[0]],
            dtype=getattr(torch, dtype.removeprefix("torch.")),
            requires_grad=False,
        )
    if tensors:
        read_shards(tensors, folder, alone)
    loaded = {name: dict(values) for name, values in state["small"].items()}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        loaded.setdefault(name, {})[slot] = tensor
    by_index = {names.index(name): values for name, values in loaded.items()}
    # Before there were several groups, the settings of the only one were saved.
    settings = state["groups"] if "groups" in state else [state["settings"]]
    groups = _param_groups(optimizer, settings)
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def read_shards(tensors: dict[str, Tensor], folder: Path, alone: bool) -> None:
    """Fill the tensors from the shards in `folder`. alone: whether this process reads by itself.
    Raises ConfigError for damaged ones."""
    reader = _Reader(str(folder))
    reader.read_metadata()  # here its errors are ours; dcp would wrap them
    try:
        with _without_warnings():
            dcp.load(tensors, storage_reader=reader, no_dist=alone)
    except CheckpointException as failed:
        error = first_line(_first_failure(failed))
        raise ConfigError(
            f"{folder}: its shards cannot be read ({error}); {_remedy(folder)}"
        ) from failed


def _first_failure(failed: CheckpointException) -> BaseException:
    """The error of the first rank that failed."""
    return failed.failures[min(failed.failures)][0]


def _remedy(folder: Path) -> str:
    return f"delete {folder.parent} to continue from the checkpoint before it"


class _Reader(dcp.FileSystemReader):
    """torch's reader, with an index that is unpickled by `_IndexUnpickler`."""

    def read_metadata(self, *args, **kwargs) -> metadata.Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as f:
                index = _IndexUnpickler(f).load()
            files = {info.relative_path for info in index.storage_data.values()}
        # A file that is damaged or hostile can fail in any way.
        except Exception as error:
            raise ConfigError(
                f"{path} is not an index of shards ({first_line(error)}); {_remedy(path.parent)}"
            ) from error
        if outside := [file for file in files if Path(file).name != file]:
            raise ConfigError(f"{path} names {outside[0]}, which is not a file beside it")
        index.storage_meta.load_id = self.load_id
        return index


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles dtypes and INDEX_CLASSES, and refuses everything else before it is imported."""

    def find_class(self, module: str, name: str):
        if (module, name) in INDEX_CLASSES:
            return INDEX_CLASSES[module, name]
        found = vars(torch).get(name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _param_groups(optimizer, settings: list[dict]) -> list[dict]:
    """The optimizer's groups as in its state dict, with saved settings such as betas."""
    index = {id(parameter): i for i, parameter in enumerate(_parameters(optimizer))}
    groups = []
    for group, saved in zip(optimizer.param_groups, settings, strict=True):
        # Which kernels there are depends on this machine, not on the one that saved.
        kernels = {key: group[key] for key in ("fused", "foreach") if key in group}
        parameters = [index[id(parameter)] for parameter in group["params"]]
        groups.append({**group, **saved, **kernels, "params": parameters})
    return groups


def _parameters(optimizer) -> list:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextlib.contextmanager
def _without_warnings():
    """torch warns when one process writes or reads a checkpoint alone, which is intended here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
