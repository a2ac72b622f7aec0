"""The account of a run, against literal loops in m and w, and against the maps of R_a."""

import numpy as np
import pytest
import torch

import mirrorflow as mf
from cases import EVERY, loss
from mirrorflow.descent import Account, DescentStats

H, DECAY = mf.Hadamard(), mf.WeightDecay()
OFF, SWITCHED = mf.Constant(0.0), mf.Piecewise((0.5, 1.2), (0.3, 0.8, 0.0))


def start(seed, d):
    """Return m0, w0 of either sign, with |m0| > |w0| in some coordinates."""
    rng = np.random.default_rng(seed)
    big, small = rng.choice([-1, 1], d) * rng.uniform(0.6, 1.1, d), rng.uniform(-0.5, 0.5, d)
    swap = rng.integers(0, 2, d).astype(bool)
    return np.where(swap, big, small), np.where(swap, small, big)


def linear(seed, n, d):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal(n)


def tensors(*arrays):
    return tuple(torch.from_numpy(np.array(v)) for v in arrays)


class Draws:
    """Minibatches and signs, from the two streams that `descend` documents."""

    def __init__(self, seed, n, batch, delta):
        self.rows, self.signs = np.random.default_rng(seed).spawn(2)
        self.n, self.batch, self.delta, self.epoch = n, batch or n, delta, []

    def __call__(self):
        if self.batch == self.n:
            at = np.arange(self.n)
        else:
            if not self.epoch:
                order = self.rows.permutation(self.n)
                self.epoch = [order[i : i + self.batch] for i in range(0, self.n, self.batch)]
            at = self.epoch.pop(0)
        noise = self.delta * (2 * self.signs.integers(0, 2, len(at)) - 1) if self.delta else 0.0
        return at, noise


def loop(Z, y, m, w, rate, lr, steps, beta, draw):
    """Heavy-ball steps on m and w as written; gives m, w and the two gradients of every step."""
    ms, ws, seen, whole, bm, bw = [m], [w], [], [], 0.0, 0.0
    for k in range(steps):
        at, noise = draw()
        G = Z[at].T @ (Z[at] @ (m * w) - y[at] - noise) / len(at)
        seen.append(G)
        whole.append(Z.T @ (Z @ (m * w) - y) / len(y))
        bm, bw = beta * bm + w * G + rate(k * lr) * m, beta * bw + m * G + rate(k * lr) * w
        m, w = m - lr * bm, w - lr * bw
        ms.append(m)
        ws.append(w)
    return np.array(ms), np.array(ws), seen, whole


def logs(m, w):
    """Return a and mu from the factors: half of log|uv/u0v0| and of log|u v0/v u0|."""
    u, v = np.log(np.abs(m + w)), np.log(np.abs(m - w))
    u, v = u - u[0], v - v[0]
    return (u + v) / 2, (u - v) / 2


def replay(gradients, rate, lr, beta):
    """Return a of the factors u and v alone, moved by given gradients."""
    u, v = np.ones_like(gradients[0]), np.ones_like(gradients[0])
    bu, bv, rows = 0 * u, 0 * v, [0 * u]
    for k, G in enumerate(gradients):
        bu, bv = beta * bu + (rate(k * lr) + G) * u, beta * bv + (rate(k * lr) - G) * v
        u, v = u - lr * bu, v - lr * bv
        rows.append(np.log(np.abs(u * v)) / 2)
    return np.array(rows)


CASES = [
    (seed, batch, delta, beta, schedule)
    for seed, (batch, delta, beta, schedule) in enumerate(
        (batch, delta, beta, schedule)
        for batch in (None, 1, 3)
        for delta in (0.0, 0.5)
        for beta in (0.0, 0.9)
        for schedule in (OFF, SWITCHED)
    )
]


@pytest.mark.parametrize(("seed", "batch", "delta", "beta", "schedule"), CASES)
def test_the_account_is_exact_at_any_batch_noise_momentum_and_decay(
    seed, batch, delta, beta, schedule
):
    """331 steps: past the chunks in which logarithms are taken, with saves inside of them."""
    n, d, lr, steps = 7, 12, 0.02 * (1 - beta), 331
    (Z, y), (m, w) = linear(seed, n, d), start(seed, d)
    sol = mf.descend(
        mf.LeastSquares(*tensors(Z, y)), H, DECAY, tensors(m, w), schedule, lr, steps,
        momentum=beta, save_every=7, batch=batch, label_noise=delta, seed=seed,
    )  # fmt: skip
    draw = Draws(seed, n, batch, delta)
    ms, ws, seen, whole = loop(Z, y, m, w, schedule.rate, lr, steps, beta, draw)
    at, account = [*range(0, steps, 7), steps], sol.path.account
    np.testing.assert_allclose(sol.path.x, (ms * ws)[at], rtol=1e-9, atol=1e-12)
    a, mu = logs(ms, ws)
    np.testing.assert_allclose(account.a, a[at], atol=1e-10)
    np.testing.assert_allclose(account.mu, mu[at], atol=1e-10)
    assert sol.path.mu is account.mu and np.abs(a).max() > 1e-3
    # The closed form of x, with nothing but the start and the account.
    A, rho = np.abs(m * m - w * w) / 2, np.log(np.abs((m + w) / (m - w)))
    x = A * np.exp(2 * account.a.numpy()) * np.sinh(2 * account.mu.numpy() + rho)
    np.testing.assert_allclose(sol.path.x, x, rtol=1e-10, atol=1e-12)
    # The shares, from the same recursions with other gradients.
    alone = replay([0 * G for G in seen], schedule.rate, lr, beta)[at]
    full = replay(whole, schedule.rate, lr, beta)[at]
    np.testing.assert_allclose(account.decay, alone, atol=1e-12)
    np.testing.assert_allclose(account.step, full - alone, atol=1e-10)
    np.testing.assert_allclose(account.noise, a[at] - full, atol=1e-10)
    if batch is None and not delta:
        assert not account.noise.any()
    if beta == 0:
        rates = np.array([schedule.rate(k * lr) for k in range(steps)])
        literal = [np.log(1 - lr * rates[:k]).sum() for k in at]
        np.testing.assert_allclose(account.decay[:, 0], literal, atol=1e-12)


ACCOUNTED = ("hadamard", "hadamard-balanced", "depth-2", "power-1", "power-1-decay", "power-1-zero")


@pytest.mark.parametrize("momentum", (0.0, 0.8))
@pytest.mark.parametrize("name", ("least-squares", "logistic", "quartic"))
@pytest.mark.parametrize("id", ACCOUNTED)
def test_the_maps_of_the_entropy_hold_exactly_for_every_loss(id, name, momentum):
    case = next(c for c in EVERY if c.id == id)
    for seed in range(3):
        w0 = case.start(seed)
        sol = mf.descend(
            loss(case, name).torch, case.g, case.h, w0, SWITCHED, 0.1, 40, momentum=momentum
        )
        R, account = mf.legendre(case.g, case.h, w0), sol.path.account
        torch.testing.assert_close(
            R.primal(account.mu, account.a), sol.path.x, rtol=1e-11, atol=1e-13
        )
        assert (account.step[-1] != 0).all() and (account.decay[-1] < -0.3).all()
        assert sol.stats.unaccounted is None


def test_the_account_holds_where_factors_change_their_sign():
    """A constant gradient c with lr c > 1 turns u over at each step, and v not."""
    c, (m, w) = np.array([1.5, -1.8, 2.7]), start(0, 3)
    slope = torch.from_numpy(c)
    sol = mf.descend(
        lambda x: (slope * x).sum(), H, DECAY, tensors(m, w), mf.Constant(0.05), 1.0, 5,
        save_every=1,
    )  # fmt: skip
    u, v = [m + w], [m - w]
    for _ in range(5):
        u.append((0.95 - c) * u[-1])
        v.append((0.95 + c) * v[-1])
    u, v = np.array(u), np.array(v)
    assert (np.diff(np.sign(u), axis=0)[:, c > 0] != 0).all()
    account = sol.path.account
    np.testing.assert_allclose(account.a, np.log(np.abs(u * v / (u * v)[0])) / 2, rtol=1e-12)
    A, rho = np.abs(u * v)[0] / 2, np.log(np.abs(u / v))[0]
    x = A * np.exp(2 * account.a.numpy()) * np.sinh(2 * account.mu.numpy() + rho)
    np.testing.assert_allclose(sol.path.x, x, rtol=1e-12)
    np.testing.assert_allclose(sol.path.x, (u**2 - v**2) / 4, rtol=1e-12)


def test_a_factor_of_exactly_zero_leaves_nothing_to_account_for():
    sol = mf.descend(
        lambda x: 0 * x.sum(), H, DECAY, tensors(*start(0, 3)), mf.Constant(2.0), 0.5, 3,
        save_every=1,
    )  # fmt: skip
    assert not sol.value.any()
    assert (sol.path.account.a[1:] == -np.inf).all() and sol.path.account.mu[1:].isnan().all()
    assert not sol.path.account.a[0].any()


def test_the_split_may_be_sampled_and_the_rest_stays_exact():
    Z, y = linear(3, 8, 12)
    args = mf.LeastSquares(*tensors(Z, y)), H, DECAY, tensors(*start(3, 12)), SWITCHED, 0.005, 800
    every, held = (mf.descend(*args, batch=2, split_every=k).path.account for k in (1, 4))
    torch.testing.assert_close(every.a, held.a, rtol=0, atol=0)
    torch.testing.assert_close(every.decay, held.decay, rtol=0, atol=0)
    assert (every.step - held.step).abs().max() > 0
    torch.testing.assert_close(held.step[-1], every.step[-1], rtol=0.1, atol=1e-5)
    torch.testing.assert_close(held.decay + held.step + held.noise, held.a, rtol=0, atol=1e-14)


def test_label_noise_may_follow_a_schedule():
    """Until the switch, the steps are those with noise; from then on those without it."""
    Z, y = linear(4, 5, 9)
    f, w0, lr = mf.LeastSquares(*tensors(Z, y)), tensors(*start(4, 9)), 0.02
    noisy = mf.descend(f, H, DECAY, w0, OFF, lr, 30, label_noise=0.4, seed=1, save_every=1)
    both = mf.descend(
        f, H, DECAY, w0, OFF, lr, 60, label_noise=mf.SwitchOff(0.4, 30 * lr), seed=1, save_every=1
    )
    after = mf.descend(f, H, DECAY, tuple(p[-1] for p in noisy.path.w), OFF, lr, 30, save_every=1)
    torch.testing.assert_close(both.path.x, torch.cat([noisy.path.x, after.path.x[1:]]))
    torch.testing.assert_close(
        both.path.account.a[-1], noisy.path.account.a[-1] + after.path.account.a[-1]
    )
    torch.testing.assert_close(
        both.path.account.noise[30:], noisy.path.account.noise[-1:].expand(31, 9)
    )


def test_an_epoch_takes_each_row_once():
    """With steps that hardly move x, an epoch of minibatches is one step with the mean of them."""
    Z, y = linear(5, 7, 9)
    f, (m, w), lr = mf.LeastSquares(*tensors(Z, y)), start(5, 9), 1e-7
    sol = mf.descend(f, H, DECAY, tensors(m, w), OFF, lr, 8, batch=2, save_every=4)
    residual, seen = Z @ (m * w) - y, []
    for first, second in ((0, 1), (1, 2)):
        moved = -(sol.path.mu[second] - sol.path.mu[first]).numpy() / lr
        weights = np.linalg.lstsq(Z.T * residual, moved, rcond=None)[0]
        sizes = np.round(1 / weights).astype(int)
        assert sorted(sizes) == [1, 2, 2, 2, 2, 2, 2]  # the last batch is one row
        seen.append(int(sizes.argmin()))
    assert seen[0] != seen[1]  # each epoch has a permutation of its own


def test_runs_differ_by_their_seed_only():
    Z, y = linear(6, 7, 9)
    args = mf.LeastSquares(*tensors(Z, y)), H, DECAY, tensors(*start(6, 9)), OFF, 0.01, 50
    one, same, other = (
        mf.descend(*args, batch=2, label_noise=0.1, seed=s).value for s in (0, 0, 1)
    )
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert (one - other).abs().max() > 1e-4


def test_single_precision_is_accounted_for_to_its_rounding():
    Z, y = linear(7, 5, 9)
    m, w = start(7, 9)
    sol = mf.descend(
        mf.LeastSquares(*(v.float() for v in tensors(Z, y))), H, DECAY,
        tuple(v.float() for v in tensors(m, w)), SWITCHED, 0.02, 200, batch=2,
    )  # fmt: skip
    account = sol.path.account
    R = mf.legendre(H, DECAY, tensors(m, w))
    assert account.a.dtype == torch.float64 and sol.value.dtype == torch.float32
    torch.testing.assert_close(
        R.primal(account.mu, account.a), sol.path.x.double(), rtol=1e-4, atol=1e-5
    )


# U U^T.


def commuting(seed, n=4, count=3):
    """Return matrices with shared eigenvectors V, targets, and U0 with U0 U0^T = V S V^T."""
    rng = np.random.default_rng(seed)
    V, _ = np.linalg.qr(rng.standard_normal((n, n)))
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    Z = np.stack([V @ np.diag(rng.uniform(-1, 1, n)) @ V.T for _ in range(count)])
    skew = rng.standard_normal((count, n, n))
    y = np.einsum("kij,ij->k", Z, V @ np.diag(rng.uniform(0.2, 1.5, n)) @ V.T)
    return Z + skew - skew.transpose(0, 2, 1), y, V @ np.diag(rng.uniform(0.3, 0.9, n)) @ V.T @ Q


@pytest.mark.parametrize("momentum", (0.0, 0.8))
@pytest.mark.parametrize(("batch", "delta"), ((None, 0.0), (1, 0.0), (2, 0.3)))
def test_the_account_of_a_commuting_product_is_its_product_form(batch, delta, momentum):
    Z, y, U0 = commuting(0)
    lr, steps = 0.05 * (1 - momentum), 150
    sol = mf.descend(
        mf.LeastSquares(*tensors(Z, y)), mf.SymmetricFactor(), DECAY, *tensors(U0), SWITCHED, lr,
        steps, momentum=momentum, batch=batch, label_noise=delta, save_every=10,
    )  # fmt: skip
    account, X0 = sol.path.account, U0 @ U0.T
    V = account.basis.numpy()
    size = np.diag(V.T @ X0 @ V) * np.exp(2 * (account.a + account.mu).numpy())
    np.testing.assert_allclose(sol.path.x, (V * size[:, None, :]) @ V.T, rtol=1e-10, atol=1e-12)
    # The same from a loop over matrices that multiply U0, with the documented draws.
    P, B, draw = np.eye(4), np.zeros((4, 4)), Draws(0, 3, batch, delta)
    even = np.eye(4)  # of the factors with the gradient turned around
    other = np.zeros((4, 4))
    for k in range(steps):
        at, noise = draw()
        X = P @ X0 @ P
        r = np.einsum("kij,ij->k", Z[at], X) - y[at] - noise
        G = np.einsum("k,kij->ij", r, Z[at]) / len(at)
        S, decay = (G + G.T) / 2, SWITCHED.rate(k * lr) * np.eye(4)
        B, other = momentum * B + (decay + S) @ P, momentum * other + (decay - S) @ even
        P, even = P - lr * B, even - lr * other
    np.testing.assert_allclose(sol.value, P @ X0 @ P, rtol=1e-10, atol=1e-12)
    up, down = (np.log(np.abs(np.diag(V.T @ M @ V))) for M in (P, even))
    np.testing.assert_allclose(account.a[-1], (up + down) / 2, atol=1e-10)
    np.testing.assert_allclose(account.mu[-1], (up - down) / 2, atol=1e-10)
    total = account.decay + account.step + account.noise
    torch.testing.assert_close(total, account.a, rtol=0, atol=1e-13)


def test_the_account_of_a_product_follows_equal_eigenvalues_of_one_matrix():
    """The eigenvectors of the identity are any; those of the other matrix and of U0 count."""
    Z, _, U0 = commuting(1)
    Z[0] = np.eye(4)
    f = mf.LeastSquares(*tensors(Z, np.ones(3)))
    account = mf.descend(f, mf.SymmetricFactor(), DECAY, *tensors(U0), OFF, 0.02, 20).path.account
    inner = account.basis.numpy().T @ U0 @ U0.T @ account.basis.numpy()
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-12


# What has no account says so.


@pytest.mark.parametrize("case", [c for c in EVERY if c.id not in ACCOUNTED], ids=str)
def test_other_pairs_have_no_account_and_say_why(case):
    sol = mf.descend(loss(case, "logistic").torch, case.g, case.h, case.start(0), SWITCHED, 0.02, 4)
    assert sol.path.account is None and sol.path.mu is None
    assert "account" in sol.stats.unaccounted


def test_matrices_that_do_not_commute_have_no_account():
    rng = np.random.default_rng(0)
    Z, y = tensors(rng.standard_normal((2, 3, 3)), rng.standard_normal(2))
    U0 = torch.eye(3, dtype=torch.float64)
    sol = mf.descend(mf.LeastSquares(Z, y), mf.SymmetricFactor(), DECAY, U0, OFF, 0.02, 4)
    assert sol.path.account is None and "do not commute" in sol.stats.unaccounted


def test_a_diverged_run_has_the_account_of_its_finite_part():
    f = mf.LeastSquares(*tensors(*linear(8, 4, 6)))
    with pytest.warns(RuntimeWarning, match="infinite or NaN"):
        sol = mf.descend(f, H, DECAY, tensors(*start(8, 6)), OFF, 2.0, 400, save_every=1)
    account = sol.path.account
    assert len(account.a) == len(sol.path.x) < 400 and isinstance(account, Account)
    assert torch.isfinite(account.a).all() and isinstance(sol.stats, DescentStats)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch": 0}, ValueError, r"batch must be in \[1, 4\], got 0"),
        ({"batch": 5}, ValueError, r"batch must be in \[1, 4\], got 5"),
        ({"label_noise": -0.1}, ValueError, "label_noise must be finite and >= 0, got -0.1"),
        ({"label_noise": float("nan")}, ValueError, "label_noise must be finite"),
        ({"label_noise": mf.Piecewise((0.1,), (0.2, -0.2))}, ValueError, "label_noise must be"),
        ({"split_every": 0}, ValueError, "split_every must be >= 1, got 0"),
        (
            {"batch": 1, "loss": lambda x: x.sum()},
            TypeError,
            "batch and label_noise must have rows to draw from, got a loss of type function",
        ),
        ({"label_noise": 0.1, "loss": lambda x: x.sum()}, TypeError, "Use LeastSquares"),
    ],
)
def test_bad_draws_are_named(change, error, message):
    good = {
        "loss": mf.LeastSquares(*tensors(*linear(0, 4, 6))), "g": H, "h": DECAY,
        "w0": tensors(*start(0, 6)), "schedule": OFF, "lr": 0.1, "steps": 10,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        mf.descend(**{**good, **change})
