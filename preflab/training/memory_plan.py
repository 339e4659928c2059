"""What a run will need, without loading a weight: parameters, memory of a rank by kind, steps and
tokens.

The model is built on torch's meta device and placed by the same code that places it in the run,
among ranks that do not exist, so that weights, gradients and optimizer state are counted and not
estimated. Activations are what autograd keeps of one forward pass of the largest microbatch, also
counted, on the meta device.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoConfig
from transformers.masking_utils import AttentionMaskInterface

from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.loader import Loader
from preflab.batching.microbatches import microbatch_tokens, split_step
from preflab.batching.packing import Batch, Layout
from preflab.distributed.process_group import ALONE, World
from preflab.modeling.fused_head import CHUNK_ELEMENTS, GPU_FACTOR
from preflab.modeling.layout_choice import known_layouts
from preflab.modeling.loading import dtype_of, skeleton
from preflab.modeling.logprobs import Scorer
from preflab.modeling.parallelism import bind_place, data_ranks
from preflab.modeling.reference_cache import plan_reference
from preflab.training.registry import find_trainer

GIB = 2**30


LOOK_AT = 50  # steps, from the first, for the tokens of an example and the largest microbatch


@dataclass
class Plan:
    """parameters, trained: counts. memory: bytes of a rank by kind. The rest: what the run will
    do."""

    parameters: int
    trained: int
    ranks: int
    memory: dict[str, int] = field(default_factory=dict)
    examples: int = 0
    steps: int = 0
    tokens: int = 0
    largest_microbatch: tuple[int, int] = (0, 0)

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def make_plan(config, loss, data: PreferenceData) -> Plan:
    """The plan of training `config` on `data`. config: checked; loss: bound."""
    scalar = "scalar_head" in loss.reads
    model = skeleton(config.model, scalar_head=scalar)
    trained = [p for p in model.parameters() if p.requires_grad]
    plan = Plan(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in trained),
        _ranks(config),
    )
    _count_data(plan, config, loss, data)
    policy, gathered = _bytes_on_a_rank(config, scalar, config.model.policy_dtype)
    trained_bytes, slots = sum(size for size, needs in policy if needs), _optimizer_slots(config)
    plan.memory = {
        "weights": sum(size for size, _ in policy),
        "gradients": trained_bytes,
        "optimizer": int(trained_bytes * slots),
        "gathered weights": gathered,
    }
    reference = plan_reference(
        loss.reads,
        loss_name=loss.name,
        function=config.function,
        cache=config.reference.cache,
        from_scratch=config.model.from_scratch,
        draws_samples=config.sample_during_eval and not scalar,
    )
    if reference.built:
        separate = not config.model.lora.r or config.model.reference_archive
        whole, gathered = (
            _bytes_on_a_rank(config, False, config.model.reference_dtype, lora=False)
            if separate
            else ([], 0)
        )
        plan.memory["reference"] = sum(size for size, _ in whole) + gathered
    plan.memory["activations"] = _activations(config, scalar, plan.largest_microbatch)
    return plan


def describe(plan: Plan, gpu_gib: float | None) -> str:
    """The plan as a table, and whether it fits."""
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
    lines += [
        f"  {kind:<24}{size / 2**20:>16,.1f}"
        for kind, size in [*plan.memory.items(), ("together", plan.total)]
    ]
    if gpu_gib is not None:
        spare = gpu_gib - plan.total / GIB
        told = (
            f"fits, with {spare:.1f} GiB to spare"
            if spare >= 0
            else f"does not fit: {-spare:.1f} GiB too much; {_advice(plan)}"
        )
        lines.append(f"plan.gpu_gib={gpu_gib:g}: {told}")
    else:
        lines.append("give plan.gpu_gib to be told whether it fits")
    return "\n".join(lines)


def _advice(plan: Plan) -> str:
    if plan.memory["activations"] > plan.total / 2:
        return (
            "most of it are activations: raise gradient_accumulation_steps, or set"
            " activation_checkpointing=true"
        )
    return (
        "most of it is the model's state: shard it over more ranks (trainer=FSDPTrainer), or set"
        " fsdp_cpu_offload=true"
    )


def _count_data(plan: Plan, config, loss, data: PreferenceData) -> None:
    loader = Loader(
        data.groups,
        batch_size=config.batch_size,
        seed=config.seed,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        order=config.order,
    )
    whole, rest = divmod(loader.total, len(data))
    plan.examples = loader.total
    plan.steps = whole * math.ceil(len(data) / config.batch_size) + math.ceil(
        rest / config.batch_size
    )
    layout = Layout(_layout(config), last_tokens="scalar_head" in loss.reads)
    budget = None if loss.couples_batch else microbatch_tokens(config, loss, _device(config))
    looked_at = tokens = 0
    for examples in itertools.islice(loader, LOOK_AT):
        parts = split_step(
            data,
            examples,
            layout,
            ranks=data_ranks(find_trainer(config.trainer), config, ALONE),
            at_least=config.gradient_accumulation_steps,
            tokens=budget,
            grouping=config.length_grouping,
        )
        for part in (part for of_rank in parts for part in of_rank if len(part)):
            batch = collate(data, part, layout)
            tokens += batch.n_tokens
            plan.largest_microbatch = max(
                plan.largest_microbatch, tuple(batch.input_ids.shape), key=math.prod
            )
        looked_at += len(examples)
    plan.tokens = round(tokens / looked_at * plan.examples)


def _device(config) -> str:
    """What the plan is for."""
    return "cuda" if torch.cuda.is_available() or config.plan.gpu_gib is not None else "cpu"


def _layout(config) -> str:
    """What `layout=auto` will take, but for what only a run of the model shows."""
    if config.layout != "auto":
        return config.layout
    return known_layouts(
        config,
        AutoConfig.from_pretrained(
            config.model.name_or_path, trust_remote_code=config.model.trust_remote_code
        ),
    )[0][0]


def _bytes_on_a_rank(
    config, scalar: bool, dtype: str, lora: bool = True
) -> tuple[list[tuple[int, bool]], int]:
    """([(bytes, trained) of each parameter on rank 0], bytes of what is gathered around it at the
    most)."""
    with _as_if_rank_0(config) as world:
        model = skeleton(config.model, scalar_head=scalar, trainable=lora)
        whole = {name: p.numel() for name, p in model.named_parameters()}
        item = dtype_of(dtype).itemsize
        trainer = find_trainer(config.trainer)
        if not trainer.placement.shards_state:
            # Where layers are split, what is not split is kept in pieces too.
            parts = (config.world_size or 1) if trainer.placement.splits_layers else 1
            return [
                (math.ceil(p.numel() / parts) * item, p.requires_grad) for p in model.parameters()
            ], 0
        bind_place(trainer, config, world)(Scorer(model), dtype_of(dtype))
        local = {
            name: (p.to_local() if isinstance(p, DTensor) else p, p.requires_grad)
            for name, p in model.named_parameters()
        }
        sizes = [(p.numel() * p.element_size(), needs) for p, needs in local.values()]
        if config.fsdp_cpu_offload:
            sizes = [(0, needs) for _, needs in sizes]
        half = dtype_of(config.model.fsdp_policy_mp or dtype).itemsize
        return sizes, _gathered(model, whole) * half // trainer.placement.peers(config)


def _gathered(model: nn.Module, whole: dict[str, int]) -> int:
    """Parameters gathered at the same time: those of the root, and of two blocks, for the next
    comes while one computes."""
    blocks = {}
    for name, n in whole.items():
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = None if index is None else ".".join(parts[: index + 1])
        blocks[key] = blocks.get(key, 0) + n
    root = blocks.pop(None, 0)
    return root + 2 * max(blocks.values(), default=0)


@contextlib.contextmanager
def _as_if_rank_0(config):
    """Inside, this process is rank 0 of a process group whose other ranks do not exist. Nothing is
    ever sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    size = _ranks(config)
    if dist.is_initialized():  # that of an earlier run in this process, alone
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield World(0, size, peers=_peers(config))
    finally:
        dist.destroy_process_group()


def _peers(config) -> int:
    return find_trainer(config.trainer).placement.peers(config)


def _ranks(config) -> int:
    """All ranks of the run."""
    return data_ranks(find_trainer(config.trainer), config, ALONE) * _peers(config)


def _optimizer_slots(config) -> float:
    """How many numbers the optimizer keeps for each number it trains: seen on a small weight."""
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.ones_like(weight)
    optimizer = getattr(torch.optim, config.optimizer)([weight], lr=config.lr)
    optimizer.step()
    kept = sum(
        value.numel()
        for value in optimizer.state[weight].values()
        if isinstance(value, torch.Tensor) and value.ndim > 0
    )
    return kept / weight.numel()


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused kernels keep: queries, keys, values and output, and nothing quadratic in the
    length."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def _fused_attention(module, query, key, value, attention_mask, **options):
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _activations(config, scalar: bool, shape: tuple[int, int]) -> int:
    """Bytes that autograd keeps of a forward pass over rows x width tokens, and of one chunk of the
    head's logits."""
    rows, width = shape
    model = skeleton(config.model, scalar_head=scalar).train()
    compute = dtype_of(config.model.fsdp_policy_mp or config.model.policy_dtype)
    model.to(compute)
    if config.model.attn_implementation in (None, "sdpa") and model._supports_sdpa:
        AttentionInterface.register("counted", _fused_attention)
        AttentionMaskInterface.register("counted", lambda *arguments, **options: None)
        model.set_attn_implementation("counted")
    scorer = Scorer(model)
    ids = torch.zeros(rows, width, dtype=torch.long, device="meta")
    batch = Batch(ids, *[None] * 8, attention_mask=torch.ones_like(ids))
    kept: dict[int, tuple[int, object]] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (
                storage.nbytes(),
                storage,
            )  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scorer.hidden(batch, torch.arange(rows * width, device="meta"))
    total = sum(size for size, _ in kept.values())
    if config.activation_checkpointing:
        settings = model.config.get_text_config()
        layers = settings.num_hidden_layers
        total = total // layers + layers * rows * width * settings.hidden_size * compute.itemsize
    peers = _peers(config)
    vocabulary = model.config.get_text_config().vocab_size
    limit = CHUNK_ELEMENTS * (GPU_FACTOR if _device(config) == "cuda" else 1)
    chunk = (
        0 if scalar else 3 * 4 * min(limit, rows * width * vocabulary)
    )  # logits, their softmax and gradient
    return total // peers + chunk
