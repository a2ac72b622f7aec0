"""Matrix sensing (Figure 2): all scenarios of one seed together, against a literal loop for each.

The literal loops are torch with automatic differentiation, one scenario after the other, in two
forms: the loss as it is written (a sum of A_i * X), and the fastest form of it that we found in
torch (one einsum). Time is linear in the steps, so ``STEPS`` of them are timed; figures are per
step. The linear model is timed over a whole run, because it skips what has settled.
"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import torch

from benchmarks._measure import measure
from mirrorflow.lab.experiments.matrix_sensing._problem import (
    Scenario,
    SensingProblem,
    train_factor,
    train_linear,
)

STEPS, REPEATS = 200, 5
N, R, ETA, START = 50, 5, 0.25, 0.1
WHOLE = 5000


def literal(
    problem: SensingProblem, scenarios: list[Scenario], steps: int, form: str
) -> np.ndarray:
    """Train one scenario after the other with automatic differentiation."""
    A, y = torch.from_numpy(problem.sensing()), torch.from_numpy(problem.y)
    return np.stack([_literal(A, y, s, steps, form) for s in scenarios])


def _literal(
    A: torch.Tensor, y: torch.Tensor, scenario: Scenario, steps: int, form: str
) -> np.ndarray:
    U = (START * torch.eye(N, dtype=torch.float64)).requires_grad_()
    for step in range(steps):
        X = U @ U.T
        fit = (A * X).sum((1, 2)) if form == "sum" else torch.einsum("kij,ij->k", A, X)
        # Half the loss: differentiating f(U U^T) gives 2 grad f(X) U.
        loss = (fit - y).square().sum() / (4 * len(y))
        loss.backward()
        with torch.no_grad():
            U -= ETA * (U.grad + scenario.rate(step) * U)
        U.grad = None
    return (U @ U.T).detach().numpy()


def literal_linear(problem: SensingProblem, scenarios: list[Scenario], steps: int) -> np.ndarray:
    """Train the linear model, one scenario after the other, with automatic differentiation."""
    A, y = torch.from_numpy(problem.sensing()), torch.from_numpy(problem.y)
    ends = []
    for scenario in scenarios:
        X = (START**2 * torch.eye(N, dtype=torch.float64)).requires_grad_()
        for step in range(steps):
            loss = (torch.einsum("kij,ij->k", A, X) - y).square().sum() / (2 * len(y))
            loss.backward()
            with torch.no_grad():
                X -= ETA * X.grad
                if scenario.rate(step):
                    values, V = torch.linalg.eigh(X)
                    shrunk = (values.abs() - ETA * scenario.rate(step)).clamp(min=0)
                    X.copy_((V * (values.sign() * shrunk)) @ V.T)
            X.grad = None
        ends.append(X.detach().numpy())
    return np.stack(ends)


def limits(problem: SensingProblem, rows: int) -> dict[str, float]:
    """Return the time of a step if only memory, or only arithmetic, took time on this machine.

    A step has to read H once (what a fused pass would need; BLAS reads it twice), and to do 4 m p
    flops for each row of the batch, and 4 n^3 for the two products with U.
    """
    big = np.ones(2**25)  # 256 MiB, more than any cache
    square = np.random.default_rng(0).standard_normal((600, 600))
    H = problem.H
    seconds = measure(
        {
            "memory": lambda: big.sum(),
            "cache": lambda: H @ H[0],  # a product by a vector: reads H once, where H lies
            "flops": lambda: square @ square,
        },
        REPEATS,
    )
    flops = rows * (4 * H.size + 4 * N**3)
    return {
        "from memory": H.nbytes * seconds["memory"] / big.nbytes,
        "from cache": seconds["cache"],
        "arithmetic": flops * seconds["flops"] / (2 * 600**3),
    }


def linear_steps(problem: SensingProblem, scenarios: list[Scenario]) -> tuple[int, int]:
    """Count the steps that the linear model takes before it settles, and those with a penalty."""
    slope, matrix = SensingProblem.slope, SensingProblem.matrix
    with (
        patch.object(SensingProblem, "slope", autospec=True, side_effect=slope) as slopes,
        patch.object(SensingProblem, "matrix", autospec=True, side_effect=matrix) as shrinks,
    ):
        train_linear(problem, scenarios, ETA, WHOLE, START, WHOLE)
    return slopes.call_count, shrinks.call_count


def linear_limit(
    problem: SensingProblem, scenarios: list[Scenario], floor: dict[str, float]
) -> float:
    """Return the time of the linear model's steps if only memory, or only arithmetic, took time.

    Each step reads H once; a penalty takes an eigendecomposition and a product: 11 n^3 flops.
    """
    steps, penalized = linear_steps(problem, scenarios)
    flop = floor["arithmetic"] / (4 * (4 * problem.H.size + 4 * N**3))  # seconds, of 4 rows
    return (
        steps * max(floor["from cache"], 4 * problem.H.size * flop) + penalized * 11 * N**3 * flop
    )


def compare(m: int) -> list[dict]:
    """Time one m: first that all do the same, then how long they take."""
    problem = SensingProblem.random(0, N, R, m)
    # The switch in the middle of the timed steps, as in the middle of the whole run.
    scenarios = [Scenario(0.0), Scenario(0.01), Scenario(0.02), Scenario(0.02, STEPS // 2)]
    whole = [Scenario(0.0), Scenario(0.01), Scenario(0.02), Scenario(0.02, WHOLE // 2)]

    def together() -> np.ndarray:
        return train_factor(problem, scenarios, ETA, STEPS, START, STEPS).X

    for form in ("sum", "einsum"):
        short = literal(problem, scenarios, STEPS, form)
        np.testing.assert_allclose(short, together(), rtol=1e-8, atol=1e-12)
    linear = train_linear(problem, scenarios, ETA, STEPS, START, STEPS).X
    np.testing.assert_allclose(
        literal_linear(problem, scenarios, STEPS), linear, rtol=1e-6, atol=1e-9
    )
    seconds = measure(
        {
            "together": together,
            "sum": lambda: literal(problem, scenarios, STEPS, "sum"),
            "einsum": lambda: literal(problem, scenarios, STEPS, "einsum"),
            "linear": lambda: train_linear(problem, whole, ETA, WHOLE, START, WHOLE),
            "linear_literal": lambda: literal_linear(problem, scenarios, STEPS),
        },
        REPEATS,
    )
    scale = WHOLE / STEPS
    factor = {k: scale * seconds[k] for k in ("together", "sum", "einsum")}
    both = factor["together"] + seconds["linear"]
    both_literal = factor["sum"] + scale * seconds["linear_literal"]
    step = limits(problem, rows=4)
    floor = {k: WHOLE * v for k, v in step.items()}
    limit = max(floor["from cache"], floor["arithmetic"])
    limit_both = limit + linear_limit(problem, whole, step)
    return [
        {
            "case": f"matrix sensing, m = {m}, U U^T in 4 scenarios, {WHOLE} steps",
            "seconds": factor["together"],
            "literal autograd, seconds": factor["sum"],
            "ratio": factor["sum"] / factor["together"],
            "fastest autograd, seconds": factor["einsum"],
            "ratio to the fastest": factor["einsum"] / factor["together"],
            "target": 8,
            "limit, seconds": limit,
            "limit": "H read once from where it lies, or the flops, whichever is longer",
            "times the limit": factor["together"] / limit,
            **{f"{k}, seconds": v for k, v in floor.items()},
            "scaled from steps": STEPS,
        },
        {
            "case": f"matrix sensing, m = {m}, U U^T and X, 8 scenarios, {WHOLE} steps",
            "seconds": both,
            "literal autograd, seconds": both_literal,
            "ratio": both_literal / both,
            "target": 8,
            "limit, seconds": limit_both,
            "limit": "as above, and for X: H read once a step, and the flops of the penalty",
            "times the limit": both / limit_both,
            "scaled from steps": STEPS,
        },
    ]


def run() -> list[dict]:
    """Measure m = 750, where theory.md has its numbers, and m = 500, the default."""
    return [row for m in (750, 500) for row in compare(m)]
