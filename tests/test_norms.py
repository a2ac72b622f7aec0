"""Norms of groups and the simplex: what holds, by formulas and by SciPy's flows."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import mirrorflow as mf
from mirrorflow.legendre import RescaledFunction

CPU = torch.float64
GROUPS, WIDE = 4, 3


def norms(u):
    return torch.linalg.vector_norm(u.reshape(GROUPS, WIDE), dim=1)


def elementwise(w):
    return torch.sqrt(w[0] ** 2 + w[1] ** 2)


def start(seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(GROUPS * WIDE))


@cache
def grouped():
    """Return R_a of the groups: `legendre` checks the pair, which takes longest here."""
    return mf.legendre(mf.CustomReparam(norms), mf.WeightDecay(), start())


def problem(u, seed=0):
    """Return Z, and y of which the nearest solution to x0 is positive, and one where it is not."""
    rng = np.random.default_rng(seed + 10)
    Z, x0 = rng.standard_normal((2, GROUPS)), norms(u).numpy()
    return Z, Z @ (x0 + Z.T @ [0.1, -0.1]), Z @ (x0 - 3 * Z.T @ (Z @ x0) / (Z @ Z.T).trace())


def nearest(Z, y, point):
    return point + np.linalg.pinv(Z) @ (y - Z @ point)


@pytest.mark.slow
def test_the_norm_of_everything_commutes_with_itself():
    norm, w = torch.linalg.vector_norm, torch.tensor([1.0, 0.5, 0.3], dtype=CPU)
    assert mf.check(mf.CustomReparam(lambda w: norm(w).reshape(1)), mf.CustomRegularizer(norm), w)
    pair = (
        mf.CustomReparam(elementwise, elementwise=True),
        mf.CustomRegularizer(lambda w: elementwise(w).sum(), elementwise=True),
        (w, 2 * w),
    )
    assert mf.check(*pair).applies
    R, mu, r0 = mf.legendre(*pair), torch.tensor([0.3, -0.2, 0.1], dtype=CPU), elementwise(pair[2])
    assert torch.allclose(R.primal(mu, -0.1), r0 + mu - 0.1, rtol=1e-10)


@pytest.mark.parametrize("a", [0.0, -1.0])
def test_with_weight_decay_it_is_the_law_of_a_linear_model(a):
    u = start()
    R = grouped()
    x = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=CPU)
    assert torch.allclose(R.mirror(x, a), np.exp(-a) * x - norms(u), rtol=1e-9)
    Z, y, _ = problem(u)
    y = np.exp(a) * y
    found = mf.limit(R, Z, y, a)
    assert found.status.ok
    expected = nearest(Z, y, np.exp(a) * norms(u).numpy())
    assert (expected > 0).all() and np.abs(found.value.numpy() - expected).max() < 1e-9


def test_training_ends_there():
    u = start()
    Z, y, _ = problem(u)
    fields, stop = u.numpy(), 2.0

    def velocity(t, flat):
        parts = flat.reshape(GROUPS, WIDE)
        sizes = np.linalg.norm(parts, axis=1, keepdims=True)
        pull = (Z.T @ (Z @ sizes[:, 0] - y))[:, None] * parts / sizes
        return -(pull + 0.1 * (t < stop) * parts).ravel()

    options = {"method": "DOP853", "rtol": 1e-11, "atol": 1e-13}
    middle = solve_ivp(velocity, (0, stop - 1e-12), fields, **options).y[:, -1]
    end = solve_ivp(velocity, (stop, 200), middle, **options).y[:, -1].reshape(GROUPS, WIDE)
    R = grouped()
    assert isinstance(R, RescaledFunction) and R.degree == 1
    found = mf.limit(R, Z, y, -0.1 * stop).value.numpy()
    assert np.abs(np.linalg.norm(end, axis=1) - found).max() < 1e-7


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.sample(1)
def test_where_a_group_dies_the_flow_leaves_the_domain(dense):
    u = start()
    Z, _, y = problem(u)
    assert nearest(Z, y, norms(u).numpy()).min() < 0
    factors = u[:GROUPS], u[GROUPS : 2 * GROUPS]
    R = grouped()
    if not dense:
        x0 = elementwise(factors).numpy()
        y = Z @ (x0 - 3 * Z.T @ (Z @ x0) / (Z @ Z.T).trace())
        assert nearest(Z, y, x0).min() < 0
        g = mf.CustomReparam(elementwise, elementwise=True)
        R = mf.legendre(g, mf.WeightDecay(), factors)
    with pytest.warns(RuntimeWarning, match="left the domain"):
        found = mf.limit(R, Z, y, 0.0)
    assert found.status is mf.Status.left_domain and np.isnan(found.stats.kkt)
    assert 0 <= found.value.min() < 1e-4


def test_on_the_simplex_training_ends_in_the_nearest_by_relative_entropy():
    rng = np.random.default_rng(0)
    x0, Z = rng.dirichlet(np.ones(5)), rng.standard_normal((2, 5))
    y = Z @ rng.dirichlet(np.ones(5))

    def velocity(_, w):
        x = w * w / (w @ w)
        s = Z.T @ (Z @ x - y)
        return -2 * w * (s - x @ s) / (w @ w)

    options = {"method": "LSODA", "rtol": 1e-11, "atol": 1e-13}
    w = solve_ivp(velocity, (0, 3000), np.sqrt(x0), **options).y[:, -1]
    factor = torch.from_numpy(np.sqrt(x0))
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), (factor, factor))
    found = mf.limit(R, np.vstack([Z, np.ones(5)]), np.append(y, 1.0), 0.0)
    assert found.status.ok
    assert np.abs(found.value.numpy() - w * w / (w @ w)).max() < 1e-7
    report = mf.check(mf.CustomReparam(lambda w: w**2 / (w @ w)), mf.WeightDecay(), factor)
    assert not report.applies and "rank 4 at random points as well" in report.advice
