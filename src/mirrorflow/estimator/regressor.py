"""Least squares along the Hadamard flow, from ridge-like to lasso-like."""

from __future__ import annotations

from numbers import Real
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import issparse
from sklearn.utils._param_validation import Interval

from .data import prepare
from .linear import LOG_A, FlowRegressor, Run, TurnOff, check_decay, validated
from .transaction import all_or_nothing

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
    decay : TurnOff or None, default=None
        Weight decay on the way, from ``log_A`` at the start; it has to end before the training, or
        never.
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
        "log_A": [Interval(Real, *LOG_A, closed="both")],
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
        t = np.inf if self.interpolate else float(self.t)
        check_decay(self.decay, t)
        run = Run(float(self.log_A), t, self.decay, self.tol, self.zero_tol)
        with all_or_nothing(self):
            if self.interpolate and issparse(X):
                raise ValueError("interpolate=True needs a dense X, got a sparse one")
            X, y, sample_weight = validated(self, X, y, sample_weight)
            data = prepare(X, y, sample_weight, self.fit_intercept, self.positive)
            self._fit(data, run, X.dtype, y.ndim == 1)
        return self

    def __sklearn_tags__(self) -> Any:
        """Take sparse X, except for end points."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = not self.interpolate
        return tags
