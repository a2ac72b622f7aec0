"""R_a by integration: against every closed form, and for pairs that users write themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

import mirrorflow as mf
from cases import FAST, MIX, half_square, mixed_squares, product_of_two, total_exponential, uniform
from mirrorflow.legendre import Inversion, OneSidedEntropy

DOUBLE = torch.float64
few = settings(max_examples=2, deadline=None, derandomize=True, database=None)


def tensor(*values):
    return torch.tensor(values, dtype=DOUBLE)


def gap(one, two):
    return float((one - two).abs().max() / two.abs().max().clamp(min=1e-300))


# Users' own versions of pairs with a closed form. The hand-written sums are the ones of Separable.


def fourth_powers(w):
    return w[0] ** 4 - w[1] ** 4


def sum_of_fourth_powers(w):
    return (w[0] ** 4 + w[1] ** 4).sum()


def sixth_powers(w):
    return w[0] ** 6 - w[1] ** 6


def drifting(w):
    return (0.7 * w[0] ** 6 + 1.3 * w[1] ** 6).sum()


def log_ratio(w):
    return torch.log(w[0]) - torch.log(w[1])


def sum_of_logs(w):
    return (torch.log(w[0]) + torch.log(w[1])).sum()


def squares(w):
    return w[0] ** 2 - w[1] ** 2


TERMS, DECAY = mf.Separable(), mf.WeightDecay()
PAIRS = {
    "power-2": (
        mf.PowerDifference(2),
        TERMS,
        fourth_powers,
        sum_of_fourth_powers,
        uniform((0.7, 1.1), (0.7, 1.1)),
    ),
    "power-3-drift": (
        mf.PowerDifference(3),
        mf.Separable((0.7, -1.3)),
        sixth_powers,
        drifting,
        uniform((0.5, 0.7), (0.5, 0.7)),
    ),
    "log-ratio": (mf.LogRatio(), TERMS, log_ratio, sum_of_logs, uniform((1.6, 2.0), (1.6, 2.0))),
    "hyperbolic": (
        mf.Hadamard(),
        DECAY,
        product_of_two,
        half_square,
        uniform((0.7, 1.2), (-0.5, 0.5)),
    ),
    "hyperbolic-squares": (
        mf.PowerDifference(1),
        DECAY,
        squares,
        half_square,
        uniform((0.5, 1.1), (0.7, 1.1)),
    ),
}
each_pair = pytest.mark.parametrize("name", PAIRS)


def both(name, seed=0, own=False, n=3):
    """Return the closed form, and the inversion of the same pair or of a user's own functions."""
    g, h, x, y, start = PAIRS[name]
    w0 = tuple(f[:n] for f in start(seed))
    closed = mf.legendre(g, h, w0)
    if own:
        g = mf.CustomReparam(x, elementwise=True)
        return closed, mf.legendre(g, mf.CustomRegularizer(y, elementwise=True), w0)
    return closed, Inversion(g, h, w0)


def random(R, a, seed, size=0.05):
    mu = torch.from_numpy(np.random.default_rng(seed).uniform(-size, size, R.shape))
    return mu, R.primal(mu, a)


def agree(closed, R, seed, a):
    (mu, x), (_, y) = random(closed, a, seed), random(closed, a, seed + 1)
    assert gap(R.primal(mu, a), x) < 1e-10
    assert gap(R.mirror(x, a), mu) < 1e-9
    assert gap(R.metric(x, a), closed.metric(x, a)) < 1e-9
    assert gap(R.centre(a), closed.centre(a)) < 1e-10
    # R_a is known up to a constant that does not depend on a: the closed form's at the start.
    start = closed.conjugate(torch.zeros_like(mu), 0.0)
    assert abs(R.conjugate(mu, a) - (closed.conjugate(mu, a) - start)) < 1e-10
    assert abs(R.value(x, a) - (closed.value(x, a) + start)) < 1e-10
    assert abs(R.bregman(x, y, a) - closed.bregman(x, y, a)) < 1e-10
    assert R.bregman(x, y, a) > 0


@each_pair
@few
@given(seed=st.integers(0, 10**6), a=st.floats(-0.6, 0.05))
@pytest.mark.sample(2)
def test_inversion_agrees_with_the_closed_form(name, seed, a):
    agree(*both(name, seed), seed, a)


@each_pair
@pytest.mark.sample(1)
def test_a_users_own_pair_agrees_with_the_closed_form(name):
    closed, R = both(name, 1, own=True, n=1)
    assert isinstance(R, Inversion) and not isinstance(closed, Inversion)
    assert isinstance(R.g, mf.CustomReparam) and isinstance(R.h, mf.CustomRegularizer)
    mu, x = random(closed, -0.4, 1)
    assert gap(R.primal(mu, -0.4), x) < 1e-10
    assert gap(R.mirror(x, -0.4), mu) < 1e-9
    assert gap(R.metric(x, -0.4), closed.metric(x, -0.4)) < 1e-9


EDGES = ("hadamard", "hadamard-balanced", "power-1-drift", "power-3", "log-ratio")


@pytest.mark.parametrize("case", [c for c in FAST if c.id in EDGES], ids=str)
@pytest.mark.parametrize("x", [(0.0, 0.0, 0.0), (1e-9, -1e-70, 1e-3), (2.0, -3.0, 1e6)])
@pytest.mark.sample(3)
def test_inversion_far_from_the_centre(case, x):
    w0, x, a = case.start(0), tensor(*x), -0.6
    closed, R = mf.legendre(case.g, case.h, w0), Inversion(case.g, case.h, w0)
    x = x.clamp(-case.largest_x, case.largest_x)
    if case.form is OneSidedEntropy:  # x keeps its sign
        x = (x.abs() + 1e-6) * closed.sign
        with pytest.raises(mf.RangeError, match="outside the domain"):
            R.mirror(-x, a)
    mu = R.mirror(x, a)
    assert gap(mu, closed.mirror(x, a)) < 1e-10
    assert ((R.metric(x, a) / closed.metric(x, a) - 1).abs() < 1e-10).all()
    # x is known as well as mu and the integration resolve it.
    resolution = 1e-12 * (mu.abs() / closed.metric(x, a) + closed.centre(a).abs() + x.abs())
    assert ((R.primal(mu, a) - x).abs() < 30 * resolution).all()


@pytest.mark.slow
def test_inversion_of_weights_that_have_decayed_to_nothing():
    """log A = -300: from the centre, at 1e-130, to x = 1 takes 33,000 evaluations."""
    w0 = (tensor(0.3), tensor(1.0))
    closed, R = mf.legendre(mf.Hadamard(), DECAY, w0), Inversion(mf.Hadamard(), DECAY, w0)
    assert gap(R.mirror(tensor(1.0), -150.0), closed.mirror(tensor(1.0), -150.0)) < 1e-11
    assert gap(R.centre(-150.0), closed.centre(-150.0)) < 1e-9


# The range.


@pytest.mark.parametrize("name", ["power-2", "power-3-drift", "log-ratio"])
@pytest.mark.parametrize("a", [0.0, -0.6])
@pytest.mark.sample(1)
def test_the_range_is_that_of_the_closed_form(name, a):
    closed, R = both(name, own=a < 0, n=2)
    for got, wanted in zip(R.range(a), closed.range(a), strict=True):
        assert ((got - wanted).abs() < 1e-8 * (closed.range(a)[1] - closed.range(a)[0])).all()


OWN_TERMS = mf.CustomRegularizer(sum_of_fourth_powers, elementwise=True)


def test_the_range_at_large_weights_and_long_decay():
    """Widths of 1e-6 and of 50 in one vector."""
    w0 = (tensor(30.0, 0.9), tensor(20.0, 0.1))
    g, own = mf.PowerDifference(2), mf.CustomReparam(fourth_powers, elementwise=True)
    for a in (0.0, -30.0):
        closed, R = mf.legendre(g, TERMS, w0), Inversion(own, OWN_TERMS, w0)
        width = closed.range(a)[1] - closed.range(a)[0]
        for got, wanted in zip(R.range(a), closed.range(a), strict=True):
            assert ((got - wanted).abs() < 1e-7 * width).all()


@pytest.mark.parametrize("id", ["hadamard", "hadamard-balanced", "power-1-zero"])
@pytest.mark.parametrize("a", [0.0, -5.0])
@pytest.mark.sample(1)
def test_an_infinite_range(id, a):
    """Balanced starts too, where rounding leaves a difference of the factors that grows."""
    (case,) = (c for c in FAST if c.id == id)
    lower, upper = Inversion(case.g, case.h, case.start(0)).range(a)
    assert torch.isneginf(lower).all() and torch.isposinf(upper).all()


@pytest.mark.slow
def test_the_range_of_a_line_and_of_an_exponential():
    line = Inversion(mf.Identity(), mf.Separable(), tensor(0.0, 2.0))
    assert torch.isinf(torch.stack(line.range(-1.0))).all()
    # dw = e^w (dmu + da): e^-w = e^-w0 - mu - a, so that mu < e^-w0 - a; x = e^w > 0.
    w0 = tensor(-3.0, 0.0, 1.0)
    R = exponential(w0)
    lower, upper = R.range(-0.4)
    assert torch.isneginf(lower).all()
    assert gap(upper, torch.exp(-w0) + 0.4) < 1e-8
    assert (
        gap(
            R.primal(tensor(-1e3, -1.0, 0.3), -0.4),
            1 / (torch.exp(-w0) + 0.4 - tensor(-1e3, -1.0, 0.3)),
        )
        < 1e-10
    )
    with pytest.raises(mf.RangeError, match="outside the domain"):
        R.mirror(tensor(1.0, -1.0, 1.0), -0.4)


def exponential(w0):
    g = mf.CustomReparam(torch.exp, elementwise=True)
    return mf.legendre(g, mf.CustomRegularizer(total_exponential, elementwise=True), w0)


@pytest.mark.slow
def test_the_range_costs_a_few_thousand_evaluations():
    """One integration of all coordinates and both sides, without what fails on the way."""
    calls = 0

    def counted(w):
        nonlocal calls
        calls += 1
        return torch.exp(w)

    R = exponential(tensor(0.1, 0.2, 0.3))
    R.g = mf.CustomReparam(counted, elementwise=True)
    R.range(-0.3)
    assert 100 < calls < 6000


@pytest.mark.slow
def test_mu_outside_the_range_is_refused_with_the_range():
    closed, R = both("power-2")
    lower, upper = closed.range(-0.2)
    for mu in (upper + 0.1, lower - 0.1):
        with pytest.raises(mf.RangeError) as caught:
            R.primal(mu, -0.2)
        message = str(caught.value)
        assert "outside the range" in message
        assert all(f"{float(end):.17g}"[:8] in message for end in (*lower, *upper))
        with pytest.raises(mf.RangeError, match="outside the range"):
            R.conjugate(mu, -0.2)


@pytest.mark.slow
def test_decay_that_leaves_no_centre():
    """log u + log v sends u and v to 0 at a finite a; the message does not need the range."""
    _, R = both("log-ratio")
    for call in (R.centre, R.range, lambda a: R.primal(torch.zeros(3, dtype=DOUBLE), a)):
        with pytest.raises(mf.RangeError, match="decay takes w0 out of the domain"):
            call(-10.0)


# Coordinates that share parameters.


def dense(w0):
    return mf.legendre(mf.CustomReparam(mixed_squares), DECAY, w0)


def test_a_dense_pair_in_closed_form():
    """x = Q w^2 / 2 with weight decay has w = w0 exp(a + Q^T mu)."""
    w0, Q, mu, a = tensor(0.8, 1.1), torch.from_numpy(MIX), tensor(0.05, -0.1), -0.4
    R = dense(w0)
    w = w0 * torch.exp(a + Q.mT @ mu)
    assert gap(R.primal(mu, a), Q @ w**2 / 2) < 1e-10
    assert gap(R.mirror(Q @ w**2 / 2, a), mu) < 1e-9
    assert gap(R.metric(Q @ w**2 / 2, a), torch.linalg.inv(Q @ torch.diag(w**2) @ Q.mT)) < 1e-9
    assert abs(R.conjugate(mu, a) - (w @ w - w0 @ w0) / 4) < 1e-11
    y = R.primal(tensor(0.1, 0.1), a)
    assert R.bregman(y, Q @ w**2 / 2, a) > 1e-4


def test_a_dense_pair_has_no_box_for_a_range_and_takes_one_x_at_a_time():
    R = dense(tensor(0.8, 1.1))
    with pytest.raises(mf.RangeError, match="not marked elementwise"):
        R.range(0.0)
    two = torch.ones(3, 2, dtype=DOUBLE)
    for method in (R.primal, R.mirror, R.metric):
        with pytest.raises(ValueError, match=r"must have shape \(2,\), without a batch"):
            method(two, 0.0)
    mu = 0.01 * two * tensor(1.0, -1.0)
    alone = torch.stack([R.conjugate(m, -0.1) for m in mu])
    assert gap(R.conjugate(mu, -0.1), alone) < 1e-12


def thirds(w):
    return (w[0] ** 4 + w[1] ** 4).sum() / 3


@pytest.mark.parametrize(
    ("g", "h", "w0", "message"),
    [
        (
            mf.PowerDifference(2), mf.CustomRegularizer(thirds), (tensor(0.9), tensor(0.8)),
            r"thirds.* is not marked elementwise. Pass elementwise=True to CustomRegularizer",
        ),
        (
            mf.CustomReparam(fourth_powers), mf.CustomRegularizer(thirds, elementwise=True),
            (tensor(0.9), tensor(0.8)), "Pass elementwise=True to CustomReparam",
        ),
    ],
    ids=("h", "g"),
)  # fmt: skip
@pytest.mark.sample(1)
def test_a_missing_promise_of_elementwise_is_named(g, h, w0, message):
    R = mf.legendre(g, h, w0)
    with pytest.raises(mf.RangeError, match=message):
        R.range(0.0)
    with pytest.raises(ValueError, match=message):
        R.mirror(torch.zeros(2, 1, dtype=DOUBLE), 0.0)


def test_coordinates_that_share_parameters_are_not_called_unmarked():
    A = torch.eye(2, dtype=DOUBLE).diag_embed()
    R = Inversion(mf.CommutingQuadratic(A), DECAY, tensor(0.8, 1.1))
    with pytest.raises(mf.RangeError, match=r"the coordinates of CommutingQuadratic.* share param"):
        R.range(0.0)


# Derivatives.


@pytest.mark.parametrize("name", ["power-2", "hyperbolic", "dense"])
@pytest.mark.sample(1)
def test_gradients_of_first_and_second_order(name):
    R = dense(tensor(0.8, 1.1)) if name == "dense" else both(name, n=1)[1]
    a = torch.tensor(-0.3, dtype=DOUBLE, requires_grad=True)
    mu, x = (v.detach().requires_grad_() for v in random(R, -0.3, 1))
    second = ((R.primal, mu), (R.mirror, x)) if name != "dense" else ((R.mirror, x),)
    for function, argument in ((R.primal, mu), (R.mirror, x), (R.value, x)):
        assert gradcheck(function, (argument, a), atol=1e-6, rtol=1e-4)
    for function, argument in second:
        assert gradgradcheck(function, (argument, a), eps=1e-5, atol=1e-5, rtol=1e-3)


@each_pair
@pytest.mark.sample(2)
def test_mirror_and_metric_are_derivatives_of_the_value(name):
    R = both(name, 1)[1]
    mu, x = random(R, -0.3, 2)
    leaf = x.clone().requires_grad_()
    (first,) = grad(R.value(leaf, -0.3), leaf, create_graph=True)
    (second,) = grad(first.sum(), leaf)
    assert gap(first.detach(), mu) < 1e-9
    assert gap(second, R.metric(x, -0.3)) < 1e-9
    step = 3e-3 / R.metric(x, -0.3)
    difference = (R.value(x + step, -0.3) - R.value(x - step, -0.3)) / 2
    assert abs(difference - (mu * step).sum()) < 1e-3 * (mu * step).abs().sum()


# Many coordinates, batches, precisions, and wrong arguments.


def test_many_coordinates_are_integrated_together():
    n = 10**5
    w0 = (torch.full((n,), 0.3, dtype=DOUBLE), torch.full((n,), 0.8, dtype=DOUBLE))
    closed, R = mf.legendre(mf.Hadamard(), DECAY, w0), Inversion(mf.Hadamard(), DECAY, w0)
    mu = 0.01 * torch.from_numpy(np.random.default_rng(0).standard_normal(n))
    assert gap(R.primal(mu, -0.2), closed.primal(mu, -0.2)) < 1e-10


def test_batches_of_mu_and_of_a():
    _, R = both("hyperbolic")
    mu = torch.stack([random(R, 0.0, seed)[0] for seed in range(3)])
    a = torch.tensor([0.0, -0.1, -0.4], dtype=DOUBLE)[:, None]
    x = R.primal(mu, a)
    for i in range(3):
        assert gap(x[i], R.primal(mu[i], float(a[i]))) < 1e-11
        assert gap(R.mirror(x, a)[i], mu[i]) < 1e-9
        assert abs(R.value(x, a)[i] - R.value(x[i], float(a[i]))) < 1e-10


@pytest.mark.parametrize("name", ["power-2", "log-ratio", "hyperbolic"])
@pytest.mark.sample(1)
def test_float32_in_and_out(name):
    g, h, _, _, start = PAIRS[name]
    exact, R = mf.legendre(g, h, start(0)), Inversion(g, h, tuple(f.float() for f in start(0)))
    mu, at = (v.float() for v in random(exact, -0.3, 1))
    assert R.dtype == R.primal(mu, -0.3).dtype == R.mirror(at, -0.3).dtype == torch.float32
    assert R.value(at, -0.3).dtype == R.metric(at, -0.3).dtype == torch.float32
    assert R.range(-0.3)[0].dtype == R.centre(-0.3).dtype == torch.float32
    assert gap(R.primal(mu, -0.3), exact.primal(mu.double(), -0.3)) < 1e-5
    assert gap(R.mirror(at, -0.3), exact.mirror(at.double(), -0.3)) < 1e-4


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
def test_nan_and_wrong_shapes_name_the_argument(method, names):
    _, R = both("hyperbolic")
    good = [0.1 * torch.ones(3, dtype=DOUBLE) for _ in names]
    for i, name in enumerate(names):
        for spoiled, message in (
            (tensor(0.1, math.nan, 0.1), f"^{name} must be a number, got NaN"),
            (tensor(0.1, 0.1), rf"^{name} must have shape \(3,\), got \(2,\)"),
        ):
            with pytest.raises(ValueError, match=message):
                getattr(R, method)(*good[:i], spoiled, *good[i + 1 :], -0.1)
    with pytest.raises(ValueError, match=r"^a must be finite, got nan"):
        getattr(R, method)(*good, math.nan)
