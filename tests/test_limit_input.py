"""`limit` on rows, targets and numbers of any kind, and when there is no solution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

import mirrorflow as mf
from cases import EVERY
from endpoints import dense, distance, smallest_l1, tensors, zero_start

H, DECAY, TERMS, Status = mf.Hadamard(), mf.WeightDecay(), mf.Separable(), mf.Status


# Rows.


def spoiled(kind, Z, y):
    """Return the same problem with awkward rows."""
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
    nearest = Z2 @ np.linalg.lstsq(Z2, y2, rcond=1e-10)[0]  # rank 4: one row is twice another
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
        sol = mf.limit(R, Z, y, a, max_steps=int(full.stats.steps.sum()) // 2)
    assert len(caught) == 1
    reached = sol.aux["status"].count(Status.converged)
    assert 1 <= reached < 4  # in the order of the path, from the start on
    assert sol.aux["status"] == [Status.converged] * reached + [Status.max_steps] * (4 - reached)
    assert sol.status is Status.max_steps
    assert distance(sol.value[:reached], full.value[:reached]) < 1e-9


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
    assert distance(sol.value, mf.limit(zero_start(12), Z, y, [-1.0, -2.0]).value) < 1e-9


FAMILIES = {
    "hadamard": lambda: zero_start(3),
    "unbalanced": lambda: mf.legendre(H, DECAY, tensors(np.full(3, 0.3), np.ones(3))),
    "one-sided": lambda: mf.legendre(H, DECAY, tensors(np.ones(3), np.ones(3))),
    "quadratic": lambda: mf.legendre(
        mf.CommutingQuadratic(torch.eye(3, dtype=torch.float64).diag_embed()),
        DECAY, torch.ones(3, dtype=torch.float64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("a", (-400.0, -1000.0))
@pytest.mark.parametrize("id", FAMILIES)
def test_targets_of_any_size_at_a_scale_that_underflows(id, a):
    """e^{2a} is 0 in float64; the end point is the vertex, or 0 for targets of 0."""
    R, Z, y = FAMILIES[id](), np.array([[1.0, 2.0, 0.5], [0.0, 1.0, 1.0]]), np.array([1.0, 2.0])
    for size in (0.0, 1e-300, 1.0, 1e200):
        sol = mf.limit(R, Z, size * y, a)
        assert sol.status.ok and sol.stats.residual < 1e-9, size
        assert np.abs(sol.value.numpy() - size * np.array([0.0, 0.0, 2.0])).max() <= 1e-9 * size
    assert mf.limit(R, Z, y, -1000.0).stats.kkt < 1e-9


@pytest.mark.parametrize("id", (*FAMILIES, "matrix"))
def test_a_scale_that_overflows_is_refused(id, capfd):
    U = torch.eye(3, dtype=torch.float64)
    R = mf.legendre(mf.SymmetricFactor(), DECAY, U) if id == "matrix" else FAMILIES[id]()
    for y in (1.0, 0.0):
        with pytest.raises(mf.RangeError, match=r"got a = 400.0: x has the scale .* -int alpha dt"):
            mf.limit(R, np.ones((1, *R.shape)), [y], [-1.0, 400.0])
    assert capfd.readouterr() == ("", "")  # LAPACK complains of NaN by printing


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
        ({"y": np.ones(3)}, ValueError, r"y must have shape \(2,\) or \(2, m\) to fit Z, got \(3,"),
        ({"y": np.ones((2, 1, 1))}, ValueError, r"y must have shape \(2,\)"),
        ({"y": 1.0}, ValueError, r"y must have shape \(2,\)"),
        ({"a": []}, ValueError, "a must be a number or a non-empty 1-d sequence"),
        ({"a": [[1.0]]}, ValueError, r"a must be a number .*, got shape \(1, 1\)"),
        ({"a": math.nan}, ValueError, "a must be finite, got NaN"),
        ({"a": -math.inf}, ValueError, "a must be finite, got NaN or inf"),
        ({"a": None}, TypeError, "a must hold real numbers"),
        ({"Z": csr_array(np.ones((2, 3)))}, TypeError, r"got a sparse one. Give Z.toarray\(\)"),
        ({"a": "-1"}, TypeError, "a must hold real numbers"),
        ({"Z": np.full((2, 3), math.nan)}, ValueError, "Z must be finite, got NaN"),
        ({"y": np.array([1.0, math.inf])}, ValueError, "y must be finite, got NaN or inf"),
        ({"Z": np.ones((2, 3), complex)}, TypeError, "Z must hold real numbers, got complex128"),
        ({"y": np.array([None, 1])}, TypeError, "y must hold real numbers, got object"),
        ({"Z": [[1.0, 2.0], [1.0]]}, ValueError, "Z must be an array of numbers"),
        ({"max_steps": 0}, ValueError, "max_steps must be"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    assert mf.limit(**good()).status.ok
    with pytest.raises(error, match=message):
        mf.limit(**{**good(), **change})


# One number a for each coordinate.


def test_a_vector_as_long_as_x_must_say_what_it_holds():
    R, Z, y = good()["R"], good()["Z"], good()["y"]
    three = np.array([-1.0, -0.5, 0.0])
    with pytest.raises(ValueError, match=r"a vector of length 3\. Pass per_coordinate=True"):
        mf.limit(R, Z, y, three)
    path = mf.limit(R, Z, y, three, per_coordinate=False)
    assert distance(path.value, torch.stack([mf.limit(R, Z, y, ai).value for ai in three])) < 1e-9
    one = mf.limit(R, Z, y, three, per_coordinate=True)
    assert one.value.shape == (3,) and isinstance(one.stats.steps, int)
    both = mf.limit(R, Z, y, np.stack([three, 2 * three]), per_coordinate=True)
    assert both.value.shape == (2, 3) and both.aux["theta"].shape == (2, 2)
    assert distance(both.value[0], one.value) < 1e-12
    assert mf.limit(R, Z, y, three[:2]).value.shape == (2, 3)  # cannot be meant per coordinate
    same = mf.limit(R, Z, y, -0.7, per_coordinate=True)
    assert distance(same.value, mf.limit(R, Z, y, -0.7).value) < 1e-10
    with pytest.raises(ValueError, match=r"a must have shape \(3,\) or \(k, 3\)"):
        mf.limit(R, Z, y, three[:2], per_coordinate=True)


PER_COORDINATE = {
    "hadamard": (H, DECAY, lambda f, a: tuple(v * np.exp(a) for v in f), (0.3, 1.0)),
    "one-sided": (H, DECAY, lambda f, a: tuple(v * np.exp(a) for v in f), (0.8, 0.8)),
    "power-1": (
        mf.PowerDifference(1), TERMS, lambda f, a: tuple(v * np.exp(2 * a) for v in f), (0.5, 0.9)
    ),
    # d/da u = 4 u^3: u^-2 = u0^-2 - 8 a.
    "power-2": (
        mf.PowerDifference(2), TERMS, lambda f, a: tuple((v**-2.0 - 8 * a) ** -0.5 for v in f),
        (0.7, 0.9),
    ),
    "log-ratio": (
        mf.LogRatio(), TERMS, lambda f, a: tuple(np.sqrt(v * v + 2 * a) for v in f), (1.8, 1.6)
    ),
    "own": (
        mf.CustomReparam(lambda w: w[0] * w[1], elementwise=True), DECAY,
        lambda f, a: tuple(v * np.exp(a) for v in f), (0.3, 1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PER_COORDINATE)
@pytest.mark.sample(3)
def test_an_a_per_coordinate_is_a_start_scaled_per_coordinate(name):
    g, h, decayed, sizes = PER_COORDINATE[name]
    w0, a = tuple(np.full(3, s) for s in sizes), np.array([-0.6, -0.1, 0.0])
    Z = np.array([[1.0, 0.7, -0.4]])
    y = Z @ (0.5 * decayed(w0, a)[0] * np.array([1.0, 0.5, 0.2]))
    R, scaled = (mf.legendre(g, h, tensors(*f)) for f in (w0, decayed(w0, a)))
    found, wanted = mf.limit(R, Z, y, a, per_coordinate=True), mf.limit(scaled, Z, y, 0.0)
    assert found.status.ok and found.stats.kkt < 1e-8
    assert distance(found.value, wanted.value) < 1e-8
    x = wanted.value
    vector = torch.from_numpy(a)
    assert distance(R.folded(vector).mirror(x, 0.0), R.mirror(x, vector)) < 1e-9
    assert distance(R.folded(-0.1, 0.05).mirror(x, 0.0), R.mirror(x, -0.1) - 0.05) < 1e-9


@pytest.mark.parametrize("id", ("quadratic", "matrix"))
def test_coordinates_that_share_parameters_have_one_a(id):
    U = torch.eye(3, dtype=torch.float64)
    R = mf.legendre(mf.SymmetricFactor(), DECAY, U) if id == "matrix" else FAMILIES[id]()
    a = np.full(tuple(R.shape), -0.1)
    with pytest.raises(TypeError, match="must be a sum over coordinates"):
        mf.limit(R, np.ones((1, *R.shape)), [1.0], a, per_coordinate=True)
    x = torch.ones(R.shape, dtype=torch.float64) + 2 * (U if id == "matrix" else 0)
    with pytest.raises(ValueError, match="a must be one number"):
        R.mirror(x, torch.from_numpy(a))


def test_an_a_without_a_centre_is_refused():
    R = mf.legendre(mf.LogRatio(), TERMS, tensors(np.ones(2), np.ones(2)))
    with pytest.raises(mf.RangeError):
        mf.limit(R, np.eye(2)[:1], np.array([0.1]), -0.6)


# Awkward designs at random.


@pytest.mark.parametrize("close", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("log_A", [2.0, -27.6])
def test_a_row_that_depends_on_rows_close_together_is_dropped(close, log_A):
    """The last pivot of such rows is rounding over the small one before it, and looks large."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        Z, x = rng.standard_normal((6, 14)), rng.standard_normal(14)
        Z = np.vstack([Z, Z[0] + close * rng.standard_normal(14)])
        more = np.vstack([Z, (Z[-1] - Z[0]) / close])
        R, a = zero_start(14), (log_A + math.log(2)) / 2
        sol, expected = mf.limit(R, more, more @ x, a), mf.limit(R, Z, Z @ x, a)
        assert sol.status.ok and sol.stats.kkt < 1e-6 and sol.stats.residual < 1e-9
        np.testing.assert_allclose(sol.value, expected.value, atol=1e-6 * np.abs(x).max() / close)


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


@pytest.mark.parametrize("g", [mf.Hadamard(), mf.Depth(3)])
def test_targets_of_zero_along_a_path_are_single_solutions(g):
    """With y = 0 the dual variable is the same at every a, and x scales like e^{ka}."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((4, 9))
    w0 = tuple(torch.from_numpy(rng.uniform(0.2, 1.5, 9)) for _ in g.names)
    R, a = mf.legendre(g, mf.WeightDecay(), w0), [-3.0, 0.0, -100.0]
    path = mf.limit(R, Z, np.zeros(4), a)
    assert all(status.ok for status in path.aux["status"])
    for x, ai in zip(path.value.numpy(), a, strict=True):
        expected = np.exp(len(w0) * ai) * path.value[1].numpy()
        np.testing.assert_allclose(x, expected, rtol=1e-9)
        assert np.abs(Z @ x).max() < 1e-11 * np.abs(x).max()
    assert (path.aux["theta"] - path.aux["theta"][0]).abs().max() < 1e-9


# Several right-hand sides.


@pytest.mark.parametrize("id", ("hadamard", "power", "matrix"))
def test_columns_of_y_are_solved_as_one_by_one(id):
    R, Z, y = rows_problem(id)
    Y = np.stack([y, -0.5 * y, 2 * y], axis=1) if id != "matrix" else np.stack([y, 2 * y], axis=1)
    sol = mf.limit(R, Z, Y, -0.5)
    each = [mf.limit(R, Z, column, -0.5) for column in Y.T]
    assert sol.value.shape == (Y.shape[1], *R.shape) and sol.status is each[0].status
    for j, one in enumerate(each):
        assert distance(sol.value[j], one.value) < 1e-10
        assert distance(sol.aux["theta"][j], one.aux["theta"]) < 1e-8
    assert sol.stats.residual.shape == (Y.shape[1],) and len(sol.aux["status"]) == Y.shape[1]


def test_columns_take_one_a_for_each_coordinate():
    R, Z, y = rows_problem("hadamard")
    a = np.linspace(-1, 0, 9)
    found = mf.limit(R, Z, np.stack([y, y], axis=1), a, per_coordinate=True)
    one = mf.limit(R, Z, y, a, per_coordinate=True).value
    assert found.value.shape == (2, 9) and distance(found.value[1], one) < 1e-10


def test_columns_and_a_path_are_refused():
    R, Z, y = rows_problem("hadamard")
    Y = np.stack([y, y], axis=1)
    with pytest.raises(ValueError, match=r"a must be one number.*Call once for each a"):
        mf.limit(R, Z, Y, [-1.0, -2.0])
    with pytest.raises(ValueError, match=r"y must have shape \(4,\) or \(4, m\)"):
        mf.limit(R, Z, Y[:3], -1.0)
    with pytest.raises(ValueError, match=r"y must have shape \(4,\) or \(4, m\)"):
        mf.limit(R, Z, Y[:, :0], -1.0)


def test_problems_without_a_solution_print_nothing(capfd):
    """LAPACK writes a line for each matrix without rows that it is given."""
    one = torch.ones(2, dtype=torch.float64)
    R = mf.legendre(H, DECAY, (one, one))
    Z, y = tensors(np.array([[1.0, 0.0]]), np.array([-1.0]))
    with pytest.warns(RuntimeWarning, match="no x in the domain"):
        assert mf.limit(R, Z, y, 0.0).status is Status.inconsistent
    assert capfd.readouterr() == ("", "")
