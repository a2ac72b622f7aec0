r"""The Legendre function R_a: two maps, and what follows from them (Theorem 3.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "LegendreFunction",
    "RangeError",
    "Scalar",
    "checked",
    "interior",
    "near_bregman",
    "outside",
    "softplus",
]

Scalar = float | Tensor


class RangeError(ValueError):
    """A dual variable outside the range of the mirror map, or an x outside the domain of R_a."""


class LegendreFunction(ABC):
    r"""R_a of a commuting pair (g, h) started at w0.

    Its conjugate is the potential of the flow: ``grad_mu conjugate(mu, a) = primal(mu, a)`` and
    ``d conjugate / da = h(w)`` at the w of the flow, so that d R_a(x) / da = -h(w).

    Attributes
    ----------
    shape, dtype : torch.Size, torch.dtype
        Of x and mu.
    elementwise : bool
        Whether R_a is a sum over coordinates. Then every map broadcasts over leading dimensions,
        and over ``a`` of shape (k, 1, ...), and the metric is a diagonal, given as a vector.
    """

    elementwise: bool = False
    shape: torch.Size
    dtype: torch.dtype = torch.float64

    @abstractmethod
    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give x = g(w(mu, a)); `RangeError` outside the range of the mirror map."""

    @abstractmethod
    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Give mu = grad R_a(x), the inverse of `primal`; `RangeError` outside the domain."""

    @abstractmethod
    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give the convex conjugate R_a^*(mu), summed over the coordinates."""

    @abstractmethod
    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Give the lower and upper ends of mu, an open interval per coordinate."""

    def domain(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Give the lower and upper ends of x, an open interval per coordinate."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        r"""Evaluate R_a(x) = <x, mu> - R_a^*(mu) at mu = mirror(x, a)."""
        mu = self.mirror(x, a)
        return self._sum(x * mu) - self.conjugate(mu, a)

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        r"""Evaluate the divergence R_a(x) - R_a(y) - <mirror(y, a), x - y> >= 0."""
        checked(self, "x", x, a)
        checked(self, "y", y, a)
        inner = self._sum(self.mirror(y, a) * (x - y))
        return self.value(x, a) - self.value(y, a) - inner

    def centre(self, a: Scalar) -> Tensor:
        """Give the minimizer of R_a, primal(0, a): the positional bias."""
        return self.primal(torch.zeros(self.shape, dtype=self.dtype), a)

    @abstractmethod
    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Give the Hessian of R_a: a vector (diagonal) if elementwise, else a square matrix."""

    def _sum(self, per_coordinate: Tensor) -> Tensor:
        """Sum over the coordinates of one x, keeping batch dimensions."""
        dims = tuple(range(-len(self.shape), 0))
        return per_coordinate.sum(dims) if dims else per_coordinate


def near_bregman(metric: Callable[[Tensor], Tensor], y: Tensor, step: Tensor) -> Tensor:
    r"""Give step^2 int_0^1 (1 - s) R''(y + s step) ds per coordinate, by Gauss's rule.

    For x = y + step close to y, where R(x) - R(y) - R'(y)(x - y) would lose its digits.
    """
    nodes, weights = np.polynomial.legendre.leggauss(8)
    s = (1 + nodes) / 2
    terms = (w / 2 * (1 - si) * metric(y + si * step) for si, w in zip(s, weights, strict=True))
    return step**2 * sum(terms, start=torch.zeros_like(step))


def checked(R: LegendreFunction, name: str, argument: Tensor, a: Scalar) -> None:
    """Raise an error if ``argument`` does not end in the shape of R, or anything is NaN."""
    if not isinstance(argument, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(argument).__name__}")
    if not isinstance(a, Tensor | float | int | np.number | np.ndarray):
        raise TypeError(f"a must be a number or a tensor, got {type(a).__name__}")
    ends = tuple(argument.shape[argument.ndim - len(R.shape) :])
    if argument.ndim < len(R.shape) or ends != tuple(R.shape):
        raise ValueError(f"{name} must have shape {tuple(R.shape)}, got {tuple(argument.shape)}")
    if torch.isnan(argument).any():
        raise ValueError(f"{name} holds NaN")
    if not torch.isfinite(torch.as_tensor(a)).all():
        raise ValueError(f"a must be finite, got {a}")


def softplus(y: Tensor) -> Tensor:
    """Give log(1 + e^y); torch's own gives y from y = 20 on, which is off by 2e-9."""
    return -torch.nn.functional.logsigmoid(-y)


def interior(mu: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Move a mu that rounds to an end of its open range to the nearest number inside.

    So that `primal` takes whatever `mirror` gives. The derivatives stay those of mu.
    """
    with torch.no_grad():
        inside = torch.minimum(mu, torch.nextafter(upper, lower))
        inside = torch.maximum(inside, torch.nextafter(lower, upper))
    return mu + (inside - mu).detach()


def outside(mu: Tensor, lower: Tensor, upper: Tensor, inside: Tensor) -> str:
    """Say which coordinate of mu is outside, and the interval that it has to be in."""
    lower, upper = lower.expand_as(inside), upper.expand_as(inside)
    where = tuple(torch.nonzero(~inside)[0].tolist())
    bounds = f"({lower[where]:.6g}, {upper[where]:.6g})"
    return f"mu{list(where)} = {mu.expand_as(inside)[where]:.6g} is outside the range {bounds}"
