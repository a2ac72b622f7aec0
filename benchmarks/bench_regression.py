"""MirrorFlowRegressorCV against LassoCV: the same folds, the same number of points on each path."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from sklearn.linear_model import LassoCV
from sklearn.model_selection import KFold

from benchmarks._measure import measure
from mirrorflow import MirrorFlowRegressorCV
from mirrorflow._threads import one_thread

POINTS = 100  # alphas of a path; ours: two flows at 20 times, 33 of ridge, 34 of elastic nets
SNR = 10.0
PEAKS = 8  # of the spectra
TARGET, SPECTRA = 1.5, 3.0  # times LassoCV's time
MEMORY = 4.0  # times X

Problem = tuple[np.ndarray, np.ndarray]


def problem(n: int, d: int, nonzero: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Draw X, y and the truth."""
    rng = np.random.default_rng(seed)
    X, truth = rng.standard_normal((n, d)), np.zeros(d)
    truth[rng.choice(d, nonzero, replace=False)] = 1.0
    signal = X @ truth
    return X, signal + rng.standard_normal(n) * signal.std() / np.sqrt(SNR), truth


def spectra(n: int, d: int, seed: int = 0) -> Problem:
    """Draw spectra of mixtures, each a sum of a few broad peaks, and a content of three of them.

    Neighbouring columns are nearly equal, as those of near-infrared spectra are; the columns are
    brought to unit spread.
    """
    rng, at = np.random.default_rng(seed), np.linspace(0, 1, d)
    centers, widths = rng.random(PEAKS), 0.1 + 0.2 * rng.random(PEAKS)
    parts = rng.gamma(2.0, size=(n, PEAKS))
    X = parts @ np.exp(-(((at - centers[:, None]) / widths[:, None]) ** 2))
    X += 1e-3 * rng.standard_normal((n, d))
    y = parts[:, :3] @ [1.0, -0.5, 0.7]
    y += 0.05 * y.std() * rng.standard_normal(n)
    return (X - X.mean(axis=0)) / X.std(axis=0), y


def compare(name: str, X: np.ndarray, y: np.ndarray, repeats: int, target: float) -> dict[str, Any]:
    """Time both in turns, each with one thread, by wall clock and by processor time.

    On a crowded machine the ratio of processor times is the steadier one.
    """
    ours, theirs = MirrorFlowRegressorCV(cv=KFold(5)), LassoCV(alphas=POINTS, cv=KFold(5))
    taken = [_pair(ours, theirs, X, y) for _ in range(repeats)]
    wall, processor = ([median(t[i][k] for t in taken) for i in (0, 1)] for k in (0, 1))
    return {
        "case": f"cross-validation, {name}",
        "seconds": wall[0],
        "LassoCV, seconds": wall[1],
        "times LassoCV's time": wall[0] / wall[1],
        "processor seconds": processor[0],
        "LassoCV, processor seconds": processor[1],
        "times LassoCV's processor time": processor[0] / processor[1],
        "target": target,
        "points of a path": POINTS,
        "error on the samples left out": float(ours.mse_path_.mean(axis=2).min()),
        "LassoCV: error on the samples left out": float(theirs.mse_path_.mean(axis=1).min()),
        "non-zeros": int(ours.support_.sum()),
        "LassoCV: non-zeros": int(np.count_nonzero(theirs.coef_)),
        "limit, seconds": X.nbytes * POINTS * 5 / _bandwidth(),
        "limit": "reading X twice for each point and fold, in single precision, from memory",
    }


def _pair(ours: Any, theirs: Any, X: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """Fit one after the other."""
    return [_seconds(lambda m=model: m.fit(X, y)) for model in (ours, theirs)]


def _seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall time and the processor time of a call with one thread."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LassoCV's, of ends of its path
        started = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - started[0], time.process_time() - started[1]


def memory(n: int, d: int) -> dict[str, Any]:
    """Measure the largest memory that a fit takes beside X, in a few steps of each flow."""
    X, y, _ = problem(n, d, 10)
    model = MirrorFlowRegressorCV(cv=KFold(5), max_iter=3)
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the steps that have run out
        model.fit(X, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "case": f"memory of cross-validation, {n} x {d}, with X",
        "bytes": peak + X.nbytes,
        "times X": peak / X.nbytes + 1,
        "target": MEMORY,
    }


def _bandwidth() -> float:
    """Measure how many bytes a second a sum reads from memory."""
    big = np.ones(2**25)
    return big.nbytes / measure({"sum": big.sum})["sum"]


def run() -> list[dict[str, Any]]:
    """Measure wide and tall sizes, collinear spectra, and the memory of the widest."""
    rows = []
    for n, d, nonzero, repeats in (
        (100, 500, 10, 7), (500, 5000, 40, 3), (150, 20_000, 10, 3),
        (50_000, 50, 10, 5), (5000, 100, 10, 7),
    ):  # fmt: skip
        X, y, _ = problem(n, d, nonzero)
        name = f"{n} x {d}, {nonzero} non-zeros, SNR {SNR:g}"
        rows.append(compare(name, X, y, repeats, TARGET))
    rows.append(compare("215 x 100, collinear spectra", *spectra(215, 100), 5, SPECTRA))
    return [*rows, memory(150, 20_000)]
