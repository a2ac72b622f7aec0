r"""R of a product of three or more factors: elliptic, and hyperelliptic from five factors on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..regularizer import Regularizer
from ..reparam import Depth, Parameters, Reparam, factors
from ._curves import Curve, CurveProblem, Place
from ._exponential_duals import flat
from ._smallest_factor import (
    advance,
    factor_from_product,
    factor_from_tail,
    factors_at,
    tail,
)
from .base import (
    LegendreFunction,
    RangeError,
    Scalar,
    checked,
    interior,
    near_bregman,
    outside,
)
from .dual import Array, NewtonProblem

__all__ = ["ProductEntropy"]


class ProductEntropy(LegendreFunction):
    r"""R of x = w_1 w_2 ... w_k without decay, k >= 3; `RescaledFunction` puts decay on it.

    The flow keeps w_i^2 - w_j^2. Per coordinate, let q be the factor of the smallest size, turned
    so that q x >= 0, and c_i = w_i^2 - q^2 >= 0 for the others. Then

    .. math:: x = q \prod_{i \ge 2} \sqrt{q^2 + c_i}, \quad
              \nu = \int_{q_0}^q \frac{dq}{\prod_{i \ge 2} \sqrt{q^2 + c_i}}, \quad
              R^*(\nu) = \frac{1}{2k} \sum_i w_i^2

    where the constant of R^* comes from Euler's relation <w, dw> = k <x, dnu>. The range of nu is
    bounded on both sides where one factor alone is the smallest: x runs through all numbers, that
    factor crosses 0. Where several share the smallest size, x keeps its sign, and a balanced start
    has the closed form x = (x_0^{-(k-2)/k} - (k-2) nu)^{-k/(k-2)}.

    Parameters
    ----------
    w0 : Tensor of shape (k, ...)
        The factors at the start, of any signs; at most one of each coordinate may be 0.

    Raises
    ------
    ValueError
        If k < 3, or two factors of one coordinate are 0: g is not regular there.

    Notes
    -----
    nu does not resolve x near an end of its range, where x grows like slack^{-k/(k-2)}; `limit`
    works with the slack itself. For three and four factors the integral is Carlson's R_F, for more
    a trapezoidal rule; both are right to about 1e-15 for factors of any sizes.

    Examples
    --------
    >>> R = ProductEntropy(torch.tensor([[1.0], [-0.5], [0.2]], dtype=torch.float64))
    >>> x = R.primal(torch.tensor([0.3], dtype=torch.float64), a=0.0)
    >>> R.mirror(x, a=0.0)
    tensor([0.3000], dtype=torch.float64)
    """

    elementwise = True

    def __init__(self, w0: Tensor) -> None:
        if len(w0) < 3:
            raise ValueError(
                f"ProductEntropy: w0 must hold at least 3 factors, got {len(w0)}. Use "
                "HyperbolicEntropy for 2."
            )
        self.w0, self.shape, self.dtype = w0, w0.shape[1:], w0.dtype
        w = _numpy(w0)
        size = np.sort(np.abs(w), axis=0)
        if (size[1] == 0).any():
            raise ValueError(
                f"ProductEntropy: at most one factor of a coordinate may be 0, got two in "
                f"{int((size[1] == 0).sum())} coordinate(s). Start those from nonzero factors."
            )
        self.k = len(w)
        self.c = (size - size[0]) * (size + size[0])  # w_i^2 - q^2, where they are close as well
        self.q0 = np.copysign(size[0], w.prod(0))
        self._place_range()

    @classmethod
    def start(cls, g: Reparam, h: Regularizer, w0: Parameters) -> ProductEntropy:
        """Read the factors of a deep product."""
        assert isinstance(g, Depth)
        return cls(torch.stack(factors(w0)))

    def _place_range(self) -> None:
        """Compute the ends of nu, and nu where q = 0; infinite where q cannot cross 0."""
        self.crosses = self.c[1] > 0  # else dq/dnu = 0 at q = 0, which is infinitely far away
        zero = np.zeros_like(self.q0)
        with np.errstate(divide="ignore"):
            # From q = 0 to either end.
            half = np.where(self.crosses, tail(factors_at(zero, self.c)), np.inf)
            near = tail(factors_at(np.abs(self.q0), self.c))
        side = np.copysign(1.0, self.q0)
        # From q0 to the end on its own side it is `near`, to the other end 2 half - near.
        self.upper = np.where(side > 0, near, 2 * half - near)
        self.lower = np.where(side > 0, near - 2 * half, -near)
        self.half = half

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return the limits of nu per coordinate; ``a`` plays no part."""
        return self._tensor(self.lower), self._tensor(self.upper)

    def domain(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return all numbers, or the half-line of x0 where the smallest factors share a size."""
        low = np.where(self.crosses | (self.q0 < 0), -np.inf, 0.0)
        high = np.where(self.crosses | (self.q0 > 0), np.inf, 0.0)
        return self._tensor(low), self._tensor(high)

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return x at nu = ``mu``; ``a`` plays no part."""
        q = self._from_dual(mu, a)
        return q * self._speed(q)  # x = q prod_{i >= 2} w_i

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Return nu = grad R(x); differentiable any number of times."""
        q = self._from_point(x, a)
        lower, upper = self.range(a)
        return interior(_Dual.apply(q, self), lower, upper)  # pyright: ignore

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        r"""Return ``|w|^2 / (2k)``."""
        return self._sum(self._energy(self._from_dual(mu, a)))

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        """Return R(x) = <x, nu> - R^*(nu)."""
        return self._sum(x * self.mirror(x, a) - self._energy(self._from_point(x, a)))

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        r"""Return the diagonal 1 / sum_i prod_{j != i} w_j^2."""
        return 1 / self._gram(self._from_point(x, a))

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        """Return the divergence, by quadrature where x and y are close."""
        p, q = self._from_point(x, a), self._from_point(y, a)
        apart = _Dual.apply(p, self) - _Dual.apply(q, self)  # pyright: ignore
        # <x, nu(x) - nu(y)> - R^*(nu(x)) + R^*(nu(y))
        far = x * apart - self._energy(p) + self._energy(q)
        close = (self._gram(q) / self._gram(p) - 1).abs() < 0.1
        step = torch.where(close, x - y, 0.0)
        near = near_bregman(lambda z: self.metric(z, a), y, step)
        return self._sum(torch.where(close, near, far.clamp(min=0)))

    def folded(self, a: Scalar, tilt: Scalar = 0.0) -> ProductEntropy:
        """Return R(x) - <tilt, x>, from the factors at nu = tilt; ``a`` plays no part."""
        # The rest of the flow from w0, whose nu counts from tilt.
        q = self._from_dual(torch.as_tensor(tilt, dtype=self.dtype).expand(self.shape), a)
        return ProductEntropy(torch.stack([q, *self._others(q)]))

    def shrunk(self, a: Scalar) -> tuple[ProductEntropy, float]:
        """Return the R of a start from e^a w0, and ``|w|^2 / 2`` there."""
        w = self.w0 * torch.exp(torch.as_tensor(a, dtype=self.dtype))
        return ProductEntropy(w), float((w * w).sum()) / 2

    def rescaled_problem(self, general: NewtonProblem, degree: float) -> CurveProblem:
        """Return the problem along the curves of the smallest factors."""
        return CurveProblem(general.Z, _ProductCurve(self), degree)

    def sparsity_ceiling(self, mu: Array) -> float:
        """Return sup <mu, x> over the x of L1 norm 1 with the signs that x can have."""
        low, high = (flat(v) for v in self.domain(0.0))
        reachable = np.where(high > 0, mu, 0.0), np.where(low < 0, -mu, 0.0)
        return float(np.maximum(*reachable).max(initial=0.0))

    # Everything is a function of q.

    def _from_dual(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return q at nu after checking that it is in the range."""
        checked(self, "mu", mu, a)
        lower, upper = self.range(a)
        inside = (mu > lower) & (mu < upper)
        if not inside.all():
            raise RangeError(outside(mu, lower, upper, inside))
        return _FromDual.apply(mu, self)  # pyright: ignore

    def _from_point(self, x: Tensor, a: Scalar) -> Tensor:
        """Return q at x after checking that x is in the domain."""
        checked(self, "x", x, a)
        lower, upper = self.domain(a)
        inside = torch.isinf(lower) & torch.isinf(upper) | (x > lower) & (x < upper)
        if not inside.all():
            where = tuple(torch.nonzero(~inside)[0].tolist())
            side = "(0, inf)" if bool(torch.isinf(upper.expand_as(x)[where])) else "(-inf, 0)"
            raise RangeError(f"x{list(where)} = {x[where]:.6g} is outside the domain {side}")
        return _FromPoint.apply(x, self)  # pyright: ignore

    def _others(self, q: Tensor) -> list[Tensor]:
        """Return the sizes of the factors but the smallest."""
        return [torch.sqrt(q * q + self._tensor(ci)) for ci in self.c[1:]]

    def _speed(self, q: Tensor) -> Tensor:
        """Return dq/dnu, the product of the other factors."""
        return torch.stack(torch.broadcast_tensors(*self._others(q))).prod(0)

    def _slope(self, q: Tensor) -> Tensor:
        """Return dx/dq."""
        # d log x / d log q = 1 + sum_{i >= 2} q^2 / w_i^2
        turned = sum(((q / w) ** 2 for w in self._others(q)), start=torch.ones_like(q))
        return self._speed(q) * turned

    def _gram(self, q: Tensor) -> Tensor:
        """Return dx/dnu = J J^T."""
        return self._slope(q) * self._speed(q)  # dx/dq dq/dnu = sum_i prod_{j != i} w_j^2

    def _energy(self, q: Tensor) -> Tensor:
        """Return the conjugate per coordinate."""
        # sum_i w_i^2 = k q^2 + sum_i c_i
        return q * q / 2 + self._tensor(self.c.sum(0)) / (2 * self.k)

    def _tensor(self, value: Array) -> Tensor:
        return torch.from_numpy(np.asarray(value)).to(self.dtype)

    def invert(self, nu: Array) -> Array:
        """Return q at nu, from the end of the range that is near."""
        high, low = self.upper - nu, nu - self.lower
        negative = low < high
        # The distance of nu to the near end is the tail of |q|, at most the one of q = 0.
        distance = np.minimum(np.where(negative, low, high), self.half)
        return np.where(negative, -1.0, 1.0) * factor_from_tail(distance, self.c)

    def dual(self, q: Array) -> Array:
        """Return nu at q."""
        distance = tail(factors_at(np.abs(q), self.c))
        return np.where(q < 0, self.lower + distance, self.upper - distance)


class _ProductCurve(Curve):
    """The curve of `ProductEntropy`, by its smallest factor q."""

    def __init__(self, R: ProductEntropy) -> None:
        self.R, self.k = R, R.k
        self.c = R.c.reshape(R.k, -1)
        self.state0, self.lower, self.upper = (v.reshape(-1) for v in (R.q0, R.lower, R.upper))
        self.floor, self.ceiling = (flat(v) for v in R.domain(0.0))

    def place(self, state: Array, tau: float) -> Place:
        """Return x and nu from the factors e^{tau/k} w, which is where x is a number."""
        scale = math.exp(tau / self.k)
        w = factors_at(state, self.c) * scale
        others, far, clock = w[1:].prod(0), w[2:].prod(0), scale ** (self.k - 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            turned = 1 + np.where(state == 0, 0.0, (scale * state / w[1:]) ** 2).sum(0)
            # tail(w) = scale^{k-2} tail(scale w), as the integral is homogeneous of degree 2 - k.
            distance = clock * tail(np.concatenate([np.abs(scale * state)[None], w[1:]]))
        side = np.where(state < 0, -1.0, 1.0)
        nu = np.where(state < 0, self.lower + distance, self.upper - distance)
        # dq/dt = w_2 and dx/dq = prod_{i >= 2} w_i turned: with e^tau they are scaled factors.
        dx = w[1] * others * turned
        # dnu/dt = w_2 / prod_{i >= 2} w_i
        return Place(scale * state * others, dx, nu, clock / far, distance, side)

    def move(self, state: Array, step: Array) -> Array:
        """Return q after a step in arcsinh(q / sqrt(c_2)), or in log q."""
        return advance(state, factors_at(state, self.c[:2])[1], step)

    def invert(self, nu: Array) -> Array:
        """Return q at nu."""
        return self.R.invert(nu.reshape(self.R.q0.shape)).reshape(-1)


def _numpy(value: Tensor) -> Array:
    return value.detach().cpu().to(torch.float64).numpy()


class _FromDual(torch.autograd.Function):
    """q(nu), dq = prod_{i >= 2} w_i dnu. The backward passes are written in the saved q."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, R: ProductEntropy) -> Tensor:
        q = R._tensor(R.invert(_numpy(mu)))
        ctx.save_for_backward(q)
        ctx.R = R
        return q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (q,) = ctx.saved_tensors
        return grads[0] * ctx.R._speed(q), None


class _FromPoint(torch.autograd.Function):
    """q(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: ProductEntropy) -> Tensor:
        q = R._tensor(factor_from_product(_numpy(x), R.c))
        ctx.save_for_backward(q)
        ctx.R = R
        return q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (q,) = ctx.saved_tensors
        return grads[0] / ctx.R._slope(q), None


class _Dual(torch.autograd.Function):
    """nu(q)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, R: ProductEntropy) -> Tensor:
        ctx.save_for_backward(q)
        ctx.R = R
        return R._tensor(R.dual(_numpy(q)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (q,) = ctx.saved_tensors
        return grads[0] / ctx.R._speed(q), None
