"""A user's own separable model, sinh u - sinh v: advice, laws and `limit`, without an edit here.

With h = sinh u + sinh v and gd(u) = arctan(sinh u) the flow is gd(u) = gd(u0) + mu + a and
gd(v) = gd(v0) - mu + a, so that x = tan(gd(u0) + mu + a) - tan(gd(v0) - mu + a).
"""

from math import inf

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import mirrorflow as mf
from mirrorflow.legendre import Inversion, LegendreFunction, NewtonProblem
from mirrorflow.reparam import SeparableReparam

DECAY, TERMS = mf.WeightDecay(), mf.Separable()
rng = np.random.default_rng(0)
U0, V0 = rng.uniform(-0.3, 0.6, (2, 5))
START = (torch.from_numpy(U0), torch.from_numpy(V0))
Z = rng.standard_normal((2, 5))
Y = np.array([0.9, -0.6])
SCHEDULE = mf.SwitchOff(0.15, at=1.0)


class Unnamed(SeparableReparam):
    """x = sinh u - sinh v, as short as it can be."""

    names = ("u", "v")
    signs = (1.0, -1.0)

    def terms(self, w):
        return torch.sinh(w[0]), -torch.sinh(w[1])

    def slopes(self, w):
        return torch.cosh(w[0]), -torch.cosh(w[1])


class SinhDifference(Unnamed):
    """The same, with what a message needs."""

    formulas = ("sinh u", "sinh v")
    bounds = ((-inf, inf), (-inf, inf))


class Solved(SinhDifference):
    """The same, with its Legendre function."""

    def closed_form(self, h, w0):
        return SinhEntropy(*(torch.atan(torch.sinh(f)) for f in w0)) if h == TERMS else None


class SinhEntropy(LegendreFunction):
    """R_a: x = 2 sin d / (cos d + cos s) with s = p + q + 2a and d = p - q + 2 mu."""

    elementwise = True
    calls = 0

    def __init__(self, p, q):
        self.p, self.q, self.shape, self.dtype = p, q, p.shape, p.dtype

    def range(self, a):
        half = np.pi / 2
        lower = torch.maximum(-half - self.p - a, self.q + a - half)
        return lower, torch.minimum(half - self.p - a, self.q + a + half)

    def _angles(self, mu, a):
        lower, upper = self.range(a)
        if not ((mu > lower) & (mu < upper)).all():
            raise mf.RangeError("mu is outside its range")
        return self.p + mu + a, self.q - mu + a

    def primal(self, mu, a):
        type(self).calls += 1
        one, two = self._angles(mu, a)
        return torch.tan(one) - torch.tan(two)

    def mirror(self, x, a):
        s = self.p + self.q + 2 * a
        d = torch.atan(x / 2) + torch.asin(x * torch.cos(s) / torch.sqrt(4 + x * x))
        return (d - self.p + self.q) / 2

    def conjugate(self, mu, a):
        logs = [torch.log(torch.cos(v)) for v in (self.p, self.q, *self._angles(mu, a))]
        return self._sum(logs[0] + logs[1] - logs[2] - logs[3])

    def metric(self, x, a):
        one, two = self._angles(self.mirror(x, a), a)
        return 1 / (torch.cos(one) ** -2 + torch.cos(two) ** -2)

    def array_primal(self):
        p, q = self.p.numpy(), self.q.numpy()

        def primal(mu, a):
            self._angles(torch.from_numpy(mu), a)
            one, two = np.tan(p + mu + a), np.tan(q - mu + a)
            return one - two, 2 + one**2 + two**2

        return primal


def trained(t_end):
    """Integrate the flow with SciPy: u, v, mu at t_end."""

    def velocity(t, state):
        u, v, _ = np.split(state, 3)
        slope = Z.T @ (Z @ (np.sinh(u) - np.sinh(v)) - Y) / len(Y)
        alpha = SCHEDULE.rate(min(t, t_end))
        return -np.concatenate([np.cosh(u) * (slope + alpha), np.cosh(v) * (-slope + alpha), slope])

    state, now = np.concatenate([U0, V0, 0 * U0]), 0.0
    for until in (min(1.0, t_end), t_end):
        if until > now:
            inside = lambda t, s, stop=until: velocity(min(t, np.nextafter(stop, 0)), s)  # noqa: E731
            found = solve_ivp(inside, (now, until), state, "DOP853", rtol=1e-12, atol=1e-14)
            state, now = found.y[:, -1], until
    return np.split(state, 3)


def distance(one, two):
    one, two = (np.asarray(v) for v in (one, two))
    return float(np.abs(one - two).max() / np.abs(two).max())


@pytest.mark.parametrize("g", [Unnamed(), SinhDifference()], ids=["short", "named"])
def test_the_advice_is_the_penalty_of_this_model(g):
    report = mf.check(g, DECAY, START)
    wanted = "sinh u + sinh v" if g.formulas else "g_u(u) - g_v(v) for the terms g_u, g_v of g"
    assert not report.applies
    assert report.advice.startswith("Corollary 3.7") and report.advice.endswith(f"h = {wanted}.")
    good = mf.check(g, TERMS, START)
    assert good.applies and not good.well_posed


def test_only_the_terms_of_the_model_commute_with_it():
    assert mf.check(SinhDifference(), mf.Separable((0.7, -1.3)), START).applies
    logs = mf.CustomRegularizer(lambda w: (torch.cosh(w[0]) + torch.cosh(w[1])).sum())
    assert not mf.check(SinhDifference(), logs, START).commuting


def test_a_penalty_that_is_bounded_below_is_recognized_by_the_bounds_of_the_terms():
    class Exponentials(SinhDifference):
        bounds = ((0.0, inf), (-inf, 0.0))

        def terms(self, w):
            return torch.exp(w[0]), -torch.exp(w[1])

        slopes = terms

    for c, bounded in ((None, True), ((1.0, 1.0), False), ((0.0, -2.0), True)):
        assert mf.check(Exponentials(), mf.Separable(c), START).well_posed is bounded


@pytest.mark.parametrize("g", [SinhDifference(), Solved()], ids=["integrated", "closed"])
@pytest.mark.parametrize("t", (0.4, 1.0, 3.0))
def test_the_mirror_of_x_is_mu_at_every_time(g, t):
    R = mf.legendre(g, TERMS, START)
    u, v, mu = trained(t)
    x, a = torch.from_numpy(np.sinh(u) - np.sinh(v)), SCHEDULE.accumulated(t)
    assert np.abs(R.mirror(x, a).numpy() - mu).max() < 1e-9
    assert distance(R.primal(torch.from_numpy(mu), a), x) < 1e-9


def test_the_closed_form_agrees_with_the_integration_of_w():
    closed, general = (mf.legendre(g, TERMS, START) for g in (Solved(), SinhDifference()))
    assert type(closed) is SinhEntropy and type(general) is Inversion
    x = torch.from_numpy(rng.uniform(-1.0, 1.0, 5))
    for name in ("mirror", "metric", "value"):
        assert distance(getattr(closed, name)(x, -0.2), getattr(general, name)(x, -0.2)) < 1e-9


def test_training_ends_at_the_limit_by_either_path():
    u, v, _ = trained(200.0)
    end = np.sinh(u) - np.sinh(v)
    general = mf.limit(mf.legendre(SinhDifference(), TERMS, START), Z, Y, a=-0.15)
    R = mf.legendre(Solved(), TERMS, START)
    assert isinstance(R.dual_problem(Z), NewtonProblem)
    before = SinhEntropy.calls
    fast = mf.limit(R, Z, Y, a=-0.15)
    assert SinhEntropy.calls == before  # torch's derivatives were not needed
    for found in (general, fast):
        assert found.status is mf.Status.converged and found.stats.kkt < 1e-8
        assert distance(found.value, end) < 1e-7


@pytest.mark.parametrize("view", ("parameters", "mirror", "primal"))
def test_every_view_of_the_flow_agrees(view):
    loss = mf.LeastSquares(torch.from_numpy(Z), torch.from_numpy(Y))
    sol = mf.flow(loss, Solved(), TERMS, START, SCHEDULE, 3.0, view=view, rtol=1e-10)
    u, v, mu = trained(3.0)
    assert distance(sol.value, np.sinh(u) - np.sinh(v)) < 1e-7
    assert np.abs(sol.path.mu[-1].numpy() - mu).max() < 1e-7


def test_a_dual_problem_of_an_unknown_kind_is_refused():
    class Odd(SinhEntropy):
        def dual_problem(self, Z):
            problem = super().dual_problem(Z)
            return type("OddProblem", (), {"Z": problem.Z})()

    R = Odd(*(torch.atan(torch.sinh(f)) for f in START))
    with pytest.raises(TypeError, match="must return an ExponentialProblem or a NewtonProblem"):
        mf.limit(R, Z, Y, a=-0.1)
