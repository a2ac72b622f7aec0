"""What the regressors share: the run of one flow to its time or to its end, and prediction."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from .certificate import gap, kkt
from .columns import Columns, integrate
from .data import Data
from .zeros import finish

__all__ = ["FlowRegressor", "Run", "TurnOff", "raise_unfinished", "validated"]

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
    zero_tol: float  # what is smaller, relative to the largest, is 0


class FlowRegressor(RegressorMixin, BaseEstimator):
    """What the regressors share: the run of the flow, and prediction."""

    coef_: Array
    intercept_: Any
    n_iter_: int
    positive: bool
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
        coef = finish(coef, data, run.zero_tol, self.refit)
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
