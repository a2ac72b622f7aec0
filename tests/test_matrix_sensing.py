"""Matrix sensing: the fast loops equal the literal ones, and end where the theory says."""

import cvxpy as cp
import numpy as np
import pytest
import torch

from mirrorflow.lab.experiments.matrix_sensing import _problem as sensing
from mirrorflow.lab.experiments.matrix_sensing import fig02_matrix_sensing as fig02
from mirrorflow.lab.experiments.matrix_sensing._problem import (
    Scenario,
    SensingProblem,
    train_factor,
    train_linear,
)

SCENARIOS = (Scenario(0.0), Scenario(0.03), Scenario(0.06), Scenario(0.06, 40), Scenario(0.06, 0))
CLOCK = (0.2, 90, 0.3, 30)  # eta, steps, start, every


def dense(problem):
    return torch.from_numpy(problem.sensing()), torch.from_numpy(problem.y)


def literal_factor(problem, scenario, eta, steps, start, every):
    """One scenario by automatic differentiation, with full matrices."""
    A, y = dense(problem)
    U, found = start * torch.eye(problem.n, dtype=torch.float64), []
    for step in range(steps + 1):
        U.requires_grad_()
        loss = ((A * (U @ U.T)).sum((1, 2)) - y).square().sum() / (2 * problem.m)
        if step % every == 0:
            X = (U @ U.T).detach()
            error = (X - torch.from_numpy(problem.truth)).norm()
            found.append((loss.item(), error.item(), torch.linalg.matrix_norm(X, "nuc").item()))
        # f(U U^T) has the gradient 2 grad f(X) U: the flow of Corollary C.3 takes half of it.
        (gradient,) = torch.autograd.grad(loss, U)
        U = (U - eta * (0.5 * gradient + scenario.rate(step) * U)).detach()
    return np.array(found).T


def test_all_scenarios_together_equal_one_literal_loop_each():
    problem = SensingProblem.random(3, n=7, r=2, m=20)
    seen = []
    curves = train_factor(problem, SCENARIOS, *CLOCK, lambda step, m: seen.append((step, m)))
    assert curves.steps.tolist() == [0, 30, 60, 90] == [step for step, _ in seen]
    for i, scenario in enumerate(SCENARIOS):
        expected = literal_factor(problem, scenario, *CLOCK)
        for metric, values in zip(sensing.METRICS, expected, strict=True):
            np.testing.assert_allclose(curves.metrics[metric][i], values, rtol=1e-11)
    np.testing.assert_array_equal(seen[-1][1]["error"], curves.metrics["error"][:, -1])
    np.testing.assert_allclose(
        np.linalg.norm(curves.X - problem.truth, axis=(1, 2)), curves.metrics["error"][:, -1]
    )


def test_small_and_large_batches_agree():
    problem = SensingProblem.random(0, n=6, r=1, m=9)
    x = np.random.default_rng(0).standard_normal((9, 21))
    few = np.concatenate([problem.residual(x[:4]), problem.residual(x[4:8])])
    np.testing.assert_allclose(problem.residual(x)[:8], few, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        problem.slope(few)[:4], problem.slope(few[:4]), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("kind", ["random", "commuting"])
def test_half_vectors_are_the_matrices(kind):
    problem = getattr(SensingProblem, kind)(1, 6, 2, 5)
    A, rng = problem.sensing(), np.random.default_rng(0)
    B = rng.standard_normal((3, 6, 6))
    X = B + B.transpose(0, 2, 1)
    x = problem.vector(X)
    np.testing.assert_allclose(problem.matrix(x), X, rtol=1e-14)
    residual = np.einsum("kij,sij->sk", A, X) - problem.y
    np.testing.assert_allclose(problem.residual(x), residual, atol=1e-12)
    slope = np.einsum("sk,kij->sij", residual, A) / 5
    np.testing.assert_allclose(problem.matrix(problem.slope(residual)), slope, atol=1e-12)
    np.testing.assert_allclose(problem.residual(problem.vector(problem.truth)[None]), 0, atol=1e-13)
    assert np.linalg.norm(problem.truth, "nuc") == pytest.approx(1)
    assert np.linalg.matrix_rank(problem.truth, tol=1e-9) == 2
    largest = np.linalg.norm(A.reshape(5, -1), 2) ** 2 / 5
    assert problem.curvature() == pytest.approx(largest, rel=1e-12)
    brackets = A[:, None] @ A - A @ A[:, None]
    assert (np.abs(brackets).max() < 1e-12) == (kind == "commuting")


@pytest.mark.parametrize("penalty", ["nuclear", "l1"])
def test_the_linear_model_ends_at_the_minimizer_of_its_penalized_loss(penalty):
    problem, alpha = SensingProblem.random(0, n=5, r=1, m=12), 0.05
    curves = train_linear(problem, [Scenario(alpha)], 0.2, 4000, 0.1, 4000, penalty)
    X = cp.Variable((5, 5), symmetric=True)
    size = cp.normNuc(X) if penalty == "nuclear" else cp.sum(cp.abs(X))
    fit = problem.sensing().reshape(12, -1) @ cp.vec(X, order="C") - problem.y
    cp.Problem(cp.Minimize(cp.sum_squares(fit) / 24 + alpha * size)).solve(solver="CLARABEL")
    np.testing.assert_allclose(curves.X[0], X.value, atol=1e-5)
    assert curves.X[0] == pytest.approx(curves.X[0].T)


def test_the_linear_model_after_the_switch_goes_to_the_nearest_solution():
    problem = SensingProblem.random(0, n=5, r=1, m=9)
    before, after = (
        train_linear(problem, [Scenario(0.05, 300)], 0.2, steps, 0.1, steps).X[0]
        for steps in (300, 3000)
    )
    rows = problem.sensing().reshape(9, -1)
    nearest = before.ravel() + np.linalg.pinv(rows) @ (problem.y - rows @ before.ravel())
    np.testing.assert_allclose(after.ravel(), nearest, atol=1e-10)


def test_an_x_that_has_arrived_is_where_the_literal_loop_is():
    problem, eta, steps = SensingProblem.random(1, n=5, r=1, m=14), 0.1, 3000
    curves = train_linear(problem, [Scenario(0.04, 1500)], eta, steps, 0.2, 500)
    A, X, errors = problem.sensing(), 0.04 * np.eye(5), []
    assert eta * problem.curvature() < sensing.STABLE  # one step of eta each
    for step in range(steps + 1):
        if step % 500 == 0:
            errors.append(np.linalg.norm(X - problem.truth))
        X = X - eta * np.tensordot(np.tensordot(A, X, 2) - problem.y, A, 1) / 14
        if step < 1500:
            values, V = np.linalg.eigh(X)
            X = (V * (np.sign(values) * np.maximum(abs(values) - eta * 0.04, 0))) @ V.T
    np.testing.assert_allclose(curves.metrics["error"][0], errors, rtol=1e-9)


def test_a_step_that_is_too_long_for_x_is_cut_on_the_same_clock():
    problem = SensingProblem.random(0, n=8, r=1, m=6)
    assert 0.4 * problem.curvature() > 2  # plain gradient descent diverges
    end = train_linear(problem, [Scenario(0.0)], 0.4, 600, 0.1, 600)
    assert end.metrics["train"][0, -1] < 1e-20


def test_divergence_is_an_error():
    with pytest.raises(FloatingPointError, match="diverged by step 10: lower eta"):
        train_factor(SensingProblem.random(0, 6, 2, 30), [Scenario(0.0)], 50.0, 20, 1.0, 10)


def test_scenarios_know_their_accumulated_decay():
    config = fig02.Config()
    a = [s.accumulated(config.eta, config.steps) for s in config.scenarios().values()]
    assert a == pytest.approx([0, -12.5, -25, -12.5])
    assert config.interpolating() == [0, 3]


def test_the_smoke_run_shows_what_the_figure_is_about(smoke):
    _, _, result, _ = smoke("fig02_matrix_sensing")
    ends = {(r["model"], r["scenario"]): r for r in result["records"] if r["panel"] == "end"}
    off = ends["factor", "α = 0.02, then off"]
    assert off["error"] < ends["factor", "α = 0.02"]["error"]
    assert off["error"] < ends["factor", "no decay"]["error"]
    assert {r["status"] for r in ends.values() if "predicted" in r} == {"surrogate"}
    cells = [r for r in result["records"] if r["panel"] == "map"]
    assert len(cells) == 2 * 3 and sum(r["never"] for r in cells) == 2


@pytest.mark.slow
def test_with_commuting_matrices_the_flow_ends_where_limit_says(tmp_path):
    config = fig02.Config.preset("smoke").model_copy(update={"commuting_time": 1e6})
    part = fig02._commuting(config, 0)
    assert [r["a"] for r in part.records] == pytest.approx([0, -0.16, -1.0])
    for record in part.records:
        assert record["status"] == "converged" and record["flow"] == "completed"
    assert part.records[0]["gap"] < 1e-9
    assert all(gap[0] > 0.1 > gap[-1] for k, gap in part.arrays.items() if k != "t")


# theory.md, "Matrix sensing": |X - X*|_F, not squared, in the four scenarios.
MEASURED = {
    750: (7.0e-2, 3.8e-2, 7.1e-2, 7.9e-5),
    500: (0.16, 5.2e-2, 8.9e-2, 2.8e-3),
    400: (0.22, 7.7e-2, 0.11, 1.7e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("m", MEASURED)
def test_matrix_sensing_agrees_with_theory_md(m):
    config = fig02.Config(m=m)
    clock = (config.eta, config.steps, config.start, config.steps)
    problem, scenarios = SensingProblem.random(0, 50, 5, m), list(config.scenarios().values())
    factor = train_factor(problem, scenarios, *clock).metrics["error"][:, -1]
    np.testing.assert_allclose(factor[:3], MEASURED[m][:3], rtol=0.1)
    np.testing.assert_allclose(np.log(factor[3]), np.log(MEASURED[m][3]), atol=np.log(2))
    if m == 750:  # with constant decay both models end alike; after it, only U U^T recovers
        linear = train_linear(problem, scenarios, *clock).metrics["error"][:, -1]
        np.testing.assert_allclose(linear[1:3], factor[1:3], rtol=1e-2)
        assert linear[3] == pytest.approx(5.4e-2, rel=0.1)
