"""Base class of the estimators of low-rank matrices: completion, its results and its score."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import r2_score
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted

from .._threads import small_on_one_thread
from ._alternating import Observed, Trained, alternate

__all__ = ["LowRank", "filled", "left_out_errors"]

Array = NDArray[Any]
PATH = (0.5, 0.2)  # stronger decay that comes first,
ROUGH = 1e-3  # and the tolerance there
FREE = 1e-6  # 1 - h below it: the entry itself has decided its prediction
NOTHING = 1e-10  # a largest singular value below it, relative to the data, is rounding


class LowRank(BaseEstimator):
    """A matrix X = U V^T of low rank."""

    max_rank: int | None
    alpha: float
    switch_off: bool
    max_iter: int
    tol: float
    n_features_in_: int
    decay_: float

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
            raise ValueError(
                f"max_rank must be at most {min(shape)} for X of shape {shape}, got {self.max_rank}"
            )
        return self.max_rank

    def _complete(self, M: Any, problem: Observed) -> tuple[Trained, float, Any]:
        """Find the factors from the entries that are known.

        Return them with the decay at the end, and with the problem as it then is.
        """
        columns = self._columns(M.shape)
        _check_seen(problem.seen)
        with small_on_one_thread(problem.Y.nnz):
            return self._alternated(M, problem, columns)

    def _alternated(self, M: Any, problem: Observed, columns: int) -> tuple[Trained, float, Any]:
        """Lower the decay in stages, and alternate at each."""
        empty = np.zeros((M.shape[0], 0)), np.zeros((M.shape[1], 0))
        top = float(problem.strongest(*empty, 1)[0].max())
        if not top > NOTHING * float(np.linalg.norm(problem.Y.data)):
            zero = Trained(np.zeros((M.shape[0], 1)), np.zeros((M.shape[1], 1)), 1, True)
            return zero, 0.0, problem
        stages = [(c, max(ROUGH, self.tol)) for c in PATH if c > self.alpha]
        stages.append((float(self.alpha), self.tol))
        if self.switch_off and self.alpha > 0:
            stages.append((0.0, self.tol))
        # In units of the strongest pull alpha = 1 keeps X at 0, whatever the data are measured in.
        scaled = problem.times(1 / top)
        found = alternate(scaled, columns, stages, self.max_iter)
        return found.times(top), stages[-1][0] * top, scaled.times(top)

    def _keep(self, found: Trained, dtype: Any) -> None:
        """Set the attributes, and warn of what is not as it should be."""
        if not found.settled:
            warnings.warn(
                f"the factors must settle to tol={self.tol:g} within max_iter={self.max_iter} "
                "steps, got a larger change. Increase max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        if found.left_out:
            warnings.warn(
                "max_rank must admit all directions that decay lets in at "
                f"alpha={self.alpha:g}, got {found.U.shape[1]}. Increase max_rank or alpha",
                UserWarning,
                stacklevel=3,
            )
        # U V^T = Q_U (R_U R_V^T) Q_V^T has the singular values of its core.
        with small_on_one_thread(found.U.size + found.V.size):
            inner = np.linalg.qr(found.U)[1] @ np.linalg.qr(found.V)[1].T
            values = np.linalg.svd(inner, compute_uv=False)
        self.U_, self.V_ = found.U.astype(dtype), found.V.astype(dtype)
        self.singular_values_ = values.astype(dtype)
        self.rank_ = int((values > max(1e-6 * values.max(initial=0.0), 1e-300)).sum())
        self.n_iter_ = max(1, found.steps)

    def _row_score(self, M: Any, b: Array, penalty: float | None) -> float:
        """Return R2 of the known entries, each from the others of its row."""
        known = Observed.of(M)
        if not known.seen.nnz:
            raise ValueError("X must have a known entry to be scored, got none")
        V, decay = self.V_.astype(np.float64), float(self.decay_)
        missed = left_out_errors(known, V, b.astype(np.float64), decay, penalty)
        return float(r2_score(known.Y.data, known.Y.data - missed))

    def matrix(self) -> Array:
        """Form X.

        Returns
        -------
        array of shape (p, q)
        """
        check_is_fitted(self)
        return self.U_ @ self.V_.T


def left_out_errors(
    problem: Observed, V: Array, b: Array, decay: float, penalty: float | None
) -> Array:
    r"""Return Y_ij minus its prediction from the other entries of row i, with V and b as they are.

    A row is a ridge regression, so that nothing has to be fitted again:

    .. math:: y_j - \hat y_j^{(-j)} = (y_j - \hat y_j) / (1 - h_j), \quad
        h_j = w_j^T (W^T W + \operatorname{diag}(\alpha))^{-1} w_j

    ``penalty`` is the penalty on the row's offset, None without offsets. An entry without which
    the row would not be determined is predicted by b alone.
    """
    W, ridge = V, np.full(V.shape[1], decay)
    if penalty is not None:
        W, ridge = np.column_stack([V, np.ones(len(V))]), np.r_[ridge, penalty]
    # The same least ridge as in `solve_rows`, which fits the rows.
    ridge = np.diag(ridge + 1e-12 * float((W**2).sum()) / len(W))
    Y, found = problem.Y, np.empty(problem.Y.nnz)
    for i in range(Y.shape[0]):
        part = slice(Y.indptr[i], Y.indptr[i + 1])
        rows, y = W[Y.indices[part]], Y.data[part] - b[Y.indices[part]]
        solved = np.linalg.solve(rows.T @ rows + ridge, rows.T)
        free = 1 - np.einsum("ij,ji->i", rows, solved)  # 1 - h
        known = free > FREE
        missed = (y - rows @ (solved @ y)) / np.where(known, free, 1.0)  # (y - y^) / (1 - h)
        found[part] = np.where(known, missed, y)
    return found


def _check_seen(seen: Any) -> None:
    """Refuse a matrix of which nothing is known; warn of rows and columns without an entry."""
    if not seen.nnz:
        raise ValueError("X must have a known entry, got none. Mark only unknown entries by NaN")
    for axis, name in ((1, "rows"), (0, "columns")):
        empty = int((seen.sum(axis=axis) == 0).sum())
        if empty:
            warnings.warn(
                f"each row and column of X must have a known entry, got {empty} {name} without. "
                "They are filled with 0, or with the offsets if there are any. Remove them",
                UserWarning,
                stacklevel=5,
            )


def filled(M: Any, X: Array) -> Array:
    """Return the known entries of M (of a sparse M those that are stored), and X's elsewhere."""
    X = X.astype(M.dtype, copy=False)
    if not hasattr(M, "tocsr"):
        return np.where(np.isnan(M), X, M)
    known = Observed.of(M).Y.tocoo()
    X[known.row, known.col] = known.data
    return X
