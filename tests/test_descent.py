"""Gradient descent against torch.optim.SGD, a literal loop, and the flow that it approximates."""

import numpy as np
import pytest
import torch

import mirrorflow as mf
import oracles
from cases import EVERY, LOSSES, SCHEDULES, loss

HADAMARD = next(c for c in EVERY if c.id == "hadamard")
SWITCHED = mf.Piecewise((0.5, 1.2), (0.3, 0.8, 0.0))


def run(case, name, schedule, lr, steps, **options):
    return mf.descend(
        loss(case, name).torch, case.g, case.h, case.start(0), schedule, lr, steps, **options
    )


@pytest.mark.parametrize("momentum", (0.0, 0.9))
@pytest.mark.parametrize("name", LOSSES)
def test_every_step_is_that_of_sgd(name, momentum):
    """The decay of a parameter group, written at each step, is our schedule."""
    lr, steps = 0.05, 40
    m, w = (f.clone().requires_grad_() for f in HADAMARD.start(0))
    optimizer = torch.optim.SGD([m, w], lr=lr, momentum=momentum)
    f, rows = loss(HADAMARD, name).torch, [torch.stack([m, w]).detach()]
    for k in range(steps):
        optimizer.param_groups[0]["weight_decay"] = SWITCHED.rate(k * lr)
        optimizer.zero_grad()
        f(m * w).backward()
        optimizer.step()
        rows.append(torch.stack([m, w]).detach())
    sol = run(HADAMARD, name, SWITCHED, lr, steps, momentum=momentum, save_every=1)
    ours = torch.stack(sol.path.w, dim=1)
    torch.testing.assert_close(ours, torch.stack(rows), rtol=1e-11, atol=1e-13)
    assert sol.status is mf.Status.completed and sol.stats.steps == steps


@pytest.mark.parametrize("momentum", (0.0, 0.7))
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_pair_follows_the_literal_loop(case, momentum):
    schedule, lr = SCHEDULES["negative"], 0.02
    rows = oracles.descent(
        case.field, case.flat(0), loss(case, "quartic").slope, schedule.rate, lr, 30, momentum
    )
    sol = run(case, "quartic", schedule, lr, 30, momentum=momentum, save_every=1)
    x = np.array([case.field.g(w) for w in rows])
    np.testing.assert_allclose(sol.path.x.reshape(31, -1), x, rtol=1e-11, atol=1e-13)
    parts = (sol.path.w,) if isinstance(sol.path.w, torch.Tensor) else sol.path.w
    flat = torch.cat([p.reshape(31, -1) for p in parts], dim=1)
    np.testing.assert_allclose(flat, rows, rtol=1e-11, atol=1e-13)


def orders(errors):
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


@pytest.mark.parametrize("id", ("hadamard", "power-2", "product", "symmetric"))
@pytest.mark.sample(3)
def test_training_approaches_the_flow_at_first_order(id):
    case = next(c for c in EVERY if c.id == id)
    _, (x,), _, _ = oracles.train(
        case.field, case.flat(0), loss(case, "logistic").slope, SWITCHED.rate, 2.0, (0.5, 1.2)
    )
    errors = []
    for lr in (1 / 40, 1 / 80, 1 / 160, 1 / 320):
        sol = run(case, "logistic", SWITCHED, lr, round(2 / lr))
        errors.append(np.abs(sol.value.reshape(-1).numpy() - x).max())
    assert errors[0] < 0.05
    assert np.abs(orders(errors) - 1).max() < 0.15


def test_momentum_runs_the_flow_at_a_faster_clock():
    """With a constant rate, k steps with momentum m reach the flow's time k lr / (1 - m)."""
    case, m = HADAMARD, 0.5
    _, (x,), _, _ = oracles.train(
        case.field, case.flat(0), loss(case, "logistic").slope, lambda t: 0.2, 2.0
    )
    errors = []
    for lr in (1 / 80, 1 / 160, 1 / 320):
        sol = run(case, "logistic", mf.Constant(0.2), lr, round(2 * (1 - m) / lr), momentum=m)
        assert float(sol.path.a[-1]) / (1 - m) == pytest.approx(-0.2 * 2.0)
        errors.append(np.abs(sol.value.numpy() - x).max())
    assert errors[0] < 0.05
    assert np.abs(orders(errors) - 1).max() < 0.15


def test_the_law_holds_up_to_the_time_step():
    """mirror(x_k, a_k) - mu_k falls with lr, mu_k being the sum of the gradients seen."""
    R, made = mf.legendre(HADAMARD.g, HADAMARD.h, HADAMARD.start(0)), loss(HADAMARD, "quartic")
    errors = []
    for lr in (1 / 50, 1 / 100, 1 / 200):
        sol = run(HADAMARD, "quartic", SWITCHED, lr, round(2 / lr), save_every=1)
        mu = -lr * sum(made.slope(x) for x in sol.path.x[:-1].numpy())
        errors.append(np.abs(R.mirror(sol.value, sol.path.a[-1]).numpy() - mu).max())
    assert np.abs(orders(errors) - 1).max() < 0.15


def test_the_path_shares_the_clock_of_the_flow():
    lr, steps = 0.1, 25
    sol = run(HADAMARD, "least-squares", SWITCHED, lr, steps, save_every=10)
    assert sol.path.t.tolist() == pytest.approx([0.0, 1.0, 2.0, 2.5])
    rates = [SWITCHED.rate(k * lr) for k in range(steps)]
    expected = [-lr * sum(rates[:k]) for k in (0, 10, 20, 25)]
    np.testing.assert_allclose(sol.path.a, expected, rtol=1e-14)
    torch.testing.assert_close(sol.path.x, sol.path.w[0] * sol.path.w[1])
    torch.testing.assert_close(sol.value, sol.path.x[-1])
    assert len(run(HADAMARD, "least-squares", SWITCHED, lr, 1000).path.t) == 101


def test_divergence_is_a_status():
    """x <- x - lr x^3 with a large lr grows without bound; the saved part is finite."""
    x0 = torch.tensor([3.0, 0.1], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="infinite or NaN"):
        sol = mf.descend(
            lambda x: (x**4).sum() / 4, mf.Identity(), mf.WeightDecay(), x0, mf.Constant(0.0),
            lr=1.0, steps=100, save_every=1,
        )  # fmt: skip
    assert sol.status is mf.Status.diverged and not sol.status.ok
    assert torch.isfinite(sol.path.x).all() and sol.value[0].abs() > 1e50
    assert sol.stats.steps == len(sol.path.t) < 100  # the last step is not in the path


def test_nothing_is_taped_and_the_start_is_left_alone():
    w0 = tuple(f.requires_grad_() for f in HADAMARD.start(0))
    before = [f.detach().clone() for f in w0]
    f = loss(HADAMARD, "logistic").torch
    sol = mf.descend(f, HADAMARD.g, HADAMARD.h, w0, SWITCHED, 0.1, 10, momentum=0.5)
    assert not sol.value.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, w0, strict=True))
    assert all(p.grad is None for p in w0)


def test_the_dtype_of_the_start_is_kept():
    w0 = tuple(f.float() for f in HADAMARD.start(0))
    sol = mf.descend(lambda x: (x**2).sum(), mf.Hadamard(), mf.WeightDecay(), w0, SWITCHED, 0.1, 10)
    assert sol.value.dtype == sol.path.x.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be positive"),
        ({"lr": float("nan")}, ValueError, "lr must be positive"),
        (
            {"g": torch.sin},
            TypeError,
            "descend: g and h must be a Reparam and a Regularizer, got builtin_func",
        ),
        ({"h": mf.WeightDecay}, TypeError, "got Hadamard and the class WeightDecay"),
        ({"loss": lambda x: x}, TypeError, r"a tensor of one number, got \(3,\)"),
        ({"loss": lambda x: x.sum().item()}, TypeError, "a tensor of one number, got float"),
        ({"loss": lambda x: x.detach().sum()}, ValueError, r"write 0 \* x.sum\(\)"),
        ({"steps": 0}, ValueError, "steps must be >= 1"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
        ({"save_every": 0}, ValueError, "save_every must be >= 1"),
        ({"schedule": 0.1}, TypeError, "schedule must be a Schedule"),
        ({"w0": (torch.ones(3), torch.ones(2))}, ValueError, "one shape"),
        ({"w0": (torch.ones(4).double(),) * 2}, ValueError, r"Z must be \(n, 4\)"),
        ({"w0": (torch.ones(3),) * 2}, TypeError, "one dtype"),
        ({"h": mf.Separable()}, TypeError, "Use WeightDecay"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {
        "loss": loss(HADAMARD, "least-squares").torch, "g": mf.Hadamard(), "h": mf.WeightDecay(),
        "w0": HADAMARD.start(0), "schedule": mf.Constant(0.1), "lr": 0.1, "steps": 10,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        mf.descend(**{**good, **change})
