"""The only code that touches logits: response log-probs, full-vocabulary KL and entropy, chunked
over tokens, in fp32.

The LM head is applied to the hidden states of scored positions alone, a chunk of tokens at a time,
in one function with the log-softmax and with a backward pass of its own. So no tensor of
[responses, positions, vocabulary] ever exists: what is kept for the backward pass is (tokens,
hidden size), and probabilities only where they are few.
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
from preflab.modeling.fused_head import LinearLogProbs, Tokens, chunk_slices, together
from utils import ConfigError


class Scorer:
    """A causal LM split into body and head, so that the head can run on scored positions only.

    adapter_off: a LoRA model read as the model it was adapted from (the reference of a LoRA run).
    autocast: dtype of the forward pass, or None for the dtype of the weights.
    """

    def __init__(
        self, model: nn.Module, *, adapter_off: bool = False, autocast: torch.dtype | None = None
    ):
        self.model, self.adapter_off, self.autocast = model, adapter_off, autocast
        # dtype of the forward pass where it is not that of the weights, whoever sees to it
        self.mixed = autocast
        self.enter: Callable = lambda function: (
            function()
        )  # where a sharded model gathers its weights
        self.placed_on: torch.device | None = (
            None  # where inputs go, if that is not where the weights rest
        )

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model inside a possible LoRA wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.placed_on or self.causal_lm.get_input_embeddings().weight.device

    @contextlib.contextmanager
    def active(self):
        """Whatever runs the whole model runs inside this; what runs parts of it goes through
        `run`."""
        with contextlib.ExitStack() as stack:
            if self.adapter_off:
                stack.enter_context(_adapter_off(self.model))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self.autocast))
            yield

    def run(self, function: Callable):
        """`function()`, which may use `hidden` and `logits`: a sharded model has its weights only
        in here."""
        with self.active():
            return self.enter(function)

    def hidden(self, batch: Batch, positions: Tensor) -> Tensor:
        """Last hidden states at `positions` of rows*width: (positions, hidden size)."""
        body = getattr(self.causal_lm, self.causal_lm.base_model_prefix)
        options = {} if batch.segments is None else {"position_ids": batch.position_ids}
        output = body(
            input_ids=batch.input_ids, attention_mask=_mask(batch), use_cache=False, **options
        )
        states = output.last_hidden_state
        hidden = states.flatten(0, 1)[positions.to(states.device)]
        head = self.causal_lm.get_output_embeddings()
        # Of a model spread over GPUs, layer after layer, the head need not be where the last layer
        # is.
        return (
            hidden.to(head.weight.device)
            if head is not None and hasattr(self.causal_lm, "hf_device_map")
            else hidden
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden size) -> (tokens, vocabulary), in fp32 or better."""
        config = self.causal_lm.config.get_text_config()
        logits = self.causal_lm.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return logits

    def plain_head(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the LM head, where logits are a linear layer of whole weights and
        nothing more."""
        head, config = (
            self.causal_lm.get_output_embeddings(),
            self.causal_lm.config.get_text_config(),
        )
        more = [
            getattr(config, name, None)
            for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
        ]
        if (
            not isinstance(head, nn.Linear)
            or hasattr(head, "base_layer")
            or isinstance(head.weight, DTensor)
            or any(more)
        ):
            return None
        return head.weight, head.bias

    def values(self, batch: Batch) -> Tensor:
        """Output of a scalar head at the last token of each response, (responses,) float64."""
        return (
            self.run(lambda: self.causal_lm.score(self.hidden(batch, batch.ends)))
            .squeeze(-1)
            .double()
            .to(batch.ends.device)
        )

    @torch.no_grad()
    def check(self) -> None:
        """Refuse a model whose own logits differ from head(body(x)): its log-probs would be
        silently wrong."""
        ids = torch.arange(1, 9, device=self.device).remainder(
            self.causal_lm.config.get_text_config().vocab_size
        )[None]
        batch = Batch(ids, *[None] * 8, attention_mask=torch.ones_like(ids))
        ours = self.run(lambda: self.logits(self.hidden(batch, torch.arange(8))))
        with self.active():
            theirs = self.causal_lm(input_ids=ids, use_cache=False).logits[0].to(ours)
        error = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
        bound = 1e-3 if self.is_full_precision() else 0.1
        if not error < bound:
            raise ConfigError(
                f"{type(self.causal_lm).__name__} does something between its last hidden state and"
                f" its logits that is not known here: log-probs differ by {error:.3g}; add it to"
                " Scorer.logits in logprobs.py"
            )

    def is_full_precision(self) -> bool:
        return self.mixed is None and next(self.model.parameters()).dtype in (
            torch.float32,
            torch.float64,
        )


def _mask(batch: Batch):
    """What goes to the layers as the attention mask of a batch; see attention.py."""
    if batch.segments is None:
        return batch.attention_mask
    return (
        batch.segments if batch.blocks is None else block_mask(batch.blocks, batch.input_ids.device)
    )


@dataclass
class ResponseScores:
    """Log-probs of a batch's responses; sums in float64, tokens as computed. None where not asked
    for.

    logps, reference_logps, kl, collision: (responses,). token_logps, reference_token_logps,
    token_kl, token_entropy: (tokens,), in the order of `batch.targets`.
    """

    logps: Tensor
    token_logps: Tensor
    reference_logps: Tensor | None = None
    reference_token_logps: Tensor | None = None
    kl: Tensor | None = None
    token_kl: Tensor | None = None
    token_entropy: Tensor | None = None
    collision: Tensor | None = None


def score_responses(
    policy: Scorer,
    batch: Batch,
    *,
    reference: Scorer | None = None,
    kl: str | None = None,
    entropy: bool = False,
    collision: bool = False,
) -> ResponseScores:
    """Log-probs of every response token, under the policy (with gradient, if enabled) and the
    reference (without).

    reference: not run where the batch knows what it says of each token. kl: full-vocabulary KL at
    each scored position, with gradient through the policy: "reference||policy" (TDPO) or
    "policy||reference" (evaluation of samples); needs `reference`. entropy: of the policy's
    distribution at each scored position, in nats, without gradient. collision: the log of the
    probability that two draws from it are the same token, log sum_v pi(v)^2, likewise; summed over
    positions.
    """
    n = len(batch.lengths)
    reference_hidden, reference_token_logps = None, batch.reference_logps
    if kl is not None:
        with torch.no_grad():
            reference_hidden = reference.run(lambda: reference.hidden(batch, batch.positions))
    elif reference is not None and reference_token_logps is None:
        with torch.no_grad():
            reference_token_logps = reference.run(lambda: _score_body(reference, batch)).logps
    tokens = policy.run(
        lambda: _score_body(
            policy, batch, reference if kl else None, reference_hidden, kl, entropy, collision
        )
    )
    owners = batch.owners
    tokens = Tokens(*(column if column is None else column.to(owners.device) for column in tokens))
    scores = ResponseScores(
        sum_by_owner(tokens.logps, owners, n),
        tokens.logps,
        token_kl=tokens.kl,
        token_entropy=tokens.entropy,
    )
    if kl is not None:
        reference_token_logps = tokens.reference_logps
    if reference_token_logps is not None:
        scores.reference_token_logps = reference_token_logps.to(tokens.logps.device)
        scores.reference_logps = sum_by_owner(scores.reference_token_logps, owners, n)
    if kl is not None:
        scores.kl = sum_by_owner(tokens.kl, owners, n)
    if collision:
        scores.collision = sum_by_owner(tokens.collision, owners, n)
    return scores


def _score_body(scorer: Scorer, batch: Batch, *more) -> Tokens:
    hidden = scorer.hidden(batch, batch.positions)
    return _score_hidden(scorer, hidden, batch.targets.to(hidden.device), *more)


def _score_hidden(
    policy: Scorer,
    hidden: Tensor,
    targets: Tensor,
    reference: Scorer | None = None,
    reference_hidden: Tensor | None = None,
    kl: str | None = None,
    entropy: bool = False,
    collision: bool = False,
) -> Tokens:
    """Tokens whose hidden states are known; with `kl` also those of the reference, which then comes
    along."""
    heads = [policy.plain_head(), reference.plain_head() if reference is not None else (None, None)]
    if None not in heads and (kl is None or heads[1][0].device == hidden.device):
        theirs = (None, None, None) if kl is None else (reference_hidden, *heads[1])
        ours, theirs = _autocast(hidden, *heads[0]), _autocast(*theirs)
        differentiable = torch.is_grad_enabled()
        with torch.autocast(hidden.device.type, enabled=False):
            return Tokens(
                *LinearLogProbs.apply(
                    *ours, targets, *theirs, kl, entropy, differentiable, collision
                )
            )
    chunks = []
    for piece in chunk_slices(hidden, policy.causal_lm.config.get_text_config().vocab_size):
        arguments = (
            policy,
            hidden[piece],
            targets[piece],
            reference,
            None if kl is None else reference_hidden[piece],
            kl,
            entropy,
            collision,
        )
        if torch.is_grad_enabled() and hidden.requires_grad:
            chunks.append(
                checkpoint(_score_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            chunks.append(_score_chunk(*arguments))
    return together(chunks)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would do to the operands of a linear layer."""
    device = next((tensor.device.type for tensor in tensors if tensor is not None), None)
    if device is None or not torch.is_autocast_enabled(device):
        return list(tensors)
    return [
        tensor if tensor is None else tensor.to(torch.get_autocast_dtype(device))
        for tensor in tensors
    ]


def _score_chunk(
    policy: Scorer,
    hidden: Tensor,
    targets: Tensor,
    reference: Scorer | None,
    reference_hidden: Tensor | None,
    kl: str | None,
    entropy: bool,
    collision: bool,
) -> Tokens:
    """The tokens of a chunk, for any kind of head, by autograd."""
    logps = policy.logits(hidden).log_softmax(-1)
    token_kl = reference_logps = None
    if kl is not None:
        with torch.no_grad(), reference.active():
            theirs = reference.logits(reference_hidden).to(logps.device).log_softmax(-1)
        reference_logps = theirs.gather(-1, targets[:, None]).squeeze(-1)
        p, q = (theirs, logps) if kl == "reference||policy" else (logps, theirs)
        token_kl = (p.exp() * (p - q)).sum(-1)
    token_entropy = torch.special.entr(logps.detach().exp()).sum(-1) if entropy else None
    token_collision = (2 * logps.detach()).logsumexp(-1) if collision else None
    return Tokens(
        logps.gather(-1, targets[:, None]).squeeze(-1),
        token_kl,
        token_entropy,
        reference_logps,
        token_collision,
    )


@contextlib.contextmanager
def _adapter_off(model: nn.Module):
    """A PEFT model as its base model. PEFT's own way also freezes the adapter for that time, which
    FSDP would keep."""
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before):
            layer._disable_adapters = off


def sum_by_owner(values: Tensor, owners: Tensor, n: int) -> Tensor:
    """Sums of token values by the response that owns them, (n,) in float64: float32 would keep 3e-5
    of rounding."""
    return torch.zeros(n, dtype=torch.float64, device=values.device).index_add(
        0, owners, values.double()
    )


def pad_by_owner(values: Tensor, owners: Tensor, lengths: Tensor) -> Tensor:
    """Token values as (responses, longest response) float64, zero behind each response."""
    lengths = lengths.to(values.device)
    within = torch.arange(len(values), device=values.device) - (lengths.cumsum(0) - lengths)[owners]
    padded = torch.zeros(
        len(lengths), int(lengths.max()), dtype=torch.float64, device=values.device
    )
    return padded.index_put((owners, within), values.double())
