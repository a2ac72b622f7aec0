"""Least squares along the Hadamard flow, from ridge-like to lasso-like."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from .certificate import gap, kkt
from .columns import Columns, integrate
from .data import Data, prepare
from .transaction import all_or_nothing

__all__ = [
    "FlowRegressor",
    "MirrorFlowRegressor",
    "Run",
    "TurnOff",
    "raise_unfinished",
    "validated",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TurnOff:
    """Weight decay ``alpha`` from the start until time ``t``, then none.

    Parameters
    ----------
    alpha : float
        The decay rate, >= 0.
    t : float
        When it is switched off, in the units of the estimator's ``t``; > 0.
    """

    alpha: float
    t: float

    def __post_init__(self) -> None:
        """Refuse what is not a rate and a time."""
        if not (np.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be a number >= 0, got {self.alpha!r}")
        if not (np.isfinite(self.t) and self.t > 0):
            raise ValueError(f"t must be a number > 0, got {self.t!r}")


@dataclass(frozen=True)
class Run:
    """The flow that is to be fitted: from where, to when (perhaps infinity), how exactly."""

    log_A: float  # noqa: N815
    t: float
    decay: TurnOff | None
    tol: float


class FlowRegressor(RegressorMixin, BaseEstimator):
    """What the regressors share: the run of the flow, and prediction."""

    coef_: Array
    intercept_: Any
    n_iter_: int
    positive: bool
    zero_tol: float
    refit: bool
    max_iter: int

    def _fit(self, data: Data, run: Run, dtype: Any, single: bool) -> None:
        """Run the flow to its time, perhaps infinity, and keep its end."""
        end = np.isinf(run.t)
        coef, nu, drop = self._interpolated(data, run) if end else self._stopped(data, run)
        relative = run.log_A + drop
        A = np.exp(data.log_A(0.0) + relative)
        x, predictions = coef.T, data.X @ coef.T
        mu = data.X.T @ nu
        outputs = range(len(coef))
        kkts = [kkt(x[:, k], A[k], mu[:, k], self.positive) for k in outputs]
        gains = [predictions[:, k] @ nu[:, k] for k in outputs]
        gaps = [gap(x[:, k], gains[k], mu[:, k], self.positive) for k in outputs]
        coef = self._sparsified(coef, data)
        unit = data.unit(run.log_A, self.positive)
        dual = np.zeros((len(coef), data.samples))
        dual[:, data.rows] = nu.T
        values = {
            "coef_": coef.astype(dtype),
            "intercept_": data.intercept(coef).astype(dtype),
            "dual_coef_": dual,
            "A_": A,
            "log_A_": np.broadcast_to(relative, A.shape),
            "t_": np.full(len(A), np.inf) if end else run.t * unit,
            "support_": coef != 0,
            "kkt_residual_": np.array(kkts),
            "gap_": np.array(gaps),
        }
        for name, value in values.items():
            setattr(self, name, value[0] if single else value)

    def _stopped(self, data: Data, run: Run) -> tuple[Array, Array, float]:
        """Integrate the flow to its time; also give how far log A has fallen."""
        decay, K = run.decay or TurnOff(0.0, 1.0), data.y.shape[1]
        coef, nus = np.zeros((K, data.X.shape[1])), np.zeros((len(data.weights), K))
        active = np.flatnonzero(data.pull > 0)
        self.n_iter_ = 1
        for k in active:  # each output has its own unit of time, in which decay is given
            coef[k], nus[:, k] = self._one(data, int(k), run, decay)
        return coef, nus, -2 * decay.alpha * min(run.t, decay.t)

    def _one(self, data: Data, k: int, run: Run, decay: TurnOff) -> tuple[Array, Array]:
        """Integrate one output."""
        found: dict[str, Array] = {}
        unit = data.unit(run.log_A, self.positive)[k]

        def save(_: Any, __: Any, nu: Array, x: Array, ___: Any) -> None:
            found.update(nu=nu[:, 0], x=x[:, 0])

        columns = Columns(
            data.X,
            data.y[:, [k]],
            data.weights[:, None],
            data.log_A(run.log_A)[[k]],
            np.array([decay.alpha / unit]),
            np.array([decay.t * unit]),
            data.center,
            self.positive,
        )
        times = np.array([[run.t * unit]])
        reached, steps = integrate(columns, times, save, run.tol, int(self.max_iter))
        self.n_iter_ = max(self.n_iter_, steps)
        if not reached[0]:
            raise_unfinished(self.max_iter)
        return found["x"], found["nu"]

    def _interpolated(self, data: Data, run: Run) -> tuple[Array, Array, float]:
        """Solve for the end of the flow of each output."""
        drop = -2 * run.decay.alpha * run.decay.t if run.decay else 0.0
        scales = data.log_A(run.log_A + drop)
        root = np.sqrt(data.weights)[:, None]
        Z = root * (data.X - data.weights @ data.X) if data.center else root * data.X
        y = root * (data.y - data.weights @ data.y) if data.center else root * data.y
        found = [end_point(Z, y[:, k], scales[k], self.positive, int(self.max_iter))
                 for k in range(y.shape[1])]  # fmt: skip
        self.n_iter_ = max(1, *(int(f.stats.steps) for f in found))
        coef = np.stack([f.value.numpy() for f in found])
        nu = np.stack([f.aux["theta"].numpy() for f in found], axis=1)
        nu = root * nu
        if data.center:  # the same X^T nu without the mean of X
            nu -= data.weights[:, None] * nu.sum(axis=0)
        return coef, nu, drop

    def _sparsified(self, coef: Array, data: Data) -> Array:
        """Set small coefficients to 0, and fit the others again where that is asked for."""
        size = np.abs(coef)
        coef = np.where(size >= self.zero_tol * size.max(axis=1, keepdims=True), coef, 0.0)
        if not self.refit:
            return coef
        return np.stack([_least_squares(data, k, coef[k]) for k in range(len(coef))])

    def predict(self, X: Any) -> Array:
        """Predict the targets.

        Parameters
        ----------
        X : array, sparse matrix or frame of shape (n_samples, n_features)
            The features.

        Returns
        -------
        array of shape (n_samples,) or (n_samples, n_targets)
        """
        check_is_fitted(self, "coef_")
        X = validate_data(
            self, X, accept_sparse=("csr", "csc"), dtype=[np.float64, np.float32], reset=False
        )
        return np.asarray(X @ self.coef_.T) + self.intercept_

    def __sklearn_tags__(self) -> Any:
        """Take sparse X and several targets."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.target_tags.multi_output = True
        return tags


class MirrorFlowRegressor(FlowRegressor):
    r"""Linear regression by the flow of x = m * w, stopped early or at its end.

    .. math:: x_t = A \sinh(2 X^T \nu_t), \quad \nu_t' = \tfrac{1}{n} (y - X x_t), \quad \nu_0 = 0

    This is what gradient descent on m and w does from m = 0, w = sqrt(2 A) (Theorem 3.2). A is all
    that weight decay changes: it divides A by e^{2 alpha} in each unit of time. Large A acts like
    ridge regression, small A like the lasso.

    Parameters
    ----------
    log_A : float, default=-10
        log(A / S), S the largest coefficient of the minimum-norm least-squares solution: about 2
        or more is ridge-like, -10 sparse, and below -20 the inverse scale space of the lasso.
    t : float, default=2
        When to stop, > 0, in units of the time that the strongest coefficient, unopposed, takes to
        grow to S. Below 1 next to nothing has grown; for t to infinity the data are fitted exactly,
        noise included.
    interpolate : bool, default=False
        Go to the end of the flow (t is not used): of all solutions the one of least R_a. Under
        noise this is the worst choice. Needs a dense X.
    decay : TurnOff or None, default=None
        Weight decay on the way, from ``log_A`` at the start.
    positive : bool, default=False
        Force the coefficients to be >= 0: m = w = sqrt(A) at the start, x = A exp(2 X^T nu).
    fit_intercept : bool, default=True
        Whether to fit an intercept; it is not penalized.
    zero_tol : float, default=1e-3
        Coefficients smaller than ``zero_tol`` times the largest are set to exactly 0: the flow
        itself makes them small, never 0. With 0 they are left as they are.
    refit : bool, default=False
        Fit the coefficients that are not 0 again, by least squares.
    tol : float, default=1e-3
        The error of the coefficients in one step of the integration, relative to the largest.
    max_iter : int, default=10000
        The largest number of steps.

    Attributes
    ----------
    coef_ : array of shape (n_features,) or (n_targets, n_features)
        The coefficients.
    intercept_ : float or array of shape (n_targets,)
        The intercept.
    dual_coef_ : array of shape (n_samples,) or (n_targets, n_samples)
        nu, with x = A sinh(2 X^T nu) before small coefficients are set to 0.
    A_ : float or array of shape (n_targets,)
        The scale at the end, decay included, in the units of the coefficients.
    log_A_ : float or array
        Its logarithm, relative to S.
    t_ : float or array
        The time at which the flow was stopped, in its own units (learning rate times steps of
        gradient descent on the mean squared error / 2); infinity for ``interpolate``.
    support_ : array of bool, of the shape of ``coef_``
        Which coefficients are not 0.
    kkt_residual_ : float or array
        The largest entry of arcsinh(x / A) / 2 - X^T nu, relative to the largest of X^T nu.
    gap_ : float or array
        How far from L1 the fit is: its L1 norm exceeds the smallest one of any coefficients with
        the same predictions by at most this fraction of itself.
    n_iter_ : int
        Steps of the integration, or of Newton's method.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    See Also
    --------
    MirrorFlowRegressorCV : chooses ``log_A`` and ``t`` by cross-validation.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import MirrorFlowRegressor
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((50, 100))
    >>> y = 3 * X[:, 0] - 2 * X[:, 7]
    >>> model = MirrorFlowRegressor(log_A=-15, t=4).fit(X, y)
    >>> np.flatnonzero(model.support_)
    array([0, 7])
    >>> model.coef_[[0, 7]].round(2)
    array([ 3., -2.])
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "log_A": [Interval(Real, None, None, closed="neither")],
        "t": [Interval(Real, 0, None, closed="neither")],
        "interpolate": ["boolean"],
        "decay": [TurnOff, None],
        "positive": ["boolean"],
        "fit_intercept": ["boolean"],
        "zero_tol": [Interval(Real, 0, 1, closed="left")],
        "refit": ["boolean"],
        "tol": [Interval(Real, 0, 1, closed="neither")],
        "max_iter": [Interval(Real, 1, None, closed="left")],
    }

    def __init__(
        self,
        log_A: float = -10.0,
        t: float = 2.0,
        *,
        interpolate: bool = False,
        decay: TurnOff | None = None,
        positive: bool = False,
        fit_intercept: bool = True,
        zero_tol: float = 1e-3,
        refit: bool = False,
        tol: float = 1e-3,
        max_iter: int = 10_000,
    ) -> None:
        self.log_A = log_A
        self.t = t
        self.interpolate = interpolate
        self.decay = decay
        self.positive = positive
        self.fit_intercept = fit_intercept
        self.zero_tol = zero_tol
        self.refit = refit
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> MirrorFlowRegressor:
        """Fit the model.

        Parameters
        ----------
        X : array, sparse matrix or frame of shape (n_samples, n_features)
            The features. Sparse ones are not made dense.
        y : array of shape (n_samples,) or (n_samples, n_targets)
            The targets.
        sample_weight : array of shape (n_samples,), default=None
            Weights >= 0 of the samples.

        Returns
        -------
        self
        """
        self._validate_params()
        run = Run(self.log_A, np.inf if self.interpolate else self.t, self.decay, self.tol)
        with all_or_nothing(self):
            X, y, sample_weight = validated(self, X, y, sample_weight, sparse=not self.interpolate)
            data = prepare(X, y, sample_weight, self.fit_intercept, self.positive)
            self._fit(data, run, X.dtype, y.ndim == 1)
        return self

    def __sklearn_tags__(self) -> Any:
        """Take sparse X, except for end points."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = not self.interpolate
        return tags


def validated(
    estimator: Any, X: Any, y: Any, sample_weight: Any, sparse: bool = True
) -> tuple[Any, Any, Any]:
    """Check X, y and the weights as scikit-learn does."""
    X, y = validate_data(
        estimator,
        X,
        y,
        accept_sparse=("csr", "csc") if sparse else False,
        dtype=[np.float64, np.float32],
        y_numeric=True,
        multi_output=True,
    )
    if sample_weight is not None:
        sample_weight = _check_sample_weight(
            sample_weight, X, dtype=np.float64, ensure_non_negative=True
        )
        if not sample_weight.sum() > 0:
            raise ValueError("sample_weight must not be zero everywhere")
    return X, y, sample_weight


def end_point(Z: Array, y: Array, log_A: float, positive: bool, max_steps: int) -> Any:
    """Give the end of the flow for one output."""
    import torch

    from ..legendre import legendre
    from ..limit import limit
    from ..regularizer import WeightDecay
    from ..reparam import Hadamard
    from ..solution import Status

    d = Z.shape[1]
    size = 0.5 * (log_A if positive else log_A + np.log(2.0))
    start = torch.full((d,), float(np.exp(size)), dtype=torch.float64)
    w0 = (start if positive else torch.zeros_like(start), start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what matters is warned of below
        found = limit(legendre(Hadamard(), WeightDecay(), w0), Z, y, 0.0, max_steps)
    if found.status in (Status.stalled, Status.max_steps):
        raise_unfinished(max_steps)
    return found


def raise_unfinished(max_iter: float) -> None:
    """Warn that the steps have run out."""
    warnings.warn(
        f"the flow has not reached its end in max_iter={max_iter:g} steps; increase max_iter, or "
        "stop it earlier",
        ConvergenceWarning,
        stacklevel=5,
    )


def _least_squares(data: Data, k: int, coef: Array) -> Array:
    """Fit the coefficients that are not 0 by least squares (the shortest solution)."""
    support = np.flatnonzero(coef)
    X = data.X[:, support]
    X = X.toarray() if issparse(X) else X
    root = np.sqrt(data.weights)
    y = data.y[:, k]
    if data.center:
        X, y = X - data.weights @ X, y - data.weights @ y
    fitted = np.zeros_like(coef)
    fitted[support] = np.linalg.lstsq(root[:, None] * X, root * y, rcond=None)[0]
    return fitted
