"""The load-balancing loss of a mixture of experts (arXiv:2101.03961, equations 4 to 6), over all
tokens of a step.

transformers adds it to the loss of a forward pass where the model's config has
`output_router_logits`, and here it is added to the loss of a step. With E experts, weights w of the
tokens t of all layers with routers, and p(t) the softmax of a router's logits:

    E sum_e f_e P_e,  f_e = sum_t w_t [e among the first k of p(t)] / sum_t w_t,
                      P_e = sum_t w_t p_e(t) / sum_t w_t

Every response of every example counts with its prompt, as in padded rows without its padding: the
weight of a token is the number of texts that it stands for. So neither the layout, nor microbatches
and ranks, nor a response that several pairs share change the loss. Only P has a gradient, and it is
a sum over tokens; f is known before the first backward pass.
"""

import torch
from torch import Tensor

from preflab.batching.packing import Batch
from preflab.distributed.process_group import World
from preflab.modeling.logprobs import Scorer
from utils import ConfigError


class RouterLoss:
    """The loss of one policy. `begin` each step, then `part` for each microbatch after its forward
    pass.

    coefficient: of the loss in the training loss, the config's `router_aux_loss_coef`.
    """

    def __init__(self, policy: Scorer, coefficient: float, top_k: int):
        self.policy, self.coefficient, self.top_k = policy, coefficient, top_k
        policy.keep_router_logits = True
        self._value: Tensor | float = 0.0
        self._share: Tensor | None = None  # f, (experts,)
        self._total = 0.0  # the weights of all tokens and layers
        self._world: World | None = None

    @classmethod
    def of(cls, policy: Scorer) -> "RouterLoss | None":
        """The loss that the model's config asks for; None where it does not.

        Raises ConfigError where the config lacks the coefficient.
        """
        config = policy.causal_lm.config.get_text_config()
        if not getattr(config, "output_router_logits", False):
            return None
        coefficient = getattr(config, "router_aux_loss_coef", None)
        top_k = getattr(config, "num_experts_per_tok", None)
        if coefficient is None or top_k is None:
            raise ConfigError(
                "output_router_logits=true in the model's config.json asks for the router's loss,"
                f" and the config of {config.model_type} has no router_aux_loss_coef or no"
                " num_experts_per_tok; add them, or set output_router_logits to false"
            )
        return cls(policy, coefficient, top_k) if coefficient else None

    def begin(self, microbatches: list[tuple[Batch, int]], world: World) -> None:
        """Count how often each expert is chosen in a step, in a pass without gradient. With one
        microbatch the counts come from its own forward pass."""
        self._world, self._share, self._value = world, None, 0.0
        if len(microbatches) == 1:
            return
        counts = []
        for batch, n_real in microbatches:
            batch = batch.to(self.policy.device)
            with torch.no_grad():
                self.policy.run(lambda batch=batch: self.policy.hidden(batch, batch.positions))
            counts.append(self._counts(self._take_probabilities(), token_weights(batch, n_real)))
        self._share_of(torch.stack(counts).sum(0))

    def part(self, batch: Batch, n_real: int) -> Tensor:
        """The part of a microbatch in the step's loss, times the coefficient, with gradient; after
        the policy's forward pass on it. The parts of all microbatches and ranks add up.

        n_real: the number of its examples that count.
        """
        probabilities, weights = self._take_probabilities(), token_weights(batch, n_real)
        if self._share is None:
            self._share_of(self._counts(probabilities, weights))
        sums = torch.stack(
            [(p * weights.to(p)[:, None]).sum(0, dtype=torch.float64) for p in probabilities]
        ).sum(0)
        part = len(sums) * (self._share.to(sums) * sums).sum() / self._total
        self._value = self._value + part.detach()
        return (self.coefficient * part).to(batch.chosen.device)

    def total(self) -> float:
        """The loss of the step, without the coefficient, over all microbatches and ranks."""
        return self._world.sum([float(self._value)])[0]

    def _take_probabilities(self) -> list[Tensor]:
        """Of each layer with a router, (rows*width, experts) on the device of the first."""
        logits, self.policy.router_logits = self.policy.router_logits, None
        device = logits[0].device
        return [
            one.to(device).softmax(-1, dtype=torch.promote_types(one.dtype, torch.float32))
            for one in logits
        ]

    def _counts(self, probabilities: list[Tensor], weights: Tensor) -> Tensor:
        """Weighted choices of each expert, and the sum of the weights, (experts + 1,) float64."""
        n_experts = probabilities[0].shape[1]
        weights = weights.to(probabilities[0].device)
        counts = torch.zeros(n_experts + 1, dtype=torch.float64, device=weights.device)
        for p in probabilities:
            chosen = p.detach().topk(self.top_k, dim=-1).indices.flatten()
            counts.index_add_(0, chosen, weights.repeat_interleave(self.top_k))
            counts[-1] += weights.sum()
        return counts

    def _share_of(self, counts: Tensor) -> None:
        """Set f and the total from this rank's counts."""
        *counts, self._total = self._world.sum(counts.tolist())
        self._share = torch.tensor(counts, dtype=torch.float64) / self._total


def token_weights(batch: Batch, n_real: int) -> Tensor:
    """Of how many texts of the first `n_real` examples each token is a part, (rows*width,) float64.

    A text is a response of an example behind its prompt, as far as the model reads it.
    """
    members = batch.chosen[:n_real]
    if batch.lists is not None:
        members = batch.lists[:n_real][batch.listed[:n_real]]
    if batch.rejected is not None:
        members = torch.cat([members, batch.rejected[:n_real]])
    texts = torch.bincount(members, minlength=len(batch.lengths)).double()
    if batch.segments is None:
        return (batch.attention_mask * texts[:, None]).flatten()
    weights = torch.zeros(batch.input_ids.shape[1], dtype=torch.float64)
    rows = batch.segments.flatten(0, 2).tolist()
    for (begin, prompt, response_begin, length), n in zip(rows, texts.tolist(), strict=True):
        weights[begin : begin + prompt] += n
        weights[response_begin : response_begin + length] += n
    return weights.to(texts.device)
