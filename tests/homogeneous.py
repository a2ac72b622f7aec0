"""Homogeneous models with their flows in NumPy, and training of them by SciPy."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

import mirrorflow as mf
import oracles

DECAY = mf.WeightDecay()
few = settings(max_examples=2, deadline=None, derandomize=True, database=None)
D, UNTIL = 4, 1.2


def tensors(w):
    """Return rows as a tuple of tensors, one row as one tensor."""
    return tuple(torch.from_numpy(f.copy()) for f in w) if len(w) > 1 else torch.from_numpy(w[0])


def square_times(w):
    return w[0] ** 2 * w[1]


OWN = mf.CustomReparam(square_times, elementwise=True)
OWN_FIELD = oracles.elementwise(2, lambda u, v: u * u * v, lambda u, v: (2 * u * v, u * u))
# Model, its flow in NumPy, the number of factors, the degree, and whether factors are positive.
MODELS = {
    "depth-2": (mf.Depth(2), oracles.depth(2), 2, 2, False),
    "depth-3": (mf.Depth(3), oracles.depth(3), 3, 3, False),
    "depth-4": (mf.Depth(4), oracles.depth(4), 4, 4, False),
    "depth-5": (mf.Depth(5), oracles.depth(5), 5, 5, False),
    "power-4": (mf.PowerDifference(2), oracles.power(2, plain=True), 2, 4, False),
    "power-3": (mf.PowerDifference(1.5), oracles.power(1.5, plain=True), 2, 3, True),
    "log-ratio": (mf.LogRatio(), oracles.log_ratio(plain=True), 2, 0, True),
    "own": (OWN, OWN_FIELD, 2, 3, True),
}
each_model = pytest.mark.parametrize("name", MODELS)


def start(name, seed, d=D):
    """Return random unbalanced factors, of any signs where the model takes them."""
    _, _, count, _, positive = MODELS[name]
    rng = np.random.default_rng(seed)
    w = rng.uniform(0.3, 1.0, (count, d))
    if name == "own":
        w[0] += 1.2  # u^2 > 2 v^2 stays, so that v may cross 0 and x take any value
        return w
    return w + 0.6 if positive else w * rng.choice([-1.0, 1.0], (count, d))


def problem(seed, n=2, d=D):
    rng = np.random.default_rng(seed + 1000)
    return rng.standard_normal((n, d)), 0.5 * rng.standard_normal(n)


def trained(field, w0, slope, degree, schedule, until, rtol=1e-12):
    """Integrate w, nu = -int e^{(k-2) a} grad f, mu and a with SciPy; give the last of each."""
    size, d = w0.size, len(field.g(w0.ravel()))

    def velocity(t, y):
        w, a, alpha = y[:size], y[-1], schedule.rate(t)
        s = slope(field.g(w))
        clocked = np.exp((degree - 2) * a) * s
        return -np.concatenate([field.pull(w, s) + alpha * field.decay(w), clocked, s, [alpha]])

    state = np.concatenate([w0.ravel(), np.zeros(2 * d + 1)])
    inner = [b for b in schedule.breakpoints if 0 < b < until]
    for left, right in pairwise([0.0, *inner, until]):
        inside = np.nextafter(right, left)
        state = solve_ivp(
            lambda t, y, left=left, inside=inside: velocity(min(max(t, left), inside), y),
            (left, right), state, method="DOP853", rtol=rtol, atol=1e-14,
        ).y[:, -1]  # fmt: skip
    w = state[:size]
    return w, field.g(w), state[size : size + d], state[size + d : -1], state[-1]


@st.composite
def schedules(draw):
    """Draw piecewise constant rates, some negative."""
    count = draw(st.integers(1, 3))
    rates = draw(st.lists(st.floats(-0.2, 0.8), min_size=count, max_size=count))
    return mf.Piecewise(tuple(UNTIL * (i + 1) / count for i in range(count - 1)), rates)


def gap(one, two):
    one, two = (np.asarray(v).ravel() for v in (one, two))
    return np.abs(one - two).max() / max(np.abs(two).max(), 1e-3)
