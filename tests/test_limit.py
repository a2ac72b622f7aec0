"""End points against solvers that share nothing with `limit`: CVXPY, HiGHS, and trained flows."""

import math
import pickle

import cvxpy as cp
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import mirrorflow as mf
import oracles
from cases import COMMUTE, EIGEN, EVERY

H, DECAY, TERMS, Status = mf.Hadamard(), mf.WeightDecay(), mf.Separable(), mf.Status


def tensors(*arrays):
    return tuple(torch.from_numpy(np.array(a, dtype=float)) for a in arrays)


def zero_start(d):
    """Give R_a of m0 = 0, w0 = 1: A = e^{2a} / 2."""
    return mf.legendre(H, DECAY, tensors(np.zeros(d), np.ones(d)))


def sparse(n, d, k, seed):
    """Give Z, y and the x with k non-zeros that made y."""
    rng = np.random.default_rng(seed)
    x = np.zeros(d)
    x[rng.choice(d, k, replace=False)] = rng.choice([-1.0, 1.0], k) * rng.uniform(0.5, 2, k)
    Z = rng.standard_normal((n, d))
    return Z, Z @ x, x


def dense(n, d, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal(n)


def smallest_l1(Z, y):
    """Give the solution of least L1 norm, by HiGHS, which has to be given rows of size 1."""
    rows = np.maximum(np.abs(Z).max(axis=1), 1e-300)
    Z, y, d = Z / rows[:, None], y / rows, Z.shape[1]
    size = np.abs(y).max()
    found = linprog(np.ones(2 * d), A_eq=np.hstack([Z, -Z]), b_eq=y / size, bounds=(0, None))
    assert found.success
    return size * (found.x[:d] - found.x[d:])


def distance(one, two):
    """Give the largest difference relative to the size of the second."""
    one, two = (np.asarray(v, dtype=float).ravel() for v in (one, two))
    return np.abs(one - two).max() / np.abs(two).max()


def optimal(R, Z, y, a, sol, tol=1e-9):
    """Assert the optimality conditions, from x and theta alone."""
    rows = np.asarray(Z, dtype=float).reshape(len(y), -1)
    assert distance(rows @ sol.value.numpy().ravel(), y) < tol
    pulled = (sol.aux["theta"].numpy() @ rows).reshape(sol.value.shape)
    pulled = (pulled + pulled.T) / 2 if R.shape[-1:] == R.shape[:-1] else pulled
    mu = R.mirror(sol.value, a).numpy()
    assert np.abs(mu - pulled).max() < tol * (1 + np.abs(mu).max())


# Against CVXPY, whose x is good to the root of its gap.

CONE = 1e-4


def solved(objective, constraints, x):
    problem = cp.Problem(cp.Minimize(objective), constraints)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    assert problem.status == "optimal"
    return x.value


def entropies(s, centre):
    """Give sum s log(s / centre) - s, an exponential cone."""
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
    assert sol.status is Status.converged and sol.stats.kkt < 1e-12 and sol.stats.residual < 1e-13
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
    assert distance(sol.value, smallest_l1(Z, y)) < 1e-9 and distance(sol.value, x) < 1e-12
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
    assert -1e-12 <= excess <= sol.stats.gap + 1e-12
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
    assert (excess <= path.stats.gap + 1e-12).all() and (path.stats.gap <= 1).all()
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
    assert 1 - found.fun / float(early.value.abs().sum()) <= early.stats.gap + 1e-12


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
    assert torch.equal(path.value[0], path.value[3])
    for ai, point in zip(a, path.value, strict=True):
        assert distance(point, mf.limit(zero_start(30), Z, y, ai).value) < 1e-9
    assert distance(path.value[4], x) < 1e-12


def test_one_number_and_a_path_of_one():
    Z, y = dense(3, 6, 0)
    one, path = (mf.limit(zero_start(6), Z, y, a) for a in (-1.0, [-1.0]))
    assert path.value.shape == (1, 6) and torch.equal(path.value[0], one.value)
    assert type(one.stats.kkt) is float and type(one.stats.steps) is int
    assert one.stats.seconds > 0 and "status" not in one.aux
    assert pickle.loads(pickle.dumps(path)).stats.steps.tolist() == path.stats.steps.tolist()


# Rows.


def spoiled(kind, Z, y):
    """Give the same problem with awkward rows."""
    rng = np.random.default_rng(9)
    mix = rng.standard_normal((3, len(y)))
    scale = 10.0 ** np.linspace(-6, 6, len(y))
    return {
        "duplicated": (np.vstack([Z, Z[:2]]), np.concatenate([y, y[:2]])),
        "dependent": (np.vstack([Z, mix @ Z]), np.concatenate([y, mix @ y])),
        "zero": (np.vstack([Z[:1], 0 * Z[:2], Z[1:]]), np.concatenate([y[:1], [0, 0], y[1:]])),
        "scaled": (Z * scale[:, None], y * scale),
        "tiny": (1e-150 * Z, 1e-150 * y),
        "huge": (1e150 * Z, 1e150 * y),
        "nearly dependent": (
            np.vstack([Z, Z[:1] + 1e-7 * Z[1:2]]), np.append(y, y[0] + 1e-7 * y[1])
        ),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ("duplicated", "dependent", "zero", "scaled", "tiny", "huge", "nearly dependent"),
)
@pytest.mark.parametrize("id", ("hadamard", "power", "matrix"))
def test_awkward_rows_change_nothing(kind, id):
    R, Z, y = rows_problem(id)
    expected = mf.limit(R, Z, y, -0.5)
    Z2, y2 = spoiled(kind, Z.reshape(len(y), -1), y)
    sol = mf.limit(R, Z2.reshape(-1, *R.shape), y2, -0.5)
    assert sol.status is expected.status
    assert distance(sol.value, expected.value) < 1e-8
    assert sol.aux["theta"].shape == y2.shape and sol.stats.residual < 1e-9
    assert sol.stats.kkt < 1e-8


def rows_problem(id):
    Z, y = dense(4, 9, 1)
    if id == "hadamard":
        return zero_start(9), Z, y
    if id == "power":
        rng = np.random.default_rng(0)
        return mf.legendre(mf.PowerDifference(2), TERMS, tensors(*rng.uniform(1, 2, (2, 9)))), Z, y
    Z = Z.reshape(4, 3, 3)
    X = np.diag([1.0, 2.0, 0.5])
    return (
        mf.legendre(mf.SymmetricFactor(), DECAY, tensors(np.eye(3))[0]),
        Z,
        np.einsum("iab,ab->i", Z, X),
    )


def test_as_many_rows_as_unknowns_leave_no_choice():
    Z, y = dense(6, 6, 0)
    for a in (0.0, -4.0):
        assert distance(mf.limit(zero_start(6), Z, y, a).value, np.linalg.solve(Z, y)) < 1e-8
    tall = np.vstack([Z, Z[::-1], Z + Z[::-1]])
    sol = mf.limit(zero_start(6), tall, tall @ np.ones(6), -1.0)
    assert sol.status.ok and distance(sol.value, np.ones(6)) < 1e-9


@pytest.mark.parametrize("a", (0.0, -3.0, -200.0))
def test_without_data_training_goes_to_the_centre(a):
    rng = np.random.default_rng(0)
    R = mf.legendre(H, DECAY, tensors(rng.uniform(-0.5, 0.5, 4), rng.uniform(0.6, 1, 4)))
    for Z in (np.zeros((0, 4)), np.zeros((2, 4))):
        sol = mf.limit(R, Z, np.zeros(len(Z)), a)
        assert sol.status.ok and sol.aux["theta"].shape == (len(Z),)
        assert distance(sol.value, R.centre(a)) < 1e-12


@pytest.mark.parametrize("id", ("hadamard", "power-2", "log-ratio"))
def test_targets_of_zero(id):
    case = next(c for c in EVERY if c.id == id)
    R, Z = mf.legendre(case.g, case.h, case.start(0)), np.array([[1.0, -2.0, 0.5]])
    for a in (0.0, -0.4):
        sol = mf.limit(R, Z, np.zeros(1), a)
        assert sol.status is Status.converged and sol.stats.residual < 1e-12
        assert sol.stats.kkt < 1e-10 and float(sol.value.abs().max()) > 1e-6
    assert float(mf.limit(zero_start(3), Z, np.zeros(1), -1.0).value.abs().max()) == 0


# No solution.


def test_targets_outside_the_range_of_Z():
    """The end point for the nearest targets, which is where training ends."""
    Z, y = dense(4, 9, 1)
    Z2, y2 = np.vstack([Z, 2 * Z[:1]]), np.append(y, 2 * y[0] + 3.0)
    nearest = Z2 @ np.linalg.lstsq(Z2, y2, rcond=None)[0]
    with pytest.warns(RuntimeWarning, match="limit: no x in the domain") as caught:
        sol = mf.limit(zero_start(9), Z2, y2, -0.5)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert sol.status is Status.inconsistent and not sol.status.ok
    missed = np.linalg.norm(nearest - y2) / np.linalg.norm(y2)
    assert sol.stats.residual == pytest.approx(missed, rel=1e-9) and missed > 0.1
    assert distance(sol.value, mf.limit(zero_start(9), Z2, nearest, -0.5).value) < 1e-9
    trained = mf.flow(
        mf.LeastSquares(*tensors(Z2, y2)), H, DECAY, tensors(np.zeros(9), np.ones(9)),
        mf.SwitchOff(0.5, 1.0), 400.0, rtol=1e-10,
    )  # fmt: skip
    assert distance(sol.value, trained.value) < 1e-6


def test_targets_of_the_wrong_sign_for_a_one_sided_start():
    R = mf.legendre(H, DECAY, tensors(np.ones(3), np.ones(3)))  # x > 0
    Z = np.array([[1.0, 2.0, 0.5], [1.0, -1.0, 0.0]])
    for a in (0.0, -3.0, -100.0):
        with pytest.warns(RuntimeWarning, match="no x in the domain"):
            sol = mf.limit(R, Z, np.array([-1.0, 0.3]), a)
        assert sol.status is Status.inconsistent and sol.stats.residual > 0.5


def test_a_matrix_cannot_have_a_negative_trace():
    R = mf.legendre(mf.SymmetricFactor(), DECAY, tensors(np.eye(3))[0])
    with pytest.warns(RuntimeWarning, match="no x in the domain"):
        sol = mf.limit(R, np.eye(3)[None], np.array([-1.0]), -0.5)
    assert sol.status is Status.inconsistent


def test_targets_out_of_reach_of_a_commuting_quadratic():
    """x = Lambda s with s > 0: far outside that cone there is nothing."""
    A = np.stack([np.diag([1.0, 2.0, 1.0]), np.diag([0.0, 1.0, 1.0])])
    R = mf.legendre(mf.CommutingQuadratic(torch.from_numpy(A)), DECAY, tensors(np.ones(3))[0])
    with pytest.warns(RuntimeWarning, match="no x in the domain"):
        sol = mf.limit(R, np.eye(2), np.array([1.0, -1.0]), -0.5)
    assert sol.status is Status.inconsistent
    assert mf.limit(R, np.eye(2), np.array([1.0, 0.4]), -0.5).status is Status.converged


# Limits of the solver.


@pytest.mark.parametrize("id", ("hadamard", "one-sided", "power"))
def test_too_few_steps_are_a_status_and_a_warning(id):
    Z, y = dense(4, 9, 1)
    R = {
        "hadamard": zero_start(9),
        "one-sided": mf.legendre(H, DECAY, tensors(np.ones(9), np.ones(9))),
        "power": rows_problem("power")[0],
    }[id]
    y = Z @ np.linspace(0.1, 2, 9) if id != "hadamard" else y
    for steps in (1, 2):
        with pytest.warns(RuntimeWarning, match="limit: stopped at the step limit .* residual"):
            sol = mf.limit(R, Z, y, -1.5, max_steps=steps)
        assert sol.status is Status.max_steps and not sol.status.ok
        assert sol.stats.steps <= steps and torch.isfinite(sol.value).all()
    assert mf.limit(R, Z, y, -1.5).status is Status.converged


def test_a_path_that_runs_out_of_steps_keeps_what_it_has():
    Z, y = dense(12, 30, 5)
    R, a = zero_start(30), [-1.0, -4.0, -20.0, -60.0]
    full = mf.limit(R, Z, y, a)
    with pytest.warns(RuntimeWarning, match=r"\(\d of 4 points\)") as caught:
        sol = mf.limit(R, Z, y, a, max_steps=int(full.stats.steps[:2].sum()))
    assert len(caught) == 1
    assert sol.aux["status"] == [Status.converged] * 2 + [Status.max_steps] * 2
    assert sol.status is Status.max_steps
    assert distance(sol.value[:2], full.value[:2]) < 1e-9


# Numbers.


@pytest.mark.parametrize("id", ("hadamard", "power", "matrix"))
def test_single_precision_is_kept(id):
    R, Z, y = rows_problem(id)
    start = {
        "hadamard": lambda: mf.legendre(H, DECAY, (torch.zeros(9), torch.ones(9))),
        "power": lambda: mf.legendre(
            mf.PowerDifference(2),
            TERMS,
            tuple(f.float() for f in tensors(*np.random.default_rng(0).uniform(1, 2, (2, 9)))),
        ),
        "matrix": lambda: mf.legendre(mf.SymmetricFactor(), DECAY, torch.eye(3)),
    }[id]()
    sol = mf.limit(start, Z, y, -0.5)
    assert sol.value.dtype == sol.aux["theta"].dtype == torch.float32
    exact = mf.limit(R, Z, y, -0.5)
    assert sol.status is exact.status and distance(sol.value, exact.value) < 1e-5


def test_arrays_lists_and_tensors_of_any_kind():
    Z, y = np.array([[1, 2, 0], [0, 1, 1]]), np.array([1, 0])
    expected = mf.limit(zero_start(3), Z.astype(float), y.astype(float), -1.0).value
    for Zi, yi, a in (
        (Z, y, -1),
        (Z.tolist(), y.tolist(), np.float32(-1)),
        (torch.from_numpy(Z), torch.from_numpy(y), torch.tensor(-1)),
        (torch.from_numpy(Z).float().requires_grad_(), y.astype(np.float32), -1.0),
        (Z.astype(np.float16), y == 1, np.array(-1.0)),
    ):
        sol = mf.limit(zero_start(3), Zi, yi, a)
        assert sol.value.dtype == torch.float64 and distance(sol.value, expected) < 1e-12


def test_x_may_have_any_shape():
    Z, y = dense(3, 12, 0)
    R = mf.legendre(H, DECAY, tensors(np.zeros((2, 6)), np.ones((2, 6))))
    sol = mf.limit(R, Z.reshape(3, 2, 6), y, [-1.0, -2.0])
    assert sol.value.shape == (2, 2, 6)
    assert distance(sol.value, mf.limit(zero_start(12), Z, y, [-1.0, -2.0]).value) < 1e-13


@pytest.mark.parametrize("size", (1e-100, 1e-8, 1e8, 1e100))
def test_targets_of_any_size(size):
    """x(s y, A) = s x(y, A / s)."""
    Z, y = dense(4, 9, 1)
    R = zero_start(9)
    sol = mf.limit(R, Z, size * y, -1.0 + math.log(size) / 2)
    assert sol.status is Status.converged
    assert distance(sol.value / size, mf.limit(R, Z, y, -1.0).value) < 1e-11


def good():
    Z, y = dense(2, 3, 0)
    return {"R": zero_start(3), "Z": Z, "y": y, "a": -1.0}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"R": mf.Hadamard()}, TypeError, "R must be a LegendreFunction"),
        ({"Z": np.ones((2, 4))}, ValueError, r"Z must have shape \(n, 3\) to fit R, got \(2, 4\)"),
        ({"Z": np.ones(3)}, ValueError, r"Z must have shape \(n, 3\)"),
        ({"Z": np.ones((2, 3, 1))}, ValueError, r"Z must have shape \(n, 3\)"),
        ({"Z": 1.0}, ValueError, r"Z must have shape \(n, 3\)"),
        ({"y": np.ones(3)}, ValueError, r"y must have shape \(2,\) to fit Z, got \(3,\)"),
        ({"y": np.ones((2, 1))}, ValueError, r"y must have shape \(2,\)"),
        ({"y": 1.0}, ValueError, r"y must have shape \(2,\)"),
        ({"a": []}, ValueError, "a must be a number or a non-empty 1-d sequence"),
        ({"a": [[1.0]]}, ValueError, r"a must be a number .*, got shape \(1, 1\)"),
        ({"a": math.nan}, ValueError, "a holds NaN"),
        ({"a": -math.inf}, ValueError, "a holds NaN or infinite"),
        ({"a": None}, TypeError, "a must hold real numbers"),
        ({"a": "-1"}, TypeError, "a must hold real numbers"),
        ({"Z": np.full((2, 3), math.nan)}, ValueError, "Z holds NaN"),
        ({"y": np.array([1.0, math.inf])}, ValueError, "y holds NaN or infinite"),
        ({"Z": np.ones((2, 3), complex)}, TypeError, "Z must hold real numbers, got complex128"),
        ({"y": np.array([None, 1])}, TypeError, "y must hold real numbers, got object"),
        ({"Z": [[1.0, 2.0], [1.0]]}, ValueError, "Z is not an array of numbers"),
        ({"max_steps": 0}, ValueError, "max_steps must be"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    assert mf.limit(**good()).status.ok
    with pytest.raises(error, match=message):
        mf.limit(**{**good(), **change})


def test_an_a_without_a_centre_is_refused():
    R = mf.legendre(mf.LogRatio(), TERMS, tensors(np.ones(2), np.ones(2)))
    with pytest.raises(mf.RangeError):
        mf.limit(R, np.eye(2)[:1], np.array([0.1]), -0.6)


# Awkward designs at random.


@st.composite
def designs(draw):
    n, d = draw(st.integers(2, 8)), draw(st.integers(8, 20))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(("correlated", "duplicated", "columns", "binary", "rows")))
    Z = rng.standard_normal((n, d))
    if kind == "correlated":
        Z = math.sqrt(0.999) * rng.standard_normal((n, 1)) + math.sqrt(0.001) * Z
    elif kind == "duplicated":
        Z[:, d // 2 :] = Z[:, : d - d // 2]
    elif kind == "columns":
        Z = Z * 10.0 ** rng.uniform(-3, 3, d)
    elif kind == "binary":
        Z = rng.integers(0, 2, (n, d)).astype(float)
    else:
        Z = Z * 10.0 ** rng.uniform(-5, 5, (n, 1))
    x = rng.standard_normal(d) * (rng.random(d) < draw(st.sampled_from((0.2, 1.0))))
    return Z, Z @ x


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(design=designs(), log_A=st.sampled_from((2.0, -5.0, -27.6, -60.0, -150.0, -300.0)))
def test_awkward_designs(design, log_A):
    Z, y = design
    R, a = zero_start(Z.shape[1]), (log_A + math.log(2)) / 2
    sol = mf.limit(R, Z, y, a)
    assert sol.status.ok and sol.stats.residual < 1e-8
    assert sol.stats.kkt < 1e-7 * (1 + abs(log_A))
    if np.linalg.norm(y) > 0:
        excess = 1 - np.abs(smallest_l1(Z, y)).sum() / float(sol.value.abs().sum())
        assert excess <= sol.stats.gap + 1e-6
