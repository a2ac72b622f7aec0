"""The ends of flows that are not stopped, by `limit`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from sklearn.exceptions import ConvergenceWarning

from .._solution import Status

__all__ = ["Ends", "ends", "gap", "kkt", "warn_unfinished"]

Array = NDArray[np.float64]
FACE = 1e-7  # slope, relative to the largest at 0, of coordinates that have to be 0


@dataclass(frozen=True)
class Ends:
    """End points: coefficients (m, d), dual variables (m, n), gaps (m,), and Newton steps."""

    x: Array
    theta: Array
    gap: Array
    steps: int


def ends(Z: Array, y: Array, log_As: Array, positive: bool, max_steps: int) -> Ends:
    """Return where the flow on |Zx - y|^2 ends for each scale, as one path.

    With ``positive`` and no x >= 0 that fits, it ends at least squares over x >= 0: of the
    coefficients that reach its predictions, those of least R_a.
    """
    face = np.ones(Z.shape[1], dtype=bool)
    found = _path(Z, y, log_As, positive, max_steps)
    if positive and found.status is Status.inconsistent:
        face, y = _nonnegative(Z, y)
        found = _path(Z[:, face], y, log_As, positive, max_steps)
    least_squares = found.status is Status.inconsistent and not positive
    if not (found.status.ok or least_squares):
        warn_unfinished(max_steps, found.status.value)
    x = np.zeros((len(log_As), Z.shape[1]))
    x[:, face] = found.value.numpy()
    steps = int(np.sum(found.stats.steps))
    return Ends(x, found.aux["theta"].numpy(), np.asarray(found.stats.gap), steps)


def _path(Z: Array, y: Array, log_As: Array, positive: bool, max_steps: int) -> Any:
    """Solve, from a start of scale 1: what is smaller or larger is decay, of which a is the sum."""
    import torch

    from ..legendre import legendre
    from ..limit import limit
    from ..regularizer import WeightDecay
    from ..reparam import Hadamard

    one = torch.ones(Z.shape[1], dtype=torch.float64)
    # A = w^2 / 2 for m = 0, and w^2 for m = w; a = log(A) / 2.
    w0 = (one, one) if positive else (torch.zeros_like(one), one * 2**0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what matters is warned of above
        R = legendre(Hadamard(), WeightDecay(), w0)
        return limit(R, Z, y, np.asarray(log_As) / 2, max_steps)


def _nonnegative(Z: Array, y: Array) -> tuple[NDArray[np.bool_], Array]:
    """Return the coordinates that can be > 0 in a solution of min |Zx - y|, x >= 0, and its Zx.

    By complementary slackness a coordinate whose slope is not 0 is 0 in every solution.
    """
    x, _ = nnls(Z, y, maxiter=max(100, 10 * Z.shape[1]))
    slope = Z.T @ (Z @ x - y)
    return slope <= FACE * np.abs(Z.T @ y).max(initial=0.0), Z @ x


def warn_unfinished(max_iter: float, why: str = "") -> None:
    """Warn that the steps have run out."""
    warnings.warn(
        f"the flow has not reached its end in max_iter={max_iter:g} steps{why and f' ({why})'}; "
        "increase max_iter, or stop it earlier",
        ConvergenceWarning,
        stacklevel=5,
    )


# How well a fit satisfies its conditions, and how far from L1 it is.


def kkt(x: Array, log_A: float, mu: Array, positive: bool) -> float:
    """Compare mirror(x) with X^T nu, where x has digits."""
    size = float(np.abs(mu).max(initial=0.0))
    held = np.abs(x) > 1e-300  # below, x has few digits or none
    if size == 0 or not held.any():
        return 0.0
    z = np.log(np.abs(x[held])) - log_A
    mirror = z if positive else np.sign(x[held]) * _arcsinh_exp(z)
    return float(np.abs(mirror / 2 - mu[held]).max()) / size


def _arcsinh_exp(z: Array) -> Array:
    """Return arcsinh(e^z), also where e^z overflows."""
    return np.where(z > 300, z + np.log(2.0), np.arcsinh(np.exp(np.minimum(z, 300))))


def gap(x: Array, gain: float, mu: Array, positive: bool) -> float:
    """Return the relative duality gap of the L1 norm, with nu as the witness."""
    size = float(np.abs(x).sum())
    height = float((mu if positive else np.abs(mu)).max(initial=0.0))
    if size == 0 or height <= 0:
        return 0.0
    return min(1.0, max(0.0, 1 - gain / (height * size)))
