"""The memory plan of a run (function=plan): parameters, memory of a rank, steps and tokens.

No weight is loaded. The model is built on torch's meta device and placed by the code that places it
in the run, in a fake process group of as many ranks, so that weights, gradients and optimizer state
are counted, not estimated. Activations are counted by `step_bytes` on the largest microbatch; on a
CPU the process itself is measured by `process_bytes`.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.loader import Loader
from preflab.batching.microbatches import default_microbatch_tokens, split_step
from preflab.batching.packing import Batch, Layout
from preflab.distributed.process_group import ALONE, World
from preflab.modeling.layout_choice import known_layouts
from preflab.modeling.loading import disable_dropout, dtype_of, fuse_activations, skeleton
from preflab.modeling.logprobs import Scorer
from preflab.modeling.model_source import model_config
from preflab.modeling.parallelism import bind_place, data_ranks
from preflab.modeling.reference_cache import ReferencePlan
from preflab.settings.schema import Settings
from preflab.training.optimizers import state_slots
from preflab.training.process_memory import process_bytes
from preflab.training.reference import reference_plan
from preflab.training.registry import find_trainer
from preflab.training.step_memory import step_bytes

GIB = 2**30

# The tokens of an example and the largest microbatch are those of the first steps.
STEPS_TO_MEASURE = 50

# The heap of a process on a CPU grows beyond the tensors that are alive. What a forward pass makes
# and releases leaves holes, which nodes of the graph and other small objects split before the next
# tensor comes; what it keeps leaves them for the next step, whose rows have another width. This is
# the share of all that a forward pass makes. LoRA releases more than it keeps: three tensors of the
# size of its output for each layer that has an adapter. benchmarks/plan_memory.py compares plans
# with measured peaks.
HEAP = 0.25

# Microbatches that a model of one layer computes to measure what the libraries take on a CPU.
BATCHES_TO_RUN = 16


@dataclass
class Plan:
    """The plan of a run.

    parameters, trained: numbers of all and of trained parameters. ranks: number of processes.
    memory: bytes on a rank by what they hold. examples, steps, tokens: of the whole run, tokens
    estimated. largest_microbatch: (rows, tokens in a row). one_microbatch: whether a rank computes
    every step in a single one, and keeps no gradients while it computes activations. batches: the
    first microbatches. largest: the one of `largest_microbatch`.
    """

    parameters: int
    trained: int
    ranks: int
    memory: dict[str, int] = field(default_factory=dict)
    examples: int = 0
    steps: int = 0
    tokens: int = 0
    largest_microbatch: tuple[int, int] = (0, 0)
    one_microbatch: bool = True
    batches: list[Batch] = field(default_factory=list, repr=False)
    largest: Batch | None = field(default=None, repr=False)

    @property
    def total(self) -> int:
        """Bytes on a rank."""
        return sum(self.memory.values())


def make_plan(config: Settings, loss, data: PreferenceData) -> Plan:
    """The plan of training with `config`, a checked config, on `data`."""
    scalar = "scalar_head" in loss.reads
    model = skeleton(config.model, scalar_head=scalar)
    trained = [p for p in model.parameters() if p.requires_grad]
    plan = Plan(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in trained),
        _ranks(config),
    )
    _count_data(plan, config, loss, data)
    # Before anything else, because what follows imports more than training does.
    libraries = (
        0 if _device(config) == "cuda" else process_bytes(config, plan.batches, scalar_head=scalar)
    )
    policy, gathered = _bytes_on_a_rank(config, scalar, config.model.policy_dtype)
    trained_bytes = sum(size for size, is_trained in policy if is_trained)
    plan.memory = {
        "weights": sum(size for size, _ in policy),
        "gradients": trained_bytes,
        "optimizer": int(trained_bytes * state_slots(config, model)),
        "gathered weights": gathered,
    }
    if (uses := reference_plan(config, loss)).built:
        plan.memory["reference"] = _reference_bytes(config, uses)
    _count_activations(plan, config, loss)
    if loss.calibration:  # two gradients of the head in float32, while the activations are there
        text = model.config.get_text_config()
        plan.memory["calibration"] = 2 * 4 * text.vocab_size * text.hidden_size
    if _device(config) != "cuda" and not config.debug:
        plan.memory["checkpoint in writing"] = _snapshot_bytes(config, plan, trained_bytes)
    plan.memory["libraries"] = libraries
    return plan


def _count_activations(plan: Plan, config: Settings, loss) -> None:
    """Add what is alive in a step at its peak beside weights, optimizer and gradients, and on a CPU
    what the heap takes beside it."""
    sharded = find_trainer(config.trainer).placement.shards_state
    uses, models = reference_plan(config, loss), []
    in_step = "token_kl" in loss.reads or (uses.built and uses.read and not uses.cached)
    for is_needed in (True, in_step):
        models.append(_on_meta(config, "scalar_head" in loss.reads) if is_needed else None)
    policy, reference = models
    if config.activation_checkpointing:
        policy.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    alive, made = step_bytes(
        policy,
        reference,
        loss,
        plan.largest,
        device=_device(config),
        keeps_gradients=not sharded,
        n_microbatches=1 if plan.one_microbatch else 2,
    )
    gradients = plan.memory["gradients"]
    plan.memory["activations"] = alive if sharded else alive - gradients
    if sharded and plan.one_microbatch:
        # Backward frees the activations of a layer before the next layer's gradients are there.
        plan.memory["freed during backward"] = -min(gradients, alive)
    if _device(config) != "cuda":
        plan.memory["heap"] = int(HEAP * made)


def _on_meta(config: Settings, scalar: bool) -> Scorer:
    """The policy on the meta device, in the dtype that it computes in."""
    model = skeleton(config.model, scalar_head=scalar).train()
    disable_dropout(model)
    fuse_activations(model)
    return Scorer(model.to(dtype_of(config.model.fsdp_policy_mp or config.model.policy_dtype)))


def _snapshot_bytes(config: Settings, plan: Plan, trained_bytes: int) -> int:
    """Bytes of the copy that a checkpoint is written from while training continues. Sharded weights
    are copied into a file instead."""
    weights = 0 if find_trainer(config.trainer).placement.shards_state else trained_bytes
    return plan.memory["optimizer"] + weights


def _reference_bytes(config: Settings, uses: ReferencePlan) -> int:
    """Bytes of the reference on a rank, and of the initial one beside a reference that moves. One
    that is the policy without its LoRA adapter takes none."""
    is_shared = bool(config.model.lora.r) and not config.model.reference_archive
    past = config.reference.past or [1.0]
    has_initial = uses.compared or not uses.moves or sum(past) < 1
    n_models = (len(past) if uses.moves else 0) + (has_initial and not is_shared)
    if not n_models:
        return 0
    weights, gathered = _bytes_on_a_rank(config, False, config.model.reference_dtype, lora=False)
    return n_models * sum(size for size, _ in weights) + gathered


def describe(plan: Plan, gpu_gib: float | None) -> str:
    """The plan as a table, and whether it fits into `gpu_gib` GiB of GPU memory."""
    rows, width = plan.largest_microbatch
    lines = [
        f"parameters                {plan.parameters:>16,}",
        f"of which trained          {plan.trained:>16,}",
        f"ranks                     {plan.ranks:>16,}",
        f"examples                  {plan.examples:>16,}",
        f"steps                     {plan.steps:>16,}",
        f"tokens, about             {plan.tokens:>16,}",
        f"largest microbatch        {f'{rows} rows x {width}':>16}",
        "",
        "memory of a rank, MiB",
    ]
    sizes = [*plan.memory.items(), ("together", plan.total)]
    lines += [f"  {name:<24}{size / 2**20:>16,.1f}" for name, size in sizes]
    lines.append(_verdict(plan, gpu_gib))
    return "\n".join(lines)


def _verdict(plan: Plan, gpu_gib: float | None) -> str:
    if gpu_gib is None:
        return "set plan.gpu_gib to see whether it fits"
    spare = gpu_gib - plan.total / GIB
    verdict = f"fits, with {spare:.1f} GiB to spare"
    if spare < 0:
        verdict = f"does not fit: {-spare:.1f} GiB too much; {_advice(plan)}"
    return f"plan.gpu_gib={gpu_gib:g}: {verdict}"


def _advice(plan: Plan) -> str:
    if plan.memory["activations"] > plan.total / 2:
        return (
            "most of it is activations: raise gradient_accumulation_steps, or set"
            " activation_checkpointing=true"
        )
    return (
        "most of it is the model's state: shard it over more ranks (trainer=FSDPTrainer), or set"
        " fsdp_cpu_offload=true"
    )


def _count_data(plan: Plan, config: Settings, loss, data: PreferenceData) -> None:
    loader = Loader(
        data.groups,
        batch_size=config.batch_size,
        seed=config.seed,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        order=config.order,
        mixture=data.mixture,
    )
    plan.examples, plan.steps = loader.total, loader.total_steps
    layout = Layout(_layout(config), last_tokens="scalar_head" in loss.reads)
    budget = None
    if not loss.couples_batch:
        budget = config.microbatch_tokens or default_microbatch_tokens(loss.reads, _device(config))
    n_measured = tokens = 0
    for examples in itertools.islice(loader, STEPS_TO_MEASURE):
        parts = split_step(
            data,
            examples,
            layout,
            ranks=data_ranks(find_trainer(config.trainer), config, ALONE),
            at_least=config.gradient_accumulation_steps,
            tokens=budget,
            grouping=config.length_grouping,
        )
        plan.one_microbatch &= all(sum(map(bool, map(len, of_rank))) < 2 for of_rank in parts)
        for part in (part for of_rank in parts for part in of_rank if len(part)):
            batch = collate(data, part, layout)
            tokens += batch.n_tokens
            if len(plan.batches) < BATCHES_TO_RUN:
                plan.batches.append(batch)
            shape = tuple(batch.input_ids.shape)
            if math.prod(shape) > math.prod(plan.largest_microbatch):
                plan.largest_microbatch, plan.largest = shape, batch
        n_measured += len(examples)
    plan.tokens = round(tokens / n_measured * plan.examples)


def _device(config: Settings) -> str:
    """The type of device that the plan is for."""
    return "cuda" if torch.cuda.is_available() or config.plan.gpu_gib is not None else "cpu"


def _layout(config: Settings) -> str:
    """The layout of the run; for layout=auto, what it is unless a trial of the model fails."""
    if config.layout != "auto":
        return config.layout
    model = model_config(config.model)
    names, _ = known_layouts(config, model)
    return names[0]


def _bytes_on_a_rank(
    config: Settings, scalar: bool, dtype: str, lora: bool = True
) -> tuple[list[tuple[int, bool]], int]:
    """Bytes of each parameter on rank 0, with whether it is trained; and the most bytes that are
    gathered from other ranks at a time."""
    with _fake_process_group(config) as world:
        model = skeleton(config.model, scalar_head=scalar, trainable=lora)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        trainer = find_trainer(config.trainer)
        if not trainer.placement.shards_state:
            # Where layers are split, the package also keeps the other parameters in pieces.
            parts = (config.world_size or 1) if trainer.placement.splits_layers else 1
            item = dtype_of(dtype).itemsize
            return [
                (math.ceil(p.numel() / parts) * item, p.requires_grad) for p in model.parameters()
            ], 0
        bind_place(trainer, config, world)(Scorer(model), dtype_of(dtype))
        on_rank = []
        for p in model.parameters():
            local = p.to_local() if isinstance(p, DTensor) else p
            size = 0 if config.fsdp_cpu_offload else local.numel() * local.element_size()
            on_rank.append((size, p.requires_grad))
        compute = dtype_of(config.model.fsdp_policy_mp or dtype).itemsize
        return on_rank, _gathered(sizes) * compute // trainer.placement.peers(config)


def _gathered(sizes: dict[str, int]) -> int:
    """Number of parameters gathered at a time: those of the root and of two blocks, since the next
    block is gathered while one computes. sizes: numbers of parameters by name."""
    blocks: dict[str | None, int] = {}
    for name, n in sizes.items():
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        block = None if index is None else ".".join(parts[: index + 1])
        blocks[block] = blocks.get(block, 0) + n
    root = blocks.pop(None, 0)
    return root + 2 * max(blocks.values(), default=0)


@contextlib.contextmanager
def _fake_process_group(config: Settings):
    """Make this process rank 0 of as many ranks as the run has. The others do not exist, and
    nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    size = _ranks(config)
    if dist.is_initialized():  # by an earlier run in this process
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield World(0, size, peers=_peers(config))
    finally:
        dist.destroy_process_group()


def _peers(config: Settings) -> int:
    return find_trainer(config.trainer).placement.peers(config)


def _ranks(config: Settings) -> int:
    """All ranks of the run."""
    return data_ranks(find_trainer(config.trainer), config, ALONE) * _peers(config)
