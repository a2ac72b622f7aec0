"""One integrator for the flows of parameters behind `Inversion`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.integrate import DOP853
from torch import Tensor

__all__ = ["integrate"]

RTOL = 1e-12
# A flow that needs more evaluations before its time has doubled is about to blow up. One that grows
# from e^{-150} to 1 takes 80 for each of its 430 doublings, one that decays by e^{-600} 10,000.
MAX_EVALUATIONS = 12_000


def integrate(
    velocity: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    state: Tensor,
    extra: Tensor,
    rtol: float = RTOL,
    own_scale: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Integrate (state, extra) over unit time; None if there is no solution.

    The absolute tolerance follows the size of w coordinate by coordinate, so that a factor that is
    0 next to one that has decayed to e^{-150} is accurate relative to that one; with ``own_scale``
    it follows every entry by itself.
    """
    size = state.numel()

    def split(flat: np.ndarray) -> tuple[Tensor, Tensor]:
        both = torch.from_numpy(flat)
        return both[:size].reshape(state.shape), both[size:].reshape(extra.shape)

    def rhs(_: float, flat: np.ndarray) -> np.ndarray:
        return _joined(*velocity(*split(flat)))

    start = _joined(state.detach().to(torch.float64), extra.to(torch.float64))

    def tolerance(flat: np.ndarray) -> np.ndarray:
        if own_scale:
            return rtol * 1e-2 * (np.abs(flat) + 1e-300)
        now, more = split(flat)
        scale = now.abs().amax(0, keepdim=True).expand_as(now)
        if not scale.all():  # a start at 0 has the scale of its velocity
            scale = torch.where(scale > 0, scale, split(rhs(0.0, flat))[0].abs()) + 1e-280
        return rtol * 1e-2 * _joined(scale, more.abs().clamp(min=1))

    with np.errstate(all="ignore"), torch.no_grad():
        atol: Any = tolerance(start)  # SciPy takes an array too
        solver = DOP853(rhs, 0.0, start, 1.0, rtol=rtol, atol=atol)
        done, spent = 0.0, 0
        while solver.status == "running" and solver.nfev < spent + MAX_EVALUATIONS:
            solver.step()
            solver.atol = tolerance(solver.y)
            if solver.t > 2 * done:
                done, spent = solver.t, solver.nfev
    if solver.status != "finished" or not np.isfinite(solver.y).all():
        return None
    state_end, extra_end = split(solver.y.copy())
    return state_end.to(state.dtype), extra_end.to(state.dtype)


def _joined(state: Tensor, extra: Tensor) -> np.ndarray:
    """Join two tensors to one NumPy vector."""
    return torch.cat([state.reshape(-1), extra.reshape(-1)]).numpy()
