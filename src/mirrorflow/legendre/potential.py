r"""A Legendre function given by one map per coordinate, x = primal(mu, a)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import LegendreFunction, RangeError, Scalar, checked, outside

__all__ = ["Potential"]

NODES = 64  # of Gauss's rule for the conjugate
DOUBLINGS = 1100  # of a bracket for mu, from 1 to the largest number
HALVINGS = 200  # of a bracket, each of which Newton's step may replace


class Potential(LegendreFunction):
    r"""R_a(x) = sum_i r(x_i, a), given by the increasing map x = primal(mu, a) of a coordinate.

    primal is the inverse of r', so that mu = r'(x, a) and r'' = 1 / primal'. The mirror map inverts
    it, and the conjugate integrates it. For geometries that no (g, h) of this package has, such as
    hyperbolic-aware minimization (arXiv 2506.02630), ``dx = -(1 + c |x|) grad f dt``, whose r'' is
    ``1 / (1 + c |x|)`` and whose primal is ``sign(mu) (e^{c |mu|} - 1) / c``.

    Parameters
    ----------
    primal : callable
        From a tensor mu and a to x, entry by entry, in torch operations; it broadcasts.
    shape : sequence of int
        The shape of x.
    lower, upper : float
        The ends of the range of mu, with lower < 0 < upper.
    dtype : torch.dtype
        Of x.

    Examples
    --------
    >>> def hyperbolic_aware(mu, a, c=2.0):
    ...     return torch.sign(mu) * torch.expm1(c * mu.abs()) / c
    >>> R = Potential(hyperbolic_aware, (1,))
    >>> x = torch.tensor([3.0], dtype=torch.float64)
    >>> R.metric(x, 0.0)  # 1 / (1 + 2 x)
    tensor([0.1429], dtype=torch.float64)
    """

    elementwise = True

    def __init__(
        self,
        primal: Callable[[Tensor, Any], Tensor],
        shape: Any,
        lower: float = -np.inf,
        upper: float = np.inf,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not callable(primal):
            raise TypeError(f"Potential: primal must be callable, got {type(primal).__name__}")
        if not lower < 0 < upper:
            raise ValueError(f"Potential: lower < 0 < upper must hold, got {lower} and {upper}")
        self.map, self.shape, self.dtype = primal, torch.Size(shape), dtype
        self.lower, self.upper = lower, upper

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return ``lower`` and ``upper`` for every coordinate."""
        ends = (torch.full(self.shape, end, dtype=self.dtype) for end in (self.lower, self.upper))
        lower, upper = ends
        return lower, upper

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Call the map."""
        checked(self, "mu", mu, a)
        inside = (mu > self.lower) & (mu < self.upper)
        if not inside.all():
            raise RangeError(outside(mu, *self.range(a), inside))
        return self._mapped(mu, a)

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Invert the map, by bisection and Newton's method; `RangeError` outside its image."""
        checked(self, "x", x, a)
        with torch.no_grad():
            mu = self._inverse(x.detach(), a)
        # One more step of Newton's method, with the derivatives of the implicit function.
        return mu - (self._mapped(mu, a) - x) / self._slope(mu, a)

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return 1 / primal'(mu)."""
        return 1 / self._slope(self.mirror(x, a).detach(), a)  # r''(x) primal'(mu) = 1

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        r"""Return the integral of primal from 0 to mu, by Gauss's rule."""
        checked(self, "mu", mu, a)
        nodes, weights = np.polynomial.legendre.leggauss(NODES)  # of [-1, 1]; the way is (0, mu)
        parts = [
            float(w) / 2 * self.map(mu * (1 + float(s)) / 2, a)
            for s, w in zip(nodes, weights, strict=True)
        ]
        return self._sum(mu * torch.stack(parts).sum(0))

    def _mapped(self, mu: Tensor, a: Scalar) -> Tensor:
        """Call the map, whose derivative at 0 is the one beside it.

        Autograd takes 0 for that of sign(mu) and |mu| at 0, and primal' > 0.
        """
        beside = self.map(torch.where(mu == 0, mu + torch.finfo(mu.dtype).tiny, mu), a)
        return beside + (self.map(mu, a) - beside).detach()

    def _slope(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return primal'(mu), without a graph."""
        with torch.enable_grad():
            at = mu.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._mapped(at, a).sum(), at)
        return slope.detach()

    def _inverse(self, x: Tensor, a: Scalar) -> Tensor:
        """Return mu between two numbers that enclose it, which Newton's steps or halves narrow."""
        low, high = self._bracket(x, a)
        mu = (low + high) / 2
        for _ in range(HALVINGS):
            miss = self.map(mu, a) - x
            # primal increases: where it is too small, mu is a lower bound.
            low, high = torch.where(miss < 0, mu, low), torch.where(miss > 0, mu, high)
            newton = mu - miss / self._slope(mu, a)
            inside = (newton > low) & (newton < high)
            after = torch.where(miss == 0, mu, torch.where(inside, newton, (low + high) / 2))
            if torch.equal(after, mu):
                break
            mu = after
        return mu

    def _bracket(self, x: Tensor, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return numbers on both sides of mu, found by doubling, or approaching an end."""
        ends = []
        for sign, end in ((-1.0, self.lower), (1.0, self.upper)):
            at = torch.full_like(x, sign * min(1.0, abs(end) / 2))
            for _ in range(DOUBLINGS):
                short = sign * (self.map(at, a) - x) < 0
                if not short.any():
                    break
                # To a finite end half of what is left.
                further = 2 * at if np.isinf(end) else (at + end) / 2
                at = torch.where(short, further, at)
                if not torch.isfinite(at).all() or bool((at == end).any()):
                    raise RangeError(f"x must be in the image of primal at a = {a}, got {x}")
            ends.append(at)
        return ends[0], ends[1]
