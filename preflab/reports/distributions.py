"""Student's t distribution and the power of t tests, in numpy alone."""

import math

import numpy as np

# Gauss-Legendre nodes and weights on [0, 1].
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2

# Beyond this angle times sqrt(df), the density is below e^-72 of its maximum.
_LAST_ANGLE = 12.0


def t_cdf(t: float | np.ndarray, df: float | np.ndarray) -> np.ndarray:
    """P(T <= t) of Student's t with `df` >= 1 degrees of freedom, which need not be whole.

    With t = sqrt(df) tan(a), the density is proportional to cos(a)^(df - 1), a smooth function that
    is integrated numerically. Accurate to about 1e-14.
    """
    t, df = np.broadcast_arrays(np.asarray(t, float), np.asarray(df, float))
    half = _half_integral(np.arctan(np.abs(t) / np.sqrt(df)), df)
    return 0.5 + np.sign(t) * np.minimum(half, 0.5)


def _half_integral(angle: np.ndarray, df: np.ndarray) -> np.ndarray:
    """P(0 <= T <= sqrt(df) tan(angle))."""
    angle = np.minimum(angle, _LAST_ANGLE / np.sqrt(df))
    inside = np.cos(angle[..., None] * _NODES) ** (df[..., None] - 1)
    return _scale(df) * angle * (inside @ _WEIGHTS)


def _scale(df: np.ndarray) -> np.ndarray:
    """The density of the angle at 0."""
    log_gamma = np.vectorize(math.lgamma, otypes=[float])
    return np.exp(log_gamma((df + 1) / 2) - log_gamma(df / 2)) / math.sqrt(math.pi)


def t_quantile(p: float, df: float | np.ndarray) -> np.ndarray:
    """The value that Student's t is at most with probability `p`, for 0 < p < 1.

    Newton's method on the angle: the integral is concave there, so that the steps from 0 never pass
    the solution.
    """
    df = np.asarray(df, float)
    angle = np.zeros_like(df)
    for _ in range(200):
        missing = abs(p - 0.5) - _half_integral(angle, df)
        step = missing / (_scale(df) * np.cos(angle) ** (df - 1))
        angle = angle + np.maximum(step, 0.0)
        if np.all(step < 1e-13 * np.maximum(angle, 1e-300)):
            break
    return math.copysign(1.0, p - 0.5) * np.sqrt(df) * np.tan(angle)


def normal_cdf(x: np.ndarray) -> np.ndarray:
    """P(Z <= x) of the standard normal distribution."""
    return 0.5 * np.vectorize(math.erfc, otypes=[float])(-np.asarray(x, float) / math.sqrt(2))


def power_to_differ(difference: float, error: float, df: float, alpha: float = 0.05) -> float:
    """The probability that a two-sided t test calls a true `difference` different from 0.

    error: the true standard error of the estimate. df: degrees of freedom of its estimate.
    """
    critical = float(t_quantile(1 - alpha / 2, df))
    ratio, weight = _estimated_errors(df)
    shift = abs(difference) / error
    found = normal_cdf(shift - critical * ratio) + normal_cdf(-shift - critical * ratio)
    return float(found @ weight)


def power_to_equal(margin: float, error: float, df: float, alpha: float = 0.05) -> float:
    """The probability that two one-sided t tests call a true difference of 0 smaller than `margin`
    (Schuirmann 1987). `error`, `df`: as for `power_to_differ`."""
    critical = float(t_quantile(1 - alpha, df))
    ratio, weight = _estimated_errors(df)
    room = margin / error - critical * ratio
    return float(np.maximum(normal_cdf(room) - normal_cdf(-room), 0.0) @ weight)


def _estimated_errors(df: float) -> tuple[np.ndarray, np.ndarray]:
    """Values of estimated / true standard error, and their probabilities: sqrt(chi^2 / df)."""
    spread = 9 / math.sqrt(2 * df)
    ratio = np.linspace(max(1e-9, 1 - spread), 1 + spread, 801)
    log_density = (df - 1) * np.log(ratio) - df * ratio**2 / 2
    weight = np.exp(log_density - log_density.max())
    return ratio, weight / weight.sum()
