"""The only code that touches logits: response log-probs, full-vocabulary KL and entropy, in fp32.

The LM head is applied to the hidden states of scored positions only, a chunk of tokens at a time,
in one function with the log-softmax and its own backward pass (fused_head.py). No tensor of
(responses, positions, vocabulary) ever exists: hidden states are saved for the backward pass, and
probabilities only where there are few.

Shapes: T scored tokens of a batch, R responses, V vocabulary, H hidden size. A scored token is a
response token, in the order of `batch.targets`; its hidden state sits one position before it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from preflab.batching.packed_attention import block_mask
from preflab.batching.packing import Batch
from preflab.modeling.blocks import body_of
from preflab.modeling.fused_head import (
    LinearLogProbs,
    LogitStep,
    TokenScores,
    chunk_slices,
    concatenate,
)
from preflab.modeling.head_gradient import head_gradient_norms
from utils import ConfigError


class Scorer:
    """A causal LM split into body and head, so that the head can run on scored positions only.

    adapter_off: a LoRA model read as its base model (the reference of a LoRA run). autocast: dtype
    of the forward pass, or None for the dtype of the weights.

    keep_router_logits: leave the logits of a mixture of experts in `router_logits`, those of the
    last forward pass, a tuple with (rows*width, experts) for each layer with a router.

    A placement changes three attributes. enter: calls a function while a sharded model's weights
    are gathered. placed_on: the device of inputs, where it is not that of the weights. mixed: dtype
    of the forward pass where it is not that of the weights, whether by autocast or by FSDP.
    """

    def __init__(
        self, model: nn.Module, *, adapter_off: bool = False, autocast: torch.dtype | None = None
    ):
        self.model = model
        self.adapter_off = adapter_off
        self.autocast = autocast
        self.mixed = autocast
        self.enter: Callable = lambda function: function()
        self.placed_on: torch.device | None = None
        self.keep_router_logits = False
        self.router_logits: tuple[Tensor, ...] | None = None

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model, without the LoRA wrapper if there is one."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def device(self) -> torch.device:
        """The device of inputs."""
        return self.placed_on or self.causal_lm.get_input_embeddings().weight.device

    @contextlib.contextmanager
    def active(self):
        """Autocast and the adapter's state, for code that runs the whole model. Code that runs
        parts of it goes through `run`."""
        with contextlib.ExitStack() as stack:
            if self.adapter_off:
                stack.enter_context(_adapter_disabled(self.model))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self.autocast))
            yield

    def run(self, function: Callable):
        """`function()`, which may call `hidden` and `logits`: a sharded model has its weights only
        in here."""
        with self.active():
            return self.enter(function)

    def hidden(self, batch: Batch, positions: Tensor) -> Tensor:
        """Last hidden states (T, H) at `positions` (T,), indices into rows*width."""
        body = body_of(self.causal_lm)
        options = {} if batch.segments is None else {"position_ids": batch.position_ids}
        if self.keep_router_logits:
            options["output_router_logits"] = True
        output = body(
            input_ids=batch.input_ids,
            attention_mask=_attention_mask(batch),
            use_cache=False,
            **options,
        )
        if self.keep_router_logits:
            self.router_logits = output.router_logits
        states = output.last_hidden_state
        hidden = states.flatten(0, 1)[positions.to(states.device)]
        head = self.causal_lm.get_output_embeddings()
        if head is not None and hasattr(self.causal_lm, "hf_device_map"):
            # Layers are spread over GPUs, and the head may be on another one than the last layer.
            return hidden.to(head.weight.device)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (T, H) to logits (T, V), in fp32 or better."""
        logits = self.causal_lm.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scale, cap = self.logit_step()
        logits = logits * scale if scale != 1 else logits
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def logit_step(self) -> LogitStep:
        """What the architecture does to the logits of its linear head."""
        config = self.causal_lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return LogitStep(scale, getattr(config, "final_logit_softcapping", None) or None)  # Gemma

    @torch.no_grad()
    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Last hidden states (T, H) that predict the scored tokens of a batch, and the log-probs
        (T,) of these tokens, without gradient."""

        def read() -> tuple[Tensor, Tensor]:
            hidden = self.hidden(batch, batch.positions)
            return hidden, _score_hidden(self, batch, hidden, _Extras()).logps

        return self.run(read)

    def token_logps(self, batch: Batch) -> Tensor:
        """Log-probs of the scored tokens of a batch, (T,), without gradient."""
        return self.read(batch)[1]

    @torch.no_grad()
    def token_gaps(self, batch: Batch) -> Tensor:
        """How far the log-prob of each scored token is below that of the likeliest token there,
        (T,) in nats, 0 for greedy responses. For a few tokens: it holds all logits of them."""
        logits = self.run(lambda: self.logits(self.hidden(batch, batch.positions)))
        targets = batch.targets.to(logits.device)[:, None]
        return logits.max(-1).values - logits.gather(-1, targets).squeeze(-1)

    def plain_head(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (V, H) and bias (V,) of the LM head where logits are one linear layer with
        unsharded weights, and then `logit_step`; else None."""
        head = self.causal_lm.get_output_embeddings()
        if (
            not isinstance(head, nn.Linear)
            or hasattr(head, "base_layer")  # a LoRA layer
            or isinstance(head.weight, DTensor)
        ):
            return None
        return head.weight, head.bias

    def values(self, batch: Batch) -> Tensor:
        """Output of a scalar head at the last token of each response, (R,) float64."""
        values = self.run(lambda: self.causal_lm.score(self.hidden(batch, batch.ends)))
        return values.squeeze(-1).double().to(batch.ends.device)

    @torch.no_grad()
    def check(self) -> None:
        """Compare head(body(x)) with the model's own logits, and these before and after a change of
        the last token. Raises ConfigError where head(body(x)) differs and where the model is not
        causal, since the log-probs would be silently wrong."""
        vocabulary = self.causal_lm.config.get_text_config().vocab_size
        ids = torch.arange(1, 9, device=self.device).remainder(vocabulary)[None]
        batch = Batch(ids, *[None] * 8, attention_mask=torch.ones_like(ids))
        ours = self.run(lambda: self.logits(self.hidden(batch, torch.arange(8))))
        theirs = self._own_logits(ids).to(ours)
        if not theirs.isfinite().all():
            raise ConfigError(
                f"{type(self.causal_lm).__name__} returns logits that are NaN or infinite: its"
                " weights are not finite, or overflow in this dtype; look at the files, or take"
                " float32"
            )
        self._check_causal(ids, theirs)
        error = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
        bound = 1e-3 if self.is_full_precision() else 0.1
        if not error < bound:
            raise ConfigError(
                f"{type(self.causal_lm).__name__} computes its logits with a step that is not known"
                f" here: its log-probs differ by {error:.3g} from those of its last hidden states"
                " and its head; add the step to Scorer.logits in preflab/modeling/logprobs.py"
            )

    def _own_logits(self, ids: Tensor) -> Tensor:
        """The model's own logits (width, V) of one row of tokens (1, width)."""
        with self.active():
            return self.causal_lm(input_ids=ids, use_cache=False).logits[0]

    def _check_causal(self, ids: Tensor, logits: Tensor) -> None:
        """Raise ConfigError where another last token changes the log-probs before it."""
        other = ids.clone()
        other[0, -1] += 1 if ids[0, -1] == 0 else -1
        moved = self._own_logits(other).to(logits)[:-1].log_softmax(-1)
        moved = (moved - logits[:-1].log_softmax(-1)).abs().max().item()
        # Equal in most models; a mixture of experts may sum in another order.
        if moved > (1e-4 if self.is_full_precision() else 0.1):
            raise ConfigError(
                f"{type(self.causal_lm).__name__} is not causal: a later token changes the"
                f" log-probs of earlier ones by {moved:.3g}; use a causal language model, or"
                " correct its config.json (is_causal, is_decoder)"
            )

    def is_full_precision(self) -> bool:
        dtype = next(self.model.parameters()).dtype
        return self.mixed is None and dtype in (torch.float32, torch.float64)


def _attention_mask(batch: Batch):
    """The attention mask that the layers of a model get; see packed_attention.py."""
    if batch.segments is None:
        return batch.attention_mask
    if batch.blocks is None:
        return batch.segments
    return block_mask(batch.blocks, batch.input_ids.device)


@dataclass
class ResponseScores:
    """Log-probs of a batch's responses: sums in float64, token values as computed. None where not
    asked for.

    (R,): logps, reference_logps, kl, collision. (T,), in the order of `batch.targets`: token_logps,
    reference_token_logps, token_kl, token_entropy. head_norms (groups,) of groups of responses.
    mismatched (R,): log-ratio of a response to another prompt, see `Batch.mismatched`.
    """

    logps: Tensor
    token_logps: Tensor
    reference_logps: Tensor | None = None
    reference_token_logps: Tensor | None = None
    kl: Tensor | None = None
    token_kl: Tensor | None = None
    token_entropy: Tensor | None = None
    collision: Tensor | None = None
    head_norms: Tensor | None = None
    mismatched: Tensor | None = None


@dataclass(frozen=True)
class _Extras:
    """What to compute for each scored token beside its log-prob; see `score_responses`.

    reference, reference_hidden (T, H): the other model of the KL, and its hidden states.
    """

    kl: str | None = None
    entropy: bool = False
    collision: bool = False
    reference: Scorer | None = None
    reference_hidden: Tensor | None = None


def score_responses(
    policy: Scorer,
    batch: Batch,
    *,
    reference: Scorer | None = None,
    kl: str | None = None,
    entropy: bool = False,
    collision: bool = False,
    groups: Tensor | None = None,
    hidden: Tensor | None = None,
    reference_hidden: Tensor | None = None,
) -> ResponseScores:
    """Log-probs of every response token, under the policy (with gradient, if enabled) and the
    reference (without).

    reference: does not run where the batch has its log-probs already; without `kl`, anything with
    `token_logps`. kl: full-vocabulary KL at
    each scored position, with gradient through the policy: "reference||policy" (TDPO) or
    "policy||reference" (evaluation of samples); needs `reference`. entropy: of the policy's
    distribution at each scored position, in nats, without gradient. collision: the log of the
    probability that two draws from it are the same token, log sum_v pi(v)^2, without gradient,
    summed over positions. groups (groups, R): for `head_norms`, those of the gradient of the sums
    of log-probs with these weights. hidden, reference_hidden (T, H): the last hidden states of
    the two models where they are known, whose layers then do not run; the second with `kl` only.
    """
    reference_token_logps = batch.reference_logps
    if kl is not None and reference_hidden is None:
        with torch.no_grad():
            reference_hidden = reference.run(lambda: reference.hidden(batch, batch.positions))
    elif kl is None and reference is not None and reference_token_logps is None:
        reference_token_logps = reference.token_logps(batch)
    extras = _Extras(kl, entropy, collision, reference if kl else None, reference_hidden)
    norms: list[Tensor] = []

    def score() -> TokenScores:
        states = policy.hidden(batch, batch.positions) if hidden is None else hidden
        if groups is not None:
            norms.append(_head_norms(policy, batch, states.detach(), groups))
        return _score_hidden(policy, batch, states, extras)

    tokens = policy.run(score)
    if kl is not None:
        reference_token_logps = tokens.reference_logps
    scores = _sum_scores(batch, tokens, reference_token_logps)
    if norms:
        scores.head_norms = norms[0].to(batch.owners.device)
    return scores


def _head_norms(scorer: Scorer, batch: Batch, hidden: Tensor, groups: Tensor) -> Tensor:
    weights = groups[:, batch.owners].to(hidden.device)
    head, step = scorer.causal_lm.get_output_embeddings(), scorer.logit_step()
    return head_gradient_norms(head, step, hidden, batch.targets.to(hidden.device), weights)


def _sum_scores(
    batch: Batch, tokens: TokenScores, reference_token_logps: Tensor | None
) -> ResponseScores:
    """Token scores and their sums, on the device of the batch."""
    owners, n = batch.owners, len(batch.lengths)
    tokens = TokenScores(
        *(column if column is None else column.to(owners.device) for column in tokens)
    )
    scores = ResponseScores(
        sum_by_owner(tokens.logps, owners, n),
        tokens.logps,
        token_kl=tokens.kl,
        token_entropy=tokens.entropy,
    )
    if reference_token_logps is not None:
        scores.reference_token_logps = reference_token_logps.to(owners.device)
        scores.reference_logps = sum_by_owner(scores.reference_token_logps, owners, n)
    if tokens.kl is not None:
        scores.kl = sum_by_owner(tokens.kl, owners, n)
    if tokens.collision is not None:
        scores.collision = sum_by_owner(tokens.collision, owners, n)
    return scores


def _score_hidden(scorer: Scorer, batch: Batch, hidden: Tensor, extras: _Extras) -> TokenScores:
    """Scores of the T scored tokens of a batch from their hidden states (T, H)."""
    targets = batch.targets.to(hidden.device)
    scores = _score_fused(scorer, hidden, targets, extras)
    return _score_chunks(scorer, hidden, targets, extras) if scores is None else scores


def _score_fused(
    policy: Scorer, hidden: Tensor, targets: Tensor, extras: _Extras
) -> TokenScores | None:
    """Scores by `LinearLogProbs`; None where a head is not plain or on another device."""
    policy_head = policy.plain_head()
    if policy_head is None:
        return None
    operands = _cast_for_autocast(hidden, *policy_head)
    reference_operands, steps = [None, None, None], [policy.logit_step(), LogitStep()]
    if extras.kl is not None:
        reference_head = extras.reference.plain_head()
        if reference_head is None or reference_head[0].device != hidden.device:
            return None
        reference_operands = _cast_for_autocast(extras.reference_hidden, *reference_head)
        steps[1] = extras.reference.logit_step()
    differentiable = torch.is_grad_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        columns = LinearLogProbs.apply(
            *operands,
            targets,
            *reference_operands,
            extras.kl,
            extras.entropy,
            differentiable,
            extras.collision,
            tuple(steps),
        )
    return TokenScores(*columns)


def _score_chunks(policy: Scorer, hidden: Tensor, targets: Tensor, extras: _Extras) -> TokenScores:
    """Scores by each head's own module, for heads of any type; the backward pass recomputes each
    chunk."""
    chunks = []
    for piece in chunk_slices(hidden, policy.causal_lm.config.get_text_config().vocab_size):
        reference_hidden = None if extras.kl is None else extras.reference_hidden[piece]
        arguments = (policy, hidden[piece], targets[piece], reference_hidden, extras)
        if torch.is_grad_enabled() and hidden.requires_grad:
            chunk = checkpoint(
                _score_chunk, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            chunk = _score_chunk(*arguments)
        chunks.append(chunk)
    return concatenate(chunks)


def _cast_for_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast the operands of a linear layer as autocast would."""
    device = next((tensor.device.type for tensor in tensors if tensor is not None), None)
    if device is None or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


def _score_chunk(
    policy: Scorer,
    hidden: Tensor,
    targets: Tensor,
    reference_hidden: Tensor | None,
    extras: _Extras,
) -> TokenScores:
    """Scores of a chunk of tokens, by autograd. reference_hidden: of the chunk."""
    logps = policy.logits(hidden).log_softmax(-1)
    token_kl = reference_token_logps = None
    if extras.kl is not None:
        with torch.no_grad(), extras.reference.active():
            reference_logps = extras.reference.logits(reference_hidden)
            reference_logps = reference_logps.to(logps.device).log_softmax(-1)
        reference_token_logps = reference_logps.gather(-1, targets[:, None]).squeeze(-1)
        if extras.kl == "reference||policy":
            p, q = reference_logps, logps
        else:
            p, q = logps, reference_logps
        token_kl = (p.exp() * (p - q)).sum(-1)
    detached = logps.detach()
    return TokenScores(
        logps.gather(-1, targets[:, None]).squeeze(-1),
        token_kl,
        torch.special.entr(detached.exp()).sum(-1) if extras.entropy else None,
        reference_token_logps,
        (2 * detached).logsumexp(-1) if extras.collision else None,
    )


@contextlib.contextmanager
def _adapter_disabled(model: nn.Module):
    """A PEFT model as its base model. PEFT's own `disable_adapter` also freezes the adapter
    meanwhile, and under FSDP it would stay frozen."""
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def sum_by_owner(values: Tensor, owners: Tensor, n: int) -> Tensor:
    """Sums of token values (T,) over the tokens of each response, (n,) in float64: float32 would
    add rounding errors of 3e-5.

    owners (T,): the response of each token.
    """
    zeros = torch.zeros(n, dtype=torch.float64, device=values.device)
    return zeros.index_add(0, owners, values.double())
