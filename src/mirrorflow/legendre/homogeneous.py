r"""R_a of homogeneous models with weight decay: R_0 rescaled, with a clock of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import LegendreFunction, RangeError, Scalar, checked
from .dual import Array, DualProblem, NewtonProblem

__all__ = ["RescaledFunction"]

FAR = 690.0  # exponents up to which e^{...} leaves some room in float64
FAINT = 1e-250  # |x| that says nothing about nu any more
LARGEST = 1e300  # of e^{-ka} x, at which nu has rounded to an end of its range


class RescaledFunction(LegendreFunction):
    r"""R_a(x) = e^{ka} R_0(e^{-ka} x), for g homogeneous of degree k with `WeightDecay`.

    With w = e^a v, the weights v follow the flow without decay, in the dual variable

    .. math:: \nu_t = -\int_0^t e^{(k-2) a_s} \nabla f(x_s)\,ds, \qquad
              \nabla R_{a_t}(x_t) = \nabla R_0(e^{-k a_t} x_t) = \nu_t .

    So ``mirror(x, a)`` is nu, not mu = -int grad f; `clock` is d nu / d mu. The two agree for
    k = 2 alone, where the pair commutes. Decay that has accumulated to a acts as a start from
    e^a w0: the flow that is left after a switch-off ends in argmin {R_a(x) : Zx = y}, which is
    e^{ka} argmin {R_0(z) : Zz = e^{-ka} y}.

    The conjugate R_a^* = e^{ka} R_0^* has the constant of Euler's relation,
    R_0^*(0) = ``|w0|^2/(2k)``, with which d R_a(x) / da = -e^{(k-2) a} h(w) <= 0.

    Parameters
    ----------
    start : LegendreFunction
        R_0, the function of the flow without decay; its maps are called with a = 0 only.
    degree : float
        k: g(c w) = c^k g(w) for c > 0.
    energy : float
        h(w0) = ``|w0|^2 / 2``.

    Notes
    -----
    The inverse metric is e^{(2-k) a} J J^T at the w of the flow, J J^T in units of the clock.
    For k = 0 (`LogRatio`) R_a is R_0 up to a constant: decay changes the clock alone.
    Scales that grow, as e^{-ka} for k <= 2 and the clock for k < 2, must stay below e^{690}.

    Examples
    --------
    >>> from mirrorflow.legendre.product import ProductEntropy
    >>> w0 = torch.tensor([[0.5], [0.5], [0.5]], dtype=torch.float64)
    >>> R = RescaledFunction(ProductEntropy(w0), degree=3, energy=0.375)
    >>> R.centre(-1.0) / R.centre(0.0)  # e^{-3}
    tensor([0.0498], dtype=torch.float64)
    """

    def __init__(self, start: LegendreFunction, degree: float, energy: float) -> None:
        self.start, self.degree, self.energy = start, degree, energy
        self.elementwise, self.clocked = start.elementwise, degree != 2
        self.integrates_weights = start.integrates_weights
        self.shape, self.dtype = start.shape, start.dtype
        at_start = float(start.conjugate(torch.zeros(self.shape, dtype=self.dtype), 0.0))
        # Euler: <w, dw> = k <x, dnu>, so that R_0^* = |w|^2 / (2k), h(w0) / k at nu = 0.
        self.offset = (energy / degree if degree else 0.0) - at_start

    def clock(self, a: Scalar) -> Any:
        """Return d nu / d mu = e^{(k-2) a}."""
        return self._grown(a, self.degree - 2)

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return x = e^{ka} primal_0(nu) at nu = ``mu``."""
        checked(self, "mu", mu, a)
        # x = g(e^a v) = e^{ka} g(v)
        return self._grown(a, self.degree) * self.start.primal(mu, 0.0)

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Return nu = mirror_0(e^{-ka} x)."""
        checked(self, "x", x, a)
        return self.start.mirror(self._unscaled(x, a), 0.0)  # grad of e^{ka} R_0(e^{-ka} x)

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        r"""Return e^{ka} R_0^*(nu) with the constant of the class."""
        checked(self, "mu", mu, a)
        a = self._one(a)
        potential = self.start.conjugate(mu, 0.0) + self.offset
        # (c R_0(x / c))^* = c R_0^* for c = e^{ka}
        return self._grown(a, self.degree) * potential + self._idle(a)

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        """Return e^{ka} R_0(e^{-ka} x) with the constant of the class."""
        checked(self, "x", x, a)
        once = self._one(a)
        potential = self.start.value(self._unscaled(x, a), 0.0) - self.offset
        return self._grown(once, self.degree) * potential - self._idle(once)

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        """Return e^{ka} times the divergence of R_0 at the points e^{-ka} x and e^{-ka} y."""
        checked(self, "x", x, a)
        checked(self, "y", y, a)
        apart = self.start.bregman(self._unscaled(x, a), self._unscaled(y, a), 0.0)
        return self._grown(self._one(a), self.degree) * apart

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return e^{-ka} hess R_0(e^{-ka} x)."""
        checked(self, "x", x, a)
        # e^{ka} e^{-2ka} R_0''
        return self._grown(a, -self.degree) * self.start.metric(self._unscaled(x, a), 0.0)

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return the range of nu, the same for every a."""
        return self.start.range(0.0)

    def domain(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return the domain of R_0, a cone: the same for every a."""
        return self.start.domain(0.0)

    def folded(self, a: Scalar, tilt: Scalar = 0.0) -> RescaledFunction:
        """Return the R_0 of the w at nu = tilt: (R_a(x) - <tilt, x>) / clock(a) + constant."""
        # From e^a w without decay nu = clock(a) mu: the R_0 of that start is R_a / clock(a).
        start, energy = self.start.folded(0.0, tilt).shrunk(a)
        return RescaledFunction(start, self.degree, energy)

    # What `limit` asks for: R_0 knows how to be minimized, and how good a minimizer is.

    def dual_problem(self, Z: Array) -> DualProblem:
        """Return the best problem that R_0 has for its rescaled form."""
        general = super().dual_problem(Z)
        assert isinstance(general, NewtonProblem)
        return self.start.rescaled_problem(general, self.degree)

    def kkt_residual(self, x: Tensor, mu: Tensor, a: Scalar) -> float:
        """Return R_0's residual at e^{-ka} x, without the coordinates that underflow."""
        z, faint = self._unscaled(x, a), x.abs() < FAINT
        if self.elementwise and bool(faint.any()):
            try:
                image = self.start.primal(torch.where(faint, mu, 0.0), 0.0)
            except RangeError:
                return math.inf
            faint = faint & ((self._grown(a, self.degree) * image).abs() < FAINT)
            z = torch.where(faint, image, z)  # as good as it gets: no residual
        return self.start.kkt_residual(z, mu, 0.0)

    def sparsity_norm(self, x: Array) -> float:
        """Return that of R_0."""
        return self.start.sparsity_norm(x)

    def sparsity_ceiling(self, mu: Array) -> float:
        """Return that of R_0, whose domain is a cone."""
        return self.start.sparsity_ceiling(mu)

    def _grown(self, a: Scalar, rate: float) -> Any:
        """Return e^{rate a}, a number or a tensor as ``a`` is."""
        if isinstance(a, Tensor):
            return torch.exp(rate * a)
        if rate * a > FAR:
            raise RangeError(
                f"a must keep e^({rate:g} a) within float64, got a = {a}. Use an a nearer to 0."
            )
        return math.exp(rate * a)

    def _unscaled(self, x: Tensor, a: Scalar) -> Tensor:
        """Return e^{-ka} x, cut off for k > 2 where nu has rounded to an end of its range."""
        if self.degree <= 2:
            return x * self._grown(a, -self.degree)
        # e^{2 FAR} takes every x beyond LARGEST: halves of it are numbers.
        least = -2 * FAR / self.degree
        low = a.clamp(min=least) if isinstance(a, Tensor) else max(a, least)
        # e^{-ka} in two halves, each of which is a number.
        half = self._grown(low, -self.degree / 2)
        z = (x.double() * half).clamp(-LARGEST, LARGEST) * half
        end = min(LARGEST, torch.finfo(x.dtype).max / 4)
        return z.clamp(-end, end).to(x.dtype)

    def _one(self, a: Scalar) -> Scalar:
        """Return ``a`` for a sum over the coordinates: one number, or one per row of a batch."""
        if not isinstance(a, Tensor) or a.numel() == 1:
            return a.reshape(()) if isinstance(a, Tensor) else a
        own = a.shape[a.ndim - len(self.shape) :]
        if any(n != 1 for n in own) or a.ndim < len(self.shape):
            raise ValueError(
                f"a must be one number for all coordinates of a sum, got shape {tuple(a.shape)}. "
                "primal, mirror and metric take one for each coordinate."
            )
        return a.reshape(a.shape[: a.ndim - len(self.shape)])

    def _idle(self, a: Scalar) -> Any:
        """Return what replaces the constant h(w0)/k of R_0^* for k = 0, where ``|v|`` stays."""
        # k = 0: d R_a^* / da = e^{-2a} h(w) = h(v) is h(w0) all along.
        return 0.0 if self.degree else a * self.energy
