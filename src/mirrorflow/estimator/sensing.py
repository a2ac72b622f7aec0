"""Low-rank matrices from measurements or from some of their entries."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array as sklearn_check_array
from sklearn.utils._param_validation import Interval
from sklearn.utils.extmath import randomized_svd
from sklearn.utils.validation import check_is_fitted, column_or_1d

from .factors import Measured, Observed, Trained, alternate, descend

__all__ = ["MatrixSensing"]

check_array: Any = sklearn_check_array  # its defaults mislead type checkers

Array = NDArray[np.float64]
PATH = (0.5, 0.2)  # stronger decay that comes first, relative to the largest, for entries


class MatrixSensing(TransformerMixin, BaseEstimator):
    r"""Recover a low-rank matrix X = U V^T from <A_i, X> = y_i, or from some of its entries.

    Weight decay on the factors acts like the nuclear norm of X and leaves few directions; switched
    off, these fit the data without being shrunk.

    Parameters
    ----------
    max_rank : int or None, default=None
        The columns of U and V, >= 1; decay leaves those that the data need. None for 10, or fewer
        where X is smaller.
    alpha : float, default=0.1
        The decay, >= 0, in units of the smallest that would keep X at 0: the largest singular
        value of the gradient there.
    switch_off : bool, default=True
        Whether to set the decay to 0 once training has settled under it (at the latest after
        half of ``max_iter``), and to go on.
    symmetric : bool, default=False
        X = U U^T, symmetric and positive semi-definite; for measurements only.
    shape : (int, int) or None, default=None
        Of X, where measurements are given as rows of p * q numbers.
    init : float, default=0.01
        The squared size of U and V at the start, in each direction and in units of the data: the
        beta of the theory.
    max_iter : int, default=2000
        The largest number of steps; for entries of alternations, at each strength of the decay.
    tol : float, default=1e-6
        The relative change of the factors in a step at which training has settled.

    Attributes
    ----------
    U_, V_ : arrays of shape (p, r) and (q, r)
        The factors; r is the rank that is left. With ``symmetric`` they are the same.
    singular_values_ : array of shape (r,)
        Of X, falling.
    rank_ : int
        How many of them exceed 1e-6 times the largest.
    n_iter_ : int
        Steps taken.
    n_features_in_ : int
        p * q for measurements, q for entries.

    Notes
    -----
    Where the theory carries over: for U U^T and commuting A_i exactly (Corollary C.3; `limit` has
    the end point), for U V^T where factors and gradient stay aligned, as from the start that is
    made here (the singular vectors of the first gradient). For other measurements, and for
    entries, the same decay has the same stationary points, but the end of training is not the
    minimizer of an R_a. For entries the factors are found by alternating least squares instead of
    gradient descent: the decay, its effect and its end are the same, the path is not.

    Entries take memory for the factors and the observed entries, and of a constant size besides.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import MatrixSensing
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 40))
    >>> seen = np.where(rng.random(X.shape) < 0.4, X, np.nan)
    >>> model = MatrixSensing().fit(seen)
    >>> model.rank_, bool(np.abs(model.matrix() - X).max() < 1e-3)
    (2, True)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "max_rank": [Interval(Integral, 1, None, closed="left"), None],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "switch_off": ["boolean"],
        "symmetric": ["boolean"],
        "shape": [tuple, list, None],
        "init": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, 1, closed="neither")],
    }

    def __init__(
        self,
        max_rank: int | None = None,
        alpha: float = 0.1,
        *,
        switch_off: bool = True,
        symmetric: bool = False,
        shape: tuple[int, int] | None = None,
        init: float = 0.01,
        max_iter: int = 2000,
        tol: float = 1e-6,
    ) -> None:
        self.max_rank = max_rank
        self.alpha = alpha
        self.switch_off = switch_off
        self.symmetric = symmetric
        self.shape = shape
        self.init = init
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any = None) -> MatrixSensing:
        """Recover the matrix.

        Parameters
        ----------
        X : array
            With ``y`` the measurements A_i, of shape (m, p, q), or (m, p * q) and ``shape``.
            Without it the matrix itself, (p, q), with NaN where it is not known.
        y : array of shape (m,), default=None
            The values <A_i, X>.

        Returns
        -------
        self
        """
        self._validate_params()
        found = self._complete(X) if y is None else self._sense(X, y)
        if not found.settled:
            warnings.warn(
                f"the factors have not settled in max_iter={self.max_iter} steps; increase "
                "max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.U_, self.V_, self.n_iter_ = found.U, found.V, max(1, found.steps)
        inner = np.linalg.qr(self.U_)[1] @ np.linalg.qr(self.V_)[1].T
        self.singular_values_ = np.linalg.svd(inner, compute_uv=False)
        largest = self.singular_values_.max(initial=0.0)
        self.rank_ = int((self.singular_values_ > max(1e-6 * largest, 1e-300)).sum())
        return self

    def _sense(self, X: Any, y: Any) -> Trained:
        """Descend on the factors."""
        A = check_array(X, dtype=np.float64, allow_nd=True, input_name="X")
        y = column_or_1d(check_array(y, dtype=np.float64, ensure_2d=False, input_name="y"))
        shape = self._shape(A, y)
        columns = self._columns(shape)
        self.n_features_in_ = shape[0] * shape[1]
        f = Measured(A.reshape(len(A), -1), y, shape)
        empty = np.zeros((shape[0], 0)), np.zeros((shape[1], 0))
        G = -f.gradient(*empty)
        if self.symmetric:
            values, L = np.linalg.eigh((G + G.T) / 2)
            s, R = values[::-1][:columns], L[:, ::-1][:, :columns]
            L, top = R, float(s.max())
        else:
            L, s, Rt = np.linalg.svd(G, full_matrices=False)
            L, R, top = L[:, :columns], Rt[:columns].T, float(s.max(initial=0.0))
        if not top > 1e-14 * float(np.linalg.norm(A)) * float(np.linalg.norm(y)):
            return Trained(np.zeros((shape[0], 1)), np.zeros((shape[1], 1)), 1, True)
        # |X| is about the first gradient's size where measurements are near isometric.
        root = np.sqrt(
            self.init * float(np.linalg.norm(y)) / np.sqrt((f.A**2).sum() / shape[0] / shape[1])
        )
        off = self.max_iter // 2 if self.switch_off else None
        return descend(
            f, root * L, root * R, self.symmetric, self.alpha * top, off, self.max_iter, self.tol
        )

    def _shape(self, A: Array, y: Array) -> tuple[int, int]:
        """Give (p, q), and refuse what does not fit."""
        if len(A) != len(y):
            raise ValueError(f"X has {len(A)} measurements, y has {len(y)} values")
        if A.ndim == 3:
            shape = (A.shape[1], A.shape[2])
        elif A.ndim == 2 and self.shape is not None:
            shape = (int(self.shape[0]), int(self.shape[1]))
        else:
            raise ValueError(
                f"X must have shape (m, p, q), or (m, p * q) with shape=(p, q); it has {A.shape}"
            )
        if A[0].size != shape[0] * shape[1]:
            raise ValueError(f"shape={shape} does not fit measurements of {A[0].size} numbers")
        if self.symmetric and shape[0] != shape[1]:
            raise ValueError(f"symmetric=True needs p = q, got {shape}")
        return shape

    def _columns(self, shape: tuple[int, int]) -> int:
        """Give the columns of the factors; refuse more than X has."""
        if self.max_rank is None:
            return min(10, *shape)
        if self.max_rank > min(shape):
            raise ValueError(f"max_rank={self.max_rank} is above the dimension of X, {shape}")
        return self.max_rank

    def _complete(self, X: Any) -> Trained:
        """Alternate on the entries that are known."""
        if self.symmetric:
            raise ValueError("symmetric=True is for measurements: give y")
        M = check_array(X, dtype=np.float64, ensure_all_finite="allow-nan", input_name="X")
        columns = self._columns(M.shape)
        self.n_features_in_ = M.shape[1]
        if np.isnan(M).all():
            raise ValueError("X has no entry that is known: there is nothing to complete it from")
        problem = Observed.of(M)
        missing = [("rows", problem.seen.sum(axis=1)), ("columns", problem.seen.sum(axis=0))]
        for name, counts in missing:
            if not counts.all():
                warnings.warn(
                    f"{(counts == 0).sum()} {name} of X have no entry: they are completed by 0",
                    UserWarning,
                    stacklevel=3,
                )
        largest: Any = randomized_svd(problem.Y, 1, random_state=0)[1]
        top = float(largest.max(initial=0.0))
        wanted = [c for c in PATH if c > self.alpha] + [self.alpha]
        alphas = [c * top for c in wanted] + ([0.0] if self.switch_off else [])
        return alternate(problem, columns, alphas, self.max_iter, self.tol)

    def matrix(self) -> Array:
        """Form X.

        Returns
        -------
        array of shape (p, q)
        """
        check_is_fitted(self)
        return self.U_ @ self.V_.T

    def predict(self, X: Any) -> Array:
        """Give the values <A_i, X> of measurements.

        Parameters
        ----------
        X : array of shape (m, p, q) or (m, p * q)
            The measurements.

        Returns
        -------
        array of shape (m,)
        """
        check_is_fitted(self)
        A = check_array(X, dtype=np.float64, allow_nd=True, input_name="X")
        if A[0].size != len(self.U_) * len(self.V_):
            raise ValueError(
                f"X has {A[0].size} features, but MatrixSensing is expecting "
                f"{len(self.U_) * len(self.V_)} features as input"
            )
        return A.reshape(len(A), -1) @ self.matrix().ravel()

    def transform(self, X: Any) -> Array:
        """Fill the unknown entries of the matrix that was fitted.

        Parameters
        ----------
        X : array of shape (p, q)
            With NaN where it is not known; the rest is left as it is.

        Returns
        -------
        array of shape (p, q)
        """
        check_is_fitted(self)
        M = check_array(X, dtype=np.float64, ensure_all_finite="allow-nan", input_name="X")
        if M.shape != (len(self.U_), len(self.V_)):
            raise ValueError(f"X has shape {M.shape}, fitted was {(len(self.U_), len(self.V_))}")
        return np.where(np.isnan(M), self.matrix(), M)

    def __sklearn_tags__(self) -> Any:
        """Take NaN for what is not known."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.three_d_array = True
        return tags
