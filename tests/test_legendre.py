"""R_a in closed form: calculus, the ends of every range, and what float64 can still say there."""

import math
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm, logm
from torch.autograd import grad, gradcheck, gradgradcheck

import mirrorflow as mf
from cases import COMMUTE, COMMUTING, EVERY, FAIL, FAST
from mirrorflow.legendre import (
    HyperbolicEntropy,
    Inversion,
    LogCoshEntropy,
    MatrixEntropy,
    OneSidedEntropy,
    PowerEntropy,
    QuadraticEntropy,
    power,
)

DOUBLE = torch.float64
each_form = pytest.mark.parametrize("case", FAST, ids=str)
elementwise = pytest.mark.parametrize("case", [c for c in FAST if c.g.elementwise], ids=str)
few = settings(max_examples=10, deadline=None, derandomize=True, database=None)
A = -0.3
CLASSES = {
    "hadamard": HyperbolicEntropy,
    "hadamard-balanced": OneSidedEntropy,
    "depth-2": HyperbolicEntropy,
    "power-1": HyperbolicEntropy,
    "power-1-decay": HyperbolicEntropy,
    "power-1-zero": OneSidedEntropy,
    "power-1-drift": HyperbolicEntropy,
    "power-2": PowerEntropy,
    "power-3": PowerEntropy,
    "power-2-drift": PowerEntropy,
    "log-ratio": LogCoshEntropy,
    "quadratic": QuadraticEntropy,
    "symmetric-commuting": MatrixEntropy,
}


def tensor(*values):
    return torch.tensor(values, dtype=DOUBLE)


@cache
def made(id, seed):
    (case,) = (c for c in EVERY if c.id == id)
    return mf.legendre(case.g, case.h, case.start(seed))


def legendre(case, seed=0):
    return made(case.id, seed)


def symmetric(m):
    return (m + m.mT) / 2 if m.ndim > 1 else m


def at(R, seed=0, size=0.05, a=A):
    """Give a mu, symmetric for matrices, and its x."""
    mu = size * symmetric(torch.from_numpy(np.random.default_rng(seed).standard_normal(R.shape)))
    return mu, R.primal(mu, a)


def one(k, u=0.9, v=0.8):
    """Give R_a of one coordinate of u^2k - v^2k."""
    return mf.legendre(mf.PowerDifference(k), mf.Separable(), (tensor(u), tensor(v)))


def log_ratio(u=1.8, v=1.7):
    return mf.legendre(mf.LogRatio(), mf.Separable(), (tensor(u), tensor(v)))


def identity_start(n):
    return mf.legendre(mf.SymmetricFactor(), mf.WeightDecay(), torch.eye(n, dtype=DOUBLE))


def apply(metric, direction, inverse=False):
    """Apply a metric, or its inverse, to a direction."""
    if metric.ndim == 1:
        return direction / metric if inverse else metric * direction
    flat = direction.reshape(-1)
    moved = torch.linalg.pinv(metric, rtol=1e-12) @ flat if inverse else metric @ flat
    return moved.reshape(direction.shape)


def gap(one, two):
    return float((one - two).abs().max() / two.abs().max())


# Which form.


@pytest.mark.parametrize("case", COMMUTE, ids=str)
def test_every_pair_gets_its_form(case):
    assert type(legendre(case)) is CLASSES.get(case.id, Inversion)


@pytest.mark.parametrize("case", [c for c in FAIL if c.id != "symmetric"], ids=str)
def test_a_pair_that_does_not_commute_has_none(case):
    with pytest.raises(mf.IncompatiblePair) as caught:
        legendre(case)
    assert not caught.value.report.commuting and str(caught.value) == caught.value.report.explain()


def test_a_start_that_is_one_sided_in_some_coordinates_is_refused():
    w0 = (tensor(1.0, 1.0, 0.5), tensor(1.0, 2.0, 0.1))
    with pytest.raises(ValueError, match=r"1 of 3 coordinates.*\|m0\| = \|w0\|"):
        mf.legendre(mf.Hadamard(), mf.WeightDecay(), w0)


# Calculus: mirror = grad R, metric = its Hessian, primal = grad R*.


@each_form
@few
@given(start=st.integers(0, 2), seed=st.integers(0, 10**6))
def test_the_mirror_is_the_gradient_of_the_value(case, start, seed):
    R = legendre(case, start)
    mu, x = at(R, seed)
    leaf = x.clone().requires_grad_()
    (by_autograd,) = grad(R.value(leaf, A), leaf)
    assert gap(R.mirror(x, A), mu) < 1e-9
    assert gap(by_autograd, mu) < 1e-8
    # A step in x that moves mu by 1e-3.
    step = 1e-3 * apply(R.metric(x, A), at(R, seed + 1)[0], inverse=True)
    difference = (R.value(x + step, A) - R.value(x - step, A)) / 2
    assert abs(difference - (mu * step).sum()) < 1e-5 * (mu * step).abs().sum()


@each_form
def test_the_metric_is_the_hessian_of_the_value(case):
    R = legendre(case, 1)
    x = at(R, 1)[1]
    n = x.numel()
    # The form at its symmetric part, as the maps read a matrix.
    curvature = torch.autograd.functional.hessian(lambda z: R.value(symmetric(z), A), x)
    curvature, metric = curvature.reshape(n, n), R.metric(x, A)
    metric = torch.diag(metric) if metric.ndim == 1 else metric
    assert gap(curvature, metric) < 1e-9
    direction = at(R, 2)[0].reshape(-1)
    step = 1e-5 * (x.abs().min() * direction / direction.abs().max()).reshape(x.shape)
    change = (R.mirror(x + step, A) - R.mirror(x - step, A)).reshape(-1) / 2
    assert gap(change, metric @ step.reshape(-1)) < 1e-6


@each_form
def test_the_primal_is_the_gradient_of_the_conjugate(case):
    R = legendre(case, 1)
    mu, x = at(R, 1)
    leaf, a = mu.clone().requires_grad_(), torch.tensor(A, dtype=DOUBLE, requires_grad=True)
    by_mu, by_a = grad(R.conjugate(leaf, a), (leaf, a))
    assert gap(by_mu, x) < 1e-11
    assert abs(R.value(x, A) + R.conjugate(mu, A) - (x * mu).sum()) < 1e-12
    # d R_a(x) / da = -d R_a^*(mu) / da
    a = torch.tensor(A, dtype=DOUBLE, requires_grad=True)
    assert abs(grad(R.value(x, a), a)[0] + by_a) < 1e-8 * by_a.abs()


@each_form
def test_gradients_of_first_and_second_order(case):
    R = legendre(case, 2)
    mu, x = (v.requires_grad_() for v in at(R, 2))
    a = torch.tensor(A, dtype=DOUBLE, requires_grad=True)
    for function, argument in ((R.primal, mu), (R.mirror, x), (R.value, x)):

        def on_symmetric(v, s, function=function):
            return function(symmetric(v), s)

        inputs = (argument.detach().requires_grad_(), a)
        assert gradcheck(on_symmetric, inputs, atol=1e-6, rtol=1e-4)
        assert gradgradcheck(on_symmetric, inputs, atol=1e-5, rtol=1e-3)


@each_form
def test_gradients_of_the_divergence(case):
    R = legendre(case, 2)
    x, y = (at(R, seed)[1].detach().requires_grad_() for seed in (2, 3))
    assert gradcheck(
        lambda p, q: R.bregman(symmetric(p), symmetric(q), A), (x, y), atol=1e-6, rtol=1e-4
    )


# The divergence.


@each_form
@few
@given(start=st.integers(0, 2), seed=st.integers(0, 10**6), size=st.floats(1e-3, 0.1))
def test_the_divergence_is_its_definition(case, start, seed, size):
    R = legendre(case, start)
    (_, x), (nu, y) = at(R, seed, size), at(R, seed + 1)
    parts = R.value(x, A), R.value(y, A), (nu * (x - y)).sum()
    defined = parts[0] - parts[1] - parts[2]
    assert R.bregman(x, y, A) > 0
    assert abs(R.bregman(x, y, A) - defined) < 1e-11 * sum(p.abs() for p in parts)


@each_form
@pytest.mark.parametrize("a", [0.0, A])
@pytest.mark.parametrize("near", [1e-2, 1e-5, 1e-9, 1e-12])
def test_the_divergence_of_close_points_keeps_its_digits(case, near, a):
    """It is half the metric's square length, where a difference of values would be 0 or < 0."""
    R = legendre(case, 3)
    y = at(R, 3, a=a)[1]
    size = y.abs().max() if y.ndim > 1 else y.abs().min()
    step = near * size * at(R, 4)[0] / at(R, 4)[0].abs().max()
    x = y + step
    step = x - y  # as it was rounded
    moved = apply(R.metric(y, a), step)
    # Quadratic forms know mu(x) - mu(y), eigenvectors their angles, to an eps of their size only.
    rounding = 1e-15 / near if not R.elementwise else 1e-9
    assert abs(R.bregman(x, y, a) / ((step * moved).sum() / 2) - 1) < 4 * near + 30 * rounding
    assert R.bregman(y, y, a).abs() < 1e-28 * y.abs().max()


def test_hyperbolic_divergences_scale_where_squares_underflow_or_overflow():
    unit = HyperbolicEntropy(tensor(0.0), tensor(0.3))
    x, y = tensor(2.0), tensor(2.0001)
    wanted = unit.bregman(x, y, 0.0)
    for log_A in (-450.0, 450.0):
        R, scale = HyperbolicEntropy(tensor(log_A), tensor(0.3)), math.exp(log_A)
        assert abs(R.bregman(x * scale, y * scale, 0.0) / scale / wanted - 1) < 1e-9


def excess(y, e):
    """Give softplus(y + e) - softplus(y) - s(y) e in 120 digits, for floats."""
    with localcontext() as context:
        context.prec = 120
        Y, E = Decimal(y), Decimal(e)
        return float((1 + (Y + E).exp()).ln() - (1 + Y.exp()).ln() - E / (1 + (-Y).exp()))


@pytest.mark.parametrize("y", [-60.0, -10.5, -0.4, 0.0, 3.0, 25.0])
@pytest.mark.parametrize("e", [1e-6, 2e-3, 0.1, 0.97, 1.5, 30.0, 90.0, -1e-3, -0.3, -2.0, -70.0])
def test_the_divergence_of_the_log_ratio_is_accurate_relative_to_itself(y, e):
    R = log_ratio()
    scale = float(R.u2 + R.v2) / 4
    x = y / 2 + e / 2
    wanted = scale * excess(y, 2 * (x - y / 2))  # as x - y is rounded
    assert wanted > 0
    assert abs(R.bregman(tensor(x), tensor(y / 2), 0.0) / wanted - 1) < 1e-12


@pytest.mark.parametrize("x", [9.9, 10.05, 12.0, -10.05, 40.0])
def test_the_value_of_the_log_ratio_has_no_jump_where_torch_cuts_softplus(x):
    R = log_ratio()
    with localcontext() as context:
        context.prec = 60
        u, v = Decimal(float(R.u2)), Decimal(float(R.v2))
        X = Decimal(2 * x)
        s = u + v
        constant = (s * s.ln() - s) - (u * u.ln() - u) - (v * v.ln() - v)
        wanted = (u * (1 + (-X).exp()).ln() + v * (1 + X.exp()).ln() - constant) / 4
    assert abs(R.value(tensor(x), 0.0) - float(wanted)) < 1e-14 * abs(x)


# The centre.


@each_form
@pytest.mark.parametrize("a", [0.0, A, -20.0, -150.0])
def test_the_mirror_of_the_centre_is_zero(case, a):
    if case.id == "log-ratio" and a < -1:
        with pytest.raises(mf.RangeError, match=r"outside the range"):
            legendre(case).centre(a)
        return
    R = legendre(case)
    centre = R.centre(a)
    assert (centre.abs() > 0).any()
    # mu is known to an eps of |a|, and to one of the width of its range for u^2k - v^2k
    assert R.mirror(centre, a).abs().max() < 2e-15 * (1 + abs(a)) * 10


# Round trips at the edges.

EDGES = (0.0, 1e-300, 1e-140, -1e-60, 1e-8, -1.0, 3.0, 1e8, -1e8, 1e300)


@pytest.mark.parametrize("a", [0.0, -1.0, -30.0, -150.0, -400.0])
def test_a_round_trip_of_the_hyperbolic_entropy(a):
    x = tensor(*EDGES)
    w0 = (torch.zeros_like(x), torch.ones_like(x))
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), w0)
    assert R.log_A(a)[0] == pytest.approx(2 * a - math.log(2))
    mu = R.mirror(x, a)
    assert ((R.primal(mu, a) - x).abs() <= 1e-12 * x.abs()).all()
    # mirror = 1/2 arcsinh(x/A), in Decimal
    with localcontext() as context:
        context.prec = 400
        for xi, got in zip(EDGES, mu, strict=True):
            q = Decimal(xi) / Decimal(float(R.log_A(a)[0])).exp()
            wanted = float((abs(q) + (q * q + 1).sqrt()).ln().copy_sign(q) / 2)
            assert abs(got - wanted) <= 1e-13 * abs(wanted) + 1e-300


@pytest.mark.parametrize("a", [0.0, -30.0, -150.0])
def test_a_round_trip_of_the_one_sided_entropy(a):
    x = tensor(1e-300, -1e-140, 1.0, -1e8, 1e300)
    R = OneSidedEntropy(torch.zeros(5, dtype=DOUBLE), torch.sign(x))
    assert ((R.primal(R.mirror(x, a), a) - x).abs() <= 1e-12 * x.abs()).all()


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("a", [0.0, -1.0, -150.0])
def test_a_round_trip_of_the_power_difference(k, a):
    """Through mu, x is known as well as mu resolves it: to eps |mu| / metric."""
    R = one(k)
    for value in EDGES:
        x = tensor(value)
        mu = R.mirror(x, a)
        lower, upper = R.range(a)
        assert lower < mu < upper  # strictly: primal takes whatever mirror gives
        back, metric = R.primal(mu, a), R.metric(x, a)
        if abs(value) < 1e4:
            resolution = 1e-15 * (lower.abs() + upper.abs() + mu.abs()) / metric
            assert (back - x).abs() <= resolution + 1e-12 * x.abs()
        else:
            assert torch.isfinite(back) and back.sign() == x.sign()


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("a", [0.0, -1.0, -150.0])
@pytest.mark.parametrize("slack", ["1e-60", "1e-25", "1e-12", "1e-6", "0.3"])
@pytest.mark.parametrize("side", [1, -1])
def test_the_metric_of_the_power_difference_keeps_its_digits_at_the_ends(k, a, slack, side):
    """Choose the distance of mu to an end, far below the rounding of mu, and compute x from it."""
    R = one(k)
    with localcontext() as context:
        context.prec = 80
        lower, upper = (Decimal(float(end)) for end in R.range(a))
        c, q = Decimal(R.c), Decimal(k) / (k - 1)
        near = c * (upper - lower) * Decimal(slack)
        far = c * (upper - lower) - near
        P, N = (near, far) if side > 0 else (far, near)
        x = tensor(float(P**-q - N**-q)).requires_grad_()
        metric = float(1 / (c * q * (P ** (-q - 1) + N ** (-q - 1))))
        mu = upper - P / c if side > 0 else lower + N / c
        conjugate = (P ** (1 - q) + N ** (1 - q)) / (c * (q - 1))
        value = float((P**-q - N**-q) * mu - conjugate)
    mirror = R.mirror(x, a)
    assert abs(mirror - float(mu)) <= 4e-16 * (1 + abs(a))
    assert abs(R.metric(x, a) / metric - 1) < 1e-12
    assert abs(grad(mirror.sum(), x)[0] / metric - 1) < 1e-12
    assert abs(R.value(x, a) / value - 1) < 1e-12


def test_the_divergence_of_the_power_difference_far_out():
    """For x, y -> infinity it is that of P^{1-q}: x = P^{-q} scales."""
    R, x, y = one(2), tensor(3e60), tensor(1e60)
    root_x, root_y = 3e60**0.5, 1e60**0.5
    # mu = upper - x^{-1/2}/c, R* = x^{1/2}/c for q = 2.
    wanted = (3e60 * (1 / root_y - 1 / root_x) - root_x + root_y) / R.c
    assert abs(R.bregman(x, y, -2.0) / wanted - 1) < 1e-12


def test_newton_says_when_it_has_not_converged():
    tau = tensor(0.3, 5.0, 700.0)
    with pytest.warns(RuntimeWarning, match="has not converged after 1 steps"):
        power._solve(tau, 1.5, steps=1)


@few
@given(
    tau=st.floats(0, 1e4) | st.floats(0, 1e-3),
    q=st.sampled_from([1.01, 1.5, 2.0]),
)
def test_newton_solves_the_power_equation(tau, q):
    w = power._solve(tensor(tau), q)
    assert abs(power._tau(w, q) - tau) <= 1e-14 * tau + 1e-307


@pytest.mark.parametrize("a", [0.0, -0.5, -0.7])
def test_a_round_trip_of_the_log_ratio(a):
    x = tensor(-14.0, -5.0, -1e-9, 0.0, 2.0, 14.0)
    full = torch.full_like(x, 1.8)
    R = mf.legendre(mf.LogRatio(), mf.Separable(), (full, full - 0.1))
    mu = R.mirror(x, a)
    assert ((R.primal(mu, a) - x).abs() < 1e-15 / R.metric(x, a) + 1e-14).all()
    for far in (30.0, 1e8):  # mu rounds to the end; what mirror gives is inside
        lower, upper = R.range(a)
        for end in (R.mirror(torch.full_like(x, far), a), R.mirror(torch.full_like(x, -far), a)):
            assert ((lower < end) & (end < upper)).all()
            assert (R.primal(end, a).abs() > 15).all()


@pytest.mark.parametrize("R", [one(2), one(7), log_ratio()], ids=["power-2", "power-7", "log"])
@pytest.mark.parametrize("a", [0.0, -0.4])
def test_mu_at_the_very_end_of_its_range(R, a):
    lower, upper = R.range(a)
    for end, inward in ((upper, lower), (lower, upper)):
        mu = torch.nextafter(end, inward)
        x = R.primal(mu, a)
        assert torch.isfinite(x)
        assert (R.mirror(x, a) - mu).abs() <= 4e-16 * (lower.abs() + upper.abs())
        with pytest.raises(mf.RangeError):
            R.primal(end, a)


@pytest.mark.parametrize("a", [0.0, -5.0, -10.0, -15.0, -50.0, -150.0])
@pytest.mark.parametrize("mu", [(0.3, -0.2, 0.1), (3.0, 1.0, -2.0), (0.0, 0.0, 0.0)])
def test_a_round_trip_of_quadratic_forms(a, mu):
    (case,) = (c for c in FAST if c.id == "quadratic")
    R, mu = legendre(case), tensor(*mu)
    x = R.primal(mu, a)
    assert (R.mirror(x, a) - mu).abs().max() < 1e-11
    assert gap(R.primal(R.mirror(x, a), a), x) < 1e-12


@pytest.mark.parametrize("a", [-3.0, -150.0])
def test_quadratic_forms_of_diagonal_matrices_are_logarithms(a):
    """x_i = w_i^2 / 2 = e^{2a + 2mu_i} / 2, whatever the sizes of the x_i."""
    diagonal = mf.CommutingQuadratic(torch.diag_embed(torch.eye(2, dtype=DOUBLE)))
    R = mf.legendre(diagonal, mf.WeightDecay(), tensor(1.0, 1e-9))
    x = tensor(1.0, 1e-20)
    assert (
        R.mirror(x, a) - (torch.log(2 * x) / 2 - tensor(0.0, math.log(1e-9)) - a)
    ).abs().max() < 1e-11
    for unreachable in ([0.0, 1.0], [-1.0, 1.0], [0.0, 0.0]):
        with pytest.raises(mf.RangeError, match="outside the domain"):
            R.mirror(tensor(*unreachable), a)


@pytest.mark.parametrize("a", [0.0, -5.0, -150.0])
def test_a_round_trip_of_matrices(a):
    R = identity_start(4)
    mu, X = at(R, 1, size=1.0, a=a)
    assert (R.mirror(X, a) - mu).abs().max() < 1e-12 * (1 + abs(a))
    assert gap(R.primal(R.mirror(X, a), a), X) < 1e-11


# Outside.


def quoted(value):
    return f"{float(value):.6g}"


@pytest.mark.parametrize("R", [one(2), log_ratio()], ids=["power", "log-ratio"])
@pytest.mark.parametrize("a", [0.0, -0.5])
@pytest.mark.parametrize("method", ["primal", "conjugate"])
def test_mu_outside_its_range_is_refused_with_the_range(R, a, method):
    lower, upper = R.range(a)
    bounds = f"({quoted(lower)}, {quoted(upper)})"
    for mu in (upper, lower, upper + 1, lower - 1):
        with pytest.raises(mf.RangeError) as caught:
            getattr(R, method)(mu, a)
        assert bounds in str(caught.value) and quoted(mu) in str(caught.value)


def test_the_coordinate_that_is_outside_is_named():
    w0 = (torch.full((2, 3), 0.9, dtype=DOUBLE), torch.full((2, 3), 0.8, dtype=DOUBLE))
    R = mf.legendre(mf.PowerDifference(2), mf.Separable(), w0)
    mu = torch.zeros(2, 3, dtype=DOUBLE)
    mu[1, 2] = 5.0
    with pytest.raises(mf.RangeError, match=r"mu\[1, 2\] = 5 "):
        R.primal(mu, 0.0)


def test_a_range_that_decay_has_emptied():
    for method in ("range", "mirror", "value", "metric"):
        arguments = () if method == "range" else (tensor(0.1),)
        with pytest.raises(mf.RangeError, match=r"a = -5.0.*must be positive"):
            getattr(log_ratio(), method)(*arguments, -5.0)
    with pytest.raises(mf.RangeError, match=r"a = 5.0: the range of mu is empty"):
        one(2).mirror(tensor(0.1), 5.0)


@pytest.mark.parametrize("method", ["mirror", "metric", "value", "bregman"])
def test_x_outside_the_domain_of_the_one_sided_entropy(method):
    R = OneSidedEntropy(torch.zeros(2, dtype=DOUBLE), tensor(1.0, -1.0))
    for x, interval in ((tensor(-0.5, -1.0), r"\(0, inf\)"), (tensor(1.0, 2.0), r"\(-inf, 0\)")):
        arguments = (x, tensor(1.0, -1.0)) if method == "bregman" else (x,)
        with pytest.raises(mf.RangeError, match=interval):
            getattr(R, method)(*arguments, 0.0)
    assert [v.tolist() for v in R.domain(0.0)] == [[0.0, -math.inf], [math.inf, 0.0]]


def test_the_edge_of_the_domain():
    """R_a is finite at x = 0 where the mirror is not."""
    R, zero = OneSidedEntropy(torch.zeros(1, dtype=DOUBLE), tensor(1.0)), tensor(0.0)
    assert R.value(zero, A) == 0
    assert R.bregman(zero, tensor(2.0), A) == pytest.approx(1.0)  # |y| / s
    with pytest.raises(mf.RangeError):
        R.mirror(zero, A)
    M, X = identity_start(2), torch.diag(tensor(2.0, 0.0))
    assert M.value(X, 0.0) == pytest.approx((2 * math.log(2) - 2) / 2)
    assert M.bregman(X, torch.eye(2, dtype=DOUBLE), 0.0) == pytest.approx(math.log(2))
    for bad in (X, torch.diag(tensor(2.0, -1.0))):
        with pytest.raises(mf.RangeError, match="must be positive definite"):
            M.mirror(bad, 0.0)
    with pytest.raises(mf.RangeError, match="eigenvalue -1"):
        M.value(torch.diag(tensor(2.0, -1.0)), 0.0)


# Matrices.


@few
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), a=st.floats(-3, 0))
def test_the_entropy_of_a_matrix_with_scipys_expm_and_logm(seed, n, a):
    R, beta = identity_start(n), 1.0
    mu, X = at(R, seed, size=0.7, a=a)
    log_scale = math.log(beta) + 2 * a
    assert gap(X, torch.from_numpy(beta * math.exp(2 * a) * expm(2 * mu.numpy()))) < 1e-12
    logX = logm(X.numpy())
    assert np.abs(R.mirror(X, a).numpy() - (logX - log_scale * np.eye(n)) / 2).max() < 1e-10
    value = np.trace(X.numpy() @ logX - X.numpy() - log_scale * X.numpy()) / 2
    assert abs(R.value(X, a) - value) < 1e-10 * (1 + abs(value))
    Y = at(R, seed + 1, size=0.7, a=a)[1]
    relative = np.trace(X.numpy() @ (logX - logm(Y.numpy())) - X.numpy() + Y.numpy()) / 2
    assert abs(R.bregman(X, Y, a) - relative) < 1e-10 * (1 + abs(relative))
    assert abs(R.conjugate(mu, a) - np.trace(X.numpy()) / 2) < 1e-10 * np.trace(X.numpy())


def test_the_metric_of_a_matrix_whose_eigenvalues_differ_beyond_the_rounding():
    s = [1.0, 1e-17, 1e-30, 1e-300]
    R = identity_start(4)
    metric = R.apply_metric(torch.diag(tensor(*s)), 0.0, torch.ones(4, 4, dtype=DOUBLE))
    with localcontext() as context:
        context.prec = 400
        for i in range(4):
            for j in range(4):
                p, q = Decimal(s[i]), Decimal(s[j])
                wanted = 1 / p if i == j else (p.ln() - q.ln()) / (p - q)
                assert abs(metric[i, j] / float(wanted / 2) - 1) < 1e-12


@pytest.mark.parametrize("s", [(1.0, 1.0, 1.0), (2.0, 2.0, 0.5)])
def test_second_derivatives_where_eigenvalues_repeat(s):
    R, rng = identity_start(3), np.random.default_rng(0)
    X = torch.diag(tensor(*s)).requires_grad_()
    D = symmetric(torch.from_numpy(rng.standard_normal((3, 3))))
    Y = torch.eye(3, dtype=DOUBLE) + 0.1 * D @ D
    (gradient,) = grad(R.value(X, A), X, create_graph=True)
    (curved,) = grad((gradient * D).sum(), X)
    p, q = torch.meshgrid(tensor(*s), tensor(*s), indexing="ij")
    equal = p == q
    divided = torch.where(equal, 1 / p, (p.log() - q.log()) / torch.where(equal, 1.0, p - q))
    assert gap(curved, D * divided / 2) < 1e-12

    def metric(Z, E):
        return R.apply_metric(symmetric(Z), A, symmetric(E))

    for function, inputs in (
        (lambda Z: R.value(symmetric(Z), A), (X,)),
        (metric, (X, D.requires_grad_())),
        (lambda Z, W: R.bregman(symmetric(Z), symmetric(W), A), (X, Y.requires_grad_())),
    ):
        assert gradcheck(function, inputs, atol=1e-6)
        assert gradgradcheck(function, inputs, atol=1e-6)


def test_a_matrix_has_to_be_symmetric():
    R, bad = identity_start(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"^x must be symmetric, it is off by 5.0e-01"):
        R.mirror(bad, 0.0)
    with pytest.raises(ValueError, match=r"^x must be symmetric"):
        R.mirror(bad * 1e-130, -150.0)  # relative to its own size
    with pytest.raises(ValueError, match=r"^mu must be symmetric"):
        R.primal(bad, 0.0)
    with pytest.raises(ValueError, match=r"^y must be symmetric"):
        R.bregman(torch.eye(2, dtype=DOUBLE), bad, 0.0)


# Many coordinates, batches, precisions, and wrong arguments.


@pytest.mark.parametrize("id", ["hadamard", "hadamard-balanced", "power-2", "log-ratio"])
def test_a_million_coordinates(id):
    """A matrix of that side would take 8 TB."""
    (case,) = (c for c in FAST if c.id == id)
    times = 333_334
    n = 3 * times
    w0 = tuple(f.repeat(times) for f in case.start(0))
    R, small = mf.legendre(case.g, case.h, w0), legendre(case)
    x, few_x = 1.1 * R.centre(A), 1.1 * small.centre(A)
    wanted = small.mirror(few_x, A).expand(times, 3)
    assert gap(R.mirror(x, A).reshape(times, 3), wanted) < 1e-13
    wanted = times * float(small.value(few_x, A))
    assert float(R.value(x, A)) == pytest.approx(wanted, rel=1e-9)
    assert n > 10**6


@elementwise
def test_batches_of_mu_and_of_a(case):
    R = legendre(case)
    mu = torch.stack([at(R, seed)[0] for seed in range(4)])
    a = torch.tensor([0.0, -0.1, -0.2, -0.3], dtype=DOUBLE)[:, None]
    x = R.primal(mu, a)
    rows = range(4)
    for method in (R.mirror, R.value, R.metric):
        alone = torch.stack([method(x[i], float(a[i])) for i in rows])
        assert gap(method(x, a), alone) < 1e-13
    alone = torch.stack([R.conjugate(mu[i], float(a[i])) for i in rows])
    assert gap(R.conjugate(mu, a), alone) < 1e-13
    alone = torch.stack([R.bregman(x[i], 1.1 * x[i], float(a[i])) for i in rows])
    assert gap(R.bregman(x, 1.1 * x, a), alone) < 1e-11


def test_a_batch_of_quadratic_forms():
    (case,) = (c for c in FAST if c.id == "quadratic")
    R = legendre(case)
    mu = torch.stack([at(R, seed)[0] for seed in range(3)])
    assert gap(R.mirror(R.primal(mu, A), A), mu) < 1e-10


def single(w0):
    parts = tuple(f.float() for f in ((w0,) if isinstance(w0, torch.Tensor) else w0))
    return parts if isinstance(w0, tuple) else parts[0]


@each_form
@pytest.mark.parametrize("a", [A, -10.0])
def test_float32_in_and_out(case, a):
    if case.id == "log-ratio" and a < -1:
        a = -0.6
    g = case.g
    if case.id == "quadratic":
        g = mf.CommutingQuadratic(torch.from_numpy(COMMUTING).float())
    R, exact = mf.legendre(g, case.h, single(case.start(0))), legendre(case)
    mu, x = at(exact, 1, a=a)
    y = at(exact, 2, a=a)[1]
    assert R.dtype == torch.float32
    for method, arguments in (
        ("primal", (mu,)),
        ("conjugate", (mu,)),
        ("mirror", (x,)),
        ("value", (x,)),
        ("metric", (x,)),
        ("bregman", (x, y)),
    ):
        got = getattr(R, method)(*(v.float() for v in arguments), a)
        assert got.dtype == torch.float32, method
        scale = 1e-3 if method != "mirror" else 1e-3 * (1 + abs(a)) / mu.abs().max()
        wanted = getattr(exact, method)(*arguments, a)
        assert (got - wanted).abs().max() < scale * wanted.abs().max() + 1e-30, method
    for end in (R.centre(a), *R.range(a)):
        assert end.dtype == torch.float32


@each_form
@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("primal", ("mu",)),
        ("conjugate", ("mu",)),
        ("mirror", ("x",)),
        ("value", ("x",)),
        ("metric", ("x",)),
        ("bregman", ("x", "y")),
    ],
)
def test_nan_and_wrong_shapes_name_the_argument(case, method, names):
    R = legendre(case)
    mu, x = at(R)
    good = [mu if name == "mu" else x for name in names]
    call = getattr(R, method)
    assert torch.isfinite(call(*good, A)).all()
    for i, name in enumerate(names):
        for spoiled, message in (
            (torch.full_like(x, math.nan), f"^{name} holds NaN"),
            (x.reshape(-1)[:2], rf"^{name} must have shape \({x.shape[0]},.*got \(2,\)"),
            (x.sum(), rf"^{name} must have shape .* got \(\)"),
        ):
            with pytest.raises(ValueError, match=message):
                call(*good[:i], spoiled, *good[i + 1 :], A)
    with pytest.raises(ValueError, match=r"^a is NaN"):
        call(*good, math.nan)
