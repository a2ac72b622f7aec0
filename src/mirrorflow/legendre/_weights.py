r"""Weights on their flow dw = J_g^T dmu + grad h da: packed, pulled along, and integrated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import DOP853, RK45
from torch import Tensor

from ..reparam import Parameters, Reparam, factors, flatten, unflatten
from ._complex_step import ComplexStep
from .dual import Array, DualProblem, NewtonProblem

__all__ = ["RTOL", "PackedWeights", "WeightsProblem", "advance", "integrate"]

RTOL = 1e-12
# A flow that needs more evaluations before its time has doubled is about to blow up. One that grows
# from e^{-150} to 1 takes 80 for each of its 430 doublings, one that decays by e^{-600} 10,000.
MAX_EVALUATIONS = 12_000
STEPPED = 2_000  # numbers in w; beyond, complex functions cost more than going back


class PackedWeights:
    """Parameters as one tensor, and how a dual variable moves them.

    Parameters
    ----------
    g : Reparam
        The parametrization.
    like : Tensor or tuple of Tensor
        Parameters of the structure that g takes.
    elementwise : bool
        Whether factors are stacked, with any batch of coordinates behind them; else they are
        joined to one vector.
    """

    def __init__(self, g: Reparam, like: Parameters, elementwise: bool) -> None:
        self.g, self.like, self.elementwise = g, like, elementwise
        # In use since `begin`, and dropped where g refuses complex numbers or autograd disagrees.
        self._step: ComplexStep | None = None
        self._stepping = False
        self._refused = type(g).pullback is not Reparam.pullback  # a formula of its own for J^T dx

    def pack(self, w: Parameters) -> Tensor:
        """Return w as one tensor."""
        return torch.stack(factors(w)) if self.elementwise else flatten(w)

    def unpack(self, state: Tensor) -> Parameters:
        """Return the parameters that a state holds."""
        if not self.elementwise:
            return unflatten(state, self.like)
        return state[0] if isinstance(self.like, Tensor) else tuple(state.unbind(0))

    def pull(self, state: Tensor, dx: Tensor) -> Tensor:
        """Return J_g^T dx without a graph; torch.func costs three times as much as autograd."""
        if type(self.g).pullback is not Reparam.pullback:
            with torch.no_grad():
                return self.pack(self.g.pullback(self.unpack(state), dx))
        at = state.detach().requires_grad_()
        with torch.enable_grad():
            x = self.g(self.unpack(at))
            (moved,) = torch.autograd.grad(x, at, dx, materialize_grads=True)
        return moved

    def velocity(self, state: Array, shape: tuple[int, ...], dx: Tensor, along: Array) -> Array:
        """Return J_g^T dx at a state of a shape, both flat; ``along`` is dx as an array."""
        slopes = self.slopes(state)
        if slopes is not None:
            return (slopes * along).reshape(-1)  # J^T dx = (dg / dw_j) dx, factor by factor
        at = torch.from_numpy(state).reshape(shape).to(dx.dtype)
        return self.pull(at, dx).double().reshape(-1).numpy()

    def slopes(self, state: Array) -> Array | None:
        """Return dg / dw_j, stacked over j, by complex steps; None where they are not in use."""
        step = self._step
        if step is None:
            return None
        slopes = step.slopes(state.reshape(step.shape))
        self._step = None if slopes is None else step
        return slopes

    def begin(self, state: Array, shape: tuple[int, ...]) -> None:
        """Take derivatives by complex steps from a state on, if they are right there."""
        stacked = None if self._refused else self._stacked(shape)
        if stacked is None or not 0 < state.size <= STEPPED:
            self._step, self._stepping = None, False
            return
        if self._step is None or self._step.shape != stacked:
            self._step = ComplexStep(self.g, not isinstance(self.like, Tensor), stacked)
            self._stepping = True
            self.confirm(state[None])
        self.visit(state)

    def visit(self, state: Array) -> None:
        """Adapt complex steps to the size of w, which may fall by e^{-150} on the way."""
        if self._step is not None:
            self._step.adapt(state.reshape(self._step.shape))

    def confirm(self, states: Array) -> bool:
        """Return whether the derivatives since `begin` are right at all states, else drop them.

        Parameters
        ----------
        states : ndarray, shape (m, size)
            Flat states.
        """
        if not self._stepping:
            return True
        step, self._step = self._step, None
        right = step is not None and self._agrees(states, step.shape)
        self._step = step if right else None
        self._stepping, self._refused = right, not right
        return right

    def _agrees(self, states: Array, shape: tuple[int, ...]) -> bool:
        """Return whether complex steps and automatic differentiation agree at flat states."""
        pair = not isinstance(self.like, Tensor)
        if self.elementwise:  # a batch of coordinates like any other
            stacked = np.moveaxis(states.reshape(len(states), *shape), 0, 1).copy()
            step = ComplexStep(self.g, pair, stacked.shape)
            return step.agrees(
                stacked, self.pull(torch.from_numpy(stacked), step.direction).numpy()
            )
        step = ComplexStep(self.g, pair, shape)
        for state in states:
            pulled = self.pull(torch.from_numpy(state), step.direction).numpy()
            if not step.agrees(state.reshape(shape), pulled.reshape(shape)):
                return False
        return True

    def _stacked(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape (k, ...) of stacked factors like x; None where their shapes differ."""
        parts = factors(self.like)
        if any(f.dtype != torch.float64 or f.device.type != "cpu" for f in parts):
            return None
        if self.elementwise:
            return shape
        x = self.g(self.like).shape
        return (len(parts), *x) if all(f.shape == x for f in parts) else None


@dataclass(frozen=True)
class WeightsProblem(DualProblem):
    """A problem whose w can be followed along its flow, dw = J_g(w)^T dmu.

    Attributes
    ----------
    general : NewtonProblem
        The same problem by the maps of R_a, for where the flow does not arrive.
    g : Reparam
        The parametrization.
    elementwise : bool
        Whether J_g J_g^T is a diagonal.
    centre : callable
        Returns w at mu = 0 for a given a, and d mu per unit of the dual variable of a start there.
    """

    general: NewtonProblem
    g: Reparam
    elementwise: bool
    centre: Callable[[float], tuple[Parameters, float]]

    @property
    def Z(self) -> Array:  # type: ignore[override] - a field there, read off `general` here
        """The measurements (n, d)."""
        return self.general.Z

    def expand(self, x: Array) -> Array:
        """Return x itself."""
        return x


def integrate(
    velocity: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    state: Tensor,
    extra: Tensor,
    rtol: float = RTOL,
    own_scale: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Integrate (state, extra) over unit time; return None where the solution ends before.

    The absolute tolerance is as in `advance`; with ``own_scale`` it follows every entry.
    """
    size = state.numel()

    def split(flat: Array) -> tuple[Tensor, Tensor]:
        both = torch.from_numpy(flat)
        return both[:size].reshape(state.shape), both[size:].reshape(extra.shape)

    def rhs(flat: Array) -> Array:
        return _joined(*velocity(*split(flat)))

    start = _joined(state.detach().to(torch.float64), extra.to(torch.float64))
    end = advance(rhs, start, None if own_scale else tuple(state.shape), rtol)
    if end is None:
        return None
    state_end, extra_end = split(end)
    return state_end.to(state.dtype), extra_end.to(state.dtype)


def advance(
    rhs: Callable[[Array], Array],
    start: Array,
    shape: tuple[int, ...] | None,
    rtol: float = RTOL,
    rough: bool = False,
    weights: PackedWeights | None = None,
) -> Array | None:
    """Integrate dy = rhs(y) over unit time; return None where the solution ends before.

    y begins with weights of a shape, of which the absolute tolerance follows the size coordinate by
    coordinate, so that a factor that is 0 next to one that has decayed to e^{-150} is accurate
    relative to that one. What comes after them has a size of 1 or more. Without a shape, the
    tolerance follows the size of every entry by itself. ``rough`` takes a method of order 5, which
    costs less where few digits are wanted. Derivatives that ``weights`` takes by complex steps are
    compared with automatic differentiation after every step; where they differ, all begins anew.
    """
    size = 0 if shape is None else math.prod(shape)
    if weights is not None and shape is not None:
        weights.begin(start[:size], shape)
    visited = [start[:size]]
    method = RK45 if rough else DOP853

    def atol(y: Array) -> Any:  # SciPy takes an array as well
        if shape is None:
            return rtol * 1e-2 * (np.abs(y) + 1e-300)  # rtol decides, but for entries that are 0
        return rtol * 1e-2 * _sizes(y, rhs, shape)

    with np.errstate(all="ignore"), torch.no_grad():
        solver = method(lambda _, y: rhs(y), 0.0, start, 1.0, rtol=rtol, atol=atol(start))
        done, spent = 0.0, 0
        while solver.status == "running" and solver.nfev < spent + MAX_EVALUATIONS:
            solver.step()
            # SciPy fixes atol at the start; weights may fall by e^{-150} on the way.
            solver.atol = atol(solver.y)
            if weights is not None:
                visited.append(solver.y[:size].copy())
                weights.visit(visited[-1])
            if solver.t > 2 * done:  # the time has doubled: another allowance
                done, spent = solver.t, solver.nfev
    if weights is not None and not weights.confirm(np.array(visited)):
        return advance(rhs, start, shape, rtol, rough, weights)
    if solver.status != "finished" or not np.isfinite(solver.y).all():
        return None
    return solver.y.copy()


def _sizes(y: Array, rhs: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """Return the size of every entry: the largest factor's, and 1 or more behind the weights."""
    size = int(np.prod(shape))
    now, scale = y[:size].reshape(shape), np.maximum(np.abs(y), 1.0)
    largest = np.abs(now).max(0, keepdims=True, initial=0.0)
    if not largest.all():  # a start at 0 has the scale of its velocity
        largest = np.where(largest > 0, largest, np.abs(rhs(y)[:size].reshape(shape))) + 1e-280
    scale[:size] = np.broadcast_to(largest, shape).reshape(-1)
    return scale


def _joined(state: Tensor, extra: Tensor) -> Array:
    """Join two tensors to one NumPy vector."""
    return torch.cat([state.reshape(-1), extra.reshape(-1)]).numpy()
