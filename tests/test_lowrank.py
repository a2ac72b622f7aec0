"""The methods of the low-rank study solve what they say they solve."""

import numpy as np
import pytest
from sklearn.utils import Bunch

from mirrorflow.lab.experiments.studies import _lowrank_methods as methods
from mirrorflow.lab.experiments.studies._lowrank_data import Entries, faces, pixels


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((14, 2)) @ rng.standard_normal((2, 11))
    known = rng.random(X.shape) < 0.7
    noisy = X + 0.1 * rng.standard_normal(X.shape)
    return Entries(np.where(known, noisy, np.nan))


def solve(name, problem, knob):
    method, _ = methods.METHODS[name]
    X, settled = method(problem, [knob], 5)[-1]
    assert settled
    return X


def objective(problem, X, knob):
    known = ~np.isnan(problem.M)
    weight = knob * np.linalg.norm(problem.adjoint(), 2)
    residual = (X - problem.M)[known]
    return 0.5 * residual @ residual + weight * np.linalg.norm(X, "nuc")


@pytest.mark.parametrize("knob", [0.3, 0.1])
def test_three_solvers_of_the_same_problem_agree(problem, knob, monkeypatch):
    """Soft-impute, the decay that is kept, and CVXPY minimize |residual|^2/2 + knob |X|_*."""
    pytest.importorskip("cvxpy")
    monkeypatch.setattr(methods, "STEPS", 5000)
    monkeypatch.setattr(methods, "SETTLED", 1e-8)
    best = solve("nuclear norm (CVXPY)", problem, knob)
    soft = solve("soft-impute", problem, knob)
    kept = solve("mirrorflow (decay kept)", problem, knob)
    size = np.linalg.norm(best)
    assert np.linalg.norm(soft - best) < 1e-3 * size
    assert np.linalg.norm(kept - best) < 1e-2 * size
    values = [objective(problem, X, knob) for X in (soft, kept, best)]
    assert min(values) >= values[0] * (1 - 1e-6)  # soft-impute is exact
    assert max(values) <= values[0] * (1 + 1e-4)


def test_hard_impute_keeps_as_many_singular_values_as_it_is_told(problem):
    X = solve("hard-impute", problem, 2)
    values = np.linalg.svd(X, compute_uv=False)
    assert (values[:2] > 0.1).all() and values[2] < 1e-10
    known = ~np.isnan(problem.M)
    assert np.abs(X - problem.M)[known].mean() < 0.2


def test_the_knob_is_chosen_on_what_was_held_out(problem):
    found = methods.fit("hard-impute", problem, 5, seed=0)
    assert found.knob == 2 and found.seconds > 0  # the rank of the truth


@pytest.mark.parametrize(("name", "shape"), [("digits", (200, 64)), ("flower", (26, 40))])
def test_images_are_grey_levels(name, shape):
    found = pixels(name, 16)
    assert found.shape == shape and 0 <= found.min() < found.max() <= 1


def test_faces_are_found_as_for_the_sparse_codes(monkeypatch):
    images = np.random.default_rng(0).random((400, 64, 64))
    found = Bunch(data=images.reshape(400, -1).astype(np.float32), images=images)
    monkeypatch.setattr("sklearn.datasets.fetch_olivetti_faces", lambda: found)
    small = faces()
    assert small.shape == (200, 1024)
    assert small[3, 33] == pytest.approx(images[3, 2:4, 2:4].mean(), rel=1e-6)

    def offline():
        raise OSError

    monkeypatch.setattr("sklearn.datasets.fetch_olivetti_faces", offline)
    assert faces() is None
