"""The deeper products: the batch against literal loops, and what explains where it ends."""

import numpy as np
import pytest
import torch

from mirrorflow.lab import framework
from mirrorflow.lab.experiments.depth import fig07_fig08_depth as fig07
from mirrorflow.lab.experiments.depth._problem import DEPTHS, Problems, speeds, train

PROBLEMS = Problems.draw((0, 5), 12, 20, 2)
ALPHAS, ETA, SCALE, ON, OFF = (0.05, 0.7), 0.01, 2.0, 60, 40


def literal(Z, y, depth, alpha):
    """Train with torch, the loss as torch.nn.MSELoss has it."""
    Z, y = torch.from_numpy(Z), torch.from_numpy(y)
    w = [torch.ones(Z.shape[1], dtype=torch.float64, requires_grad=True) for _ in range(depth)]
    with torch.no_grad():
        w[0].zero_()
    for step in range(ON + OFF):
        x = torch.stack(w).prod(0)
        torch.nn.functional.mse_loss(Z @ x, y).backward()
        rate = alpha if step < ON else 0.0
        with torch.no_grad():
            for v in w:
                if depth == 1:
                    v -= ETA * v.grad
                    v.copy_(torch.nn.functional.softshrink(v, ETA * rate))
                else:
                    v -= ETA * (v.grad + rate * v)
                v.grad = None
    return torch.stack(w).prod(0).detach().numpy()


@pytest.mark.parametrize("depth", DEPTHS.values())
def test_the_batch_takes_the_literal_steps(depth):
    curves = train(PROBLEMS, depth, ALPHAS, ETA, SCALE, ON, OFF, np.array([0, ON + OFF]), print)
    assert (curves.x[0] == 0).all()
    for i in range(2):
        for j, alpha in enumerate(ALPHAS):
            expected = literal(PROBLEMS.Z[i], PROBLEMS.y[i], depth, alpha)
            np.testing.assert_allclose(curves.x[-1, i, j], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("depth", DEPTHS.values())
def test_the_speed_is_that_of_the_flow(depth):
    """x' = -s df/dx: a small step of the factors moves x by s times the step."""
    rng = np.random.default_rng(0)
    w, gradient, eta = rng.standard_normal((depth, 7)), rng.standard_normal(7), 1e-7
    others = [w[[i for i in range(depth) if i != j]].prod(axis=0) for j in range(depth)]
    moved = (w - eta * gradient * np.array(others)).prod(axis=0)
    expected = -speeds(w) * gradient
    np.testing.assert_allclose((moved - w.prod(axis=0)) / eta, expected, rtol=1e-5)


def test_divergence_names_the_step():
    with pytest.raises(FloatingPointError, match="lower eta"), np.errstate(all="ignore"):
        train(PROBLEMS, 3, ALPHAS, 5.0, SCALE, 30, 30, np.arange(60), lambda step: None)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    config = fig07.Config(n=20, d=30, nonzero=2, eta=0.01, on=10_000, off=10_000, seeds=(0, 1, 2))
    folder = framework.execute(fig07, config, tmp_path_factory.mktemp("depth"))
    return framework.find_results(folder.parents[1])[0]["records"]


def test_trained_m_w_comes_to_the_end_point_that_limit_computes(records):
    """Within a training budget only where little decay is stored: the approach has rate A^(1-s)."""
    gaps = {r["alpha"]: r["gap"] for r in records if r["model"] == "m·w" and r["seed"] == 0}
    assert gaps[0.01] < 1e-3


def test_the_dead_coordinates_of_m_w_v_hold_it_back(records):
    """With alpha = 1 true coordinates die, and the end is the fit of the living ones."""
    held = [r for r in records if r["model"] == "m·w·v" and r["alpha"] == 1.0]
    assert any(r["alive_truth"] < 2 for r in held)
    for r in held:
        assert r["from_fit"] < 1e-6
        assert (r["error"] < 1e-3) == (r["alive_truth"] == 2)


def test_the_penalty_on_m_is_forgotten(records):
    """After the switch m moves to the nearest solution: it ends away from the sparse truth."""
    ends = [r["error"] for r in records if r["model"] == "m" and r["alpha"] == 1.0]
    best = [r["error"] for r in records if r["model"] == "m·w" and r["alpha"] == 1.0]
    assert min(ends) > 0.1
    assert np.median(best) < 0.1 * np.median(ends)
