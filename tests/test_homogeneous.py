"""Weight decay with any homogeneous model: the law on another clock, and its R_0."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.special import elliprf

import mirrorflow as mf
from cases import CLOCKED, SCHEDULES
from homogeneous import (
    DECAY,
    MODELS,
    UNTIL,
    D,
    each_model,
    few,
    gap,
    problem,
    schedules,
    start,
    tensors,
    trained,
)
from mirrorflow.conditions import homogeneity_degree
from mirrorflow.legendre import (
    HyperbolicEntropy,
    ProductEntropy,
    RescaledFunction,
)
from mirrorflow.legendre._smallest_factor import (
    factor_from_product,
    factor_from_tail,
    factors_at,
    tail,
    trapezoid,
)

# The law.


@few
@given(seed=st.integers(0, 10**6), schedule=schedules())
@pytest.mark.parametrize("name", [n for n in MODELS if n != "own"])
def test_the_mirror_of_x_is_nu(name, seed, schedule):
    law_holds(name, seed, schedule)


def test_the_mirror_of_x_is_nu_for_ones_own_product():
    law_holds("own", 1, SCHEDULES["off-on-off"])


def law_holds(name, seed, schedule):
    g, field, _, degree, _ = MODELS[name]
    w0, (Z, y) = start(name, seed), problem(seed)
    _, x, nu, _, a = trained(field, w0, lambda x: Z.T @ (Z @ x - y), degree, schedule, UNTIL)
    R = mf.legendre(g, DECAY, tensors(w0))
    assert gap(R.mirror(torch.from_numpy(x), a), nu) < 1e-9
    assert gap(R.primal(torch.from_numpy(nu), a), x) < 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_mirror_of_x_is_nu_for_every_kind_of_schedule(schedule):
    g, field, _, degree, _ = MODELS["depth-3"]
    w0 = start("depth-3", 5)
    _, x, nu, mu, a = trained(field, w0, lambda x: x**3 - 0.3, degree, schedule, UNTIL)
    R = mf.legendre(g, DECAY, tensors(w0))
    assert gap(R.mirror(torch.from_numpy(x), a), nu) < 1e-9
    assert gap(nu, mu) > 1e-3  # the clock is not a formality


@pytest.mark.parametrize("case", CLOCKED, ids=str)
def test_the_laws_of_pairs_that_commute_up_to_a_clock(case):
    w0 = case.flat(3)
    w, x, nu, _, a = trained(
        case.field, w0, lambda x: x - 0.3, case.degree, SCHEDULES["negative"], 1.0
    )
    R = mf.legendre(case.g, case.h, case.start(3))
    xt = torch.from_numpy(x).requires_grad_()
    assert isinstance(R, RescaledFunction) and R.degree == case.degree
    assert gap(R.mirror(xt, a).detach(), nu) < 1e-9
    # The inverse metric is J J^T in units of the clock.
    J = case.field.jacobian(w).T
    metric = torch.diag(R.metric(xt, a)).detach().numpy()
    assert gap(metric @ (J @ J.T) / R.clock(a), np.eye(len(J))) < 1e-8
    # d R_a / da = -e^{(k-2) a} h(w).
    at = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    (change,) = torch.autograd.grad(R.value(xt, at), at)
    assert gap(change, -R.clock(a) * (w @ w) / 2) < 1e-8
    # mirror = grad R_a, primal = grad R_a^*.
    (slope,) = torch.autograd.grad(R.value(xt, a), xt)
    assert gap(slope, nu) < 1e-8


def test_the_three_views_of_a_flow_agree():
    w0, (Z, y) = start("depth-3", 1), problem(1)
    loss = mf.LeastSquares(torch.from_numpy(Z), torch.from_numpy(y))
    ends = [
        mf.flow(loss, mf.Depth(3), DECAY, tensors(w0), mf.SwitchOff(0.4, 0.6), 1.0, view, rtol=1e-9)
        for view in ("parameters", "mirror", "primal")
    ]
    for end in ends[1:]:
        assert gap(end.value, ends[0].value) < 1e-7
        assert gap(end.path.mu[-1], ends[0].path.mu[-1]) < 1e-7


# R_0 of a product.


def test_depth_two_is_the_hyperbolic_entropy():
    w0 = tensors(start("depth-2", 3))
    closed = mf.legendre(mf.Depth(2), DECAY, w0)
    rescaled = RescaledFunction(closed, 2.0, float(DECAY.value(w0, mf.Depth(2))))
    x, y = torch.tensor([[0.4, -0.3, 0.8, 0.0], [0.1, 0.2, -0.7, 1.0]], dtype=torch.float64)
    assert isinstance(closed, HyperbolicEntropy) and rescaled.clock(-0.7) == 1
    for map in ("mirror", "metric", "value"):
        assert gap(getattr(rescaled, map)(x, -0.7), getattr(closed, map)(x, -0.7)) < 1e-12
    for map in ("primal", "conjugate"):
        assert gap(getattr(rescaled, map)(y, -0.7), getattr(closed, map)(y, -0.7)) < 1e-12
    assert gap(rescaled.bregman(x, y, -0.7), closed.bregman(x, y, -0.7)) < 1e-12


@pytest.mark.parametrize("k", (3, 4, 6))
def test_balanced_products_have_a_closed_form(k):
    rng = np.random.default_rng(k)
    size, nu, a = rng.uniform(0.5, 1.0, D), rng.uniform(-1.0, 0.1, D), -0.4
    sign = rng.choice([-1.0, 1.0], D)
    w0 = np.concatenate([[size * sign], np.tile(size, (k - 1, 1))])
    R = mf.legendre(mf.Depth(k), DECAY, tensors(w0))
    x0 = size**k
    expected = np.exp(k * a) * (x0 ** (-(k - 2) / k) - (k - 2) * nu) ** (-k / (k - 2))
    assert gap(R.primal(torch.from_numpy(sign * nu), a), sign * expected) < 1e-12
    lower, upper = R.range(a)
    end = x0 ** (-(k - 2) / k) / (k - 2)
    assert gap(torch.where(torch.from_numpy(sign > 0), upper, -lower), end) < 1e-12
    with pytest.raises(mf.RangeError, match="domain"):
        R.mirror(torch.from_numpy(-sign), a)


@pytest.mark.parametrize("k", (3, 4, 5))
def test_the_range_ends_where_the_flow_blows_up(k):
    """u of the flow dw/dnu follows 1/u to its zero, on both sides."""
    w0 = start(f"depth-{k}", 8)
    R = mf.legendre(mf.Depth(k), DECAY, tensors(w0))
    for side, end in ((1.0, R.range(0.0)[1]), (-1.0, R.range(0.0)[0])):
        for i in range(D):

            def rate(s, y, side=side):
                w = np.sinh(y[:-1])  # in log |w| at unit speed, so that nothing blows up
                others = np.array([np.prod(np.delete(w, j)) for j in range(k)]) * side
                speed = np.abs(others / np.cosh(y[:-1])).max()
                return np.concatenate([others / np.cosh(y[:-1]), [side]]) / speed

            y0 = np.concatenate([np.arcsinh(w0[:, i]), [0.0]])
            nu = solve_ivp(rate, (0, 40), y0, method="DOP853", rtol=1e-11, atol=1e-13).y[-1, -1]
            assert nu == pytest.approx(float(end[i]), rel=1e-8)


@pytest.mark.parametrize("k", (3, 4, 5, 8))
def test_the_tail_is_the_integral(k):
    rng = np.random.default_rng(k)
    w = np.sort(10 ** rng.uniform(-3, 1, (k, 5)), axis=0)
    w[0, 1], w[1, 2] = 0.0, w[0, 2]  # a factor that is 0, and a tie
    w[:, 3] = 0.7
    for column, value in zip(w.T, tail(w), strict=True):

        def density(y, column=column):
            return 0.5 * np.exp(y - 0.5 * np.log(np.exp(y) + column**2).sum())

        edges = [-80.0, *np.sort(2 * np.log(np.maximum(column, 1e-9))), 90.0]
        parts = [quad(density, lo, hi, epsrel=1e-12, limit=200)[0] for lo, hi in pairwise(edges)]
        assert value == pytest.approx(sum(parts), rel=1e-10)


def test_the_trapezoidal_rule_agrees_with_carlson():
    w = np.sort(10 ** np.random.default_rng(0).uniform(-6, 0, (3, 50)), axis=0)
    np.testing.assert_allclose(trapezoid(w), elliprf(*(w * w)), rtol=1e-13)


@pytest.mark.parametrize("k", (3, 4, 5))
def test_the_smallest_factor_is_found_from_nu_and_from_x(k):
    rng = np.random.default_rng(k)
    w = np.sort(10 ** rng.uniform(-5, 2, (k, 60)), axis=0)
    w[1, :10] = w[0, :10]
    c, q = (w - w[0]) * (w + w[0]), 10 ** rng.uniform(-6, 6, 60)
    sizes = factors_at(q, c)
    found = factor_from_tail(tail(sizes), c)
    np.testing.assert_allclose(tail(factors_at(found, c)), tail(sizes), rtol=1e-13)
    np.testing.assert_allclose(factor_from_product(q * sizes[1:].prod(0), c), q, rtol=1e-12)
    np.testing.assert_allclose(factor_from_product(-q * sizes[1:].prod(0), c), -q, rtol=1e-12)


@pytest.mark.parametrize("k", (3, 5))
def test_the_maps_of_a_product_are_differentiable_twice(k):
    R = ProductEntropy(torch.from_numpy(start(f"depth-{k}", 2)))
    nu = torch.tensor([0.1, -0.2, 0.05, -0.1], dtype=torch.float64, requires_grad=True)
    x = R.primal(nu, 0.0).detach().requires_grad_()
    for map, at in ((R.primal, nu), (R.mirror, x), (R.conjugate, nu), (R.value, x)):
        assert torch.autograd.gradcheck(lambda v, map=map: map(v, 0.0), at)
        assert torch.autograd.gradgradcheck(lambda v, map=map: map(v, 0.0), at)


@few
@given(seed=st.integers(0, 10**6), size=st.sampled_from((1e-7, 1e-2, 3.0)))
@pytest.mark.parametrize("name", ("depth-3", "depth-5", "power-3"))
def test_the_divergence_is_positive_and_right_near_and_far(name, seed, size):
    R = mf.legendre(MODELS[name][0], DECAY, tensors(start(name, seed)))
    rng = np.random.default_rng(seed)
    y, step = (torch.from_numpy(rng.standard_normal(D)) for _ in range(2))
    x, a = y + size * step, -0.3
    if size < 1e-3:
        expected = (R.metric(y, a) * (x - y) ** 2).sum() / 2
    else:
        expected = R.value(x, a) - R.value(y, a) - (R.mirror(y, a) * (x - y)).sum()
    assert float(R.bregman(x, y, a)) == pytest.approx(float(expected), rel=1e-5)


# Batches, bad starts, and which pairs these are.


def test_batches_and_rates_of_their_own():
    R = mf.legendre(mf.Depth(3), DECAY, tensors(start("depth-3", 0)))
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, D)))
    a = torch.tensor([-0.1, -0.5, -1.0], dtype=torch.float64)
    rows = torch.stack([R.mirror(xi, float(ai)) for xi, ai in zip(x, a, strict=True)])
    assert gap(R.mirror(x, a[:, None]), rows) < 1e-13
    values = torch.stack([R.value(xi, float(ai)) for xi, ai in zip(x, a, strict=True)])
    assert gap(R.value(x, a[:, None]), values) < 1e-13
    own = torch.tensor([-0.1, -0.5, -1.0, 0.0], dtype=torch.float64)
    single = torch.stack([R.mirror(x[0], float(ai))[i] for i, ai in enumerate(own)])
    assert gap(R.mirror(x[0], own), single) < 1e-13
    with pytest.raises(ValueError, match="one number for all coordinates of a sum"):
        R.value(x[0], own)


@pytest.mark.parametrize("name", ("depth-3", "depth-5", "power-4", "power-3", "log-ratio"))
def test_single_precision_starts_are_right_to_single_precision(name):
    w0, (Z, y) = tensors(start(name, 3)), problem(3)
    R, low = (mf.legendre(MODELS[name][0], DECAY, w) for w in (w0, tuple(f.float() for f in w0)))
    x = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    assert low.mirror(x.float(), -0.5).dtype == torch.float32
    assert gap(low.mirror(x.float(), -0.5), R.mirror(x, -0.5)) < 1e-5
    assert gap(low.metric(x.float(), -0.5), R.metric(x, -0.5)) < 1e-5
    end = mf.limit(low, Z, y, -0.5)
    assert end.status.ok and gap(end.value, mf.limit(R, Z, y, -0.5).value) < 1e-5


def test_two_factors_that_are_zero_are_no_start():
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="at most one factor of a coordinate may be 0"):
        mf.legendre(mf.Depth(3), DECAY, (zero, zero, one))
    with pytest.raises(ValueError, match="v must be positive"):
        mf.legendre(mf.PowerDifference(1.5), DECAY, (one, zero))
    with pytest.raises(ValueError, match="2k must be an integer"):
        mf.PowerDifference(1.25)


@each_model
def test_the_degree_is_found(name):
    g, _, _, degree, _ = MODELS[name]
    w0 = tensors(start(name, 0))
    assert homogeneity_degree(g, w0) == degree


@pytest.mark.parametrize("name", ("depth-2", "depth-3", "log-ratio"))
def test_the_report_names_the_degree(name):
    g, _, _, degree, _ = MODELS[name]
    report = mf.check(g, DECAY, tensors(start(name, 0)))
    assert report.applies and report.degree == degree
    assert ("change of clock" in report.explain()) is (degree != 2)


def sine(w):
    return torch.sinh(w[0]) * w[1]


def mixed_degrees(w):
    return torch.stack([w[0] * w[1], w[0] * w[1] * w[2]])


def almost(w):
    return w[0] * w[1] * w[2] + 1e-6 * w[0]


@pytest.mark.parametrize("fn", (sine, mixed_degrees, almost))
def test_a_model_that_is_not_homogeneous_has_no_degree(fn):
    w0 = tuple(torch.tensor([v], dtype=torch.float64) for v in (0.9, 1.1, 0.7))
    assert homogeneity_degree(mf.CustomReparam(fn), w0) is None


def test_degrees_need_not_be_integers():
    g = mf.CustomReparam(lambda w: w[0].abs() ** 1.5 * w[1], elementwise=True)
    w0 = tensors(start("own", 0))
    assert homogeneity_degree(g, w0) == pytest.approx(2.5, abs=1e-9)
