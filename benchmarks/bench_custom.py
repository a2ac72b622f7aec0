"""End points of pairs without a closed form: following w once, against what `limit` did before.

That was a Newton method on R_a, each of whose trials integrates w from w0 by automatic
differentiation; `limit` still falls back to it. Between them stands following w by automatic
differentiation, without complex steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

import mirrorflow as mf
from benchmarks._diagonal import problem, start
from benchmarks._measure import kept, measure
from mirrorflow._threads import small_on_one_thread
from mirrorflow.legendre import _weights
from mirrorflow.legendre._weights import WeightsProblem
from mirrorflow.limit._constraints import orthonormal
from mirrorflow.limit._problems import solve_problem


def cases():
    """Return name, pair, Z, y and a."""
    Z, y = problem()
    m_w = mf.CustomReparam(lambda w: w[0] * w[1], elementwise=True)
    for a in (-0.5, -2.0):
        yield f"m * w, 40 x 100, a = {a:g}", (m_w, mf.WeightDecay(), start()), Z, y, a
    rng = np.random.default_rng(0)
    squares = mf.CustomReparam(lambda w: w[0] ** 2 - w[1] ** 2)
    w0 = tuple(torch.from_numpy(rng.standard_normal(40)) for _ in range(2))
    yield (
        "u^2 - v^2, not marked elementwise, 20 x 40, a = -1",
        (squares, mf.WeightDecay(), w0), Z[:20, :40], 0.3 * y[:20], -1.0,
    )  # fmt: skip


@contextmanager
def automatic() -> Iterator[None]:
    """Switch complex steps off."""
    stepped, _weights.STEPPED = _weights.STEPPED, 0
    try:
        yield
    finally:
        _weights.STEPPED = stepped


def compared(name: str, pair, Z, y, a: float) -> dict:
    """Return the seconds of all ways to one end point, and how far apart they end."""
    R = mf.legendre(*pair)
    mf.limit(R, Z, y, a)
    whole = R.dual_problem(Z)
    assert isinstance(whole, WeightsProblem)

    def newton():
        with automatic(), small_on_one_thread(Z.size):
            return solve_problem(whole.general, orthonormal(Z, y), [a], 2000)[0]

    def differentiated():
        with automatic():
            return mf.limit(R, Z, y, a)

    found = {}
    ways = {"w": lambda: mf.limit(R, Z, y, a), "autograd": differentiated, "newton": newton}
    seconds = measure(kept(ways, found))
    x, other = found["w"].value.numpy(), found["newton"].x
    return {
        "case": name,
        "seconds": seconds["w"],
        "automatic differentiation, seconds": seconds["autograd"],
        "Newton's method on R_a, seconds": seconds["newton"],
        "ratio": seconds["newton"] / seconds["w"],
        "ratio to automatic differentiation": seconds["autograd"] / seconds["w"],
        "apart (relative)": float(np.linalg.norm(x - other) / np.linalg.norm(other)),
        "residual": found["w"].stats.residual,
    }


def run() -> list[dict]:
    """Measure two separable end points and a dense one."""
    with np.errstate(all="ignore"):
        return [compared(*case) for case in cases()]
