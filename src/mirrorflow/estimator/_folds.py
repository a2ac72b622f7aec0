"""The flows of all folds and targets at once, and their errors on what was left out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from joblib import effective_n_jobs
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.parallel import Parallel, delayed

from .._threads import one_thread
from ._base import Decay, least_squares, rate_and_end, without_small
from ._chebyshev import Saved, integrate
from ._data import Data
from ._flows import Flows
from ._fold_problems import FoldProblem, fold_problem

__all__ = ["Folds", "fold_weights"]

NET = 0.1  # duality gap of elastic nets relative to |y|^2, in units of the flows' tolerance
KEPT = 2**22  # numbers of states up to which they are kept: 32 MB
Array = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class Folds:
    """The problems of a cross-validation.

    Attributes
    ----------
    data : Data
        All samples, in whose units scales and times are.
    train, test : arrays of shape (n, n_folds)
        The weight of each row in the training and in the test part; columns sum to 1.
    decay, positive, tol, max_iter
        As for `MirrorFlowRegressorCV`.
    states : dict
        The states (n_ts, n_folds, size) of flows that have been integrated, by target and flow, as
        far as they are few numbers.
    """

    data: Data
    train: Array
    test: Array
    decay: Decay
    positive: bool
    tol: float
    max_iter: int
    states: dict[Any, Any] = field(default_factory=dict)

    def errors(self, log_A: float, shrinkage: float, ts: Array) -> Array:
        """Return the errors (n_ts, n_folds) of one flow, the mean over the targets.

        Flows are integrated one by one, and with one thread, so that neither the other candidates
        nor the way in which the work is shared out can change a bit.
        """
        with one_thread():
            targets = range(self.data.y.shape[1])
            return np.mean([self._errors(k, log_A, shrinkage, ts) for k in targets], axis=0)

    def all_errors(self, log_As: Array, shrinkages: Array, ts: Array, n_jobs: Any) -> Array:
        """Return the errors (n_flows, n_ts, n_folds), the work shared out by flows."""
        flows = zip(log_As.tolist(), shrinkages.tolist(), strict=True)
        _ = self.problem  # once, before it is shared out
        if effective_n_jobs(n_jobs) == 1:  # None asks joblib's context
            found = [self.errors(*flow, ts) for flow in flows]
        else:
            run = delayed(self.errors)
            shared: Any = Parallel(n_jobs=n_jobs)(run(*flow, ts) for flow in flows)
            found = list(shared)
        errors = np.stack(found)
        _warn_unfinished(np.isinf(errors), self.max_iter)
        return errors

    def zero_errors(
        self, log_A: float, shrinkage: float, ts: Array, j: int, zero_tols: Array, refit: bool
    ) -> list[Array]:
        """Return the errors (n_tols, n_folds) of one flow whose small coefficients are set to 0.

        With ``refit`` twice: as the flow leaves the others, and refitted.
        """
        ways = (False, True) if refit else (False,)
        found: list[list[Array]] = [[] for _ in ways]
        for k in range(self.data.y.shape[1]):
            rows = self._coefs(k, log_A, shrinkage, ts, j)
            for way, errors in zip(ways, found, strict=True):
                each = [self._thresholded(c, k, f, zero_tols, way) for f, c in enumerate(rows)]
                errors.append(np.stack(each, axis=1))
        return [np.mean(errors, axis=0) for errors in found]

    def sizes(self, log_A: float, shrinkage: float, ts: Array, j: int, zero_tols: Array) -> Array:
        """Return how many coefficients of the first target and fold each threshold keeps."""
        x = self._coefs(0, log_A, shrinkage, ts, j)[0]
        kept = without_small(np.tile(x, (len(zero_tols), 1)), zero_tols[:, None]) != 0
        return kept.sum(axis=1)

    def frequencies(
        self, log_A: float, shrinkage: float, ts: Array, j: int, zero_tol: float
    ) -> Array:
        """Return in which fraction of the folds each coefficient (K, d) is not set to 0."""
        rows = [self._coefs(k, log_A, shrinkage, ts, j) for k in range(self.data.y.shape[1])]
        return np.stack([(without_small(x, zero_tol) != 0).mean(axis=0) for x in rows])

    def net_frequencies(self, ratio: float, penalties: Array) -> Array:
        """Return in which fraction of the folds the last elastic net keeps a coefficient (K, d)."""
        folds = range(self.train.shape[1])
        kept = [self.problem.net(f, ratio, penalties, NET * self.tol)[:, -1] != 0 for f in folds]
        return np.mean(kept, axis=0)

    def intercept_errors(self) -> Array:
        """Return the errors (n_folds,) of the intercept alone."""
        zero, folds = np.zeros(self.data.X.shape[1]), range(self.train.shape[1])
        found = [
            [self.problem.error(zero, k, f) / self._units[k] for f in folds]
            for k in range(self.data.y.shape[1])
        ]
        return np.mean(found, axis=0)

    def ridge_errors(self, penalties: Array) -> Array:
        """Return the errors (n_penalties, n_folds) of ridge regression, the mean over targets."""
        found = np.zeros((len(penalties), self.train.shape[1]))
        for f in range(found.shape[1] if len(penalties) else 0):
            path = enumerate(self.problem.ridge(f, penalties))
            each = [self.problem.error(x, k, f) / self._units[k] for k, x in path]
            found[:, f] = np.mean(each, axis=0)
        return found

    def net_errors(self, ratios: Array, penalties: Array) -> Array:
        """Return the errors (n_ratios, n_penalties, n_folds) of elastic nets, the mean alike."""
        found = np.zeros((len(ratios), len(penalties), self.train.shape[1]))
        for i, f in np.ndindex(found.shape[0], found.shape[2]):
            path = enumerate(self.problem.net(f, float(ratios[i]), penalties, NET * self.tol))
            each = [self.problem.error(x, k, f) / self._units[k] for k, x in path]
            found[i, :, f] = np.mean(each, axis=0)
        return found

    @cached_property
    def problem(self) -> FoldProblem:
        """The training parts and the test errors."""
        return fold_problem(self.data, self.train, self.test, self.positive, self.tol)

    def _errors(self, k: int, log_A: float, shrinkage: float, ts: Array) -> Array:
        """Return the errors (n_ts, n_folds) of one target."""
        found = np.full((len(ts), self.train.shape[1]), np.inf)
        flows, *_ = self._flows(k, log_A, shrinkage)
        size = flows.start.shape[1]
        kept = found.size * size <= KEPT
        states = np.zeros((len(ts), found.shape[1], size)) if kept else None

        def save(fold: int, index: int, state: Array, x: Array, _: float) -> None:
            found[index, fold] = self.problem.error(x, k, fold) / self._units[k]
            if states is not None:
                states[index, fold] = state

        reached = self._run(k, log_A, shrinkage, ts, save)
        found[np.arange(len(ts))[:, None] >= reached] = np.inf
        if kept:
            self.states[k, log_A, shrinkage] = states
        return found

    def _coefs(self, k: int, log_A: float, shrinkage: float, ts: Array, j: int) -> Array:
        """Return the flow's coefficients (n_folds, d) at its j-th time, in its own unit."""
        flows, unit = self._flows(k, log_A, shrinkage)
        states = self.states.get((k, log_A, shrinkage))
        if not self.data.pull[k] > 0:
            return np.zeros((len(flows.start), self.data.X.shape[1]))
        chosen = np.zeros_like(flows.start) if states is None else states[j]
        if states is None:  # the same steps as before

            def save(fold: int, index: int, state: Array, _: Array, __: float) -> None:
                if index == j:
                    chosen[fold] = state

            self._run(k, log_A, shrinkage, ts, save)
        t = np.full(len(chosen), float(self.data.unit(log_A, self.positive)[k] * ts[j]) / unit)
        x, _ = flows.primal(flows.mirror(chosen, t), t)
        return x.astype(np.float64)

    def _run(self, k: int, log_A: float, shrinkage: float, ts: Array, save: Saved) -> Index:
        """Integrate a flow on all folds; return how many times each has reached."""
        folds = self.train.shape[1]
        flows, unit = self._flows(k, log_A, shrinkage)
        if not self.data.pull[k] > 0:  # a constant target: all coefficients stay 0
            zero = np.zeros(self.data.X.shape[1])
            for fold, index in np.ndindex(folds, len(ts)):
                save(fold, index, flows.start[fold], zero, 0.0)
            return np.full(folds, len(ts))
        times = float(self.data.unit(log_A, self.positive)[k]) * ts / unit
        return integrate(flows, np.tile(times, (folds, 1)), save, self.tol, self.max_iter)[0]

    def _flows(self, k: int, log_A: float, shrinkage: float) -> tuple[Flows, float]:
        """Return a flow on all folds, one row each, with its unit of time."""
        unit = float(self.data.unit(log_A, self.positive)[k])
        rate, end = rate_and_end(self.decay)
        if shrinkage > 0:
            return self.problem.flows(k, log_A, shrinkage * float(self.data.pull[k]), np.inf)
        return self.problem.flows(k, log_A, rate / unit, end * unit)

    def _thresholded(self, coef: Array, k: int, f: int, zero_tols: Array, refit: bool) -> Array:
        """Return the errors (n_tols,) of coefficients (d,) of fold f without the small ones."""
        rows = without_small(np.tile(coef, (len(zero_tols), 1)), zero_tols[:, None])
        if refit:
            rows = self._refitted(k, rows != 0, self.train[:, f]) / self.problem.size(k)
        return self.problem.error(rows, k, f) / self._units[k]

    def _refitted(self, k: int, supports: NDArray[np.bool_], weights: Array) -> Array:
        """Fit on each of the nested supports, on equal ones once."""
        _, first, back = np.unique(supports.sum(axis=1), return_index=True, return_inverse=True)
        fitted = [least_squares(self.data, k, supports[i], weights) for i in first]
        return np.stack(fitted)[back]

    @property
    def spread(self) -> float:
        """The variance of the targets in the units of the errors."""
        y, weights = self.data.y, self.data.weights
        return float((weights @ y**2 / self._units).mean())

    @cached_property
    def _units(self) -> Array:
        """The units of the errors: the variances of several targets, as far as they vary."""
        y, weights = self.data.y, self.data.weights
        variances = weights @ (y - weights @ y) ** 2
        return np.where((variances > 0) & (y.shape[1] > 1), variances, 1.0)


def fold_weights(parts: Any, weights: Array) -> tuple[Array, Array]:
    """Return the weight of each row (n, n_folds) in the training and the test part of each fold.

    ``parts`` are the pairs of indices that a splitter yields.
    """
    n, folds = len(weights), []
    for pair in parts:
        train, test = (np.bincount(np.arange(n)[part], minlength=n) * weights for part in pair)
        if not (train.sum() > 0 and test.sum() > 0):
            raise ValueError(
                "each fold of cv must train and test on samples of weight > 0, got one without. "
                "Take fewer folds"
            )
        folds.append((train / train.sum(), test / test.sum()))
    if not folds:
        raise ValueError("cv must give a fold, got none")
    train, test = (np.stack(side, axis=1) for side in zip(*folds, strict=True))
    return train, test


def _warn_unfinished(late: NDArray[Any], max_iter: int) -> None:
    """Warn that candidates are left out because the steps did not reach them."""
    if late.any():
        warnings.warn(
            f"{late.sum()} of {late.size} candidates (flow, time and fold) have not been reached "
            f"in max_iter={max_iter} steps and are left out; increase max_iter, give smaller ts, "
            "or bring the columns of X to a common scale (StandardScaler)",
            ConvergenceWarning,
            stacklevel=5,
        )
