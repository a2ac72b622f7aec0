"""Problems for `limit`, and what an end point has to satisfy."""

import numpy as np
import torch
from scipy.optimize import linprog

import mirrorflow as mf

H, DECAY, TERMS, Status = mf.Hadamard(), mf.WeightDecay(), mf.Separable(), mf.Status


def tensors(*arrays):
    return tuple(torch.from_numpy(np.array(a, dtype=float)) for a in arrays)


def zero_start(d):
    """Return R_a of m0 = 0, w0 = 1: A = e^{2a} / 2."""
    return mf.legendre(H, DECAY, tensors(np.zeros(d), np.ones(d)))


def sparse(n, d, k, seed):
    """Return Z, y and the x with k non-zeros that made y."""
    rng = np.random.default_rng(seed)
    x = np.zeros(d)
    x[rng.choice(d, k, replace=False)] = rng.choice([-1.0, 1.0], k) * rng.uniform(0.5, 2, k)
    Z = rng.standard_normal((n, d))
    return Z, Z @ x, x


def dense(n, d, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal(n)


def smallest_l1(Z, y):
    """Return the solution of least L1 norm, by HiGHS, which has to be given rows of size 1."""
    rows = np.maximum(np.abs(Z).max(axis=1), 1e-300)
    Z, y, d = Z / rows[:, None], y / rows, Z.shape[1]
    size = np.abs(y).max()
    found = linprog(np.ones(2 * d), A_eq=np.hstack([Z, -Z]), b_eq=y / size, bounds=(0, None))
    assert found.success
    return size * (found.x[:d] - found.x[d:])


def distance(one, two):
    """Return the largest difference relative to the size of the second."""
    one, two = (np.asarray(v, dtype=float).ravel() for v in (one, two))
    return np.abs(one - two).max() / np.abs(two).max()


def optimal(R, Z, y, a, sol, tol=1e-9):
    """Assert the optimality conditions, from x and theta alone."""
    rows = np.asarray(Z, dtype=float).reshape(len(y), -1)
    assert distance(rows @ sol.value.numpy().ravel(), y) < tol
    pulled = (sol.aux["theta"].numpy() @ rows).reshape(sol.value.shape)
    pulled = (pulled + pulled.T) / 2 if R.shape[-1:] == R.shape[:-1] else pulled
    mu = R.mirror(sol.value, a).numpy()
    assert np.abs(mu - pulled).max() < tol * (1 + np.abs(mu).max())
