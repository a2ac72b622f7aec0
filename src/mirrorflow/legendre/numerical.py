r"""R_a of any commuting pair, a user's own included, by integrating w along its flow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..regularizer import Regularizer, detached_gradient
from ..reparam import Parameters, Reparam, factors, flatten
from ._weights import RTOL, PackedWeights, WeightsProblem, advance, integrate
from .base import LegendreFunction, RangeError, Scalar, checked
from .dual import Array, NewtonProblem

__all__ = ["Inversion"]

RANGE_RTOL = 1e-10
CHECKED = 1e-10  # of the integration that an end point is compared with
FAINTEST = 1e-300  # |w| at which float64 ends
SMALLEST = 1e-70  # |w| from which x can be reached
EFOLDS = 10.0  # what |w| or |J| changes by between two looks at the end of a range


class Inversion(LegendreFunction):
    r"""R_a of a commuting pair without a closed form.

    The parameters w(mu, a) solve dw = J_g(w)^T dmu + grad h(w) da along any path from (0, 0), which
    is why the pair has to commute. Then primal = g(w), and d primal / d mu = J_g J_g^T; the mirror
    map integrates dw = J_g^T (J_g J_g^T)^{-1} dx along a straight line in x from the centre, and
    ends with Newton steps; the conjugate is the integral of g(w) dmu + h(w) da. All maps can be
    differentiated any number of times.

    Parameters
    ----------
    g, h : Reparam, Regularizer
        The pair; `legendre` checks that it commutes.
    w0 : Tensor or tuple of Tensor
        The start.

    Notes
    -----
    If both are elementwise, R_a is a sum over coordinates and batches are integrated together;
    otherwise each step solves a d x d system, for d up to a few hundred.
    """

    integrates_weights = True

    def __init__(self, g: Reparam, h: Regularizer, w0: Parameters) -> None:
        self.g, self.h, self.w0 = g, h, w0
        self.elementwise = g.elementwise and h.elementwise
        self.packed = PackedWeights(g, w0, self.elementwise)
        x0 = g(w0)
        self.shape, self.dtype = x0.shape, x0.dtype

    # The state: factors stacked (elementwise), or joined to one vector (dense).

    def _start(self, shape: torch.Size) -> Tensor:
        """Return w0 as a state, for a batch of the given shape."""
        if not self.elementwise:
            return flatten(self.w0)
        return torch.stack([f.expand(shape) for f in factors(self.w0)])

    def _unpack(self, state: Tensor) -> Parameters:
        return self.packed.unpack(state)

    def _pack(self, w: Parameters) -> Tensor:
        return self.packed.pack(w)

    # The geometry at a state: J^T, J, grad h and J J^T.

    def _pull(self, state: Tensor, dmu: Tensor) -> Tensor:
        return self._pack(self.g.pullback(self._unpack(state), dmu))

    def _push(self, state: Tensor, change: Tensor) -> Tensor:
        return self.g.pushforward(self._unpack(state), self._unpack(change))

    def _decay(self, state: Tensor) -> Tensor:
        return self._pack(self.h.gradient(self._unpack(state), self.g))

    def _gram(self, state: Tensor) -> Tensor:
        """Return J J^T: its diagonal if elementwise, else a matrix."""
        if self.elementwise:
            # J^T 1 holds d g / d w_ij; its squares over the factors j are (J J^T)_ii.
            return (self._pull(state, torch.ones_like(state[0])) ** 2).sum(0)
        J = torch.func.jacrev(lambda s: self.g(self._unpack(s)).reshape(-1))(state)
        return J @ J.mT

    def _solve(self, state: Tensor, dx: Tensor) -> Tensor:
        """Return (J J^T)^{-1} dx."""
        if self.elementwise:
            return dx / self._gram(state)
        return torch.linalg.solve(self._gram(state), dx.reshape(-1)).reshape(dx.shape)

    # The maps.

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return g(w(mu, a))."""
        return self.g(self._unpack(self._flow(mu, a)))

    def weights(self, mu: Tensor, a: Scalar) -> Parameters:
        """Return w(mu, a), with the structure of w0."""
        return self._unpack(self._flow(mu, a))

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Invert `primal` along a straight line in x; `RangeError` outside the domain."""
        return self._inverse(x, a)[0]

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return (J J^T)^{-1} at w: the diagonal if elementwise, else a (d, d) matrix."""
        gram = self._gram(self._inverse(x, a)[1])
        return 1 / gram if self.elementwise else torch.linalg.inv(gram)

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        r"""Integrate <g(w), dmu> + h(w) da along a straight line from (0, 0)."""
        checked(self, "mu", mu, a)
        if mu.ndim == len(self.shape):
            return _Conjugate.apply(mu, torch.as_tensor(a, dtype=mu.dtype), self)  # pyright: ignore
        rows = torch.as_tensor(a, dtype=mu.dtype).expand(mu.shape)
        flat = rows.reshape(len(mu), -1)[:, 0]
        return torch.stack([self.conjugate(m, ai) for m, ai in zip(mu, flat, strict=True)])

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Follow every coordinate both ways at fixed a, and see where its mu goes."""
        if not self.elementwise:
            raise RangeError(f"the range of mu is not known per coordinate: {self._reason()}")
        lower, upper = self._ends(a).to(self.dtype)
        return lower, upper

    def folded(self, a: Scalar, tilt: Scalar = 0.0) -> LegendreFunction:
        """Return R_a(x) - <tilt, x>, up to a constant, from the start w(tilt, a)."""
        if not self.elementwise:
            return super().folded(a, tilt)  # which raises
        mu = torch.as_tensor(tilt, dtype=self.dtype).expand(self.shape)
        return Inversion(self.g, self.h, self._unpack(self._flow(mu, a).detach()))

    def shrunk(self, a: Scalar) -> tuple[Inversion, float]:
        """Return the R_0 of a start from e^a w0, and ``|w|^2 / 2`` there."""
        scale = torch.exp(torch.as_tensor(a, dtype=self.dtype))
        parts = tuple(scale * f for f in factors(self.w0))
        w = parts[0] if isinstance(self.w0, Tensor) else parts
        return Inversion(self.g, self.h, w), float(sum((f * f).sum() for f in parts)) / 2

    def dual_problem(self, Z: Array) -> WeightsProblem:
        """Return the problem whose w can be followed from w(0, a)."""

        def centre(a: float) -> tuple[Parameters, float]:
            return self.weights(torch.zeros(self.shape, dtype=self.dtype), a), 1.0

        general = super().dual_problem(Z)
        assert isinstance(general, NewtonProblem)
        return WeightsProblem(general, self.g, self.elementwise, centre)

    def rescaled_problem(self, general: NewtonProblem, degree: float) -> WeightsProblem:
        """Return the problem whose w can be followed from e^a w0, on the clock e^{(k-2) a}."""

        def centre(a: float) -> tuple[Parameters, float]:
            parts = tuple(math.exp(a) * f for f in factors(self.w0))
            w = parts[0] if isinstance(self.w0, Tensor) else parts
            return w, math.exp((degree - 2) * a)  # d nu = e^{(k-2) a} dmu: beyond.md, line 3

        return WeightsProblem(general, self.g, self.elementwise, centre)

    def kkt_residual(self, x: Tensor, mu: Tensor, a: Scalar) -> float:
        """Return |x - primal(mu, a)| / |x|, down to `CHECKED`: `mirror` costs more than x."""
        mu = self.g.project(mu)
        state = self._moved(self._start(mu.shape), mu, self._spread(a, mu), CHECKED)
        if state is None:
            return np.inf
        unit = x.abs().max().clamp(min=1e-300)
        image = self.g(self._unpack(state))
        return float(((x - image) / unit).norm() / (x / unit).norm().clamp(min=1e-300))

    def _flow(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return the state w(mu, a), differentiable."""
        self._check("mu", mu, a)
        return _Flow.apply(mu, self._spread(a, mu), self)  # pyright: ignore

    def _inverse(self, x: Tensor, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return mu and the state w at g(w) = x, differentiable."""
        self._check("x", x, a)
        return _Inverse.apply(x, self._spread(a, x), self)  # pyright: ignore

    def _check(self, name: str, argument: Tensor, a: Scalar) -> None:
        """Check the argument of a map; coordinates that share parameters come one x at a time."""
        checked(self, name, argument, a)
        if not self.elementwise and argument.shape != self.shape:
            one, got = tuple(self.shape), tuple(argument.shape)
            raise ValueError(
                f"{name} must have shape {one}, without a batch, got {got}: {self._reason()}"
            )

    def _reason(self) -> str:
        """Return why R_a is not a sum over coordinates."""
        return (self.h if self.g.elementwise else self.g).why_not_elementwise()

    def _spread(self, a: Scalar, like: Tensor) -> Tensor:
        """Return a as a tensor: one number per coordinate if elementwise, else one number."""
        value = torch.as_tensor(a, dtype=like.dtype)
        return value.expand(like.shape) if self.elementwise else value.reshape(())

    def _ends(self, a: Scalar) -> Tensor:
        """Return the limits of mu on both sides, stacked; all coordinates in one integration.

        The clock of each coordinate makes w and J change at most at unit rate relative to their
        size, so that nothing becomes singular, whatever blows up or dies; mu then converges like a
        geometric sequence, or not at all.
        """
        at = torch.as_tensor(a, dtype=torch.float64)
        shape = torch.broadcast_shapes(self.shape, at.shape)
        centre = self._centre(at, shape)
        side = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, *[1] * len(shape))
        state = torch.stack([centre, centre], dim=1).to(torch.float64)
        floor = torch.linalg.vector_norm(state, dim=0)
        floor = torch.where(floor > 0, floor, 1.0)

        def velocity(s: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            slope, turn = self._bend(s)
            dmu = side * (torch.linalg.vector_norm(s, dim=0) + floor)
            # |dw| = |J^T| |dmu| is |w|, and its size at the centre on top, per unit of the clock.
            dmu = dmu / torch.linalg.vector_norm(slope, dim=0)
            # EFOLDS times the smaller of that and 1 / turn, in which |J| changes by itself.
            dmu = EFOLDS * dmu / torch.hypot(turn * dmu, torch.ones_like(dmu))
            return slope * dmu, dmu / unit

        unit = torch.ones_like(floor)
        unit = velocity(state, floor)[1].abs()  # mu may be of any size
        marks = [unit / unit]  # 1: the tolerance of what follows the weights has that size
        for _ in range(3):
            moved = integrate(velocity, state, marks[-1], RANGE_RTOL, own_scale=True)
            if moved is None:
                raise RangeError(f"the range of mu at a = {a} cannot be found for {self.g}")
            state, mu = moved
            marks.append(mu)
        # A geometric sequence: what is left after ``late`` is late (shrink + shrink^2 + ...).
        late = marks[3] - marks[2]
        shrink = late / (marks[2] - marks[1])
        end = marks[3] - marks[0] + late * shrink / (1 - shrink)
        return unit * torch.where(shrink < 0.7, end, side * torch.inf)  # ratios near 1: no end

    def _bend(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return J^T and |dJ / dmu| / |J| of an elementwise pair."""
        with torch.enable_grad():
            at = state.detach().requires_grad_()
            (slope,) = torch.autograd.grad(
                self.g(self._unpack(at)).sum(), at, create_graph=True, materialize_grads=True
            )
            if not slope.requires_grad:  # a linear g
                return slope, torch.zeros_like(slope[0])
            # d|J| / dmu = <grad_w |J|, J^T> <= |grad_w |J|| |J|, with grad |J|^2 = 2 |J| grad |J|.
            square = (slope * slope).sum(0)
            (half,) = torch.autograd.grad(square.sum(), at, materialize_grads=True)
        return slope.detach(), torch.linalg.vector_norm(half, dim=0) / (2 * square.detach().sqrt())

    def _centre(self, a: Tensor, shape: torch.Size) -> Tensor:
        """Return w(0, a), where R_a is smallest."""
        zero = torch.zeros(shape, dtype=self.dtype)
        moved = self._moved(self._start(shape), zero, a.expand(shape))
        if moved is None:
            raise RangeError(
                f"a = {a.tolist()}: decay takes w0 out of the domain of {self.g}, or below the "
                "numbers that float64 can follow"
            )
        return moved

    def _move(self, state: Tensor, dmu: Tensor, da: Scalar) -> Tensor:
        """Integrate dw = J^T dmu + grad h da from a state; `RangeError` if it has no end."""
        moved = self._moved(state, dmu, da)
        if moved is None:
            raise RangeError(self._out_of_range(dmu, da))
        return moved

    def _moved(self, state: Tensor, dmu: Tensor, da: Scalar, rtol: float = RTOL) -> Tensor | None:
        """Integrate dw = J^T dmu + grad h da from a state; return None where w ends before."""
        pulls, decays = bool((dmu != 0).any()), bool((torch.as_tensor(da) != 0).any())
        if not pulls:
            alone = self.h.followed(self._unpack(state), da)  # a formula, as e^a w for weight decay
            if alone is not None:
                moved = self._pack(alone)
                return moved if _held(state, moved) else None

        shape, dmu = tuple(state.shape), dmu.detach().double()
        along = dmu.numpy()
        rate = torch.as_tensor(da).detach().numpy()

        def velocity(flat: Array) -> Array:
            moved = self.packed.velocity(flat, shape, dmu, along) if pulls else np.zeros_like(flat)
            if decays:  # dw = J^T dmu + grad h da
                moved = moved + (rate * self._flat_decay(flat, shape)).reshape(-1)
            return moved

        start = state.detach().to(torch.float64).reshape(-1).numpy()
        end = advance(velocity, start, shape, rtol, weights=self.packed)
        return None if end is None else torch.from_numpy(end).reshape(state.shape).to(state.dtype)

    def _flat_decay(self, flat: Array, shape: tuple[int, ...]) -> Array:
        """Return grad h at a flat state, with its shape."""
        w = self._unpack(torch.from_numpy(flat).reshape(shape))
        decay = detached_gradient(self.h, w, self.g)
        return flat.reshape(shape) if decay is w else self._pack(decay).numpy()  # |w|^2 / 2: w

    def _move_to(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integrate straight from g(w) to x at fixed a; return w and the change of mu."""
        dx = x - self.g(self._unpack(state))

        def velocity(s: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            dmu = self._solve(s, dx)  # (J J^T)^{-1} dx, so that J dw = dx
            return self._pull(s, dmu), dmu

        moved = integrate(velocity, state, torch.zeros_like(x))
        if moved is None and float(state.abs().max()) < SMALLEST:
            raise RangeError(
                f"the mirror of x cannot be found: w starts below {SMALLEST:.0e}, where the square "
                "of J loses its digits"
            )
        if moved is None:
            raise RangeError(
                "x is outside the domain of R_a: no w that the flow reaches from w0 has g(w) = x"
            )
        return moved

    def _out_of_range(self, mu: Tensor, a: Scalar) -> str:
        """Return that w(mu, a) does not exist, and why where that is known."""
        if not self.elementwise or mu.numel() > 16 or mu.shape != self.shape:
            return f"w(mu, a) does not exist at a = {a}: the flow of {self.g} ends before it"
        try:
            lower, upper = self.range(a)
        except RangeError as error:
            return str(error)
        return f"mu = {mu.tolist()} is outside the range ({lower.tolist()}, {upper.tolist()})"


class _Flow(torch.autograd.Function):
    """The state w(mu, a), with dw = J^T dmu + grad h da at the saved output."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, a: Tensor, R: Inversion) -> Tensor:
        state = R._move(R._start(mu.shape), mu, a)
        ctx.save_for_backward(state)
        ctx.R = R
        return state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (state,), R = ctx.saved_tensors, ctx.R
        along = R._decay(state) * grads[0]  # <v, dw> = <J v, dmu> + <v, grad h> da
        return R._push(state, grads[0]), along.sum(0) if R.elementwise else along.sum(), None


class _Inverse(torch.autograd.Function):
    """(mu, w) at g(w) = x: dmu = (J J^T)^{-1} (dx - J grad h da), dw = J^T dmu + grad h da."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, R: Inversion) -> tuple[Tensor, Tensor]:
        state = R._move(R._start(x.shape), torch.zeros_like(x), a)
        state, mu = R._move_to(state, x)
        for _ in range(2):  # Newton: what integration left over
            step = R._solve(state, x - R.g(R._unpack(state)))
            state, mu = R._move(state, step, 0.0), mu + step
        ctx.save_for_backward(state)
        ctx.R = R
        return mu, state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (state,), R = ctx.saved_tensors, ctx.R
        # <v_mu, dmu> + <v_w, dw> = <p, dx> + (<v_w, grad h> - <p, J grad h>) da with
        # p = (J J^T)^{-1} (v_mu + J v_w).
        pulled = R._solve(state, grads[0] + R._push(state, grads[1]))
        decay = R._decay(state)
        along, across = decay * grads[1], pulled * R._push(state, decay)
        da = along.sum(0) - across if R.elementwise else along.sum() - across.sum()
        return pulled, da, None


class _Conjugate(torch.autograd.Function):
    """R_a^*(mu), with the derivatives g(w) and h(w)."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, a: Tensor, R: Inversion) -> Tensor:
        ctx.save_for_backward(mu, a)
        ctx.R = R

        def velocity(state: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            w = R._unpack(state)
            # d R^* = <g(w), dmu> + h(w) da along (s mu, s a).
            gain = (R.g(w) * mu).sum() + R.h.value(w, R.g) * a
            return R._pull(state, mu) + a * R._decay(state), gain

        moved = integrate(velocity, R._start(mu.shape), mu.new_zeros(()))
        if moved is None:
            raise RangeError(R._out_of_range(mu, a))
        return moved[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (mu, a), R = ctx.saved_tensors, ctx.R
        w = R._unpack(R._flow(mu, a))
        return grads[0] * R.g(w), grads[0] * R.h.value(w, R.g), None


def _held(before: Tensor, after: Tensor) -> bool:
    """Return whether float64 still holds what a state has decayed or grown to."""
    size = after.abs().amax() if after.numel() else after.new_ones(())
    return bool(torch.isfinite(after).all() and (size > FAINTEST or not before.any()))
