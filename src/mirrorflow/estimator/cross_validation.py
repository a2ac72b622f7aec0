"""The regressor that chooses its scale and its stopping time by cross-validation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn import get_config
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import check_cv
from sklearn.utils._param_validation import Interval
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.parallel import Parallel, delayed

from .columns import Columns, integrate
from .data import Data, growth, prepare
from .regressor import FlowRegressor, Run, TurnOff, validated
from .transaction import all_or_nothing

__all__ = ["MirrorFlowRegressorCV", "candidates", "times"]

SHRUNK = (0.2,)  # one flow between none and all of the lasso's shrinkage
Array = NDArray[np.float64]
Fold = tuple[Array, Array]  # how often each row is in the training and in the test part


class MirrorFlowRegressorCV(FlowRegressor):
    r"""`MirrorFlowRegressor` whose scale A and stopping time are chosen by cross-validation.

    The flows of all folds and scales are integrated together, once; each gives a whole path. One
    flow more keeps its decay on to the end and shrinks like the lasso, as strong noise asks for.

    Parameters
    ----------
    log_As : array of floats, default=(2, -2, -6, -12, -20)
        Candidates for ``log_A``: from ridge-like to the inverse scale space of the lasso.
    ts : int or array of floats > 0, default=20
        Candidates for ``t``; a number stands for so many between 0.3 and 30, spaced
        geometrically.
    shrinkages : array of floats in (0, 1), default=None
        A flow more for each, from the median of ``log_As``, whose decay stays on: it tends to the
        lasso with this fraction of the smallest penalty that leaves nothing, and is stopped like
        the others. None is (0.2,), and no flow where ``decay`` is given.
    cv : int, splitter or iterable, default=None
        As everywhere in scikit-learn; None is 5-fold.
    decay : TurnOff or None, default=None
        Weight decay on the way of all flows, as for `MirrorFlowRegressor`.
    positive, fit_intercept, zero_tol, refit
        As for `MirrorFlowRegressor`.
    tol : float, default=1e-2
        As for `MirrorFlowRegressor`; the last fit uses a tenth of it.
    max_iter : int, default=10000
        The largest number of steps.
    n_jobs : int, default=None
        Processes or threads of joblib; the flows are shared out among them.

    Attributes
    ----------
    best_log_A_, best_t_ : float
        The candidates of least error.
    best_decay_ : TurnOff or None
        The decay of the chosen flow; one that stays on is written as ending at ``best_t_``.
    mse_path_ : array of shape (n_flows, n_ts, n_folds)
        The mean squared error on the fold that was left out; several targets are each divided by
        their variance.
    log_As_, shrinkages_ : arrays of shape (n_flows,)
        The flows: one for each of ``log_As``, with shrinkage 0, then those of ``shrinkages``.
    ts_ : array of shape (n_ts,)
        The times, increasing.
    coef_, intercept_, dual_coef_, A_, log_A_, t_, support_, kkt_residual_, gap_, n_iter_
        As for `MirrorFlowRegressor`, fitted to all samples.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    Notes
    -----
    Candidates are in units of S and of the time to grow to it, both measured on all samples, so
    that a candidate is the same flow in every fold.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import MirrorFlowRegressorCV
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((60, 100))
    >>> y = 3 * X[:, 0] - 2 * X[:, 7] + 0.1 * rng.standard_normal(60)
    >>> model = MirrorFlowRegressorCV().fit(X, y)
    >>> model.best_log_A_
    -20.0
    >>> bool(np.abs(model.coef_[[0, 7]] - [3, -2]).max() < 0.1)
    True
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "log_As": ["array-like"],
        "ts": ["array-like", Interval(Integral, 1, None, closed="left")],
        "shrinkages": ["array-like", None],
        "cv": ["cv_object"],
        "decay": [TurnOff, None],
        "positive": ["boolean"],
        "fit_intercept": ["boolean"],
        "zero_tol": [Interval(Real, 0, 1, closed="left")],
        "refit": ["boolean"],
        "tol": [Interval(Real, 0, 1, closed="neither")],
        "max_iter": [Interval(Real, 1, None, closed="left")],
        "n_jobs": [Integral, None],
    }

    def __init__(
        self,
        log_As: Any = (2.0, -2.0, -6.0, -12.0, -20.0),
        ts: Any = 20,
        *,
        shrinkages: Any = None,
        cv: Any = None,
        decay: TurnOff | None = None,
        positive: bool = False,
        fit_intercept: bool = True,
        zero_tol: float = 1e-3,
        refit: bool = False,
        tol: float = 1e-2,
        max_iter: int = 10_000,
        n_jobs: int | None = None,
    ) -> None:
        self.log_As = log_As
        self.ts = ts
        self.shrinkages = shrinkages
        self.cv = cv
        self.decay = decay
        self.positive = positive
        self.fit_intercept = fit_intercept
        self.zero_tol = zero_tol
        self.refit = refit
        self.tol = tol
        self.max_iter = max_iter
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any, sample_weight: Any = None, **params: Any) -> Any:
        """Choose among the candidates, then fit to all samples.

        Parameters
        ----------
        X : array, sparse matrix or frame of shape (n_samples, n_features)
            The features. Sparse ones are not made dense.
        y : array of shape (n_samples,) or (n_samples, n_targets)
            The targets; several share the choice.
        sample_weight : array of shape (n_samples,), default=None
            Weights >= 0 of the samples, in training and in the error.
        **params : dict
            For the splitter, where metadata routing is enabled (``groups``, say).

        Returns
        -------
        self
        """
        self._validate_params()
        with all_or_nothing(self):
            self.log_As_, self.shrinkages_ = self._flows()
            self.ts_ = times(self.ts)
            X, y, sample_weight = validated(self, X, y, sample_weight)
            folds = self._folds(X, y, sample_weight, params)
            data = prepare(X, y, sample_weight, self.fit_intercept, self.positive)
            self.mse_path_ = self._errors(data, folds)
            self._fit(data, self._best(), X.dtype, y.ndim == 1)
        return self

    def _flows(self) -> tuple[Array, Array]:
        """Give log A and shrinkage of each flow."""
        log_As = candidates("log_As", self.log_As)
        given = self.shrinkages
        if given is None:
            given = () if self.decay else SHRUNK
        shrunk = np.asarray(given, dtype=np.float64)
        if shrunk.ndim != 1 or not ((shrunk > 0) & (shrunk < 1)).all():
            raise ValueError(f"shrinkages must be numbers between 0 and 1, got {given!r}")
        if self.decay and shrunk.size:
            raise ValueError("decay and shrinkages both set the decay: give one of them")
        middle = np.full(len(shrunk), np.sort(log_As)[len(log_As) // 2])
        return np.r_[log_As, middle], np.r_[np.zeros(len(log_As)), shrunk]

    def _best(self) -> Run:
        """Give the flow of least error."""
        mean = self.mse_path_.mean(axis=2)
        i, j = np.unravel_index(np.argmin(mean), mean.shape)
        self.best_log_A_, self.best_t_ = float(self.log_As_[i]), float(self.ts_[j])
        self.best_decay_ = self.decay
        if self.shrinkages_[i] > 0:
            rate = float(self.shrinkages_[i]) * growth(self.best_log_A_, self.positive)
            self.best_decay_ = TurnOff(rate, self.best_t_)
        return Run(self.best_log_A_, self.best_t_, self.best_decay_, 0.1 * self.tol)

    def _folds(self, X: Any, y: Array, sample_weight: Any, params: dict[str, Any]) -> list[Fold]:
        """Count the rows of the training and the test part of each fold."""
        splitter: Any = check_cv(self.cv)
        routed: dict[str, Any] = {}
        if get_config()["enable_metadata_routing"]:
            found = process_routing(self, "fit", sample_weight=sample_weight, **params)
            routed = found["splitter"]["split"]
        elif params:
            names = ", ".join(params)
            raise ValueError(f"{names} can be given only with enable_metadata_routing=True")
        weights = np.ones(len(y)) if sample_weight is None else sample_weight
        folds = []
        for parts in splitter.split(X, y, **routed):
            train, test = (
                np.bincount(np.arange(len(y))[part], minlength=len(y)) * weights for part in parts
            )
            if train.sum() > 0 and test.sum() > 0:
                folds.append((train, test))
        if not folds:
            raise ValueError("cv gives no fold with samples on both sides")
        return folds

    def _errors(self, data: Data, folds: list[Fold]) -> Array:
        """Give the errors (n_flows, n_ts, n_folds), the work shared out by flows."""
        shared = [(train[data.rows], test[data.rows]) for train, test in folds]
        job = _Job(data, shared, self.ts_, self.decay, self.positive, self.tol, int(self.max_iter))
        if self.n_jobs in (None, 1):
            return job.run(self.log_As_, self.shrinkages_)
        run, flows = delayed(job.run), zip(self.log_As_, self.shrinkages_, strict=True)
        parts: Any = Parallel(n_jobs=self.n_jobs)(
            run(np.array([z]), np.array([s])) for z, s in flows
        )
        return np.concatenate(list(parts))

    def get_metadata_routing(self) -> MetadataRouter:
        """Give the routing: ``fit`` hands metadata to the splitter.

        Returns
        -------
        MetadataRouter
        """
        mapping = MethodMapping().add(caller="fit", callee="split")
        router = MetadataRouter(owner=self).add_self_request(self)
        return router.add(splitter=check_cv(self.cv), method_mapping=mapping)


@dataclass(frozen=True)
class _Job:
    """The flows of all folds and all targets."""

    data: Data
    folds: list[Fold]
    ts: Array
    decay: TurnOff | None
    positive: bool
    tol: float
    max_iter: int

    def run(self, log_As: Array, shrinkages: Array) -> Array:
        """Give the errors (len(log_As), n_ts, n_folds), the mean over the targets."""
        targets = range(self.data.y.shape[1])
        return np.mean([self._target(k, log_As, shrinkages) for k in targets], axis=0)

    def _target(self, k: int, log_As: Array, shrinkages: Array) -> Array:
        """Give the errors of one target, relative to its variance where there are several."""
        y, count = self.data.y[:, k], len(log_As)
        train, test = (np.stack([f[i] / f[i].sum() for f in self.folds], axis=1) for i in (0, 1))
        predictions, late = self._predictions(k, log_As, shrinkages, train)
        if self.data.center:  # the intercept of each training part
            of = np.tile(train, (1, count)).T[:, None, :]
            predictions += (of * (y - predictions)).sum(axis=2, keepdims=True)
        of = np.tile(test, (1, count)).T[:, None, :]
        errors = np.where(late, np.inf, (of * (predictions - y) ** 2).sum(axis=2))
        errors = errors.reshape(count, len(self.folds), -1).transpose(0, 2, 1)
        variance = float(self.data.weights @ (y - self.data.weights @ y) ** 2)
        return errors / variance if self.data.y.shape[1] > 1 and variance > 0 else errors

    def _predictions(
        self, k: int, log_As: Array, shrinkages: Array, train: Array
    ) -> tuple[Array, NDArray[Any]]:
        """Give X x (flows and folds, times, samples), and which of them steps did not reach."""
        y, folds = self.data.y[:, k], train.shape[1]
        found = np.zeros((len(log_As) * folds, len(self.ts), len(y)))
        if not self.data.pull[k] > 0:  # a constant target
            return found, np.zeros(found.shape[:2], dtype=bool)

        def save(column: Any, index: Any, _: Array, x: Array, __: Array) -> None:
            found[column, index] = (self.data.X @ x).T

        units = np.array([self.data.unit(z, self.positive)[k] for z in log_As])
        decay = self.decay or TurnOff(0.0, 1.0)
        stays = shrinkages > 0
        rates = np.where(stays, shrinkages * self.data.pull[k], decay.alpha / units)
        offs = np.where(stays, np.inf, decay.t * units)
        columns = Columns(
            self.data.X,
            np.tile(y[:, None], (1, len(found))),
            np.tile(train, (1, len(log_As))),
            np.repeat([self.data.log_A(z)[k] for z in log_As], folds),
            np.repeat(rates, folds),
            np.repeat(offs, folds),
            self.data.center,
            self.positive,
        )
        times = np.repeat(units[:, None] * self.ts, folds, axis=0)
        reached, _ = integrate(columns, times, save, self.tol, self.max_iter)
        late = np.arange(len(self.ts)) >= reached[:, None]
        _warn_unfinished(late, self.max_iter)
        return found, late


def _warn_unfinished(late: NDArray[Any], max_iter: int) -> None:
    """Warn that candidates are left out because the steps did not reach them."""
    if late.any():
        warnings.warn(
            f"{late.sum()} of {late.size} flows have not reached their time in max_iter={max_iter} "
            "steps and are left out; increase max_iter, or give smaller ts",
            ConvergenceWarning,
            stacklevel=6,
        )


def candidates(name: str, values: Any) -> Array:
    """Give a non-empty vector of finite numbers."""
    found = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if found.ndim != 1 or found.size == 0 or not np.isfinite(found).all():
        raise ValueError(f"{name} must be a non-empty 1-d sequence of numbers, got {values!r}")
    return found


def times(values: Any) -> Array:
    """Give the candidates for t, increasing."""
    if isinstance(values, Integral):
        return np.geomspace(0.3, 30, int(values))
    found = np.sort(candidates("ts", values))
    if not found[0] > 0:
        raise ValueError(f"ts must be > 0, got {values!r}")
    return found
