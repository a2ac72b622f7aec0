"""The counts and measures of the sparse regression study, by hand, and its methods."""

import numpy as np
import pytest
from sklearn.linear_model import lasso_path

from mirrorflow.lab import framework
from mirrorflow.lab.experiments.studies import _sparse_methods as methods

study = framework.load("bench_sparse")


def record(method, r2, **where):
    cell = {"truth": "sparse", "ratio": 1.0, "snr": 3.0, "correlation": 0.0} | where
    return {"data": "synthetic", "method": method, "r2": r2, "seconds": 1.0, **cell}


def test_as_good_as_the_best_is_counted_over_sparse_designs_with_noise_and_rows_enough():
    records = [
        record("a", 0.9), record("b", 0.895), record("c", 0.88),  # a and b
        record("a", 0.5, ratio=0.5), record("b", 0.7, ratio=0.5), record("c", 0.6, ratio=0.5),
        record("c", 1.0, ratio=0.1), record("c", 1.0, snr=study.CLEAN),  # of other kinds
        record("c", 1.0, truth="dense"), {"data": "digits", "method": "c", "r2": 1.0},
    ]  # fmt: skip
    assert study.near_best(records) == ({"a": 1, "b": 2, "c": 0}, 2)


def test_a_median_over_draws_is_compared():
    records = [record("a", r2) for r2 in (0.1, 0.8, 0.9)] + [record("b", 0.805)] * 3
    assert study.near_best(records) == ({"a": 1, "b": 1}, 1)


def test_steadiness_is_the_share_that_pairs_of_supports_have_in_common():
    supports = [np.array(s, dtype=bool) for s in ([1, 1, 0], [1, 0, 0], [0, 1, 1])]
    assert methods.steadiness(supports) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert methods.steadiness([np.zeros(3, dtype=bool)] * 2) == 1.0
    assert methods.steadiness(supports[:1]) is None


def test_the_relaxed_lasso_blends_the_lasso_with_least_squares_on_its_support():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, 8))
    y = X[:, 0] - X[:, 3] + 0.5 * rng.standard_normal(30)
    alphas, coefs = methods._relaxed(X, y)
    _, lasso, _ = lasso_path(X, y, alphas=alphas)
    blocks = np.split(coefs, len(methods.BLENDS), axis=1)
    np.testing.assert_allclose(blocks[-1], lasso)
    for i in (0, 20, 99):
        support = np.flatnonzero(lasso[:, i])
        fitted = np.zeros(8)
        if len(support):
            fitted[support] = np.linalg.lstsq(X[:, support], y)[0]
        for part, block in zip(methods.BLENDS, blocks, strict=True):
            expected = part * lasso[:, i] + (1 - part) * fitted
            np.testing.assert_allclose(block[:, i], expected, atol=1e-10)
