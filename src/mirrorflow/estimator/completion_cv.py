"""Completion of rows whose decay and offsets are chosen by hiding entries."""

from __future__ import annotations

from copy import copy
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.model_selection import KFold
from sklearn.utils._param_validation import Interval
from sklearn.utils.parallel import Parallel, delayed

from ._alternating import entries, path
from ._folds import one_thread
from .completion import MatrixCompletion, RowCompletion, observed

__all__ = ["MatrixCompletionCV"]

Array = NDArray[np.float64]
ALPHAS = (0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)
ROUGHER, ROUGHEST = 100.0, 1e-2  # tolerance with entries hidden: times that of the fit, and at most
WORSE = 1.1  # times the least error of a fold, above which its path is left


class MatrixCompletionCV(RowCompletion):
    r"""`MatrixCompletion` whose decay and offsets are chosen by cross-validation over entries.

    The known entries are split into folds at random; each fold is hidden in turn and predicted,

    .. math:: \hat Y_{ij} = (U V^T)_{ij} + a_i + b_j,

    for all ``alphas`` along one path, with and without offsets, from strong decay to weak. A fold
    leaves its path where its error is 1.1 times its least one. The candidate of least mean squared
    error is fitted to all entries. The decay is kept: for a matrix that is nearly of low rank fit
    `MatrixCompletion` with ``switch_off=True``, which this search does not try.

    Parameters
    ----------
    alphas : array of floats > 0, default=None
        Candidates for `MatrixCompletion`'s ``alpha``. None is ten between 0.7 and 0.05.
    offset_penalties : tuple of floats >= 0 and None, default=(None, 0.0, 5.0)
        Candidates for its ``offset_penalty``; None stands for a model without offsets.
    max_rank : int or None, default=None
        As for `MatrixCompletion`.
    cv : int, default=5
        The number of folds, >= 2.
    random_state : int, RandomState or None, default=0
        How the entries are split.
    max_iter : int, default=2000
        As for `MatrixCompletion`.
    tol : float, default=1e-4
        As for `MatrixCompletion`, for the last fit. With entries hidden it is 100 times that, but
        not above 0.01: their errors hardly depend on it.
    n_jobs : int, default=None
        Processes or threads of joblib; folds and offsets are shared out among them. The result is
        the same for every number.

    Attributes
    ----------
    best_alpha_ : float
        The decay that was taken.
    best_offset_penalty_ : float or None
        The penalty on the offsets that was taken; None if there are none.
    mse_path_ : array of shape (n_offset_penalties, n_alphas, n_folds)
        The mean squared errors of the hidden entries; infinity behind the end of a fold's path.
    alphas_ : array of shape (n_alphas,)
        The candidates, falling.
    U_, V_, singular_values_, rank_, row_offset_, column_offset_, offset_penalty_, decay_, n_iter_
        As for `MatrixCompletion`, fitted to all entries.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    See Also
    --------
    MatrixCompletion : with settings that are given.

    Notes
    -----
    ``alpha`` is relative to the largest singular value of what is known, so that a candidate means
    the same with entries hidden as without.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import MatrixCompletionCV
    >>> rng = np.random.default_rng(0)
    >>> X = 3 + rng.standard_normal((40, 1)) + rng.standard_normal(30)
    >>> noisy = X + 0.3 * rng.standard_normal(X.shape)
    >>> model = MatrixCompletionCV(offset_penalties=(None, 0.0), cv=2)
    >>> model = model.fit(np.where(rng.random(X.shape) < 0.5, noisy, np.nan))
    >>> model.best_offset_penalty_ is not None, bool(np.abs(model.matrix() - X).std() < 0.2)
    (True, True)
    """

    alphas_: Array
    mse_path_: Array
    best_alpha_: float
    best_offset_penalty_: float | None

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "alphas": ["array-like", None],
        "offset_penalties": [tuple, list],
        "max_rank": [Interval(Integral, 1, None, closed="left"), None],
        "cv": [Interval(Integral, 2, None, closed="left")],
        "random_state": ["random_state"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, 1, closed="neither")],
        "n_jobs": [Integral, None],
    }

    def __init__(
        self,
        alphas: Any = None,
        offset_penalties: Any = (None, 0.0, 5.0),
        *,
        max_rank: int | None = None,
        cv: int = 5,
        random_state: Any = 0,
        max_iter: int = 2000,
        tol: float = 1e-4,
        n_jobs: int | None = None,
    ) -> None:
        self.alphas = alphas
        self.offset_penalties = offset_penalties
        self.max_rank = max_rank
        self.cv = cv
        self.random_state = random_state
        self.max_iter = max_iter
        self.tol = tol
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None) -> MatrixCompletionCV:
        """Choose the decay and the offsets, and learn the factors.

        Parameters
        ----------
        X : array, frame or sparse matrix of shape (n_samples, n_features)
            As for `MatrixCompletion`.
        y : ignored

        Returns
        -------
        self
        """
        self._validate_params()
        penalties, fitted = _penalties(self.offset_penalties), copy(self)
        fitted.alphas_ = _alphas(self.alphas)
        M = fitted._checked(X, reset=True)
        with one_thread():
            fitted.mse_path_ = fitted._errors(M, penalties)
            mean = fitted.mse_path_.mean(axis=2)
            i, j = np.unravel_index(mean.argmin(), mean.shape)
            fitted.best_alpha_ = float(fitted.alphas_[j])
            fitted.best_offset_penalty_ = penalties[i]
            model = fitted._model(penalties[i], fitted.best_alpha_).fit(X)
        found = {k: v for k, v in vars(model).items() if k.endswith("_")}
        self.__dict__ = vars(fitted) | found
        return self

    def _model(self, penalty: float | None, alpha: float) -> MatrixCompletion:
        """Return the estimator with some settings."""
        return MatrixCompletion(
            self.max_rank, alpha, center=penalty is not None, offset_penalty=penalty or 0.0,
            max_iter=self.max_iter, tol=self.tol,
        )  # fmt: skip

    def _errors(self, M: Any, penalties: list[float | None]) -> Array:
        """Return the errors (n_penalties, n_alphas, n_folds) of entries that are hidden in turn."""
        known, columns = entries(M), self._columns(M.shape)
        if len(known[2]) < self.cv:
            raise ValueError(
                f"X must have at least cv={self.cv} known entries, got {len(known[2])}. Give a "
                "smaller cv"
            )
        folds = KFold(self.cv, shuffle=True, random_state=self.random_state)
        parts = list(folds.split(known[2]))
        run, tol = delayed(hidden_errors), max(self.tol, min(ROUGHER * self.tol, ROUGHEST))
        found: Any = Parallel(n_jobs=self.n_jobs)(
            run(known, part, M.shape, p, self.alphas_, columns, self.max_iter, tol)
            for p in penalties
            for part in parts
        )
        return np.reshape(list(found), (len(penalties), self.cv, -1)).transpose(0, 2, 1)


def hidden_errors(
    known: tuple[Any, Any, Array],
    part: tuple[Any, Any],
    shape: tuple[int, int],
    penalty: float | None,
    alphas: Array,
    columns: int,
    steps: int,
    tol: float,
) -> Array:
    """Return the mean squared errors (n_alphas,) of the entries ``part[1]``, fitted to the others.

    ``known`` are rows, columns and values of all entries.
    """
    (i, j, values), (train, test) = known, part
    with one_thread():
        problem = observed(csr_array((values[train], (i[train], j[train])), shape=shape), penalty)
        empty = np.zeros((shape[0], 0)), np.zeros((shape[1], 0))
        top = float(problem.strongest(*empty, 1)[0].max()) or 1.0
        scaled: Any = problem.times(1 / top)  # alphas are in units of top
        i, j, errors = i[test], j[test], np.full(len(alphas), np.inf)
        stages = [(float(alpha), tol) for alpha in alphas]
        for k, found in enumerate(path(scaled, columns, stages, steps)):
            fitted = np.einsum("ij,ij->i", found.U[i], found.V[j])
            if penalty is not None:
                fitted += scaled.offsets.a[i] + scaled.offsets.b[j]
            errors[k] = ((values[test] - top * fitted) ** 2).mean()
            if errors[k] > WORSE * errors.min():  # weaker decay overfits more from here on
                break
    return errors


def _alphas(values: Any) -> Array:
    """Return the candidates for alpha, falling: each is fitted from the one before."""
    found = np.asarray(ALPHAS if values is None else values, dtype=np.float64)
    if found.ndim != 1 or not found.size or not (np.isfinite(found).all() and found.min() > 0):
        raise ValueError(f"alphas must be a non-empty sequence of numbers > 0, got {values!r}")
    return np.sort(found)[::-1]


def _penalties(values: Any) -> list[float | None]:
    """Return the candidates for the penalty on offsets."""
    found: list[Any] = list(values)
    if not found or not all(
        v is None or (isinstance(v, Real) and 0 <= float(v) < np.inf) for v in found
    ):
        raise ValueError(
            "offset_penalties must be a non-empty sequence of None and numbers >= 0, got "
            f"{values!r}"
        )
    return [None if v is None else float(v) for v in found]
