"""Legendre functions at the edges of their domains and ranges, and of matrices."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import expm, logm
from torch.autograd import grad, gradcheck, gradgradcheck

import mirrorflow as mf
from cases import FAST
from functions import (
    DOUBLE,
    A,
    at,
    few,
    gap,
    identity_start,
    legendre,
    log_ratio,
    one,
    symmetric,
    tensor,
)
from mirrorflow.legendre import (
    OneSidedEntropy,
    power,
)
from mirrorflow.legendre.hyperbolic import entropy_excess

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
            resolution = 4e-15 * (lower.abs() + upper.abs() + mu.abs()) / metric
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
    assert abs(mirror - float(mu)) <= 2e-15 * (1 + abs(a))
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
    assert abs(power._tau(w, q) - tau) <= 1e-13 * tau + 1e-307


@pytest.mark.parametrize("a", [0.0, -0.5, -0.7])
def test_a_round_trip_of_the_log_ratio(a):
    x = tensor(-14.0, -5.0, -1e-9, 0.0, 2.0, 14.0)
    full = torch.full_like(x, 1.8)
    R = mf.legendre(mf.LogRatio(), mf.Separable(), (full, full - 0.1))
    mu = R.mirror(x, a)
    assert ((R.primal(mu, a) - x).abs() < 4e-15 / R.metric(x, a) + 1e-13).all()
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
        assert (R.mirror(x, a) - mu).abs() <= 2e-15 * (lower.abs() + upper.abs())
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
@pytest.mark.sample(1)
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
    with pytest.raises(mf.RangeError, match=r"a must be smaller, got 5.0: the range"):
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
@pytest.mark.sample(1)
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


@pytest.mark.parametrize("a", (-352.0, -355.0, -360.0))
def test_the_mirror_of_x_is_mu_where_one_over_A_is_beyond_float64(a):
    w0 = (torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), w0)
    mu = torch.tensor([0.1, -2.0, 6.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(R.mirror(R.primal(mu, a), a), mu, rtol=1e-9, atol=0)


def test_the_excess_of_the_entropy_keeps_its_digits():
    """(1 + r) log(1 + r) - r, against 40 digits."""
    r = torch.cat([torch.linspace(-0.99, 3, 400), torch.logspace(-9, -0.5, 100)]).double()
    r = torch.cat([r, -r[-100:]])
    with localcontext() as context:
        context.prec = 40
        values = [Decimal(v) for v in r.tolist()]
        exact = [float((1 + v) * (1 + v).ln() - v) for v in values]
    torch.testing.assert_close(
        entropy_excess(r), torch.tensor(exact, dtype=torch.float64), rtol=1e-14, atol=0
    )
