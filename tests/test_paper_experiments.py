"""The paper, formula by formula: what its experiments show (docs/errata.md, by number)."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from scipy.optimize import root

import mirrorflow as mf
from paper import (
    EXACT,
    HADAMARD,
    STARTS,
    Y,
    Z,
    gap,
    integrate,
    least_squares,
    matrix_flow,
    power,
    stated,
    tensors,
    train,
)


def sensing_errors(n=50, r=5, m=500, eta=0.25, steps=5000):
    """Train the four scenarios of Appendix C together; give |X - X*|_F of each."""
    rng = np.random.default_rng(0)
    U = rng.standard_normal((n, r))
    truth = U @ U.T / (U**2).sum()
    B = rng.standard_normal((m, n, n))
    i, j = np.triu_indices(n)
    A = 0.5 * (B + B.transpose(0, 2, 1))[:, i, j]
    doubled = A * np.where(i == j, 1, 2)  # <A, X> from half-vectors
    y = doubled @ truth[i, j]
    U, G = np.stack([0.1 * np.eye(n)] * 4), np.zeros((4, n, n))
    for step in range(steps):
        X = U @ U.transpose(0, 2, 1)
        residual = X[:, i, j] @ doubled.T - y
        G[:, i, j] = G[:, j, i] = residual @ A / m
        alpha = np.array([0, 0.01, 0.02, 0.02 if step < steps // 2 else 0])
        U -= eta * (G @ U + alpha[:, None, None] * U)
    return np.linalg.norm(U @ U.transpose(0, 2, 1) - truth, axis=(1, 2))


@pytest.mark.slow
def test_erratum_20_the_squared_error_falls_below_the_line_with_constant_decay_too():
    errors = sensing_errors()
    assert (errors < 1e-2).tolist() == [False, False, False, True]
    assert (errors**2 < 1e-2).tolist() == [False, True, True, True]
    for size, text in zip(errors**2, ("2.5e-2", "2.7e-3", "7.9e-3", "8.0e-6"), strict=True):
        stated(20, size, text)


def test_erratum_22_random_sensing_matrices_do_not_commute():
    rng, n, m, beta = np.random.default_rng(0), 6, 8, 0.1
    B = rng.standard_normal((m, n, n))
    A, u = 0.5 * (B + B.transpose(0, 2, 1)), rng.standard_normal(n)
    y = np.tensordot(A, np.outer(u, u) / (u @ u), 2)
    pieces = [(312.5, 0.02), (500.0, 0.0)]
    X, M, a = matrix_flow(A, y, np.sqrt(beta) * np.eye(n), pieces, 1)
    assert abs(np.tensordot(A, X, 2) - y).max() < EXACT
    stated(22, gap(beta * np.exp(2 * a) * expm(2 * M), X), "0.11")
    theta = np.zeros(m)
    for ai in np.linspace(0, a, 40):  # the minimizer of Eq. (17), by continuation in a
        theta = root(lambda t, ai=ai: np.tensordot(A, entropic(A, t, beta, ai), 2) - y, theta).x
    surrogate = entropic(A, theta, beta, a)
    assert abs(np.tensordot(A, surrogate, 2) - y).max() < 1e-8
    stated(22, gap(surrogate, X), "0.075")
    g, h, U0 = mf.SymmetricFactor(), mf.WeightDecay(), np.sqrt(beta) * torch.eye(n).double()
    assert not mf.check(g, h, U0, sensing=torch.from_numpy(A)).commuting


def entropic(A, theta, beta, a):
    return beta * np.exp(2 * a) * expm(2 * np.tensordot(theta, A, 1))


def metric_inverse_at_centre(k, a):
    """The inverse metric at mu = 0 for u0 = 0.9, v0 = 0.8."""
    w0 = np.array([[0.9], [0.8]])
    R = mf.legendre(mf.PowerDifference(k), mf.Separable(), tensors(w0))
    return 1 / R.metric(R.centre(a), a).item()


def test_erratum_23_what_shrinks_is_the_speed_near_zero():
    for a, text in ((0.0, "12.7"), (-0.1, "3.11"), (-1.0, "0.0386"), (-10.0, "5.93e-5")):
        stated(23, metric_inverse_at_centre(2, a), text)
    # A power of |a|, (4k - 2)/(2k - 2), for k >= 2, and e^{4a} for k = 1.
    for k in (2, 3, 5):
        ratio = metric_inverse_at_centre(k, -2e4) / metric_inverse_at_centre(k, -1e4)
        assert np.log2(ratio) == pytest.approx(-(4 * k - 2) / (2 * k - 2), rel=1e-3)
    ratio = metric_inverse_at_centre(1, -3.0) / metric_inverse_at_centre(1, -2.0)
    assert ratio == pytest.approx(np.exp(-4), rel=1e-10)


def settled(k, alpha):
    """When |x|_1 is within 5% of its end, for a regression from the start of Appendix E."""
    rng = np.random.default_rng(0)
    A, x = rng.standard_normal((20, 10)), rng.standard_normal(10)
    y = A @ x + 0.3 * rng.standard_normal(20)
    x0, pair = rng.standard_normal(10), power(k)
    w0 = ((np.hypot(x0, 1) + np.stack([x0, -x0])) / 2) ** (1 / (2 * k))

    def velocity(_, s):
        w = s.reshape(w0.shape)
        return -(pair.pull(w, A.T @ (A @ pair.g(w) - y) / 20) + alpha * pair.decay(w)).ravel()

    times = np.geomspace(1e-4, 20, 2000)
    path = solve_ivp(velocity, (0, 20), w0.ravel(), "LSODA", times, rtol=1e-8, atol=1e-10).y
    norm = np.abs(path[:10] ** (2 * k) - path[10:] ** (2 * k)).sum(0)
    return times[np.flatnonzero(abs(norm - norm[-1]) > 0.05 * norm[-1])[-1]]


def test_erratum_23_the_norm_becomes_stationary_sooner_without_any_decay():
    times = {k: settled(k, 0.0) for k in (1, 2, 4, 7)}
    for k, text in ((1, "0.79"), (2, "0.20"), (4, "0.055"), (7, "0.018")):
        stated(23, times[k], text)
        assert settled(k, 0.001) == pytest.approx(times[k], rel=0.02)


def test_erratum_23_a_deep_model_freezes_the_coordinates_that_have_died():
    rng, n, d, alpha = np.random.default_rng(0), 40, 100, 0.3
    A, truth = rng.standard_normal((n, d)), np.r_[np.ones(5), np.zeros(d - 5)]
    y = A @ truth

    def velocity(_, s, alpha):
        m, w, z = s.reshape(3, -1)
        G = A.T @ (A @ (m * w * z) - y) / n
        return -np.concatenate(
            [w * z * G + alpha * m, m * z * G + alpha * w, m * w * G + alpha * z]
        )

    state, ratios = np.r_[np.zeros(d), np.ones(2 * d)], []
    for rate in (alpha, 0.0):
        state = integrate(
            lambda t, s, rate=rate: velocity(t, s, rate), state, 100.0, "LSODA", 1e-60, 1e-8
        )
        m, w, z = state.reshape(3, -1)
        x = m * w * z
        ratios.append(abs(x).sum() / np.linalg.norm(x))
    for ratio, text in zip(ratios, ("1.414", "1.413"), strict=True):
        stated(23, ratio, text)
    alive = abs(x) > 1e-3
    stated(23, float(alive.sum()), "2")
    dead = ((w * z) ** 2 + (m * z) ** 2 + (m * w) ** 2)[~alive]
    assert dead.max() < 1e-48
    # The end is the least-squares fit on the coordinates that survived: neither 0 nor the truth.
    fit = np.zeros(d)
    fit[alive] = np.linalg.lstsq(A[:, alive], y, rcond=1e-10)[0]
    assert gap(x, fit) < 1e-6
    stated(23, x[1], "0.68")


def test_erratum_24_a_falling_learning_rate_runs_the_same_curve(until=40.0, alpha=0.1):
    start = STARTS["hadamard"]

    def velocity(t, state):
        w, eta = state.reshape(start.shape), np.cos(np.pi * t / (2 * until)) ** 2
        slope = HADAMARD.pull(w, least_squares(HADAMARD.g(w)))
        return -eta * (slope + alpha * HADAMARD.decay(w)).ravel()

    cosine = integrate(velocity, start.ravel(), until).reshape(start.shape)
    constant = train(HADAMARD, start, [(until / 2, alpha)])
    off = train(HADAMARD, start, [(until / 4, 2 * alpha), (until / 4, 0.0)])
    assert gap(cosine, constant.w) < EXACT and constant.a == off.a == -2
    stated(24, gap(Z @ HADAMARD.g(cosine), Y), "0.093")
    stated(24, gap(Z @ off.x, Y), "0.0047")
