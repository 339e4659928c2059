"""Bootstrap heads: several linear layers on one model's features, whose spread is the uncertainty
of its scores."""

import numpy as np

MAX_STEPS = 50
TOLERANCE = 1e-10  # of the gradient's norm, relative to 1 + the norm of the solution


def fit_heads(
    features: np.ndarray, gaps: np.ndarray, n: int, prior: float, rng: np.random.Generator
) -> np.ndarray:
    """Weights of `n` heads, (n, D), that correct the scores of a model.

    Head h minimises

        sum_i c_hi log(1 + exp(-(g_i + w . x_i))) + |w - w_h0|^2 / (2 prior^2),

    x_i the features of the better response of label i minus those of the worse one, (labels, D),
    and g_i the model's gap, (labels,). Each head has its own w_h0 from N(0, prior^2), as a
    randomized prior (Osband, Aslanides and Cassirer, arXiv:1806.03335), and its own exponential
    weights c_hi of mean 1, as in the Bayesian bootstrap (Rubin, 1981). Where labels say nothing the
    heads keep the spread of the prior. The problem is convex and solved by Newton's method in the
    span of the features, so its cost depends on the number of labels and not on D.
    """
    n_labels, width = features.shape
    start = prior * rng.normal(size=(n, width))
    counts = rng.exponential(size=(n, n_labels))
    if not n_labels:
        return start
    basis, _ = np.linalg.qr(features.T)  # (D, r)
    coordinates = features @ basis  # (labels, r)
    offsets = gaps + start @ features.T  # (n, labels): gaps of the heads at their start
    moves = _minimise(coordinates, offsets, counts, prior)
    return start + moves @ basis.T


def _minimise(
    coordinates: np.ndarray, offsets: np.ndarray, counts: np.ndarray, prior: float
) -> np.ndarray:
    """The move t of each head, (n, r), from its start: the minimum of
    sum_i c_i log(1 + exp(-(o_i + t . z_i))) + |t|^2 / (2 prior^2)."""
    n, r = len(offsets), coordinates.shape[1]
    moves, ridge = np.zeros((n, r)), np.eye(r) / prior**2

    def losses(at: np.ndarray) -> np.ndarray:
        gaps = offsets + at @ coordinates.T
        return (counts * np.logaddexp(0, -gaps)).sum(1) + (at**2).sum(1) / (2 * prior**2)

    for _ in range(MAX_STEPS):
        wrong = sigmoid(-(offsets + moves @ coordinates.T))  # (n, labels)
        gradient = -(counts * wrong) @ coordinates + moves / prior**2
        bound = TOLERANCE * (1 + np.linalg.norm(moves, axis=1))
        if (np.linalg.norm(gradient, axis=1) <= bound).all():
            break
        curvature = counts * wrong * (1 - wrong)
        hessian = np.einsum("hl,li,lj->hij", curvature, coordinates, coordinates, optimize=True)
        step = np.linalg.solve(hessian + ridge, gradient[..., None])[..., 0]
        before, length = losses(moves), np.ones(n)
        for _ in range(MAX_STEPS):  # halve the steps that do not descend
            rises = losses(moves - length[:, None] * step) > before
            if not rises.any():
                break
            length[rises] /= 2
        moves = moves - length[:, None] * step
    return moves


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
