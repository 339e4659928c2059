"""From inner products of gradients to cosines, predicted changes, a map and clusters.

Shapes: n rows of gradients, L losses. The update of a loss is minus the sum of its coefficients
times the rows. G (n, n) holds the inner products of the rows, C (L, n) the coefficients dL/dlogp.
All in float64.
"""

import torch
from torch import Tensor


def norms(gram: Tensor, coefficients: Tensor) -> Tensor:
    """The length of each loss's gradient, sqrt(c'Gc), (L,)."""
    return ((coefficients @ gram) * coefficients).sum(1).clamp(min=0).sqrt()


def cosines(gram: Tensor, coefficients: Tensor) -> Tensor:
    """c'Gd / (|c| |d|) of all losses, (L, L); NaN for a loss without a gradient."""
    length = norms(gram, coefficients)
    length = torch.where(length > 0, length, torch.nan)
    inner = coefficients @ gram @ coefficients.t()
    return (inner / length[:, None] / length[None]).clamp(-1, 1)


def changes(gram: Tensor, coefficients: Tensor) -> Tensor:
    """-Gc, (L, n): how fast each row's number changes along the update of each loss. A step of SGD
    with a small rate lr changes it by lr times as much."""
    return -(coefficients @ gram)


def changes_per_unit(gram: Tensor, coefficients: Tensor) -> Tensor:
    """-Gc / |c|, (L, n): the change for an update of length 1; NaN without a gradient."""
    length = norms(gram, coefficients)
    return changes(gram, coefficients) / torch.where(length > 0, length, torch.nan)[:, None]


def carrying_share(weights: Tensor) -> Tensor:
    """(sum w)^2 / (B sum w^2) of the weights (L, B) of pairs, (L,): 1 where all count alike, k/B
    where k of them do."""
    squares = weights.square().sum(1) * weights.shape[1]
    return torch.where(squares > 0, weights.sum(1) ** 2 / squares, 0.0)


def plane(cosine: Tensor) -> tuple[Tensor, float]:
    """Two coordinates of each loss, (L, 2), and the share of the spread that they show.

    Principal components of the updates at unit length, from their cosines (L, L) alone. The first
    loss lies at the origin, and the one farthest from it on the right.
    """
    centred = cosine - cosine.mean(0) - cosine.mean(1)[:, None] + cosine.mean()
    values, vectors = torch.linalg.eigh(centred)
    values = values.clamp(min=0)
    spread = values.sum()
    places = (vectors * values.sqrt())[:, [-1, -2]] if len(values) > 1 else torch.zeros(1, 2)
    shown = float(values[-2:].sum() / spread) if spread > 0 else 1.0
    places = places - places[0]
    farthest = places.norm(dim=1).argmax()
    flips = torch.where(places[farthest] < 0, -1.0, 1.0)
    return places * flips, shown


def clusters(cosine: Tensor, same: float) -> list[list[int]]:
    """Groups of losses in which all cosines are at least `same`: those whose most different members
    are the most alike are joined first (complete linkage). The largest group is the first."""
    groups: list[list[int]] = [[i] for i in range(len(cosine))]
    least = cosine.clone().fill_diagonal_(-torch.inf)  # between the members of two groups
    while True:
        best = int(least.argmax())
        i, j = sorted(divmod(best, len(cosine)))
        if not least.flatten()[best] >= same:
            break
        groups[i] += groups[j]
        groups[j] = []
        least[i] = torch.minimum(least[i], least[j])
        least[:, i] = least[i]
        least[i, i] = -torch.inf
        least[j], least[:, j] = -torch.inf, -torch.inf
    joined = [sorted(group) for group in groups if group]
    return sorted(joined, key=lambda group: (-len(group), group))


def middle(cosine: Tensor, group: list[int]) -> int:
    """The member of a group with the largest mean cosine to the others; the first loss, which the
    others are compared with, in its own group."""
    if 0 in group:
        return 0
    return group[int(cosine[group][:, group].mean(1).argmax())]
