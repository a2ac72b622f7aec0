"""The theory as laws, over every pair of the case table; the oracle is NumPy and SciPy alone."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.optimize import bisect

import mirrorflow as mf
import oracles
from cases import COMMUTE, EVERY, FAIL, FAST, LOSSES, SCHEDULES, loss
from mirrorflow import regularizer, reparam

UNTIL = 1.5
each_pair = pytest.mark.parametrize("case", COMMUTE, ids=str)
each_fast_pair = pytest.mark.parametrize("case", FAST, ids=str)
few = settings(max_examples=5, deadline=None, derandomize=True, database=None)


def legendre(case, seed=0):
    return mf.legendre(case.g, case.h, case.start(seed))


def tensor(case, x):
    return torch.from_numpy(np.array(x)).reshape(case.g(case.start(0)).shape)


def train(case, name="least-squares", schedule=SCHEDULES["constant"], seed=0, times=(UNTIL,)):
    """Integrate the flow in w with the oracle; give rows (w, x, mu, a)."""
    return oracles.train(
        case.field,
        case.flat(seed),
        loss(case, name).slope,
        schedule.rate,
        times[-1],
        schedule.breakpoints,
        times,
    )


def gap(one, two, floor=1e-3):
    """Return the largest difference relative to the size of the second."""
    one, two = (np.asarray(v).ravel() for v in (one, two))
    return np.abs(one - two).max() / max(np.abs(two).max(), floor)


@st.composite
def schedules(draw):
    """Draw piecewise constant rates, some negative, that keep a in [-0.375, 0.075]."""
    count = draw(st.integers(1, 4))
    rates = draw(st.lists(st.floats(-0.05, 0.25), min_size=count, max_size=count))
    return mf.Piecewise(tuple(UNTIL * (i + 1) / count for i in range(count - 1)), rates)


# Law 1 (Theorem 3.2): mirror(x_t, a_t) = mu_t for every loss and every schedule.


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", LOSSES)
@each_fast_pair
@pytest.mark.sample(40)
def test_the_mirror_of_x_is_mu(case, name, schedule):
    R = legendre(case)
    _, x, mu, a = train(case, name, schedule, times=(0.3, 1.0, UNTIL))
    for xi, mui, ai in zip(x, mu, a, strict=True):
        assert gap(R.mirror(tensor(case, xi), ai), mui) < 1e-8
        assert gap(R.primal(tensor(case, mui), ai), xi) < 1e-9


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", [c for c in COMMUTE if c.slow], ids=str)
@pytest.mark.sample(2)
def test_the_mirror_of_x_is_mu_by_inversion(case, name):
    R = legendre(case)
    _, (x,), (mu,), (a,) = train(case, name, SCHEDULES["negative"])
    assert gap(R.mirror(tensor(case, x), a), mu) < 1e-8
    assert gap(R.primal(tensor(case, mu), a), x) < 1e-9


@few
@given(seed=st.integers(0, 10**6), schedule=schedules(), name=st.sampled_from(LOSSES))
@each_fast_pair
@pytest.mark.sample(6)
def test_the_laws_hold_from_random_starts(case, seed, schedule, name):
    R = legendre(case, seed)
    _, (x,), (mu,), (a,) = train(case, name, schedule, seed)
    assert abs(a - schedule.accumulated(UNTIL)) < 1e-12
    assert gap(R.mirror(tensor(case, x), a), mu) < 1e-8
    assert gap(R.primal(tensor(case, mu), a), x) < 1e-9


# Law 2: only the integral of alpha matters.


@each_pair
@pytest.mark.sample(9)
def test_w_depends_on_mu_and_a_only(case):
    """Reach one (mu, a) on two paths: first mu and then a, or the other way round."""
    rng = np.random.default_rng(3)
    d = len(case.field.g(case.flat(0)))
    dmu = rng.uniform(-0.02, 0.02, d if case.span is None else case.span.shape[1])
    dmu = dmu if case.span is None else case.span @ dmu
    zero, w0 = np.zeros(d), case.flat(0)
    one = oracles.move(case.field, oracles.move(case.field, w0, dmu, 0.0), zero, -0.3)
    two = oracles.move(case.field, oracles.move(case.field, w0, zero, -0.3), dmu, 0.0)
    assert gap(one, two) < 1e-9
    x = legendre(case).primal(tensor(case, dmu), -0.3)
    assert gap(x, case.field.g(one)) < 1e-9


@pytest.mark.parametrize("case", [c for c in FAST if c.span is None], ids=str)
def test_schedules_with_one_integral_end_in_one_point(case):
    """Interpolating flows (loss 0 at the end) forget when the decay came."""
    ends = []
    linear = loss(case, "least-squares", n=1).torch
    for schedule in (
        mf.SwitchOff(0.2, 1.0),
        mf.Piecewise((2.0, 2.5), (0.0, 0.4, 0.0)),
        mf.Linear(0.4, 0.0, 1.0),
    ):
        sol = mf.flow(linear, case.g, case.h, case.start(0), schedule, 400.0, rtol=1e-10)
        assert (linear.predict(sol.value) - linear.y).abs().max() < 1e-9
        ends.append(sol.value)
    assert gap(ends[1], ends[0]) < 1e-7
    assert gap(ends[2], ends[0]) < 1e-7
    without = mf.flow(linear, case.g, case.h, case.start(0), mf.Constant(0.0), 400.0, rtol=1e-10)
    assert gap(without.value, ends[0]) > 1e-3


# Law 3: the inverse metric is J_g J_g^T at the w of the flow.


@pytest.mark.parametrize("case", [c for c in COMMUTE if c.span is None], ids=str)
@pytest.mark.sample(5)
def test_the_inverse_metric_is_the_gram_of_the_jacobian(case):
    (w,), (x,), _, (a,) = train(case, "quartic")
    J = case.field.jacobian(w).T
    metric = legendre(case).metric(tensor(case, x), a)
    dense = torch.diag(metric) if metric.ndim == 1 else metric
    assert gap(dense.numpy() @ J @ J.T, np.eye(len(J))) < 1e-7


def test_the_inverse_metric_of_a_matrix_along_commuting_directions():
    (case,) = (c for c in COMMUTE if c.id == "symmetric-commuting")
    (w,), (x,), _, (a,) = train(case, "quartic")
    U, R = torch.from_numpy(w).reshape(3, 3), legendre(case)
    for column in case.span.T:
        S = torch.from_numpy(column.reshape(3, 3).copy())
        pushed = case.g.pushforward(U, case.g.pullback(U, S))
        assert gap(R.apply_metric(tensor(case, x), a, pushed), S) < 1e-8


# Law 4: the centre minimizes R_a, and is where the flow goes without a loss.


@each_pair
@pytest.mark.sample(9)
def test_the_centre_is_the_flow_without_a_loss(case):
    R, a = legendre(case), -0.3
    still = oracles.move(case.field, case.flat(0), np.zeros(len(case.field.g(case.flat(0)))), a)
    centre = R.centre(a)
    assert gap(centre, case.field.g(still)) < 1e-9
    assert R.mirror(centre, a).abs().max() < 1e-8


@each_fast_pair
def test_the_centre_minimizes_R(case):
    R, a = legendre(case), -0.3
    centre = R.centre(a)
    lowest = R.value(centre, a)
    rng = np.random.default_rng(5)
    for _ in range(5):
        size = 0.05 * rng.standard_normal(len(centre.reshape(-1)))
        step = size if case.span is None else case.span @ size[: case.span.shape[1]]
        assert R.value(R.primal(tensor(case, step), a), a) > lowest


# Law 5: the three views are one flow.


@pytest.mark.parametrize("name", ("least-squares", "logistic"))
@each_fast_pair
@pytest.mark.sample(7)
def test_three_views_agree_with_the_oracle(case, name):
    schedule, times = SCHEDULES["off-on-off"], (0.2, 0.5, 1.1, UNTIL)
    w, x, mu, a = train(case, name, schedule, times=times)
    for view in ("parameters", "mirror", "primal"):
        sol = mf.flow(
            loss(case, name).torch, case.g, case.h, case.start(0), schedule, UNTIL,
            view=view, save_at=times, rtol=1e-9,
        )  # fmt: skip
        assert sol.status.ok
        assert gap(sol.path.x, x) < 1e-6
        assert gap(sol.path.mu, mu) < 1e-6
        assert gap(sol.path.a, a) < 1e-10
        assert gap(sol.value, x[-1]) < 1e-6
        if view == "parameters":
            parts = (sol.path.w,) if isinstance(sol.path.w, torch.Tensor) else sol.path.w
            rows = torch.cat([p.reshape(len(times), -1) for p in parts], dim=1)
            assert gap(rows, w) < 1e-6
        else:
            assert sol.path.w is None


@pytest.mark.parametrize("case", [c for c in COMMUTE if c.slow], ids=str)
@pytest.mark.sample(2)
def test_the_mirror_view_by_inversion(case):
    _, (x,), (mu,), _ = train(case, "least-squares", SCHEDULES["linear"])
    made = loss(case, "least-squares").torch
    sol = mf.flow(
        made, case.g, case.h, case.start(0), SCHEDULES["linear"], UNTIL, view="mirror", rtol=1e-7
    )
    assert gap(sol.value, x) < 1e-5
    assert gap(sol.path.mu[-1], mu) < 1e-5


# Law 6 (Theorem 3.6): after switching off, the flow ends in argmin {R_a : Zx = y}.


def end_of_flow(case):
    schedule, linear = mf.SwitchOff(0.3, 1.0), loss(case, "least-squares", n=1).torch
    sol = mf.flow(linear, case.g, case.h, case.start(0), schedule, 400.0, rtol=1e-10)
    assert (linear.predict(sol.value) - linear.y).abs().max() < 1e-9
    return linear, sol.value


@each_fast_pair
def test_the_end_point_satisfies_the_optimality_conditions(case):
    """Zx = y, and mirror(x, a_T) is in the range of Z^T."""
    linear, x = end_of_flow(case)
    mu = legendre(case).mirror(x, -0.3).reshape(-1).numpy()
    Z = linear.Z.reshape(len(linear.y), -1).numpy()
    theta = np.linalg.lstsq(Z.T, mu, rcond=1e-10)[0]
    assert np.abs(theta).max() > 1e-2  # the test would say nothing at mu = 0
    assert gap(Z.T @ theta, mu) < 1e-6


@each_fast_pair
def test_the_end_point_solves_the_dual_problem(case):
    linear, x = end_of_flow(case)
    R = legendre(case)

    def residual(theta):
        """Return Z primal(Z^T theta) - y, which increases; infinite where it does not exist."""
        mu = case.g.project(linear.transpose(torch.tensor([theta], dtype=torch.float64)))
        try:
            return float(linear.predict(R.primal(mu, -0.3)) - linear.y)
        except mf.RangeError:
            return np.copysign(1e300, theta)

    theta = bisect(residual, -20.0, 20.0, xtol=1e-13)
    assert abs(residual(theta)) < 1e-9
    mu = case.g.project(linear.transpose(torch.tensor([theta], dtype=torch.float64)))
    assert gap(x, R.primal(mu, -0.3)) < 1e-6


@pytest.mark.parametrize("case", [c for c in FAST if c.g.elementwise], ids=str)
def test_the_end_point_is_the_limit(case):
    linear, x = end_of_flow(case)
    sol = mf.limit(legendre(case), linear.Z, linear.y, -0.3)
    assert sol.status.ok
    assert gap(x, sol.value) < 1e-6


# Law 7: the balance of two factors, for any loss and without alignment.


@few
@given(seed=st.integers(0, 10**6), schedule=schedules())
def test_the_imbalance_of_a_product_decays_like_e_to_the_2a(seed, schedule):
    (case,) = (c for c in EVERY if c.id == "product")

    def strange(X):
        return torch.sin(X).sum() + (X**2).sum() ** 1.5 + (X[0] * X[1]).sum()

    A0, B0 = case.start(seed)
    sol = mf.flow(strange, case.g, case.h, (A0, B0), schedule, UNTIL, save_at=(0.7, UNTIL))
    start = A0.mT @ A0 - B0 @ B0.mT
    for i in range(2):
        A, B = (f[i] for f in sol.path.w)
        left = A.mT @ A - B @ B.mT
        assert gap(left, torch.exp(2 * sol.path.a[i]) * start) < 1e-6


def test_aligned_factors_have_the_entropy_of_m_w_in_their_singular_values():
    """A0 = P m0 S^T, B0 = S w0 V^T and gradients P (...) V^T, as docs/theory.md has it."""
    rng = np.random.default_rng(0)
    P, S, V = (np.linalg.qr(rng.standard_normal((n, n)))[0][:, :3] for n in (4, 3, 5))
    m, w, y = np.array([1.0, 0.4, 0.2]), np.array([0.3, 0.9, -0.6]), np.array([0.5, -0.3])
    A0, B0 = P @ np.diag(m) @ S.T, S @ np.diag(w) @ V.T
    sensing = np.stack([P @ np.diag(rng.standard_normal(3)) @ V.T for _ in range(2)])

    def velocity(_, state):
        A, B = state[:12].reshape(4, 3), state[12:27].reshape(3, 5)
        G = np.tensordot(np.tensordot(sensing, A @ B, 2) - y, sensing, 1)
        return -np.concatenate(
            [(G @ B.T + 0.2 * A).ravel(), (A.T @ G + 0.2 * B).ravel(), G.ravel()]
        )

    start = np.concatenate([A0.ravel(), B0.ravel(), np.zeros(20)])
    end = solve_ivp(velocity, (0, 3), start, rtol=1e-11, atol=1e-13).y[:, -1]
    X = end[:12].reshape(4, 3) @ end[12:27].reshape(3, 5)
    mu = np.diag(P.T @ end[27:].reshape(4, 5) @ V).copy()
    factors = (torch.from_numpy(m), torch.from_numpy(w))
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), factors)
    expected = np.diag(R.primal(torch.from_numpy(mu), -0.6).numpy())
    np.testing.assert_allclose(P.T @ X @ V, expected, atol=1e-11)
    w0 = (torch.from_numpy(A0), torch.from_numpy(B0))
    assert mf.check(mf.Product(), mf.WeightDecay(), w0, torch.from_numpy(sensing)).commuting


# Law 8, of training, is in test_descent.py: the order of the time step.


# What is outside the theory violates it, by an amount that can be measured.


@pytest.mark.parametrize("case", FAIL, ids=str)
def test_a_pair_that_does_not_commute_reaches_one_mu_and_a_in_different_points(case):
    rng = np.random.default_rng(1)
    d = len(case.field.g(case.flat(0)))
    p, q = rng.uniform(-0.05, 0.05, (2, d))
    zero, w0, field = np.zeros(d), case.flat(0), case.field

    def follow(*legs):
        w = w0
        for dmu, da in legs:
            w = oracles.move(field, w, dmu, da)
        return field.g(w)

    by_decay = gap(follow((p, 0.0), (zero, -0.4)), follow((zero, -0.4), (p, 0.0)))
    by_order = gap(follow((p, 0.0), (q, 0.0)), follow((q, 0.0), (p, 0.0)))
    assert max(by_decay, by_order) > 1e-3
    # For U U^T, A B and general quadratics the coordinates of g disagree; for the others h does.
    if case.g.elementwise:
        assert by_order < 1e-9 and by_decay > 1e-3
    else:
        assert by_order > 1e-3


@pytest.mark.parametrize("case", [c for c in FAIL if not c.start_decides], ids=str)
def test_only_the_parameter_view_takes_a_pair_that_does_not_commute(case):
    made, schedule = loss(case, "least-squares"), SCHEDULES["negative"]
    _, (x,), (mu,), _ = train(case, "least-squares", schedule)
    sol = mf.flow(made.torch, case.g, case.h, case.start(0), schedule, UNTIL, rtol=1e-9)
    assert gap(sol.value, x) < 1e-6
    assert gap(sol.path.mu[-1], mu) < 1e-6
    for view in ("mirror", "primal"):
        with pytest.raises(mf.IncompatiblePair) as caught:
            mf.flow(made.torch, case.g, case.h, case.start(0), schedule, UNTIL, view=view)
        assert not caught.value.report.commuting


def test_a_general_start_of_U_has_no_mirror_view():
    (case,) = (c for c in EVERY if c.id == "symmetric")
    made = loss(case, "least-squares").torch
    with pytest.raises(ValueError, match="U0 U0"):
        mf.flow(made, case.g, case.h, case.start(0), SCHEDULES["constant"], 1.0, view="mirror")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sol = mf.flow(made, case.g, case.h, case.start(0), SCHEDULES["constant"], 1.0)
    _, (x,), _, _ = train(case, "least-squares", times=(1.0,))
    assert gap(sol.value, x) < 1e-6


def test_the_laws_fail_for_U_when_the_sensing_matrices_do_not_commute():
    """The entropy of U U^T is a surrogate there: mirror(x_t, a_t) is not mu_t."""
    (case,) = (c for c in EVERY if c.id == "symmetric-commuting")
    rng = np.random.default_rng(2)
    Z = rng.standard_normal((2, 3, 3))
    Z = ((Z + np.swapaxes(Z, 1, 2)) / 2).reshape(2, 9)
    _, (x,), (mu,), (a,) = oracles.train(
        case.field, case.flat(0), lambda x: Z.T @ (Z @ x - np.ones(2)), lambda t: 0.2, 2.0
    )
    assert gap(legendre(case).mirror(tensor(case, x), a), mu) > 1e-3


# The table is complete.


def public(module, base):
    named = (getattr(module, name) for name in module.__all__)
    return {c for c in named if isinstance(c, type) and issubclass(c, base)}


def concrete(classes):
    return {c for c in classes if not getattr(c, "__abstractmethods__", None)}


def test_every_public_parametrization_and_penalty_is_in_the_table():
    assert concrete(public(reparam, reparam.Reparam)) == {type(c.g) for c in EVERY}
    assert concrete(public(regularizer, regularizer.Regularizer)) == {type(c.h) for c in EVERY}
    assert len({c.id for c in EVERY}) == len(EVERY)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_the_oracle_and_the_package_have_the_same_g_and_gradients(case):
    w0, rng = case.start(4), np.random.default_rng(4)
    assert gap(case.g(w0), case.field.g(case.flat(4))) < 1e-12
    s = rng.standard_normal(len(case.field.g(case.flat(4))))
    pulled = reparam.flatten(case.g.pullback(w0, tensor(case, s)))
    assert gap(pulled, case.field.pull(case.flat(4), s)) < 1e-12
    decay = reparam.flatten(case.h.gradient(w0, case.g))
    assert gap(decay, case.field.decay(case.flat(4))) < 1e-12
