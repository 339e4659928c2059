"""The only code that touches logits: response log-probs and full-vocabulary KL, chunked over tokens, in fp32.

The LM head is applied to the hidden states of scored positions alone, a chunk of tokens at a time, and each chunk is
computed again in the backward pass. So no tensor of [responses, positions, vocabulary] ever exists: what is kept for
the backward pass is (tokens, hidden size).
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batching import Batch
from utils import ConfigError

CHUNK_ELEMENTS = 2**24  # logits in flight: 64 MiB in fp32; larger chunks were no faster


class Scorer:
    """A causal LM split into body and head, so that the head can run on scored positions only.

    adapter_off: a LoRA model read as the model it was adapted from (the reference of a LoRA run).
    autocast: dtype of the forward pass, or None for the dtype of the weights.
    """

    def __init__(self, model: nn.Module, *, adapter_off: bool = False, autocast: torch.dtype | None = None):
        self.model, self.adapter_off, self.autocast = model, adapter_off, autocast
        self.enter: Callable = lambda function: function()  # where a sharded model gathers its weights
        self.placed_on: torch.device | None = None  # where inputs go, if that is not where the weights rest

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
        """Whatever runs the whole model runs inside this; what runs parts of it goes through `run`."""
        with contextlib.ExitStack() as stack:
            if self.adapter_off:
                stack.enter_context(_adapter_off(self.model))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self.autocast))
            yield

    def run(self, function: Callable):
        """`function()`, which may use `hidden` and `logits`: a sharded model has its weights only in here."""
        with self.active():
            return self.enter(function)

    def hidden(self, batch: Batch, positions: Tensor) -> Tensor:
        """Last hidden states at `positions` of rows*width: (positions, hidden size)."""
        body = getattr(self.causal_lm, self.causal_lm.base_model_prefix)
        output = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        states = output.last_hidden_state
        return states.flatten(0, 1)[positions.to(states.device)]

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

    def values(self, batch: Batch) -> Tensor:
        """Output of a scalar head at the last token of each response, (responses,) float64."""
        return self.run(lambda: self.causal_lm.score(self.hidden(batch, batch.ends))).squeeze(-1).double()

    @torch.no_grad()
    def check(self) -> None:
        """Refuse a model whose own logits differ from head(body(x)): its log-probs would be silently wrong."""
        ids = torch.arange(1, 9, device=self.device).remainder(self.causal_lm.config.get_text_config().vocab_size)[None]
        batch = Batch(ids, torch.ones_like(ids), *[None] * 8)
        ours = self.run(lambda: self.logits(self.hidden(batch, torch.arange(8))))
        with self.active():
            theirs = self.causal_lm(input_ids=ids, use_cache=False).logits[0].to(ours)
        error = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
        bound = 1e-3 if theirs.dtype == torch.float64 or self._is_full_precision() else 0.1
        if not error < bound:
            raise ConfigError(
                f"{type(self.causal_lm).__name__} does something between its last hidden state and its logits that is "
                f"not known here: log-probs differ by {error:.3g}; add it to Scorer.logits in logprobs.py"
            )

    def _is_full_precision(self) -> bool:
        return self.autocast is None and next(self.model.parameters()).dtype == torch.float32


@dataclass
class ResponseScores:
    """Log-probs of a batch's responses; sums in float64, tokens as computed. None where not asked for.

    logps, reference_logps, kl: (responses,). token_logps, reference_token_logps, token_kl: (tokens,), in the order of
    `batch.targets`.
    """

    logps: Tensor
    token_logps: Tensor
    reference_logps: Tensor | None = None
    reference_token_logps: Tensor | None = None
    kl: Tensor | None = None
    token_kl: Tensor | None = None


def score_responses(policy: Scorer, batch: Batch, *, reference: Scorer | None = None, kl: str | None = None) -> ResponseScores:
    """Log-probs of every response token, under the policy (with gradient, if enabled) and the reference (without).

    kl: full-vocabulary KL at each scored position, with gradient through the policy: "reference||policy" (TDPO) or
    "policy||reference" (evaluation of samples); needs `reference`.
    """
    n = len(batch.lengths)
    reference_hidden = reference_token_logps = None
    if reference is not None:
        with torch.no_grad():
            reference_hidden, reference_token_logps = reference.run(lambda: _score_reference(reference, batch))
    if kl is None:
        reference_hidden = None
    token_logps, token_kl, owners = policy.run(lambda: _score_policy(policy, batch, reference, reference_hidden, kl))
    scores = ResponseScores(sum_by_owner(token_logps, owners, n), token_logps)
    if reference is not None:
        scores.reference_token_logps = reference_token_logps.to(token_logps.device)
        scores.reference_logps = sum_by_owner(scores.reference_token_logps, owners, n)
    if kl is not None:
        scores.token_kl = token_kl
        scores.kl = sum_by_owner(token_kl, owners, n)
    return scores


def _chunks(scorer: Scorer, n: int) -> list[slice]:
    """`n` tokens in chunks whose logits fit into CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // scorer.causal_lm.config.get_text_config().vocab_size)
    return [slice(begin, begin + step) for begin in range(0, n, step)]


def _score_reference(reference: Scorer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states at the scored positions and log-probs of the scored tokens, under the reference."""
    hidden = reference.hidden(batch, batch.positions)
    targets = batch.targets.to(hidden.device)
    logps = [_pick(reference.logits(hidden[piece]), targets[piece]) for piece in _chunks(reference, len(hidden))]
    return hidden, torch.cat(logps)


def _score_policy(policy: Scorer, batch: Batch, reference: Scorer | None, reference_hidden: Tensor | None, kl: str | None):
    """Log-probs of the scored tokens, their KL or None, (tokens,) each, and the owner of each."""
    hidden = policy.hidden(batch, batch.positions)
    targets, columns = batch.targets.to(hidden.device), []
    for piece in _chunks(policy, len(hidden)):
        arguments = (policy, hidden[piece], targets[piece], reference, None if kl is None else reference_hidden[piece], kl)
        if torch.is_grad_enabled() and hidden.requires_grad:
            columns.append(checkpoint(_score_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            columns.append(_score_chunk(*arguments))
    logps, kls = zip(*columns)
    return torch.cat(logps), None if kl is None else torch.cat(kls), batch.owners.to(hidden.device)


def _score_chunk(policy: Scorer, hidden: Tensor, targets: Tensor, reference: Scorer | None, reference_hidden: Tensor | None, kl: str | None):
    """Per token of a chunk: policy log-prob and KL, (tokens in chunk,) or None."""
    logits = policy.logits(hidden)
    token_logps = _pick(logits, targets)
    if kl is None:
        return token_logps, None
    with torch.no_grad(), reference.active():
        reference_logits = reference.logits(reference_hidden).to(logits.device)
    p, q = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    if kl == "reference||policy":
        p, q = q, p
    return token_logps, (p.exp() * (p - q)).sum(-1)


def _pick(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] for each row, without writing the log-softmax down."""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


@contextlib.contextmanager
def _adapter_off(model: nn.Module):
    """A PEFT model as its base model. PEFT's own way also freezes the adapter for that time, which FSDP would keep."""
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
    """Sums of token values by the response that owns them, (n,) in float64: float32 would keep 3e-5 of rounding."""
    return torch.zeros(n, dtype=torch.float64, device=values.device).index_add(0, owners, values.double())


def pad_by_owner(values: Tensor, owners: Tensor, lengths: Tensor) -> Tensor:
    """Token values as (responses, longest response) float64, zero behind each response."""
    lengths = lengths.to(values.device)
    within = torch.arange(len(values), device=values.device) - (lengths.cumsum(0) - lengths)[owners]
    padded = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.float64, device=values.device)
    return padded.index_put((owners, within), values.double())
