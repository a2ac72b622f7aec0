"""End points of flows that are not stopped, by `limit`, and certificates of fits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from .._threads import few_threads
from ..legendre._kernels import arcsinh_ratio, duality_gap, kkt_residual, nonnegative_least_squares
from ._row_space import EPS, RowSpace, row_space

__all__ = ["Endpoints", "endpoints", "gap", "kkt", "residual_slope", "warn_unfinished"]

Array = NDArray[np.float64]
FACE = 1e-7  # slope, relative to the largest at 0, of coordinates that have to be 0


@dataclass(frozen=True)
class Endpoints:
    """Coefficients (m, d), dual variables (m, n) and gaps (m,) at the end, and Newton steps."""

    x: Array
    theta: Array
    gap: Array
    steps: int


def endpoints(
    space: RowSpace, y: Array, log_As: Array, positive: bool, max_steps: int
) -> Endpoints:
    """Return where the flow on |Zx - y|^2 ends for each scale, as one path.

    It ends at least squares: of the coefficients that reach its predictions, those of least R_a.
    With ``positive`` these are the least squares over x >= 0.
    """
    face = np.ones(space.Z.shape[1], dtype=bool)
    found = _path(space.Q.T, space.targets(y), log_As, positive, max_steps)
    turn = space.dual
    if positive and not found.status.ok:  # `limit` may stall where it cannot prove that no x fits
        face, part, fitted = _nonnegative(space, y)
        if not face.any():  # every coefficient falls to 0, its dual variable without end
            none = np.zeros((len(log_As), len(face)))
            return Endpoints(none, np.zeros((len(log_As), len(y))), np.zeros(len(log_As)), 0)
        found = _path(part.Q.T, part.targets(fitted), log_As, positive, max_steps)
        turn = partial(_turned, space, part)
    if not found.status.ok:
        warn_unfinished(max_steps, found.status.value)
    x = np.zeros((len(log_As), len(face)))
    x[:, face] = found.value.numpy()
    theta = np.stack([turn(row) for row in found.aux["theta"].numpy()])
    gaps = [
        gap(row, space.Z @ row @ nu, space.Z[:, face].T @ nu, positive)
        for row, nu in zip(x, theta, strict=True)
    ]
    return Endpoints(x, theta, np.array(gaps), int(np.sum(found.stats.steps)))


def _turned(space: RowSpace, part: RowSpace, theta: Array) -> Array:
    """Return the dual variable of the rows as given, from the one of a face's columns."""
    return space.U @ part.dual(theta)


def _path(Q: Array, b: Array, log_As: Array, positive: bool, max_steps: int) -> Any:
    """Solve, from a start of scale 1: what is smaller or larger is decay, of which a is the sum."""
    import torch

    from ..legendre import legendre
    from ..limit import limit
    from ..regularizer import WeightDecay
    from ..reparam import Hadamard

    one = torch.ones(Q.shape[1], dtype=torch.float64)
    # A = w^2 / 2 for m = 0, and w^2 for m = w; a = log(A) / 2.
    w0 = (one, one) if positive else (torch.zeros_like(one), one * 2**0.5)
    with warnings.catch_warnings(), few_threads(Q.size):
        warnings.simplefilter("ignore", RuntimeWarning)  # what matters is warned of above
        R = legendre(Hadamard(), WeightDecay(), w0)
        return limit(R, Q, b, np.asarray(log_As) / 2, max_steps, per_coordinate=False)


def _nonnegative(space: RowSpace, y: Array) -> tuple[NDArray[np.bool_], RowSpace, Array]:
    """Return where a solution of min |Zx - y|, x >= 0, can be > 0, these columns, and its Zx.

    By complementary slackness a coordinate whose slope is not 0 is 0 in every solution. The rows
    are compressed, and the columns have unit length, which changes no sign.
    """
    rows = space.compressed()
    unit, target = rows / space.lengths, space.U.T @ y
    x = nonnegative_least_squares(unit, target)
    slope = unit.T @ (unit @ x - target)
    face = slope <= FACE * np.abs(unit.T @ target).max(initial=0.0)
    # The rows come out of a decomposition of Z, with its rounding: n or d times that of a number.
    rounding = EPS * max(space.Z.shape) * space.lengths[face]
    return face, row_space(rows[:, face], rounding), unit @ x


def residual_slope(x: Array, gradient: Array, positive: bool) -> float:
    """Return the largest slope of the squared error at x along what x may change by.

    With ``positive`` that excludes coordinates at 0 along which the error would only grow.
    """
    if not positive:
        return float(np.abs(gradient).max(initial=0.0))
    share = x / max(float(x.max(initial=0.0)), 1e-300)
    return float(np.maximum(np.maximum(gradient, 0.0), np.abs(gradient) * share).max(initial=0.0))


def warn_unfinished(max_iter: float, why: str = "") -> None:
    """Warn that the steps have run out."""
    warnings.warn(
        f"the flow must reach its end within max_iter={max_iter:g} steps, got an unfinished one"
        f"{why and f' ({why})'}. Increase max_iter, or stop the flow earlier",
        ConvergenceWarning,
        stacklevel=5,
    )


# How well a fit satisfies its conditions, and how far from L1 it is.


def kkt(x: Array, log_A: float, mu: Array, positive: bool) -> float:
    """Return how far mirror(x) is from X^T nu, where x has digits, relative to the latter."""
    size = float(np.abs(mu).max(initial=0.0))
    held = np.abs(x) > 1e-300  # below, x has few digits or none
    if size == 0:
        return 0.0
    safe = np.where(held, x, 1.0)
    mirror = np.log(np.abs(safe)) - log_A if positive else arcsinh_ratio(safe, np.asarray(log_A))
    return kkt_residual(mirror / 2, mu, held) / size


def gap(x: Array, gain: float, mu: Array, positive: bool) -> float:
    """Return the relative duality gap of the L1 norm, with nu as the witness."""
    ceiling = float((mu if positive else np.abs(mu)).max(initial=0.0))
    return duality_gap(float(np.abs(x).sum()), gain, ceiling)
