"""Gradients of many numbers with respect to the weights of a model, and their inner products.

A gradient is stored whole, or as a count sketch of k numbers (Charikar, Chen and Farach-Colton,
2002): every weight adds its derivative, with a random sign, to one of k sums. Inner products of
sketches are those of the gradients in expectation, with a variance of at most
(|a|^2 |b|^2 + (a b)^2) / k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils import content_hash

CHUNK = 2**24  # derivatives that are sketched, or multiplied, at a time


@dataclass(frozen=True)
class SketchError:
    """How far inner products of sketches are off: (sketched - exact) / (|a| |b|).

    rms, largest: over the squared norm of every gradient and its inner product with the first one,
    n in all.
    """

    rms: float
    largest: float
    n: int


@dataclass
class Gradients:
    """Rows of gradients. parameters: what they are with respect to; sketch: numbers of a row, None
    for whole gradients; seed: of the sketch."""

    parameters: Sequence[nn.Parameter]
    sketch: int | None
    seed: int = 0
    rows: list[Tensor] = field(default_factory=list)
    _first: list[Tensor] | None = None
    _exact: list[tuple[float, float]] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.sketch or sum(parameter.numel() for parameter in self.parameters)

    def of(self, value: Tensor, *, retain_graph: bool = False) -> list[Tensor]:
        """The gradient of a scalar, a tensor for each parameter; zeros where it does not depend on
        one."""
        gradients = torch.autograd.grad(
            value, self.parameters, retain_graph=retain_graph, allow_unused=True
        )
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self.parameters, gradients, strict=True)
        ]

    def as_row(self, gradients: Sequence[Tensor]) -> Tensor:
        """A gradient as a row: (width,) on the CPU."""
        if self.sketch is None:
            return torch.cat([gradient.flatten().cpu() for gradient in gradients])
        row = torch.zeros(self.sketch, dtype=torch.float64)
        for number, gradient in enumerate(gradients):
            row += _sketched(gradient.flatten(), self.sketch, self.seed, number).cpu()
        return row

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Append a gradient, and measure what its sketch loses."""
        self.rows.append(self.as_row(gradients))
        if self.sketch is None:
            return
        if self._first is None:
            self._first = [gradient.clone() for gradient in gradients]
        pairs = ((gradients, gradients), (gradients, self._first))
        self._exact.append(tuple(sum(map(_dot, a, b)) for a, b in pairs))

    def gram(self) -> Tensor:
        """Inner products of all rows, (rows, rows) in float64."""
        n = len(self.rows)
        total = torch.zeros(n, n, dtype=torch.float64)
        step = max(1, CHUNK // n)
        for begin in range(0, self.width, step):
            piece = torch.stack([row[begin : begin + step].double() for row in self.rows])
            total += piece @ piece.t()
        return total

    def sketch_error(self) -> SketchError | None:
        """The error of the rows that `add` appended; None for whole gradients."""
        if self.sketch is None:
            return None
        first, errors = self.rows[0], []
        first_norm = self._exact[0][0] ** 0.5
        for i, (row, (squared, with_first)) in enumerate(zip(self.rows, self._exact, strict=False)):
            if not squared:
                continue
            errors.append((float(row @ row) - squared) / squared)
            if i and first_norm:
                errors.append((float(row @ first) - with_first) / (squared**0.5 * first_norm))
        values = torch.tensor(errors or [0.0], dtype=torch.float64)
        rms = values.square().mean().sqrt()
        return SketchError(float(rms), float(values.abs().max()), len(errors))


def _dot(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten(), b.flatten()
    return sum(
        float(x.double() @ y.double()) for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    )


def _sketched(values: Tensor, k: int, seed: int, number: int) -> Tensor:
    """The sums (k,) of the values (n,) of one parameter, the `number`-th, in float64. Which sum and
    sign a value has depends on its place, k and the seed alone."""
    sums = torch.zeros(k, dtype=torch.float64, device=values.device)
    for i, piece in enumerate(values.split(CHUNK)):
        generator = torch.Generator(values.device)
        # A generator on the CPU reads 32 bits of its seed.
        generator.manual_seed(int(content_hash(f"{seed}/{number}/{i}")[:8], 16))
        places = torch.randint(
            2 * k, (len(piece),), generator=generator, device=values.device, dtype=torch.int64
        )
        signs = 1 - 2 * (places & 1)
        sums.index_add_(0, places >> 1, piece.double() * signs)
    return sums


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights that training would change: with LoRA those of the adapter."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
