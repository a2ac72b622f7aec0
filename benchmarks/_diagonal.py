"""The diagonal network of Appendix D: x = m * w, 40 measurements, 100 unknowns, 5 not zero."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

import mirrorflow as mf

N, D, NONZERO = 40, 100, 5
LR, STEPS = 1e-3, 200_000  # half of them with decay
ALPHAS = (0.01, 0.1, 1.0)
END = LR * STEPS

Array = NDArray[np.float64]


def problem(seed: int = 0) -> tuple[Array, Array]:
    """Return Z and y = Z x*, x* with 5 ones: |x*|_1 / |x*|_2 = 2.24, as in the paper."""
    rng = np.random.default_rng(seed)
    Z, truth = rng.standard_normal((N, D)), np.zeros(D)
    truth[rng.choice(D, NONZERO, replace=False)] = 1.0
    return Z, Z @ truth


def start() -> tuple[torch.Tensor, torch.Tensor]:
    """Return m = 0, w = 1, so that A = e^{2a} / 2."""
    return torch.zeros(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64)


def entropy() -> mf.LegendreFunction:
    """Return R_a of the network."""
    return mf.legendre(mf.Hadamard(), mf.WeightDecay(), start())


def accumulated(alpha: float) -> float:
    """Return a at the end of training with decay alpha in its first half."""
    return -alpha * END / 2


def peak_flops() -> float:
    """Measure the rate of a matrix product that fills the machine."""
    from benchmarks._measure import measure

    square = np.random.default_rng(0).standard_normal((600, 600))
    return 2 * 600**3 / measure({"product": lambda: square @ square})["product"]
