"""The regressor that chooses its scale and its stopping time by cross-validation."""

from __future__ import annotations

from copy import copy
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn import get_config
from sklearn.model_selection import check_cv
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing

from .._threads import one_thread
from ..schedule import SwitchOff
from ._base import (
    SHARED,
    Decay,
    FlowPoint,
    FlowRegressor,
    Zeros,
    check_decay,
    choose_zeros,
    validated,
)
from ._candidates import (
    CRITERIA,
    NETS,
    Linear,
    flows,
    informed,
    penalties,
    ratios,
    thresholds,
    times,
    warn_at_the_last_time,
    without_flow,
)
from ._data import Data, growth, prepare, warn_of_scales
from ._folds import Folds, fold_weights

__all__ = ["MirrorFlowRegressorCV"]

Array = NDArray[np.float64]


class MirrorFlowRegressorCV(FlowRegressor):
    r"""`MirrorFlowRegressor` whose scale A and stopping time are chosen by cross-validation.

    The flows of all folds and scales are integrated together, once; each gives a whole path.
    Ridge regression, where large scales end, and elastic nets, where decay that is kept ends with
    a share of ridge regression, need no flow: ridge regression is taken where it predicts better,
    an elastic net where no flow is clearly better.

    Parameters
    ----------
    log_As : array of floats, default=(-2, -20)
        Candidates for ``log_A``, down to the inverse scale space of the lasso.
    ts : int or array of floats > 0, default=20
        Candidates for ``t``; a number stands for so many between 0.3 and 30, spaced
        geometrically.
    shrinkages : array of floats in (0, 1), default=()
        A flow more for each, from the largest of ``log_As``, whose decay stays on: it tends to the
        lasso with this fraction of the smallest penalty that leaves nothing, and is stopped like
        the others. It must be () with ``decay``.
    ridges : array of floats > 0, default=None
        Penalties of ridge regression, in units of the sum of the variances of the columns. None is
        33 from 10 to 1e-7; none with ``positive``, ``decay``, an information criterion, or a sparse
        X of more than 2000 rows and columns.
    l1_ratios : array of floats in (0, 1), default=None
        Elastic nets with these shares of the L1 norm, for X and y of unit scale, each with 17
        penalties down to a hundredth of the smallest that leaves nothing. None is (0.02, 0.2); none
        with ``decay`` or an information criterion.
    cv : int, splitter or iterable, default=None
        As everywhere in scikit-learn; None is 5-fold.
    decay : SwitchOff, Constant or None, default=None
        Weight decay on the way of all flows, as for `MirrorFlowRegressor`; not beyond the last of
        ``ts``, or for ever.
    zero_tols : array of floats in [0, 1), default=None
        Candidates for ``zero_tol``, the size below which coefficients of the chosen flow are set to
        0, relative to the largest. The largest is taken whose error on the samples left out
        exceeds the least error of all candidates by at most half a standard error of the
        difference. The intercept alone is a candidate, so that no coefficient may be left. None is
        25 between 1e-3 and 0.7.
    positive, fit_intercept, standardize
        As for `MirrorFlowRegressor`; the standard deviations are those of all samples.
    refit : bool, default=False
        Whether the coefficients that are not 0, fitted again by least squares, are candidates as
        well; they are taken only where they predict at least as well.
    criterion : {"cv", "bic", "ebic"}, default="cv"
        What chooses: the error on samples left out, or, for one target and n samples, the least
        n log(mean squared error) + k log(n) of any flow, time and threshold with k coefficients,
        k <= n / 2; "ebic" adds 2 log(d over k), for more columns than samples. Then ``cv`` and
        ``n_jobs`` are not used, and the errors below are those of one fold, all samples.
    tol : float, default=1e-2
        As for `MirrorFlowRegressor`; the last fit uses a tenth of it.
    max_iter : int, default=10000
        The largest number of steps.
    n_jobs : int, default=None
        Processes or threads of joblib; the flows are shared out among them.

    Attributes
    ----------
    best_kind_ : {"flow", "kept decay", "ridge", "elastic net", "intercept"}
        What was chosen; an intercept alone is what the largest of ``zero_tols`` leaves.
    best_log_A_, best_t_ : float
        The candidates of least error; infinity both for ridge regression and elastic nets.
    best_index_ : tuple of int
        The place of the flow of least error in ``mse_path_``: its flow, and its time.
    best_ridge_ : float or None
        The penalty of ridge regression where that was chosen; it has no zeros.
    best_net_ : tuple of (float, float) or None
        L1 ratio and penalty of the elastic net where that was chosen, the penalty as a fraction of
        the smallest that leaves nothing.
    best_decay_ : SwitchOff, Constant or None
        The decay of the chosen flow; one that stays on is written as ending at ``best_t_``.
    best_zero_tol_ : float
        The threshold that was taken; infinity for the intercept alone.
    best_refit_ : bool
        Whether the coefficients that are not 0 were fitted again; False without ``refit``.
    mse_path_ : array of shape (n_flows, n_ts, n_folds)
        The mean squared error on the fold that was left out, without zeros; several targets are
        each divided by their variance.
    coef_path_ : array of shape (n_features, m) or (n_targets, n_features, m)
        The coefficients of the chosen flow on all samples at the first m of ``ts_``, up to
        ``best_t_``, before any are set to 0; those of ridge regression and elastic nets up to
        the chosen penalty.
    selection_frequency_ : array of shape (n_features,) or (n_targets, n_features)
        In which fraction of the folds the chosen flow, on the training part and with the chosen
        threshold, keeps a coefficient: near 1 for a support that does not depend on the draw.
    zero_mse_path_ : array of shape (n_zero_tols, n_folds)
        The same of the chosen flow, for each threshold; refitted with ``refit``.
    criterion_path_ : array of shape (n_flows, n_ts, n_zero_tols)
        The criterion, instead of ``zero_mse_path_``, where it is not "cv".
    intercept_mse_ : array of shape (n_folds,)
        The same of the intercept alone.
    ridge_mse_ : array of shape (n_ridges, n_folds)
        The same of ridge regression, for each of ``ridges_``, which decrease.
    net_mse_ : array of shape (n_l1_ratios, 17, n_folds)
        The same of elastic nets, for each of ``l1_ratios_`` and penalties that decrease.
    log_As_, shrinkages_ : arrays of shape (n_flows,)
        The flows: one for each of ``log_As``, with shrinkage 0, then those of ``shrinkages``.
    ts_ : array of shape (n_ts,)
        The times, increasing.
    zero_tols_ : array of shape (n_zero_tols,)
        The thresholds, increasing.
    coef_, intercept_, dual_coef_, A_, log_A_, t_, support_, kkt_residual_, gap_, n_iter_
        As for `MirrorFlowRegressor`, fitted to all samples.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    Notes
    -----
    Candidates are in units of S and of the time to grow to it on all samples: the same flow in
    every fold.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import MirrorFlowRegressorCV
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((60, 100))
    >>> y = 3 * X[:, 0] - 2 * X[:, 7] + 0.1 * rng.standard_normal(60)
    >>> model = MirrorFlowRegressorCV().fit(X, y)
    >>> model.best_kind_, model.best_log_A_
    ('flow', -20.0)
    >>> bool(np.abs(model.coef_[[0, 7]] - [3, -2]).max() < 0.1)
    True
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "log_As": ["array-like"],
        "ts": ["array-like", Interval(Integral, 1, None, closed="left")],
        "shrinkages": ["array-like"],
        "ridges": ["array-like", None],
        "l1_ratios": ["array-like", None],
        "zero_tols": ["array-like", None],
        "cv": ["cv_object"],
        "criterion": [StrOptions(set(CRITERIA))],
        "n_jobs": [Integral, None],
        **SHARED,
    }

    def __init__(
        self,
        log_As: Any = (-2.0, -20.0),
        ts: Any = 20,
        *,
        shrinkages: Any = (),
        ridges: Any = None,
        l1_ratios: Any = None,
        zero_tols: Any = None,
        cv: Any = None,
        decay: Decay = None,
        positive: bool = False,
        fit_intercept: bool = True,
        standardize: bool = False,
        refit: bool = False,
        criterion: str = "cv",
        tol: float = 1e-2,
        max_iter: int = 10_000,
        n_jobs: int | None = None,
    ) -> None:
        self.log_As = log_As
        self.ts = ts
        self.shrinkages = shrinkages
        self.ridges = ridges
        self.l1_ratios = l1_ratios
        self.zero_tols = zero_tols
        self.cv = cv
        self.decay = decay
        self.positive = positive
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.refit = refit
        self.criterion = criterion
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
        fitted = copy(self)  # an interrupted fit leaves self as it was
        with one_thread():
            fitted._choose(X, y, sample_weight, params)
        self.__dict__ = fitted.__dict__
        return self

    def _choose(self, X: Any, y: Any, sample_weight: Any, params: dict[str, Any]) -> None:
        """Choose among the candidates, and fit to all samples."""
        self.log_As_, self.shrinkages_ = flows(self.log_As, self.shrinkages, self.decay)
        self.ts_, self.zero_tols_ = times(self.ts), thresholds(self.zero_tols)
        check_decay(self.decay, self.ts_[-1])
        X, y, sample_weight = validated(self, X, y, sample_weight)
        by_cv = self.criterion == "cv"
        split = self._split(X, y, sample_weight, params) if by_cv else None
        data = prepare(X, y, sample_weight, self.fit_intercept, self.positive, self.standardize)
        warn_of_scales(data, above=1)
        every = data.weights[:, None]
        train, test = (every, every) if split is None else (part[data.rows] for part in split)
        folds = Folds(data, train, test, self.decay, self.positive, self.tol, int(self.max_iter))
        jobs = self.n_jobs if by_cv else 1
        self.mse_path_ = folds.all_errors(self.log_As_, self.shrinkages_, self.ts_, jobs)
        self.intercept_mse_ = folds.intercept_errors()
        self.ridges_ = penalties(self.ridges, by_cv and not (self.positive or self.decay), data)
        self.ridge_mse_ = folds.ridge_errors(self.ridges_)
        self.l1_ratios_ = ratios(self.l1_ratios, by_cv and not self.decay)
        self.net_mse_ = folds.net_errors(self.l1_ratios_, NETS)
        i, j, zeros, linear = self._by_error(folds) if by_cv else self._by_criterion(folds)
        run, end = self._best(i, j, zeros, linear), (X.dtype, y.ndim == 1)
        if linear is not None:
            self._fit_linear(data, folds, linear, *end)
            return
        frequency = folds.frequencies(*self._candidate(i), j, zeros.zero_tol)
        self.selection_frequency_ = frequency[0] if y.ndim == 1 else frequency
        self._fit(data, run, *end)

    def _fit_linear(
        self, data: Data, folds: Folds, linear: Linear, dtype: Any, single: bool
    ) -> None:
        """Fit ridge regression or an elastic net to all samples."""
        if linear.kind == "ridge":
            path = self.ridges_[self.ridges_ >= linear.penalty]
            self._fit_ridge(data, path, dtype, single)
            self.selection_frequency_ = np.ones(self.coef_.shape)
            return
        path = NETS[linear.penalty <= NETS]  # down to the chosen one
        self._fit_net(data, linear.ratio, path, dtype, single)
        frequency = folds.net_frequencies(linear.ratio, path)
        self.selection_frequency_ = frequency[0] if single else frequency

    def _candidate(self, i: int) -> tuple[float, float, Array]:
        """Return log A, shrinkage and times of a flow."""
        return float(self.log_As_[i]), float(self.shrinkages_[i]), self.ts_

    def _by_error(self, folds: Folds) -> tuple[int, int, Zeros, Linear | None]:
        """Choose flow and time by the least error, and how much of it is set to 0."""
        mean = self.mse_path_.mean(axis=2)
        i, j = (int(v) for v in np.unravel_index(np.argmin(mean), mean.shape))
        paths = folds.zero_errors(*self._candidate(i), j, self.zero_tols_, self.refit)
        self.zero_mse_path_ = paths[-1]
        errors = self.ridges_, self.ridge_mse_, self.l1_ratios_, self.net_mse_
        linear = without_flow(*errors, paths, self.intercept_mse_, folds.spread)
        if linear is None:
            warn_at_the_last_time(mean[i], self.ts_, folds.spread)
        refitted = paths[1] if self.refit else None
        zeros = choose_zeros(self.zero_tols_, paths[0], refitted, self.intercept_mse_)
        return i, j, zeros, linear

    def _by_criterion(self, folds: Folds) -> tuple[int, int, Zeros, Linear | None]:
        """Choose flow, time and zeros by what coefficients bring on the samples themselves."""
        candidates = self.log_As_, self.shrinkages_, self.ts_, self.zero_tols_
        found = informed(folds, *candidates, self.refit, self.criterion)
        self.criterion_path_ = found.path
        return found.i, found.j, found.zeros, None

    def _best(self, i: int, j: int, zeros: Zeros, linear: Linear | None) -> FlowPoint:
        """Keep what was chosen, and return the flow of it."""
        log_A, shrinkage, ts = self._candidate(i)
        t, zero_tol = float(ts[j]), zeros.zero_tol
        self.best_index_, self.best_log_A_, self.best_t_ = (i, j), log_A, t
        self.best_zero_tol_, self.best_refit_, self.best_decay_ = zero_tol, zeros.refit, self.decay
        self.best_ridge_ = self.best_net_ = None
        if shrinkage > 0:
            self.best_decay_ = SwitchOff(shrinkage * growth(log_A, self.positive), t)
        kind = "kept decay" if shrinkage > 0 else "flow"
        self.best_kind_ = "intercept" if np.isinf(zero_tol) else kind
        if linear is not None:
            self.best_kind_, self.best_zero_tol_ = linear.kind, 0.0
            self.best_log_A_ = self.best_t_ = np.inf  # where flows of large scales end
            self.best_refit_, self.best_decay_ = False, None
            if linear.kind == "ridge":
                self.best_ridge_ = linear.penalty
            else:
                self.best_net_ = linear.ratio, linear.penalty
        return FlowPoint(
            log_A, t, self.best_decay_, 0.1 * self.tol, zeros.zero_tol, zeros.refit, ts[: j + 1]
        )

    def _split(
        self, X: Any, y: Array, sample_weight: Any, params: dict[str, Any]
    ) -> tuple[Array, Array]:
        """Return the weight of each row (n, n_folds) in the training and test part of a fold."""
        splitter: Any = check_cv(self.cv)
        routed: dict[str, Any] = {}
        if get_config()["enable_metadata_routing"]:
            found = process_routing(self, "fit", sample_weight=sample_weight, **params)
            routed = found["splitter"]["split"]
        elif params:
            names = ", ".join(params)
            raise ValueError(f"enable_metadata_routing must be True to pass {names}, got False")
        weights = np.ones(len(y)) if sample_weight is None else sample_weight
        return fold_weights(splitter.split(X, y, **routed), weights)

    def get_metadata_routing(self) -> MetadataRouter:
        """Return the routing: ``fit`` hands metadata to the splitter.

        Returns
        -------
        MetadataRouter
        """
        mapping = MethodMapping().add(caller="fit", callee="split")
        router = MetadataRouter(owner=self).add_self_request(self)
        return router.add(splitter=check_cv(self.cv), method_mapping=mapping)
