"""The weights of a checkpoint: hf/, with LoRA adapter/, and where asked for policy.pt.

What training continues from has the precision of training, whatever `save_dtype` says: the adapter
with LoRA, otherwise hf/, or beside an hf/ in a narrower dtype weights/ (policy.pt where it is
written).
"""

import copy
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from preflab.distributed.process_group import World
from preflab.modeling.loading import dtype_of, skeleton
from preflab.modeling.logprobs import Scorer
from preflab.modeling.model_source import model_source
from preflab.modeling.placed_weights import full_weights, on_disk
from preflab.modeling.quantization import is_quantized
from preflab.modeling.weights_io import archive_state
from preflab.settings.schema import Settings
from preflab.training.model_card import write_model_card
from utils import ConfigError, model_folder

SHARD = "2GB"  # the largest file of hf/


def save_weights(
    settings: Settings,
    policy: Scorer,
    tokenizer,
    folder: Path,
    *,
    world: World,
    scalar_head: bool,
    step: int,
    metrics: dict,
) -> Callable[[], None]:
    """Take a snapshot of the unsharded weights, and return what writes it to `folder`, in any
    thread. Every rank calls it, rank 0 writes.

    step, metrics: for the model card and policy.pt. With LoRA the adapter is merged into policy.pt
    and hf/, and adapter/ holds it alone.
    """
    if is_quantized(policy.model):
        return _save_adapter(settings, policy, tokenizer, folder, world, scalar_head, step, metrics)
    if world.rank > 0:
        full_weights(policy, folder, keep=False)  # takes part, and writes nothing
        return lambda: None
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".weights-"))
    state, in_use = full_weights(policy, scratch, keep=True)
    tokenizer_files = _tokenizer_files(tokenizer)
    model = skeleton(settings.model, scalar_head=scalar_head)
    generation = None if scalar_head else copy.deepcopy(policy.causal_lm.generation_config)

    def write() -> None:
        merged = _assembled(settings, model, state, in_use, folder, scratch)
        if generation is not None:
            merged.generation_config = generation
        _write_exact(settings, merged, folder, step, metrics)
        if settings.save_dtype != "same":
            round_weights(merged, dtype_of(settings.save_dtype), scratch)
        _write_hf(merged, folder / "hf", tokenizer_files)
        write_model_card(folder / "hf", settings, step, metrics)
        shutil.rmtree(scratch)

    return write


def _save_adapter(
    settings: Settings,
    policy: Scorer,
    tokenizer,
    folder: Path,
    world: World,
    scalar_head: bool,
    step: int,
    metrics: dict,
) -> Callable[[], None]:
    """`save_weights` for an adapter on a quantised base, which nothing is merged into: hf/ is
    adapter/, which `from_pretrained` reads together with its base."""
    if world.rank > 0:
        return lambda: None
    trained = {
        name: weight.detach().to("cpu", copy=True)
        for name, weight in policy.model.named_parameters()
        if weight.requires_grad
    }
    tokenizer_files = _tokenizer_files(tokenizer)
    model = skeleton(settings.model, scalar_head=scalar_head)

    def write() -> None:
        model.load_state_dict(trained, strict=False, assign=True)
        model.save_pretrained(folder / "adapter")
        _write_files(folder / "adapter", tokenizer_files)
        write_model_card(folder / "adapter", settings, step, metrics)
        (folder / "hf").symlink_to("adapter", target_is_directory=True)

    return write


@functools.lru_cache(maxsize=2)  # those of a policy and of a discriminator
def _tokenizer_files(tokenizer) -> dict[str, bytes]:
    """What `save_pretrained` writes for a tokenizer, by name.

    It is read before a thread writes it, because a tokenizer cannot be used in two threads at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _assembled(
    settings: Settings,
    model: nn.Module,
    state: dict[str, Tensor],
    in_use: Iterable[str],
    folder: Path,
    scratch: Path,
) -> nn.Module:
    """The model with a snapshot as its weights, an adapter merged into them. adapter/ is written.

    in_use: names of weights that training reads, which a merge may not change in place.
    """
    has_adapter = hasattr(model, "peft_config")
    if has_adapter:
        merged_into = [name for name in in_use if ".base_layer." in name]
        for i, name in enumerate(merged_into):
            state[name] = on_disk(state[name], scratch / f"base-{i}")
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if not has_adapter:
        return model
    if start := settings.model.archive:  # what the adapter was trained on
        model.active_peft_config.base_model_name_or_path = str(model_folder(start))
    elif model_source(settings.model.name_or_path).options:  # a GGUF file, not its folder
        model.active_peft_config.base_model_name_or_path = settings.model.name_or_path
    model.save_pretrained(folder / "adapter")
    return model.merge_and_unload()


def _write_exact(
    settings: Settings, model: nn.Module, folder: Path, step: int, metrics: dict
) -> None:
    """policy.pt where it is asked for, or weights/ where hf/ will be narrower than training is."""
    if settings.save_policy_pt:
        archive = {
            "step_idx": step,
            "state": archive_state(model),
            "metrics": {key: value for key, value in metrics.items() if value is not None},
        }
        torch.save(archive, folder / "policy.pt")
        return
    if not _holds_trained(settings) and not (folder / "adapter").is_dir():
        model.save_pretrained(folder / "weights", max_shard_size=SHARD)


def _holds_trained(settings: Settings) -> bool:
    """Whether every weight of training has an equal in the dtype of hf/."""
    if settings.save_dtype == "same":
        return True
    trained, saved = dtype_of(settings.model.policy_dtype), dtype_of(settings.save_dtype)
    return torch.promote_types(trained, saved) == saved


def _write_hf(model: nn.Module, folder: Path, tokenizer_files: dict[str, bytes]) -> None:
    model.save_pretrained(folder, max_shard_size=SHARD)
    _write_files(folder, tokenizer_files)


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype, scratch: Path) -> None:
    """Convert the weights of a model to `dtype`, into files in `scratch`, one in memory at a time.

    Those that transformers uses in float32 whatever the dtype stay in it. Raises ConfigError for a
    weight that is finite, and not in `dtype`.
    """
    precise = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    state, converted = {}, {}
    for i, (name, weight) in enumerate(model.state_dict().items()):
        is_precise = not precise.isdisjoint(name.split("."))
        if weight.dtype != dtype and weight.is_floating_point() and not is_precise:
            place = weight.data_ptr()
            if place not in converted:
                converted[place] = on_disk(weight, scratch / f"rounded-{i}", dtype)
                _check_finite(name, weight, converted[place])
            weight = converted[place]
        state[name] = weight
    if converted:
        model.load_state_dict(state, assign=True)
        model.tie_weights()


def _check_finite(name: str, before: Tensor, after: Tensor) -> None:
    if not bool(after.isfinite().all()) and bool(before.isfinite().all()):
        dtype = str(after.dtype).removeprefix("torch.")
        raise ConfigError(
            f"save_dtype={dtype} cannot hold the weight {name}, whose largest value is"
            f" {before.abs().max():.4g}; take bfloat16 or same"
        )
