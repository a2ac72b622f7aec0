"""Low-rank matrices from measurements or from some of their entries."""

from __future__ import annotations

from copy import copy
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import RegressorMixin, TransformerMixin
from sklearn.utils import check_array as sklearn_check_array
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from .._threads import small_on_one_thread
from ._alternating import Observed, SymmetricObserved, Trained
from ._lowrank import LowRank, filled
from ._sensing_solver import MeasurementProblem, flat, matrices, sense

__all__ = ["MatrixSensing"]

check_array: Any = sklearn_check_array  # its defaults mislead type checkers

Array = NDArray[Any]
FLOATS = [np.float64, np.float32]


class MatrixSensing(RegressorMixin, TransformerMixin, LowRank):
    r"""Recover a low-rank matrix X = U V^T from <A_i, X> = y_i, or from some of its entries.

    Weight decay on the factors acts like the nuclear norm of X and leaves few directions; switched
    off, these fit the data without being shrunk. From measurements it is a regressor; a matrix with
    missing entries is completed where there is no y (`MatrixCompletion` also fills new rows).

    Parameters
    ----------
    max_rank : int or None, default=None
        The columns of U and V, >= 1; decay leaves those that the data need. None for 10, or fewer
        where X is smaller. Where decay would let more in, fit warns.
    alpha : float, default=0.1
        The decay, >= 0, in units of the smallest that would keep X at 0: the largest singular
        value of the gradient there (with ``symmetric`` the largest eigenvalue of its negative).
        From 1 on X is 0. For entries stronger decay, 0.5 and 0.2, comes first; with ``alpha=0``
        what it leaves is fitted.
    switch_off : bool, default=True
        Whether to set the decay to 0 once training has settled under it (at the latest after
        half of ``max_iter``), and to go on. Right where X is nearly of low rank; harmful where it
        is not, as for images or ratings: without decay the directions that are left overfit the
        known entries there.
    symmetric : bool, default=False
        X = U U^T, symmetric and positive semi-definite. An entry that is known stands for its
        mirror image as well; where both are known, and differ, for their mean.
    shape : (int, int) or None, default=None
        Of X, where measurements are given as rows of p * q numbers; not for entries.
    init : float, default=0.01
        The squared size of U and V at the start, in each direction and in units of the data: the
        beta of the theory. For measurements.
    max_iter : int, default=2000
        The largest number of steps; for entries of alternations, at each strength of the decay.
    tol : float, default=1e-6
        The relative change of the factors in a step at which training has settled.

    Attributes
    ----------
    U_, V_ : arrays of shape (p, r) and (q, r)
        The factors; r is the rank that is left. With ``symmetric`` they are the same.
    singular_values_ : array of shape (r,)
        The singular values of X, in descending order.
    rank_ : int
        How many of them exceed 1e-6 times the largest.
    decay_ : float
        After a fit to entries, the decay at the end, in the units of X.
    n_iter_ : int
        Steps taken.
    n_features_in_ : int
        p * q for measurements, q for entries.
    feature_names_in_
        As everywhere in scikit-learn.

    See Also
    --------
    MatrixCompletion : an imputer for rows, those that come later among them.

    Notes
    -----
    Where the theory carries over: for U U^T and commuting A_i exactly (Corollary C.3; `limit` has
    the end point), for U V^T where factors and gradient stay aligned, as from the start that is
    made here (the singular vectors of the first gradient). For other measurements, and for
    entries, the same decay has the same stationary points, but the end of training is not the
    minimizer of an R_a. For entries the factors are found by alternating least squares instead of
    gradient descent, with ``symmetric`` by L-BFGS: the decay, its effect and its end are the same,
    the path is not.

    Data are measured in their own units: c A and d y give d / c times the matrix.

    Entries take memory for the factors and the observed entries, and of a constant size besides,
    where X is sparse. Measurements take a few arrays of the size of X, and A as it is given: sparse
    ones (one entry each, or a product of sparse vectors) reach sizes that dense ones do not.

    Nothing is centred: a constant offset is one more direction. For entries, `MatrixCompletion` has
    ``center=True``.

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
        **LowRank._parameter_constraints,
        "symmetric": ["boolean"],
        "shape": [tuple, list, None],
        "init": [Interval(Real, 0, None, closed="neither")],
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

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> MatrixSensing:
        """Recover the matrix.

        Parameters
        ----------
        X : array, frame or sparse matrix
            With ``y`` the measurements A_i, of shape (m, p, q), or (m, p * q) and ``shape``; sparse
            ones are not made dense. Without it the matrix itself, (p, q), with NaN where it is not
            known; of a sparse one the stored entries are known, stored zeros among them.
        y : array of shape (m,), default=None
            The values <A_i, X>.
        sample_weight : array of shape (m,), default=None
            Weights >= 0 of the measurements.

        Returns
        -------
        self
        """
        self._validate_params()
        fitted = copy(self)  # an interrupted fit leaves self as it was
        if y is None:
            found, dtype = fitted._from_entries(X, sample_weight)
        else:
            vars(fitted).pop("decay_", None)
            found, dtype = fitted._from_measurements(X, y, sample_weight)
        fitted._keep(found, dtype)
        self.__dict__ = fitted.__dict__
        return self

    def _from_entries(self, X: Any, sample_weight: Any) -> tuple[Trained, Any]:
        """Alternate on the entries that are known."""
        for name, given in (("shape", self.shape), ("sample_weight", sample_weight)):
            if given is not None:
                raise ValueError(
                    f"{name} must be left out without y, got one. It is for measurements"
                )
        M: Any = validate_data(
            self, X, accept_sparse="csr", dtype=FLOATS, ensure_all_finite="allow-nan"
        )
        self._check_square(M.shape)
        problem = (SymmetricObserved if self.symmetric else Observed).of(M)
        found, self.decay_, _ = self._complete(M, problem)
        return found, M.dtype

    def _from_measurements(self, X: Any, y: Any, sample_weight: Any) -> tuple[Trained, Any]:
        """Descend on the factors."""
        shape = self._shape(X)
        A: Any = validate_data(self, flat(X), accept_sparse="csr", dtype=FLOATS)
        y, weights = _values(A, y, sample_weight)
        fitting = self._fitting(shape, A.shape[1])
        f = MeasurementProblem.of(A.astype(np.float64, copy=False), y, fitting, weights)
        off = self.max_iter // 2 if self.switch_off else None
        with small_on_one_thread(A.size):
            found = sense(
                f, self._columns(fitting), self.symmetric, self.alpha, self.init, off,
                self.max_iter, self.tol,
            )  # fmt: skip
        return found, A.dtype

    def _shape(self, X: Any) -> tuple[int, ...]:
        """Return (p, q) as the measurements or ``shape`` have it."""
        given = () if self.shape is None else tuple(self.shape)
        if self.shape is not None and not (
            len(given) == 2 and all(isinstance(n, Integral) and n >= 1 for n in given)
        ):
            raise ValueError(f"shape must be two whole numbers >= 1, (p, q), got {self.shape!r}")
        own = matrices(X)
        if given and own and given != own:
            raise ValueError(
                f"shape must be that of the measurements, {own}, got {given}. Leave it out"
            )
        return own or given

    def _fitting(self, shape: tuple[int, ...], width: int) -> tuple[int, int]:
        """Refuse a shape that does not fit measurements of so many numbers."""
        if not shape:
            raise ValueError(
                f"shape must be (p, q) for measurements given as rows of {width} numbers, got "
                "None. Give it, or X of shape (m, p, q)"
            )
        p, q = (int(n) for n in shape)
        if width != p * q:
            raise ValueError(
                f"shape must be (p, q) with p * q = {width}, the numbers of a measurement, got "
                f"{(p, q)}"
            )
        self._check_square((p, q))
        return p, q

    def _check_square(self, shape: tuple[int, int]) -> None:
        """Refuse what cannot be symmetric."""
        if self.symmetric and shape[0] != shape[1]:
            raise ValueError(
                f"X must be square with symmetric=True, got {shape}. Use symmetric=False"
            )

    def predict(self, X: Any) -> Array:
        """Return the values <A_i, X> of measurements.

        Parameters
        ----------
        X : array, frame or sparse matrix of shape (m, p, q) or (m, p * q)
            The measurements.

        Returns
        -------
        array of shape (m,)
        """
        check_is_fitted(self)
        A: Any = flat(X)
        width = len(self.U_) * len(self.V_)
        if self.n_features_in_ == width:
            A = validate_data(self, A, reset=False, accept_sparse="csr", dtype=FLOATS)
        else:  # fitted from entries, where a row has other features
            A = check_array(A, accept_sparse="csr", dtype=FLOATS, input_name="X")
        if A.shape[1] != width:
            raise ValueError(
                f"X has {A.shape[1]} features, but MatrixSensing is expecting {width} features as "
                "input"
            )
        return A @ self.matrix().ravel()

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return R2 of the values of measurements, or of the known entries of rows.

        Parameters
        ----------
        X : array, frame or sparse matrix
            With ``y`` measurements, as for `predict`. Without it rows of shape (n_rows, q), other
            than those that were fitted: each known entry is predicted from the others of its row.
        y : array of shape (m,), default=None
            The values of the measurements.
        sample_weight : array of shape (m,), default=None
            Weights of the measurements.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            Without ``y``, after a fit to measurements, whose rows are not data.
        """
        check_is_fitted(self)
        if y is not None:
            return float(super().score(X, y, sample_weight))
        if not hasattr(self, "decay_"):
            raise ValueError("y must be given to score a fit to measurements, got None")
        M = check_array(
            X, accept_sparse="csr", dtype=FLOATS, ensure_all_finite="allow-nan", input_name="X"
        )
        if M.shape[1] != len(self.V_):
            raise ValueError(f"X must have {len(self.V_)} columns, got {M.shape[1]}")
        return self._row_score(M, np.zeros(len(self.V_)), None)

    def transform(self, X: Any) -> Array:
        """Fill the unknown entries of the matrix that was fitted.

        For rows that were not fitted, and in pipelines, there is `MatrixCompletion`.

        Parameters
        ----------
        X : array, frame or sparse matrix of shape (p, q)
            With NaN, or nothing stored, where it is not known; the rest is left as it is.

        Returns
        -------
        array of shape (p, q)
        """
        check_is_fitted(self)
        M = check_array(
            X, accept_sparse="csr", dtype=FLOATS, ensure_all_finite="allow-nan", input_name="X"
        )
        if M.shape != (len(self.U_), len(self.V_)):
            raise ValueError(
                f"X must have the shape that was fitted, {(len(self.U_), len(self.V_))}, got "
                f"{M.shape}. For other rows use MatrixCompletion"
            )
        return filled(M, self.matrix())

    def __sklearn_tags__(self) -> Any:
        """Take NaN for what is not known, without y; sparse X; measurements that are matrices."""
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = True
        tags.input_tags.three_d_array = True
        return tags


def _values(A: Any, y: Any, sample_weight: Any) -> tuple[Array, Array]:
    """Check the values and the weights of measurements."""
    y = check_array(y, dtype=np.float64, ensure_2d=False, input_name="y")
    y = column_or_1d(y, warn=True)
    if A.shape[0] != len(y):
        raise ValueError(f"y must have {A.shape[0]} values, one for each measurement, got {len(y)}")
    w = _check_sample_weight(sample_weight, A, dtype=np.float64, ensure_non_negative=True)
    if not w.sum() > 0:
        raise ValueError(
            "sample_weight must have a positive sum, got 0. Leave it out to weight all alike"
        )
    return y, w
