"""Models of transformers from saved weights, all of them: what a file lacks would be random."""

from torch import nn

from preflab.modeling.weights_io import only_errors_logged, shared_wrapper
from utils import ConfigError

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

    Raises ConfigError for weights that the files lack or that have another shape.
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
    return model


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
