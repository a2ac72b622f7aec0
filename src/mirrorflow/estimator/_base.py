"""Base class of the regressors: one flow to its time or to its end, zeros, and prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from ..schedule import Constant, SwitchOff
from ._chebyshev import integrate
from ._data import Data, gram
from ._endpoints import endpoints, gap, kkt, residual_slope, warn_unfinished
from ._flows import Flows, GramFlows, RowFlows, tall
from ._net import mixes, net_dual, net_path, net_primal
from ._ridge import ridge_dual, ridge_path
from ._row_space import row_space

__all__ = [
    "DECAY",
    "LOG_A",
    "SHARED",
    "Decay",
    "FlowPoint",
    "FlowRegressor",
    "TurnOff",
    "check_decay",
    "choose_zeros",
    "finish",
    "least_squares",
    "nearly_best",
    "rate_and_end",
    "validated",
    "weights_of",
    "without_small",
]

Array = NDArray[np.float64]
NET_TOL = 1e-10  # of the duality gap of an elastic net, relative to |y|^2
LOG_A = (-10_000, 20)  # of log A; larger ones would be differences of large numbers


class TurnOff(SwitchOff):
    """`SwitchOff` by its former name: weight decay ``alpha`` until time ``t``, then none.

    Parameters
    ----------
    alpha : float
        The decay rate, >= 0: `SwitchOff`'s ``rate``.
    t : float
        When it is switched off, in the units of the estimator's ``t``; > 0: `SwitchOff`'s ``at``.
        Infinity keeps it, as `Constant` does.
    """

    def __init__(self, alpha: float, t: float) -> None:
        for name, value in (("alpha", alpha), ("t", t)):
            if not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 <= alpha < np.inf:
            raise ValueError(f"alpha must be a number >= 0, got {alpha!r}")
        if not t > 0:
            raise ValueError(f"t must be a number > 0, got {t!r}")
        object.__setattr__(self, "level", float(alpha))
        object.__setattr__(self, "at", float(t))

    def __eq__(self, other: object) -> bool:
        """Compare with a `SwitchOff` of any name."""
        if not isinstance(other, SwitchOff):
            return NotImplemented
        return (self.level, self.at) == (other.level, other.at)

    def __hash__(self) -> int:
        """Return the hash of the `SwitchOff` that it equals."""
        return hash((self.level, self.at))

    @property
    def alpha(self) -> float:
        """The decay rate."""
        return self.level

    @property
    def t(self) -> float:
        """When it is switched off."""
        return self.at

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The time of the switch, if there is one."""
        return (self.at,) if np.isfinite(self.at) else ()


DECAY: list[Any] = [SwitchOff, Constant, None]  # what ``decay`` may be
SHARED: dict[str, Any] = {
    "decay": DECAY,
    **{key: ["boolean"] for key in ("positive", "fit_intercept", "standardize", "refit")},
    "tol": [Interval(Real, 0, 1, closed="neither")],
    "max_iter": [Interval(Real, 1, None, closed="left")],
}
Decay = SwitchOff | Constant | None


def rate_and_end(decay: Decay) -> tuple[float, float]:
    """Return the rate of decay, and when it ends: at infinity where it is kept."""
    if decay is None:
        return 0.0, 1.0
    return decay.level, decay.at if isinstance(decay, SwitchOff) else np.inf


def check_decay(decay: Decay, last: float) -> None:
    """Refuse decay that would end after the training, whose last time is ``last``, or is < 0."""
    if decay is None:
        return
    rate, end = rate_and_end(decay)
    if rate < 0:
        raise ValueError(f"decay must have a rate >= 0, got {decay}")
    if np.isinf(end) and np.isinf(last):
        raise ValueError(
            f"decay must be switched off with interpolate=True, got {decay}. Use SwitchOff(rate, t)"
        )
    if last < end < np.inf:
        raise ValueError(
            f"decay must be switched off by t={last:g}, where training ends, got {decay}. "
            f"Constant({rate:g}) keeps it on"
        )


@dataclass(frozen=True)
class FlowPoint:
    """A point of a flow, to be fitted: its scale, its time (perhaps infinity), its accuracy."""

    log_A: float  # noqa: N815 - the parameter's public name, with the paper's A
    t: float
    decay: Decay
    tol: float
    zero_tol: float  # what is smaller, relative to the largest, is 0
    refit: bool  # whether the others are fitted again
    ts: Array | None = None  # times up to t at which the path is kept


class FlowRegressor(RegressorMixin, BaseEstimator):
    """A regressor by the flow: the run of the flow, and prediction."""

    coef_: Array
    coef_path_: Array
    support_: NDArray[np.bool_]
    intercept_: Any
    n_iter_: int
    positive: bool
    refit: bool
    max_iter: int

    @property
    def penalty(self) -> str:
        """The kind of sparsity, by which `sklearn.feature_selection.SelectFromModel` goes.

        Where it is "l1", the default threshold keeps all coefficients of at least 1e-5.
        """
        return "l1"

    def _fit(self, data: Data, run: FlowPoint, dtype: Any, single: bool) -> None:
        """Run the flow to its time, perhaps infinity, and keep its end."""
        end, path = np.isinf(run.t), None
        if end:
            coef, nu, drop = self._interpolated(data, run)  # Theorem 3.6: argmin {R_a(x) : Zx = y}
        else:
            coef, nu, drop, path = self._stopped(data, run)
        log_A = data.log_A(0.0) + run.log_A + drop
        certificates = self._certificates(data, coef, nu, log_A, end)
        coef = finish(coef, data, run.zero_tol, run.refit)
        self._keep(data, run, coef, drop, data.dual(nu), certificates, dtype, single)
        if path is not None and run.ts is not None:
            path = (path / data.units[:, None]).astype(dtype)
            self.coef_path_ = path[0] if single else path

    def _keep(
        self, data: Data, run: FlowPoint, coef: Array, drop: float, dual: Array,
        certificates: tuple[Array, Array], dtype: Any, single: bool,
    ) -> None:  # fmt: skip
        """Keep the end of the flow, with small coefficients set to 0."""
        relative = run.log_A + drop
        log_A = data.log_A(0.0) + relative
        unit, end = data.unit(run.log_A, self.positive), np.isinf(run.t)
        values = {
            "coef_": (coef / data.units).astype(dtype),
            "intercept_": data.intercept(coef).astype(dtype),
            "dual_coef_": dual,
            "A_": np.exp(log_A),
            "log_A_": np.broadcast_to(relative, log_A.shape),
            "t_": np.full(len(log_A), np.inf) if end else run.t * unit,
            "support_": coef != 0,
            "kkt_residual_": certificates[0],
            "gap_": certificates[1],
        }
        self._set(values, single)

    def _fit_ridge(self, data: Data, penalties: Array, dtype: Any, single: bool) -> None:
        """Fit ridge regression with the last of the penalties; all of them are its path."""
        path = ridge_path(data, data.weights, penalties)
        path[..., data.spreads == 0] = 0.0  # a constant column gets rounding, not exactly 0
        nu = ridge_dual(data, path[:, -1], float(penalties[-1]))
        # Large A: R_a is |x|^2 / 2 up to a factor, whose mirror map is x itself.
        self._keep_linear(data, path, nu, lambda mu: mu, dtype, single)

    def _fit_net(
        self, data: Data, ratio: float, penalties: Array, dtype: Any, single: bool
    ) -> None:
        """Fit an elastic net with the last of the penalties; all of them are its path."""
        path = net_path(data, data.weights, ratio, penalties, self.positive, NET_TOL)
        ratios = mixes(data, ratio)
        nu = net_dual(data, path[:, -1], ratios, float(penalties[-1]))
        image = partial(net_primal, ratios=ratios, positive=self.positive)
        self._keep_linear(data, path, nu, image, dtype, single)

    def _keep_linear(
        self, data: Data, path: Array, nu: Array, image: Callable[[Array], Array], dtype: Any,
        single: bool,
    ) -> None:  # fmt: skip
        """Keep the end of a path (K, m, d) whose x is ``image`` of mu = X^T nu."""
        coef, endless = path[:, -1], np.full(len(path), np.inf)
        mu, predictions, self.n_iter_ = (data.X.T @ nu).T, data.X @ coef.T, 1
        size = np.maximum(np.abs(coef).max(axis=1, initial=0.0), 1e-300)
        values = {
            "coef_": (coef / data.units).astype(dtype),
            "intercept_": data.intercept(coef).astype(dtype),
            "dual_coef_": data.dual(nu),
            "A_": endless, "log_A_": endless, "t_": endless,
            "support_": coef != 0,
            "kkt_residual_": np.abs(image(mu) - coef).max(axis=1, initial=0.0) / size,
            "gap_": np.array([
                gap(x, predictions[:, k] @ nu[:, k], mu[k], self.positive)
                for k, x in enumerate(coef)
            ]),
            "coef_path_": (path.swapaxes(1, 2) / data.units[:, None]).astype(dtype),
        }  # fmt: skip
        self._set(values, single)

    def _set(self, values: dict[str, Array], single: bool) -> None:
        """Keep the results; those of a single target are not in a row of their own."""
        for name, value in values.items():
            setattr(self, name, value[0] if single else value)

    def _certificates(
        self, data: Data, coef: Array, nu: Array, log_A: Array, end: bool
    ) -> tuple[Array, Array]:
        """Return the KKT residuals and the gaps (K,), on the rows as they were given."""
        predictions, mu = data.X @ coef.T, data.X.T @ nu  # the sums of nu are 0: no means
        if data.center:
            predictions = predictions - data.weights @ predictions
        missed = data.weights[:, None] * (data.y - predictions)
        kkts, gaps = np.zeros(len(coef)), np.zeros(len(coef))
        for k in np.flatnonzero(data.pull > 0):
            x, positive = coef[k], self.positive
            kkts[k] = kkt(x, log_A[k], mu[:, k], positive)
            if end:
                slope = residual_slope(x, data.X.T @ missed[:, k], positive)
                kkts[k] = max(kkts[k], slope / data.pull[k])
            gaps[k] = gap(x, predictions[:, k] @ nu[:, k], mu[:, k], positive)
        return kkts, gaps

    def _stopped(self, data: Data, run: FlowPoint) -> tuple[Array, Array, float, Array]:
        """Integrate the flow to its time; also give how far log A has fallen, and the path."""
        (rate, end), K = rate_and_end(run.decay), data.y.shape[1]
        ts = np.array([run.t]) if run.ts is None else run.ts
        path, nus = np.zeros((K, data.X.shape[1], len(ts))), np.zeros((len(data.weights), K))
        self.n_iter_ = 1
        for k in np.flatnonzero(data.pull > 0).tolist():  # decay is in each output's unit of time
            path[k], nus[:, k] = self._one(data, k, run, rate, end, ts)
        return path[:, :, -1], nus, -2 * rate * min(run.t, end), path  # log A_t = log A + 2 a_t

    def _one(
        self, data: Data, k: int, run: FlowPoint, rate: float, end: float, ts: Array
    ) -> tuple[Array, Array]:
        """Integrate one output through the times; return its path (d, m) and nu at the last."""
        last: dict[str, Any] = {}
        unit, path = (
            float(data.unit(run.log_A, self.positive)[k]),
            np.zeros((data.X.shape[1], len(ts))),
        )

        def save(_: int, index: int, state: Array, x: Array, t: float) -> None:
            path[:, index:] = x[:, None]
            last.update(state=state, t=t)

        # t in units of the time to grow: rates are divided by the unit, ends times it.
        flows = whole_flow(data, k, run.log_A, rate / unit, end * unit, self.positive)
        reached, steps = integrate(flows, unit * ts[None], save, run.tol, int(self.max_iter))
        self.n_iter_ = max(self.n_iter_, steps)
        if reached[0] < len(ts):
            warn_unfinished(self.max_iter)
        nu = last["state"]
        if isinstance(flows, GramFlows):
            nu = data.weights * (last["t"] * data.y[:, k] - data.X @ nu)  # nu = int w (y - Xx) dt
        return path, nu

    def _interpolated(self, data: Data, run: FlowPoint) -> tuple[Array, Array, float]:
        """Solve for the end of the flow of each output."""
        rate, end = rate_and_end(run.decay)
        drop = -2 * rate * end
        scales, root = data.log_A(run.log_A + drop), np.sqrt(data.weights)[:, None]
        space, y = row_space(root * data.X, data.rounding), root * data.y
        coef, nu = np.zeros((y.shape[1], data.X.shape[1])), np.zeros_like(y)
        self.n_iter_ = 1
        for k in np.flatnonzero(data.pull > 0).tolist():  # without a pull all coefficients stay 0
            found = endpoints(space, y[:, k], scales[[k]], self.positive, int(self.max_iter))
            coef[k], nu[:, k] = found.x[0], root[:, 0] * found.theta[0]  # Z^T theta = X^T nu
            self.n_iter_ = max(self.n_iter_, found.steps)
        if data.center:  # the same X^T nu without the mean of X
            nu -= data.weights[:, None] * nu.sum(axis=0)
        return coef, nu, drop

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


def whole_flow(data: Data, k: int, log_A: float, rate: float, off: float, positive: bool) -> Flows:
    """Return the flow of target k on all samples; ``rate`` and ``off`` are in its units of time."""
    start, rates, ends = data.log_A(log_A)[[k]], np.array([rate]), np.array([off])
    y, weights = data.y[:, k], data.weights[None]
    if issparse(data.X) or not tall(*data.X.shape):
        return RowFlows(
            start, rates, ends, positive, data.X, y[None], weights, data.center
        )  # a dense X is centred, but its rounding is not
    G, b = gram(data.X, data.weights), (data.weights * y) @ data.X
    return GramFlows(start, rates, ends, positive, G[None], b[None])


def validated(estimator: Any, X: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """Check X, y and the weights as scikit-learn does."""
    X, y = validate_data(
        estimator,
        X,
        y,
        accept_sparse=("csr", "csc"),
        dtype=[np.float64, np.float32],
        y_numeric=True,
        multi_output=True,
    )
    return X, y, weights_of(X, sample_weight)


def weights_of(X: Any, sample_weight: Any) -> Any:
    """Check the weights of samples."""
    if sample_weight is not None:
        sample_weight = _check_sample_weight(
            sample_weight, X, dtype=np.float64, ensure_non_negative=True
        )
        if not sample_weight.sum() > 0:  # older scikit-learn lets them pass
            raise ValueError("sample weights must have a positive sum, got 0. Leave them out")
    return sample_weight


# Which coefficients are 0: the flow itself makes them small, never 0.

# Standard errors by which a candidate may be worse than the best and still count as near it.
MARGIN = 0.5


def without_small(coef: Array, zero_tol: float | Array) -> Array:
    """Set to 0 what is smaller than ``zero_tol`` times the largest of its row (K, d)."""
    size = np.abs(coef)
    largest = np.maximum(size.max(axis=-1, keepdims=True, initial=0.0), 1e-300)
    return np.where(size >= zero_tol * largest, coef, 0.0)


def finish(coef: Array, data: Data, zero_tol: float, refit: bool) -> Array:
    """Set small coefficients (K, d) to 0, and fit the others again where that is asked for."""
    coef = without_small(coef, zero_tol)
    if not refit:
        return coef
    return np.stack([least_squares(data, k, row != 0, data.weights) for k, row in enumerate(coef)])


def least_squares(data: Data, k: int, support: NDArray[np.bool_], weights: Array) -> Array:
    """Fit target k by the coefficients of the support (the shortest solution)."""
    X = data.X[:, np.flatnonzero(support)]
    X = X.toarray() if issparse(X) else X
    y, root = data.y[:, k], np.sqrt(weights)
    if data.center:
        X, y = X - weights @ X, y - weights @ y
    fitted = np.zeros(len(support))
    if support.any():
        space = row_space(root[:, None] * X, data.rounding[support])
        fitted[support] = space.shortest(root * y)
    return fitted


def nearly_best(errors: Array) -> NDArray[np.bool_]:
    """Return which candidates, with errors (n_candidates, n_folds), are near the one of least.

    Near is within MARGIN standard errors of the difference: both are of the same folds.
    """
    worse = errors - errors[errors.mean(axis=1).argmin()]
    doubt = worse.std(axis=1) / np.sqrt(errors.shape[1])
    return worse.mean(axis=1) <= MARGIN * doubt


@dataclass(frozen=True)
class Zeros:
    """Which coefficients of a flow are set to 0, and whether the others are fitted again.

    ``zero_tol`` is infinite where the intercept alone is left.
    """

    zero_tol: float
    refit: bool


def choose_zeros(zero_tols: Array, flow: Array, refitted: Array | None, alone: Array) -> Zeros:
    """Choose the largest threshold that predicts nearly as well as the best candidate.

    The candidates are the flow with each threshold, errors (n_tols, n_folds), the same refitted
    where that is asked for, and the intercept ``alone`` (n_folds,). Of two with the same threshold
    it is the one of less error.
    """
    blocks = [flow] if refitted is None else [flow, refitted]
    errors = np.concatenate([*blocks, alone[None]])
    tols = np.r_[np.tile(zero_tols, len(blocks)), np.inf]
    again = np.r_[np.repeat(np.arange(len(blocks)) == 1, len(zero_tols)), False]
    near = nearly_best(errors)
    largest = np.flatnonzero(near & (tols == tols[near].max()))
    best = largest[errors[largest].mean(axis=1).argmin()]
    return Zeros(float(tols[best]), bool(again[best]))
