"""Whole paths: the flow at many times, and its end points at many scales; and a picture of a CV."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_X_y as sklearn_check_X_y
from sklearn.utils._param_validation import Interval, validate_params
from sklearn.utils.validation import check_is_fitted

from .._threads import small_on_one_thread
from ._base import DECAY, LOG_A, Decay, check_decay, rate_and_end, weights_of, whole_flow
from ._candidates import scales, times
from ._chebyshev import integrate
from ._data import prepare
from ._endpoints import endpoints, warn_unfinished
from ._row_space import row_space
from .regression import MirrorFlowRegressorCV

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MirrorFlowCVDisplay", "entropy_path", "flow_path"]

Array = NDArray[np.float64]
TIME = "t, in units of the time to grow"
FLOATS = [np.float64, np.float32]
SHARED = {
    "positive": ["boolean"],
    "fit_intercept": ["boolean"],
    "max_iter": [Interval(Real, 1, None, closed="left")],
}
checked: Any = sklearn_check_X_y  # its defaults mislead type checkers


@validate_params(
    {"log_A": [Interval(Real, *LOG_A, closed="both")], "decay": DECAY, **SHARED,
     "ts": ["array-like", Interval(Integral, 1, None, closed="left")],
     "tol": [Interval(Real, 0, 1, closed="neither")]},
    prefer_skip_nested_validation=True,
)  # fmt: skip
def flow_path(
    X: Any,
    y: Any,
    log_A: float = -10.0,
    ts: Any = 20,
    *,
    sample_weight: Any = None,
    decay: Decay = None,
    positive: bool = False,
    fit_intercept: bool = True,
    tol: float = 1e-3,
    max_iter: int = 10_000,
) -> tuple[Array, Array, Array]:
    """Return the coefficients of `MirrorFlowRegressor` at many times, for the cost of the last.

    Parameters
    ----------
    X : array or sparse matrix of shape (n_samples, n_features)
        The features.
    y : array of shape (n_samples,)
        The target.
    log_A, ts, decay, positive, fit_intercept, tol, max_iter
        As for `MirrorFlowRegressorCV`. Nothing is set to exactly 0.
    sample_weight : array of shape (n_samples,), default=None
        Weights >= 0.

    Returns
    -------
    ts : array of shape (m,)
        The times, increasing.
    coefs : array of shape (n_features, m)
        The coefficients.
    intercepts : array of shape (m,)
        The intercepts.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import flow_path
    >>> X = np.eye(3)[[0, 0, 1, 1, 2, 2]]
    >>> ts, coefs, _ = flow_path(X, 3 * X[:, 0], ts=[0.5, 5.0], fit_intercept=False)
    >>> coefs[0].round(2)
    array([0.01, 3.  ])
    """
    X, y = checked(X, y, accept_sparse=("csr", "csc"), dtype=FLOATS, y_numeric=True)
    at, (rate, end) = times(ts), rate_and_end(decay)
    check_decay(decay, at[-1])
    coefs = np.zeros((X.shape[1], len(at)))
    with small_on_one_thread(X.size):
        data = prepare(X, y, weights_of(X, sample_weight), fit_intercept, positive)
        if data.pull[0] > 0:

            def save(_: int, index: int, __: Array, x: Array, ___: float) -> None:
                coefs[:, index] = x

            unit = float(data.unit(log_A, positive)[0])
            flows = whole_flow(data, 0, log_A, rate / unit, end * unit, positive)
            reached, _ = integrate(flows, unit * at[None], save, tol, int(max_iter))
            if reached[0] < len(at):
                warn_unfinished(max_iter)
        intercepts = data.intercept(coefs.T, repeat=True)
    return at, coefs.astype(X.dtype), intercepts.astype(X.dtype)


@validate_params(
    {"log_As": ["array-like", Interval(Integral, 1, None, closed="left")], **SHARED},
    prefer_skip_nested_validation=True,
)
def entropy_path(
    X: Any,
    y: Any,
    log_As: Any = 30,
    *,
    sample_weight: Any = None,
    positive: bool = False,
    fit_intercept: bool = True,
    max_iter: int = 2000,
) -> tuple[Array, Array, Array, Array]:
    """Return the end points of the flow for many scales, from ridge-like to L1, as one path.

    Parameters
    ----------
    X : array of shape (n_samples, n_features)
        The features, dense.
    y : array of shape (n_samples,)
        The target.
    log_As : int or array of floats, default=30
        log(A / S) of each end point; a number stands for so many from 4 down to -60.
    sample_weight, positive, fit_intercept
        As for `MirrorFlowRegressor`.
    max_iter : int, default=2000
        The largest number of Newton steps for the whole path.

    Returns
    -------
    log_As : array of shape (m,)
        The scales, as given.
    coefs : array of shape (n_features, m)
        The coefficients: they fit y exactly where that is possible.
    intercepts : array of shape (m,)
        The intercepts.
    gaps : array of shape (m,)
        By which fraction of itself the L1 norm exceeds the smallest one, at most.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import entropy_path
    >>> X = np.random.default_rng(0).standard_normal((10, 30))
    >>> _, coefs, _, gaps = entropy_path(X, X[:, 4], log_As=[2.0, -40.0])
    >>> np.abs(coefs).sum(axis=0).round(2), bool(gaps[1] < 1e-6)
    (array([1.99, 1.  ]), True)
    """
    X, y = checked(X, y, dtype=FLOATS, y_numeric=True)
    found = np.linspace(4.0, -60.0, log_As) if isinstance(log_As, Integral) else scales(log_As)
    with small_on_one_thread(X.size):
        data = prepare(X, y, weights_of(X, sample_weight), fit_intercept, positive)
        coefs, gaps = np.zeros((len(found), X.shape[1])), np.zeros(len(found))
        if data.pull[0] > 0:  # otherwise y is constant
            root, unit = np.sqrt(data.weights), float(data.log_A(0.0)[0])
            space = row_space(root[:, None] * data.X, data.rounding)
            solved = endpoints(space, root * data.y[:, 0], found + unit, positive, int(max_iter))
            coefs, gaps = solved.x, solved.gap
        intercepts = data.intercept(coefs, repeat=True)
    return found, coefs.T.astype(X.dtype), intercepts.astype(X.dtype), gaps


class MirrorFlowCVDisplay:
    """The cross-validation error against the time, one line for each scale, or the chosen path.

    Parameters
    ----------
    log_As : array of shape (n_flows,)
        The scale of each flow.
    ts : array of shape (n_ts,)
        The times.
    mse_path : array of shape (n_flows, n_ts, n_folds)
        The errors.
    shrinkages : array of shape (n_flows,), default=None
        The shrinkage of each flow; None is 0 for all.
    chosen : tuple of (flow, time), default=None
        The indices of the chosen candidate; None marks nothing.
    coef_path : array of shape (n_features, m), default=None
        The coefficients of the chosen flow at the first m times: what `plot_path` draws.
    support : array of bool of shape (n_features,), default=None
        Which of them the model keeps; None is all.
    ridge : float, default=None
        The least error of ridge regression, a line across the plot where that was chosen.
    net : float, default=None
        The same of elastic nets.

    Attributes
    ----------
    ax_, figure_ : matplotlib objects
        After `plot` or `plot_path`.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import MirrorFlowCVDisplay, MirrorFlowRegressorCV
    >>> X = np.random.default_rng(0).standard_normal((40, 20))
    >>> model = MirrorFlowRegressorCV(ts=5).fit(X, X[:, 0] + X[:, 1])
    >>> display = MirrorFlowCVDisplay.from_estimator(model, kind="path")
    >>> display.ax_.get_ylabel()
    'coefficient'
    """

    def __init__(
        self,
        *,
        log_As: Array,
        ts: Array,
        mse_path: Array,
        shrinkages: Array | None = None,
        chosen: tuple[int, int] | None = None,
        coef_path: Array | None = None,
        support: NDArray[np.bool_] | None = None,
        ridge: float | None = None,
        net: float | None = None,
    ) -> None:
        self.log_As, self.ts, self.mse_path, self.chosen = log_As, ts, mse_path, chosen
        self.shrinkages = np.zeros(len(log_As)) if shrinkages is None else shrinkages
        self.coef_path, self.support = coef_path, support
        self.ridge, self.net = ridge, net

    @classmethod
    def from_estimator(
        cls, estimator: Any, *, kind: str = "error", ax: Axes | None = None
    ) -> MirrorFlowCVDisplay:
        """Plot a fitted `MirrorFlowRegressorCV`.

        Parameters
        ----------
        estimator : MirrorFlowRegressorCV
            Fitted; to one target for the path.
        kind : {"error", "path"}, default="error"
            The errors of all candidates (`plot`), or the coefficients of the chosen flow
            (`plot_path`).
        ax : matplotlib Axes, default=None
            Where to plot; a new figure if None.

        Returns
        -------
        MirrorFlowCVDisplay

        Raises
        ------
        TypeError
            If the estimator is another one.
        ValueError
            If ``kind`` is another word, or the path is asked for of several targets.
        """
        if not isinstance(estimator, MirrorFlowRegressorCV):
            raise TypeError(
                f"estimator must be a MirrorFlowRegressorCV, got {type(estimator).__name__}"
            )
        check_is_fitted(estimator, "mse_path_")
        if kind not in ("error", "path"):
            raise ValueError(f"kind must be 'error' or 'path', got {kind!r}")
        path, support = estimator.coef_path_, estimator.support_
        linear = estimator.best_kind_ in ("ridge", "elastic net")
        if linear and kind == "path":
            raise ValueError(f"the path must be of a flow, got one of {estimator.best_kind_}")
        shown: dict[str, Any] = {} if linear else {"chosen": estimator.best_index_}
        if path.ndim == 2 and not linear:
            shown |= {"coef_path": path, "support": support}
        if estimator.best_kind_ == "ridge":
            shown["ridge"] = estimator.ridge_mse_.mean(axis=1).min()
        if estimator.best_kind_ == "elastic net":
            shown["net"] = estimator.net_mse_.mean(axis=2).min()
        display = cls(
            log_As=estimator.log_As_, ts=estimator.ts_, mse_path=estimator.mse_path_,
            shrinkages=estimator.shrinkages_, **shown,
        )  # fmt: skip
        return display.plot(ax=ax) if kind == "error" else display.plot_path(ax=ax)

    def plot(self, *, ax: Axes | None = None) -> MirrorFlowCVDisplay:
        """Plot the mean over the folds, with a standard error as a band, and the chosen point.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to plot; a new figure if None.

        Returns
        -------
        self
        """
        axis = _axis(ax)
        reached = np.where(np.isinf(self.mse_path), np.nan, self.mse_path)  # leaves gaps
        mean = reached.mean(axis=2)
        error = reached.std(axis=2) / np.sqrt(reached.shape[2])
        markers = "osD^vP*X"
        for i, log_A in enumerate(self.log_As):
            shrunk = f", shrinkage {self.shrinkages[i]:g}" if self.shrinkages[i] else ""
            style: Any = {"marker": markers[i % len(markers)]}
            (line,) = axis.plot(self.ts, mean[i], label=f"log A = {log_A:g}{shrunk}", **style)
            band = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
            axis.fill_between(self.ts, mean[i] - error[i], mean[i] + error[i], **band)
        if self.chosen is not None:
            i, j = self.chosen
            ring: Any = {"s": 180, "facecolors": "none", "edgecolors": "black", "zorder": 3}
            axis.scatter(self.ts[j], mean[i, j], label="chosen", **ring)
        for error, kind in ((self.ridge, "ridge"), (self.net, "elastic net")):
            if error is not None:
                axis.axhline(error, color="black", linestyle="--", label=f"{kind}, chosen")
        axis.set(xscale="log", xlabel=TIME, ylabel="mean squared error")
        axis.legend()
        self.ax_, self.figure_ = axis, axis.figure
        return self

    def plot_path(self, *, ax: Axes | None = None) -> MirrorFlowCVDisplay:
        """Plot the coefficients of the chosen flow up to the chosen time, where the model is.

        Those that the model sets to 0 are grey.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to plot; a new figure if None.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If there is no ``coef_path``.
        """
        if self.coef_path is None:
            raise ValueError("the path must be of one target, got none. Fit a model to each target")
        axis, ts = _axis(ax), self.ts[: self.coef_path.shape[1]]
        kept = (
            np.asarray(np.ones(len(self.coef_path)) if self.support is None else self.support) > 0
        )
        if not kept.all():
            axis.plot(ts, self.coef_path[~kept].T, color="0.8", linewidth=0.8)
        axis.plot(ts, self.coef_path[kept].T, marker=".")
        axis.axvline(ts[-1], color="black", linestyle="--", label=f"chosen: t = {ts[-1]:.3g}")
        span = self.ts[0], self.ts[-1]  # also what was not chosen
        axis.set(xscale="log", xlim=span, xlabel=TIME, ylabel="coefficient")
        axis.legend()
        self.ax_, self.figure_ = axis, axis.figure
        return self


def _axis(ax: Axes | None) -> Axes:
    """Return the axes, new ones if there are none."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot needs matplotlib, of the extra lab: pip install '.[lab]'", name="matplotlib"
        ) from error
    return plt.subplots()[1] if ax is None else ax
