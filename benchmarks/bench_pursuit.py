"""`limit` as a solver of basis pursuit, and of what others do not offer: an end point at any A.

On sparse truths A is so small (log A = -300) that the end point is the L1 minimizer, and everybody
solves the same problem to the same accuracy. On data without a sparse truth log A = -27.6
(A = 1e-12): what `limit` gives there is the exact end point of training, some percent in norm from
the L1 minimizer, which the others compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import clarabel
import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linprog
from sklearn.linear_model import LassoLars

import mirrorflow as mf
from benchmarks._diagonal import peak_flops
from benchmarks._measure import kept, measure, once

SMALL = 1e-8  # of the penalty at which the lasso of celer stands for basis pursuit, to the largest


def problem(n: int, d: int, nonzero: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Draw Z, y = Z x and the truth x."""
    rng = np.random.default_rng(seed)
    Z, x = rng.standard_normal((n, d)), np.zeros(d)
    x[rng.choice(d, nonzero, replace=False)] = rng.standard_normal(nonzero)
    return Z, Z @ x, x


def end_point(Z, y, log_A: float) -> mf.Solution:
    """Compute the end point of m * w, started at m = 0, w = 1."""
    d = Z.shape[1]
    w0 = (torch.zeros(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64))
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), w0)
    return mf.limit(R, Z, y, (log_A + np.log(2)) / 2)  # A = e^{2a} / 2


def by_lars(Z, y) -> np.ndarray:
    """Follow the lasso to its end."""
    return LassoLars(alpha=0.0, fit_intercept=False, max_iter=10**5, copy_X=True).fit(Z, y).coef_


def by_celer(Z, y) -> np.ndarray:
    """Solve the lasso at a small penalty, warm started from larger ones."""
    from celer import celer_path

    largest = np.abs(Z.T @ y).max() / len(y)
    alphas = largest * np.geomspace(1, SMALL, 20)
    return celer_path(np.asfortranarray(Z), y, "lasso", alphas=alphas, tol=1e-8)[1][:, -1]


def by_highs(Z, y) -> np.ndarray:
    """Solve the linear program."""
    d = Z.shape[1]
    found = linprog(np.ones(2 * d), A_eq=np.hstack([Z, -Z]), b_eq=y, method="highs")
    return found.x[:d] - found.x[d:]


def by_clarabel(Z, y) -> np.ndarray:
    """Solve the linear program by an interior point method."""
    n, d = Z.shape
    A = sparse.csc_matrix(sparse.vstack([np.hstack([Z, -Z]), -sparse.eye(2 * d)]))
    cones = [clarabel.ZeroConeT(n), clarabel.NonnegativeConeT(2 * d)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    nothing = sparse.csc_matrix((2 * d, 2 * d))
    right = np.r_[y, np.zeros(2 * d)]
    solver = clarabel.DefaultSolver(nothing, np.ones(2 * d), A, right, cones, settings)
    plus, minus = np.split(np.asarray(solver.solve().x), 2)
    return plus - minus


SLOW = {"celer": by_celer, "HiGHS": by_highs, "Clarabel": by_clarabel}


def compare(
    n: int, d: int, nonzero: int, log_A: float, targets: dict[str, float], repeats: int = 5
) -> dict:
    """Time one problem: `limit` and LARS in turns, the slow ones once."""
    Z, y, truth = problem(n, d, nonzero)
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {
        "limit": lambda: end_point(Z, y, log_A),
        "LassoLars": lambda: by_lars(Z, y),
    }
    slow = {name: (lambda f=f: f(Z, y)) for name, f in SLOW.items()}
    with warnings.catch_warnings():  # LassoLars and celer warn of what the errors below show
        warnings.simplefilter("ignore")
        seconds = measure(kept(calls, found), repeats) | once(kept(slow, found))
    solution: mf.Solution = found["limit"]
    found["limit"] = solution.value.numpy()
    others = [name for name in seconds if name != "limit"]
    least = min(float(np.abs(x).sum()) for x in found.values() if _residual(Z, y, x) < 1e-6)
    floor = 3 * n * n * d / peak_flops()  # the rows' Gram matrix, and their orthonormal form
    floor += solution.stats.steps * (n * n * d + n**3 / 3) / peak_flops()
    return {
        "case": f"{n} x {d}, {nonzero} non-zeros, log A = {log_A:g}",
        "seconds": seconds["limit"],
        "status": solution.status.name,
        "Newton steps": solution.stats.steps,
        **{f"{name}, seconds": seconds[name] for name in others},
        **{f"ratio to {name}": seconds[name] / seconds["limit"] for name in others},
        **{f"target to {name}": target for name, target in targets.items()},
        **{f"residual of {name}": _residual(Z, y, x) for name, x in found.items()},
        **{f"norm of {name} above the least": float(np.abs(x).sum()) / least - 1
           for name, x in found.items()},
        **{f"error of {name}": _error(x, truth) for name, x in found.items()},
        "limit, seconds": floor,
        "limit": "orthonormal rows and Newton steps, at the rate of a large product",
        "times the limit": seconds["limit"] / floor,
    }  # fmt: skip


def _residual(Z, y, x) -> float:
    """Return |Zx - y| / |y|."""
    return float(np.linalg.norm(Z @ x - y) / np.linalg.norm(y))


def _error(x, truth) -> float:
    """Return the distance from the truth, relative to it."""
    return float(np.linalg.norm(x - truth) / np.linalg.norm(truth))


def run() -> list[dict]:
    """Measure a sparse truth, and two sizes without one."""
    faster = {name: 1.0 for name in ("LassoLars", "celer", "HiGHS")}
    return [
        compare(500, 5000, 40, -300.0, {"LassoLars": 1 / 5, "HiGHS": 50, "Clarabel": 50}),
        compare(200, 1000, 1000, -27.6, faster),
        compare(500, 5000, 5000, -27.6, faster),
    ]
