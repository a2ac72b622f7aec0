"""Steps of the paper's proofs that fail as printed, and what mends them (docs/errata.md, 25 on)."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from paper import HADAMARD, PAIRS, STARTS, integrate, legendre, mirror, stated, train

A = -0.3


def straight(name, target, a=A):
    """Follow w along a straight line in x from the centre of R_a; return w, its start, and mu."""
    pair, w0 = PAIRS[name][0], STARTS[name]
    centre = integrate(lambda _, s: a * pair.decay(s.reshape(w0.shape)).ravel(), w0.ravel(), 1.0)
    dx = target - pair.g(centre.reshape(w0.shape))

    def velocity(_, s):
        w = s[: w0.size].reshape(w0.shape)
        dmu = dx / (pair.pull(w, np.ones(4)) ** 2).sum(0)
        return np.concatenate([pair.pull(w, dmu).ravel(), dmu])

    end = integrate(velocity, np.concatenate([centre, np.zeros(4)]), 1.0)
    w = end[: w0.size].reshape(w0.shape)
    assert np.abs(pair.g(w) - target).max() < 1e-9
    return w, centre.reshape(w0.shape), dx, end[w0.size :]


@pytest.mark.parametrize("name", [n for n in PAIRS if n != "log"])
def test_erratum_25_how_far_w_goes_is_bounded_by_x_and_mu(name):
    """The bound that mends the proof: |w - w_c|^2 <= <x - x_c, grad R_a(x)>."""
    for size in (0.1, 1.0, 5.0):
        target = size * np.array([1.0, 0.5, 2.0, 0.3])
        w, centre, dx, mu = straight(name, target)
        assert np.abs(mirror(legendre(name), target, A) - mu).max() < 1e-8 * (1 + abs(mu).max())
        assert (((w - centre) ** 2).sum(0) <= dx * mu * (1 + 1e-9)).all()
    if name == "hadamard":
        stated(25, float(((w - centre) ** 2).sum()), "27.0")
        stated(25, float(dx @ mu), "34.2")


def test_erratum_25_at_the_boundary_of_m_equal_w_it_is_mu_that_is_infinite():
    sizes = [1e-2, 1e-4, 1e-8]
    ends = [straight("one-sided", size * np.ones(4)) for size in sizes]
    assert all(((w - centre) ** 2).sum() < 5 for w, centre, _, _ in ends)
    steps = np.diff([mu.max() for *_, mu in ends])
    assert np.allclose(steps, [-np.log(1e2) / 2, -np.log(1e4) / 2], rtol=1e-6)


def test_erratum_26_the_critical_point_has_to_be_a_minimizer():
    """f' = (x - 1)^2 (x + 1): quasi-convex, least at -1, and critical at 1 as well."""
    w0 = np.array([[1.0], [0.4]])
    amplitude, rho = (1 - 0.4**2) / 2, np.log(1.4 / 0.6)

    def divergence(one, x):
        at = torch.tensor([one, x], dtype=torch.float64)
        root = torch.sqrt(at**2 + amplitude**2)
        slope = (torch.asinh(at / amplitude) - rho) / 2
        value = at * slope - root / 2
        return float(value[0] - value[1] - slope[1] * (one - x))

    xs = [0.4] + [
        float(train(HADAMARD, w0, [(t, 0.0)], lambda x: (x - 1) ** 2 * (x + 1)).x[0])
        for t in (0.5, 1.0, 20.0)
    ]
    least, critical = ([divergence(one, x) for x in xs] for one in (-1.0, 1.0))
    assert (np.diff(least) < 0).all() and (np.diff(critical) > 0).all()
    for value, text in zip((critical[0], critical[-1]), ("0.125", "1.60"), strict=True):
        stated(26, value, text)


def edge(divergence, level):
    """Return the y > 0 at which an increasing divergence from 0 has a level."""
    return brentq(lambda y: divergence(y) - level, 0.0, 1e9, rtol=1e-12)


def test_erratum_27_level_sets_have_to_be_bounded_together():
    """R_a = sqrt(1 + x^2) + a^2 x^2/2, and x^2/2 at a = 0: each is a Bregman function."""

    def divergence(a):
        if a == 0:
            return lambda y: y * y / 2
        return lambda y: 1 - 1 / np.hypot(1, y) + a * a * y * y / 2

    edges = [edge(divergence(a), 2.0) for a in (0.0, -0.1, -0.01)]
    for found, text in zip(edges, ("2.0", "14.8", "142"), strict=True):
        stated(27, found, text)


@pytest.mark.parametrize("name", ["hadamard", "power"])
def test_erratum_27_those_of_the_paper_are(name):
    """A divergence rises along rays, so that its values on one box bound every level set in it."""
    R = legendre(name)
    star = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    ray = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    for a in np.linspace(-2, 0, 9):
        along = [float(R.bregman(star, star + size * ray, float(a))) for size in (1, 3, 9, 30, 90)]
        assert (np.diff(along) > 0).all() and along[-1] > 1
