"""Geometries given directly: sign descent against literal steps, a map per coordinate, a reset."""

import numpy as np
import pytest
import torch

import mirrorflow as mf
from mirrorflow.legendre import Potential, SignEntropy

CPU = torch.float64


def start(seed, d=6):
    """Return m0, w0 with |m0| and |w0| apart, in either order and with either sign."""
    rng = np.random.default_rng(seed)
    big, small = rng.uniform(0.7, 1.2, d), rng.uniform(0.05, 0.5, d)
    swap, signs = rng.integers(0, 2, d).astype(bool), rng.choice([-1.0, 1.0], (2, d))
    return np.where(swap, big, small) * signs[0], np.where(swap, small, big) * signs[1]


@pytest.mark.parametrize("seed", range(4))
def test_sign_descent_follows_its_law(seed):
    """Literal steps of 1e-4 along any gradients: a and nu are sums over the steps."""
    m, w = start(seed)
    R = SignEntropy.start((torch.from_numpy(m), torch.from_numpy(w)))
    rng, step = np.random.default_rng(seed + 100), 1e-4
    pushes = rng.standard_normal((8, len(m)))  # changes its sign, so that x does
    a, nu = 0.0, np.zeros(len(m))
    for k in range(16_000):
        push, rate = np.sign(pushes[k // 2000]), 0.8 * (k < 9000)
        nu -= step * np.exp(-a) * push
        m, w = m - step * (push * np.sign(w) + rate * m), w - step * (push * np.sign(m) + rate * w)
        a -= step * rate
    x = m * w
    assert np.abs(R.primal(torch.from_numpy(nu), a).numpy() - x).max() < 3e-3
    apart = np.abs(np.abs(w) - np.abs(m)) - np.exp(a) * R.delta.numpy()
    assert np.abs(apart).max() < 1e-3


@pytest.mark.parametrize("a", [0.5, 0.0, -3.0])
def test_the_maps_of_sign_descent_belong_together(a):
    m, w = start(0)
    R = SignEntropy.start((torch.from_numpy(m), torch.from_numpy(w)))
    assert torch.allclose(R.centre(a), np.exp(2 * a) * torch.from_numpy(m * w), rtol=1e-13)
    x = torch.linspace(-2, 2, 6, dtype=CPU).requires_grad_()
    mu = R.mirror(x, a)
    assert (R.primal(mu, a) - x).abs().max() < 1e-13
    (slope,) = torch.autograd.grad(mu.sum(), x)
    assert torch.allclose(slope, R.metric(x, a), rtol=1e-12)
    delta = np.exp(a) * R.delta
    formula = np.exp(-a) * ((4 * x.abs() + delta**2) ** 1.5 / 12 - delta * x.abs() / 2) - R.rho * x
    away = formula.sum() - R.value(x, a)
    zero = np.exp(-a) * (delta**3 / 12).sum()
    assert abs(float((away - zero).detach())) < 1e-12
    at = mu.detach().requires_grad_()
    (back,) = torch.autograd.grad(R.conjugate(at, a), at)
    assert torch.allclose(back, x.detach(), rtol=1e-12, atol=1e-14)


def test_the_minimizer_of_sign_descents_r_tends_to_that_of_three_halves():
    """With CVXPY; it is no end of training, which the status says."""
    cp = pytest.importorskip("cvxpy")
    Z = np.random.default_rng(3).standard_normal((3, 6))
    y = Z @ np.array([1.0, -1.0, 0, 0, 0, 0])
    R = SignEntropy.start((torch.zeros(6, dtype=CPU), torch.ones(6, dtype=CPU)))
    found = mf.limit(R, Z, y, -14.0)
    x = cp.Variable(6)
    cp.Problem(cp.Minimize(cp.sum(cp.power(cp.abs(x), 1.5))), [Z @ x == y]).solve()
    assert np.abs(found.value.numpy() - x.value).max() < 1e-3
    assert found.status is mf.Status.surrogate and found.stats.residual < 1e-9
    assert found.stats.kkt < 1e-6 * float(R.mirror(found.value, -14.0).abs().max())


def test_balanced_starts_are_refused():
    one = torch.ones(3, dtype=CPU)
    with pytest.raises(ValueError, match="delta must be > 0"):
        SignEntropy.start((one, -one))


def entropy_of_m_times_w(mu, a):
    return torch.sinh(2 * mu) * torch.exp(2 * torch.as_tensor(a, dtype=mu.dtype)) / 2


def hyperbolic_aware(mu, a):
    return torch.sign(mu) * torch.expm1(2 * mu.abs()) / 2


def hyperbolic_aware_by_branches(mu, a, c=2.0):
    return torch.where(mu >= 0, torch.expm1(c * mu) / c, -torch.expm1(-c * mu) / c)


def test_a_potential_with_the_map_of_m_times_w_is_its_entropy():
    R = Potential(entropy_of_m_times_w, (5,))
    closed = mf.legendre(
        mf.Hadamard(), mf.WeightDecay(), (torch.zeros(5, dtype=CPU), torch.ones(5, dtype=CPU))
    )
    rng = np.random.default_rng(0)
    x, a = torch.from_numpy(3 * rng.standard_normal(5)), -1.5
    for name in ("mirror", "metric"):
        assert torch.allclose(getattr(R, name)(x, a), getattr(closed, name)(x, a), rtol=1e-10)
    origin = torch.zeros(5, dtype=CPU)
    assert torch.allclose(R.bregman(x, origin, a), closed.bregman(x, origin, a), rtol=1e-10)
    Z = rng.standard_normal((2, 5))
    y = Z @ rng.standard_normal(5)
    assert (mf.limit(R, Z, y, a).value - mf.limit(closed, Z, y, a).value).abs().max() < 1e-9
    ours, theirs = (mf.penalized(r, Z, y, a, 3.0).value for r in (R, closed))
    assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_hyperbolic_aware_minimization_has_its_metric(size):
    R = Potential(hyperbolic_aware, (4,))
    x = size * torch.tensor([-1.0, 0.0, 0.3, 2.0], dtype=CPU)
    assert torch.allclose(R.primal(R.mirror(x, 0.0), 0.0), x, rtol=1e-12)
    assert torch.allclose(R.metric(x, 0.0), 1 / (1 + 2 * x.abs()), rtol=1e-10)


def test_the_corner_of_a_map_at_0_stops_no_solver():
    """Autograd takes 0 for the slope of sign(mu) and |mu| there."""
    R, smooth = (Potential(m, (2,)) for m in (hyperbolic_aware, hyperbolic_aware_by_branches))
    Z, y = torch.tensor([[1.0, 2.0]], dtype=CPU), torch.tensor([2.0], dtype=CPU)
    found, expected = (mf.limit(r, Z, y, 0.0) for r in (R, smooth))
    assert found.status.ok and torch.allclose(found.value, expected.value, rtol=1e-10)
    zero = torch.zeros(2, dtype=CPU)
    assert R.value(zero, 0.0) == 0 and not R.primal(zero, 0.0).any()


def test_a_potential_with_ends():
    """x = tan mu, and x = tanh mu, whose image has ends."""
    R = Potential(lambda mu, a: torch.tan(mu), (2,), -np.pi / 2, np.pi / 2)
    x = torch.tensor([-5.0, 100.0], dtype=CPU)
    assert torch.allclose(R.mirror(x, 0.0), torch.atan(x), rtol=1e-12)
    with pytest.raises(mf.RangeError, match="outside the range"):
        R.primal(torch.tensor([0.0, 2.0], dtype=CPU), 0.0)
    with pytest.raises(mf.RangeError, match="image of primal"):
        Potential(lambda mu, a: torch.tanh(mu), (2,)).mirror(x, 0.0)
    with pytest.raises(ValueError, match="lower < 0 < upper"):
        Potential(hyperbolic_aware, (2,), 1.0, 2.0)


def test_a_reset_puts_a_back_at_the_same_x():
    rng = np.random.default_rng(0)
    x, beta = torch.from_numpy(rng.standard_normal(20)), torch.from_numpy(rng.uniform(0.1, 2, 20))
    factors = mf.reset_geometry(x, beta)
    assert torch.allclose(factors[0] * factors[1], x, rtol=1e-14)
    assert torch.allclose(factors[0] ** 2 - factors[1] ** 2, beta, rtol=1e-12)
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), factors)
    assert torch.allclose(R.log_A(0.0), torch.log(beta / 2), rtol=1e-12, atol=1e-12)
    for bad in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match="beta must be positive"):
            mf.reset_geometry(x, bad)
