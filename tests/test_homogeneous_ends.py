"""Weight decay with any homogeneous model: the ends of training, and pairs of a user's own."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.optimize import linprog

import mirrorflow as mf
import oracles
from homogeneous import (
    DECAY,
    MODELS,
    D,
    few,
    gap,
    problem,
    start,
    tensors,
    trained,
)
from mirrorflow.legendre import (
    Inversion,
    RescaledFunction,
)

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
