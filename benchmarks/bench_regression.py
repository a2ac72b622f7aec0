"""MirrorFlowRegressorCV against LassoCV: the same folds, the same number of points on each path."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LassoCV
from sklearn.model_selection import KFold

from benchmarks._measure import measure
from mirrorflow import MirrorFlowRegressorCV

POINTS = 100  # of a path: five scales and 20 times, or 100 alphas
SNR = 10.0


def problem(n: int, d: int, nonzero: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Draw X, y and the truth."""
    rng = np.random.default_rng(seed)
    X, truth = rng.standard_normal((n, d)), np.zeros(d)
    truth[rng.choice(d, nonzero, replace=False)] = 1.0
    signal = X @ truth
    return X, signal + rng.standard_normal(n) * signal.std() / np.sqrt(SNR), truth


def compare(n: int, d: int, nonzero: int) -> dict:
    """Time one size, and compare what the two find."""
    X, y, truth = problem(n, d, nonzero)
    ours, theirs = MirrorFlowRegressorCV(cv=KFold(5)), LassoCV(alphas=POINTS, cv=KFold(5))
    seconds = measure(
        {"ours": lambda: ours.fit(X, y), "theirs": lambda: theirs.fit(X, y)}, 5 if n < 200 else 3
    )
    both = {"MirrorFlowRegressorCV": ours, "LassoCV": theirs}
    errors = {
        f"{name}: relative error": float(
            np.linalg.norm(model.coef_ - truth) / np.linalg.norm(truth)
        )
        for name, model in both.items()
    }
    return {
        "case": f"cross-validation, {n} x {d}, {nonzero} non-zeros, SNR {SNR:g}",
        "seconds": seconds["ours"],
        "LassoCV, seconds": seconds["theirs"],
        "times LassoCV's time": seconds["ours"] / seconds["theirs"],
        "points of a path": POINTS,
        **errors,
        "limit, seconds": 2 * X.nbytes * POINTS * 5 / _bandwidth(),
        "limit": "reading X twice for each point and fold, from memory",
    }


def _bandwidth() -> float:
    """Measure how many bytes a second a sum reads from memory."""
    big = np.ones(2**25)
    return big.nbytes / measure({"sum": big.sum})["sum"]


def run() -> list[dict]:
    """Measure two wide sizes, which have a target, and two tall ones, which have none."""
    wide = [compare(n, d, k) | {"target": 1.5} for n, d, k in ((100, 500, 10), (500, 5000, 40))]
    return [*wide, compare(2000, 20, 5), compare(5000, 100, 10)]
