"""End points of pairs without a closed form, against those of the same pairs in closed form."""

import numpy as np
import pytest
import torch

import mirrorflow as mf

DECAY = mf.WeightDecay()


def product_of_two(w):
    return w[0] * w[1]


def problem(n, d, seed=0):
    rng = np.random.default_rng(seed)
    Z, truth = rng.standard_normal((n, d)), np.zeros(d)
    truth[: max(1, n // 4)] = rng.choice([-1.0, 1.0], max(1, n // 4))
    w0 = tuple(torch.from_numpy(rng.uniform(0.2, 1.2, d) * s) for s in (1, rng.choice([-1, 1], d)))
    return Z, Z @ truth, w0


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize(("n", "d", "a"), [(4, 9, -0.3), (15, 20, -2.0)])
@pytest.mark.sample(2)
def test_the_end_is_that_of_the_closed_form(elementwise, n, d, a):
    """Few and many rows take different derivatives of a g whose coordinates share parameters."""
    Z, y, w0 = problem(n, d)
    R = mf.legendre(mf.CustomReparam(product_of_two, elementwise=elementwise), DECAY, w0)
    closed = mf.limit(mf.legendre(mf.Hadamard(), DECAY, w0), Z, y, a)
    ours = mf.limit(R, Z, y, a)
    assert ours.status is mf.Status.converged
    assert (ours.value - closed.value).abs().max() < 2e-12 * closed.value.abs().max()
    assert ours.stats.residual < 1e-12 and ours.stats.kkt < 1e-8
    assert (ours.aux["theta"] - closed.aux["theta"]).abs().max() < 1e-9


def test_a_start_at_zero_and_targets_at_zero():
    Z, _, (_, w) = problem(4, 9)
    R = mf.legendre(
        mf.CustomReparam(product_of_two, elementwise=True), DECAY, (torch.zeros(9).double(), w)
    )
    found = mf.limit(R, Z, np.zeros(4), -1.0)
    assert found.status is mf.Status.converged and found.value.abs().max() < 1e-14


@pytest.mark.slow
def test_half_of_the_digits_in_single_precision():
    Z, y, w0 = problem(4, 9)
    single = tuple(f.float() for f in w0)
    R = mf.legendre(mf.CustomReparam(product_of_two, elementwise=True), DECAY, single)
    closed = mf.limit(mf.legendre(mf.Hadamard(), DECAY, w0), Z, y, -0.3)
    ours = mf.limit(R, Z, y, -0.3)
    assert ours.value.dtype == torch.float32
    assert (ours.value - closed.value).abs().max() < 1e-5


def test_decay_alone_is_followed_in_closed_form():
    """e^a w0, and an error where float64 ends."""
    w0 = (torch.tensor([0.0, 0.5]).double(), torch.tensor([1.0, -2.0]).double())
    R = mf.legendre(mf.CustomReparam(product_of_two, elementwise=True), DECAY, w0)
    assert torch.allclose(R.centre(-3.0), np.exp(-6.0) * w0[0] * w0[1], rtol=1e-14, atol=0)
    with pytest.raises(mf.RangeError, match="a = "):
        R.centre(-750.0)
