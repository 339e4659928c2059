"""What a training step holds beside weights and optimizer state: the tensors alive at its peak.

The step runs on fake tensors, which have shapes and no values: forward, head and backward. Every
storage that it makes is counted from the operation that makes it to its release.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from preflab.batching.packed_attention import attend_by_tree, split_trees
from preflab.batching.packing import Batch
from preflab.batching.short_rows import attend_rows, make_rows, rows_are_faster
from preflab.modeling.fused_head import planned_on
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.objective.registry import BoundLoss
from preflab.objective.types import needs_of

COUNTED = "preflab_counted"


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside this context make, until they are released.

    known: tensors that are counted elsewhere. now, peak: bytes that are alive. made: bytes of all
    storages so far, of released ones too.
    """

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = self.made = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += n_bytes
        self.made += n_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, n_bytes)

    def _release(self, key: int, n_bytes: int) -> None:
        self._alive.discard(key)
        self.now -= n_bytes


def step_bytes(
    policy: Scorer,
    reference: Scorer | None,
    loss: BoundLoss,
    batch: Batch,
    *,
    device: str,
    keeps_gradients: bool,
    n_microbatches: int,
) -> tuple[int, int]:
    """The most bytes that are alive at a time in a step, without those of weights and optimizer,
    and the bytes of all that a forward pass makes, kept or released.

    policy, reference: models on the meta device, which get fake weights; reference is None where
    nothing runs it. batch: the largest microbatch. device: the type that the step will run on.
    keeps_gradients: whether gradients stay until the optimizer's step; sharded ones leave a rank's
    memory in the backward pass. n_microbatches: from the second one on, gradients of earlier ones
    are there.
    """
    with _fake(policy, reference, batch, device) as weights:
        if not keeps_gradients:
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with LiveBytes(weights) as live:
            total, made = _forward(policy, reference, loss, batch), live.made
            total.backward()
            del total
            if n_microbatches > 1:
                _forward(policy, reference, loss, batch).backward()
    return live.peak, made


def forward_bytes(policy: Scorer, batch: Batch, *, device: str) -> int:
    """The most bytes alive in a pass without gradients, as for the reference's log-probs. policy,
    batch, device: as in `step_bytes`."""
    with torch.no_grad(), _fake(policy, None, batch, device) as weights, LiveBytes(weights) as live:
        score_responses(policy, batch)
    return live.peak


@contextlib.contextmanager
def _fake(
    policy: Scorer, reference: Scorer | None, batch: Batch, device: str
) -> Iterator[list[torch.Tensor]]:
    """Fake weights for these models, their attention as in fused kernels; yields the weights."""
    # Imported here because it is large, and training does not need it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    scorers = list(filter(None, (policy, reference)))
    for scorer in scorers:
        _count_attention(scorer.causal_lm, batch)
    with FakeTensorMode(allow_non_fake_inputs=True), planned_on(device):
        yield [weight for scorer in scorers for weight in _fake_weights(scorer.model)]


def _fake_weights(model: nn.Module) -> list[torch.Tensor]:
    """Replace parameters and buffers, tied ones by the same tensor, and return them."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad
                )
            module._parameters[name] = made[parameter]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = made[buffer] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return list(made.values())


def _count_attention(model: nn.Module, batch: Batch) -> None:
    """Let a model that uses fused attention make and save what its kernels do, all linear in the
    length."""
    if model.config._attn_implementation in (None, "sdpa", COUNTED) and model._supports_sdpa:
        trees = None if batch.segments is None else split_trees(batch.segments)
        AttentionInterface.register(COUNTED, functools.partial(_fused_attention, trees))
        AttentionMaskInterface.register(COUNTED, lambda *arguments, **options: None)
        model.set_attn_implementation(COUNTED)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _forward(
    policy: Scorer, reference: Scorer | None, loss: BoundLoss, batch: Batch
) -> torch.Tensor:
    """The models as far as the loss reads them; a sum of their values."""
    needs = needs_of(loss.reads).values()
    if any(need.source == "head" for need in needs):
        return policy.values(batch).sum()
    options = {}
    for need in needs:
        options |= need.score_options
    scores = score_responses(policy, batch, reference=reference, **options)
    total = scores.logps.sum()
    if scores.kl is not None:
        total = total + scores.kl.sum()
    return total


class _FusedAttention(torch.autograd.Function):
    """Saves queries, keys, values and output, and returns a gradient for each of the first three.
    (rows, heads, tokens, head size) each."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _ = ctx.saved_tensors
        return tuple(torch.empty_like(tensor) for tensor in (query, key, value))


def _fused_attention(trees, module, query, key, value, attention_mask, **options):
    """An attention function of transformers. trees: those of a packed row, as in
    packed_attention.py; None for padded rows."""
    if trees is None:
        return _attend(query, key, value), None
    states = query, key, value
    if not rows_are_faster(trees, query):
        return attend_by_tree(states, trees, _attend), None
    rows = make_rows(trees)
    copied = [_Moved.apply(state[0].transpose(0, 1), sum(rows.sizes)) for state in states]
    return _Moved.apply(attend_rows(copied, rows, _attend), query.shape[2])[None], None


class _Moved(torch.autograd.Function):
    """`n` rows, made of others, and their gradient."""

    @staticmethod
    def forward(ctx, rows, n):
        ctx.n = len(rows)
        return rows.new_empty(n, *rows.shape[1:])

    @staticmethod
    def backward(ctx, gradient):
        return gradient.new_empty(ctx.n, *gradient.shape[1:]), None


def _attend(query, key, value, hidden=0):
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous()
