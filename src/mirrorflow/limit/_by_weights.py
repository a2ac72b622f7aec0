r"""End points of pairs without a closed form, by one integration of w along its flow."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from ..legendre.numerical import WeightsProblem, integrate
from ..reparam import (
    Parameters,
    Reparam,
    detached_pullback,
    factors,
    flatten,
    unflatten,
)
from ._constraints import Constraints, length
from ._continuation import GOOD, DualPoint

__all__ = ["solve_by_weights"]

Array = NDArray[np.float64]
RTOL = 1e-11  # of an integrator of order 8 that errs on the safe side: x is right to 1e-13
POLISH = 2  # Newton steps for what integration left over
(posv,) = get_lapack_funcs(("posv",), dtype=np.float64)


def solve_by_weights(
    problem: WeightsProblem, constraints: Constraints, a: float
) -> DualPoint | None:
    r"""Solve Q x = b along a straight line of targets from the centre x_c.

    None if the integration does not arrive.

    The dual variable and the weights follow

    .. math:: d\theta = (Q J J^T Q^T)^{-1} (b - Q x_c)\,ds, \qquad dw = J^T Q^T d\theta, \quad
              0 \le s \le 1,

    so that w stays w(Q^T theta, a), and Q x = Q x_c + s (b - Q x_c). One integration replaces an
    integration from w0 for every trial of Newton's method.
    """
    w, clock = problem.centre(a)
    bundle = _Bundle(w, problem.g, constraints.Q, problem.elementwise)
    start = bundle.pack(w)
    gap = constraints.b - constraints.Q @ bundle.x(start)
    theta0 = torch.zeros(len(gap), dtype=torch.float64)
    moved = integrate(lambda state, _: bundle.move(state, gap), start.double(), theta0, RTOL)
    if moved is None:
        return None
    state, theta = _polished(bundle, *moved, constraints.b)
    x = bundle.x(state)
    residual = length(constraints.b - constraints.Q @ x) / (length(constraints.b) or 1.0)
    if not residual < GOOD:
        return None
    dual = clock * theta.numpy()
    return DualPoint(x, dual, -dual, residual, steps=POLISH, vertex=False)


class _Bundle:
    """The directions in which w can move x along the rows Q, at any w."""

    def __init__(self, like: Parameters, g: Reparam, Q: Array, elementwise: bool) -> None:
        self.like, self.g, self.elementwise = like, g, elementwise
        self.Q, self.shape, self.dtype = Q, g(like).shape, factors(like)[0].dtype
        self.rows = torch.from_numpy(Q).to(self.dtype).reshape(len(Q), *self.shape)
        self.ones = torch.ones(self.shape, dtype=self.dtype)

    def pack(self, w: Parameters) -> Tensor:
        """Return w as one tensor: factors stacked if g is elementwise, else joined."""
        return torch.stack(factors(w)) if self.elementwise else flatten(w)

    def unpack(self, state: Tensor) -> Parameters:
        """Return the parameters that a state holds, in the dtype of g."""
        state = state.to(self.dtype)
        if not self.elementwise:
            return unflatten(state, self.like)
        return state[0] if isinstance(self.like, Tensor) else tuple(state.unbind(0))

    def x(self, state: Tensor) -> Array:
        """Return x at a state, flattened."""
        return self.g(self.unpack(state)).detach().reshape(-1).numpy().astype(np.float64)

    def move(self, state: Tensor, gap: Array) -> tuple[Tensor, Tensor]:
        """Return dw = J^T Q^T dtheta and dtheta = (Q J J^T Q^T)^{-1} gap."""
        if self.elementwise:
            pulled = detached_pullback(self.g, self.unpack(state), self.ones)
            slopes = self.pack(pulled).numpy().reshape(len(factors(pulled)), -1)
            step = _solve((self.Q * (slopes * slopes).sum(0)) @ self.Q.T, gap)
            dw = (slopes * (step @ self.Q)).reshape(state.shape)
        else:
            K = self._pulled_rows(self.unpack(state)).numpy()
            step = _solve(K @ K.T, gap)
            dw = step @ K
        return torch.from_numpy(dw), torch.from_numpy(step)

    def _pulled_rows(self, w: Parameters) -> Tensor:
        """Return Q J, one row for each row of Q."""
        if type(self.g).pullback is not Reparam.pullback:
            return torch.func.vmap(lambda row: flatten(self.g.pullback(w, row)))(self.rows)
        parts = tuple(f.detach().requires_grad_() for f in factors(w))
        with torch.enable_grad():
            x = self.g(parts[0] if isinstance(w, Tensor) else parts)
            pulled = torch.autograd.grad(x, parts, self.rows, is_grads_batched=True)
        return torch.cat([p.reshape(len(self.Q), -1) for p in pulled], dim=1)


def _solve(gram: Array, gap: Array) -> Array:
    """Return gram^{-1} gap; NaN, at which an integration stops, where gram is singular."""
    _, step, failed = posv(gram, gap)
    return step if failed == 0 else np.full_like(gap, np.nan)


def _polished(bundle: _Bundle, state: Tensor, theta: Tensor, b: Array) -> tuple[Tensor, Tensor]:
    """Return (w, theta) after Newton steps, so short that Heun's rule follows the flow of w."""
    for _ in range(POLISH):
        gap = b - bundle.Q @ bundle.x(state)
        dw, dtheta = bundle.move(state, gap)
        then, _ = bundle.move(state + dw, gap)
        state, theta = state + (dw + then) / 2, theta + dtheta
    return state, theta
