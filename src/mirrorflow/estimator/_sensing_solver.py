r"""Training the factors of a matrix on measurements <A_i, X> = y_i, by gradient descent.

.. math:: f(U V^T) + \tfrac{\alpha}{2} (|U|_F^2 + |V|_F^2)

is lowered under decay alpha, and then without it. Everything is in units in which the mean squares
of A's numbers and of y are 1, so that nothing depends on the units of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse

from ._alternating import ABOVE, Trained

__all__ = ["MeasurementProblem", "descend", "flat", "matrices", "sense"]

Array = NDArray[np.float64]
NOTHING = 1e-13  # a first gradient below it, in its natural units, is rounding


def flat(X: Any) -> Any:
    """Return measurements that are matrices as rows."""
    return np.reshape(np.asarray(X), (len(X), -1)) if matrices(X) else X


def matrices(X: Any) -> tuple[int, ...]:
    """Return the shape of measurements that are matrices, and nothing for rows."""
    shape = np.shape(X) if isinstance(X, list | tuple) else getattr(X, "shape", ())
    return tuple(shape[1:]) if len(shape) == 3 else ()


@dataclass(frozen=True)
class MeasurementProblem:
    """f(X) = sum_i w_i (<A_i, X> / a - y_i)^2 / 2, with weights whose sum is 1.

    A has shape (m, p * q) and may be sparse; it stays as it is given, only a is taken out of it.
    ``unit`` is what X is to be multiplied by to be in the units of the data.
    """

    A: Any
    y: Array
    weights: Array
    a: float
    unit: float
    shape: tuple[int, int]

    @classmethod
    def of(
        cls, A: Any, y: Array, shape: tuple[int, int], weights: Array | None = None
    ) -> MeasurementProblem:
        """Take the units out of A and y."""
        w = np.ones(len(y)) if weights is None else weights
        w = w / w.sum()
        squares = A.multiply(A).sum(axis=1) if issparse(A) else np.einsum("ij,ij->i", A, A)
        a = float(np.sqrt(w @ np.asarray(squares).ravel() / A.shape[1])) or 1.0
        b = float(np.sqrt(w @ y**2)) or 1.0
        return cls(A, y / b, w, a, b / a, shape)  # (A / a) (a X / b) = y / b

    def residual(self, U: Array, V: Array) -> Array:
        """Return <A_i, U V^T> / a - y_i."""
        return self.A @ (U @ V.T).ravel() / self.a - self.y

    def value(self, U: Array, V: Array) -> float:
        """Return f(U V^T)."""
        return 0.5 * float(self.weights @ self.residual(U, V) ** 2)

    def gradient(self, U: Array, V: Array) -> Array:
        """Return grad f(U V^T)."""
        return (self.A.T @ (self.weights * self.residual(U, V)) / self.a).reshape(self.shape)


def sense(
    f: MeasurementProblem,
    columns: int,
    symmetric: bool,
    alpha: float,
    init: float,
    off: int | None,
    steps: int,
    tol: float,
) -> Trained:
    """Train factors with so many columns; alpha is in units of what would keep X at 0.

    They start at the singular vectors of the first gradient (with ``symmetric`` its eigenvectors),
    sqrt(init) long.
    """
    p, q = f.shape
    G = -f.gradient(np.zeros((p, 0)), np.zeros((q, 0)))  # -grad f(0)
    if symmetric:
        s, L = np.linalg.eigh((G + G.T) / 2)
        L = R = L[:, ::-1][:, :columns]
    else:
        L, s, Rt = np.linalg.svd(G, full_matrices=False)
        L, R = L[:, :columns], Rt[:columns].T
    top = float(s.max(initial=0.0))
    # 0 minimizes f + rate |X|_* where |grad f(0)| <= rate, the rate being alpha top.
    if not top > NOTHING * np.sqrt(p * q) or alpha >= 1:  # 0 is the minimizer under decay
        return Trained(np.zeros((p, 1)), np.zeros((q, 1)), 1, True)
    root = np.sqrt(init)
    found = descend(f, root * L, root * R, symmetric, alpha * top, off, steps, tol)
    return found.times(f.unit)


def descend(
    f: MeasurementProblem,
    U: Array,
    V: Array,
    symmetric: bool,
    alpha: float,
    off: int | None,
    steps: int,
    tol: float,
) -> Trained:
    r"""Descend on both factors until they settle under decay, or to step ``off``; then without it.

    With ``off`` None the decay stays. With ``symmetric`` V is U, and U moves by
    -(grad f + alpha) U (Corollary C.3).
    """
    kept = steps if off is None else min(off, steps)
    U, V, count, settled = _settle(f, U, V, symmetric, alpha, kept, tol)
    left_out = settled and _left_out(f, U, V, symmetric, alpha)
    if off is not None:
        U, V, more, settled = _settle(f, U, V, symmetric, 0.0, steps - count, tol)
        count += more
        left_out = left_out or (settled and _left_out(f, U, V, symmetric, alpha))
    return Trained(U, V, count, settled, left_out)


def _left_out(f: MeasurementProblem, U: Array, V: Array, symmetric: bool, alpha: float) -> bool:
    """Whether f pulls harder than alpha in a direction that the factors do not have."""
    if alpha == 0 or U.shape[1] == min(f.shape):
        return False
    (L, _), (R, _) = np.linalg.qr(U), np.linalg.qr(V)
    G = -f.gradient(U, V)
    G -= L @ (L.T @ G)  # (1 - L L^T) G (1 - R R^T): what the factors do not have
    G -= (G @ R) @ R.T
    pulls = np.linalg.eigvalsh((G + G.T) / 2) if symmetric else np.linalg.norm(G, 2)
    return bool(np.max(pulls) > ABOVE * alpha)


def _settle(
    f: MeasurementProblem, U: Array, V: Array, symmetric: bool, rate: float, steps: int, tol: float
) -> tuple[Array, Array, int, bool]:
    """Descend at one rate of decay; give the factors, the steps, and whether they have settled.

    The step length grows while the objective falls and is halved where it rises. The first moves
    the factors by their own size at most: the curvature is not known yet.
    """
    eta = np.inf
    for count in range(1, steps + 1):
        U, V, eta, moved = _step(f, U, V, symmetric, rate, 1.5 * eta)
        if moved <= tol * _size(U, V):
            return U, V, count, True
    return U, V, steps, False


def _step(
    f: MeasurementProblem, U: Array, V: Array, symmetric: bool, rate: float, eta: float
) -> tuple[Array, Array, float, float]:
    """Take a step that lowers the objective; return its length in time and in space as well."""
    G, value, size = f.gradient(U, V), _objective(f, U, V, rate), _size(U, V)
    # V = U: half of the gradient (Corollary C.3, errata 17), counted twice in slope^2, as it falls.
    GU = (G + G.T) @ U / 2 + rate * U if symmetric else G @ V + rate * U
    GV = GU if symmetric else G.T @ U + rate * V
    slope = _size(GU, GV)
    eta = min(eta, size / slope) if slope > 0 else 1.0
    while True:
        newU, newV = U - eta * GU, V - eta * GV
        fallen = value - _objective(f, newU, newV, rate)
        # Armijo's condition; rounding decides in steps below 1e-15 of the factors.
        if fallen >= 0.1 * eta * slope**2 or eta * slope <= 1e-15 * size:
            return newU, newV, eta, eta * slope
        eta /= 2


def _size(U: Array, V: Array) -> float:
    """Return the Frobenius norm of both factors together."""
    return float(np.sqrt((U**2).sum() + (V**2).sum()))


def _objective(f: MeasurementProblem, U: Array, V: Array, rate: float) -> float:
    """Return f(U V^T) + rate/2 (|U|^2 + |V|^2)."""
    return f.value(U, V) + 0.5 * rate * _size(U, V) ** 2
