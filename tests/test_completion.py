"""Completion of rows: scikit-learn's conventions, new rows, sparse and symmetric matrices."""

import pickle
import tracemalloc
import warnings

import cvxpy as cp
import numpy as np
import pytest
from scipy.sparse import coo_array, csc_matrix, csr_array
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import mirrorflow as mf


@parametrize_with_checks(
    [mf.MatrixCompletion(max_iter=n, center=c) for n, c in ((100, False), (99, True))]
)
@pytest.mark.sample(46)
def test_scikit_learns_conventions(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns without an entry, and of 100 steps
        check(estimator)


def problem(p=60, q=25, rank=2, seen=0.5, noise=0.0, seed=0):
    """Draw a matrix, and what is known of it."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((p, rank)) @ rng.standard_normal((rank, q))
    noisy = X + noise * rng.standard_normal(X.shape)
    return X, np.where(rng.random(X.shape) < seen, noisy, np.nan)


def as_sparse(M, form=csr_array):
    """Store what is known, zeros too."""
    known = ~np.isnan(M)
    rows, columns = np.nonzero(known)
    return form(coo_array((M[known], (rows, columns)), shape=M.shape))


def test_it_is_what_matrix_sensing_finds():
    _, M = problem(noise=0.1)
    for options in ({"switch_off": True}, {"switch_off": False, "alpha": 0.3, "max_rank": 5}):
        one, other = mf.MatrixCompletion(**options).fit(M), mf.MatrixSensing(**options).fit(M)
        np.testing.assert_allclose(one.matrix(), other.matrix(), atol=1e-9)
        np.testing.assert_allclose(one.singular_values_, other.singular_values_, atol=1e-9)
        assert one.rank_ == other.rank_


def test_rows_that_were_not_fitted_are_recovered():
    X, M = problem(100)
    model = mf.MatrixCompletion(switch_off=True).fit(M[:60])
    filled = model.transform(M[60:])
    np.testing.assert_allclose(filled, X[60:], atol=1e-4)
    known = ~np.isnan(M[60:])
    np.testing.assert_array_equal(filled[known], M[60:][known])


@pytest.mark.parametrize("switch_off", [False, True])
def test_a_new_row_is_a_ridge_regression_at_the_last_decay(switch_off):
    _, M = problem(80, noise=0.2)
    model = mf.MatrixCompletion(alpha=0.2, switch_off=switch_off).fit(M[:60])
    top = np.linalg.norm(np.nan_to_num(M[:60]), 2)
    assert model.decay_ == pytest.approx(0.0 if switch_off else 0.2 * top)
    V = model.V_
    for row, filled in zip(M[60:], model.transform(M[60:]), strict=True):
        known = ~np.isnan(row)
        gram = V[known].T @ V[known] + model.decay_ * np.eye(V.shape[1])
        u = np.linalg.solve(gram, V[known].T @ row[known])
        np.testing.assert_allclose(filled[~known], V[~known] @ u, atol=1e-7)


@pytest.mark.parametrize("switch_off", [False, True])
def test_training_rows_are_filled_with_the_matrix(switch_off):
    _, M = problem(noise=0.2)
    model = mf.MatrixCompletion(switch_off=switch_off, tol=1e-9)
    hidden = np.isnan(M)
    np.testing.assert_allclose(model.fit_transform(M)[hidden], model.matrix()[hidden], atol=1e-6)


def test_a_row_of_which_nothing_is_known_is_zero():
    _, M = problem()
    model = mf.MatrixCompletion().fit(M)
    assert not model.transform(np.full((3, 25), np.nan)).any()
    assert not mf.MatrixCompletion(alpha=2.0).fit(M).transform(np.full((1, 25), np.nan)).any()


@pytest.mark.parametrize("form", [csr_array, csc_matrix, coo_array])
def test_of_sparse_matrices_the_stored_entries_are_known(form):
    """Zeros among them: they are data."""
    _, M = problem(noise=0.1)
    M[~np.isnan(M) & (np.random.default_rng(1).random(M.shape) < 0.1)] = 0.0
    sparse, options = as_sparse(M, form), {"alpha": 0.2, "switch_off": False}
    model = mf.MatrixCompletion(**options)
    expected = model.fit(M).matrix()
    filled = model.transform(M)
    np.testing.assert_allclose(model.fit(sparse).matrix(), expected, atol=1e-10)
    np.testing.assert_allclose(model.transform(sparse), filled, atol=1e-10)
    np.testing.assert_allclose(
        mf.MatrixSensing(**options).fit(sparse).matrix(), expected, atol=1e-10
    )
    dropped = csr_array(sparse)
    dropped.eliminate_zeros()
    assert np.abs(model.fit(dropped).matrix() - expected).max() > 0.05


def test_sparse_matrices_are_not_changed():
    """Indices out of order and an entry in two parts, as SciPy allows."""
    M = csr_array(([1.0, 2.0, 3.0, 4.0], [1, 0, 1, 1], [0, 2, 4]), shape=(2, 2))
    before = M.data.copy(), M.indices.copy()
    model = mf.MatrixCompletion(1)
    with pytest.warns(UserWarning, match="max_rank must admit"):
        model.fit(M)
    np.testing.assert_array_equal(M.data, before[0])
    np.testing.assert_array_equal(M.indices, before[1])
    assert model.transform(M)[1, 1] == 7


@pytest.mark.parametrize("estimator", [mf.MatrixCompletion(switch_off=True), mf.MatrixSensing()])
@pytest.mark.sample(1)
def test_large_sparse_matrices_take_the_memory_of_their_entries(estimator):
    """5,000 x 4,000 with 1 entry in 100: 160 MB if it were dense, once."""
    rng = np.random.default_rng(0)
    p, q, r = 5000, 4000, 3
    left, right = rng.standard_normal((p, r)), rng.standard_normal((q, r))
    flat = np.unique(rng.integers(0, p * q, 200_000))
    rows, columns = flat // q, flat % q
    values = np.einsum("ij,ij->i", left[rows], right[columns])
    Y = csr_array((values, (rows, columns)), shape=(p, q))
    tracemalloc.start()
    model = estimator.fit(Y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
    some = rng.integers(0, p, 50)
    np.testing.assert_allclose(model.U_[some] @ model.V_.T, left[some] @ right.T, atol=1e-3)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames_keep_their_names(library):
    # The lowest versions are tested without either.
    frame = pytest.importorskip(library).DataFrame
    _, M = problem(q=12)
    names = [f"c{i}" for i in range(12)]
    data = frame(dict(zip(names, M.T, strict=True)))
    model = mf.MatrixCompletion().set_output(transform=library).fit(data)
    filled = model.transform(data)
    assert isinstance(filled, frame) and list(filled.columns) == names
    assert list(model.feature_names_in_) == list(model.get_feature_names_out()) == names
    np.testing.assert_allclose(filled.to_numpy(), mf.MatrixCompletion().fit_transform(M), atol=1e-6)
    with pytest.raises(ValueError, match="feature names"):
        model.transform(data[names[::-1]])


def test_it_works_in_pipelines_and_searches():
    X, M = problem(120, 8, 2)
    y = X @ np.arange(8.0)
    model = make_pipeline(mf.MatrixCompletion(3, switch_off=True), LinearRegression())
    search = GridSearchCV(model, {"matrixcompletion__alpha": [0.1, 0.9]}, cv=3).fit(M, y)
    assert search.best_params_ == {"matrixcompletion__alpha": 0.1} and search.best_score_ > 0.8


def test_float32_clones_and_pickles():
    X, M = problem()
    model = mf.MatrixCompletion(4, 0.2, switch_off=True)
    small = clone(model).fit(M.astype(np.float32))
    assert small.transform(M.astype(np.float32)).dtype == small.U_.dtype == np.float32
    np.testing.assert_allclose(small.matrix(), X, atol=1e-4)
    again = pickle.loads(pickle.dumps(small))
    np.testing.assert_array_equal(again.V_, small.V_)
    np.testing.assert_allclose(again.transform(M), small.transform(M), atol=1e-5)


def test_a_fit_that_fails_leaves_the_estimator_as_it_was(monkeypatch):
    _, M = problem()
    model = mf.MatrixCompletion().fit(M)
    before = dict(vars(model))
    with pytest.raises(ValueError, match="Mark only unknown entries"):
        model.fit(np.full((4, 5), np.nan))
    assert vars(model) == before

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mirrorflow.estimator._lowrank.alternate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit(M[:, :7])
    assert vars(model) == before


@pytest.mark.parametrize(
    ("options", "X", "said"),
    [
        ({"max_rank": 9}, np.ones((4, 5)), "max_rank must be at most"),
        ({"max_rank": 0}, np.ones((4, 5)), "'max_rank' parameter"),
        ({"alpha": -1.0}, np.ones((4, 5)), "'alpha' parameter"),
        ({"tol": 0.0}, np.ones((4, 5)), "'tol' parameter"),
        ({}, csr_array((4, 5)), "Mark only unknown entries"),
        ({}, np.full((3, 3), np.inf), "infinity"),
        ({}, np.ones((0, 3)), r"0 sample\(s\)"),
        ({}, np.ones(3), "2D"),
    ],
)
def test_bad_input_is_named(options, X, said):
    with pytest.raises(ValueError, match=said):
        mf.MatrixCompletion(**options).fit(X)


def test_too_few_steps_warn_where_fit_was_called():
    _, M = problem(noise=0.5)
    with pytest.warns(ConvergenceWarning, match="max_iter=2") as said:
        mf.MatrixCompletion(max_iter=2).fit(M)
    assert said[0].filename == __file__


def test_columns_without_entries_are_named_where_fit_was_called():
    X, _ = problem()
    X[:, 3] = np.nan
    with pytest.warns(UserWarning, match="got 1 columns without") as said:
        model = mf.MatrixCompletion().fit(X)
    assert said[0].filename == __file__
    assert not model.transform(X)[:, 3].any()


# --- Offsets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0])
def test_centred_completion_is_a_convex_minimizer(alpha):
    """Offsets without penalty beside the nuclear norm; alpha in units of what keeps that at 0."""
    _, M = problem(9, 7, 2, 0.7, 0.1)
    M += 5 + np.arange(7) + np.arange(9)[:, None] ** 2 / 10
    known, Y = ~np.isnan(M), np.nan_to_num(M)
    L, a, b = cp.Variable((9, 7)), cp.Variable((9, 1)), cp.Variable((1, 7))
    total = L + a @ np.ones((1, 7)) + np.ones((9, 1)) @ b
    fit = 0.5 * cp.sum_squares(cp.multiply(known, total - Y))
    cp.Problem(cp.Minimize(fit), [L == 0]).solve(solver="CLARABEL")
    top = np.linalg.norm(np.where(known, Y - a.value - b.value, 0), 2)
    cp.Problem(cp.Minimize(fit + alpha * top * cp.normNuc(L))).solve(solver="CLARABEL")
    model = mf.MatrixCompletion(7, alpha, center=True, tol=1e-9).fit(M)
    np.testing.assert_allclose(model.matrix(), total.value, atol=1e-4)
    np.testing.assert_allclose(model.U_ @ model.V_.T, L.value, atol=1e-4)
    assert model.decay_ == pytest.approx(alpha * top, rel=1e-6)
    assert model.row_offset_.mean() == pytest.approx(0, abs=1e-9)


def test_a_constant_does_not_matter_when_centred():
    X, M = problem(60, 40, 2, 0.4, 0.1)
    hidden = np.isnan(M)

    def error(shift, **options):
        model = mf.MatrixCompletion(4, switch_off=True, **options)
        filled = model.fit_transform(M + shift)
        return np.sqrt(((filled - shift - X)[hidden] ** 2).mean())

    plain = error(0, center=True)
    assert error(100, center=True) == pytest.approx(plain, rel=1e-3)
    assert plain < 0.15 < error(100)


@pytest.mark.parametrize("switch_off", [False, True])
def test_a_new_row_gets_its_offset_when_centred(switch_off):
    _, M = problem(80, noise=0.2)
    M += 10 + np.arange(25)
    model = mf.MatrixCompletion(4, 0.2, switch_off=switch_off, center=True).fit(M[:60])
    V, b = model.V_, model.column_offset_
    for row, filled in zip(M[60:], model.transform(M[60:]), strict=True):
        known = ~np.isnan(row)
        design = np.column_stack([V, np.ones(25)])
        penalty = np.diag([model.decay_] * V.shape[1] + [0.0])
        gram = design[known].T @ design[known] + penalty
        found = np.linalg.solve(gram, design[known].T @ (row - b)[known])
        np.testing.assert_allclose(filled[~known], (design @ found + b)[~known], atol=1e-6)
    np.testing.assert_allclose(model.transform(np.full((1, 25), np.nan))[0], b)


def test_offsets_alone_leave_no_rank():
    M = np.add.outer(np.arange(12.0), np.arange(8.0) ** 2)
    seen = np.where(np.random.default_rng(0).random(M.shape) < 0.7, M, np.nan)
    model = mf.MatrixCompletion(center=True).fit(seen)
    assert model.rank_ == 0
    np.testing.assert_allclose(model.matrix(), M, atol=1e-8)


def test_what_has_no_entry_gets_the_offsets_that_there_are():
    M = np.add.outer(np.arange(6.0), np.arange(4.0))
    M[2], M[:, 1] = np.nan, np.nan
    with pytest.warns(UserWarning, match="must have a known entry"):
        filled = mf.MatrixCompletion(center=True).fit(M).matrix()
    rows, columns = np.array([0, 1, 3, 4, 5]), np.array([0, 2, 3])
    np.testing.assert_allclose(filled[2, columns], rows.mean() + columns)
    np.testing.assert_allclose(filled[rows, 1], rows + columns.mean())


# --- Symmetric matrices ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "seen"), [(30, 0.4), (300, 0.15)])
def test_symmetric_entries_recover(n, seen):
    """By all eigenvalues, and by Lanczos where there are many."""
    rng = np.random.default_rng(0)
    U = rng.standard_normal((n, 2))
    M = np.where(rng.random((n, n)) < seen, U @ U.T, np.nan)
    model = mf.MatrixSensing(symmetric=True).fit(M)
    assert model.rank_ == 2 and model.U_ is not None
    np.testing.assert_array_equal(model.U_, model.V_)
    np.testing.assert_allclose(model.matrix(), U @ U.T, atol=1e-4)
    np.testing.assert_allclose(
        mf.MatrixSensing(symmetric=True).fit(as_sparse(M)).matrix(), model.matrix(), atol=1e-6
    )


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_symmetric_completion_is_the_trace_norm_minimizer(alpha):
    """With indefinite noise, and with entries that their mirror images contradict."""
    rng = np.random.default_rng(1)
    U = rng.standard_normal((9, 2))
    M = U @ U.T + 0.5 * rng.standard_normal((9, 9))
    known = rng.random(M.shape) < 0.6
    seen = np.where(known, M, np.nan)
    model = mf.MatrixSensing(9, alpha, symmetric=True, switch_off=False, tol=1e-9).fit(seen)
    Y = np.nan_to_num(seen)
    top = np.linalg.eigvalsh((Y + Y.T) / 2).max()
    S = cp.Variable((9, 9), PSD=True)
    fit = 0.5 * cp.sum_squares(cp.multiply(known, S) - Y)
    cp.Problem(cp.Minimize(fit + alpha * top * cp.trace(S))).solve(solver="CLARABEL")
    np.testing.assert_allclose(model.matrix(), S.value, atol=1e-4)


def test_a_negative_definite_matrix_is_completed_by_zero():
    assert not mf.MatrixSensing(symmetric=True).fit(-np.eye(4)).matrix().any()


# --- Data that are not of low rank ----------------------------------------------------------------


@pytest.mark.slow
def test_keeping_the_decay_is_the_right_default_for_images():
    """Half of the pixels of 200 digits, one a row: what the documentation says of switch_off."""
    X = load_digits().data[:200]
    known = np.random.default_rng(0).random(X.shape) < 0.5
    seen = np.where(known, X - X[known].mean(), np.nan)

    def error(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # switched off, it does not settle
            filled = mf.MatrixCompletion(30, max_iter=300, **options).fit_transform(seen)
        hidden = (X - X[known].mean())[~known]
        return np.linalg.norm(filled[~known] - hidden) / np.linalg.norm(hidden)

    assert error() < 0.6 < 1 < error(switch_off=True)
