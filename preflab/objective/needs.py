"""The record that declares what losses can read, once, beside the field of `Side` that holds it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class MadeUp:
    """Draws random float64 values for `n` examples, so that a loss can be tried before a run.

    side: which responses they stand for; "single" where examples are not pairs, "listed" those of
    lists.
    """

    n: int
    side: Literal["chosen", "rejected", "single", "listed"]
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values, (n, *shape)."""
        return torch.randn(self.n, *shape, generator=self.generator, dtype=torch.float64)

    def lengths(self) -> Tensor:
        """From 2 to 5 tokens; rejected responses are one token longer than chosen ones."""
        return torch.arange(self.n).remainder(3).double() + (3 if self.side == "rejected" else 2)

    def of_tokens(self, values: Tensor) -> Tensor:
        """Values of tokens (n, 5) with zeros behind the length of each response."""
        return values * (torch.arange(5) < self.lengths()[:, None])

    def scores(self) -> Tensor:
        """Chosen above rejected, all positive; 0 and 1 in turn for single responses. Those of lists
        are the same as of chosen ones."""
        if self.side == "single":
            return torch.arange(self.n).remainder(2).double()
        if self.side in ("chosen", "listed"):
            return self.normal().abs() + 2
        return self.normal().abs().clamp(max=1) + 0.5


@dataclass(frozen=True)
class Need:
    """Something that a loss can read.

    name: what `reads` calls it. doc: what it is, in a phrase. take: `f(scores, batch)` returns it
    for every response of the batch, (responses, ...); scores is a `ResponseScores`, or has `values`
    alone for a model with a scalar head; batch is a `Batch`. made_up: `f(draw)` returns it for a
    made-up side, from a `MadeUp`. source: "text" comes from log-probs, "head" from a scalar head,
    "data" from the batch alone. score_options: further arguments that `score_responses` needs.
    reference: whether the reference takes part. trained: whether it has a gradient, through the
    policy. by_token: whether it has a value for each token of a response.
    """

    name: str
    doc: str
    take: Callable[[Any, Any], Tensor]
    made_up: Callable[[MadeUp], Tensor]
    source: Literal["text", "head", "data"] = "text"
    score_options: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = False
    trained: bool = False
    by_token: bool = False
