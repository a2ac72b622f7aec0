"""The paper, formula by formula: what fails as printed (docs/errata.md, by number).

The oracle is SciPy's integration of the gradient flow at rtol 1e-11. ``stated`` compares the size
of an error with the number that docs/errata.md prints for it, so that the page cannot rot.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import expm, logm
from scipy.special import expit

import mirrorflow as mf
from paper import (
    EXACT,
    HADAMARD,
    LOG_RATIO,
    PAGE,
    PAIRS,
    STARTS,
    Pair,
    Z,
    commuting_sensing,
    end_point,
    gap,
    integrate,
    least_squares,
    legendre,
    matrix_flow,
    mirror,
    power,
    sections,
    stated,
    tensors,
    train,
)


def test_every_erratum_names_a_test_and_every_test_of_an_erratum_is_named():
    named = {n: set(re.findall(r"test_erratum_(\d+)\w*", text)) for n, text in sections().items()}
    assert named == {n: {f"{n:02d}"} for n in range(1, len(named) + 1)}
    on_page = set(re.findall(r"test_\w+", PAGE.read_text())) - {"test_paper"}
    files = Path(__file__).parent.glob("test_paper*.py")
    here = {
        name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert on_page <= here
    assert {name for name in here if name.startswith("test_erratum")} <= on_page


# --- 1 to 4, 9, 11, 12: the closed forms ----------------------------------------------------------


def printed_9(w0, a):
    """The amplitude and rho of Eq. (9)."""
    u0, v0 = (w0[0] + w0[1]) / 2**0.5, (w0[0] - w0[1]) / 2**0.5
    return 2 * np.exp(2 * a) * u0 * v0, np.log(u0 / v0)


def test_erratum_01_equation_9_belongs_to_another_parametrization():
    w0 = STARTS["hadamard"]
    end = train(HADAMARD, w0, [(1.5, 0.4), (60.0, 0.0)])
    A, rho = printed_9(w0, end.a)
    printed = 0.25 * (np.arcsinh(end.x / A) - rho)
    stated(1, gap(printed, end.mu), "0.68")
    stated(1, gap(end_point(lambda mu: A * np.sinh(4 * mu + rho)), end.x), "0.26")
    # At a = 0 the printed R_0 is smallest at 2 x_0, not at x_0.
    A0, _ = printed_9(w0, 0.0)
    np.testing.assert_allclose(A0 * np.sinh(rho), 2 * w0[0] * w0[1], rtol=1e-13)
    # What holds: prefactor 1/2 and A = u0 v0 e^{2a}.
    np.testing.assert_allclose(0.5 * (np.arcsinh(2 * end.x / A) - rho), end.mu, atol=EXACT)
    np.testing.assert_allclose(mirror(legendre("hadamard"), end.x, end.a), end.mu, atol=EXACT)
    assert gap(end_point(lambda mu: A / 2 * np.sinh(2 * mu + rho)), end.x) < EXACT
    # And the printed form is that of u^2 - v^2 with h = 1/2 (u^2 + v^2).
    difference = Pair(power(1).g, power(1).pull, lambda w: w)
    w0 = np.array([[1.0, 1.1, 0.9, 1.3], [0.5, 0.7, 0.6, 0.4]])
    end = train(difference, w0, [(1.5, 0.4), (5.0, 0.0)])
    A, rho = 2 * np.exp(2 * end.a) * w0[0] * w0[1], np.log(w0[0] / w0[1])
    np.testing.assert_allclose(0.25 * (np.arcsinh(end.x / A) - rho), end.mu, atol=EXACT)


def constants_11(k, w0):
    c = 2 * k * (2 * k - 2)
    return c, k / (k - 1), w0[0] ** (2 - 2 * k) / c, w0[1] ** (2 - 2 * k) / c


@pytest.mark.parametrize("k", [2, 3, 5])
def test_erratum_02_equation_11_has_three_signs_to_flip(k):
    w0 = STARTS["power"]
    end = train(power(k), w0, [(1.0, 0.05), (30.0, 0.0)])
    c, q, cu, cv = constants_11(k, w0)

    def printed(mu, a, cu, cv, d):
        with np.errstate(all="ignore"):
            return d * (1 / (mu + a + cu)) ** q - d * (1 / (-mu + a + cv)) ** q

    x0 = w0[0] ** (2 * k) - w0[1] ** (2 * k)
    # With these constants d_k is too large already at the start, by c^{2q} ...
    np.testing.assert_allclose(printed(0.0, 0.0, cu, cv, c**q), c ** (2 * q) * x0, rtol=1e-10)
    # ... and with constants chosen to fit the start, x moves against the gradient.
    fit = (c**2 * cu, c**2 * cv, c**q)
    np.testing.assert_allclose(printed(0.0, 0.0, *fit), x0, rtol=1e-10)
    slope = (printed(1e-5, 0.0, *fit) - printed(-1e-5, 0.0, *fit)) / 2e-5
    true_slope = 4 * k**2 * (w0 ** (4 * k - 2)).sum(0)
    assert (slope < 0).all() and (true_slope > 0).all()
    np.testing.assert_allclose(slope, -true_slope / c**2, rtol=1e-6)
    # What holds.
    x = (c * (cu - end.mu - end.a)) ** -q - (c * (cv + end.mu - end.a)) ** -q
    np.testing.assert_allclose(x, end.x, atol=EXACT)
    R = mf.legendre(mf.PowerDifference(k), mf.Separable(), tensors(w0))
    np.testing.assert_allclose(R.primal(torch.from_numpy(end.mu), end.a), end.x, atol=EXACT)
    if k == 2:
        np.testing.assert_allclose(printed(0.0, 0.0, cu, cv, c**q) / x0, 4096)
        stated(2, gap(printed(end.mu, end.a, *fit), end.x), "1.41")


def test_erratum_02_the_range_widens_and_every_x_is_reached():
    w0 = STARTS["power"]
    R = legendre("power")
    _, _, cu, cv = constants_11(2, w0)
    x = torch.tensor([-1e6, -1.0, 1.0, 1e6], dtype=torch.float64)
    for a in (0.0, -0.1, -1.0, -10.0):
        lower, upper = R.range(a)
        np.testing.assert_allclose(upper - lower, cu + cv - 2 * a, rtol=1e-13)
        torch.testing.assert_close(R.primal(R.mirror(x, a), a), x, rtol=1e-8, atol=EXACT)
    # The printed interval (-c_u - a, c_v + a) narrows, and is empty at a = -(c_u + c_v)/2 ...
    assert ((cv + -0.18) - (-cu - -0.18))[0] < 0
    # ... which the flow passes without noticing.
    end = train(power(2), w0, [(2.0, 0.5), (40.0, 0.0)])
    np.testing.assert_allclose(mirror(R, end.x, end.a), end.mu, atol=EXACT)


def log_mirror(w0, x, a, sign):
    U, V = w0[0] ** 2 + sign * 2 * a, w0[1] ** 2 + sign * 2 * a
    return 0.5 * (V * expit(2 * x) - U * expit(-2 * x))


def test_erratum_03_the_sign_of_a_in_the_log_ratio():
    w0 = STARTS["log"]
    end = train(LOG_RATIO, w0, [(1.5, 0.1), (60.0, 0.0)])
    stated(3, gap(log_mirror(w0, end.x, end.a, -1), end.mu), "0.49")
    np.testing.assert_allclose(log_mirror(w0, end.x, end.a, +1), end.mu, atol=EXACT)
    np.testing.assert_allclose(mirror(legendre("log"), end.x, end.a), end.mu, atol=EXACT)
    # The centre, too: without a loss x goes to 1/2 log(U/V).
    still = train(LOG_RATIO, w0, [(1.0, 0.3)], slope=np.zeros_like)
    U, V = w0[0] ** 2 + 2 * still.a, w0[1] ** 2 + 2 * still.a
    np.testing.assert_allclose(0.5 * np.log(U / V), still.x, atol=EXACT)
    np.testing.assert_allclose(legendre("log").centre(still.a), still.x, atol=EXACT)


def test_erratum_04_w0_may_be_larger_than_m0():
    w0 = STARTS["hadamard"][::-1].copy()
    assert (abs(w0[1]) > abs(w0[0])).all()
    end = train(HADAMARD, w0, [(1.5, 0.4), (60.0, 0.0)])
    with np.errstate(invalid="ignore"):
        A, rho = printed_9(w0, end.a)
    assert (A < 0).all() and np.isnan(rho).all()
    rho = np.log(abs((w0[0] + w0[1]) / (w0[0] - w0[1])))
    np.testing.assert_allclose(0.5 * (np.arcsinh(2 * end.x / abs(A)) - rho), end.mu, atol=EXACT)
    np.testing.assert_allclose(mirror(legendre("hadamard", w0), end.x, end.a), end.mu, atol=EXACT)
    # The paper's own start of Appendix D, m = 0 and w = 1, is of this kind.
    own = mf.legendre(mf.Hadamard(), mf.WeightDecay(), (torch.zeros(2), torch.ones(2)))
    assert torch.allclose(own.log_A(0.0).exp(), torch.tensor(0.5))


def test_erratum_05_the_switch_is_at_625_and_the_decay_is_001():
    step, steps = 0.25, 5000
    assert 2500 * step == 625
    third = mf.SwitchOff(0.02, at=625).integral(steps * step)
    assert third == mf.Constant(0.01).integral(steps * step)  # "the same amount", as the text says
    stated(5, mf.SwitchOff(0.02, at=675).integral(steps * step) / third - 1, "0.08")
    stated(5, mf.Constant(0.1).integral(steps * step) / third, "10")


def test_erratum_06_a_start_at_beta_times_the_identity_has_beta_squared():
    U0 = 0.1 * torch.eye(3, dtype=torch.float64)
    R = mf.legendre(mf.SymmetricFactor(), mf.WeightDecay(), U0)
    torch.testing.assert_close(R.centre(0.0), 0.01 * torch.eye(3, dtype=torch.float64))
    # The factor 10 in A_T is worth this much accumulated decay:
    stated(6, np.log(0.1 / 0.01) / 2, "1.15")


def test_erratum_07_the_half_belongs_inside_the_power():
    x, k = np.array([-1.0, 0.3, 2.0]), 3
    root = np.sqrt(x**2 + 1)
    inside = power(k).g(np.stack([((root + x) / 2) ** (1 / 6), ((root - x) / 2) ** (1 / 6)]))
    np.testing.assert_allclose(inside, x, rtol=1e-13)
    outside = power(k).g(np.stack([(root + x) ** (1 / 6) / 2, (root - x) ** (1 / 6) / 2]))
    np.testing.assert_allclose(outside, 2.0 ** (1 - 2 * k) * x, rtol=1e-13)
    stated(7, 2.0 ** (1 - 2 * k), "0.031")


def test_erratum_08_a_legendre_function_is_a_number():
    for name in PAIRS:
        assert legendre(name).value(torch.full((4,), 0.3, dtype=torch.float64), -0.1).shape == ()


def test_erratum_09_the_entropies_of_equations_10_and_17_are_twice_too_large():
    target = Z @ np.array([0.5, 0.1, 0.3, 0.2])
    w0 = STARTS["one-sided"]
    end = train(HADAMARD, w0, [(1.5, 0.4), (1.0, 0.0)], lambda x: Z.T @ (Z @ x - target) / 2)
    B = w0[0] * w0[1] * np.exp(2 * end.a)
    np.testing.assert_allclose(np.log(end.x / B), 2 * end.mu, atol=EXACT)
    np.testing.assert_allclose(mirror(legendre("one-sided"), end.x, end.a), end.mu, atol=EXACT)


def test_erratum_11_the_balanced_log_cosh_has_the_factor_one_half():
    beta, a = 1.3, -0.2
    x, centre = torch.tensor([0.7], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    R = mf.legendre(mf.LogRatio(), mf.Separable(), tensors(np.full((2, 1), beta)))
    rise = (R.value(x, a) - R.value(centre, a)).item()
    log_cosh = np.log(np.cosh(0.7))
    assert rise == pytest.approx(0.5 * (beta**2 + 2 * a) * log_cosh, rel=1e-12)
    # The general formula of Appendix E, with its own sign, is twice its balanced special case.
    U = beta**2 - 2 * a
    general = 0.25 * U * (np.log1p(np.exp(-1.4)) + np.log1p(np.exp(1.4)))
    special = 0.25 * U * np.log(2 * np.cosh(0.7))
    assert general == pytest.approx(2 * special, rel=1e-13)


def test_erratum_12_decay_does_not_change_the_shape_of_the_log_cosh():
    w0 = STARTS["log"]
    R, x = legendre("log"), torch.linspace(-3, 3, 4, dtype=torch.float64)
    S0, D = (w0**2).sum(0), w0[0] ** 2 - w0[1] ** 2
    for a in (0.0, -0.2, -0.4):  # mirror = (S tanh x - D)/4: a moves the tilt D/S alone
        expected = ((S0 + 4 * a) * np.tanh(x.numpy()) - D) / 4
        np.testing.assert_allclose(R.mirror(x, a), expected, atol=EXACT)
    # Balanced: the end point is the same for every a.
    ends = [end_point(lambda mu, s=1 + 2 * a: np.arctanh(2 * mu / s)) for a in (0.0, -0.2, -0.4)]
    assert gap(ends[1], ends[0]) < 1e-9 and gap(ends[2], ends[0]) < 1e-9
    balanced = train(LOG_RATIO, np.ones((2, 4)), [(1.0, 0.2), (200.0, 0.0)])
    assert gap(balanced.x, ends[0]) < 1e-9
    # Unbalanced: the centre goes away from 0, as in the paper's own start x = 0.1.
    u0, v0 = 1 / (1 + np.exp(-0.1)), 1 / (1 + np.exp(0.1))
    R = mf.legendre(mf.LogRatio(), mf.Separable(), tensors(np.array([[u0], [v0]])))
    assert R.centre(0.0).item() == pytest.approx(0.1)
    stated(12, R.centre(-0.1).item(), "0.54")


# --- 10, 13, 14, 21: when the theorems apply ------------------------------------------------------


def test_erratum_10_the_papers_own_examples_are_not_jointly_independent():
    w = STARTS["one-sided"]  # m0 = w0, Eq. (10)
    gradients = [HADAMARD.pull(w, e).ravel() for e in np.eye(4)]
    assert np.linalg.matrix_rank(np.stack([*gradients, w.ravel()]), rtol=1e-9) == 4  # and not 5
    U0 = np.sqrt(0.1) * np.eye(3)  # Corollary C.3: the commuting directions e_i e_i^T
    gradients = [(np.outer(e, e) @ U0).ravel() for e in np.eye(3)]
    assert np.linalg.matrix_rank(np.stack([*gradients, U0.ravel()]), rtol=1e-9) == 3  # and not 4


@pytest.mark.parametrize("name", list(PAIRS))
def test_erratum_10_R_a_is_R_0_of_the_start_moved_by_h(name):
    pair, _, _ = PAIRS[name]
    w0, a = STARTS[name], -0.15
    moved = train(pair, w0, [(-a, 1.0)], slope=np.zeros_like).w
    x = train(pair, w0, [(1.0, 0.1)]).x
    one, two = mirror(legendre(name), x, a), mirror(legendre(name, moved), x, 0.0)
    np.testing.assert_allclose(one, two, atol=EXACT)


def test_erratum_13_the_log_ratio_is_not_contracting():
    w0, a = STARTS["log"], torch.tensor(-0.1, dtype=torch.float64, requires_grad=True)
    R = legendre("log")
    for x, positive in ((0.0, False), (8.0, True)):
        value = R.value(torch.full((4,), x, dtype=torch.float64), a)
        (rate,) = torch.autograd.grad(value, a)
        assert (rate.item() > 0) == positive
    # Nor in the normalization that the paper prints, once the sign of a is right.
    d = 1e-6

    def printed(a):
        U, V = w0[0] ** 2 + 2 * a, w0[1] ** 2 + 2 * a
        return 0.25 * (U * np.log1p(np.exp(-1.0)) + V * np.log1p(np.exp(1.0))).sum()

    assert (printed(-0.1 + d) - printed(-0.1 - d)) / (2 * d) > 1
    # The paper's start has u, v < 1 and h < 0.
    u0, v0 = 1 / (1 + np.exp(-0.1)), 1 / (1 + np.exp(0.1))
    assert u0 < 1 and v0 < 1 and np.log(u0 / v0) == pytest.approx(0.1)
    stated(13, np.log(u0) + np.log(v0), "-1.39")
    assert not mf.check(mf.LogRatio(), mf.Separable(), tensors(np.array([[u0], [v0]]))).well_posed
    # Assumption A.6 fails: decay alone brings v to 0 in finite time, at a bounded w.
    v = integrate(lambda _, v: -1 / v, np.array([v0]), 0.999 * v0**2 / 2)
    assert v == pytest.approx(v0 * np.sqrt(0.001), rel=1e-6)


def test_erratum_14_constants_are_missing_and_the_wronskian_is_of_the_derivatives():
    h = mf.CustomRegularizer(lambda w: ((w[0] ** 4 + 1) + (w[1] ** 4 - 2)).sum())
    assert mf.check(mf.PowerDifference(2), h, tensors(STARTS["power"])).applies
    # W(g, h) = g h' - g' h for g = u^4, h = u^4 + 1 is not 0; W(g', h') is.
    u = np.linspace(0.5, 2, 4)
    assert (abs(u**4 * 4 * u**3 - 4 * u**3 * (u**4 + 1)) > 0.1).all()
    np.testing.assert_allclose(4 * u**3 * 12 * u**2 - 12 * u**2 * 4 * u**3, 0, atol=1e-12)


def test_erratum_21_B_need_not_be_positive_semidefinite():
    A = np.stack([np.diag([1.0, -1.0, 0.0]), np.diag([0.0, 1.0, 0.0])])
    B, w0 = np.diag([1.0, 0.5, -1.0]), np.array([1.0, 0.7, 0.0])
    for a in (0.0, -1.0, -10.0):
        for mu in np.random.default_rng(0).normal(size=(20, 2)):
            w = expm(a * B + np.einsum("i,ijk->jk", mu, A)) @ w0
            assert w @ B @ w >= 0  # so that d R_a / d a <= 0


# --- 15 to 19: proofs, factors and words ----------------------------------------------------------


def test_erratum_15_mixed_derivatives_count():
    def along(x, a):  # the flow of h = x_1 x_2, whose d_i d_i h are 0
        return np.array([[np.cosh(a), np.sinh(a)], [np.sinh(a), np.cosh(a)]]) @ x

    mu, a = np.array([1.0, 0.0]), -1.0
    stated(15, float(np.linalg.norm(along(mu, a) - (along(np.zeros(2), a) + mu))), "1.29")
    h = mf.CustomRegularizer(lambda x: x[0] * x[1])
    x0 = torch.tensor([0.3, 0.2], dtype=torch.float64)
    assert not mf.check(mf.Identity(), h, x0).commuting
    affine = mf.CustomRegularizer(lambda x: 2 * x[0] - x[1] + 3)
    assert mf.check(mf.Identity(), affine, x0).commuting


def test_erratum_16_the_flow_of_theorem_D2_has_half_of_its_decay():
    w = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    (grad_g,) = torch.autograd.grad(w.prod(), w)
    (grad_h,) = torch.autograd.grad((w**2).sum(), w)
    assert (grad_g == 0).all() and torch.allclose(grad_h, 2 * w.detach())
    alpha, t = 0.1, 5.0
    end = integrate(lambda _, w: -alpha * 2 * w, np.array([0.5]), t)
    stated(16, 0.5 * np.exp(-alpha * t) / end[0] - 1, "0.65")


@pytest.mark.parametrize("factor", [1, 2])
def test_erratum_17_corollary_C3_is_half_of_the_gradient_flow(factor):
    beta, n = 0.1, 4
    A, y = commuting_sensing()
    X, M, a = matrix_flow(A, y, np.sqrt(beta) * np.eye(n), [(3.0, 0.1), (20.0, 0.0)], factor)
    log = logm(X) - np.log(beta * np.exp(2 * a)) * np.eye(n)
    np.testing.assert_allclose(log, 2 * factor * M, atol=1e-8)  # Eq. (17) as printed: M itself
    # factor 2 is what differentiating f(U U^T) in U gives.
    U = torch.eye(n, dtype=torch.float64, requires_grad=True)
    sensing = torch.from_numpy(A)
    residual = (sensing * (U @ U.T)).sum((1, 2)) - torch.from_numpy(y)
    (gradient,) = torch.autograd.grad((residual**2).sum() / (2 * len(y)), U)
    grad_f = torch.einsum("i,ijk->jk", residual, sensing) / len(y)
    torch.testing.assert_close(gradient, 2 * grad_f)
    if factor == 1:
        R = mf.legendre(
            mf.SymmetricFactor(), mf.WeightDecay(), np.sqrt(beta) * torch.eye(n).double()
        )
        np.testing.assert_allclose(R.primal(torch.from_numpy(M), a), X, atol=EXACT)


def test_erratum_18_after_the_switch_a_linear_model_goes_to_the_nearest_solution():
    rng = np.random.default_rng(0)
    A, truth = rng.standard_normal((10, 30)), np.r_[np.ones(3), np.zeros(27)]
    y, x = A @ truth, np.zeros(30)
    for _ in range(5000):  # proximal gradient steps with the L1 penalty 0.1
        x = x - 0.1 * A.T @ (A @ x - y) / 10
        x = np.sign(x) * np.maximum(abs(x) - 0.01, 0)
    nearest, smallest = x + np.linalg.pinv(A) @ (y - A @ x), np.linalg.pinv(A) @ y
    for _ in range(5000):
        x = x - 0.1 * A.T @ (A @ x - y) / 10
    assert gap(nearest, x) < EXACT
    stated(18, gap(smallest, x), "0.58")


def test_erratum_19_the_metric_is_the_hessian():
    w = STARTS["hadamard"]
    end = train(HADAMARD, w, [(1.0, 0.4)])
    slope = least_squares(end.x)
    velocity = -(end.w**2).sum(0) * slope
    hessian = legendre("hadamard").metric(torch.from_numpy(end.x), end.a).numpy()
    lost = -slope @ velocity  # of f per unit of time, the squared length of dx/dt
    assert velocity @ (hessian * velocity) == pytest.approx(lost, rel=1e-10)
    stated(19, velocity @ (velocity / hessian) / lost, "0.38")
