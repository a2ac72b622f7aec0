"""The methods of the logistic study: the flow, L1 and ridge, each tuned by the same 5 folds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import l1_min_c

from ....estimator._base import nearly_best, without_small
from ....estimator._chebyshev import integrate
from ....estimator._data import prepare
from ....estimator._flows import RowFlows

__all__ = ["FALLBACK", "FLOW", "L1", "RIDGE", "THRESHOLDED", "Chosen", "LogisticFlows", "fit_all"]

Array = NDArray[np.float64]
FOLDS, POINTS = 5, 20  # of each flow
LOG_AS = (2.0, -2.0, -6.0, -12.0, -20.0)  # as MirrorFlowRegressorCV tries
TIMES = np.geomspace(0.3, 30.0, POINTS)
TOLS = np.r_[0.0, np.geomspace(1e-2, 0.7, 12)]
WHOLE = np.zeros(1)  # the threshold that sets nothing to 0
SLOPE = 4.0  # of the logit to the probability, where that is 1/2
STEPS, NEWTON = 5000, 50
L1, THRESHOLDED, RIDGE = "L1", "L1, thresholded", "ridge"
FLOW, FALLBACK = "flow", "flow, or L1 or ridge"
# The name of the penalty changed in scikit-learn 1.8.
_LASSO: Any = {"l1_ratio": 1.0} if LogisticRegression().penalty == "deprecated" else {
    "penalty": "l1"
}  # fmt: skip


@dataclass(frozen=True)
class LogisticFlows(RowFlows):
    r"""The flows of m * w under the logistic loss of labels y in {0, 1}, in nu.

    .. math:: \nu' = w \circ (y - \sigma(X x + b)), \quad x = A \sinh(2 X^T \nu),

    with the intercept b of least loss at each time, so that nu' sums to 0.
    """

    def velocity(self, x: Array) -> Array:
        """Return w (y - sigma(X x + b))."""
        scores = x @ self.X.T
        b = intercepts(scores, self.y, self.weights)
        return self._centered(self.weights * (self.y - expit(scores + b)))

    @property
    def direction(self) -> Array:
        """The velocity at x = 0."""
        means = (self.weights * self.y).sum(axis=1, keepdims=True)
        return self.weights * (self.y - means)

    def apply(self, v: Array, slope: Array) -> Array:
        """Return a bound on the Jacobian times v: the slope of sigma is at most 1/4."""
        return super().apply(v, slope) / SLOPE


def intercepts(scores: Array, y: Array, weights: Array) -> Array:
    """Return the b (..., 1) of least weighted logistic loss at scores + b, by Newton's method."""
    b = np.zeros((*scores.shape[:-1], 1))
    for _ in range(NEWTON):
        p = expit(scores + b)
        slope = (weights * (y - p)).sum(axis=-1, keepdims=True)
        curve = (weights * p * (1 - p)).sum(axis=-1, keepdims=True)
        step = np.clip(slope / np.maximum(curve, 1e-12), -2.0, 2.0)
        b += step
        if np.abs(step).max() < 1e-10:
            break
    return b


def loss(scores: Array, y: Array) -> Array:
    """Return the logistic losses of labels or probabilities y."""
    return np.logaddexp(0.0, scores) - y * scores


@dataclass(frozen=True)
class Problem:
    """A data set and its folds: the weights of rows (FOLDS, n) in training and in the test."""

    X: Array
    y: Array
    train: Array
    test: Array

    @classmethod
    def of(cls, X: Array, y: Array) -> Problem:
        """Deal the rows into folds."""
        train, test = np.zeros((2, FOLDS, len(y)))
        parts = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(X, y)
        for f, (a, b) in enumerate(parts):
            train[f, a], test[f, b] = 1 / len(a), 1 / len(b)
        return cls(X, y, train, test)

    def losses(self, coefs: Array, tols: Array) -> Array:
        """Return the losses (n_tols, FOLDS) of coefs (FOLDS, d) without the small ones."""
        kept = np.stack([without_small(coefs, tol) for tol in tols])
        scores = kept @ self.X.T
        b = intercepts(scores, self.y, self.train)
        return (self.test * loss(scores + b, self.y)).sum(axis=-1)


@dataclass(frozen=True)
class Chosen:
    """A model: its coefficients, its intercept, and its losses (FOLDS,) on the rows left out."""

    coef: Array
    intercept: float
    losses: Array


def choose(problem: Problem, paths: Array, final: Callable[[int], Array], tols: Array) -> Chosen:
    """Choose among candidates (m, FOLDS, d), each with all thresholds, by the mean loss.

    Of the candidate that is best with some threshold the largest near its best one is taken.
    """
    losses = np.stack([problem.losses(coefs, tols) for coefs in paths])
    i = int(losses.mean(axis=-1).min(axis=1).argmin())
    z = int(np.flatnonzero(nearly_best(losses[i]))[-1])
    coef = without_small(final(i), tols[z])
    scores = problem.X @ coef
    b = intercepts(scores, problem.y, np.full(len(scores), 1 / len(scores)))
    return Chosen(coef, float(b[0]), losses[i, z])


def flow_paths(problem: Problem) -> Array:
    """Return the coefficients (m, FOLDS + 1, d) at all scales and times; the last are of all."""
    X, y, n = problem.X, problem.y, len(problem.y)
    weights = np.vstack([problem.train, np.full(n, 1 / n)])
    data, count = prepare(X, y, None, True, False), len(weights)
    found = np.zeros((len(LOG_AS), POINTS, count, X.shape[1]))
    for i, log_A in enumerate(LOG_AS):
        start = np.full(count, data.log_A(log_A)[0] + np.log(SLOPE))
        never, labels = np.zeros(count), np.tile(y, (count, 1))
        flows = LogisticFlows(start, never, never, False, data.X, labels, weights, True)
        times = np.tile(data.unit(log_A, False)[0] * TIMES, (count, 1))

        def save(k: int, j: int, _: Array, x: Array, __: float, into: Array = found[i]) -> None:
            into[j:, k] = x

        integrate(flows, times, save, 1e-2, STEPS)
    return found.reshape(-1, count, X.shape[1])


def penalized_paths(problem: Problem, Cs: Array, options: Any) -> Array:
    """Return the coefficients (m, FOLDS, d) of scikit-learn's LogisticRegression."""
    rows = [np.flatnonzero(weights) for weights in problem.train]
    return np.stack([
        [penalized(problem.X[r], problem.y[r], C, options) for r in rows] for C in Cs
    ])  # fmt: skip


def penalized(X: Array, y: Array, C: float, options: Any) -> Array:
    """Fit scikit-learn's LogisticRegression."""
    model = LogisticRegression(C=C, max_iter=1000, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, at ends of paths that are not chosen
        return model.fit(X, y).coef_[0]


def best_penalized(problem: Problem, Cs: Array, options: Any) -> Callable[[Array], Chosen]:
    """Return the choice among the penalties, for thresholds to be given."""
    paths = penalized_paths(problem, Cs, options)

    def final(i: int) -> Array:
        return penalized(problem.X, problem.y, Cs[i], options)

    return partial(choose, problem, paths, final)


def fit_all(X: Array, y: Array) -> dict[str, Chosen]:
    """Fit the flow, L1, ridge and their combination to labels in {0, 1}."""
    problem = Problem.of(X, y)
    lasso = best_penalized(
        problem, l1_min_c(X, y, loss="log") * np.geomspace(1.0, 100.0, 12),
        {"solver": "liblinear", **_LASSO},
    )  # fmt: skip
    ridge = best_penalized(problem, np.geomspace(1e-3, 10.0, 10), {})
    flows = flow_paths(problem)
    found = {L1: lasso(WHOLE), THRESHOLDED: lasso(TOLS), RIDGE: ridge(WHOLE)}
    found[FLOW] = choose(problem, flows[:, :-1], lambda i: flows[i, -1], TOLS)
    found[FALLBACK] = fall_back(found[THRESHOLDED], (found[FLOW], found[RIDGE]))
    return found


def fall_back(default: Chosen, others: tuple[Chosen, ...]) -> Chosen:
    """Return the default, or what is better by most standard errors of the difference, over 1."""
    best, margin = default, 0.0
    for other in others:
        gain = default.losses - other.losses
        above = float(gain.mean() - gain.std() / np.sqrt(len(gain)))
        if above > margin:
            best, margin = other, above
    return best
