"""The study of classification: its flow, its intercepts, and its choices."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import minimize_scalar
from scipy.special import expit

from mirrorflow.estimator._chebyshev import integrate
from mirrorflow.lab import framework
from mirrorflow.lab.experiments.studies import _logistic_methods as methods

STUDY = framework.load("bench_logistic")


def problem(n=40, d=12, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) + 1
    return X, (rng.random(n) < expit(2 * X[:, 0] - 2 * X[:, 1] + 0.5)).astype(float)


def best_intercept(scores, y, weights):
    found = minimize_scalar(
        lambda b: weights @ methods.loss(scores + b, y), bracket=(-1, 1), options={"xtol": 1e-12}
    )
    return found.x


@pytest.mark.parametrize("log_A", [0.0, -6.0])
def test_the_flow_is_that_of_m_and_w_under_the_logistic_loss(log_A):
    X, y = problem()
    (n, d), T = X.shape, 4.0
    w = np.full(n, 1 / n)

    def move(_, state):
        m, v = state[:d], state[d:]
        scores = X @ (m * v)
        pull = X.T @ (w * (y - expit(scores + best_intercept(scores, y, w))))
        return np.r_[v * pull, m * pull]

    start = np.r_[np.zeros(d), np.full(d, np.sqrt(2 * np.exp(log_A)))]
    end = solve_ivp(move, (0, T), start, rtol=1e-9, atol=1e-12).y[:, -1]
    never, found = np.zeros(1), {}
    flows = methods.LogisticFlows(
        np.array([log_A]), never, never, False, X, y[None], w[None], True
    )  # fmt: skip
    integrate(flows, np.array([[T]]), lambda k, j, s, x, t: found.update(x=x), 1e-7)
    np.testing.assert_allclose(found["x"], end[:d] * end[d:], atol=5e-5)


def test_intercepts_are_of_least_loss():
    X, y = problem()
    weights = np.random.default_rng(1).random((3, len(y)))
    scores = X @ np.random.default_rng(2).standard_normal((3, X.shape[1])).T
    found = methods.intercepts(scores.T, y, weights)
    for b, s, v in zip(found[:, 0], scores.T, weights, strict=True):
        assert b == pytest.approx(best_intercept(s, y, v), abs=1e-6)


def test_of_the_best_candidate_the_largest_threshold_near_its_best_is_taken():
    X, y = problem(400)
    made = methods.Problem.of(X, y)
    good, poor = np.zeros((2, X.shape[1]))
    good[:3], poor[5] = (2.0, -2.0, 0.05), 1.0
    paths = np.tile(np.stack([poor, good])[:, None], (1, methods.FOLDS, 1))
    chosen = methods.choose(made, paths, lambda i: paths[i, 0], np.array([0.0, 0.5, 0.9]))
    np.testing.assert_array_equal(chosen.coef, np.r_[2.0, -2.0, np.zeros(10)])
    assert chosen.losses.mean() < 0.5


def test_another_model_is_taken_only_where_it_is_better_by_more_than_a_standard_error():
    spread = np.array([0.1, -0.1, 0.1, -0.1, 0.0])
    default, level, better = (
        methods.Chosen(np.zeros(1), 0.0, 0.5 + shift)
        for shift in (np.zeros(5), spread - 0.01, spread - 0.2)
    )  # fmt: skip
    assert methods.fall_back(default, (level,)) is default
    assert methods.fall_back(default, (level, better)) is better


def test_with_a_strong_sparse_signal_all_find_it_and_L1_keeps_more_columns():
    rng = np.random.default_rng(3)
    X = rng.standard_normal((200, 30))
    y = (rng.random(200) < expit(4 * X[:, 0] - 4 * X[:, 1])).astype(float)
    found = methods.fit_all(X, y)
    for method in (methods.L1, methods.THRESHOLDED, methods.FLOW):
        assert found[method].coef[0] > 1 and found[method].coef[1] < -1
        assert (methods.loss(X @ found[method].coef + found[method].intercept, y)).mean() < 0.4
    sizes = {name: np.count_nonzero(m.coef) for name, m in found.items()}
    assert sizes[methods.FLOW] <= sizes[methods.L1] < sizes[methods.RIDGE] == 30


def test_the_criterion_counts_designs_by_medians():
    def record(ratio, seed, method, loss, f1):
        place = {"truth": "sparse", "correlation": 0.0, "ratio": ratio, "snr": 3.0, "seed": seed}
        return {**place, "method": method, "loss": loss, "f1": f1}

    records = [
        record(ratio, seed, method, loss + shift, f1)
        for ratio, flow in ((0.25, 0.6), (0.5, 0.39), (1.0, 0.41))
        for method, loss, f1, last in (("L1", 0.4, 0.3, 0.02), ("flow", flow, 0.7, 0.5))
        for seed, shift in enumerate((0.0, 0.01, last))
    ]  # fmt: skip
    found = STUDY.compared(records, "flow")
    assert (found["designs"], found["wins"], found["all"]) == (2, 1, 3)
    assert found["gain of F1"] == pytest.approx(0.4) and found["worst"] == pytest.approx(0.2)
