"""Where training with steps, minibatches, label noise and momentum ends, and what predicts it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import root

import mirrorflow as mf
from mirrorflow.descent import predicted_account

H, DECAY, OFF = mf.Hadamard(), mf.WeightDecay(), mf.Constant(0.0)


def tensors(*arrays):
    return tuple(torch.from_numpy(np.array(v)) for v in arrays)


def problem(seed, n=4, d=16):
    """Return measurements of a sparse x, so conditioned that short runs fit, and a start."""
    rng = np.random.default_rng(seed)
    Z, truth = np.linalg.qr(rng.standard_normal((d, n)))[0].T * np.sqrt(d), np.zeros(d)
    truth[:3] = rng.choice([-1, 1], 3) * rng.uniform(0.5, 1.5, 3)
    w0 = 0.1 * rng.uniform(-1, 1, d), 0.5 * rng.uniform(0.7, 1.3, d)
    return Z, Z @ truth, w0


def endpoint(Z, y, w0, a, tilt=0.0):
    """Solve Z A e^{2a} sinh(2 Z^T theta + 2 tilt + rho) = y, by SciPy, a per coordinate."""
    m, w = w0
    A, rho = np.abs(m * m - w * w) / 2 * np.exp(2 * a), np.log(np.abs((m + w) / (m - w)))

    def x(theta):
        return A * np.sinh(2 * (theta @ Z + tilt) + rho)

    found = root(lambda theta: Z @ x(theta) - y, np.zeros(len(y)), method="lm", tol=1e-14)
    assert np.abs(Z @ x(found.x) - y).max() < 1e-11 * np.abs(y).max()
    return x(found.x)


def distance(x, y):
    return float(np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(y)))


@dataclass(frozen=True)
class Training:
    """One way of training, and by what factor the account improves on decay alone."""

    lr: float
    steps: int
    closer: float
    batch: int | None = None
    noise: float = 0.0
    alpha: float = 0.0
    momentum: float = 0.0

    def run(self, seed):
        Z, y, w0 = problem(seed)
        until = self.lr * self.steps / 2
        return mf.descend(
            mf.LeastSquares(*tensors(Z, y)), H, DECAY, tensors(*w0),
            mf.SwitchOff(self.alpha, until), self.lr, self.steps, momentum=self.momentum,
            batch=self.batch, label_noise=mf.SwitchOff(self.noise, until), seed=seed,
            split_every=10,
        )  # fmt: skip

    def errors(self, seed):
        """Return how far the end is from those of decay alone, the account, and with the tilt."""
        (Z, y, w0), sol = problem(seed), self.run(seed)
        R, account = mf.legendre(H, DECAY, tensors(*w0)), sol.path.account
        assert distance(Z @ sol.value.numpy(), y) < 1e-4
        alone = float(sol.path.a[-1]) / (1 - self.momentum)
        scalar = mf.limit(R, Z, y, alone).value
        vector = mf.limit(R, Z, y, account.a[-1], per_coordinate=True).value
        # The fit is not perfect: the end is exact for what the run fits.
        tilted = R.folded(account.a[-1], account.tilt(torch.from_numpy(Z)))
        exact = mf.limit(tilted, Z, Z @ sol.value.numpy(), 0.0).value
        return [distance(x, sol.value) for x in (scalar, vector, exact)]


TRAINING = {
    "steps": Training(0.02, 500, 10),
    "batch": Training(0.01, 1200, 10, batch=1),
    "batch-decay": Training(0.01, 2000, 10, batch=1, alpha=0.03),
    "label-noise": Training(0.01, 3000, 100, batch=1, noise=0.9),
    "label-noise-decay": Training(0.01, 3000, 100, batch=1, noise=0.9, alpha=0.02),
    "momentum": Training(0.0002, 5000, 10, batch=1, momentum=0.9),
    "momentum-label-noise": Training(0.0002, 6000, 10, batch=1, noise=0.9, momentum=0.9),
}


@pytest.mark.parametrize("name", ("steps", "label-noise-decay"))
def test_the_account_predicts_the_end_of_training(name):
    training = TRAINING[name]
    errors = np.array([training.errors(seed) for seed in range(3)])
    alone, account, exact = np.median(errors, axis=0)
    assert account < alone / training.closer and exact < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_the_account_predicts_the_end_of_training_in_the_median_of_20_seeds(name):
    training = TRAINING[name]
    errors = np.array([training.errors(seed) for seed in range(20)])
    alone, account, _ = np.median(errors, axis=0)
    assert account < alone / training.closer and errors[:, 2].max() < 1e-9


def test_what_the_account_leaves_out_is_of_third_order():
    """The tilt falls with the square of lr at a fixed time, as 1/lr steps of lr^3 do."""
    Z, y, w0 = problem(1)
    tilts = []
    for lr in (0.02, 0.01, 0.005):
        f = mf.LeastSquares(*tensors(Z, y))
        sol = mf.descend(f, H, DECAY, tensors(*w0), OFF, lr, round(4 / lr))
        tilt = sol.path.account.tilt(f.Z)
        assert (f.Z @ tilt).abs().max() < 1e-15
        tilts.append(float(tilt.norm()))
    order = np.log2(np.array(tilts[:-1]) / np.array(tilts[1:]))
    assert np.abs(order - 2).max() < 0.25


# One a per coordinate.


def test_one_a_per_coordinate_is_a_start_scaled_by_its_exponential():
    for seed in range(5):
        Z, y, (m, w) = problem(seed)
        a = np.random.default_rng(seed).uniform(-2, 0.3, len(m))
        R = mf.legendre(H, DECAY, tensors(m, w))
        x = mf.limit(R, Z, y, a, per_coordinate=True).value
        scaled = mf.legendre(H, DECAY, tensors(m * np.exp(a), w * np.exp(a)))
        assert distance(mf.limit(scaled, Z, y, 0.0).value, x) < 1e-12
        assert distance(endpoint(Z, y, (m, w), a), x) < 1e-9


def test_one_a_per_coordinate_holds_for_one_sided_entropies():
    Z, _, (_, w) = problem(0)
    a = np.linspace(-1, 0.2, len(w))
    R = mf.legendre(H, DECAY, tensors(w, w))
    x = mf.limit(R, Z, Z @ (w * w) * 1.1, a, per_coordinate=True).value.numpy()
    theta = np.linalg.lstsq(Z.T, np.log(x / (w * w * np.exp(2 * a))) / 2, rcond=None)[0]
    assert distance(w * w * np.exp(2 * a + 2 * theta @ Z), x) < 1e-10
    assert distance(Z @ x, Z @ (w * w) * 1.1) < 1e-10


def test_a_tilt_moves_the_dual_variable_by_itself():
    rng = np.random.default_rng(2)
    Z, y, w0 = problem(2)
    tilt, a = rng.uniform(-0.3, 0.3, 16), rng.uniform(-1, 0, 16)
    R = mf.legendre(H, DECAY, tensors(*w0))
    folded = R.folded(*tensors(a, tilt))
    x = torch.from_numpy(rng.standard_normal(16))
    torch.testing.assert_close(
        folded.mirror(x, 0.0), R.mirror(x, torch.from_numpy(a)) - torch.from_numpy(tilt)
    )
    change = folded.value(x, 0.0) - R.value(x, torch.from_numpy(a)) + torch.from_numpy(tilt) @ x
    assert abs(float(change)) < 1e-12
    assert distance(mf.limit(folded, Z, y, 0.0).value, endpoint(Z, y, w0, a, tilt)) < 1e-9


def test_a_path_as_long_as_x_has_to_say_that_it_is_one():
    Z, y, w0 = problem(0)
    R, a = mf.legendre(H, DECAY, tensors(*w0)), np.linspace(0, -1, 16)
    with pytest.raises(ValueError, match="a must say what it holds where it is as long as x"):
        mf.limit(R, Z, y, a)
    path = mf.limit(R, Z, y, a, per_coordinate=False)
    assert path.value.shape == (16, 16) and mf.limit(R, Z, y, a[:5]).value.shape == (5, 16)
    one = mf.limit(R, Z, y, a, per_coordinate=True)
    assert one.value.shape == (16,) and isinstance(one.stats.kkt, float)
    with pytest.raises(ValueError, match="a must "):
        mf.limit(R, Z, y, a[:5], per_coordinate=True)
    power = mf.legendre(mf.PowerDifference(2), mf.Separable(), tensors(np.ones(16), np.ones(16)))
    of_power = mf.limit(power, Z, y, a, per_coordinate=True)
    np.testing.assert_allclose(np.asarray(Z) @ np.asarray(of_power.value), np.asarray(y), atol=1e-8)


def test_a_tilt_needs_measurements_of_the_coordinates():
    account = TRAINING["steps"].run(0).path.account
    with pytest.raises(ValueError, match=r"Z must have shape \(n, 16\), got \(2, 5\)"):
        account.tilt(torch.ones(2, 5))


# Without training.


def flow_of(f, w0, schedule, until):
    times = until * np.linspace(0, 1, 500) ** 2
    return mf.flow(f, H, DECAY, w0, schedule, until, view="mirror", save_at=times, rtol=1e-9)


@pytest.mark.parametrize("momentum", (0.0, 0.5))
def test_the_flow_predicts_the_account_to_second_order(momentum):
    """Decay that ends, and the same in the slower time that the steps with momentum have."""
    Z, y, w0 = problem(0)
    f, start, until = mf.LeastSquares(*tensors(Z, y)), tensors(*w0), 6.0
    flowed, errors = flow_of(f, start, mf.SwitchOff(0.1, 3.0), until), []
    for lr in (0.02, 0.01, 0.005):
        lr *= (1 - momentum) ** 2
        steps = round(until * (1 - momentum) / lr)
        off = mf.SwitchOff(0.1, 3.0 * (1 - momentum))
        trained = mf.descend(f, H, DECAY, start, off, lr, steps, momentum=momentum).path.account
        predicted = predicted_account(flowed, f, lr, momentum=momentum)
        assert not predicted.noise.any() and torch.equal(predicted.mu, flowed.path.mu)
        errors.append(float((predicted.a[-1] - trained.a[-1]).abs().max()))
        assert errors[-1] < 0.3 * float(trained.step[-1].abs().max())
        assert float((predicted.decay - trained.decay[-1])[-1].abs().max()) < errors[-1] + 1e-6
    order = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.abs(order - 2).max() < 0.3


def test_the_predicted_noise_is_that_of_training():
    """In the mean of the coordinates; with momentum a permutation leaves 3/4 of the noise."""
    Z, y, w0 = problem(3, n=6)
    f, start, lr, steps = mf.LeastSquares(*tensors(Z, y)), tensors(*w0), 0.002, 750
    for momentum, batch, delta in ((0.0, 1, 0.0), (0.0, 4, 0.6), (0.0, None, 2.0), (0.5, 1, 0.0)):
        eta = lr * (1 - momentum)
        trained = [
            mf.descend(
                f, H, DECAY, start, OFF, eta, steps, momentum=momentum, batch=batch,
                label_noise=delta, seed=seed,
            ).path.account.noise[-1].mean()
            for seed in range(2)
        ]  # fmt: skip
        flowed = flow_of(f, start, OFF, lr * steps)
        predicted = predicted_account(flowed, f, eta, batch, delta, momentum).noise[-1].mean()
        assert np.mean(trained) == pytest.approx(float(predicted), rel=0.1), (momentum, batch)


def test_label_noise_is_predicted_as_a_decay():
    """alpha_i = (eta/2) delta^2 mean(z_i^2) at batch 1, a quarter of it at batch 4."""
    Z, y, w0 = problem(0)
    f, lr, delta = mf.LeastSquares(*tensors(Z, y)), 0.01, 0.3
    flowed = flow_of(f, tensors(*w0), OFF, 20.0)
    alpha = lr / 2 * delta**2 * (Z**2).mean(0)
    for noise, time in ((delta, 20.0), (mf.SwitchOff(delta, 5.0), 5.0)):
        whole = predicted_account(flowed, f, lr, label_noise=noise).noise[-1]
        np.testing.assert_allclose(whole, -alpha * time / 4, rtol=1e-12)
    single = predicted_account(flowed, f, lr, batch=1, label_noise=delta)
    rows = predicted_account(flowed, f, lr, batch=1)
    np.testing.assert_allclose(single.noise[-1] - rows.noise[-1], -alpha * 20.0, rtol=1e-9)


def test_the_flow_predicts_the_end_of_training():
    errors = []
    for seed in range(3):
        (Z, y, w0), training = problem(seed), TRAINING["steps"]
        f = mf.LeastSquares(*tensors(Z, y))
        flowed = flow_of(f, tensors(*w0), OFF, training.lr * training.steps)
        account = predicted_account(flowed, f, training.lr)
        x, R = training.run(seed).value, mf.legendre(H, DECAY, tensors(*w0))
        predicted = mf.limit(R, Z, y, account.a[-1], per_coordinate=True).value
        errors.append((distance(flowed.value, x), distance(predicted, x)))
    flow, account = np.median(errors, axis=0)
    assert account < flow / 10


def test_the_flow_of_any_loss_predicts_the_account():
    Z, y, w0 = problem(1)
    f = mf.LeastSquares(*tensors(Z, y))
    flowed = flow_of(f, tensors(*w0), OFF, 3.0)
    known, free = (predicted_account(flowed, g, 0.01) for g in (f, lambda x: f(x)))
    torch.testing.assert_close(known.a, free.a, rtol=1e-10, atol=1e-14)
    total = known.decay + known.step + known.noise
    torch.testing.assert_close(total, known.a, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be positive"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
        ({"batch": 9}, ValueError, r"predicted_account: batch must be in \[1, 4\], got 9"),
        ({"loss": lambda x: x.sum(), "batch": 1}, TypeError, "Use LeastSquares"),
        ({"label_noise": -1.0}, ValueError, "label_noise must be finite and >= 0"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    Z, y, w0 = problem(1)
    f = mf.LeastSquares(*tensors(Z, y))
    good = {"flow": flow_of(f, tensors(*w0), OFF, 1.0), "loss": f, "lr": 0.1}
    with pytest.raises(error, match=message):
        predicted_account(**{**good, **change})


def test_a_solution_without_a_path_is_refused():
    Z, y, w0 = problem(1)
    sol = mf.limit(mf.legendre(H, DECAY, tensors(*w0)), Z, y, 0.0)
    with pytest.raises(ValueError, match="must have a path with mu and a"):
        predicted_account(sol, mf.LeastSquares(*tensors(Z, y)), 0.1)
