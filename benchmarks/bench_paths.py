"""A whole path of end points against separate solves, and against the lasso's path by celer.

The paths are of different things: 30 scales A of the end point, all of which fit exactly, and 30
penalties of the lasso, down to 1e-3 of the largest. Times are compared, not coefficients.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

import mirrorflow as mf
from benchmarks._measure import kept, measure

POINTS = 30
CASES = ((200, 1000, 0), (500, 5000, 40))  # rows, columns, non-zeros of the truth (0: no truth)
LOW, HIGH = -60.0, 4.0  # of log A, in units of the shortest solution


def problem(n: int, d: int, nonzero: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw X, and y that is X times a sparse truth, or noise."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    if not nonzero:
        return X, rng.standard_normal(n)
    truth = np.zeros(d)
    truth[rng.choice(d, nonzero, replace=False)] = 1.0
    return X, X @ truth


def separate(X: np.ndarray, y: np.ndarray, log_As: np.ndarray) -> list[np.ndarray]:
    """Solve for every end point on its own."""
    size, found = np.log(np.abs(np.linalg.lstsq(X, y, rcond=None)[0]).max()), []
    for log_A in log_As:
        w = torch.full((X.shape[1],), np.exp(0.5 * (log_A + size + np.log(2))), dtype=torch.float64)
        R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), (torch.zeros_like(w), w))
        found.append(mf.limit(R, X, y, 0.0).value.numpy())
    return found


def lasso(X: np.ndarray, y: np.ndarray, points: int) -> Any:
    """Follow the lasso's path by celer."""
    from celer import celer_path

    top = np.abs(X.T @ y).max() / len(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of accuracies that are out of reach
        return celer_path(X, y, "lasso", alphas=np.geomspace(top, 1e-3 * top, points))


def compare(n: int, d: int, nonzero: int, points: int = POINTS, repeats: int = 2) -> dict[str, Any]:
    """Time one size."""
    X, y = problem(n, d, nonzero)
    X = np.asfortranarray(X)
    log_As = np.linspace(HIGH, LOW, points)
    calls = {
        "path": lambda: mf.entropy_path(X, y, log_As, fit_intercept=False),
        "separate": lambda: separate(X, y, log_As),
    }
    if find_spec("celer"):
        calls["celer"] = lambda: lasso(X, y, points)
    found: dict[str, Any] = {}
    seconds = measure(kept(calls, found), repeats)
    coefs, alone = found["path"][1], np.stack(found["separate"], axis=1)
    row: dict[str, Any] = {
        "case": f"path of {points}, {n} x {d}, "
        + (f"{nonzero} non-zeros" if nonzero else "no truth"),
        "seconds": seconds["path"],
        "separate solves, seconds": seconds["separate"],
        "ratio": seconds["separate"] / seconds["path"],
        "relative difference": float(np.linalg.norm(coefs - alone) / np.linalg.norm(alone)),
    }
    if "celer" not in seconds:
        return {**row, "celer_path": "left out: celer is not installed"}
    times = seconds["path"] / seconds["celer"]
    return {**row, "celer_path, seconds": seconds["celer"], "times celer_path's time": times}


def run() -> list[dict[str, Any]]:
    """Measure both sizes."""
    return [compare(*case) for case in CASES]
