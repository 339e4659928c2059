"""What a model's config says about runs that it cannot serve, before its weights are read."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from preflab.batching.token_store import TokenStore
from utils import ConfigError, DataError

logger = logging.getLogger(__name__)

RESIZE = "give the folder its own tokenizer, or resize the model's embeddings and save it"
TOKENIZER_FIX = (
    "set model.tokenizer_name_or_path to the tokenizer that the model was trained with, or resize"
    " the model's embeddings and save it"
)


def check_class(model, path: str) -> None:
    """Raise ConfigError for an encoder-decoder. model: the config of transformers."""
    if getattr(model, "is_encoder_decoder", False):
        raise ConfigError(
            f"model.name_or_path={path} is an encoder-decoder (model_type={model.model_type}), and"
            " the losses here score one causal sequence; give a decoder-only model"
        )


def check_length(model, path: str, max_length: int) -> None:
    """Raise ConfigError where max_length passes the model's positions, or the length up to which
    rotary embeddings are the same for all rows.

    Those of rope_type "longrope" (arXiv:2402.13753) change beyond the original length. Those of
    "dynamic" change beyond the model's positions, which no row passes.
    """
    text = model.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and 0 < limit < max_length:  # XLNet has -1, for no limit
        raise ConfigError(
            f"max_length={max_length} exceeds the {limit} positions of {path}; lower it"
        )
    original = _original_length(text)
    if original is not None and max_length > original:
        raise ConfigError(
            f"max_length={max_length} exceeds original_max_position_embeddings={original} of"
            f" {path}: beyond it, the rotary embeddings of all rows of a batch follow the longest"
            " row (rope_type=longrope), so log-probs would depend on what else is in the batch; set"
            f" max_length to at most {original}"
        )


def _original_length(text) -> int | None:
    """The original length of longrope, the smallest if types of layers differ; None without it."""
    parameters = getattr(text, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]
    lengths = [
        one.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for one in [parameters, *by_layer]
        if one.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)


def warn_about_bfloat16(model) -> None:
    """Log a warning where the settings of a model ask a CPU without bfloat16 units for bfloat16,
    which it has to emulate."""
    asked = [
        f"model.{key}=bfloat16"
        for key in ("policy_dtype", "reference_dtype", "fsdp_policy_mp")
        if getattr(model, key) == "bfloat16"
    ]
    if asked and not torch.cuda.is_available() and not _has_bfloat16_units():
        logger.warning(
            f"{', '.join(asked)}: this CPU has no units for bfloat16, and float32 is several times"
            " as fast"
        )


def _has_bfloat16_units() -> bool:
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def vocabulary_rows(model) -> int | None:
    """Rows of the embedding, from the config of transformers."""
    return getattr(model.get_text_config(), "vocab_size", None)


def fit_special_tokens(tokenizer, rows: int, path: str, fix: str = TOKENIZER_FIX) -> None:
    """Raise ConfigError for BOS or EOS beyond the rows of the embedding, since every example has
    them. A pad token beyond them is replaced by EOS: masks come from lengths.

    path: the model, for the message. fix: what it says to change.
    """
    for name in ("bos", "eos"):
        token, token_id = (getattr(tokenizer, f"{name}_token{part}") for part in ("", "_id"))
        if token_id is not None and token_id >= rows:
            raise ConfigError(f"the {name.upper()} {_beyond(token, token_id, rows, path, fix)}")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token


def check_ids(store: TokenStore, tokenizer, rows: int, path: str) -> None:
    """Raise DataError, with file and line, for a token beyond the rows of the embedding."""
    if not len(store.tokens) or store.tokens.max() < rows:
        return
    position = int(np.argmax(store.tokens >= rows))
    # A prompt's responses follow it in `tokens`.
    number = int(np.searchsorted(store.prompts[:, 0], position, side="right")) - 1
    token_id = int(store.tokens[position])
    token = tokenizer.convert_ids_to_tokens(token_id)
    problem = _beyond(token, token_id, rows, path, TOKENIZER_FIX)
    raise DataError(f"{store.sources[number]}: the {problem}")


def check_texts(texts: Iterable[Sequence[int]], tokenizer, rows: int, path: str) -> None:
    """Raise ConfigError for a token of some tokenised texts beyond the rows of the embedding of
    the model at `path`, whose tokenizer it is. torch has no message of use, and none on a GPU."""
    largest = max((max(text) for text in texts if len(text)), default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(f"the {_beyond(token, largest, rows, path, RESIZE)}")


def _beyond(token: str, token_id: int, rows: int, path: str, fix: str) -> str:
    return (
        f"token {token!r} has id {token_id}, and the model {path} has {rows} rows"
        f" (ids 0 to {rows - 1}); {fix}"
    )
