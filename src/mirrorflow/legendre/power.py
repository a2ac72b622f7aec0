r"""R_a of u^{2k} - v^{2k} with its own terms as penalty, k >= 2 (Section 4 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..regularizer import Regularizer, Separable
from ..reparam import Parameters, PowerDifference, Reparam, factors
from .function import LegendreFunction, RangeError, Scalar, checked, near_bregman, outside

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
    k : int
        Half the power, >= 2.
    cu, cv : Tensor
        c_u and c_v per coordinate, > 0.
    up, down : float
        kappa_u and kappa_v, the coefficients of u^{2k} and v^{2k} in h.
    """

    elementwise = True

    def __init__(
        self, k: int, cu: Tensor, cv: Tensor, up: float | Tensor = 1.0, down: float | Tensor = 1.0
    ) -> None:
        self.k, self.cu, self.cv, self.up, self.down = k, cu, cv, up, down
        self.c, self.q = 2 * k * (2 * k - 2), k / (k - 1)
        self.shape, self.dtype = cu.shape, cu.dtype

    @classmethod
    def start(cls, g: Reparam, h: Regularizer, w0: Parameters) -> PowerEntropy:
        """Read the constants from u0 and v0, whose signs do not matter."""
        assert isinstance(g, PowerDifference) and g.k >= 2 and isinstance(h, Separable)
        u, v = factors(w0)
        if (u == 0).any() or (v == 0).any():
            raise ValueError(f"{g}: u0 and v0 must not be 0 (g is not regular there)")
        c, power, (up, down) = 2 * g.k * (2 * g.k - 2), 2 - 2 * g.k, h.coefficients(g)
        return cls(g.k, u.abs() ** power / c, v.abs() ** power / c, up, -down)

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Give (kappa_v a - c_v, c_u - kappa_u a) per coordinate."""
        return self.down * a - self.cv, self.cu - self.up * a

    def _slacks(self, mu: Tensor, a: Scalar) -> tuple[Tensor, Tensor]:
        """Give P and N after checking that both are positive."""
        checked(self, "mu", mu, a)
        lower, upper = self.range(a)
        inside = (mu > lower) & (mu < upper)
        if not inside.all():
            raise RangeError(outside(mu, lower, upper, inside))
        return self.c * (upper - mu), self.c * (mu - lower)

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give P^{-q} - N^{-q}."""
        P, N = self._slacks(mu, a)
        return P**-self.q - N**-self.q

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        r"""Give sum (P^{1-q} + N^{1-q}) / (c (q - 1))."""
        return self._sum(self._potential(mu, a))

    def _potential(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give the conjugate per coordinate."""
        P, N = self._slacks(mu, a)
        return (P ** (1 - self.q) + N ** (1 - self.q)) / (self.c * (self.q - 1))

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Invert `primal` by Newton's method in log(P/N); exact first and second derivatives."""
        checked(self, "x", x, a)
        lower, upper = self.range(a)
        if not (upper > lower).all():
            raise RangeError(f"a = {a}: the range of mu is empty; a must be larger")
        x, lower, upper = torch.broadcast_tensors(x, lower, upper)
        return _Mirror.apply(x, lower, upper, self.c, self.q)  # pyright: ignore

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Give the diagonal 1 / (c q (P^{-q-1} + N^{-q-1}))."""
        P, N = self._slacks(self.mirror(x, a), a)
        return 1 / (self.c * self.q * (P ** (-self.q - 1) + N ** (-self.q - 1)))

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        """Evaluate the divergence, by quadrature where x and y are close."""
        mu, nu = self.mirror(x, a), self.mirror(y, a)
        far = x * (mu - nu) - self._potential(mu, a) + self._potential(nu, a)
        close = (self.metric(x, a) / self.metric(y, a) - 1).abs() < 0.1
        near = near_bregman(lambda z: self.metric(z, a), torch.where(close, x, y), y)
        return self._sum(torch.where(close, near, far.clamp(min=0)))


class _Mirror(torch.autograd.Function):
    """mu(x, lower, upper) with x = P^{-q} - N^{-q}; differentiable any number of times.

    The backward pass is written in the saved output mu, so that differentiating it again uses
    the same rule: dx = f_P dP + f_N dN with P = c (upper - mu), N = c (mu - lower).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lower: Tensor, upper: Tensor, c: float, q: float) -> Tensor:
        mu = _solve(x, lower, upper, c, q)
        ctx.save_for_backward(mu, lower, upper)
        ctx.c, ctx.q = c, q
        return mu

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        mu, lower, upper = ctx.saved_tensors
        c, q = ctx.c, ctx.q
        up, down = (c * (upper - mu)) ** (-q - 1), (c * (mu - lower)) ** (-q - 1)
        scaled = grads[0] / (up + down)
        return scaled / (c * q), scaled * down, scaled * up, None, None


def _solve(x: Tensor, lower: Tensor, upper: Tensor, c: float, q: float) -> Tensor:
    """Solve P^{-q} - N^{-q} = x for mu, with P + N = S = c (upper - lower).

    With z = log(P/N) the equation is (1 + e^{-z})^q - (1 + e^z)^q = x S^q. Its arcsinh is smooth,
    decreasing and nearly linear in z, so that Newton's method needs a handful of steps.
    """
    target = torch.asinh(x * (c * (upper - lower)) ** q / 2)
    z = -target / q
    for _ in range(60):
        big_u = torch.exp(q * torch.nn.functional.softplus(-z))  # (S/P)^q, and next (S/N)^q
        big_v = torch.exp(q * torch.nn.functional.softplus(z))
        half = (big_u - big_v) / 2
        value = torch.asinh(half)
        slope = -q / 2 * (torch.sigmoid(-z) * big_u + torch.sigmoid(z) * big_v)
        slope = slope / torch.hypot(half, torch.ones_like(half))
        step = (value - target) / slope
        z = z - step
        if (step.abs() <= 1e-15 * (1 + z.abs())).all():
            break
    # mu from the end that is near, so that a small distance to it keeps its digits.
    width = upper - lower
    return torch.where(z < 0, upper - width * torch.sigmoid(z), lower + width * torch.sigmoid(-z))
