"""End points against solvers that share nothing with `limit`: CVXPY, HiGHS, and trained flows."""

import math
import pickle

import cvxpy as cp
import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.optimize import linprog

import mirrorflow as mf
import oracles
from cases import COMMUTE, EIGEN, EVERY
from endpoints import dense, distance, optimal, smallest_l1, sparse, tensors, zero_start

H, DECAY, TERMS, Status = mf.Hadamard(), mf.WeightDecay(), mf.Separable(), mf.Status


# Against CVXPY, whose x is good to the root of its gap.

CONE = 1e-4


def solved(objective, constraints, x):
    problem = cp.Problem(cp.Minimize(objective), constraints)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    assert problem.status == "optimal"
    return x.value


def entropies(s, centre):
    """Return sum s log(s / centre) - s, an exponential cone."""
    return cp.sum(cp.rel_entr(s, centre)) - cp.sum(s)


def hyperbolic_by_cone(Z, y, m0, w0, a):
    """x = p - q with p, q = u^2/2, v^2/2: the hyperbolic entropy is the least sum of two others."""
    u0, v0 = (m0 + w0) ** 2 / 4, (m0 - w0) ** 2 / 4
    p, q = cp.Variable(len(m0)), cp.Variable(len(m0))
    decay = math.exp(2 * a)
    solved(entropies(p, u0 * decay) + entropies(q, v0 * decay), [Z @ (p - q) == y], p)
    return p.value - q.value


@pytest.mark.parametrize("a", (0.5, 0.0, -1.0, -3.0))
@pytest.mark.parametrize("start", ("zero", "unbalanced", "more m"))
def test_hadamard_is_the_hyperbolic_entropy(start, a):
    rng = np.random.default_rng(0)
    Z, y = dense(4, 9, 1)
    m0 = {"zero": np.zeros(9), "unbalanced": rng.uniform(-0.5, 0.5, 9)}.get(
        start, rng.uniform(1.1, 1.5, 9)
    )
    w0 = rng.uniform(0.7, 1.0, 9)
    R = mf.legendre(H, DECAY, tensors(m0, w0))
    sol = mf.limit(R, Z, y, a)
    assert sol.status is Status.converged and sol.stats.kkt < 1e-11 and sol.stats.residual < 1e-12
    optimal(R, Z, y, a, sol)
    assert distance(sol.value, hyperbolic_by_cone(Z, y, m0, w0, a)) < CONE


@pytest.mark.parametrize("a", (0.5, -1.0, -4.0))
def test_a_balanced_start_is_the_one_sided_entropy(a):
    rng = np.random.default_rng(0)
    m0, sign = rng.uniform(0.5, 1.2, 9), rng.choice([-1.0, 1.0], 9)
    R = mf.legendre(H, DECAY, tensors(m0, m0 * sign))
    Z = rng.standard_normal((4, 9))
    y = Z @ (sign * rng.uniform(0, 1, 9))
    s = cp.Variable(9)
    expected = sign * solved(entropies(s, m0**2 * math.exp(2 * a)), [(Z * sign) @ s == y], s)
    sol = mf.limit(R, Z, y, a)
    assert sol.status is Status.converged
    optimal(R, Z, y, a, sol)
    assert distance(sol.value, expected) < CONE


@pytest.mark.parametrize("a", (0.1, -0.3, -2.0))
def test_powers_are_a_second_order_cone(a):
    """x = p - q with p, q = u^4, v^4; R_a is linear in them less their roots."""
    rng = np.random.default_rng(0)
    u0, v0 = rng.uniform(0.7, 1.1, (2, 7))
    Z, y = dense(3, 7, 2)
    p, q = cp.Variable(7), cp.Variable(7)
    cu, cv = u0**-2 / 8, v0**-2 / 8
    cost = (cu - a) @ p + (cv - a) @ q - cp.sum(cp.sqrt(p) + cp.sqrt(q)) / 4
    solved(cost, [Z @ (p - q) == y], p)
    R = mf.legendre(mf.PowerDifference(2), TERMS, tensors(u0, v0))
    sol = mf.limit(R, Z, y, a)
    assert sol.status is Status.converged
    optimal(R, Z, y, a, sol)
    assert distance(sol.value, p.value - q.value) < CONE


@pytest.mark.parametrize("a", (0.3, -0.5, -1.2))
def test_logarithms_are_an_exponential_cone(a):
    rng = np.random.default_rng(0)
    u0, v0 = rng.uniform(1.6, 2.0, (2, 7))
    Z = rng.standard_normal((3, 7))
    y = 0.3 * rng.standard_normal(3)
    x = cp.Variable(7)
    cost = (u0**2 + 2 * a) @ cp.logistic(-2 * x) + (v0**2 + 2 * a) @ cp.logistic(2 * x)
    expected = solved(cost, [Z @ x == y], x)
    R = mf.legendre(mf.LogRatio(), TERMS, tensors(u0, v0))
    sol = mf.limit(R, Z, y, a)
    assert sol.status is Status.converged
    optimal(R, Z, y, a, sol)
    assert distance(sol.value, expected) < CONE


@pytest.mark.parametrize("a", (0.0, -1.0, -3.0))
def test_commuting_matrices_are_an_entropy_of_the_eigenvalues(a):
    V = EIGEN.reshape(3, 3, 3)  # the projections on the joint eigenvectors are V[:, :, k]
    Z = np.einsum("ik,abk->iab", np.random.default_rng(0).standard_normal((2, 3)), V)
    y = np.einsum("iab,abk,k->i", Z, V, [0.3, 0.8, 0.5])
    s = cp.Variable(3)
    expected = solved(
        entropies(s, 0.5 * math.exp(2 * a)), [np.einsum("iab,abk->ik", Z, V) @ s == y], s
    )
    R = mf.legendre(mf.SymmetricFactor(), DECAY, tensors(math.sqrt(0.5) * np.eye(3))[0])
    sol = mf.limit(R, Z, y, a)
    assert sol.status is Status.converged and sol.status.ok
    assert distance(sol.value, V @ expected) < CONE
    optimal(R, Z, y, a, sol)


# Against the flow.


def reachable(case, n=2):
    """Make measurements of an x that some flow of the pair reaches."""
    rng = np.random.default_rng(11)
    d = len(case.field.g(case.flat(0)))
    basis = np.eye(d) if case.span is None else case.span
    Z = rng.standard_normal((n, basis.shape[1])) @ basis.T
    mu = basis @ rng.uniform(-0.1, 0.1, basis.shape[1])
    x = case.field.g(oracles.move(case.field, case.flat(0), mu, -0.1))
    return mf.LeastSquares(*tensors(Z.reshape(n, *case.g(case.start(0)).shape), Z @ x))


def trained(case):
    """Train to the end, the decay switched off at t = 1 with a = -0.3."""
    linear = reachable(case)
    sol = mf.flow(linear, case.g, case.h, case.start(0), mf.SwitchOff(0.3, 1.0), 2000.0, rtol=1e-10)
    assert (linear.predict(sol.value) - linear.y).abs().max() < 1e-8
    return linear, sol.value


@pytest.mark.parametrize("case", COMMUTE, ids=str)
@pytest.mark.sample(8)
def test_training_ends_at_the_limit(case):
    """Theorem 3.6, for every pair: closed forms, quadratics, matrices, and pairs of one's own."""
    linear, x = trained(case)
    R = mf.legendre(case.g, case.h, case.start(0))
    sol = mf.limit(R, linear.Z, linear.y, -0.3)
    assert sol.status is Status.converged
    assert distance(x, sol.value) < 1e-6
    optimal(R, linear.Z.numpy(), linear.y.numpy(), -0.3, sol)


@pytest.mark.parametrize("off", (0.0, 2.0))
def test_training_a_wider_network_ends_at_the_limit(off):
    rng = np.random.default_rng(1)
    Z, y = dense(5, 12, 4)
    w0 = tensors(off * rng.standard_normal(12), rng.uniform(3, 4, 12))
    schedule = mf.Cosine(0.8, 0.0, 2.0)  # int alpha = 0.8
    sol = mf.flow(mf.LeastSquares(*tensors(Z, y)), H, DECAY, w0, schedule, 400.0, rtol=1e-10)
    R = mf.legendre(H, DECAY, w0)
    assert distance(sol.value, mf.limit(R, Z, y, schedule.accumulated(400.0)).value) < 1e-7


def test_matrices_that_do_not_commute_have_a_surrogate(recwarn):
    """The entropy is minimized, which is not where U U^T ends; no warning, and not ok."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((3, 4, 4))
    X = rng.standard_normal((4, 2))
    y = np.einsum("iab,ab->i", Z, X @ X.T)
    U0 = tensors(math.sqrt(0.3) * np.eye(4))[0]
    R = mf.legendre(mf.SymmetricFactor(), DECAY, U0)
    sol = mf.limit(R, Z, y, -0.3)
    assert sol.status is Status.surrogate and not sol.status.ok and not recwarn.list
    symmetric = (Z + np.swapaxes(Z, 1, 2)) / 2
    assert sol.stats.residual < 1e-10 and sol.stats.kkt < 1e-9
    log = scipy.linalg.logm(sol.value.numpy()).ravel() / 2
    centre = (math.log(0.3) - 0.6) / 2 * np.eye(4).ravel()
    theta = sol.aux["theta"].numpy() @ symmetric.reshape(3, -1)
    assert np.abs(log - centre - theta).max() < 1e-8
    end = mf.flow(
        mf.LeastSquares(*tensors(Z, y)), mf.SymmetricFactor(), DECAY, U0,
        mf.SwitchOff(0.3, 1.0), 300.0,
    )  # fmt: skip
    assert distance(sol.value, end.value) > 1e-2


# Towards L1.


def test_appendix_d_reaches_the_vertex():
    """alpha = 1 in Appendix D: log A = -200.7, on 40 x 100 with 5 non-zeros."""
    Z, y, x = sparse(40, 100, 5, 0)
    R = zero_start(100)
    assert float(R.log_A(-100.0)[0]) == pytest.approx(-200.7, abs=0.01)
    sol = mf.limit(R, Z, y, -100.0)
    assert sol.status is Status.vertex and sol.status.ok
    assert distance(sol.value, smallest_l1(Z, y)) < 1e-9 and distance(sol.value, x) < 1e-10
    assert sol.stats.gap < 1e-6 and sol.stats.kkt < 1e-6
    certificate = sol.aux["theta"].numpy() @ Z / 100
    assert np.abs(certificate).max() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("log_A", (-20.0, -60.0, -100.0, -200.0, -300.0))
@pytest.mark.parametrize("make", (sparse, dense))
def test_small_scales(make, log_A):
    """The vertex, to 1e-13, or else the certificate says how far the L1 norm can be from it."""
    Z, y, *_ = sparse(12, 30, 3, 5) if make is sparse else dense(12, 30, 5)
    a = (log_A + math.log(2)) / 2
    R = zero_start(30)
    sol = mf.limit(R, Z, y, a)
    assert sol.status in (Status.converged, Status.vertex)
    optimal(R, Z, y, a, sol, 1e-10)
    vertex = smallest_l1(Z, y)
    excess = 1 - np.abs(vertex).sum() / float(sol.value.abs().sum())
    assert -1e-9 <= excess <= sol.stats.gap + 1e-9  # HiGHS is an oracle to about 1e-10
    if sol.status is Status.vertex:
        assert distance(sol.value, vertex) < 1e-9
    if log_A <= -200.0 and make is sparse:
        assert sol.status is Status.vertex


def test_large_scales_tend_to_the_shortest_solution():
    Z, y = dense(6, 15, 3)
    sol = mf.limit(zero_start(15), Z, y, 12.0)
    assert distance(sol.value, np.linalg.pinv(Z) @ y) < 1e-9


def test_the_certificate_bounds_the_l1_norm_from_everywhere():
    """Unbalanced starts too, whose R_a is not even."""
    rng = np.random.default_rng(0)
    Z, y = dense(6, 15, 3)
    R = mf.legendre(H, DECAY, tensors(rng.uniform(-0.5, 0.5, 15), rng.uniform(0.6, 1, 15)))
    best = np.abs(smallest_l1(Z, y)).sum()
    path = mf.limit(R, Z, y, np.linspace(3, -30, 12))
    excess = 1 - best / path.value.abs().sum(1).numpy()
    assert (excess <= path.stats.gap + 1e-9).all() and (path.stats.gap <= 1).all()
    assert path.stats.gap[0] > 0.1 and path.stats.gap[-1] < 1e-6


def test_one_sided_starts_reach_their_own_vertex():
    """Least L1 norm among the solutions with the signs of the start."""
    rng = np.random.default_rng(2)
    sign = rng.choice([-1.0, 1.0], 20)
    Z = rng.standard_normal((8, 20))
    y = Z @ (sign * rng.uniform(0, 1, 20))
    R = mf.legendre(H, DECAY, tensors(np.ones(20), sign))
    found = linprog(np.ones(20), A_eq=Z * sign, b_eq=y, bounds=(0, None), method="highs")
    sol = mf.limit(R, Z, y, -1500.0)
    assert sol.status is Status.vertex
    assert distance(sol.value, sign * found.x) < 1e-9
    early = mf.limit(R, Z, y, -2.0)
    assert 1 - found.fun / float(early.value.abs().sum()) <= early.stats.gap + 1e-9


# Paths.


@pytest.mark.parametrize("id", ("hadamard", "hadamard-balanced", "power-1-drift", "power-2",
                                "log-ratio", "quadratic", "symmetric-commuting"))  # fmt: skip
def test_a_path_is_the_separate_solutions(id):
    """In the order that was asked for, with duplicates."""
    case = next(c for c in EVERY if c.id == id)
    linear = reachable(case)
    R = mf.legendre(case.g, case.h, case.start(0))
    a = [-0.3, 0.1, -0.9, -0.3, 0.0, -0.6, -0.6]
    path = mf.limit(R, linear.Z, linear.y, a)
    assert path.value.shape == (7, *R.shape) and path.aux["theta"].shape == (7, 2)
    assert path.status is Status.converged and path.aux["status"] == [Status.converged] * 7
    assert all(
        np.shape(v) == (7,)
        for v in (path.stats.kkt, path.stats.residual, path.stats.gap, path.stats.steps)
    )
    for ai, x, theta in zip(a, path.value, path.aux["theta"], strict=True):
        one = mf.limit(R, linear.Z, linear.y, ai)
        assert distance(x, one.value) < 1e-9 and distance(theta, one.aux["theta"]) < 1e-7


def test_a_path_to_the_vertex_and_beyond():
    Z, y, x = sparse(12, 30, 3, 5)
    a = [-150.0, 0.0, -20.0, -150.0, -600.0]
    path = mf.limit(zero_start(30), Z, y, a)
    assert path.aux["status"] == [
        Status.vertex, Status.converged, Status.converged, Status.vertex, Status.vertex
    ]  # fmt: skip
    assert path.status is Status.converged  # the status of a path is the worst of its points
    assert distance(path.value[0], path.value[3]) < 1e-12
    for ai, point in zip(a, path.value, strict=True):
        assert distance(point, mf.limit(zero_start(30), Z, y, ai).value) < 1e-9
    assert distance(path.value[4], x) < 1e-10


def test_one_number_and_a_path_of_one():
    Z, y = dense(3, 6, 0)
    one, path = (mf.limit(zero_start(6), Z, y, a) for a in (-1.0, [-1.0]))
    assert path.value.shape == (1, 6) and distance(path.value[0], one.value) < 1e-9
    assert type(one.stats.kkt) is float and type(one.stats.steps) is int
    assert one.stats.seconds > 0 and "status" not in one.aux
    assert pickle.loads(pickle.dumps(path)).stats.steps.tolist() == path.stats.steps.tolist()


# By inversion, and near the ends of a range, after much decay.


@pytest.mark.slow
def test_inversion_after_much_decay(a=-10.0):
    """A full Newton step goes e^{-2a} too far: without damping the steps run out."""
    g = mf.CustomReparam(lambda w: w[0] * w[1], elementwise=True)
    h = mf.CustomRegularizer(lambda w: (w[0] ** 2 + w[1] ** 2).sum() / 2, elementwise=True)
    Z, y = dense(2, 3, 1)
    w0 = tensors(np.full(3, 0.1), np.ones(3))
    own, known = (mf.limit(mf.legendre(*pair, w0), Z, y, a) for pair in ((g, h), (H, DECAY)))
    assert own.status is Status.converged and own.stats.kkt < 1e-9
    assert distance(own.value, known.value) < 1e-9


@pytest.mark.parametrize(("k", "a"), [(2, -1e4), (2, -1e6), (7, -1e4)])
def test_the_power_difference_after_much_decay(k, a):
    """mu is of the size of a, and P = c (c_u - mu - a) of size 1 where x is."""
    R = mf.legendre(mf.PowerDifference(k), TERMS, tensors(np.full(3, 0.9), np.full(3, 0.8)))
    Z, y = np.array([[1.0, 2.0, 0.5], [0.0, 1.0, 1.0]]), np.array([1.0, 2.0])
    sol = mf.limit(R, Z, y, a)
    assert sol.status is Status.converged and sol.stats.residual < 1e-9
    assert distance(sol.value, torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)) < 1e-6


@pytest.mark.slow
def test_what_rounding_forbids_keeps_the_closest_point():
    """At a = -1e7 mu is known to 1e-9, and x, near the end of the range, to 1e-7."""
    R = mf.legendre(mf.PowerDifference(7), TERMS, tensors(np.full(3, 0.9), np.full(3, 0.8)))
    Z, y = np.array([[1.0, 2.0, 0.5], [0.0, 1.0, 1.0]]), np.array([1.0, 2.0])
    with pytest.warns(RuntimeWarning, match="no longer improved"):
        sol = mf.limit(R, Z, y, -1e7)
    assert sol.status is Status.stalled and 1e-9 < sol.stats.residual < 1e-5


def test_numbers_of_low_precision_are_numbers():
    Z, y = tensors(np.array([[1.0, 2.0]]), np.array([2.0]))
    R = zero_start(2)
    found, expected = (mf.limit(R, Z, t, -1.0).value for t in (y.bfloat16(), y))
    assert torch.equal(found, expected)
