"""What the estimators of low-rank matrices share: completion, and what they keep of it."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted

from ._alternating import Observed, Trained, alternate

__all__ = ["LowRank", "filled"]

Array = NDArray[Any]
PATH = (0.5, 0.2)  # stronger decay that comes first,
ROUGH = 1e-3  # and the tolerance there
NOTHING = 1e-10  # a largest singular value below it, relative to the data, is rounding


class LowRank(BaseEstimator):
    """A matrix X = U V^T of low rank."""

    max_rank: int | None
    alpha: float
    switch_off: bool
    max_iter: int
    tol: float
    n_features_in_: int

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "max_rank": [Interval(Integral, 1, None, closed="left"), None],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "switch_off": ["boolean"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, 1, closed="neither")],
    }

    def _columns(self, shape: tuple[int, int]) -> int:
        """Return the columns of the factors; refuse more than X has."""
        if self.max_rank is None:
            return min(10, *shape)
        if self.max_rank > min(shape):
            raise ValueError(f"max_rank={self.max_rank} is above the dimension of X, {shape}")
        return self.max_rank

    def _complete(self, M: Any, kind: type[Observed] = Observed) -> tuple[Trained, float, Any]:
        """Find the factors from the entries that are known; give the last decay, and the problem.

        ``kind`` says what is completed, and how.
        """
        columns, problem = self._columns(M.shape), kind.of(M)
        _check_seen(problem.seen)
        empty = np.zeros((M.shape[0], 0)), np.zeros((M.shape[1], 0))
        top = float(problem.strongest(*empty, 1)[0].max())
        if not top > NOTHING * float(np.linalg.norm(problem.Y.data)):
            zero = Trained(np.zeros((M.shape[0], 1)), np.zeros((M.shape[1], 1)), 1, True)
            return zero, 0.0, problem
        stages = [(c, max(ROUGH, self.tol)) for c in PATH if c > self.alpha]
        stages.append((float(self.alpha), self.tol))
        if self.switch_off and self.alpha > 0:
            stages.append((0.0, self.tol))
        # In units of the data nothing depends on what they are measured in.
        scaled = problem.times(1 / top)
        found = alternate(scaled, columns, stages, self.max_iter)
        return found.times(top), stages[-1][0] * top, scaled.times(top)

    def _keep(self, found: Trained, dtype: Any) -> None:
        """Set the attributes, and warn of what is not as it should be."""
        if not found.settled:
            warnings.warn(
                f"the factors have not settled in max_iter={self.max_iter} steps; increase "
                "max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        if found.left_out:
            warnings.warn(
                f"max_rank={self.max_rank} leaves directions out that the decay alpha="
                f"{self.alpha} would let in: the rank is {found.U.shape[1]} because of max_rank; "
                "increase max_rank or alpha",
                UserWarning,
                stacklevel=3,
            )
        inner = np.linalg.qr(found.U)[1] @ np.linalg.qr(found.V)[1].T
        values = np.linalg.svd(inner, compute_uv=False)
        self.U_, self.V_ = found.U.astype(dtype), found.V.astype(dtype)
        self.singular_values_ = values.astype(dtype)
        self.rank_ = int((values > max(1e-6 * values.max(initial=0.0), 1e-300)).sum())
        self.n_iter_ = max(1, found.steps)

    def matrix(self) -> Array:
        """Form X.

        Returns
        -------
        array of shape (p, q)
        """
        check_is_fitted(self)
        return self.U_ @ self.V_.T


def _check_seen(seen: Any) -> None:
    """Refuse a matrix of which nothing is known; warn of rows and columns without an entry."""
    if not seen.nnz:
        raise ValueError("X has no entry that is known: there is nothing to complete it from")
    for axis, name in ((1, "rows"), (0, "columns")):
        empty = int((seen.sum(axis=axis) == 0).sum())
        if empty:
            warnings.warn(
                f"{empty} {name} of X have no entry: they are completed by 0 (and offsets)",
                UserWarning,
                stacklevel=5,
            )


def filled(M: Any, X: Array) -> Array:
    """Return the known entries of M (of a sparse M those that are stored), and X's elsewhere."""
    X = X.astype(M.dtype, copy=False)
    if not hasattr(M, "tocsr"):
        return np.where(np.isnan(M), X, M)
    known = Observed.of(M).Y.tocoo()
    X[known.coords] = known.data
    return X
