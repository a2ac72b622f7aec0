"""The account that `flow` predicts, against steps that are really taken."""

import numpy as np
import pytest
import torch

import mirrorflow as mf
from mirrorflow.descent import predicted_account

DECAY = mf.WeightDecay()


def problem(seed=0, n=4, d=9):
    rng = np.random.default_rng(seed)
    rows = np.linalg.qr(rng.standard_normal((d, n)))[0].T * np.sqrt(d)  # all converge alike
    Z, truth = torch.from_numpy(np.ascontiguousarray(rows)), torch.zeros(d).double()
    truth[:2] = torch.tensor([1.0, -1.0])
    w0 = tuple(torch.from_numpy(rng.uniform(low, 0.8, d)) for low in (-0.3, 0.5))
    return mf.LeastSquares(Z, Z @ truth), w0


@pytest.mark.parametrize("view", ["parameters", "mirror"])
def test_the_predicted_account_is_that_of_training_to_second_order(view):
    """Halving lr quarters what the prediction misses, and it is far closer than decay alone."""
    loss, w0 = problem()
    schedule, missed = mf.SwitchOff(0.05, 5.0), []
    R = mf.legendre(mf.Hadamard(), DECAY, w0)
    for lr in (0.02, 0.01):
        pair = (loss, mf.Hadamard(), DECAY, w0, schedule)
        trained = mf.descend(*pair, lr, round(60 / lr))
        path = mf.flow(*pair, 60.0, view=view, lr=lr).path
        exact = trained.path.account.a[-1]
        missed.append(float((path.account.a[-1] - exact).abs().max()))
        alone = float((path.a[-1] - exact).abs().max())
        assert missed[-1] < 0.1 * alone
        ends = [
            mf.limit(R, loss.Z, loss.y, path.account.a[-1], per_coordinate=True).value,
            mf.limit(R, loss.Z, loss.y, float(path.a[-1])).value,
        ]
        near, far = (float((end - trained.value).norm()) for end in ends)
        assert near < 0.2 * far
    assert 3 < missed[0] / missed[1] < 5


def test_the_times_that_are_saved_do_not_change_the_account():
    loss, w0 = problem()
    pair = (loss, mf.Hadamard(), DECAY, w0, mf.SwitchOff(0.05, 5.0), 30.0)
    own = mf.flow(*pair, lr=0.1).path
    few = mf.flow(*pair, lr=0.1, save_at=[0.0, 7.3, 30.0]).path
    assert few.account.a.shape == (3, 9) and own.account.a.shape == own.x.shape
    assert (few.account.a[-1] - own.account.a[-1]).abs().max() < 1e-7
    assert not few.account.a[0].any() and torch.equal(few.account.mu, few.mu)
    dense = mf.flow(*pair, save_at=np.linspace(0, 30, 6001))
    literal = predicted_account(dense, loss, 0.1)
    assert (literal.a[1460] - few.account.a[1]).abs().max() < 1e-6
    assert mf.flow(*pair).path.account is None


@pytest.mark.parametrize(
    ("g", "w0"),
    [
        (mf.PowerDifference(1), (torch.ones(9).double(), torch.zeros(9).double())),
        (mf.Depth(3), tuple(torch.ones(9).double() for _ in range(3))),
        (mf.CustomReparam(lambda w: w[0] * w[1]), tuple(torch.ones(9).double() for _ in "mw")),
    ],
)
def test_other_pairs_are_refused(g, w0):
    loss, _ = problem()
    with pytest.raises(ValueError, match="lr must come with m \\* w"):
        mf.flow(loss, g, DECAY, w0, mf.Constant(0.1), 1.0, lr=0.1)


def test_a_bad_rate_is_refused():
    loss, w0 = problem()
    for lr in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match="lr must be positive and finite"):
            mf.flow(loss, mf.Hadamard(), DECAY, w0, mf.Constant(0.1), 1.0, lr=lr)
