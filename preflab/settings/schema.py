# ruff: noqa: RUF009 - `setting` makes a field; it is no default
"""The settings of config.yaml, one dataclass for each group of keys.

Beside each field stand its type and range, whether a run that continues may change it, and whether
it is part of what a run is. What a key means, and its default, stand in config.yaml.
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any

from preflab.settings.value_types import (
    Choice,
    Day,
    Either,
    Flag,
    Integer,
    ListOf,
    Mapping,
    Module,
    Number,
    PathText,
    Refused,
    Text,
    ValueType,
    Weighted,
    nullable,
    shown,
)
from utils import ConfigError

FLAG, TEXT, PATH, MAPPING, MODULE = Flag(), Text(), PathText(), Mapping(), Module()
COUNT, POSITIVE, NOT_NEGATIVE = Integer(1), Number(above=0), Number(least=0)
SHARE, PART = Number(above=0, below=1), Number(above=0, most=1)
DTYPE = Choice(("float32", "bfloat16", "float16", "float64"))
# Of torch.manual_seed, numpy and random, numpy's global generator accepts the fewest seeds.
SEED = Integer(0, 2**32 - 1)
PORT = Integer(1, 65535)
AUTO = Choice(("auto", True, False))


class Change(Enum):
    """When a run that continues may have another value of a setting."""

    NEVER = "never"
    TRAINING = "under function=train alone: function=online learns from samples that it shapes"
    ALWAYS = "always"


NEVER, TRAINING, ALWAYS = Change


@dataclass(frozen=True)
class Rule:
    """What is declared beside a field.

    accepts: None for a group of settings. part_of_run: whether another value asks for another run;
    the rest says where a run is stored and what it shows. entries_may_change: entries of an open
    group that may always change.
    """

    accepts: ValueType | None
    may_change: Change
    part_of_run: bool
    entries_may_change: frozenset[str] = frozenset()
    hint: str = ""


def setting(
    accepts: ValueType,
    *,
    null: bool = False,
    may_change: Change = NEVER,
    part_of_run: bool = True,
    hint: str = "",
):
    """A field of a group. null: whether null is accepted; hint: what to do with a refused value."""
    accepts = nullable(accepts) if null else accepts
    return dataclasses.field(metadata={"rule": Rule(accepts, may_change, part_of_run, hint=hint)})


def group(*, may_change: Change = NEVER, part_of_run: bool = True):
    """A field that holds the dataclass of a group; what is said of it holds for all its fields."""
    return dataclasses.field(metadata={"rule": Rule(None, may_change, part_of_run)})


def open_group(
    *,
    may_change: Change = NEVER,
    entries_may_change: tuple[str, ...] = (),
    null_is_empty: bool = False,
):
    """A field that holds a dict, which the signature of a registered function checks."""
    rule = Rule(Mapping(null_is_empty), may_change, True, frozenset(entries_may_change))
    return dataclasses.field(metadata={"rule": rule})


# ------------------------------------------------------------------------------------------ groups


@dataclass(frozen=True)
class ColumnSettings:
    """Names of a user's columns."""

    prompt: str | None = setting(TEXT, null=True)
    chosen: str | None = setting(TEXT, null=True)
    rejected: str | None = setting(TEXT, null=True)
    score_chosen: str | None = setting(TEXT, null=True)
    score_rejected: str | None = setting(TEXT, null=True)
    chosen_token_weights: str | None = setting(TEXT, null=True)
    rejected_token_weights: str | None = setting(TEXT, null=True)
    text: str | None = setting(TEXT, null=True)
    reward: str | None = setting(TEXT, null=True)
    responses: str | None = setting(TEXT, null=True)
    scores: str | None = setting(TEXT, null=True)
    instruction: str | None = setting(TEXT, null=True)
    completions: str | None = setting(TEXT, null=True)
    question: str | None = setting(TEXT, null=True)
    response_j: str | None = setting(TEXT, null=True)
    response_k: str | None = setting(TEXT, null=True)
    magnitude: str | None = setting(TEXT, null=True)
    completion: str | None = setting(TEXT, null=True)
    label: str | None = setting(TEXT, null=True)


@dataclass(frozen=True)
class WandbSettings:
    enabled: bool = setting(FLAG)
    entity: str | None = setting(TEXT, null=True)
    project: str = setting(TEXT)


@dataclass(frozen=True)
class LoraSettings:
    r: int = setting(Integer(0), hint="0 trains all weights")
    alpha: float = setting(Either((COUNT, POSITIVE)))  # 16 stays an integer, as peft has it
    target_modules: str | list[str] = setting(Either((TEXT, ListOf(TEXT, may_be_empty=False))))


@dataclass(frozen=True)
class ModelSettings:
    name_or_path: str | None = setting(PATH, null=True)
    tokenizer_name_or_path: str | None = setting(PATH, null=True)
    archive: str | list[str] | None = setting(Either((PATH, ListOf(PATH))), null=True)
    reference_archive: str | None = setting(PATH, null=True)
    from_scratch: bool = setting(FLAG)
    reinit_head: bool = setting(FLAG)
    block_name: str | None = setting(TEXT, null=True)
    policy_dtype: str = setting(DTYPE)
    fsdp_policy_mp: str | None = setting(DTYPE, null=True)
    reference_dtype: str = setting(DTYPE)
    attn_implementation: str | None = setting(TEXT, null=True)
    trust_remote_code: bool = setting(FLAG)
    lora: LoraSettings = group()
    quantization: str | None = setting(Choice(("4bit", "8bit")), null=True)
    quantization_args: dict[str, Any] = open_group(null_is_empty=True)


@dataclass(frozen=True)
class ReferenceSettings:
    cache: str | bool = setting(AUTO, may_change=ALWAYS)
    update: str = setting(Choice(("frozen", "hard", "ema", "round")))
    every: int | None = setting(COUNT, null=True)
    rate: float | None = setting(PART, null=True)
    past: list[float] | None = setting(ListOf(PART, may_be_empty=False), null=True)
    compare: bool = setting(FLAG, may_change=ALWAYS)


@dataclass(frozen=True)
class PlanSettings:
    gpu_gib: float | None = setting(POSITIVE, null=True)


@dataclass(frozen=True)
class AtlasSettings:
    pairs: int = setting(COUNT)
    losses: list[str | dict] | None = setting(
        ListOf(Either((TEXT, MAPPING)), may_be_empty=False), null=True
    )
    sketch: str | int = setting(Either((Choice(("auto",)), Integer(0))), hint="0: no sketch")
    same: float = setting(PART)


@dataclass(frozen=True)
class OnlineSettings:
    rounds: int = setting(COUNT, may_change=ALWAYS)
    prompts_per_round: int | None = setting(COUNT, null=True)
    responses_per_prompt: int = setting(Integer(2))
    max_new_tokens: int | None = setting(COUNT, null=True)
    updates_per_round: int = setting(COUNT)
    sampler: str | None = setting(PATH, null=True)
    ahead: bool = setting(FLAG)
    budget: int | None = setting(Integer(0), null=True, may_change=ALWAYS)
    oracle: str = setting(Choice(("comparisons", "scores")))
    measure_gold: str | bool = setting(AUTO, may_change=ALWAYS)
    eval_every: int = setting(COUNT, may_change=ALWAYS)
    save_every: int = setting(COUNT, may_change=ALWAYS)
    discriminator: str | dict | None = setting(Either((TEXT, MAPPING)), null=True)
    discriminator_path: str | None = setting(PATH, null=True)
    discriminator_lr: float = setting(POSITIVE, may_change=ALWAYS)
    discriminator_batch_size: int = setting(COUNT)
    discriminator_epochs: int = setting(COUNT)
    initial_labels: int = setting(Integer(0))
    initial_epochs: int = setting(COUNT)
    relabel_every: int = setting(Integer(2))
    relabels: int = setting(COUNT)
    select: str | dict = setting(Either((TEXT, MAPPING)))
    replay: int = setting(Integer(0))
    stop_labels: int | None = setting(Integer(0), null=True)


@dataclass(frozen=True)
class SamplerSettings:
    url: str | None = setting(TEXT, null=True)
    server: str = setting(Choice(("vllm", "sglang", "transformers")))
    model: str | None = setting(TEXT, null=True)
    reference_model: str | None = setting(TEXT, null=True)
    token_env: str = setting(TEXT)
    tolerance: float | None = setting(POSITIVE, null=True)
    concurrency: int = setting(COUNT)
    timeout: float = setting(POSITIVE)
    retries: int = setting(Integer(0))
    backoff: float = setting(NOT_NEGATIVE)


# ------------------------------------------------------------------- settings outside of any group


@dataclass(frozen=True)
class RunSettings:
    """The run and its folder."""

    seed: int = setting(SEED)
    function: str = setting(Choice(("train", "eval", "online", "plan", "atlas")))
    exp_name: str = setting(TEXT, may_change=ALWAYS, part_of_run=False)
    debug: bool = setting(FLAG)
    tracker: str = setting(
        Choice(("wandb", "trackio", "tensorboard", "mlflow", "none")),
        may_change=ALWAYS,
        part_of_run=False,
    )
    criterion: str | None = setting(PATH, null=True, may_change=ALWAYS, part_of_run=False)
    local_dirs: list[str] = setting(
        ListOf(PATH, may_be_empty=False), may_change=ALWAYS, part_of_run=False
    )
    local_run_dir: str | None = setting(PATH, null=True, may_change=ALWAYS, part_of_run=False)
    skip_finished: str | None = setting(PATH, null=True, may_change=ALWAYS, part_of_run=False)
    objective: str | list[str] = setting(
        Either((TEXT, ListOf(TEXT))), may_change=ALWAYS, part_of_run=False
    )
    resume: str | None = setting(PATH, null=True, may_change=ALWAYS, part_of_run=False)
    save_every: int | None = setting(COUNT, null=True, may_change=ALWAYS)
    keep_checkpoints: int | None = setting(COUNT, null=True, may_change=ALWAYS, part_of_run=False)
    keep_steps: list[int] | None = setting(
        ListOf(COUNT), null=True, may_change=ALWAYS, part_of_run=False
    )
    save_dtype: str = setting(
        Choice(("same", "float32", "bfloat16", "float16")), may_change=ALWAYS, part_of_run=False
    )
    save_policy_pt: bool = setting(FLAG, may_change=ALWAYS, part_of_run=False)
    report: bool = setting(FLAG, may_change=ALWAYS, part_of_run=False)
    minimum_log_interval_secs: float = setting(NOT_NEGATIVE, may_change=ALWAYS, part_of_run=False)
    profile_steps: int | None = setting(COUNT, null=True, may_change=ALWAYS, part_of_run=False)


@dataclass(frozen=True)
class DataSettings:
    """Data."""

    datasets: list[str | dict] = setting(
        ListOf(Either((PATH, Weighted(PATH))), may_be_empty=False),
        hint="such as datasets=[hh], datasets=[hh,shp] or"
        ' "datasets=[{name: hh, weight: 0.3}, {name: shp, weight: 0.7}]"',
    )
    dataset_module: str | None = setting(MODULE, null=True)
    data_dir: str = setting(PATH, may_change=ALWAYS)
    cache_dir: str = setting(PATH, may_change=ALWAYS, part_of_run=False)
    pairing: str | None = setting(Choice(("first_two", "all", "best_worst", "random")), null=True)
    min_gap: float = setting(NOT_NEGATIVE)
    max_responses: int | None = setting(Integer(2), null=True)
    choose_responses: str = setting(Choice(("best_worst", "stratified")))
    test_fraction: float = setting(Number(above=0, below=1))
    train_split: str | None = setting(TEXT, null=True)
    test_split: str | None = setting(TEXT, null=True)
    prompt_template: str | None = setting(TEXT, null=True)
    train_on: str = setting(Choice(("last", "assistant")))
    chat_template_kwargs: dict[str, Any] = open_group(null_is_empty=True)
    chat_date: str = setting(Day())
    max_length: int = setting(Integer(2))
    max_prompt_length: int = setting(Integer(2))


@dataclass(frozen=True)
class TrainingSettings:
    """Training."""

    n_epochs: int | None = setting(COUNT, null=True, may_change=ALWAYS)
    n_examples: int | None = setting(COUNT, null=True, may_change=ALWAYS)
    batch_size: int = setting(COUNT)
    gradient_accumulation_steps: int = setting(COUNT, may_change=ALWAYS)
    microbatch_tokens: int | None = setting(COUNT, null=True, may_change=ALWAYS)
    lr: float = setting(POSITIVE, hint="0 would train nothing")
    optimizer: str = setting(PATH)
    optimizer_args: dict[str, Any] = open_group(null_is_empty=True)
    weight_decay_on: str = setting(Choice(("matrices", "all")))
    lr_schedule: str = setting(Choice(("constant", "linear", "cosine", "wsd", "inverse_sqrt")))
    lr_min: float = setting(NOT_NEGATIVE)
    lr_decay_share: float = setting(SHARE)
    warmup_steps: int | float = setting(Either((Integer(0), SHARE)), hint="below 1 it is a share")
    max_grad_norm: float = setting(POSITIVE, hint="for no clipping, take a large one such as 1e9")
    order: str = setting(Choice(("pairs", "prompts")))
    length_grouping: bool = setting(FLAG, may_change=ALWAYS)


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation and samples."""

    eval_every: int = setting(COUNT, may_change=ALWAYS)
    do_first_eval: bool = setting(FLAG, may_change=ALWAYS)
    best_metric: str | None = setting(TEXT, null=True)
    patience: int | None = setting(COUNT, null=True, may_change=ALWAYS)
    n_eval_examples: int = setting(COUNT, may_change=ALWAYS)
    eval_batch_size: int = setting(COUNT, may_change=ALWAYS)
    sample_during_eval: bool = setting(FLAG, may_change=ALWAYS)
    n_eval_model_samples: int = setting(COUNT, may_change=ALWAYS)
    samples_per_prompt: int = setting(COUNT, may_change=ALWAYS)
    temperature: float | list[float] = setting(
        Either((NOT_NEGATIVE, ListOf(NOT_NEGATIVE, may_be_empty=False))), may_change=TRAINING
    )
    topp: float = setting(PART, may_change=TRAINING, hint="1 draws from the whole vocabulary")
    top_k: int | None = setting(COUNT, null=True, may_change=TRAINING)
    min_p: float | None = setting(Number(above=0, most=1), null=True, may_change=TRAINING)
    max_new_tokens: int | None = setting(COUNT, null=True, may_change=TRAINING)
    more_rewards: list[str | dict] | None = setting(
        ListOf(Either((TEXT, MAPPING))), null=True, may_change=TRAINING
    )


@dataclass(frozen=True)
class PlacementSettings:
    """Where the model runs, and in what form."""

    trainer: str = setting(PATH, may_change=ALWAYS)
    world_size: int | None = setting(COUNT, null=True, may_change=ALWAYS)
    fsdp_port: int | None = setting(PORT, null=True, may_change=ALWAYS, part_of_run=False)
    tensor_parallel_size: int = setting(COUNT, may_change=ALWAYS)
    fsdp_shard_size: int | None = setting(COUNT, null=True, may_change=ALWAYS)
    fsdp_cpu_offload: bool = setting(FLAG, may_change=ALWAYS)
    activation_checkpointing: bool = setting(FLAG, may_change=ALWAYS)
    compile: bool = setting(FLAG, may_change=ALWAYS)
    layout: str = setting(Choice(("auto", "prefix_shared", "packed", "padded")), may_change=ALWAYS)


@dataclass(frozen=True)
class ServiceSettings:
    """The service of serve_reward.py."""

    host: str = setting(TEXT, may_change=ALWAYS, part_of_run=False)
    port: int = setting(PORT, may_change=ALWAYS, part_of_run=False)


@dataclass(frozen=True)
class Settings(
    ServiceSettings,
    PlacementSettings,
    EvaluationSettings,
    TrainingSettings,
    DataSettings,
    RunSettings,
):
    """All of config.yaml: the keys of the topics above, and the groups."""

    model: ModelSettings = group()
    loss: dict[str, Any] = open_group()
    reward: dict[str, Any] = open_group(
        may_change=TRAINING,
        # the way to a reward, which changes no score
        entries_may_change=(
            "url",
            "token_env",
            "key_env",
            "timeout",
            "retries",
            "backoff",
            "batch_size",
            "concurrency",
            "max_requests",
        ),
    )
    dataset_columns: ColumnSettings = group()
    online: OnlineSettings = group()
    reference: ReferenceSettings = group()
    sampler: SamplerSettings = group(may_change=ALWAYS)
    wandb: WandbSettings = group(may_change=ALWAYS, part_of_run=False)
    plan: PlanSettings = group(may_change=ALWAYS, part_of_run=False)
    atlas: AtlasSettings = group(may_change=ALWAYS)


TOPICS = (
    RunSettings,
    DataSettings,
    TrainingSettings,
    EvaluationSettings,
    PlacementSettings,
    ServiceSettings,
)


# Entries that every open group has.
ENTRIES = {"name": TEXT, "module": nullable(MODULE)}


# --------------------------------------------------------------------------------------- questions


def _rules(settings: type, prefix: str = "") -> dict[str, Rule]:
    rules = {}
    for field in dataclasses.fields(settings):
        rules[prefix + field.name] = field.metadata["rule"]
        if dataclasses.is_dataclass(field.type):
            rules |= _rules(field.type, f"{prefix}{field.name}.")
    return rules


# Of every key of config.yaml by its dotted name, the groups included.
RULES: dict[str, Rule] = _rules(Settings)


def open_parent(key: str) -> str | None:
    """The setting that holds `key` as an entry of a dict: `loss` of loss.beta. None for the keys of
    the schema and for unknown ones."""
    parents = key.split(".")[:-1]
    for length in range(len(parents), 0, -1):
        parent = ".".join(parents[:length])
        if parent in RULES:
            return parent if _accepts_mapping(RULES[parent].accepts) else None
    return None


def _accepts_mapping(accepts: ValueType | None) -> bool:
    if isinstance(accepts, Either):
        return any(_accepts_mapping(inner) for inner in accepts.types)
    return isinstance(accepts, Mapping)


def may_change(key: str, function: str) -> bool:
    """Whether a run of this function may continue with another value of a key."""
    allowed = (ALWAYS, TRAINING) if function == "train" else (ALWAYS,)
    parent = open_parent(key)
    if parent and key.removeprefix(f"{parent}.") in RULES[parent].entries_may_change:
        return True
    parts = key.split(".")
    names = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(RULES[name].may_change in allowed for name in names if name in RULES)


def part_of_run(key: str) -> bool:
    """Whether another value of a top-level key asks for another run."""
    return RULES[key].part_of_run if key in RULES else key != "hydra"


def parse_value(key: str, value: Any) -> Any:
    """The value of a setting in the setting's type. Raises ConfigError."""
    rule = RULES[key]
    try:
        return (rule.accepts or MAPPING).parse(value)
    except Refused as refused:
        raise ConfigError(f"{key}={shown(value)}{_complaint(key, value, refused)}") from None


def parse_entry(key: str, name: str, value: Any) -> Any:
    """An entry of the dict of a setting, such as `loss`. What holds for every entry is checked:
    `name` is a string, `module` a module, and integers fit into 64 bits. Raises ConfigError."""
    accepts = ENTRIES.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        accepts = accepts or Integer(-(2**63))
    try:
        return accepts.parse(value) if accepts else value
    except Refused:
        raise ConfigError(f"{key}.{name}={shown(value)} must be {accepts}") from None


def _complaint(key: str, value: Any, refused: Refused) -> str:
    rule = RULES[key]
    if rule.accepts is None:
        entry = next(name for name in RULES if name.startswith(f"{key}."))
        return f" is the name of a group of settings; set one of them, such as {entry}=VALUE"
    if (options := str(rule.accepts)).startswith("one of "):
        guess = f" {refused.hint}" if refused.hint else ""
        return f";{guess} accepted: {options.removeprefix('one of ')}"
    hint = refused.hint or rule.hint
    if isinstance(value, bool) and "a string" in options:
        hint = f"type \"{key}='{shown(value)}'\""
    if isinstance(rule.accepts, ListOf) and isinstance(value, str) and value:
        hint = f"type {key}={shown([value])}"
    return f" must be {rule.accepts}" + (f"; {hint}" if hint else "")
