r"""The Legendre function R_a: two maps, and their consequences (Theorem 3.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._kernels import kkt_residual
from .dual import Array, ArrayPrimal, DualProblem, LocalModel, NewtonProblem

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
        and the metric is a diagonal, given as a vector. ``a`` broadcasts as well: a vector of the
        length of x is one number for each coordinate, k numbers for a batch have shape (k, 1).
    clocked : bool
        Whether `clock` differs from 1: mirror(x_t, a_t) is not mu = -int grad f dt.
    integrates_weights : bool
        Whether the maps integrate w from w0. `flow` then carries w along in its mirror view.
    """

    elementwise: bool = False
    clocked: bool = False
    integrates_weights: bool = False
    shape: torch.Size
    dtype: torch.dtype = torch.float64

    @abstractmethod
    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return x = g(w(mu, a)); `RangeError` outside the range of the mirror map."""

    @abstractmethod
    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Return mu = grad R_a(x), the inverse of `primal`; `RangeError` outside the domain."""

    @abstractmethod
    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return the convex conjugate R_a^*(mu), summed over the coordinates."""

    @abstractmethod
    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return the lower and upper ends of mu, an open interval per coordinate."""

    def domain(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return the lower and upper ends of x, an open interval per coordinate."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        r"""Evaluate R_a(x) = <x, mu> - R_a^*(mu) at mu = mirror(x, a)."""
        mu = self.mirror(x, a)
        return self._sum(x * mu) - self.conjugate(mu, a)  # Fenchel: R_a(x) + R_a^*(mu) = <x, mu>

    def clock(self, a: Scalar) -> Any:
        r"""Return d nu / d mu at ``a``, nu the dual variable: mirror(x_t, a_t) = nu_t.

        It is 1, and nu is mu = -int grad f dt, for pairs that commute. `RescaledFunction`, for
        pairs that commute up to a change of clock, has e^{(k-2) a}.
        """
        return 1.0

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        r"""Evaluate the divergence R_a(x) - R_a(y) - <mirror(y, a), x - y> >= 0."""
        checked(self, "x", x, a)
        checked(self, "y", y, a)
        inner = self._sum(self.mirror(y, a) * (x - y))
        return self.value(x, a) - self.value(y, a) - inner

    def centre(self, a: Scalar) -> Tensor:
        """Return the minimizer of R_a, primal(0, a): the positional bias."""
        return self.primal(torch.zeros(self.shape, dtype=self.dtype), a)  # grad R_a = mu = 0

    @abstractmethod
    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return the Hessian of R_a: a vector (diagonal) if elementwise, else a square matrix."""

    def folded(self, a: Scalar, tilt: Scalar = 0.0) -> LegendreFunction:
        r"""Return R_a(x) - <tilt, x>, up to a constant, as the Legendre function R_0 of a start.

        That start is w(tilt, a), where the flow has taken w0. Where R_a is a sum over coordinates,
        ``a`` and ``tilt`` may hold one number for each. Where R_a has a clock, each coordinate of
        R_a(x) - <tilt, x> is divided by clock(a).

        Raises
        ------
        TypeError
            If this R_a has no such start.
        """
        raise TypeError(
            f"folded: R must be a sum over coordinates, got {type(self).__name__}. Use one number "
            "a for all coordinates."
        )

    # What `limit` and `flow` ask for.

    def array_primal(self) -> ArrayPrimal | None:
        """Return x and d x / d mu in NumPy, from mu (flattened) and a; None to have torch do it.

        For an R that is a sum over coordinates. `limit` and the mirror view of `flow` are faster
        with it.
        """
        return None

    def dual_problem(self, Z: Array) -> DualProblem:
        """Return the dual of min R_a(x) subject to Zx = y, for measurements Z (n, d).

        By default x and its derivative come from `array_primal` where R defines it, else from
        `primal` by automatic differentiation.
        """
        primal = self.array_primal()
        return _Differentiated(self, Z) if primal is None else _InArrays(self, Z, primal)

    # What `RescaledFunction` asks for, of R_0.

    def shrunk(self, a: Scalar) -> tuple[LegendreFunction, float]:
        """Return the R_0 of a start from e^a w0, and ``|w|^2 / 2`` there.

        Raises
        ------
        TypeError
            If this R_0 does not know its start.
        """
        raise TypeError(
            f"shrunk: R must know the start that it was made from, got {type(self).__name__}. Use "
            "one number a for all coordinates."
        )

    def rescaled_problem(self, general: NewtonProblem, degree: float) -> DualProblem:
        """Return the dual problem of e^{ka} R_0(e^{-ka} x), k = ``degree``: ``general``, or better.

        Parameters
        ----------
        general : NewtonProblem
            The problem by the two maps.
        degree : float
            k.
        """
        return general

    def describes_training(self, Z: Array) -> bool:
        """Return whether training on measurements Z (n, d) ends where R_a is least."""
        return True

    def kkt_residual(self, x: Tensor, mu: Tensor, a: Scalar) -> float:
        """Return max ``|mirror(x, a) - mu|``, infinite outside the domain."""
        try:
            mirror = self.mirror(x, a)
        except RangeError:
            return np.inf
        return kkt_residual(mirror, mu, torch.ones_like(mirror, dtype=torch.bool))

    def _primal_residual(self, x: Tensor, mu: Tensor, a: Scalar) -> float:
        """Return |x - primal(mu, a)| / |x|, where `mirror` loses small parts of x to rounding."""
        image = self.primal(mu, a)
        unit = image.abs().max().clamp(min=1e-300)
        return float(((x - image) / unit).norm() / (image / unit).norm().clamp(min=1e-300))

    def sparsity_norm(self, x: Array) -> float:
        """Return the norm of x that R_a tends to for a -> -inf: L1, or the trace norm."""
        return float(np.abs(x).sum())

    def sparsity_ceiling(self, mu: Array) -> float:
        """Return sup <mu, x> over the x of `sparsity_norm` 1 in the domain."""
        return float(np.abs(mu).max(initial=0.0))

    def _sum(self, per_coordinate: Tensor) -> Tensor:
        """Sum over the coordinates of one x, keeping batch dimensions."""
        dims = tuple(range(-len(self.shape), 0))
        return per_coordinate.sum(dims) if dims else per_coordinate


class _InArrays(NewtonProblem):
    """The dual problem of an R that knows x and d x / d mu in NumPy."""

    def __init__(self, R: LegendreFunction, Z: Array, primal: ArrayPrimal) -> None:
        self.R, self.Z, self.primal = R, Z, primal

    def evaluate(self, mu: Array, a: float) -> LocalModel:
        """Return x and its derivative."""
        x, slope = self.primal(mu, a)
        return LocalModel(x, slope, None, np.zeros_like(x))


class _Differentiated(NewtonProblem):
    """The dual problem of any R: x by `primal`, its derivatives by automatic differentiation."""

    def __init__(self, R: LegendreFunction, Z: Array) -> None:
        self.R, self.Z, self.eps = R, Z, torch.finfo(R.dtype).eps

    def evaluate(self, mu: Array, a: float) -> LocalModel:
        """Return x and its derivatives."""
        at = torch.from_numpy(mu).to(self.R.dtype)
        return self._elementwise(at, a) if self.R.elementwise else self._dense(at, a)

    def _elementwise(self, mu: Tensor, a: float) -> LocalModel:
        """Return d x / d mu as a diagonal. The batch of one keeps messages of `Inversion` cheap."""
        mu = mu.reshape(1, *self.R.shape).requires_grad_()
        x = self.R.primal(mu, a)
        # x_i depends on mu_i alone, so that the gradient of the sum is the diagonal of d x / d mu.
        slope = torch.autograd.grad(x.sum(), mu, create_graph=True)[0]
        bend = torch.zeros_like(mu)
        if slope.requires_grad:  # not for a linear g
            (bend,) = torch.autograd.grad(slope.sum(), mu, materialize_grads=True)
        steep = _numpy(slope)
        # |d log slope / d mu| = |x''| / x'
        return LocalModel(_numpy(x), steep, None, np.abs(_numpy(bend)) / np.maximum(steep, 1e-300))

    def _dense(self, mu: Tensor, a: float) -> LocalModel:
        """Return d x / d mu by its eigenvalues and eigenvectors."""
        mu = mu.requires_grad_()
        x = self.R.primal(mu.reshape(self.R.shape), a).reshape(-1)
        slope = np.stack([_numpy(torch.autograd.grad(xi, mu, retain_graph=True)[0]) for xi in x])
        values, vectors = np.linalg.eigh((slope + slope.T) / 2)  # J J^T, symmetric but for rounding
        return LocalModel(_numpy(x), np.maximum(values, 0.0), vectors, np.zeros(len(values)))

    def require_centre(self, a: float) -> None:
        """Raise `RangeError`, with the range, if mu = 0 is outside it."""
        self.R.centre(a)


def _numpy(value: Tensor) -> Array:
    """Return a float64 vector."""
    return value.detach().cpu().numpy().astype(np.float64).reshape(-1)


def near_bregman(metric: Callable[[Tensor], Tensor], y: Tensor, step: Tensor) -> Tensor:
    r"""Return step^2 int_0^1 (1 - s) R''(y + s step) ds per coordinate, by Gauss's rule.

    For x = y + step close to y, where R(x) - R(y) - R'(y)(x - y) would lose its digits.
    """
    nodes, weights = np.polynomial.legendre.leggauss(8)
    s = (1 + nodes) / 2  # Gauss's nodes, from [-1, 1] to [0, 1]; the weights halve
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
        raise ValueError(f"{name} must be a number, got NaN")
    amount = torch.as_tensor(a)
    if not torch.isfinite(amount).all():
        raise ValueError(f"a must be finite, got {a}")
    if not R.elementwise and amount.numel() != 1:
        raise ValueError(
            "a must be one number for an R that is not a sum over coordinates, got "
            f"{amount.numel()}. Call once for each a."
        )


def softplus(y: Tensor) -> Tensor:
    """Return log(1 + e^y); torch's own returns y from y = 20 on, which is off by 2e-9."""
    return -torch.nn.functional.logsigmoid(-y)


def interior(mu: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Move a mu that rounds to an end of its open range to the nearest number inside.

    So that `primal` takes whatever `mirror` returns. The derivatives stay those of mu.
    """
    with torch.no_grad():
        inside = torch.minimum(mu, torch.nextafter(upper, lower))
        inside = torch.maximum(inside, torch.nextafter(lower, upper))
    return mu + (inside - mu).detach()  # the value of ``inside`` with the gradient of mu


def outside(mu: Tensor, lower: Tensor, upper: Tensor, inside: Tensor) -> str:
    """Return which coordinate of mu is outside, and the interval it has to be in."""
    lower, upper = lower.expand_as(inside), upper.expand_as(inside)
    where = tuple(torch.nonzero(~inside)[0].tolist())
    if not lower[where] < upper[where]:
        return f"the range of mu{list(where)} is empty at this a. Take a smaller a"
    bounds = f"({lower[where]:.6g}, {upper[where]:.6g})"
    return f"mu{list(where)} = {mu.expand_as(inside)[where]:.6g} is outside the range {bounds}"
