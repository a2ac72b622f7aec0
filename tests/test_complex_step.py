"""Derivatives by complex steps, and where they must not be used."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import mirrorflow as mf
from mirrorflow.legendre._complex_step import ComplexStep
from mirrorflow.legendre._weights import PackedWeights
from mirrorflow.legendre.numerical import Inversion
from mirrorflow.reparam import flatten

ANALYTIC = {
    "product": (lambda w: w[0] * w[1], 2),
    "difference of powers": (lambda w: w[0] ** 3 - w[1] ** 3, 2),
    "log ratio": (lambda w: torch.log(w[0]) - torch.log(w[1]), 2),
    "sine of an exponential": (lambda w: torch.sin(torch.exp(w[0])) * w[1] / w[2], 3),
    "one factor": (lambda w: torch.tanh(w) + w**2, 1),
}
REFUSED = {
    "absolute value": lambda w: w[0].abs() * w[1],
    "square of the absolute value": lambda w: w[0].abs() ** 2 - w[1] ** 2,
    "conjugate": lambda w: w[0] * w[0].conj() - w[1] ** 2,
    "clamped": lambda w: w[0].clamp(min=0.7) * w[1],
    "branch": lambda w: torch.where(w[0] > 0.7, w[0], w[1]) * w[1],
    "fractional power of a negative number": lambda w: (-w[0]) ** 3.0000001 + w[1],
    "single precision within": lambda w: w[0].float() * w[1],
    "neighbours": lambda w: w[0] * w[1].roll(1, -1),
    "sum": lambda w: w[0] * w[1].sum(-1, keepdim=True),
}


def weights(count, d=7, scale=1.0, seed=0):
    parts = torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 1.5, (count, d))) * scale
    return parts[0] if count == 1 else tuple(parts)


def begun(fn, w, elementwise=True):
    """Return packed weights whose derivatives have begun at w, and w as a flat state."""
    packed = PackedWeights(mf.CustomReparam(fn, elementwise=elementwise), w, elementwise)
    state = packed.pack(w)
    packed.begin(state.reshape(-1).numpy(), tuple(state.shape))
    return packed, state


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("name", ANALYTIC)
@pytest.mark.parametrize("scale", [1e-60, 1.0, 3.0])
@pytest.mark.sample(12)
def test_they_are_those_of_automatic_differentiation(name, scale, elementwise):
    """To rounding, at weights of any size."""
    fn, count = ANALYTIC[name]
    w = weights(count, scale=scale)
    packed, state = begun(fn, w, elementwise)
    slopes = packed.slopes(state.reshape(-1).numpy())
    assert slopes is not None
    expected = packed.pull(state, torch.ones(7, dtype=torch.float64)).reshape(slopes.shape)
    assert np.abs(slopes / expected.numpy() - 1).max() < 1e-13


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_analytic_or_not_elementwise_is_differentiated(name):
    w = weights(2)
    packed, state = begun(REFUSED[name], w, elementwise=False)
    assert packed.slopes(state.numpy()) is None
    dx = torch.linspace(-1, 1, 7, dtype=torch.float64)
    moved = packed.velocity(state.numpy(), tuple(state.shape), dx, dx.numpy())
    assert np.array_equal(moved, packed.pull(state, dx).numpy(), equal_nan=True)


def test_a_promise_that_is_broken_is_noticed():
    """g that is called elementwise and is not: J^T 1 alone would not tell."""
    packed, state = begun(REFUSED["neighbours"], weights(2), elementwise=True)
    assert packed.slopes(state.reshape(-1).numpy()) is None


def kinked(w):
    """Return a function whose derivative by complex steps is wrong from 1 on, and right before."""
    return w**2 / 2 + torch.relu(w.real - 1.0) ** 2


def test_where_they_turn_wrong_on_the_way_all_begins_anew():
    w0 = torch.tensor([0.5, 0.8, 0.3], dtype=torch.float64)
    R = mf.legendre(
        mf.CustomReparam(kinked, elementwise=True),
        mf.CustomRegularizer(lambda w: kinked(w).sum()),
        w0,
    )
    assert isinstance(R, Inversion)
    mu = torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    found = flatten(R.weights(mu, 0.0))
    # dw = g'(w) dmu with g' = w + 2 (w - 1)_+; the third coordinate ends before the kink.
    oracle = solve_ivp(
        lambda _, w: mu.numpy() * (w + 2 * np.maximum(w - 1, 0)), (0, 1), w0.numpy(),
        rtol=1e-12, atol=1e-13, max_step=1e-3,
    ).y[:, -1]  # fmt: skip
    assert np.abs(found.numpy() - oracle).max() < 1e-9
    assert oracle[0] > 1.1 > 1 > oracle[2]


def test_an_end_point_across_the_kink():
    """`limit` by the same g, with and without a pullback of its own."""

    class Own(mf.CustomReparam):
        def pullback(self, w, dx):
            assert isinstance(w, torch.Tensor)
            return (w + 2 * torch.relu(w - 1.0)) * dx

    w0 = torch.tensor([0.5, 0.8, 0.3, 0.6], dtype=torch.float64)
    Z = np.random.default_rng(1).uniform(0.2, 1.0, (2, 4))
    y = Z @ np.array([1.5, 0.2, 0.4, 0.9])
    h = mf.CustomRegularizer(lambda w: kinked(w).sum())
    ends = [
        mf.limit(mf.legendre(kind(kinked, elementwise=True), h, w0), Z, y, 0.0)
        for kind in (mf.CustomReparam, Own)
    ]
    assert ends[0].value.max() > 0.5  # beyond g(1): the kink was crossed
    assert (ends[0].value - ends[1].value).abs().max() < 1e-11
    assert max(end.stats.residual for end in ends) < 1e-12


def test_weights_that_fall_by_eight_orders_of_magnitude():
    """Faster than any exponential, and as accurately as the integration itself."""

    def g(w):
        return w**2 * torch.log(w)

    w0 = torch.tensor([0.1, 0.3], dtype=torch.float64)
    R = mf.legendre(
        mf.CustomReparam(g, elementwise=True), mf.CustomRegularizer(lambda w: g(w).sum()), w0
    )
    assert isinstance(R, Inversion)
    mu = torch.tensor([1.2, 0.5], dtype=torch.float64)
    # dw = (2 w log w + w) dmu, so that log w = (log w0 + 1/2) e^{2 mu} - 1/2.
    log_w = (np.log(w0.numpy()) + 0.5) * np.exp(2 * mu.numpy()) - 0.5
    assert log_w[0] < -20
    assert np.abs(np.log(flatten(R.weights(mu, 0.0)).numpy()) - log_w).max() < 1e-7


def test_complex_numbers_that_g_cannot_take_cost_nothing_but_time():
    step = ComplexStep(mf.CustomReparam(torch.erf, elementwise=True), False, (1, 3))
    assert step.slopes(np.ones((1, 3))) is None
