r"""R_a of u^{2k} - v^{2k} with its own terms as penalty, k > 1 (Section 4 of the paper)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..regularizer import Regularizer, Separable
from ..reparam import Parameters, PowerDifference, Reparam, factors
from ._curves import Curve, CurveProblem, Place
from ._exponential_duals import flat
from ._kernels import arcsinh_ratio
from .base import (
    LegendreFunction,
    RangeError,
    Scalar,
    checked,
    interior,
    near_bregman,
    outside,
    softplus,
)
from .dual import Array, NewtonProblem

__all__ = ["PowerEntropy"]


class PowerEntropy(LegendreFunction):
    r"""R_a of x = u^{2k} - v^{2k}, by its conjugate: the mirror map has no closed form.

    .. math:: x = P^{-q} - N^{-q}, \quad P = c (c_u - \mu - \kappa_u a), \quad
              N = c (c_v + \mu - \kappa_v a), \quad q = k/(k-1), \quad c = 2k(2k-2)

    with c_u = u0^{2-2k}/c, c_v = v0^{2-2k}/c, and kappa = 1 for the default `Separable` (Eq. (11)
    with the signs that hold: errata 2). mu lies in (kappa_v a - c_v, c_u - kappa_u a), which widens
    as a falls; R_a is finite on all of R.

    Parameters
    ----------
    k : float
        Half the power, > 1.
    cu, cv : Tensor
        c_u and c_v per coordinate, > 0.
    up, down : float
        kappa_u and kappa_v, the coefficients of u^{2k} and v^{2k} in h.
    """

    elementwise = True

    def __init__(
        self, k: float, cu: Tensor, cv: Tensor, up: float | Tensor = 1.0, down: float | Tensor = 1.0
    ) -> None:
        self.k, self.cu, self.cv, self.up, self.down = k, cu, cv, up, down
        self.c, self.q = 2 * k * (2 * k - 2), k / (k - 1)
        self.shape, self.dtype = cu.shape, cu.dtype

    @classmethod
    def start(cls, g: Reparam, h: Regularizer, w0: Parameters) -> PowerEntropy:
        """Read the constants from u0 and v0, whose signs do not matter."""
        assert isinstance(g, PowerDifference) and g.k > 1 and isinstance(h, Separable)
        u, v = factors(w0)
        if (u == 0).any() or (v == 0).any():
            raise ValueError(f"{g}: u0 and v0 must not be 0, where g is not regular, got 0")
        c, power, (up, down) = 2 * g.k * (2 * g.k - 2), 2 - 2 * g.k, h.coefficients(g)
        # c_u = u0^{2-2k} / c: d(u^{2-2k}) = -c (dmu + kappa_u da).
        return cls(g.k, u.abs() ** power / c, v.abs() ** power / c, up, -down)

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return (kappa_v a - c_v, c_u - kappa_u a) per coordinate."""
        return self.down * a - self.cv, self.cu - self.up * a  # where N = 0 and P = 0 (errata 2)

    def _slacks(self, mu: Tensor, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return P and N after checking that both are positive."""
        checked(self, "mu", mu, a)
        lower, upper = self.range(a)
        inside = (mu > lower) & (mu < upper)
        if not inside.all():
            raise RangeError(outside(mu, lower, upper, inside))
        return self.c * (upper - mu), self.c * (mu - lower)  # u^{2-2k} and v^{2-2k}

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return P^{-q} - N^{-q}."""
        P, N = self._slacks(mu, a)
        return P**-self.q - N**-self.q  # Eq. (11) with the signs of errata 2

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        r"""Return sum (P^{1-q} + N^{1-q}) / (c (q - 1))."""
        P, N = self._slacks(mu, a)
        return self._sum(self._energy(torch.log(P), torch.log(N)))

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Invert `primal`, from whichever end is near; differentiable any number of times."""
        checked(self, "x", x, a)
        lower, upper = self._interval(a)
        log_P, log_N = self._logs(x, a)
        near_upper, near_lower = torch.exp(log_P) / self.c, torch.exp(log_N) / self.c
        # For x > 0 P is the small one, and P / c is how far mu is below the upper end.
        mu = torch.where(x > 0, upper - near_upper, lower + near_lower)
        return interior(mu, lower, upper)

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        """Evaluate R_a(x) = <x, mu> - R_a^*(mu)."""
        return self._sum(x * self.mirror(x, a) - self._energy(*self._logs(x, a)))

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return the diagonal 1 / (c q (P^{-q-1} + N^{-q-1}))."""
        checked(self, "x", x, a)
        return self._curvature(x, a)

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        """Evaluate the divergence, by quadrature where x and y are close."""
        checked(self, "x", x, a)
        checked(self, "y", y, a)
        Px, Nx = self._logs(x, a)
        Py, Ny = self._logs(y, a)
        # mu(x) - mu(y), from the distances to the end that is near.
        apart = torch.where(x + y > 0, torch.exp(Py) - torch.exp(Px), torch.exp(Nx) - torch.exp(Ny))
        # <x, mu(x) - mu(y)> - R^*(mu(x)) + R^*(mu(y))
        far = x * apart / self.c - self._energy(Px, Nx) + self._energy(Py, Ny)
        close = (self._curvature(x, a) / self._curvature(y, a) - 1).abs() < 0.1
        step = torch.where(close, x - y, 0.0)
        near = near_bregman(lambda z: self._curvature(z, a), y, step)
        return self._sum(torch.where(close, near, far.clamp(min=0)))

    def folded(self, a: Scalar, tilt: Scalar = 0.0) -> PowerEntropy:
        """Return R_a(x) - <tilt, x>, whose constants are c_u - kappa_u a - tilt and its like."""
        lower, upper = self.range(a)
        return PowerEntropy(self.k, upper - tilt, tilt - lower, self.up, self.down)

    def shrunk(self, a: Scalar) -> tuple[PowerEntropy, float]:
        """Return the R_0 of a start from e^a (u0, v0), and ``|w|^2 / 2`` there."""
        # c_u = u0^{2-2k} / c with e^a u0 in the place of u0.
        scale = torch.exp((2 - 2 * self.k) * torch.as_tensor(a, dtype=self.dtype))
        cu, cv = self.cu * scale, self.cv * scale
        # u0^2 = (c c_u)^{-1/(k-1)}, and 1 - q = -1/(k-1).
        squares = sum(((self.c * v) ** (1 - self.q)).sum() for v in (cu, cv))
        return PowerEntropy(self.k, cu, cv, self.up, self.down), float(squares) / 2

    def rescaled_problem(self, general: NewtonProblem, degree: float) -> CurveProblem:
        """Return the problem along log(N / P)."""
        return CurveProblem(general.Z, _PowerCurve(self), degree)

    # All of these in log P and log N: mu itself does not resolve them near an end of its range.

    def _interval(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return the range, which must not be empty."""
        lower, upper = self.range(a)
        if not (upper > lower).all():
            raise RangeError(f"a must be smaller, got {a}: the range of mu is empty")
        return lower, upper

    def _logs(self, x: Tensor, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return log P and log N at x: P + N = S, N/P = e^w and F(w) = x S^q."""
        lower, upper = self._interval(a)
        log_S = torch.log(self.c * (upper - lower))
        # x S^q = F(w) = 2 sinh(tau): tau = arcsinh(x / (2 S^{-q})).
        log_unit = math.log(2) - self.q * log_S
        w = _Split.apply(arcsinh_ratio(x, log_unit), self.q)  # pyright: ignore
        return log_S + logsigmoid(-w), log_S + logsigmoid(w)  # S / (1 + e^w), S / (1 + e^-w)

    def _energy(self, log_P: Tensor, log_N: Tensor) -> Tensor:
        """Return the conjugate per coordinate."""
        r = 1 - self.q
        # int (P^-q - N^-q) dmu with dP = -c dmu and dN = c dmu.
        return (torch.exp(r * log_P) + torch.exp(r * log_N)) / (self.c * (self.q - 1))

    def _curvature(self, x: Tensor, a: Scalar) -> Tensor:
        """Return the metric of an x that is checked."""
        log_P, log_N = self._logs(x, a)
        r = -self.q - 1
        # dx/dmu = c q (P^{-q-1} + N^{-q-1})
        return torch.exp(-torch.logaddexp(r * log_P, r * log_N)) / (self.c * self.q)


class _PowerCurve(Curve):
    """The curve of `PowerEntropy` at a = 0, by t = log(N / P)."""

    def __init__(self, R: PowerEntropy) -> None:
        self.c, self.q = R.c, R.q
        self.lower, self.upper = (flat(v) for v in R.range(0.0))
        self.log_sum = np.log(self.c * (self.upper - self.lower))
        self.state0 = np.log(-self.lower / self.upper)  # N / P at nu = 0
        self.floor = np.full_like(self.state0, -np.inf)
        self.ceiling = -self.floor

    def place(self, state: Array, tau: float) -> Place:
        """Return x = P^-q - N^-q and nu, from log P and log N."""
        soft = np.logaddexp(0.0, np.abs(state))  # of the larger; the other is soft - |t|
        small, large = self.log_sum - soft, self.log_sum - soft + np.abs(state)
        near, far = np.exp(tau - self.q * small), np.exp(tau - self.q * large)
        side = np.where(state < 0, -1.0, 1.0)
        x = -side * near * np.expm1(-self.q * np.abs(state))  # near - far = near (1 - e^{-q|t|})
        share = np.exp(large - self.log_sum)  # N/S next to P^-q, and P/S next to N^-q
        # P + N = S and N / P = e^t: dP/dt = -P N / S, dN/dt = P N / S.
        dx = self.q * (near * share + far * (1 - share))
        distance = np.exp(small) / self.c
        nu = np.where(state < 0, self.lower + distance, self.upper - distance)
        return Place(x, dx, nu, distance * share, distance, side)  # dnu/dt = P N / (c S)

    def move(self, state: Array, step: Array) -> Array:
        """Return t + step."""
        return state + step

    def invert(self, nu: Array) -> Array:
        """Return log(N / P)."""
        return np.log((nu - self.lower) / (self.upper - nu))


class _Split(torch.autograd.Function):
    """w(tau) with 2 sinh(tau) = F(w) = (1 + e^w)^q - (1 + e^-w)^q, which is odd.

    The backward pass is written in the saved output, so that differentiating it again uses the
    same rule.
    """

    @staticmethod
    def forward(ctx: Any, tau: Tensor, q: float) -> Tensor:
        w = torch.sign(tau) * _solve(tau.abs(), q)
        ctx.save_for_backward(w)
        ctx.q = q
        return w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (w,) = ctx.saved_tensors
        return grads[0] / _slope(w, ctx.q), None


def _slope(w: Tensor, q: float) -> Tensor:
    """Return d tau / d w, with the largest power taken out: it cancels."""
    # 2 cosh(tau) dtau = F'(w) dw, F' = q [(1 + e^w)^q s(w) + (1 + e^-w)^q s(-w)].
    size = (q * softplus(w.abs())).detach()
    up, down = torch.exp(q * softplus(w) - size), torch.exp(q * softplus(-w) - size)
    steep = torch.sigmoid(w) * up + torch.sigmoid(-w) * down
    return q * steep / torch.hypot(up - down, 2 * torch.exp(-size))  # 2 cosh tau = sqrt(F^2 + 4)


def _tau(w: Tensor, q: float) -> Tensor:
    """Return arcsinh(F(w) / 2) for w >= 0, without forming a power that may overflow."""
    log_up, falls = q * softplus(w), -torch.expm1(-q * w)  # F = (1 + e^w)^q (1 - e^{-qw})
    big = log_up > 40  # there arcsinh(F / 2) = log F to rounding
    near = torch.asinh(torch.exp(torch.where(big, 0.0, log_up)) * falls / 2)
    return torch.where(big, log_up + torch.log(torch.where(big, falls, 1.0)), near)


def _solve(tau: Tensor, q: float, steps: int = 50) -> Tensor:
    """Solve for w >= 0 by Newton's method, kept between two bounds.

    F(w) lies between 2 sinh(qw) and 2^q (e^{qw} - 1). Between those, tau(w) is nearly linear: its
    slope, from 2^{q-1} q at 0 to q at infinity, never falls below 0.86 q. Five steps are enough.
    """
    high, cut = tau / q, q * math.log(2)  # 2 sinh(qw) <= F(w)
    grown = 2 * torch.sinh(tau.clamp(max=40)) * math.exp(-cut)
    low = torch.where(tau < 40, torch.log1p(grown), tau - cut) / q  # F(w) <= 2^q (e^{qw} - 1)
    w, limits = (low + high) / 2, torch.finfo(tau.dtype)
    error = torch.zeros_like(tau)
    for _ in range(steps):
        error = _tau(w, q) - tau
        new = torch.maximum(torch.minimum(w - error / _slope(w, q), high), low)
        done = ((new - w).abs() <= 8 * limits.eps * w + limits.tiny).all()
        w = new
        if done:
            return w
    warnings.warn(
        f"the mirror map of u^2k - v^2k has not converged after {steps} steps: the largest error "
        f"of arcsinh(x) is {error.abs().max():.1e}",
        RuntimeWarning,
        stacklevel=2,
    )
    return w
