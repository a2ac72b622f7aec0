"""R_a in closed form: calculus, the ends of every range, and what float64 can still say there."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

import mirrorflow as mf
from cases import COMMUTE, FAIL, FAST
from functions import (
    DOUBLE,
    A,
    apply,
    at,
    each_form,
    elementwise,
    few,
    gap,
    legendre,
    log_ratio,
    symmetric,
    tensor,
)
from mirrorflow.legendre import HyperbolicEntropy

# Which form.


@pytest.mark.parametrize("case", COMMUTE, ids=str)
@pytest.mark.sample(9)
def test_every_pair_gets_its_form(case):
    assert type(legendre(case)) is case.form


@pytest.mark.parametrize("case", [c for c in FAIL if not c.start_decides], ids=str)
def test_a_pair_that_does_not_commute_has_none(case):
    with pytest.raises(mf.IncompatiblePair) as caught:
        legendre(case)
    assert not caught.value.report.commuting and str(caught.value) == caught.value.report.explain()


def test_a_start_that_is_one_sided_in_some_coordinates_is_refused():
    w0 = (tensor(1.0, 1.0, 0.5), tensor(1.0, 2.0, 0.1))
    with pytest.raises(ValueError, match=r"\|m0\| = \|w0\|.*got 1 of 3 coordinates"):
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
@pytest.mark.sample(7)
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
@pytest.mark.sample(40)
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
    assert R.bregman(y, y, a).abs() < 1e-26 * y.abs().max()  # the square of a rounding


def test_hyperbolic_divergences_scale_where_squares_underflow_or_overflow():
    unit = HyperbolicEntropy(tensor(0.0), tensor(0.3))
    x, y = tensor(2.0), tensor(2.0001)
    wanted = unit.bregman(x, y, 0.0)
    for log_A in (-450.0, 450.0):
        R, scale = HyperbolicEntropy(tensor(log_A), tensor(0.3)), math.exp(log_A)
        assert abs(R.bregman(x * scale, y * scale, 0.0) / scale / wanted - 1) < 1e-9


def excess(y, e):
    """Return softplus(y + e) - softplus(y) - s(y) e in 120 digits, for floats."""
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
    assert abs(R.value(tensor(x), 0.0) - float(wanted)) < 1e-13 * abs(x)


# The centre.


@each_form
@pytest.mark.parametrize("a", [0.0, A, -20.0, -150.0])
def test_the_mirror_of_the_centre_is_zero(case, a):
    if a < case.lowest_a:
        with pytest.raises(mf.RangeError, match=r"outside the range"):
            legendre(case).centre(a)
        return
    R = legendre(case)
    centre = R.centre(a)
    assert (centre.abs() > 0).any()
    # mu is known to an eps of |a|, and to one of the width of its range for u^2k - v^2k
    assert R.mirror(centre, a).abs().max() < 2e-15 * (1 + abs(a)) * 10


# Many coordinates, batches, precisions, and wrong arguments.


@pytest.mark.parametrize("id", ["hadamard", "hadamard-balanced", "power-2", "log-ratio"])
@pytest.mark.sample(1)
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
    a = max(a, case.lowest_a / 2)
    g = mf.CommutingQuadratic(case.g.A.float()) if hasattr(case.g, "A") else case.g
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
            (torch.full_like(x, math.nan), f"^{name} must be a number, got NaN"),
            (x.reshape(-1)[:2], rf"^{name} must have shape \({x.shape[0]},.*got \(2,\)"),
            (x.sum(), rf"^{name} must have shape .* got \(\)"),
        ):
            with pytest.raises(ValueError, match=message):
                call(*good[:i], spoiled, *good[i + 1 :], A)
        with pytest.raises(TypeError, match=f"^{name} must be a torch tensor, got list"):
            call(*good[:i], x.tolist(), *good[i + 1 :], A)
    for bad in (math.nan, -math.inf):
        with pytest.raises(ValueError, match=f"^a must be finite, got {bad}"):
            call(*good, bad)
    with pytest.raises(TypeError, match=r"^a must be a number or a tensor, got list"):
        call(*good, [A])


def test_matrices_that_are_symmetric_up_to_rounding():
    """Entries that rounding alone makes differ from 0 have no digits in common."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        V = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=dtype))[0]
        block = V @ torch.diag(torch.arange(1.0, 7.0, dtype=dtype)) @ V.mT
        A_one = torch.block_diag(block, 1e-12 * block) + 1e-17 * torch.randn(
            12, 12, generator=generator, dtype=dtype
        )
        g = mf.CommutingQuadratic(A_one[None])
        assert torch.equal(g.A, g.A.mT)
    skew = torch.tensor([[[1.0, 0.1], [0.0, 1.0]]])
    for bad, error, message in (
        (skew, ValueError, "symmetric, A is off by 9.5e-02"),
        (skew * math.nan, ValueError, "A must be finite, got NaN"),
        (skew.int(), TypeError, "a tensor of floats, got torch.int32"),
        (skew.tolist(), TypeError, "a tensor of floats, got list"),
    ):
        with pytest.raises(error, match=message):
            mf.CommutingQuadratic(bad)


def test_quadratic_forms_of_another_precision_than_the_start():
    g = mf.CommutingQuadratic(torch.eye(2, dtype=torch.float64)[None])
    for w0 in (torch.ones(2), (torch.ones(2, dtype=torch.float64),)):
        run = mf.descend(
            lambda x: ((x - 2) ** 2).sum(), g, mf.WeightDecay(), w0, mf.Constant(0.0), 0.05, 200
        )
        assert abs(run.value.item() - 2) < 1e-3
