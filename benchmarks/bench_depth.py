"""End points of products of three factors: `limit` against the training it replaces.

The training is as in `bench_limit`: 200,000 gradient steps, decay in the first half, from
w = (0, 1, 1), in NumPy and in Numba.
"""

from __future__ import annotations

import numpy as np
import torch

import mirrorflow as mf
from benchmarks._diagonal import LR, STEPS, D, accumulated, entropy, problem
from benchmarks._measure import measure, once

ALPHAS = (0.01, 0.03)


def train_numpy(Z, y, alpha, steps=STEPS):
    """Take the literal steps in NumPy."""
    u, v, w = np.zeros(Z.shape[1]), np.ones(Z.shape[1]), np.ones(Z.shape[1])
    pull = np.ascontiguousarray(Z.T) / len(y)
    for step in range(steps):
        gradient = pull @ (Z @ (u * v * w) - y)
        decay = alpha if step < steps // 2 else 0.0
        u, v, w = (
            u - LR * (gradient * v * w + decay * u),
            v - LR * (gradient * u * w + decay * v),
            w - LR * (gradient * u * v + decay * w),
        )
    return u * v * w


def start() -> tuple[torch.Tensor, ...]:
    """Return the factors 0, 1 and 1."""
    one = torch.ones(D, dtype=torch.float64)
    return torch.zeros_like(one), one, one


def compared(alpha: float, train_numba, steps: int = STEPS) -> dict:
    """Return the seconds of one end point and of the steps, and the ratio to two factors."""
    Z, y = problem()
    a = accumulated(alpha)
    R, two = mf.legendre(mf.Depth(3), mf.WeightDecay(), start()), entropy()
    found = mf.limit(R, Z, y, a)
    trained = train_numba(Z, y, alpha, steps)
    quick = measure({"limit": lambda: mf.limit(R, Z, y, a), "two": lambda: mf.limit(two, Z, y, a)})
    slow = once(
        {
            "numpy": lambda: train_numpy(Z, y, alpha, steps),
            "numba": lambda: train_numba(Z, y, alpha, steps),
        }
    )
    x = found.value.numpy()
    return {
        "case": f"end point, depth 3, 40 x 100, alpha = {alpha:g}, a = {a:g}",
        "seconds": quick["limit"],
        "two factors, seconds": quick["two"],
        "ratio to two factors": quick["limit"] / quick["two"],
        f"NumPy, {steps:,} steps, seconds": slow["numpy"],
        "ratio to NumPy": slow["numpy"] / quick["limit"],
        f"Numba, {steps:,} steps, seconds": slow["numba"],
        "ratio to Numba": slow["numba"] / quick["limit"],
        "the steps end at (relative distance)": float(np.linalg.norm(trained - x))
        / float(np.linalg.norm(x)),
        "residual": found.stats.residual,
    }


def run() -> list[dict]:
    """Measure two strengths of decay."""
    import numba

    train_numba = numba.njit(train_numpy)
    train_numba(*problem(), 0.01, 10)
    return [compared(alpha, train_numba) for alpha in ALPHAS]
