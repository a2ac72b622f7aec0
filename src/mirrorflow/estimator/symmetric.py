r"""Training U of a symmetric, positive semi-definite matrix U U^T on some of its entries.

:math:`f(U U^T) + \alpha |U|_F^2` is minimized by L-BFGS: its stationary points are those of
gradient descent on U under decay, and :math:`|U|_F^2` is the trace of the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.sparse.linalg import eigsh

from .factors import DEAD, Observed, product_at

__all__ = ["SymmetricObserved"]

Array = NDArray[np.float64]
DENSE = 200  # rows up to which all eigenvalues are computed at once
FLOOR = 1e-7  # a gradient that line searches cannot lower for rounding, in units of the data


@dataclass(frozen=True)
class SymmetricObserved(Observed):
    """f of a symmetric X: each entry that is known counts half for its place and half for (j, i).

    ``Y`` is symmetric, with the mean where both are known; ``seen`` has the weights 1/2 and 1.
    """

    @classmethod
    def at(cls, rows: Any, columns: Any, values: Array, shape: Any) -> SymmetricObserved:
        """Take values at their places and at the mirrored ones."""
        places = np.r_[rows, columns], np.r_[columns, rows]
        sums: Any = csr_array((np.r_[values, values], places), shape=shape)
        counts: Any = csr_array((np.ones(2 * len(values)), places), shape=shape)
        Y = csr_array((sums.data / counts.data, sums.indices, sums.indptr), shape=shape)
        return cls(Y, csr_array((counts.data / 2, sums.indices, sums.indptr), shape=shape))

    def pull(self, U: Array, V: Array) -> Any:
        """Give -grad f(U V^T), which is sparse and, where V is U, symmetric."""
        values = self.seen.data * (self.Y.data - product_at(self.Y, U, V))
        return csr_array((values, self.Y.indices, self.Y.indptr), shape=self.Y.shape)

    def strongest(self, U: Array, V: Array, k: int) -> tuple[Array, Array]:
        """Give the k largest eigenvalues of -grad f(U V^T), and (k, q) eigenvectors."""
        G, n = self.pull(U, V), self.Y.shape[0]
        if n <= max(DENSE, k + 1):
            s, L = np.linalg.eigh(G.toarray())
        else:
            s, L = eigsh(G, k, which="LA", v0=np.ones(n))
        largest = np.argsort(s)[::-1][:k]
        return s[largest], L[:, largest].T

    def settle(
        self, U: Array, V: Array, alpha: float, steps: int, tol: float
    ) -> tuple[Array, Array, int, bool]:
        """Minimize at one alpha from V; give U twice, the steps, and whether it has settled."""

        def objective(flat: Array) -> tuple[float, Array]:
            W = flat.reshape(V.shape)
            residual = self.Y.data - product_at(self.Y, W, W)
            value = 0.5 * float(self.seen.data @ residual**2) + alpha * float(flat @ flat)
            return value, 2 * (alpha * W - self.pull(W, W) @ W).ravel()

        limits: Any = {"maxiter": steps, "maxfun": 5 * steps, "ftol": 0.0, "gtol": 0.1 * tol}
        found = minimize(objective, V.ravel(), jac=True, method="L-BFGS-B", options=limits)
        settled = float(np.abs(found.jac).max()) <= max(0.1 * tol, FLOOR)
        L, s, _ = np.linalg.svd(found.x.reshape(V.shape), full_matrices=False)
        keep = s**2 > DEAD * s.max(initial=0.0) ** 2
        W = L[:, keep] * s[keep]
        return W, W, int(found.nit), settled
