r"""End points of pairs without a closed form, by integrating w along its flow."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from ..legendre._weights import PackedWeights, WeightsProblem, advance
from ..reparam import Parameters, Reparam, factors, flatten
from ._constraints import Constraints, length
from ._continuation import GOOD, DualPoint

__all__ = ["solve_by_weights"]

Array = NDArray[np.float64]
ROUGH, TIGHT = 1e-4, 1e-11  # of the way to theta: tight where Newton's method fails after rough
POLISH = 12  # Newton steps from there
SETTLED = 1e-13  # residual that a step more does not improve
NEAR = 5e-3  # relative change of w up to which four stages of Runge and Kutta follow the flow
CLOSE, TURNED = 1e-3, 1e-2  # relative: states near each other, entries of velocities that count
HALVINGS = 30  # of the way between two states, at the end of which they are one
FEW = 12  # rows up to which one backward pass for each is faster than torch.func's batching
(posv,) = get_lapack_funcs(("posv",), dtype=np.float64)


def solve_by_weights(
    problem: WeightsProblem, constraints: Constraints, a: float
) -> DualPoint | None:
    r"""Solve Q x = b along a straight line of targets from the centre x_c.

    None if the integration does not arrive. Where w comes to an edge at which its velocity turns
    round, as at u = 0 for x = ``|u|``, the flow leaves the domain of R_a: the point is the edge's.

    The dual variable and the weights follow

    .. math:: d\theta = (Q J J^T Q^T)^{-1} (b - Q x_c)\,ds, \qquad dw = J^T Q^T d\theta, \quad
              0 \le s \le 1,

    so that w stays w(Q^T theta, a), and Q x = Q x_c + s (b - Q x_c). That needs the first digits
    of theta only: w is then integrated to all digits along the straight line from 0 to Q^T theta,
    without linear systems, and Newton's method does the rest.
    """
    w, clock = problem.centre(a)
    weights = _Weights(w, problem.g, constraints.Q, problem.elementwise)
    start = weights.pack(w).double()
    gap = constraints.b - constraints.Q @ weights.x(start)  # b - Q x_c, which s in [0, 1] goes
    for rtol in (ROUGH, TIGHT):
        theta = weights.reach(start, gap, rtol)
        found = None if theta is None else weights.polish(start, theta, constraints.b)
        if found is not None:
            x, theta, residual, steps = found
            dual = clock * theta  # theta counts in mu from w(0, a); d nu = clock dmu
            return DualPoint(x, dual, -dual, residual, steps=steps, vertex=False)
        if weights.edge is not None:
            return weights.at_edge(constraints.b, clock)
    return None


class _Weights:
    """The directions in which w can move x along the rows Q, at any w."""

    def __init__(self, like: Parameters, g: Reparam, Q: Array, elementwise: bool) -> None:
        self.g, self.Q, self.elementwise = g, Q, elementwise
        self.packed = PackedWeights(g, like, elementwise)
        self.shape, self.dtype = g(like).shape, factors(like)[0].dtype
        self.rows = torch.from_numpy(Q).to(self.dtype).reshape(len(Q), *self.shape)
        self.ones = torch.ones(self.shape, dtype=self.dtype)
        self.edge: tuple[Tensor, Array] | None = None  # w and theta where the velocity jumps
        self.pack = self.packed.pack

    def x(self, state: Tensor) -> Array:
        """Return x at a state, flattened."""
        x = self.g(self.packed.unpack(state.to(self.dtype)))
        return x.detach().reshape(-1).numpy().astype(np.float64)

    def reach(self, start: Tensor, gap: Array, rtol: float) -> Array | None:
        """Return theta where Q x has moved by ``gap``, about; None where w ends before."""
        size = start.numel()
        last: list[tuple[Array, Array]] = []
        y = np.concatenate([start.reshape(-1).numpy(), np.zeros(len(gap))])

        def rhs(flat: Array) -> Array:
            if np.array_equal(flat, y):  # the integration begins, perhaps anew
                self.edge = None
                last.clear()
            state = torch.from_numpy(flat[:size]).reshape(start.shape)
            dw, dtheta = self.solve(state, gap)
            here = flat[:size].copy(), dw
            if self.edge is None and last and self._jumps(last.pop(), here, state, gap):
                self.edge = state.clone(), flat[size:].copy()
            last[:] = [here]
            if self.edge is not None:
                return np.full_like(flat, np.nan)  # at which the integration stops
            return np.concatenate([dw, dtheta])

        end = advance(rhs, y, tuple(start.shape), rtol, rtol == ROUGH, self.packed)
        return None if end is None else end[size:]

    def _jumps(
        self, one: tuple[Array, Array], other: tuple[Array, Array], like: Tensor, gap: Array
    ) -> bool:
        """Return whether the velocity turns round between two states, however near they come."""
        if not length(one[0] - other[0]) <= CLOSE * length(one[0]) or not _turned(one, other):
            return False
        for _ in range(HALVINGS):
            # Close together a smooth velocity has one sign; across a jump one half still turns.
            w = (one[0] + other[0]) / 2
            middle = w, self.solve(torch.from_numpy(w).reshape(like.shape), gap)[0]
            if _turned(one, middle):
                other = middle
            elif _turned(middle, other):
                one = middle
            else:
                return False
        return True

    def at_edge(self, b: Array, clock: float) -> DualPoint:
        """Return the point where w came to an edge."""
        assert self.edge is not None
        x, dual = self.x(self.edge[0]), clock * self.edge[1]
        residual = length(b - self.Q @ x) / (length(b) or 1.0)
        return DualPoint(x, dual, -dual, residual, steps=0, vertex=False, left=True)

    def polish(
        self, start: Tensor, theta: Array, b: Array
    ) -> tuple[Array, Array, float, int] | None:
        """Return x, theta, the residual and Newton's steps, from a theta that is nearly right."""
        state, last, unit = self.follow(start, theta), np.inf, length(b) or 1.0
        for k in range(POLISH):
            if state is None:
                return None
            x = self.x(state)
            gap = b - self.Q @ x
            residual = length(gap) / unit
            # Newton's method squares residuals until rounding stops it.
            if residual < SETTLED or (residual < GOOD and residual > 0.3 * last):
                right = self.packed.confirm(state.reshape(1, -1).numpy())
                return (x, theta, residual, k) if right else None
            if not residual < 2 * last:
                return None
            dw, dtheta = self.solve(state, gap)
            size = float(state.abs().max())
            near = float(np.abs(dw).max(initial=0.0)) < NEAR * size
            state = self.step(state, dtheta) if near else self.follow(state, dtheta)
            theta, last = theta + dtheta, residual
        return None

    def solve(self, state: Tensor, gap: Array) -> tuple[Array, Array]:
        """Return dw = J^T Q^T dtheta and dtheta = (Q J J^T Q^T)^{-1} gap."""
        slopes = self.packed.slopes(state.numpy())
        state = state.to(self.dtype)
        if slopes is None and self.elementwise:
            slopes = self.packed.pull(state, self.ones).numpy()
        if slopes is not None:
            # d g_i / d w_ij, a row for each factor j; their squares sum to (J J^T)_ii.
            slopes = slopes.reshape(-1, self.Q.shape[1])
            dtheta = _solve((self.Q * (slopes * slopes).sum(0)) @ self.Q.T, gap)
            return (slopes * (dtheta @ self.Q)).reshape(-1), dtheta  # dw = J^T Q^T dtheta
        K = self._pulled_rows(self.packed.unpack(state)).numpy()  # K = Q J
        dtheta = _solve(K @ K.T, gap)
        return dtheta @ K, dtheta

    def follow(self, state: Tensor, dtheta: Array) -> Tensor | None:
        """Integrate dw = J^T Q^T dtheta along a straight line; None where w ends before."""
        dmu, shape = self._moved(dtheta), tuple(state.shape)
        along = dmu.double().numpy()

        def rhs(flat: Array) -> Array:
            return self.packed.velocity(flat, shape, dmu, along)

        end = advance(rhs, state.reshape(-1).numpy(), shape, weights=self.packed)
        return None if end is None else torch.from_numpy(end).reshape(shape)

    def step(self, state: Tensor, dtheta: Array) -> Tensor:
        """Take one step of Runge and Kutta's method of order 4 along the same line."""
        dmu = self._moved(dtheta)
        one = self._pull(state, dmu)
        two = self._pull(state + one / 2, dmu)
        three = self._pull(state + two / 2, dmu)
        four = self._pull(state + three, dmu)
        return state + (one + 2 * two + 2 * three + four) / 6

    def _moved(self, dtheta: Array) -> Tensor:
        """Return Q^T dtheta with the shape of x."""
        return torch.from_numpy(dtheta @ self.Q).to(self.dtype).reshape(self.shape)

    def _pull(self, state: Tensor, dmu: Tensor) -> Tensor:
        """Return J^T dmu at a state, in float64."""
        flat, along = state.reshape(-1).numpy(), dmu.double().numpy()
        moved = self.packed.velocity(flat, tuple(state.shape), dmu, along)
        return torch.from_numpy(moved).reshape(state.shape)

    def _pulled_rows(self, w: Parameters) -> Tensor:
        """Return Q J, one row for each row of Q."""
        if type(self.g).pullback is not Reparam.pullback:
            return torch.func.vmap(lambda row: flatten(self.g.pullback(w, row)))(self.rows)
        parts = tuple(f.detach().requires_grad_() for f in factors(w))
        with torch.enable_grad():
            x = self.g(parts[0] if isinstance(w, Tensor) else parts)
            if len(self.rows) <= FEW:
                each = [
                    torch.autograd.grad(x, parts, row, retain_graph=True, materialize_grads=True)
                    for row in self.rows
                ]
                return torch.stack([flatten(pulled) for pulled in each])
            pulled = torch.autograd.grad(x, parts, self.rows, is_grads_batched=True)
        return torch.cat([p.reshape(len(self.Q), -1) for p in pulled], dim=1)


def _turned(one: tuple[Array, Array], other: tuple[Array, Array]) -> bool:
    """Return whether the velocities at two states have opposite signs where they are not small."""
    least = TURNED * np.abs(one[1]).max(initial=0.0)
    size = np.minimum(np.abs(one[1]), np.abs(other[1]))
    return bool(((one[1] * other[1] < 0) & (size > least)).any())


def _solve(gram: Array, gap: Array) -> Array:
    """Return gram^{-1} gap; NaN, at which an integration stops, where gram is singular."""
    _, step, failed = posv(gram, gap)
    return step if failed == 0 else np.full_like(gap, np.nan)
