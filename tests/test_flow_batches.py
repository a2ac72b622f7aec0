"""Several problems in one call of `flow` or `descend`: right-hand sides, starts, or both."""

import numpy as np
import pytest
import torch

import mirrorflow as mf
from cases import EVERY, SCHEDULES, loss
from mirrorflow.descent import predicted_account
from mirrorflow.flow import _views

VIEWS = ("parameters", "mirror", "primal")
H, DECAY = mf.Hadamard(), mf.WeightDecay()
ELEMENTWISE = [
    c for c in EVERY if c.g.elementwise and c.h.elementwise and (c.commutes or c.degree is not None)
]


def difference(one, two):
    return float((one - two).detach().abs().max())


def parts(w):
    return (w,) if isinstance(w, torch.Tensor) else w


def stacked(starts):
    """Return the starts as rows of one."""
    rows = tuple(torch.stack(part) for part in zip(*map(parts, starts), strict=True))
    return rows[0] if isinstance(starts[0], torch.Tensor) else rows


def repeated(w0, m):
    return tuple(f.expand(m, -1) for f in w0)


def sparse(n=6, d=12, m=4, seed=0):
    """Return Z with equal singular values, so that all converge alike, Y, and one start."""
    rng = np.random.default_rng(seed)
    Z = torch.from_numpy(np.linalg.qr(rng.standard_normal((d, n)))[0].T * np.sqrt(d)).contiguous()
    X = torch.zeros(m, d, dtype=torch.float64)
    for i, row in enumerate(X):
        row[rng.choice(d, 2, replace=False)] = torch.tensor([1.0, -0.5 * (i + 1)]).double()
    w0 = tuple(torch.from_numpy(rng.uniform(low, 0.8, d)) for low in (-0.3, 0.5))
    return Z, Z @ X.T, w0


def in_every_view():
    """Return the cases with each view; R_a by integration is slow."""
    return [
        pytest.param(c, v, id=f"{c}-{v}", marks=[pytest.mark.slow] * (c.slow and v != "parameters"))
        for c in ELEMENTWISE
        for v in VIEWS
    ]


@pytest.mark.parametrize(("case", "view"), in_every_view())
@pytest.mark.sample(24)
def test_a_batch_is_its_problems_one_by_one(case, view):
    """Rows with their own start and right-hand side, in every view, with every kind of R_a."""
    one = loss(case, "least-squares").torch
    Y = torch.stack([-0.5 * one.y, one.y, 0.3 * one.y.flip(0)], dim=1)
    starts = [case.start(seed) for seed in range(3)]
    setting = {
        "g": case.g, "h": case.h, "schedule": SCHEDULES["linear"], "t_end": 0.2,
        "view": view, "save_at": [0.1, 0.2], "rtol": 1e-6, "method": "DOP853",
    }  # fmt: skip
    batch = mf.flow(mf.LeastSquares(one.Z, Y), w0=stacked(starts), **setting)
    assert batch.status is mf.Status.completed and batch.value.shape == (3, one.Z.shape[1])
    assert batch.path.x.shape == batch.path.mu.shape == (2, 3, one.Z.shape[1])
    for i in range(3) if view == "parameters" and not case.slow else [1]:
        single = mf.flow(mf.LeastSquares(one.Z, Y[:, i]), w0=starts[i], **setting)
        assert difference(batch.value[i], single.value) < 1e-5
        assert difference(batch.path.x[:, i], single.path.x) < 1e-5
        assert difference(batch.path.mu[:, i], single.path.mu) < 1e-5
        assert (batch.path.w is None) == (single.path.w is None)
        if single.path.w is not None:
            pairs = zip(parts(batch.path.w), parts(single.path.w), strict=True)
            assert all(difference(of_batch[:, i], alone) < 1e-5 for of_batch, alone in pairs)


def test_weights_are_carried_where_r_has_no_closed_form():
    g = mf.CustomReparam(lambda w: w[0] * w[1], elementwise=True)
    Z, Y, w0 = sparse(n=1, d=2, m=2)
    args = (DECAY, repeated(w0, 2), SCHEDULES["linear"], 1.0, "mirror")
    carried, known = (mf.flow(mf.LeastSquares(Z, Y), pair, *args) for pair in (g, H))
    assert carried.path.w[0].shape[1:] == (2, 2) and known.path.w is None
    assert difference(carried.value, known.value) < 1e-6
    assert difference(carried.path.mu[-1], known.path.mu[-1]) < 1e-6


def test_right_hand_sides_end_where_limit_says():
    Z, Y, w0 = sparse()
    schedule = mf.SwitchOff(0.2, 5.0)
    start = repeated(w0, 4)
    flow = mf.flow(mf.LeastSquares(Z, Y), H, DECAY, start, schedule, 200.0, view="mirror")
    ends = mf.limit(mf.legendre(H, DECAY, w0), Z, Y, float(flow.path.a[-1]))
    assert flow.value.shape == ends.value.shape == (4, 12)
    assert difference(flow.value, ends.value) < 1e-6


def test_starts_end_where_limit_says():
    Z, Y, (m0, w0) = sparse()
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None]
    starts, Y = (scales * m0, scales * w0), Y[:, :1].expand(-1, 3)
    flow = mf.flow(mf.LeastSquares(Z, Y), H, DECAY, starts, mf.Constant(0.0), 300.0, view="mirror")
    R = mf.legendre(H, DECAY, (m0, w0))
    # With weight decay, a is the logarithm of the scale of the start.
    ends = mf.limit(R, Z, Y[:, 0], scales[:, 0].log(), per_coordinate=False)
    assert difference(flow.value, ends.value) < 1e-6


@pytest.mark.parametrize("view", ["parameters", "mirror"])
@pytest.mark.parametrize("method", ["LSODA", "DOP853"])
def test_problems_at_rest_do_not_loosen_the_tolerance_of_the_others(view, method):
    """A mean square over all entries would let the one that moves take 20 times the error."""
    Z, Y, w0 = sparse(n=3, d=5)
    w0 = (torch.zeros_like(w0[0]), w0[1])  # x = 0 solves y = 0
    rest = torch.zeros(3, 399, dtype=torch.float64)
    setting = {"schedule": SCHEDULES["cosine"], "t_end": 5.0, "view": view, "method": method}
    one = mf.flow(mf.LeastSquares(Z, Y[:, 0]), H, DECAY, w0, rtol=1e-6, **setting)
    loss = mf.LeastSquares(Z, torch.cat([Y[:, :1], rest], dim=1))
    batch = mf.flow(loss, H, DECAY, repeated(w0, 400), rtol=1e-6, **setting)
    assert difference(batch.value[0], one.value) < 1e-9
    assert not batch.value[1:].any()


def test_the_method_is_that_of_one_problem():
    Z, Y, w0 = sparse(n=30, d=60, m=5)
    for view, method in (("mirror", "LSODA"), ("parameters", "DOP853")):
        loss = mf.LeastSquares(Z, Y)
        sol = mf.flow(loss, H, DECAY, repeated(w0, 5), mf.Constant(0.1), 0.1, view=view)
        assert sol.stats.method == method


def test_lsoda_differentiates_itself_where_it_cannot_read_bands(monkeypatch):
    Z, Y, w0 = sparse()
    args = (mf.LeastSquares(Z, Y), H, DECAY, repeated(w0, 4), SCHEDULES["cosine"], 20.0, "mirror")
    ends = []
    for reads in (True, False):
        monkeypatch.setattr(_views, "READS_BANDS", reads)
        ends.append(mf.flow(*args, method="LSODA").value)
    assert difference(*ends) < 1e-6


def test_the_bands_hold_the_derivative():
    Z, Y, w0 = sparse(n=3, m=2)
    view = _views.make("mirror", mf.LeastSquares(Z, Y), H, DECAY, repeated(w0, 2))
    y, schedule = np.linspace(-0.3, 0.4, 6), mf.Constant(0.1)
    bands = _views._bands(view.view.jacobian(schedule)(0.5, y))
    for j in range(6):
        step = 1e-6 * np.eye(6)[j]
        ends = (view.velocity(0.5, y + s * step, schedule) for s in (1, -1))
        column = np.subtract(*ends) / 2e-6
        for i in range(6):
            held = bands[2 + i - j, j] if abs(i - j) <= 2 else 0.0
            assert abs(held - column[i]) < 1e-7


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("method", ["LSODA", "DOP853"])
@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 1)])
def test_one_row_or_one_column(view, method, n, m):
    Z, Y, w0 = sparse(n, 4, m)
    setting = {"schedule": mf.Constant(0.1), "t_end": 0.5, "view": view, "method": method}
    batch = mf.flow(mf.LeastSquares(Z, Y), H, DECAY, repeated(w0, m), **setting)
    for i in range(m):
        single = mf.flow(mf.LeastSquares(Z, Y[:, i]), H, DECAY, w0, **setting)
        assert difference(batch.value[i], single.value) < 1e-6


def test_the_dtype_is_that_of_the_start():
    Z, Y, w0 = sparse()
    loss, start = mf.LeastSquares(Z.float(), Y.float()), tuple(f.float() for f in repeated(w0, 4))
    exact = mf.flow(mf.LeastSquares(Z, Y), H, DECAY, repeated(w0, 4), mf.Constant(0.1), 3.0)
    for view in VIEWS:
        sol = mf.flow(loss, H, DECAY, start, mf.Constant(0.1), 3.0, view=view, rtol=1e-4)
        assert sol.value.dtype == sol.path.mu.dtype == torch.float32
        assert difference(sol.value, exact.value) < 1e-3


def test_one_problem_that_leaves_the_domain_ends_the_flow():
    Z, y = torch.eye(1, dtype=torch.float64), torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    w0 = tuple(torch.full((2, 1), v, dtype=torch.float64) for v in (1.5, 1.2))
    pair = mf.LogRatio(), mf.Separable()
    with pytest.warns(RuntimeWarning, match="flow"):
        sol = mf.flow(mf.LeastSquares(Z, y), *pair, w0, mf.Constant(1.0), 10.0, view="mirror")
    assert not sol.status.ok and 0 < sol.stats.t < 10 and sol.value.shape == (2, 1)
    assert torch.isfinite(sol.value).all()


# The account, predicted and trained.


def test_the_predicted_account_is_that_of_each_problem():
    Z, Y, w0 = sparse()
    batch = mf.LeastSquares(Z, Y)
    setting = {"schedule": mf.SwitchOff(0.05, 5.0), "t_end": 20.0, "lr": 0.02, "rtol": 1e-9}
    flow = mf.flow(batch, H, DECAY, repeated(w0, 4), **setting)
    noisy = predicted_account(flow, batch, 0.02, batch=2, label_noise=0.1)
    assert flow.path.account.a.shape == flow.path.x.shape == noisy.noise.shape
    for i in range(4):
        loss = mf.LeastSquares(Z, Y[:, i])
        single = mf.flow(loss, H, DECAY, w0, **setting)
        alone = predicted_account(single, loss, 0.02, batch=2, label_noise=0.1)
        assert difference(flow.path.account.a[-1, i], single.path.account.a[-1]) < 1e-6
        assert difference(noisy.a[-1, i], alone.a[-1]) < 1e-4  # integrated between their own steps


def test_descend_takes_the_same_steps_as_with_each_problem():
    Z, Y, w0 = sparse()
    args = (mf.SwitchOff(0.1, 1.0), 0.02, 150)
    options = {"batch": 2, "momentum": 0.5, "seed": 3}
    batch = mf.descend(mf.LeastSquares(Z, Y), H, DECAY, repeated(w0, 4), *args, **options)
    for i in range(4):
        single = mf.descend(mf.LeastSquares(Z, Y[:, i]), H, DECAY, w0, *args, **options)
        assert difference(batch.path.x[:, i], single.path.x) < 1e-12
        for name in ("a", "mu", "decay", "step", "noise"):
            of_batch, alone = (getattr(p.account, name) for p in (batch.path, single.path))
            assert difference(of_batch[:, i], alone) < 1e-12


def test_the_account_of_a_batch_is_exact_with_noise_of_its_own_on_each_label():
    Z, Y, w0 = sparse(m=1)
    loss, start = mf.LeastSquares(Z, Y.expand(-1, 3)), repeated(w0, 3)
    sol = mf.descend(loss, H, DECAY, start, mf.Constant(0.05), 0.02, 100, label_noise=0.2)
    assert difference(sol.value[0], sol.value[1]) > 1e-4
    account, tilt = sol.path.account, sol.path.account.tilt(Z)
    assert (
        difference(mf.legendre(H, DECAY, start).primal(account.mu[-1], account.a[-1]), sol.value)
        < 1e-10
    )
    R = mf.legendre(H, DECAY, w0)
    for i in range(3):
        folded = R.folded(account.a[-1, i], tilt[i])
        assert difference(mf.limit(folded, Z, Z @ sol.value[i], 0.0).value, sol.value[i]) < 1e-10


# What is refused.


@pytest.mark.parametrize(
    ("Z", "y", "message"),
    [
        ((3, 2, 2), (3, 4), "y must be \\(n,\\) for matrices x"),
        ((3, 2), (4, 3), "or \\(n, m\\) with Z \\(n, d\\), got Z \\(3, 2\\) and y \\(4, 3\\)"),
        ((3, 2), (3, 0), "Z must be \\(n, d\\)"),
        ((3, 2), (3, 1, 1), "Z must be \\(n, d\\)"),
    ],
)
def test_bad_columns_are_refused(Z, y, message):
    with pytest.raises(ValueError, match=message):
        mf.LeastSquares(torch.ones(Z), torch.ones(y))


SHARED = mf.CustomReparam(lambda w: w[0] * w[1].mean(0))
COUPLED = mf.CustomRegularizer(lambda w: (w[0] * w[1]).sum() ** 2)


@pytest.mark.parametrize(
    ("g", "h", "w0", "message"),
    [
        (H, DECAY, [(4,), (4,)], "g\\(w0\\) must be \\(3, 4\\), a row for each column of y"),
        (H, DECAY, [(2, 4), (2, 4)], "Repeat one start by w0.expand\\(3, -1\\)"),
        (SHARED, DECAY, [(3, 4), (3, 4)], "not marked elementwise.*Call once for each column"),
        (H, COUPLED, [(3, 4), (3, 4)], "g and h must be elementwise .* got CustomRegularizer"),
        (mf.SymmetricFactor(), DECAY, [(4, 4)], "must be elementwise .* got SymmetricFactor"),
        (mf.Product(), DECAY, [(3, 2), (2, 4)], "must be elementwise .* got Product"),
    ],
)
def test_problems_that_share_parameters_are_refused(g, h, w0, message):
    w0 = tuple(torch.ones(shape).double() for shape in w0)
    loss = mf.LeastSquares(torch.ones(2, 4).double(), torch.ones(2, 3).double())
    with pytest.raises(ValueError, match=message):
        mf.flow(loss, g, h, w0 if len(w0) > 1 else w0[0], mf.Constant(0.1), 1.0)
    with pytest.raises(ValueError, match=message):
        mf.descend(loss, g, h, w0 if len(w0) > 1 else w0[0], mf.Constant(0.1), 0.1, 1)


def test_a_loss_reads_each_column():
    Z, Y, _ = sparse()
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(4, 12).requires_grad_()
    loss = mf.LeastSquares(Z, Y)
    value = loss(x)
    (slope,) = torch.autograd.grad(value, x)
    alone = [mf.LeastSquares(Z, Y[:, i])(x[i]) for i in range(4)]
    assert difference(value, sum(alone)) < 1e-12
    assert difference(loss.gradient(x), slope) < 1e-12
    assert loss.predict(x).shape == Y.shape
