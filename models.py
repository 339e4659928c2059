"""Tokenizer, policy and reference: from a name, a path or an archive to models ready to score."""

import contextlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.activations import NewGELUActivation
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file, logging

from attention import SHARING, block_table, flex_problem, window_of
from attention import enable as enable_segments
from distributed import ALONE, World
from layouts import LAYOUTS, Layout, lay_out
from logprobs import Scorer
from placement import devices_for, find_blocks, layer_plan, reshard
from utils import ConfigError, first_line

# Masks and tables that old transformers versions kept in checkpoints; none of them is a weight.
OLD_BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "rotary_emb.inv_freq",
)


def check_model(config, *, scalar_head: bool = False) -> None:
    """Refuse, before weights are read, lengths the model has no positions for and a placement it
    does not fit."""
    # saving a shard shows a bar of its own otherwise, in the middle of ours
    logging.disable_progress_bar()
    with _readable("model.name_or_path", config.model.name_or_path):
        model = AutoConfig.from_pretrained(
            config.model.name_or_path, trust_remote_code=config.model.trust_remote_code
        )
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise ConfigError(
            f"max_length={config.max_length} exceeds the {limit} positions of"
            f" {config.model.name_or_path}; lower it"
        )
    if config.trainer == "TensorParallelTrainer" and config.function != "plan":
        devices_for(config)
    if config.trainer == "FSDPTrainer":
        model = skeleton(config.model, scalar_head=scalar_head)
        find_blocks(model, config.model.block_name)
        if config.tensor_parallel_size > 1:
            layer_plan(model, config.tensor_parallel_size)


def load_tokenizer(config):
    """The tokenizer of `model.tokenizer_name_or_path`, by default that of the model.

    Masks come from lengths, so a pad token that equals EOS is harmless. Raises ConfigError when
    there is no tokenizer or it has no EOS, without which a response cannot end.
    """
    path = config.tokenizer_name_or_path or config.name_or_path
    with _readable("model.tokenizer_name_or_path", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {path} has no EOS token, so no response could end; set its eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def _readable(key: str, path: str):
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


Place = Callable[[Scorer, torch.dtype], None]  # puts a model where it will live; see placement.py


def build_policy(
    config,
    *,
    scalar_head: bool = False,
    trainable: bool = True,
    checkpoint: Path | None = None,
    place: Place | None = None,
) -> Scorer:
    """The policy: weights of `name_or_path` (random with from_scratch), then of `archive`, then
    LoRA if asked for.

    checkpoint: a step folder to go on from instead of `archive`. place: where the model goes; by
    default to the GPU if there is one, spread over the GPUs if there are several. A placed model
    comes as files map it: on the CPU, in the dtype of its files.
    """
    model = load_model(
        config, config.policy_dtype, scalar_head=scalar_head, mapped=place is not None
    )
    adapter = trainable and config.lora.r
    archive = config.archive if checkpoint is None or adapter else checkpoint
    if archive:
        load_archive(model, archive, mapped=place is not None)
    if scalar_head and config.reinit_head and checkpoint is None:
        torch.nn.init.normal_(model.score.weight, std=0.02)
    if adapter:
        model = _add_lora(model, config.lora, scalar_head)
        if (
            checkpoint is not None
        ):  # policy.pt holds the adapter folded in; training goes on from the adapter
            model.load_state_dict(
                torch.load(checkpoint / "adapter.pt", map_location="cpu", weights_only=True),
                strict=False,
            )
    return _ready(
        Scorer(model, autocast=_autocast(config)),
        scalar_head,
        place,
        dtype_of(config.policy_dtype),
        config,
    )


def build_reference(
    config, policy: Scorer, *, training: bool, place: Place | None = None
) -> Scorer:
    """The frozen reference. For a LoRA policy it is the same model with the adapter off.

    In training it starts where the policy starts (`archive`), unless `reference_archive` says
    otherwise; in evaluation it is `name_or_path` or `reference_archive`.
    """
    archive = config.reference_archive or (config.archive if training else None)
    if hasattr(policy.model, "peft_config") and not config.reference_archive:
        reference = Scorer(policy.model, adapter_off=True, autocast=policy.autocast)
        reference.enter, reference.placed_on, reference.mixed = (
            policy.enter,
            policy.placed_on,
            policy.mixed,
        )
        return reference
    model = load_model(config, config.reference_dtype, mapped=place is not None)
    if archive:
        load_archive(model, archive, mapped=place is not None)
    model.requires_grad_(False)
    return _ready(
        Scorer(model, autocast=_autocast(config)),
        False,
        place,
        dtype_of(config.reference_dtype),
        config,
    )


def _ready(
    scorer: Scorer, scalar_head: bool, place: Place | None, dtype: torch.dtype, config
) -> Scorer:
    disable_dropout(scorer.model)
    fuse_activations(scorer.model)
    if not config.attn_implementation and scorer.causal_lm.config.model_type in SHARING:
        enable_segments(scorer.causal_lm)
    scorer.model.eval()
    if place is not None:
        place(scorer, dtype)
    if not scalar_head:
        scorer.check()
    reshard(scorer.model)
    return scorer


# ------------------------------------------------------------------------------------------ layouts


def known_layouts(config, model) -> tuple[tuple[str, ...], str]:
    """The layouts that an architecture is known to support, the fastest first, and why there are no
    more.

    model: its transformers config. What only a run of the model can tell is left to
    `choose_layout`.
    """
    why = ""
    if config.model.attn_implementation:
        why = f"model.attn_implementation={config.model.attn_implementation} takes no packed rows"
    elif model.model_type not in SHARING:
        why = (
            f"{model.model_type} is not among the architectures tested with packed rows, SHARING in"
            " attention.py"
        )
    return ("padded",) if why else LAYOUTS, why


def choose_layout(config, policy: Scorer, world: World = ALONE, **details) -> tuple[Layout, str]:
    """The layout of `config.layout`, or the fastest that gives this model the padded layout's
    log-probs; and why not a faster one.

    details: more fields of the layout. Raises ConfigError where the layout that was asked for is
    wrong for the model.
    """
    known, why = known_layouts(config, policy.causal_lm.config)
    asked = config.layout
    if asked == "padded" or (asked == "auto" and known == ("padded",)):
        return Layout("padded", **details), why
    if not why:
        slower = why_not_flex(config, policy, world)
        why = sharing_problem(policy, flex=slower is None) or ""
        if why and slower is None:
            slower, why = (
                f"attention segment by segment, slower: {why}",
                sharing_problem(policy) or "",
            )
    if not why:
        return (
            Layout(asked if asked != "auto" else LAYOUTS[0], flex=slower is None, **details),
            slower or "",
        )
    if asked != "auto":
        raise ConfigError(f"layout={asked} cannot be had: {why}; use layout=padded")
    return Layout("padded", **details), why


def why_not_flex(config, policy: Scorer, world: World) -> str | None:
    """Why attention over packed rows goes segment by segment, as is best on a CPU (""); None if it
    goes by FlexAttention."""
    model = policy.causal_lm.config.get_text_config()
    if policy.device.type == "cpu":
        return ""
    window = window_of(model)
    if window is not None and window < config.max_length:
        problem = (
            f"attention windows of {window} tokens, texts of up to max_length={config.max_length}"
        )
    elif len({p.device for p in policy.model.parameters()}) > 1:
        problem = "the model is spread over several GPUs"
    else:
        heads = model.num_attention_heads
        sizes = (
            heads,
            getattr(model, "num_key_value_heads", None) or heads,
            getattr(model, "head_dim", None) or model.hidden_size // heads,
        )
        problem = flex_problem(
            *sizes, policy.mixed or next(policy.model.parameters()).dtype, policy.device
        )
        if world.max([float(problem is not None)])[0]:  # all ranks attend alike
            problem = problem or "another rank cannot use FlexAttention"
    return problem and f"attention segment by segment, slower: {problem}"


@torch.no_grad()
def sharing_problem(scorer: Scorer, flex: bool = False) -> str | None:
    """What is wrong with packed rows in this model, seen on two made-up prompts with several
    responses each; None if nothing.

    The control is the same row with responses that see each other: a model that cannot tell them
    apart proves nothing.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = scorer.causal_lm.config.get_text_config().vocab_size
    trees = [(7, (5, 1, 3)), (1, (4, 6))]
    draw = lambda n: torch.randint(vocabulary, (n,), generator=generator).numpy()  # noqa: E731
    tokens = [(draw(prompt), [draw(n) for n in responses]) for prompt, responses in trees]
    padded, shared, wrong = (
        lay_out(tokens, Layout(name, flex=flex))
        for name in ("padded", "prefix_shared", "prefix_shared")
    )
    wrong.segments = torch.tensor([[[[0, 7, 7, 6], [13, 1, 14, 8]]]])  # one long response a prompt
    wrong.blocks = block_table(wrong.segments, wrong.input_ids.shape[1]) if flex else None
    found = []
    try:
        for batch in (batch.to(scorer.device) for batch in (padded, shared, wrong)):
            found.append(
                scorer.run(lambda batch=batch: scorer.hidden(batch, batch.positions)).double()
            )
    except Exception as failure:  # kernels fail in ways of their own
        told = f"attention over packed rows fails here ({first_line(failure)})"
        if (
            scorer.placed_on is not None
        ):  # a forward pass that broke off leaves a sharded model half gathered
            raise ConfigError(f"{told}; use layout=padded") from failure
        return told
    error, control = ((other - found[0]).abs().max().item() for other in found[1:])
    if error < control * (0.02 if scorer.is_full_precision() else 0.2):
        return None
    return (
        f"hidden states of packed rows of {type(scorer.causal_lm).__name__} are off by {error:.2g}"
        f" (a wrong mask: by {control:.2g})"
    )


def skeleton(config, *, scalar_head: bool = False, trainable: bool = True) -> nn.Module:
    """The policy without its weights (on torch's meta device): its names, shapes and classes."""
    kind = AutoModelForSequenceClassification if scalar_head else AutoModelForCausalLM
    with (
        _readable("model.name_or_path", config.name_or_path),
        torch.device("meta"),
        torch.random.fork_rng(),
    ):
        settings = AutoConfig.from_pretrained(
            config.name_or_path, trust_remote_code=config.trust_remote_code
        )
        if scalar_head:
            settings.num_labels = 1
        model = kind.from_config(
            settings,
            dtype=dtype_of(config.policy_dtype),
            trust_remote_code=config.trust_remote_code,
        )
        return _add_lora(model, config.lora, scalar_head) if trainable and config.lora.r else model


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def _autocast(config) -> torch.dtype | None:
    return dtype_of(config.fsdp_policy_mp) if config.fsdp_policy_mp else None


def load_model(config, dtype: str, *, scalar_head: bool = False, mapped: bool = False) -> nn.Module:
    """A transformers model in `dtype`, on the GPU if there is one, split over the GPUs if there are
    several.

    mapped: on the CPU and in the dtype of its files instead, so that its weights are read only when
    they are used.
    """
    path, kind = (
        config.name_or_path,
        AutoModelForSequenceClassification if scalar_head else AutoModelForCausalLM,
    )
    options = {"dtype": dtype_of(dtype), "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if scalar_head:
        options["num_labels"] = 1
    gpus = 0 if mapped else torch.cuda.device_count()
    with _readable("model.name_or_path", path):
        if config.from_scratch:
            labels = {"num_labels": options.pop("num_labels")} if scalar_head else {}
            model = kind.from_config(
                AutoConfig.from_pretrained(
                    path, trust_remote_code=config.trust_remote_code, **labels
                ),
                **options,
            )
            return model.to("cuda") if gpus else model
        if gpus > 1:
            return kind.from_pretrained(path, device_map="balanced", **options)
        model = kind.from_pretrained(path, **options | ({"dtype": "auto"} if mapped else {}))
    return model.to("cuda") if gpus else model


def disable_dropout(model: nn.Module) -> None:
    """Every dropout rate to 0: log-ratios compare two models, and noise in either is noise in the
    loss."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def fuse_activations(model: nn.Module) -> None:
    """tanh-GELU as the one operation that torch has for it, where transformers writes it out in
    eight."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _add_lora(model: nn.Module, lora, scalar_head: bool) -> nn.Module:
    from peft import (  # slow to import, and most runs have no LoRA
        LoraConfig,
        TaskType,
        get_peft_model,
    )

    targets = (
        lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    )
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type=TaskType.SEQ_CLS if scalar_head else TaskType.CAUSAL_LM,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.target_modules={targets} does not fit {type(model).__name__}: {error}"
        ) from error


# ----------------------------------------------------------------------------------------- archives


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
    with _readable("model.name_or_path", name_or_path):
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
