"""The flow of the diagonal network of Appendix D: `flow` against torchdiffeq's dopri5.

Both at rtol 1e-8 and with the decay off at half time; torchdiffeq is called once for each half, as
its steps would otherwise stumble over the jump. The error of each is against DOP853 at rtol 1e-13.
"""

from __future__ import annotations

import numpy as np
import torch
from torchdiffeq import odeint

import mirrorflow as mf
from benchmarks._diagonal import ALPHAS, END, D, N, peak_flops, problem, start
from benchmarks._measure import measure

RTOL, ATOL = 1e-8, 1e-10


def by_torchdiffeq(Z, y, alpha):
    """Integrate (m, w) with dopri5; the gradient is written out, which is faster than autograd."""
    Zt, yt = torch.from_numpy(Z), torch.from_numpy(y)
    state = torch.stack(start())
    for rate in (alpha, 0.0):

        def velocity(t, s, rate=rate):
            gradient = (Zt @ (s[0] * s[1]) - yt) @ Zt / len(yt)
            return -gradient * s.flip(0) - rate * s

        times = torch.tensor([0.0, END / 2], dtype=torch.float64)
        state = odeint(velocity, state, times, rtol=RTOL, atol=ATOL, method="dopri5")[-1]
    return (state[0] * state[1]).numpy()


def compare(alpha: float, flops: float) -> list[dict]:
    """Compare the flow in w and in mu with torchdiffeq."""
    Z, y = problem()
    loss = mf.LeastSquares(torch.from_numpy(Z), torch.from_numpy(y))
    schedule = mf.SwitchOff(alpha, END / 2)

    def flow(view, rtol=RTOL):
        return mf.flow(
            loss, mf.Hadamard(), mf.WeightDecay(), start(), schedule, END, view=view, rtol=rtol
        )

    exact = flow("mirror", 1e-12).value.numpy()
    views = ("mirror", "parameters")
    calls = {view: (lambda v=view: flow(v)) for view in views}
    seconds = measure({**calls, "torchdiffeq": lambda: by_torchdiffeq(Z, y, alpha)})
    other = by_torchdiffeq(Z, y, alpha)
    rows = []
    for view in views:
        solution = flow(view)
        floor = solution.stats.evaluations * 4 * N * D / flops
        rows.append(
            {
                "case": f"flow to t = {END:g}, 40 x 100, alpha = {alpha:g}, view={view!r}",
                "seconds": seconds[view],
                "torchdiffeq dopri5, seconds": seconds["torchdiffeq"],
                "ratio": seconds["torchdiffeq"] / seconds[view],
                "target": 10,
                "error": _distance(solution.value.numpy(), exact),
                "torchdiffeq error": _distance(other, exact),
                "evaluations": solution.stats.evaluations,
                "limit, seconds": floor,
                "limit": "two products with Z for each evaluation at the rate of a large product",
                "times the limit": seconds[view] / floor,
            }
        )
    return rows


def _distance(x, reference) -> float:
    """Return the relative distance of x from a reference."""
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def run() -> list[dict]:
    """Measure the three alphas of the paper."""
    flops = peak_flops()
    return [row for alpha in ALPHAS for row in compare(alpha, flops)]
