"""Models of transformers from saved weights, all of them: what a file lacks would be random, and
what it has beyond them would be lost."""

import logging

from torch import nn

from preflab.modeling.weights_io import OLD_BUFFERS, only_errors_logged, shared_wrapper
from utils import ConfigError

logger = logging.getLogger(__name__)

FIX = (
    "they would be random; give a folder that save_pretrained wrote, with the config.json of the"
    " same model"
)


def load_complete(
    cls: type, path: str, key: str, *, new_head: bool = False, fix: str = FIX, **options
) -> nn.Module:
    """`cls.from_pretrained(path, **options)`, where every weight of the model is in the files.

    A prefix that all unused weights share, such as `_orig_mod.`, is taken off. Tied weights count
    once. key: the setting that holds `path`. new_head: a scalar head `score` may be new. fix: what
    the error says to change.

    Raises ConfigError for weights that the files lack or that have another shape, and for weights
    inside of the model that it has no place for, such as those of further layers or a bias: then
    config.json is that of another model. Others, such as a value head, are logged.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with only_errors_logged():
        model, info = cls.from_pretrained(path, **options)
        if _missing(info, new_head) and (wrapper := shared_wrapper(info["unexpected_keys"])):
            renamed = {wrapper.pattern: "", **options.pop("key_mapping", {})}
            model, info = cls.from_pretrained(path, key_mapping=renamed, **options)
    if missing := _missing(info, new_head):
        unused = ", ".join(sorted(info["unexpected_keys"])[:5]) or "none"
        raise ConfigError(
            f"{key}={path} has no weights for {_some(missing)} of {type(model).__name__}; {fix}"
            f" (weights that are not used: {unused})"
        )
    if not getattr(model, "is_quantized", False):
        _check_unused(model, info["unexpected_keys"], f"{key}={path}", new_head)
    return model


def forget_gguf(model: nn.Module) -> None:
    """Let a model of a GGUF file be what it is, one with the dequantised weights."""
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _check_unused(model: nn.Module, names, place: str, new_head: bool) -> None:
    """Refuse unused weights of the model's own parts, and log others."""
    unused = sorted(name for name in names if not name.endswith(OLD_BUFFERS))
    if inside := [name for name in unused if _is_inside(model, name)]:
        raise ConfigError(
            f"{place} has weights that its config.json has no place for in {type(model).__name__}:"
            f" {_some(inside)}; give the config.json that was saved with them"
        )
    if unused and not (new_head and all(name.startswith("lm_head.") for name in unused)):
        logger.warning(f"{place} has weights that are not used: {_some(unused)}")


def _is_inside(model: nn.Module, name: str) -> bool:
    """Whether a weight belongs to a part of the model below its body: to one of its layers or to
    one more of them, or to a module that has other weights."""
    parts = name.split(".")
    module, depth = model, 0
    for part in parts[:-1]:
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            break
        module, depth = child, depth + 1
    body = getattr(model, model.base_model_prefix, model)
    return depth > 0 and module is not body


def _missing(info: dict, new_head: bool) -> list[str]:
    """The weights that transformers has initialised. A head of another shape is no new head."""
    missing = [key for key in info["missing_keys"] if not (new_head and key.startswith("score."))]
    other_shapes = [
        f"{key} {tuple(in_model)} (in the file: {tuple(in_file)})"
        for key, in_file, in_model in info["mismatched_keys"]
    ]
    return sorted(missing) + sorted(other_shapes)


def _some(names: list[str], n: int = 5) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more
