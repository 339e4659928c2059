"""Loads the tokenizer, the policy and the reference from names, paths and archives."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.activations import NewGELUActivation
from transformers.utils import logging

from preflab.batching.packed_models import enable as enable_segments
from preflab.modeling.adapters import (
    add_adapter,
    check_tied,
    is_adapter,
    load_saved_adapter,
    merge_adapter,
    read_adapter,
)
from preflab.modeling.architecture_trial import supports_packed_rows
from preflab.modeling.fsdp import reshard
from preflab.modeling.logprobs import Scorer
from preflab.modeling.model_checks import (
    check_class,
    check_length,
    fit_special_tokens,
    vocabulary_rows,
    warn_about_bfloat16,
)
from preflab.modeling.model_source import instead_of_run, model_config, model_source
from preflab.modeling.parallelism import Place
from preflab.modeling.pretrained import forget_gguf, load_complete
from preflab.modeling.quantization import (
    check_blocks,
    check_quantization,
    is_quantized,
    prepare_quantized,
    quantization_config,
)
from preflab.modeling.weights_io import archive_place, load_archive, readable
from utils import ConfigError


def check_model(config, trainer: type, *, scalar_head: bool = False) -> int | None:
    """Check what the model supports before its weights are read. Returns the rows of its embedding,
    where its config states them.

    trainer: the class that declares where models live. Raises ConfigError for an encoder-decoder,
    for a max_length beyond the model's positions, and for a model that the trainer cannot place.
    """
    # The bars of transformers would break ours, for example while it saves a shard.
    logging.disable_progress_bar()
    warn_about_bfloat16(config.model)
    model = model_config(config.model)
    check_class(model, config.model.name_or_path)
    check_length(model, config.model.name_or_path, config.max_length)
    if config.model.lora.r and model_source(config.model.name_or_path).adapter is not None:
        raise ConfigError(
            f"model.lora.r={config.model.lora.r}: model.name_or_path={config.model.name_or_path} is"
            " an adapter itself, and the exported adapter would lack it; merge it first with"
            " scripts/merge_adapter.py"
        )
    if config.model.lora.r:
        skeleton(config.model, scalar_head=scalar_head)  # refuses target modules that cannot work
    check_quantization(config, trainer)
    if config.model.quantization:
        check_blocks(config, skeleton(config.model, scalar_head=scalar_head, trainable=False))
    trainer.check(config, scalar_head=scalar_head)
    return vocabulary_rows(model)


def load_tokenizer(config, rows: int | None = None):
    """The tokenizer of `model.tokenizer_name_or_path`, by default that of the model.

    rows: of the model's embedding; None leaves ids unchecked. A tokenizer without a pad token, or
    with one beyond the rows, pads with EOS, which is harmless because masks come from lengths.
    Raises ConfigError when there is no tokenizer, when it has no EOS token, and for BOS or EOS
    beyond the rows.
    """
    path, options = _tokenizer_source(config)
    with readable("model.tokenizer_name_or_path", path):
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=config.trust_remote_code, **options
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {path} has no EOS token, so no response could end; set its eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if rows is not None:
        fit_special_tokens(tokenizer, rows, config.name_or_path)
    return tokenizer


def _tokenizer_source(config) -> tuple[str, dict]:
    """Path and options of the tokenizer; an adapter folder may have one of its own."""
    if path := config.tokenizer_name_or_path:
        if Path(path).suffix.lower() == ".gguf":
            source = model_source(path, "model.tokenizer_name_or_path")
            return source.path, source.options
        if (hint := instead_of_run(path)) and not is_adapter(path):
            raise ConfigError(f"model.tokenizer_name_or_path={path} holds no tokenizer; {hint}")
        return path, {}
    source = model_source(config.name_or_path)
    if source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file():
        return str(source.adapter), {}
    return source.path, source.options


def build_policy(
    config,
    *,
    scalar_head: bool = False,
    trainable: bool = True,
    checkpoint: Path | None = None,
    place: Place | None = None,
) -> Scorer:
    """The policy: weights of `name_or_path` (random with from_scratch), then of `archive`, then a
    LoRA adapter if `lora.r` is set.

    config: the settings of the model. checkpoint: a step folder to continue from instead of
    `archive`. place: puts the model where it lives, from the CPU and from the dtype of its files,
    which are mapped. Without it the model is loaded to the GPU if there is one, spread over the
    GPUs if there are several.
    """
    mapped = place is not None
    model = load_model(config, config.policy_dtype, scalar_head=scalar_head, mapped=mapped)
    has_adapter = trainable and config.lora.r
    archive = config.archive if checkpoint is None or has_adapter else checkpoint
    if archive:
        model = _with_archive(
            model, archive, "model.archive", dtype_of(config.policy_dtype), mapped
        )
    if scalar_head and config.reinit_head and checkpoint is None:
        torch.nn.init.normal_(model.score.weight, std=0.02)
    if has_adapter:
        model = _add_lora(model, config.lora, scalar_head)
        if checkpoint is not None:
            load_saved_adapter(model, checkpoint)
    scorer = Scorer(model, autocast=_autocast(config))
    return _ready(scorer, scalar_head, place, dtype_of(config.policy_dtype), config)


def build_reference(
    config, policy: Scorer, *, training: bool, place: Place | None = None, own: bool = False
) -> Scorer:
    """The reference, without gradients. For a LoRA policy it is the same model with the adapter
    disabled, unless `own` asks for a separate model.

    Its weights are those of `reference_archive`; without it, those of `archive` in training, where
    the policy starts, and those of `name_or_path` otherwise.
    """
    archive = config.reference_archive or (config.archive if training else None)
    if shares_weights(config, policy) and not own:
        reference = Scorer(policy.model, adapter_off=True, autocast=policy.autocast)
        reference.enter = policy.enter
        reference.placed_on, reference.mixed = policy.placed_on, policy.mixed
        return reference
    mapped = place is not None
    model = load_model(config, config.reference_dtype, mapped=mapped)
    if archive:
        key = "model.reference_archive" if config.reference_archive else "model.archive"
        model = _with_archive(model, archive, key, dtype_of(config.reference_dtype), mapped)
    model.requires_grad_(False)
    scorer = Scorer(model, autocast=_autocast(config))
    return _ready(scorer, False, place, dtype_of(config.reference_dtype), config)


def shares_weights(config, policy: Scorer) -> bool:
    """Whether the reference is the policy with its LoRA adapter disabled."""
    return hasattr(policy.model, "peft_config") and not config.reference_archive


def _with_archive(
    model: nn.Module, archive: str | Path, key: str, dtype: torch.dtype, mapped: bool
) -> nn.Module:
    """The model with an archive's weights, or with an adapter merged into its own; on quantised
    ones the adapter stays apart. dtype: the one that the model will be used in."""
    archive = archive_place(archive)
    if is_adapter(archive):
        name = f"{key}={archive}"
        if is_quantized(model):  # it would be rounded again
            return add_adapter(model, *read_adapter(archive, name), name, "model.name_or_path")
        return merge_adapter(model, archive, name, "model.name_or_path", dtype)
    load_archive(model, archive, mapped=mapped)
    return model


def _ready(
    scorer: Scorer, scalar_head: bool, place: Place | None, dtype: torch.dtype, config
) -> Scorer:
    """The scorer in evaluation mode, placed and resharded."""
    disable_dropout(scorer.model)
    fuse_activations(scorer.model)
    _enable_segments_of(scorer.causal_lm, config)
    scorer.model.eval()
    if place is not None:
        place(scorer, dtype)
    if not scalar_head:
        scorer.check()
    reshard(scorer.model)
    return scorer


def _enable_segments_of(model: nn.Module, config) -> None:
    trusted = config.trust_remote_code
    if not config.attn_implementation and supports_packed_rows(model.config, trusted).ok:
        enable_segments(model)


def skeleton(config, *, scalar_head: bool = False, trainable: bool = True) -> nn.Module:
    """The policy on torch's meta device: names, shapes and classes without weights."""
    settings = model_config(config, **({"num_labels": 1} if scalar_head else {}))
    with (
        readable("model.name_or_path", config.name_or_path),
        torch.device("meta"),
        torch.random.fork_rng(),
    ):
        model = _model_class(scalar_head).from_config(
            settings,
            dtype=dtype_of(config.policy_dtype),
            trust_remote_code=config.trust_remote_code,
        )
        return _add_lora(model, config.lora, scalar_head) if trainable and config.lora.r else model


def one_layer_model(config, vocabulary: int, *, scalar_head: bool = False) -> nn.Module:
    """A random model with one layer of the policy and a small vocabulary, on the CPU, in the
    policy's dtype and with its LoRA adapter. config: the settings of the model."""
    settings = model_config(config, **({"num_labels": 1} if scalar_head else {}))
    text = settings.get_text_config()
    n_layers = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == n_layers:
            setattr(text, name, value[:1])
        elif name.endswith("_token_id") and value is not None:
            setattr(text, name, 0)
    text.num_hidden_layers, text.vocab_size = 1, vocabulary
    model = _model_class(scalar_head).from_config(
        settings, dtype=dtype_of(config.policy_dtype), trust_remote_code=config.trust_remote_code
    )
    disable_dropout(model)
    fuse_activations(model)
    _enable_segments_of(model, config)
    return _add_lora(model, config.lora, scalar_head) if config.lora.r else model


def _model_class(scalar_head: bool) -> type:
    return AutoModelForSequenceClassification if scalar_head else AutoModelForCausalLM


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name such as "bfloat16"."""
    return getattr(torch, name)


def _autocast(config) -> torch.dtype | None:
    return dtype_of(config.fsdp_policy_mp) if config.fsdp_policy_mp else None


def load_model(config, dtype: str, *, scalar_head: bool = False, mapped: bool = False) -> nn.Module:
    """A transformers model in `dtype`, on the GPU if there is one, its layers spread over the GPUs
    if there are several.

    mapped: on the CPU and in the dtype of its files instead, so that weights are read from the
    files when they are used. Raises ConfigError when the model cannot be read, and when its files
    lack weights other than a scalar head.
    """
    source, cls = model_source(config.name_or_path), _model_class(scalar_head)
    options = {"dtype": dtype_of(dtype), "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if scalar_head:
        options["num_labels"] = 1
    gpus = 0 if mapped else torch.cuda.device_count()
    with readable("model.name_or_path", config.name_or_path):
        if config.from_scratch:
            labels = {"num_labels": options.pop("num_labels")} if scalar_head else {}
            model = cls.from_config(model_config(config, **labels), **options)
            return model.to("cuda") if gpus else model
        if gpus > 1:
            options["device_map"] = "balanced"
        if mapped:
            options["dtype"] = "auto"
        options |= source.options
        if rounding := quantization_config(config):
            options["quantization_config"] = rounding
        model = load_complete(
            cls, source.path, "model.name_or_path", new_head=scalar_head, **options
        )
    if source.options:
        forget_gguf(model)
    elif is_quantized(model):
        prepare_quantized(model)
    if source.adapter is not None:
        name = f"model.name_or_path={source.adapter}"
        base = f"its base {source.path}"
        model = merge_adapter(model, source.adapter, name, base, dtype_of(dtype))
    return model.to("cuda") if gpus == 1 and not is_quantized(model) else model


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0.

    Log-ratios compare two models, so noise in either of them is noise in the loss.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def fuse_activations(model: nn.Module) -> None:
    """Replace the tanh-GELU of transformers, eight operations, by the single one of torch."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _add_lora(model: nn.Module, lora, scalar_head: bool) -> nn.Module:
    # Imported here because it is slow and most runs have no LoRA.
    from peft import LoraConfig, TaskType, get_peft_model

    targets = lora.target_modules
    if not isinstance(targets, str):
        targets = list(targets)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type=TaskType.SEQ_CLS if scalar_head else TaskType.CAUSAL_LM,
    )
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.target_modules={targets} does not fit {type(model).__name__}: {error}"
        ) from error
    check_tied(adapted, f"model.lora.target_modules={targets}")
    return adapted
