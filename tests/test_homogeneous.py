"""Weight decay with any homogeneous model: the same ends on another clock."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.optimize import linprog
from scipy.special import elliprf

import mirrorflow as mf
import oracles
from cases import CLOCKED, SCHEDULES
from mirrorflow.conditions import homogeneity_degree
from mirrorflow.legendre import (
    HyperbolicEntropy,
    Inversion,
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

DECAY = mf.WeightDecay()
few = settings(max_examples=2, deadline=None, derandomize=True, database=None)
D, UNTIL = 4, 1.2


def tensors(w):
    """Give rows as a tuple of tensors, one row as one tensor."""
    return tuple(torch.from_numpy(f.copy()) for f in w) if len(w) > 1 else torch.from_numpy(w[0])


def odd_power():
    """u^3 - v^3."""

    def g(w):
        u, v = oracles.halves(w)
        return u**3 - v**3

    def pull(w, s):
        u, v = oracles.halves(w)
        return np.concatenate([3 * u * u * s, -3 * v * v * s])

    return oracles.Field(g, pull, lambda w: w)


def weighted_product():
    """u^2 v."""

    def g(w):
        u, v = oracles.halves(w)
        return u * u * v

    def pull(w, s):
        u, v = oracles.halves(w)
        return np.concatenate([2 * u * v * s, u * u * s])

    return oracles.Field(g, pull, lambda w: w)


def square_times(w):
    return w[0] ** 2 * w[1]


OWN = mf.CustomReparam(square_times, elementwise=True)
# Model, its flow in NumPy, the number of factors, the degree, and whether factors are positive.
MODELS = {
    "depth-2": (mf.Depth(2), oracles.depth(2), 2, 2, False),
    "depth-3": (mf.Depth(3), oracles.depth(3), 3, 3, False),
    "depth-4": (mf.Depth(4), oracles.depth(4), 4, 4, False),
    "depth-5": (mf.Depth(5), oracles.depth(5), 5, 5, False),
    "power-4": (mf.PowerDifference(2), oracles.power(2, plain=True), 2, 4, False),
    "power-3": (mf.PowerDifference(1.5), odd_power(), 2, 3, True),
    "log-ratio": (mf.LogRatio(), oracles.log_ratio(plain=True), 2, 0, True),
    "own": (OWN, weighted_product(), 2, 3, True),
}
each_model = pytest.mark.parametrize("name", MODELS)


def start(name, seed, d=D):
    """Give random unbalanced factors, of any signs where the model takes them."""
    _, _, count, _, positive = MODELS[name]
    rng = np.random.default_rng(seed)
    w = rng.uniform(0.3, 1.0, (count, d))
    if name == "own":
        w[0] += 1.2  # u^2 > 2 v^2 stays, so that v may cross 0 and x take any value
        return w
    return w + 0.6 if positive else w * rng.choice([-1.0, 1.0], (count, d))


def problem(seed, n=2, d=D):
    rng = np.random.default_rng(seed + 1000)
    return rng.standard_normal((n, d)), 0.5 * rng.standard_normal(n)


def trained(field, w0, slope, degree, schedule, until, rtol=1e-12):
    """Integrate w, nu = -int e^{(k-2) a} grad f, mu and a with SciPy; give the last of each."""
    size, d = w0.size, len(field.g(w0.ravel()))

    def velocity(t, y):
        w, a, alpha = y[:size], y[-1], schedule.rate(t)
        s = slope(field.g(w))
        clocked = np.exp((degree - 2) * a) * s
        return -np.concatenate([field.pull(w, s) + alpha * field.decay(w), clocked, s, [alpha]])

    state = np.concatenate([w0.ravel(), np.zeros(2 * d + 1)])
    inner = [b for b in schedule.breakpoints if 0 < b < until]
    for left, right in pairwise([0.0, *inner, until]):
        inside = np.nextafter(right, left)
        state = solve_ivp(
            lambda t, y, left=left, inside=inside: velocity(min(max(t, left), inside), y),
            (left, right), state, method="DOP853", rtol=rtol, atol=1e-14,
        ).y[:, -1]  # fmt: skip
    w = state[:size]
    return w, field.g(w), state[size : size + d], state[size + d : -1], state[-1]


@st.composite
def schedules(draw):
    """Draw piecewise constant rates, some negative."""
    count = draw(st.integers(1, 3))
    rates = draw(st.lists(st.floats(-0.2, 0.8), min_size=count, max_size=count))
    return mf.Piecewise(tuple(UNTIL * (i + 1) / count for i in range(count - 1)), rates)


def gap(one, two):
    one, two = (np.asarray(v).ravel() for v in (one, two))
    return np.abs(one - two).max() / max(np.abs(two).max(), 1e-3)


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


# Ends.

ENDS = ("depth-3", "depth-4", "power-4", "power-3")


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        *((n, 0) for n in MODELS if n != "depth-2"),
        *(pytest.param(n, s, marks=pytest.mark.slow) for n in ENDS for s in (1, 2, 3)),
    ],
)
def test_training_ends_in_the_limit(name, seed):
    """Decay for a while, then none, until the data are met, by SciPy."""
    g, field, _, degree, _ = MODELS[name]
    w0, (Z, y) = start(name, seed), problem(seed)
    schedule = mf.SwitchOff(0.5, 0.8)

    def slope(x):
        return Z.T @ (Z @ x - y)

    w, x, _, _, a = trained(field, w0, slope, degree, schedule, 0.8)
    late = solve_ivp(
        lambda _, w: -field.pull(w, slope(field.g(w))),
        (0, 3000),
        w,
        "LSODA",
        rtol=1e-12,
        atol=1e-14,
    ).y[:, -1]
    x = field.g(late)
    assert np.abs(Z @ x - y).max() < 1e-9
    R = mf.legendre(g, DECAY, tensors(w0))
    end = mf.limit(R, Z, y, a)
    assert end.status.ok and gap(x, end.value) < 1e-7
    still = gap(mf.limit(R, Z, y, 0.0).value, end.value)
    assert still > 1e-3 if degree else still < 1e-10  # for k = 0 decay changes the clock alone
    # The dual variable of the end is Z^T theta.
    assert gap(R.mirror(end.value, a), Z.T @ end.aux["theta"].numpy()) < 1e-8


@pytest.mark.parametrize("name", ("depth-3", "depth-4", "power-4", "power-3"))
def test_decay_acts_as_a_smaller_start(name):
    """e^{-0.9} w0 without decay ends where w0 does with a = -0.9."""
    g = MODELS[name][0]
    w0, (Z, y) = start(name, 4), problem(4)
    small = mf.legendre(g, DECAY, tensors(np.exp(-0.9) * w0))
    large = mf.legendre(g, DECAY, tensors(w0))
    one, two = mf.limit(small, Z, y, 0.0).value, mf.limit(large, Z, y, -0.9).value
    assert gap(one, two) < 1e-11


def test_a_path_over_a_is_a_path_over_initialization_scales():
    """From the kernel regime, the shortest way from x0, to the rich one."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((10, 30))
    truth = np.zeros(30)
    truth[:2] = 1.0, -1.0
    w0 = np.concatenate([np.zeros((1, 30)), np.ones((2, 30))])  # x0 = 0, J J^T = 1
    R = mf.legendre(mf.Depth(3), DECAY, tensors(w0))
    path = mf.limit(R, Z, Z @ truth, [-8.0, 3.0, -1.0, 0.0])
    assert path.status.ok
    rich, kernel, middle, _ = path.value.numpy()
    assert gap(kernel, np.linalg.pinv(Z) @ (Z @ truth)) < 1e-3
    assert gap(rich, truth) < 1e-8
    assert gap(middle, mf.limit(R, Z, Z @ truth, -1.0).value) < 1e-10


@pytest.mark.parametrize("name", ("depth-3", "depth-4", "depth-5", "power-4", "power-3"))
def test_after_much_decay_the_end_minimizes_the_weighted_l1_norm(name):
    """The weights are the ends of nu, which differ with the sign of x."""
    rng = np.random.default_rng(2)
    Z, d = rng.standard_normal((8, 20)), 20
    y = Z @ (rng.standard_normal(d) * (rng.random(d) < 0.3))
    R = mf.legendre(MODELS[name][0], DECAY, tensors(start(name, 3, d)))
    lower, upper = (v.numpy() for v in R.range(0.0))
    lp = linprog(np.concatenate([upper, -lower]), A_eq=np.hstack([Z, -Z]), b_eq=y)
    deep = mf.limit(R, Z, y, [-25.0, -90.0])
    for x in deep.value.numpy():
        assert gap(x, lp.x[:d] - lp.x[d:]) < 1e-8
    assert deep.stats.residual.max() < 1e-11 and deep.stats.kkt.max() < 1e-11


DESIGNS = ("normal", "correlated", "duplicated", "scaled", "binary")


def design(kind, seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    Z = rng.standard_normal((n, n + int(rng.integers(0, 20))))
    match kind:
        case "correlated":
            Z = 0.03 * Z + rng.standard_normal((n, 1))
        case "duplicated":
            Z[:, ::2] = Z[:, :1]
        case "scaled":
            Z = Z * 10 ** rng.uniform(-3, 3, Z.shape[1])
        case "binary":
            Z = (Z > 0).astype(float)
    return Z, rng


@few
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("kind", DESIGNS)
@pytest.mark.parametrize("name", ("depth-3", "depth-4", "power-4"))
def test_limits_of_awkward_designs_are_optimal(name, kind, seed):
    """Qx = b and mirror(x) in the row space: a convex problem needs no other proof."""
    Z, rng = design(kind, seed)
    d = Z.shape[1]
    w0 = start(name, seed, d) * 10 ** rng.uniform(-0.7, 0.7, d)
    y = Z @ rng.standard_normal(d) * 10 ** rng.uniform(-2, 2)
    R = mf.legendre(MODELS[name][0], DECAY, tensors(w0))
    for a in (0.5, -2.0, -9.0):
        end = mf.limit(R, Z, y, a)
        assert end.status.ok
        x, theta = end.value, end.aux["theta"].numpy()
        assert np.linalg.norm(Z @ x.numpy() - y) <= 1e-9 * np.linalg.norm(y)
        bounds = np.maximum(*(v.abs().numpy() for v in R.range(a)))
        assert (np.abs(R.mirror(x, a).numpy() - Z.T @ theta) <= 1e-9 * bounds).all()


@pytest.mark.parametrize("name", ("depth-3", "depth-4", "power-4", "power-3"))
def test_ends_stay_where_they_are_when_what_fades_is_below_float64(name):
    w0, (Z, y) = start(name, 2, 20), problem(2, 8, 20)
    R = mf.legendre(MODELS[name][0], DECAY, tensors(w0))
    path = mf.limit(R, Z, y, [-60.0, -190.0, -1000.0])
    assert path.status is mf.Status.vertex and path.stats.kkt.max() < 1e-11
    assert gap(path.value[1], path.value[0]) < 1e-11 and gap(path.value[2], path.value[0]) < 1e-11
    assert (path.value[2] == 0).sum() == 12
    with pytest.raises(mf.RangeError, match="a must keep x within float64"):
        mf.limit(R, Z, y, 250.0)


@few
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("balanced", (False, True))
def test_the_gap_is_a_certificate_for_the_signs_that_x_can_have(seed, balanced):
    """No x in the domain with Zx = y has an L1 norm below (1 - gap) times that of the end."""
    w0, (Z, y) = start("depth-3", seed, 12), problem(seed, 4, 12)
    rng = np.random.default_rng(seed)
    if balanced:
        w0 = np.abs(w0[:1]) * rng.choice([-1.0, 1.0], (3, 12))
    signs = np.sign(w0.prod(0))
    y = Z @ (signs * rng.random(12)) if balanced else y
    end = mf.limit(mf.legendre(mf.Depth(3), DECAY, tensors(w0)), Z, y, -4.0)
    columns = Z * signs if balanced else np.hstack([Z, -Z])
    least = linprog(np.ones(columns.shape[1]), A_eq=columns, b_eq=y).fun
    norm = float(end.value.abs().sum())
    assert 0 <= end.stats.gap < 1 and norm * (1 - end.stats.gap) <= least * (1 + 1e-9)


@pytest.mark.parametrize("name", ("depth-3", "depth-5", "power-4", "log-ratio"))
def test_an_a_for_each_coordinate_is_a_start_scaled_per_coordinate(name):
    g, _, _, _, _ = MODELS[name]
    w0, (Z, y) = start(name, 6), problem(6)
    a = np.array([-0.9, 0.2, -0.1, -0.5])
    R, scaled = (mf.legendre(g, DECAY, tensors(w)) for w in (w0, np.exp(a) * w0))
    found, wanted = mf.limit(R, Z, y, a, per_coordinate=True), mf.limit(scaled, Z, y, 0.0)
    assert found.status.ok and gap(found.value, wanted.value) < 1e-10
    x, at, tilt = found.value, torch.from_numpy(a), 0.05 * torch.ones(D, dtype=torch.float64)
    folded = R.folded(at, tilt)
    assert gap(folded.mirror(x, 0.0), (R.mirror(x, at) - tilt) / R.clock(at)) < 1e-10
    # Its energy is |w|^2/2 at its start: d R_a / d a = -e^{(k-2) a} h(w).
    centre = R.folded(at).centre(0.0)
    now = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (change,) = torch.autograd.grad(R.folded(at).value(centre, now), now)
    assert float(change) == pytest.approx(-((np.exp(a) * w0) ** 2).sum() / 2, rel=1e-9)


def test_a_clock_beyond_float64_is_refused():
    R = mf.legendre(mf.LogRatio(), DECAY, tensors(start("log-ratio", 0)))
    with pytest.raises(mf.RangeError, match="a must keep e"):
        R.clock(-400.0)


def test_signs_that_no_start_can_reach_are_reported():
    w0 = np.full((3, 2), 0.5)  # balanced: x stays positive
    R = mf.legendre(mf.Depth(3), DECAY, tensors(w0))
    with pytest.warns(RuntimeWarning, match="no x in the domain"):
        end = mf.limit(R, np.array([[1.0, 1.0]]), [-1.0], -0.5)
    assert end.status is mf.Status.inconsistent
    assert mf.limit(R, np.array([[1.0, -1.0]]), [-1.0], -0.5).status.ok


# Pairs without a closed form, by one integration of w.


def product_of_two(w):
    return w[0] * w[1]


def half_square(w):
    return sum((f * f).sum() for f in w) / 2


def test_the_limit_of_ones_own_product_is_that_of_the_closed_form():
    rng = np.random.default_rng(0)
    w0 = tensors(rng.uniform(0.3, 1.2, (2, 8)))
    own = mf.CustomReparam(product_of_two, elementwise=True)
    h = mf.CustomRegularizer(half_square, elementwise=True)
    R, closed = mf.legendre(own, h, w0), mf.legendre(mf.Hadamard(), DECAY, w0)
    Z = rng.standard_normal((3, 8))
    y = Z @ rng.standard_normal(8)
    assert isinstance(R, Inversion)
    end, expected = mf.limit(R, Z, y, -1.5), mf.limit(closed, Z, y, -1.5)
    assert end.status.ok and end.stats.kkt < 1e-10
    assert gap(end.value, expected.value) < 1e-12
    assert gap(Z.T @ end.aux["theta"].numpy(), Z.T @ expected.aux["theta"].numpy()) < 1e-11


def deep(w):
    return w[0] * w[1] * w[2]


def test_the_limit_of_ones_own_deep_product_is_that_of_the_closed_form():
    rng = np.random.default_rng(1)
    w0 = tensors(rng.uniform(0.3, 1.2, (3, 8)))
    own = mf.legendre(mf.CustomReparam(deep, elementwise=True), DECAY, w0)
    closed = mf.legendre(mf.Depth(3), DECAY, w0)
    Z = rng.standard_normal((3, 8))
    y = Z @ rng.standard_normal(8)
    assert isinstance(own.start, Inversion)
    end, expected = (mf.limit(R, Z, y, -1.5) for R in (own, closed))
    assert gap(end.value, expected.value) < 1e-12
    assert gap(Z.T @ end.aux["theta"].numpy(), Z.T @ expected.aux["theta"].numpy()) < 1e-11


def test_coordinates_that_share_parameters_have_a_clock_as_well():
    """x = M w^3, dense: the law, and the end of training."""
    rng = np.random.default_rng(4)
    mix = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    M, w0 = torch.from_numpy(mix), rng.uniform(0.6, 1.0, 3)
    field = oracles.Field(lambda w: mix @ w**3, lambda w, s: 3 * w**2 * (mix.T @ s), lambda w: w)
    R = mf.legendre(mf.CustomReparam(lambda w: M @ w**3), DECAY, torch.from_numpy(w0))
    assert isinstance(R, RescaledFunction) and R.degree == 3 and not R.elementwise
    Z = rng.standard_normal((2, 3))
    y = Z @ mix @ rng.uniform(0.1, 0.8, 3)

    def slope(x):
        return Z.T @ (Z @ x - y)

    w, x, nu, _, a = trained(field, w0[None], slope, 3, mf.Piecewise((0.5,), (0.6, 0.1)), 1.0)
    assert gap(R.mirror(torch.from_numpy(x), a), nu) < 1e-9
    late = solve_ivp(
        lambda _, w: -field.pull(w, slope(field.g(w))), (0, 2000), w, "LSODA",
        rtol=1e-12, atol=1e-14,
    ).y[:, -1]  # fmt: skip
    assert gap(mf.limit(R, Z, y, a).value, field.g(late)) < 1e-7


def test_coordinates_that_share_parameters_end_where_training_does():
    rng = np.random.default_rng(3)
    mix = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    M, w0, field = torch.from_numpy(mix), rng.uniform(0.6, 1.2, 4), oracles.squares(mix)
    R = mf.legendre(mf.CustomReparam(lambda w: M @ (w * w) / 2), DECAY, torch.from_numpy(w0))
    Z = rng.standard_normal((2, 4))
    y = Z @ mix @ rng.uniform(0.2, 1.0, 4)
    w = w0 * np.exp(-0.4)
    late = solve_ivp(
        lambda _, w: -field.pull(w, Z.T @ (Z @ field.g(w) - y)), (0, 2000), w, "LSODA",
        rtol=1e-12, atol=1e-14,
    ).y[:, -1]  # fmt: skip
    assert gap(mf.limit(R, Z, y, -0.4).value, field.g(late)) < 1e-8


def test_the_table_of_scales_in_the_docs_is_what_limit_gives():
    page = (Path(__file__).parents[1] / "docs" / "beyond.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:`Depth\((\d)\)`|scale, \$e\^a\$) \| (.*) \|$", page, re.M)
    (_, scales), *printed = [(k, [float(v) for v in row.split("|")]) for k, row in rows]
    torch.manual_seed(0)
    Z, truth = torch.randn(40, 100, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)
    truth[:5] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    zero, one = torch.zeros_like(truth), torch.ones_like(truth)
    for k, expected in printed:
        R = mf.legendre(mf.Depth(int(k)), DECAY, (zero, *[one] * (int(k) - 1)))
        ends = mf.limit(R, Z, Z @ truth, a=np.log(scales)).value
        np.testing.assert_allclose(ends.abs().sum(1) / 5 - 1, expected, rtol=0.03)
    assert [k for k, _ in printed] == ["2", "3", "4"]
