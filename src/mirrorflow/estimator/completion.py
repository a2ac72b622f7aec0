"""Imputers that fill the missing entries of rows by a low-rank model of them."""

from __future__ import annotations

from copy import copy
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import OneToOneFeatureMixin, TransformerMixin
from sklearn.metrics import r2_score
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted, validate_data

from ._alternating import Observed, OffsetObserved, Offsets, Trained, solve_rows, solve_with_offsets
from ._lowrank import LowRank, filled

__all__ = ["MatrixCompletion", "RowCompletion", "observed"]

Array = NDArray[Any]


class RowCompletion(OneToOneFeatureMixin, TransformerMixin, LowRank):
    """An imputer of rows by factors and, perhaps, offsets."""

    row_offset_: Array
    column_offset_: Array
    offset_penalty_: float | None  # None without offsets

    def matrix(self) -> Array:
        """Form X, offsets included.

        Returns
        -------
        array of shape (n_samples, n_features)
        """
        return super().matrix() + self.row_offset_[:, None] + self.column_offset_

    def predict_pairs(self, pairs: Any) -> Array:
        """Return entries of X, offsets included, without forming it.

        Parameters
        ----------
        pairs : array of shape (m, 2)
            The row, of those that were fitted, and the column of each entry.

        Returns
        -------
        array of shape (m,)

        Raises
        ------
        ValueError
            If there are not two whole numbers for each entry, or X has no such row or column.
        """
        check_is_fitted(self)
        i, j = _places(pairs, (len(self.U_), len(self.V_)))
        inner = np.einsum("ij,ij->i", self.U_[i], self.V_[j])
        return inner + self.row_offset_[i] + self.column_offset_[j]

    def score_pairs(self, pairs: Any, y: Any) -> float:
        """Return R2 of entries that were hidden in training.

        Parameters
        ----------
        pairs : array of shape (m, 2)
            Rows and columns, as for `predict_pairs`.
        y : array of shape (m,)
            The entries.

        Returns
        -------
        float
        """
        return float(r2_score(y, self.predict_pairs(pairs)))

    def score(self, X: Any, y: Any = None) -> float:
        """Return R2 of the known entries of rows, each predicted from the others of its row.

        By it `sklearn.model_selection.GridSearchCV` chooses. It says something about rows that were
        not fitted.

        Parameters
        ----------
        X : array, frame or sparse matrix of shape (n_rows, n_features)
            Rows with at least one known entry.
        y : ignored

        Returns
        -------
        float
        """
        check_is_fitted(self)
        M = self._checked(X, reset=False)
        return self._row_score(M, self.column_offset_, self.offset_penalty_)

    def transform(self, X: Any) -> Array:
        """Fill the missing entries of rows; what is known is left as it is.

        Parameters
        ----------
        X : array, frame or sparse matrix of shape (n_rows, n_features)
            Any rows. One without a known entry becomes 0, with offsets those of the columns.

        Returns
        -------
        array of shape (n_rows, n_features)
        """
        check_is_fitted(self)
        M = self._checked(X, reset=False)
        V, b, problem = self.V_.astype(np.float64), self.column_offset_, Observed.of(M)
        if self.offset_penalty_ is None:
            return filled(M, solve_rows(problem, V, self.decay_) @ V.T)
        U, a = solve_with_offsets(problem, V, b, self.decay_, self.offset_penalty_)
        return filled(M, U @ V.T + a[:, None] + b)

    def _checked(self, X: Any, reset: bool) -> Any:
        """Check X as scikit-learn does."""
        return validate_data(
            self,
            X,
            reset=reset,
            accept_sparse="csr",
            dtype=[np.float64, np.float32],
            ensure_all_finite="allow-nan",
        )

    def __sklearn_tags__(self) -> Any:
        """Take NaN and what is not stored for what is not known; keep float32."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class MatrixCompletion(RowCompletion):
    r"""Fill the missing entries of rows, in training and later, by a matrix of low rank.

    With Y the entries that are known, the factors of X = U V^T minimize

    .. math:: \tfrac12 \sum_{ij\ known} (X_{ij} - Y_{ij})^2
        + \tfrac{\lambda}{2} (|U|_F^2 + |V|_F^2),

    with lambda = ``alpha`` times the largest singular value of the known entries, 0 elsewhere. The
    penalty acts like the nuclear norm of X and leaves few directions. Switched off in the
    end, it leaves these free to fit the data without being shrunk. A new row is u V^T, with the u
    that minimizes the same for its known entries.

    Parameters
    ----------
    max_rank : int or None, default=None
        The columns of U and V, >= 1; decay leaves those that the data need. None for 10, or fewer
        where X is smaller. Where decay would let more in, fit warns.
    alpha : float, default=0.1
        The decay, >= 0, in units of the smallest that would keep X at 0: the largest singular
        value of the known entries with 0 elsewhere. Stronger decay, 0.5 and 0.2, comes first; with
        ``alpha=0`` what it leaves is fitted.
    switch_off : bool, default=False
        Whether to set the decay to 0 once the factors have settled under it, and to go on. It
        makes the fit of a matrix that is nearly of low rank exact, and is harmful elsewhere:
        without decay the directions that are left overfit the known entries of images or ratings.
    center : bool, default=False
        Whether to fit offsets a_i of the rows and b_j of the columns beside U V^T. Right where the
        entries have a level of their own, as ratings and most tables: a level far from 0 is a
        direction that decay shrinks, and that hides the others.
    offset_penalty : float, default=0.0
        The strength beta, >= 0, of a penalty on the offsets, in numbers of entries: the offset of a
        row with n known entries is shrunk towards 0, a column's to the mean of all entries, as if
        by beta more entries. Right where rows or columns have few entries; 5 suits ratings.
    max_iter : int, default=2000
        The largest number of alternations at each strength of the decay.
    tol : float, default=1e-6
        The relative change of the factors in a step at which they have settled.

    Attributes
    ----------
    U_, V_ : arrays of shape (n_samples, r) and (n_features, r)
        The factors; r is the rank that is left.
    singular_values_ : array of shape (r,)
        The singular values of X, in descending order.
    rank_ : int
        How many of them exceed 1e-6 times the largest.
    row_offset_, column_offset_ : arrays of shape (n_samples,) and (n_features,)
        a, with mean 0 where it is not penalized, and b; 0 unless ``center``.
    offset_penalty_ : float or None
        The penalty; None without offsets.
    decay_ : float
        The decay at the end, in the units of X; 0 where it was switched off.
    n_iter_ : int
        Steps taken.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    See Also
    --------
    MatrixCompletionCV : chooses ``alpha`` and the offsets by cross-validation.
    MatrixSensing : completes one matrix, symmetric ones too, and recovers it from measurements.

    Notes
    -----
    Fitting takes memory for the factors and the known entries, and of a constant size besides,
    where X is sparse. The factors then are the result: `transform` gives a dense array.

    With ``center`` a new row gets the offset that fits its known entries together with its u; one
    without a known entry becomes b.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import MatrixCompletion
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((80, 2)) @ rng.standard_normal((2, 30))
    >>> seen = np.where(rng.random(X.shape) < 0.5, X, np.nan)
    >>> model = MatrixCompletion(switch_off=True).fit(seen[:60])
    >>> model.rank_, bool(np.abs(model.transform(seen[60:]) - X[60:]).max() < 1e-3)
    (2, True)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **LowRank._parameter_constraints,
        "center": ["boolean"],
        "offset_penalty": [Interval(Real, 0, None, closed="left")],
    }

    def __init__(
        self,
        max_rank: int | None = None,
        alpha: float = 0.1,
        *,
        switch_off: bool = False,
        center: bool = False,
        offset_penalty: float = 0.0,
        max_iter: int = 2000,
        tol: float = 1e-6,
    ) -> None:
        self.max_rank = max_rank
        self.alpha = alpha
        self.switch_off = switch_off
        self.center = center
        self.offset_penalty = offset_penalty
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any = None) -> MatrixCompletion:
        """Learn the factors.

        Parameters
        ----------
        X : array, frame or sparse matrix of shape (n_samples, n_features)
            With NaN where it is not known. Of a sparse matrix the stored entries are known, stored
            zeros among them, and the others are not.
        y : ignored

        Returns
        -------
        self
        """
        self._validate_params()
        fitted = copy(self)  # an interrupted fit leaves self as it was
        found, dtype = fitted._from_entries(X)
        fitted._keep(found, dtype)
        self.__dict__ = fitted.__dict__
        return self

    def _from_entries(self, X: Any) -> tuple[Trained, Any]:
        """Alternate on the entries that are known."""
        M = self._checked(X, reset=True)
        self.offset_penalty_ = float(self.offset_penalty) if self.center else None
        found, self.decay_, problem = self._complete(M, observed(M, self.offset_penalty_))
        p, q = M.shape
        offsets = problem.offsets if self.center else Offsets(np.zeros(p), np.zeros(q))
        self.row_offset_, self.column_offset_ = (o.astype(M.dtype) for o in (offsets.a, offsets.b))
        return found, M.dtype


def _places(pairs: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Return rows and columns, checked."""
    found = np.asarray(pairs)
    if found.ndim != 2 or found.shape[1] != 2 or found.dtype.kind not in "iu":
        raise ValueError(
            f"pairs must be whole numbers of shape (m, 2), got {found.dtype} of shape {found.shape}"
        )
    if (found < 0).any() or (found >= np.array(shape)).any():
        raise ValueError(
            f"pairs must lie within X, of shape {shape}, got {found.min(axis=0)} "
            f"to {found.max(axis=0)}"
        )
    return found[:, 0], found[:, 1]


def observed(M: Any, penalty: float | None) -> Observed:
    """Return the problem of what is known of M, with offsets unless their penalty is None."""
    return Observed.of(M) if penalty is None else OffsetObserved.penalized(M, penalty)
