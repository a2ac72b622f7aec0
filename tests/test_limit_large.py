"""End points of large problems: single precision in the steps, and the shortcut to the vertex."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import mirrorflow as mf
from mirrorflow.legendre import _exponential_duals as duals
from mirrorflow.limit import _problems
from mirrorflow.limit._newton import NewtonSystem

DEEP = -150.0  # a at which log A is about -300


def entropy(d, m0=0.0, one_sided=False):
    rng = np.random.default_rng(3)
    w = torch.from_numpy(rng.uniform(0.5, 2.0, d))  # scales differ between the coordinates
    m = w.clone() if one_sided else m0 * w
    return mf.legendre(mf.Hadamard(), mf.WeightDecay(), (m, w))


def sparse_problem(n=120, d=600, k=8, seed=0, sign=None):
    rng = np.random.default_rng(seed)
    Z, x = rng.standard_normal((n, d)), np.zeros(d)
    x[rng.choice(d, k, replace=False)] = rng.standard_normal(k)
    return Z, (np.abs(x) if sign else x)


def basis_pursuit(Z, y, one_sided=False):
    """Minimize |x|_1 subject to Zx = y with HiGHS."""
    d = Z.shape[1]
    A = Z if one_sided else np.hstack([Z, -Z])
    found = linprog(np.ones(A.shape[1]), A_eq=A, b_eq=y, bounds=(0, None), method="highs")
    assert found.success
    return found.x if one_sided else found.x[:d] - found.x[d:]


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(duals, "LARGE", 0)


@pytest.fixture
def no_shortcut(monkeypatch):
    monkeypatch.setattr(_problems, "at_vertex", lambda *_: None)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("m0", [0.0, 0.5])
def test_the_vertex_of_a_sparse_truth_is_that_of_basis_pursuit(one_sided, m0):
    Z, truth = sparse_problem(sign=one_sided)
    solution = mf.limit(entropy(600, m0, one_sided), Z, Z @ truth, DEEP)
    assert solution.status is mf.Status.vertex
    assert solution.stats.steps == 0  # the shortcut was taken
    expected = basis_pursuit(Z, Z @ truth, one_sided)
    np.testing.assert_allclose(solution.value.numpy(), expected, atol=1e-7)
    assert solution.stats.kkt < 1e-10
    assert solution.stats.residual < 1e-12
    assert 0 <= solution.stats.gap < 1e-10


@pytest.mark.parametrize("one_sided", [False, True])
def test_the_shortcut_and_the_continuation_end_at_the_same_point(one_sided, request):
    Z, truth = sparse_problem(seed=1, sign=one_sided)
    R = entropy(600, 0.3, one_sided)
    quick = mf.limit(R, Z, Z @ truth, DEEP)
    request.getfixturevalue("no_shortcut")
    literal = mf.limit(R, Z, Z @ truth, DEEP)
    assert quick.stats.steps == 0 < literal.stats.steps
    np.testing.assert_allclose(quick.value.numpy(), literal.value.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("k", "a"),
    [(600, DEEP), (60, DEEP), (8, -15.0)],
    ids=["a dense truth", "too many for the data", "not deep enough"],
)
def test_where_the_vertex_does_not_show_the_continuation_solves(k, a):
    Z, truth = sparse_problem(k=k)
    solution = mf.limit(entropy(600), Z, Z @ truth, a)
    assert solution.status.ok
    assert solution.stats.steps > 0  # the shortcut was not taken
    assert solution.stats.kkt < 1e-10
    assert solution.stats.residual < 1e-11


@pytest.mark.parametrize("change", ["duplicated columns", "duplicated rows", "noise", "correlated"])
def test_awkward_large_problems_are_solved_all_the_same(change):
    Z, truth = sparse_problem()
    match change:
        case "duplicated columns":
            Z = np.hstack([Z[:, :300], Z[:, :300]])
        case "duplicated rows":
            Z = np.vstack([Z[:80], Z[:40]])
        case "correlated":
            Z = Z + 10 * np.random.default_rng(1).standard_normal((120, 1))
    y = Z @ truth
    if change == "noise":
        y = y + 0.3 * np.random.default_rng(2).standard_normal(len(y))
    solution = mf.limit(entropy(600), Z, y, DEEP)
    assert solution.status.ok
    assert solution.stats.residual < 1e-11
    assert solution.stats.kkt < 1e-9


@pytest.mark.parametrize("a", [0.0, -5.0, -14.0, -60.0])
def test_steps_in_single_precision_end_at_the_same_point(a, request):
    Z, _ = sparse_problem(n=30, d=90, seed=2)
    y = Z @ np.random.default_rng(4).standard_normal(90)
    exact = mf.limit(entropy(90), Z, y, a)
    request.getfixturevalue("everything_is_large")
    request.getfixturevalue("no_shortcut")
    rough = mf.limit(entropy(90), Z, y, a)
    assert rough.status is exact.status
    np.testing.assert_allclose(rough.value.numpy(), exact.value.numpy(), rtol=1e-8, atol=1e-12)
    assert rough.stats.residual < 1e-12


def test_single_precision_is_used_where_it_is_good_enough_and_only_there():
    rng = np.random.default_rng(0)
    FT = rng.standard_normal((50, 10))
    mild, steep = np.ones(50), np.exp(-3.0 * np.arange(50))
    for w, single in ((mild, True), (steep, False)):
        system = NewtonSystem(FT, w, FT.astype(np.float32))
        assert bool(system.unit) is single
        gram, r = (FT.T * w) @ FT, rng.standard_normal(10)
        tolerance = 1e-4 if single else 1e-12
        z = system.solve(gram @ r)
        assert np.linalg.norm(gram @ (z - r)) <= tolerance * np.linalg.norm(gram @ r)
    u = rng.standard_normal(50)
    expected = np.linalg.lstsq(FT, u, rcond=None)[0]
    found = NewtonSystem(FT, mild, FT.astype(np.float32)).fit(u)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
