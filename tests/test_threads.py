"""Threads of BLAS: one for small problems, the user's number for large ones and afterwards."""

from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from threadpoolctl import ThreadpoolController

import mirrorflow as mf
from mirrorflow import _threads
from mirrorflow._threads import SMALL, one_pool, one_thread, small_on_one_thread
from mirrorflow.estimator import _base, _lowrank, coding, paths, sensing
from mirrorflow.flow import solve as flow_solve
from mirrorflow.limit import solve
from mirrorflow.spectrum import _measurement, product


def blas():
    """Return the number of threads of each BLAS, by its file."""
    pools = ThreadpoolController().select(user_api="blas").info()
    return {pool["filepath"]: pool["num_threads"] for pool in pools}


@pytest.fixture(autouse=True)
def two_threads():
    """Let all that can compute with two threads, whatever the tests run with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        yield
    torch.set_num_threads(before)


def entropy(d):
    w = torch.full((d,), 0.1, dtype=torch.float64)
    return mf.legendre(mf.Hadamard(), mf.WeightDecay(), (torch.zeros_like(w), w))


def draw(n, d):
    rng = np.random.default_rng(n + d)
    return rng.standard_normal((n, d)), rng.standard_normal(n)


def flow(Z, y):
    loss = mf.LeastSquares(torch.from_numpy(Z), torch.from_numpy(y))
    w = torch.ones(Z.shape[1], dtype=torch.float64)
    mf.flow(loss, mf.Hadamard(), mf.WeightDecay(), (0 * w, w), mf.Constant(0.0), 1.0)


def partly_seen(side):
    X = np.outer(np.arange(1.0, side + 1), np.linspace(1, 2, side))
    return np.where(np.random.default_rng(0).random(X.shape) < 0.9, X, np.nan)


# Where each call computes, and the call at a size of n x d.
CALLS = {
    "limit": (solve, "_solve", lambda n, d: mf.limit(entropy(d), *draw(n, d), 0.0)),
    "regressor": (_base, "integrate", lambda n, d: mf.MirrorFlowRegressor().fit(*draw(n, d))),
    "flow path": (paths, "integrate", lambda n, d: mf.flow_path(*draw(n, d), ts=[0.3])),
    "entropy path": (paths, "endpoints", lambda n, d: mf.entropy_path(*draw(n, d), [4.0])),
    "flow": (flow_solve, "Integration", lambda n, d: flow(*draw(n, d))),
    "codes": (
        coding, "settled_codes",
        lambda n, d: mf.MirrorFlowCoder(np.eye(d)).fit_transform(draw(n, d)[0]),
    ),
    "completion": (_lowrank, "alternate", lambda n, d: mf.MatrixSensing(1).fit(partly_seen(n))),
    "sensing": (
        sensing, "sense",
        lambda n, d: mf.MatrixSensing(1, shape=(d // 4, 4), max_iter=4000).fit(*draw(n, d)),
    ),
}  # fmt: skip


class Seen(Exception):
    """Ends a call once its threads have been counted."""


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("n", "d", "small"), [(20, 40, True), (700, 700, False)])
@pytest.mark.sample(8)
def test_small_problems_have_one_thread_and_large_ones_those_of_the_user(
    name, n, d, small, monkeypatch
):
    home, computes, call = CALLS[name]
    assert (n * d <= SMALL) is (n * d <= solve.SMALL) is small

    def counted(*args, **kwargs):
        raise Seen(blas())

    monkeypatch.setattr(home, computes, counted)
    before = blas()
    with pytest.raises(Seen) as seen:
        call(n, d)
    inside = seen.value.args[0]
    if small:
        assert set(inside.values()) == {1}
    else:  # NumPy's, at least: the end points of `limit` leave SciPy's own one thread
        assert all(n == before[p] for p, n in inside.items() if "scipy.libs" not in p)
    assert blas() == before


@pytest.mark.parametrize(("n", "threads"), [(64, 1), (4096, 2)])
def test_small_spectra_have_one_thread_of_torch(n, threads, monkeypatch):
    seen = []

    def counted(*args, **kwargs):
        seen.append(torch.get_num_threads())
        raise Seen

    factors = torch.ones(n, 32), torch.ones(32, n)
    monkeypatch.setattr(product, "_spectrum", counted)
    with pytest.raises(Seen):
        product.product_spectrum(*factors)
    monkeypatch.setattr(_measurement, "_whole", counted)
    whole = SimpleNamespace(left=0, right=1, shape=(n, 32, n), heads=None, key_heads=None)
    rows = factors[0].mT, factors[1]
    with pytest.raises(Seen):
        _measurement.measure([whole], rows.__getitem__, "layer")
    assert seen == [threads, threads] and torch.get_num_threads() == 2


def test_scipys_own_blas_has_one_thread_meanwhile_and_its_own_number_after():
    before = blas()
    with one_pool(), one_pool():
        inside = blas()
    changed = {path for path, count in inside.items() if count != before[path]}
    assert all("scipy" in path and inside[path] == 1 for path in changed)
    assert blas() == before


@pytest.mark.parametrize("first", [one_pool, one_thread, lambda: small_on_one_thread(1)])
@pytest.mark.parametrize("second", [one_pool, one_thread, lambda: small_on_one_thread(1)])
def test_whoever_leaves_last_restores_the_threads(first, second):
    before, entered, leaves = blas(), Event(), Event()

    def other():
        with first():
            entered.set()
            leaves.wait()

    thread = Thread(target=other, daemon=True)
    thread.start()
    entered.wait()
    with second():  # comes second and leaves second
        inside = blas()
        leaves.set()
        thread.join()
        alone = blas()
    with second():
        assert blas() == alone
    assert all(inside[path] <= alone[path] for path in alone)
    assert blas() == before
    with pytest.raises(ZeroDivisionError), first():
        _ = 1 / 0
    assert blas() == before


def test_large_problems_change_nothing():
    before = blas()
    with small_on_one_thread(SMALL + 1):
        assert blas() == before
    assert not any(_threads._inside.values())
