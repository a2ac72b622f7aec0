"""Matrix completion: MatrixSensing against soft-impute, at equal error."""

from __future__ import annotations

import numpy as np
from scipy.sparse.linalg import svds

from benchmarks._diagonal import peak_flops
from benchmarks._measure import measure
from mirrorflow import MatrixSensing

SIZE, RANK, SEEN = 1000, 5, 0.1


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw a matrix of low rank, and what is seen of it."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((SIZE, RANK)) @ rng.standard_normal((RANK, SIZE))
    return X, np.where(rng.random(X.shape) < SEEN, X, np.nan)


def soft_impute(M: np.ndarray, wanted: float, X: np.ndarray) -> tuple[np.ndarray, int]:
    """Follow the path of Mazumder, Hastie and Tibshirani until the error is ``wanted``.

    The path of thresholds is warm started and ends near 0; singular vectors by Lanczos (svds),
    which is faster here than a dense SVD. It gives up after 500 iterations.
    """
    seen = ~np.isnan(M)
    Y, Z, steps = np.where(seen, M, 0.0), np.zeros_like(M), 0
    start = np.zeros(len(M)) + 1.0
    top = svds(Y, 1, return_singular_vectors=False, v0=start)[0]
    for threshold in top * np.geomspace(0.5, 1e-4, 12):
        for _ in range(50):
            U, s, Vt = svds(np.where(seen, Y, Z), 2 * RANK, v0=start)
            new = (U * np.maximum(s - threshold, 0)) @ Vt
            moved, Z, steps = (
                np.linalg.norm(new - Z) / max(np.linalg.norm(Z), 1e-12),
                new,
                steps + 1,
            )
            if np.linalg.norm(Z - X) <= wanted * np.linalg.norm(X) or steps >= 500:
                return Z, steps
            if moved < 1e-4:
                break
    return Z, steps


def run() -> list[dict]:
    """Measure both on the same entries."""
    X, M = problem()
    model = MatrixSensing(2 * RANK, tol=1e-4)
    model.fit(M)
    error = float(np.linalg.norm(model.matrix() - X) / np.linalg.norm(X))
    wanted = 1e-2  # what soft-impute, which shrinks, can reach
    other, steps = soft_impute(M, wanted, X)
    reached = float(np.linalg.norm(other - X) / np.linalg.norm(X))
    seconds = measure(
        {"ours": lambda: model.fit(M), "soft-impute": lambda: soft_impute(M, wanted, X)}, 1
    )
    entries, rank = int((~np.isnan(M)).sum()), 2 * RANK
    floor = model.n_iter_ * 2 * entries * rank * (rank + 1) / peak_flops()
    return [
        {
            "case": f"completion, {SIZE} x {SIZE}, rank {RANK}, {SEEN:.0%} seen",
            "seconds": seconds["ours"],
            "soft-impute, seconds": seconds["soft-impute"],
            "ratio": seconds["soft-impute"] / seconds["ours"],
            "target": 1,
            "relative error": error,
            "soft-impute: relative error": reached,
            "steps": model.n_iter_,
            "soft-impute: steps": steps,
            "entries": entries,
            "limit, seconds": floor,
            "limit": "flops of the sums of the normal equations at the rate of a large product",
            "times the limit": seconds["ours"] / floor,
        }
    ]
