"""What `flow` promises beside the laws: times, tolerances, dtypes, and failure as data."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

import mirrorflow as mf
import oracles
from cases import EIGEN, EVERY, SCHEDULES, loss
from mirrorflow.flow._integrator import Integration
from mirrorflow.flow._views import ArrayMirrorView, ArrayParameterView, MirrorView, ParameterView

VIEWS = ("parameters", "mirror", "primal")
METHODS = ("LSODA", "DOP853")
H, DECAY, NONE = mf.Hadamard(), mf.WeightDecay(), mf.Constant(0.0)
each_view = pytest.mark.parametrize("view", VIEWS)
each_method = pytest.mark.parametrize("method", METHODS)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def pair(id):
    return next(c for c in EVERY if c.id == id)


HADAMARD = pair("hadamard")
LINEAR = loss(HADAMARD, "least-squares").torch


def hadamard(schedule, t_end, **options):
    options = {"loss": LINEAR, "w0": HADAMARD.start(0), **options}
    return mf.flow(g=H, h=DECAY, schedule=schedule, t_end=t_end, **options)


def truth(schedule, times):
    return oracles.train(
        HADAMARD.field, HADAMARD.flat(0), loss(HADAMARD, "least-squares").slope, schedule.rate,
        times[-1], schedule.breakpoints, times,
    )  # fmt: skip


def difference(one, two):
    return float((torch.as_tensor(one) - torch.as_tensor(two)).abs().max())


# Times.


@each_method
@each_view
def test_the_flow_lands_on_the_breakpoints(view, method):
    schedule = SCHEDULES["off-on-off"]
    sol = hadamard(schedule, 2.0, view=view, method=method)
    assert {0.0, *schedule.breakpoints, 2.0} <= set(sol.path.t.tolist())
    assert (sol.path.t.diff() > 0).all()
    assert difference(sol.path.a, schedule.accumulated(sol.path.t.numpy())) < 1e-14
    assert len(sol.path.x) == len(sol.path.t) == len(sol.path.mu)
    assert sol.stats.method == method and sol.stats.view == view and sol.stats.t == 2.0


@each_method
@each_view
def test_saved_times_cost_no_steps_and_are_accurate(view, method):
    schedule, times = SCHEDULES["cosine"], np.linspace(0, 1.8, 37)
    sol = hadamard(schedule, 2.0, view=view, method=method, save_at=times)
    own = hadamard(schedule, 2.0, view=view, method=method)
    assert sol.path.t.tolist() == times.tolist()
    assert abs(sol.stats.steps - own.stats.steps) < len(times) / 3  # no stop at each of them
    # DOP853's interpolant takes three evaluations in a step with saved times, LSODA's none.
    extra = sol.stats.evaluations - own.stats.evaluations
    assert extra <= len(times) / 3 + (3 * own.stats.steps if method == "DOP853" else 0)
    _, x, mu, _ = truth(schedule, times)
    assert difference(sol.path.x, x) < 1e-6
    assert difference(sol.path.mu, mu) < 1e-6
    # The value is the end of the flow, not the last saved time.
    assert difference(sol.value, own.value) < 1e-9
    assert difference(sol.value, sol.path.x[-1]) > 1e-4


def test_saved_times_may_repeat_and_include_the_ends():
    sol = hadamard(NONE, 1.0, save_at=[0, 0, 0.5, 0.5, 1.0, 1.0])
    assert sol.path.t.tolist() == [0, 0, 0.5, 0.5, 1.0, 1.0]
    for i, j in ((0, 1), (2, 3), (4, 5)):
        assert difference(sol.path.x[i], sol.path.x[j]) < 1e-14
    assert difference(sol.path.x[4], sol.value) < 1e-9


# Accuracy.


@each_method
@each_view
def test_the_error_follows_the_tolerance(view, method):
    schedule = SCHEDULES["negative"]
    _, (x,), _, _ = truth(schedule, (2.0,))
    for rtol in (1e-4, 1e-7, 1e-10):
        sol = hadamard(schedule, 2.0, view=view, method=method, rtol=rtol)
        assert difference(sol.value, x) < 50 * rtol


@each_view
@pytest.mark.sample(1)
def test_weights_that_decay_to_almost_nothing_still_decide(view):
    """a = -60 leaves A = e^{-120}; x grows back from it exactly as the dual solution says."""
    w0 = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    Z, y = vector([1.0, 0.4, -0.3], [0.2, 1.0, 0.5]), vector(1.0, -0.5)
    schedule = mf.SwitchOff(6.0, 10.0)
    sol = hadamard(schedule, 400.0, loss=mf.LeastSquares(Z, y), w0=w0, view=view)
    R = mf.legendre(H, DECAY, w0)
    assert difference(Z @ sol.value, y) < 1e-7
    mu = R.mirror(sol.value, -60.0)
    theta = torch.linalg.lstsq(Z.T, mu[:, None]).solution
    assert mu.abs().max() > 50  # the entropy is close to L1 here
    assert difference(Z.T @ theta, mu[:, None]) < 1e-4 * mu.abs().max()
    assert difference(sol.path.mu[-1], mu) < 1e-4 * mu.abs().max()


@pytest.mark.parametrize("view", ("parameters", pytest.param("primal", marks=pytest.mark.slow)))
def test_constant_decay_for_a_very_long_time_ends_at_the_lasso(view):
    """From m = 0, a = -1000: the stationary points of m * w under decay are those of the lasso."""
    w0 = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    Z, y = vector([1.0, 2.0, 0.5], [0.0, 1.0, 1.0]), vector(1.0, 2.0)
    sol = hadamard(mf.Constant(0.1), 1e4, loss=mf.LeastSquares(Z, y), w0=w0, view=view)
    assert sol.status is mf.Status.completed
    lasso = Lasso(alpha=0.1, fit_intercept=False, tol=1e-12).fit(Z.numpy(), y.numpy())
    assert difference(sol.value, lasso.coef_) < 1e-6


@pytest.mark.parametrize("view", ("parameters", pytest.param("primal", marks=pytest.mark.slow)))
def test_weights_that_decay_below_the_tolerance_are_a_warning(view):
    """At a = -1000 the weights are e^{-1000}; x is still 0 at t = 100, as mu says."""
    w0 = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    schedule, loss_of = mf.SwitchOff(1e3, 1.0), mf.LeastSquares(vector([1.0, 2.0]), vector(1.0))
    with pytest.warns(RuntimeWarning, match="view='mirror' follows it"):
        hadamard(schedule, 100.0, loss=loss_of, w0=w0, view=view)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sol = hadamard(schedule, 100.0, loss=loss_of, w0=w0, view="mirror")
        hadamard(mf.SwitchOff(6.0, 10.0), 20.0, loss=loss_of, w0=w0, view=view)
    assert sol.value.abs().max() == 0


@each_view
def test_without_a_loss_x_follows_the_centre(view):
    sol = hadamard(mf.Constant(0.3), 2.0, loss=lambda x: 0 * x.sum(), view=view)
    R = mf.legendre(H, DECAY, HADAMARD.start(0))
    assert difference(sol.value, R.centre(-0.6)) < 1e-7 and sol.path.mu.abs().max() == 0


@each_view
def test_a_loss_of_ones_own_gives_the_flow_of_least_squares(view):
    schedule = SCHEDULES["linear"]
    ours = hadamard(schedule, 2.0, view=view)
    theirs = hadamard(schedule, 2.0, view=view, loss=lambda x: LINEAR(x))
    assert difference(ours.value, theirs.value) < 1e-7
    assert difference(ours.path.mu[-1], theirs.path.mu[-1]) < 1e-7


def test_x_may_have_any_shape():
    rng = np.random.default_rng(0)
    w0 = tuple(torch.from_numpy(rng.uniform(0.2 + i, 0.8 + i, (2, 3))) for i in range(2))
    Z, y = torch.from_numpy(rng.standard_normal((2, 2, 3))), vector(0.5, 1.0)
    flat = mf.flow(
        mf.LeastSquares(Z.reshape(2, 6), y), H, DECAY, tuple(f.reshape(6) for f in w0),
        SCHEDULES["constant"], 1.0,
    )  # fmt: skip
    for view in VIEWS:
        sol = mf.flow(mf.LeastSquares(Z, y), H, DECAY, w0, SCHEDULES["constant"], 1.0, view=view)
        assert sol.path.x.shape[1:] == sol.path.mu.shape[1:] == (2, 3)
        assert difference(sol.value.reshape(-1), flat.value) < 1e-7


def test_measurements_of_a_symmetric_matrix_need_not_be_symmetric():
    """<Z, X> sees the symmetric part of Z only, and so does mu."""
    case, rng = pair("symmetric-commuting"), np.random.default_rng(0)
    skew = rng.standard_normal((2, 3, 3))
    symmetric = (rng.standard_normal((2, 3)) @ EIGEN.T).reshape(2, 3, 3)
    Z = torch.from_numpy(symmetric + skew - np.swapaxes(skew, 1, 2))
    y, U0 = vector(0.3, 0.7), case.start(0)
    expected = mf.flow(
        mf.LeastSquares(torch.from_numpy(symmetric), y), case.g, DECAY, U0, NONE, 1.0
    )
    for view in VIEWS:
        sol = mf.flow(mf.LeastSquares(Z, y), case.g, DECAY, U0, NONE, 1.0, view=view)
        assert difference(sol.value, expected.value) < 1e-6
        assert difference(sol.path.mu[-1], expected.path.mu[-1]) < 1e-6


def test_the_numpy_view_is_the_general_one():
    """Velocity against the general mirror view; Jacobian against differences of the velocity."""
    rng = np.random.default_rng(0)
    g, w0 = mf.PowerDifference(1), pair("power-1").start(0)
    h = mf.Separable((torch.from_numpy(rng.uniform(0.5, 1.5, 3)), -0.7))  # a drift per coordinate
    R = mf.legendre(g, h, w0)
    fast = ArrayMirrorView(LINEAR, g, w0, R, R.array_primal())
    general = MirrorView(LINEAR, g, w0, R)
    schedule = mf.Constant(0.4)
    jacobian = fast.jacobian(schedule)
    for size in (0.0, 0.1, 3.0):
        y = size * rng.standard_normal(2)
        v = fast.velocity(2.0, y, schedule)
        np.testing.assert_allclose(v, general.velocity(2.0, y, schedule), rtol=1e-11, atol=1e-12)
        steps = 1e-6 * np.eye(2)
        columns = [
            (fast.velocity(2.0, y + s, schedule) - fast.velocity(2.0, y - s, schedule)) / 2e-6
            for s in steps
        ]
        np.testing.assert_allclose(jacobian(2.0, y), np.stack(columns, axis=1), rtol=1e-6)


def test_the_numpy_view_of_the_parameters_is_the_general_one():
    w0, state = HADAMARD.start(0), np.random.default_rng(0).standard_normal(8)
    fast, general = (V(LINEAR, H, DECAY, w0) for V in (ArrayParameterView, ParameterView))
    velocities = [v.velocity(0.0, state, mf.Constant(0.3)) for v in (fast, general)]
    np.testing.assert_allclose(*velocities, rtol=1e-12, atol=1e-13)


@each_view
def test_single_precision_is_kept_and_its_limit_is_named(view):
    w0 = tuple(f.float() for f in HADAMARD.start(0))
    single = mf.LeastSquares(LINEAR.Z.float(), LINEAR.y.float())
    with pytest.raises(ValueError, match=r"torch.float32 resolves"):
        hadamard(NONE, 1.0, loss=single, w0=w0, view=view)
    sol = hadamard(NONE, 1.0, loss=single, w0=w0, view=view, rtol=2e-5)
    assert sol.value.dtype == sol.path.x.dtype == sol.path.mu.dtype == torch.float32
    assert difference(sol.value, hadamard(NONE, 1.0).value) < 1e-3


@each_view
def test_the_start_is_left_alone_and_nothing_is_taped(view):
    w0 = tuple(f.requires_grad_() for f in HADAMARD.start(0))
    before = [f.detach().clone() for f in w0]
    sol = hadamard(SCHEDULES["constant"], 1.0, w0=w0, view=view)
    assert not sol.value.requires_grad and not sol.path.mu.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, w0, strict=True))


# Failure is a status.


@each_method
def test_infinity_in_finite_time_is_a_status(method):
    """dx = x^2 dt from 1 is 1/(1 - t): the path goes up to t = 1."""
    with pytest.warns(RuntimeWarning, match="infinite or NaN"):
        sol = mf.flow(
            lambda x: -(x**3).sum() / 3, mf.Identity(), DECAY, vector(1.0), NONE, 5.0, method=method
        )
    assert sol.status is mf.Status.diverged
    assert abs(sol.stats.t - 1) < 1e-6 and sol.path.t[-1] == sol.stats.t
    assert difference(sol.value / sol.path.x[-1], 1.0) < 1e-12 and sol.value > 1e5
    early = sol.path.t < 0.9
    exact = 1 / (1 - sol.path.t[early])
    assert difference(sol.path.x[early, 0] / exact, 1.0) < 1e-6
    assert torch.isfinite(sol.path.x).all() and torch.isfinite(sol.path.mu).all()


@each_method
@pytest.mark.sample(1)
def test_overflow_is_a_status(method):
    """With alpha = -5 and no loss w = e^{5t} overflows at t = 142."""
    with pytest.warns(RuntimeWarning, match="infinite or NaN"):
        sol = hadamard(mf.Constant(-5.0), 400.0, loss=lambda x: 0 * x.sum(), method=method)
    assert sol.status is mf.Status.diverged
    assert 60 < sol.stats.t < 143 and torch.isfinite(sol.value).all()


@each_view
def test_a_loss_that_is_nan_is_a_status(view):
    with pytest.warns(RuntimeWarning, match="infinite or NaN"):
        sol = hadamard(NONE, 1.0, loss=lambda x: x.sum() * float("nan"), view=view)
    assert sol.status is mf.Status.diverged and sol.path.t.tolist() == [0.0]
    assert difference(sol.value, H(HADAMARD.start(0))) < 1e-13


@each_view
def test_a_loss_that_becomes_nan_keeps_what_came_before(view):
    """log x for falling x: dx = -(m^2 + w^2)/x; the flow exists until x = 0."""
    w0 = (vector(0.3), vector(1.0))
    with pytest.warns(RuntimeWarning):
        sol = hadamard(NONE, 1.0, loss=lambda x: torch.log(x).sum(), w0=w0, view=view)
    assert sol.status is mf.Status.diverged
    assert torch.isfinite(sol.path.x).all() and 0 <= sol.value < 1e-3
    assert 0.01 < sol.stats.t < 0.1


@each_method
@pytest.mark.sample(1)
def test_leaving_the_domain_is_a_status(method):
    """log u - log v without a loss: u^2 = u0^2 + 2a reaches 0 at t = u0^2/(2 alpha)."""
    w0 = (vector(1.0, 1.5), vector(1.2, 1.5))
    with pytest.warns(RuntimeWarning, match="left the domain"):
        sol = mf.flow(
            lambda x: 0 * x.sum(), mf.LogRatio(), mf.Separable(), w0, mf.Constant(0.25), 9.0,
            view="mirror", method=method,
        )  # fmt: skip
    assert sol.status is mf.Status.left_domain
    assert sol.stats.t == pytest.approx(2.0, abs=1e-6) and sol.stats.t <= 2.0
    assert torch.isfinite(sol.path.x).all()


@each_method
def test_a_trial_step_out_of_the_domain_is_not_a_failure(method, monkeypatch):
    """x = u^4 - v^4 has a bounded range of mu; coarse steps go beyond it and are tried again."""
    case, attempts, attempt = pair("power-2"), [], Integration._attempt

    def watched(self, *arguments):
        attempts.append(attempt(self, *arguments))
        return attempts[-1]

    monkeypatch.setattr(Integration, "_attempt", watched)
    sol = mf.flow(
        lambda x: 20 * ((x - 3) ** 2).sum(), case.g, case.h, case.start(0), NONE, 0.1,
        view="mirror", method=method, rtol=0.1, atol=0.3,
    )  # fmt: skip
    assert mf.Status.left_domain in attempts
    assert sol.status.ok and difference(sol.value, 3.0) < 0.5


@pytest.mark.parametrize("save_at", (None, [1.0, 9.0]))
def test_the_step_limit_is_a_status(save_at):
    with pytest.warns(RuntimeWarning, match="step limit"):
        sol = hadamard(NONE, 9.0, max_steps=20, save_at=save_at)
    assert sol.status is mf.Status.max_steps and sol.stats.steps == 20
    assert 0 < sol.stats.t < 9 and sol.path.t[-1] == sol.stats.t
    _, (x,), _, _ = truth(NONE, (sol.stats.t,))
    assert difference(sol.value, x) < 1e-6


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"view": "dual"}, ValueError, "view must be one of"),
        ({"method": "RK45"}, ValueError, "method must be"),
        ({"t_end": 0.0}, ValueError, "t_end must be positive"),
        ({"t_end": float("inf")}, ValueError, "t_end must be positive"),
        ({"rtol": 0.0}, ValueError, "rtol must be in"),
        ({"rtol": 1e-15}, ValueError, "rtol must be in"),
        ({"atol": -1.0}, ValueError, "atol must be finite and >= 1e-140"),
        ({"atol": 1e-200}, ValueError, "atol must be finite and >= 1e-140"),
        ({"g": torch.sin}, TypeError, "flow: g and h must be a Reparam .*, got builtin_func"),
        ({"h": mf.WeightDecay}, TypeError, "got Hadamard and the class WeightDecay"),
        ({"loss": lambda x: x}, TypeError, r"a tensor of one number, got \(3,\)"),
        ({"loss": lambda x: x.sum().item()}, TypeError, "a tensor of one number, got float"),
        ({"loss": lambda x: x.detach().sum()}, ValueError, r"write 0 \* x.sum\(\)"),
        ({"max_steps": 0}, ValueError, "max_steps must be >= 1"),
        ({"save_at": []}, ValueError, "save_at must be ascending"),
        ({"save_at": [0.5, 0.2]}, ValueError, "save_at must be ascending"),
        ({"save_at": [0.5, 2.0]}, ValueError, r"in \[0, 1.0\]"),
        ({"save_at": [float("nan")]}, ValueError, "save_at must be ascending"),
        ({"schedule": 0.1}, TypeError, "schedule must be a Schedule"),
        ({"w0": (torch.ones(3), torch.ones(2))}, ValueError, "one shape"),
        ({"w0": (torch.ones(4).double(),) * 2}, ValueError, r"Z must be \(n, 4\)"),
        ({"w0": (torch.ones(3),) * 2, "rtol": 1e-4}, TypeError, "one dtype"),
        ({"h": mf.Separable()}, TypeError, "Use WeightDecay"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {
        "loss": LINEAR, "g": H, "h": DECAY, "w0": HADAMARD.start(0), "schedule": NONE, "t_end": 1.0,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        mf.flow(**{**good, **change})


def test_measurements_are_tensors():
    with pytest.raises(TypeError, match="LeastSquares: y must be a tensor"):
        mf.LeastSquares(LINEAR.Z, LINEAR.y.numpy())
