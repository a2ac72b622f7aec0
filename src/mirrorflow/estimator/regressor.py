"""Least squares along the Hadamard flow, from ridge-like to lasso-like."""

from __future__ import annotations

from copy import copy
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import issparse
from sklearn.utils._param_validation import Interval

from .._threads import small_on_one_thread
from ._base import (
    LOG_A,
    SHARED,
    Decay,
    FlowPoint,
    FlowRegressor,
    check_decay,
    finish,
    rate_and_end,
    validated,
)
from ._data import Data, prepare, warn_of_scales
from ._groups import Groups, in_groups

__all__ = ["MirrorFlowRegressor"]


class MirrorFlowRegressor(FlowRegressor):
    r"""Linear regression by the flow of x = m * w, stopped early or at its end.

    .. math:: x_t = A \sinh(2 X^T \nu_t), \quad \nu_t' = \tfrac{1}{n} (y - X x_t), \quad \nu_0 = 0

    This is what gradient descent on m and w does from m = 0, w = sqrt(2 A) (Theorem 3.2). A is all
    that weight decay changes: it divides A by e^{2 alpha} in each unit of time. Large A acts like
    ridge regression, small A like the lasso.

    Parameters
    ----------
    log_A : float, default=-10
        log(A / S), S the largest coefficient of the minimum-norm least-squares solution (damped by
        1e-5 of the largest singular value): about 2 or more is ridge-like, -10 sparse, and below
        -20 the inverse scale space of the lasso. From -10,000 to 20, where it is ridge to 1e-8.
    t : float, default=2
        When to stop, > 0, in units of the time that the strongest coefficient, unopposed, takes to
        grow to S. Below 1 next to nothing has grown; for t to infinity the data are fitted exactly,
        noise included.
    interpolate : bool, default=False
        Go to the end of the flow (t is not used): of all solutions the one of least R_a; with
        ``positive`` and none that is >= 0, of all least-squares solutions that are. Under noise
        this is the worst choice. Needs a dense X.
    decay : SwitchOff, Constant or None, default=None
        Weight decay on the way, from ``log_A`` at the start; it has to end before the training, or
        never.
    positive : bool, default=False
        Force the coefficients to be >= 0: m = w = sqrt(A) at the start, x = A exp(2 X^T nu).
    groups : array of shape (n_features,) or list of arrays of int, default=None
        Coefficients that are 0 or not together: a label for each column, or the columns of each
        group. Then x_g = s_g v_g, a number times a vector; see the notes.
    fit_intercept : bool, default=True
        Whether to fit an intercept; it is not penalized.
    standardize : bool, default=False
        Whether to run the flow on the columns of X divided by their standard deviations (by their
        root mean squares without an intercept), so that their units decide nothing. ``coef_`` is in
        the units of X; ``zero_tol``, ``A_``, ``dual_coef_`` and the certificates belong to the
        divided columns. Without it, a stopped flow warns of columns on unequal scales.
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
        The largest entry of arcsinh(x / A) / 2 - X^T nu, relative to the largest of X^T nu; with
        ``interpolate`` at least the slope that is left of the squared error, relative to its slope
        at 0. Measured on all samples as they were given, before coefficients are set to 0.
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

    Notes
    -----
    With ``groups`` the model is x_g = s_g v_g, from s_g = sqrt(2 A) and v_g = 0; groups of one
    column are m * w. Decay that is kept is half the sum of s_g^2 + abs(v_g)^2, at least the sum of
    norms abs(x_g): the flow tends to the group lasso, whose penalty, beside the mean squared error
    / 2, is the rate of the decay times ``t / t_``. Stopped early, or with decay that is switched
    off, it is a flow of its own: s_g v_g does not commute, so that there is no R_a, no end point
    (``interpolate``, `limit`) and no dual solution; ``dual_coef_``, ``kkt_residual_`` and ``gap_``
    are NaN. S and the strongest coefficient are then norms of groups, and ``zero_tol`` sets whole
    groups to 0.

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

    Columns in pairs, of which two matter:

    >>> y = X[:, 0] + X[:, 1] - 2 * X[:, 6] + 0.1 * X[:, 7]
    >>> paired = MirrorFlowRegressor(log_A=-15, zero_tol=0.1, groups=np.arange(100) // 2)
    >>> np.flatnonzero(paired.fit(X, y).support_)
    array([0, 1, 6, 7])
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "log_A": [Interval(Real, *LOG_A, closed="both")],
        "t": [Interval(Real, 0, None, closed="neither")],
        "interpolate": ["boolean"],
        "groups": ["array-like", None],
        "zero_tol": [Interval(Real, 0, 1, closed="left")],
        **SHARED,
    }

    def __init__(
        self,
        log_A: float = -10.0,
        t: float = 2.0,
        *,
        interpolate: bool = False,
        decay: Decay = None,
        positive: bool = False,
        groups: Any = None,
        fit_intercept: bool = True,
        standardize: bool = False,
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
        self.groups = groups
        self.fit_intercept = fit_intercept
        self.standardize = standardize
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
        t = np.inf if self.interpolate else float(self.t)
        check_decay(self.decay, t)
        run = FlowPoint(float(self.log_A), t, self.decay, self.tol, self.zero_tol, self.refit)
        if self.groups is not None:
            self._check_groups()
        if self.interpolate and issparse(X):
            raise ValueError("X must be dense with interpolate=True, got a sparse one")
        fitted = copy(self)  # an interrupted fit leaves self as it was
        X, y, sample_weight = validated(fitted, X, y, sample_weight)
        with small_on_one_thread(X.size):
            data = prepare(X, y, sample_weight, self.fit_intercept, self.positive, self.standardize)
            if not self.interpolate:  # in infinite time all of them have grown
                warn_of_scales(data)
            if self.groups is None:
                fitted._fit(data, run, X.dtype, y.ndim == 1)
            else:
                fitted._fit_groups(data, run, X.dtype, y.ndim == 1)
        self.__dict__ = fitted.__dict__
        return self

    def _check_groups(self) -> None:
        """Refuse what the flow of groups does not have."""
        if self.interpolate:
            raise ValueError(
                "interpolate must be False with groups, got True. The flow of s_g v_g does not "
                "commute, so that no R_a gives its end; give a large t."
            )
        if self.positive:
            raise ValueError(
                "positive must be False with groups, got True. Groups have a norm, not a sign; "
                "leave out one of the two."
            )

    def _fit_groups(self, data: Data, run: FlowPoint, dtype: Any, single: bool) -> None:
        """Run the flow of groups to its time, and keep its end."""
        groups, (rate, end) = Groups.read(self.groups, data.X.shape[1]), rate_and_end(run.decay)
        data = groups.units(data)
        coef, self.n_iter_ = in_groups(
            data, groups, run.log_A, (rate, end), run.t, run.tol, self.max_iter
        )
        coef = finish(groups.without_small(coef, run.zero_tol), data, 0.0, run.refit)
        unknown = np.full(len(coef), np.nan)  # groups have no mirror map to check
        dual = np.full((len(coef), data.samples), np.nan)
        drop = -2 * rate * min(run.t, end)
        self._keep(data, run, coef, drop, dual, (unknown, unknown), dtype, single)

    def __sklearn_tags__(self) -> Any:
        """Take sparse X, except for end points."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = not self.interpolate
        return tags
