r"""Training m, m * w and m * w * v on sparse regression: all alphas and seeds in one batch.

The loss is f(x) = scale |Zx - y|^2 / (2n). A factor that is a product of k factors takes the step
w_j <- w_j - eta (grad f(x) prod_{i != j} w_i + alpha w_j); m alone takes the proximal step of
alpha |m|_1, since its subgradient would never be at rest in 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEPTHS", "Curves", "Problems", "speeds", "train"]

Array = NDArray[np.float64]
DEPTHS = {"m": 1, "m·w": 2, "m·w·v": 3}
Watch = Callable[[int], None]


@dataclass(frozen=True)
class Problems:
    """One sparse regression problem for each seed.

    Attributes
    ----------
    Z : array of shape (seeds, n, d)
        Normal entries.
    truth : array of shape (seeds, d)
        ``nonzero`` ones, the rest 0.
    y : array of shape (seeds, n)
        Z x*.
    """

    Z: Array
    truth: Array
    y: Array

    @classmethod
    def draw(cls, seeds: tuple[int, ...], n: int, d: int, nonzero: int) -> Problems:
        """Draw the problems of Appendix D."""
        Z, truth = np.zeros((len(seeds), n, d)), np.zeros((len(seeds), d))
        for i, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            Z[i] = rng.standard_normal((n, d))
            truth[i, rng.choice(d, nonzero, replace=False)] = 1.0
        return cls(Z, truth, np.einsum("sij,sj->si", Z, truth))


@dataclass(frozen=True)
class Curves:
    """What training has left.

    Attributes
    ----------
    steps : array of shape (k,)
        The recorded steps.
    x : array of shape (k, seeds, alphas, d)
        x there.
    factors : array of shape (depth, seeds, alphas, d)
        The factors when the decay was switched off.
    """

    steps: NDArray[np.int64]
    x: Array
    factors: Array


def train(
    problems: Problems,
    depth: int,
    alphas: tuple[float, ...],
    eta: float,
    scale: float,
    on: int,
    off: int,
    record: NDArray[np.int64],
    watch: Watch,
) -> Curves:
    """Take ``on`` steps with decay and ``off`` without, from m = 0 and the others 1.

    Raises
    ------
    FloatingPointError
        If it diverges.
    """
    shape = (len(problems.Z), len(alphas), problems.Z.shape[2])
    w = np.ones((depth, *shape))
    w[0] = 0.0
    down, up = problems.Z.transpose(0, 2, 1).copy(), scale * problems.Z / problems.Z.shape[1]
    y, rates = problems.y[:, None, :], eta * np.array(alphas)[:, None]
    marks, found, switched = set(record.tolist()), [], w
    for step in range(on + off + 1):
        if step == on:
            switched, rates = w.copy(), 0 * rates
        x = w.prod(axis=0)
        if step in marks:
            if not np.isfinite(x).all():
                raise FloatingPointError(f"training diverged by step {step}: lower eta")
            found.append(x)
            watch(step)
        w = _step(w, x, eta * ((x @ down - y) @ up), rates)
    return Curves(record, np.stack(found), switched)


def _step(w: Array, x: Array, gradient: Array, rates: Array) -> Array:
    """Take one step of every factor."""
    match len(w):
        case 1:
            moved = w[0] - gradient
            return (np.sign(moved) * np.maximum(np.abs(moved) - rates, 0))[None]
        case 2:
            return w - gradient * w[::-1] - rates * w
        case _:
            others = np.stack([w[1] * w[2], w[0] * w[2], w[0] * w[1]])
            return w - gradient * others - rates * w


def speeds(factors: Array) -> Array:
    r"""Return how fast x can move: x' = -s df/dx, s = sum_j prod_{i != j} w_i^2."""
    depth = len(factors)
    squares = factors**2
    others = [squares[[i for i in range(depth) if i != j]].prod(axis=0) for j in range(depth)]
    return np.sum(others, axis=0)
