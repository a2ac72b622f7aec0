"""The penalized solution against SciPy, CVXPY, ridge regression, and its two ends."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import mirrorflow as mf

DECAY = mf.WeightDecay()


def problem(n, d, seed=0):
    rng = np.random.default_rng(seed)
    Z, truth = rng.standard_normal((n, d)), np.zeros(d)
    truth[:3] = (1.0, -1.0, 0.5)
    return Z, Z @ truth + 0.3 * rng.standard_normal(n)


def hyperbolic(d, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.uniform(low, 1.2, d)) for low in (-0.5, 0.7))


def test_a_linear_model_gives_ridge_regression():
    Z, y = problem(6, 10)
    R = mf.legendre(mf.Identity(), mf.Separable(), torch.zeros(10).double())
    for t in (1e-3, 1.0, 1e3):
        ridge = np.linalg.solve(Z.T @ Z / 6 + np.eye(10) / t, Z.T @ y / 6)
        found = mf.penalized(R, Z, y, 0.0, t)
        assert np.abs(found.value.numpy() - ridge).max() < 1e-11 and found.status.ok


@pytest.mark.parametrize("shape", [(6, 10), (14, 5)])
@pytest.mark.parametrize(("a", "t"), [(0.5, 0.3), (-1.0, 5.0), (-2.0, 40.0)])
def test_the_minimizer_is_the_one_scipy_finds(shape, a, t):
    """SciPy minimizes over w of x = m * w, where the divergence is written by its definition."""
    (n, d), (Z, y) = shape, problem(*shape)
    R = mf.legendre(mf.Hadamard(), DECAY, hyperbolic(d))
    centre = R.centre(a)

    def objective(v):
        x = torch.from_numpy(v).requires_grad_()
        r = torch.from_numpy(Z) @ x - torch.from_numpy(y)
        value = (r @ r) / (2 * n) + R.bregman(x, centre, a) / t
        value.backward()
        return float(value.detach()), x.grad.numpy()

    there = minimize(objective, centre.numpy(), jac=True, method="L-BFGS-B",
                     options={"ftol": 1e-16, "gtol": 1e-11, "maxiter": 5000})  # fmt: skip
    found = mf.penalized(R, Z, y, a, t)
    assert found.status is mf.Status.converged
    assert objective(found.value.numpy())[0] <= there.fun + 1e-12
    assert np.abs(found.value.numpy() - there.x).max() < 1e-4
    # The conditions of a minimum, by the mirror map, which the solver does not use.
    slope = Z.T @ (Z @ found.value.numpy() - y) / n
    assert np.abs(R.mirror(found.value, a).numpy() / t + slope).max() < 1e-9


def test_a_convex_solver_agrees_on_the_one_sided_entropy():
    cp = pytest.importorskip("cvxpy")
    Z, y = problem(5, 6)
    w = torch.full((6,), 0.4).double()
    R, a, t = mf.legendre(mf.Hadamard(), DECAY, (w, w)), -0.5, 4.0
    x, centre = cp.Variable(6), R.centre(a).numpy()
    divergence = cp.sum(cp.kl_div(x, centre)) / 2  # R = sum (x log(x/x_c) - x) / 2
    cp.Problem(cp.Minimize(cp.sum_squares(Z @ x - y) / 10 + divergence / t)).solve()
    assert np.abs(mf.penalized(R, Z, y, a, t).value.numpy() - x.value).max() < 1e-4


@pytest.mark.parametrize("a", [0.0, -3.0, -8.0])
def test_the_ends_are_the_centre_and_limit(a):
    Z, y = problem(6, 10)
    R = mf.legendre(mf.Hadamard(), DECAY, hyperbolic(10))
    found = mf.penalized(R, Z, y, a, [1e12, 1e-12])
    end = mf.limit(R, Z, y, a)
    assert (found.value[0] - end.value).abs().max() < 1e-8 and found.status.ok
    assert (found.aux["theta"][0] - end.aux["theta"]).abs().max() < 1e-5
    assert (found.value[1] - R.centre(a)).abs().max() < 1e-9


def tall():
    return np.random.default_rng(4).standard_normal((30, 10))


def repeated():
    """Return six rows twice, the second time doubled."""
    Z = np.random.default_rng(4).standard_normal((6, 15))
    return np.concatenate([Z, 2 * Z])


@pytest.mark.parametrize("design", [tall, repeated])
@pytest.mark.parametrize("noise", [0.0, 1.0, "only"])
def test_data_that_no_x_fits(design, noise):
    """theta grows like t along what no x can change; x goes to the end of the nearest data."""
    Z, rng = design(), np.random.default_rng(5)
    n, d = Z.shape
    image = Z @ rng.standard_normal(d)
    away = rng.standard_normal(n)
    away -= Z @ np.linalg.lstsq(Z, away, rcond=None)[0]
    y = away if noise == "only" else image + noise * away
    R, a = mf.legendre(mf.Hadamard(), DECAY, hyperbolic(d)), -1.0
    times = [1.0, 1e4, 1e8, 1e15]
    found = mf.penalized(R, Z, y, a, times)
    assert found.status is mf.Status.converged and found.stats.residual.max() < 1e-11
    end = mf.limit(R, Z, 0.0 * y if noise == "only" else image, a).value
    assert (found.value[-1] - end).abs().max() < 1e-9
    for x, theta, t in zip(found.value, found.aux["theta"], times, strict=True):
        left = y - Z @ x.numpy()
        assert np.abs(theta.numpy() - t * left / n).max() < 1e-6 * max(1.0, t)  # as defined
        if t < 1e6:
            assert np.abs(R.mirror(x, a).numpy() - Z.T @ theta.numpy()).max() < 1e-9 * max(1.0, t)


@pytest.mark.parametrize(
    ("g", "w0"),
    [
        (mf.Depth(3), tuple(torch.full((4,), v).double() for v in (0.1, 0.8, 0.9))),
        (mf.CustomReparam(lambda w: w[0] * w[1], elementwise=True), hyperbolic(4)),
        (mf.SymmetricFactor(), 0.5 * torch.eye(2).double()),
    ],
)
def test_any_r_is_taken(g, w0):
    """On a clock, by integration, and for matrices."""
    R = mf.legendre(g, DECAY, w0)
    Z, y = problem(3, 4)
    Z = Z.reshape(3, *R.shape)
    Z, a, t = (Z + np.swapaxes(Z, -1, -2)) / 2 if Z.ndim == 3 else Z, -0.2, 0.5
    found = mf.penalized(R, Z, y, a, t)
    slope = np.tensordot((np.tensordot(Z, found.value.numpy(), Z.ndim - 1) - y) / 3, Z, 1)
    assert np.abs(R.mirror(found.value, a).numpy() / t + slope).max() < 1e-7


def test_bad_arguments_are_named():
    Z, y = problem(6, 10)
    R = mf.legendre(mf.Hadamard(), DECAY, hyperbolic(10))
    for t in (0.0, -1.0, [], [[1.0]]):
        with pytest.raises(ValueError, match="t must be a positive number"):
            mf.penalized(R, Z, y, 0.0, t)
    with pytest.raises(ValueError, match="a must be one number"):
        mf.penalized(R, Z, y, [0.0, 1.0], 1.0)
    with pytest.raises(ValueError, match="t must be finite"):
        mf.penalized(R, Z, y, 0.0, np.inf)
    with pytest.raises(TypeError, match="LegendreFunction"):
        mf.penalized(None, Z, y, 0.0, 1.0)
    with pytest.warns(RuntimeWarning, match="penalized: stopped at the step limit"):
        assert not mf.penalized(R, Z, y, -5.0, 1e6, max_steps=1).status.ok
