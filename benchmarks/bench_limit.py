"""End points of the diagonal network of Appendix D: `limit` against the training it replaces.

The training is 200,000 gradient steps on |Zx - y|^2 / (2n), decay in the first half: all of them
in NumPy and in Numba, and a part of them with torch autograd (its time is linear in the steps).
"""

from __future__ import annotations

import numpy as np
import torch

import mirrorflow as mf
from benchmarks._diagonal import (
    ALPHAS,
    LR,
    STEPS,
    D,
    N,
    accumulated,
    entropy,
    peak_flops,
    problem,
    start,
)  # fmt: skip
from benchmarks._measure import measure

PART = 2000  # steps of torch autograd that are timed
PATH = 50
FLOOR = "flops of the Newton steps at the rate of a large matrix product"


def train_numpy(Z, y, alpha, steps=STEPS):
    """Take the literal steps in NumPy."""
    m, w, pull = np.zeros(D), np.ones(D), Z / len(y)
    for step in range(steps):
        gradient = (Z @ (m * w) - y) @ pull
        decay = alpha if step < steps // 2 else 0.0
        m, w = m - LR * (gradient * w + decay * m), w - LR * (gradient * m + decay * w)
    return m * w


def train_torch(Z, y, alpha, steps):
    """Take the literal steps with torch autograd and SGD, as a user would."""
    Zt, yt = torch.from_numpy(Z), torch.from_numpy(y)
    m, w = (v.clone().requires_grad_() for v in start())
    optimizer = torch.optim.SGD([m, w], lr=LR, weight_decay=alpha)
    for step in range(steps):
        if step == steps // 2:
            optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.zero_grad()
        ((Zt @ (m * w) - yt).square().sum() / (2 * len(yt))).backward()
        optimizer.step()
    return (m * w).detach().numpy()


def compiled():
    """Return the steps of `train_numpy`, compiled by Numba."""
    import numba

    @numba.njit(cache=False)
    def train(Z, y, alpha, steps):
        m, w, pull = np.zeros(Z.shape[1]), np.ones(Z.shape[1]), Z.T / len(y)
        pull = np.ascontiguousarray(pull)
        for step in range(steps):
            gradient = pull @ (Z @ (m * w) - y)
            decay = alpha if step < steps // 2 else 0.0
            m, w = m - LR * (gradient * w + decay * m), w - LR * (gradient * m + decay * w)
        return m * w

    return train


def single(alpha: float, train_numba, flops: float) -> dict:
    """Compare one end point with the training that leads to it."""
    Z, y = problem()
    R, a = entropy(), accumulated(alpha)
    solution = mf.limit(R, Z, y, a)
    np.testing.assert_allclose(
        train_torch(Z, y, alpha, PART), train_numpy(Z, y, alpha, PART), rtol=1e-8, atol=1e-12
    )
    end = train_numpy(Z, y, alpha)
    np.testing.assert_allclose(train_numba(Z, y, alpha, STEPS), end, rtol=1e-6, atol=1e-10)
    quick = measure({"limit": lambda: mf.limit(R, Z, y, a)}, 15)["limit"]
    slow = measure(
        {
            "numpy": lambda: train_numpy(Z, y, alpha),
            "numba": lambda: train_numba(Z, y, alpha, STEPS),
            "torch": lambda: train_torch(Z, y, alpha, PART),
        },
        3,
    )
    autograd = slow["torch"] * STEPS / PART
    floor = least(solution.stats.steps, flops)
    x = solution.value.numpy()
    return {
        "case": f"end point, 40 x 100, alpha = {alpha:g} (a = {a:g})",
        "seconds": quick,
        "status": solution.status.name,
        "NumPy, 200,000 steps, seconds": slow["numpy"],
        "ratio to NumPy": slow["numpy"] / quick,
        "target NumPy": 500,
        "Numba, 200,000 steps, seconds": slow["numba"],
        "ratio to Numba": slow["numba"] / quick,
        "torch autograd, 200,000 steps, seconds": autograd,
        "ratio to torch autograd": autograd / quick,
        "target torch autograd": 10_000,
        "torch scaled from steps": PART,
        "training is from the end point (relative)": _distance(end, x),
        "residual": solution.stats.residual,
        "kkt": solution.stats.kkt,
        "Newton steps": solution.stats.steps,
        "limit, seconds": floor,
        "limit": FLOOR,
        "times the limit": quick / floor,
    }


def least(steps: int, flops: float) -> float:
    """Return the seconds of Newton steps if only arithmetic took time.

    A step: the symmetric half of Q W Q^T, its factorization, and three products with Q.
    """
    return steps * (N * N * D + N**3 / 3 + 6 * N * D) / flops


def _distance(x, reference) -> float:
    """Return the relative distance of x from a reference."""
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def path(flops: float) -> dict:
    """Compare a path of 50 values of a with 50 single solves."""
    Z, y = problem()
    R, rates = entropy(), [float(a) for a in np.linspace(0.0, -50.0, PATH)]
    together = mf.limit(R, Z, y, rates)
    alone = np.stack([mf.limit(R, Z, y, a).value.numpy() for a in rates])
    np.testing.assert_allclose(together.value.numpy(), alone, rtol=1e-7, atol=1e-10)
    seconds = measure(
        {
            "path": lambda: mf.limit(R, Z, y, rates),
            "singles": lambda: [mf.limit(R, Z, y, a) for a in rates],
        }
    )
    each, steps = seconds["singles"] / PATH, int(np.sum(together.stats.steps))
    return {
        "case": f"path of {PATH} values of a from 0 to -50, 40 x 100",
        "seconds": seconds["path"],
        f"{PATH} single solves, seconds": seconds["singles"],
        "ratio": seconds["singles"] / seconds["path"],
        "single solves it costs": seconds["path"] / each,
        "target": 10,
        "Newton steps": steps,
        "limit, seconds": least(steps, flops),
        "limit": FLOOR,
        "times the limit": seconds["path"] / least(steps, flops),
    }


def run() -> list[dict]:
    """Measure the three alphas of the paper, and a path."""
    train_numba, flops = compiled(), peak_flops()
    return [*(single(alpha, train_numba, flops) for alpha in ALPHAS), path(flops)]
