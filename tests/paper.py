"""The paper's pairs and its flows, in NumPy and SciPy alone: the oracles of test_paper*.py."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import root

import mirrorflow as mf

PAGE = Path(__file__).parents[1] / "docs" / "errata.md"
EXACT = 1e-10  # what "holds" means below; the integration itself leaves about 1e-12


class Pair(NamedTuple):
    """g, J_g^T and grad h in NumPy, written from the paper's definitions."""

    g: Callable
    pull: Callable
    decay: Callable


HADAMARD = Pair(lambda w: w[0] * w[1], lambda w, s: np.stack([w[1] * s, w[0] * s]), lambda w: w)
LOG_RATIO = Pair(
    lambda w: np.log(w[0] / w[1]), lambda w, s: np.stack([s / w[0], -s / w[1]]), lambda w: 1 / w
)


def power(k):
    def slope(w):
        return 2 * k * w ** (2 * k - 1)

    return Pair(
        lambda w: w[0] ** (2 * k) - w[1] ** (2 * k),
        lambda w, s: slope(w) * np.stack([s, -s]),
        slope,
    )


Z = np.array([[1.0, 2.0, 0.5, -1.0], [0.3, -1.0, 1.0, 0.7]])
Y = np.array([1.0, -0.5])
STARTS = {
    "hadamard": np.array([[1.0, 0.8, 1.2, 0.9], [0.4, -0.3, 0.2, -0.5]]),
    "one-sided": np.array([[1.0, 0.8, 1.2, 0.9]] * 2),
    "power": np.array([[0.9, 1.0, 0.8, 1.1], [0.8, 0.9, 1.0, 0.7]]),
    "log": np.array([[1.2, 1.0, 1.5, 1.1], [1.0, 1.3, 1.2, 1.4]]),
}
PAIRS = {
    "hadamard": (HADAMARD, mf.Hadamard(), mf.WeightDecay()),
    "one-sided": (HADAMARD, mf.Hadamard(), mf.WeightDecay()),
    "power": (power(2), mf.PowerDifference(2), mf.Separable()),
    "log": (LOG_RATIO, mf.LogRatio(), mf.Separable()),
}


def least_squares(x):
    return Z.T @ (Z @ x - Y) / 2


def integrate(velocity, state, until, method="DOP853", atol=1e-14, rtol=1e-11):
    done = solve_ivp(velocity, (0, until), state, method=method, rtol=rtol, atol=atol)
    assert done.success, done.message
    return done.y[:, -1]


class End(NamedTuple):
    w: np.ndarray
    x: np.ndarray
    mu: np.ndarray
    a: float


def train(pair, w0, pieces, slope=least_squares):
    """Integrate dw = -(J^T grad f + alpha grad h) dt and mu over pieces (duration, alpha)."""
    state = np.concatenate([w0.ravel(), np.zeros(w0.shape[1])])
    for duration, alpha in pieces:

        def velocity(_, s, alpha=alpha):
            w = s[: w0.size].reshape(w0.shape)
            gradient = slope(pair.g(w))
            return -np.concatenate(
                [(pair.pull(w, gradient) + alpha * pair.decay(w)).ravel(), gradient]
            )

        state = integrate(velocity, state, duration)
    w = state[: w0.size].reshape(w0.shape)
    return End(w, pair.g(w), state[w0.size :], -sum(t * alpha for t, alpha in pieces))


def end_point(primal):
    """Solve Z primal(Z^T theta) = Y: the minimizer of R_a subject to Zx = Y (Theorem 3.6)."""
    theta = root(lambda theta: Z @ primal(Z.T @ theta) - Y, np.zeros(2), tol=1e-13).x
    x = primal(Z.T @ theta)
    assert abs(Z @ x - Y).max() < 1e-11
    return x


def gap(one, two):
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))


def tensors(w0):
    return tuple(torch.from_numpy(row.copy()) for row in w0)


def legendre(name, w0=None):
    return mf.legendre(*PAIRS[name][1:], tensors(STARTS[name] if w0 is None else w0))


def mirror(R, x, a):
    return R.mirror(torch.from_numpy(x), a).numpy()


def sections():
    """Return the page's numbered sections, by number."""
    parts = re.split(r"^### (\d+)\. ", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))


def stated(erratum, size, text):
    """Assert that the page's section states the size, to two digits."""
    assert re.search(rf"(?<![\d.]){re.escape(text)}(?![\d.]*\d)", sections()[erratum]), text
    assert size == pytest.approx(float(text), rel=0.03)


def commuting_sensing(n=4, m=3):
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    A = np.einsum("ij,kj,lj->kil", Q, rng.normal(size=(m, n)), Q)
    X = Q @ np.diag([0.4, 0.3, 0.2, 0.1]) @ Q.T
    return A, np.tensordot(A, X, 2)


def matrix_flow(A, y, U0, pieces, factor, rtol=1e-11):
    """Integrate dU = -(factor grad f(X) U + alpha U) dt and M = -int grad f dt."""
    n = len(U0)
    state = np.concatenate([U0.ravel(), np.zeros(n * n)])
    for duration, alpha in pieces:

        def velocity(_, s, alpha=alpha):
            U = s[: n * n].reshape(n, n)
            G = np.tensordot(np.tensordot(A, U @ U.T, 2) - y, A, 1) / len(y)
            return -np.concatenate([(factor * G @ U + alpha * U).ravel(), G.ravel()])

        state = integrate(velocity, state, duration, method="LSODA", rtol=rtol)
    U, M = state[: n * n].reshape(n, n), state[n * n :].reshape(n, n)
    return U @ U.T, M, -sum(t * alpha for t, alpha in pieces)
