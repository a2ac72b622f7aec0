r"""The entropies of quadratic models: hyperbolic (m * w) and one-sided (m = w)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..regularizer import Regularizer, Separable, WeightDecay
from ..reparam import Depth, Hadamard, Parameters, PowerDifference, Reparam, factors
from ._exponential_duals import HyperbolicDual, OneSidedDual, flat, shared_slope
from ._kernels import arcsinh_ratio, exp_sinh, exp_sinh_cosh, kkt_residual
from .base import LegendreFunction, RangeError, Scalar, checked
from .dual import Array, ArrayPrimal, ExponentialDual, ExponentialProblem

__all__ = ["HyperbolicEntropy", "OneSidedEntropy", "entropy_excess"]

FAINT = 1e-290  # an x that decays below it loses its digits, and then is 0


class HyperbolicEntropy(LegendreFunction):
    r"""R_a(x) = (1/s) sum [x arcsinh(x/A) - sqrt(x^2 + A^2) - rho x], the entropy of m * w.

    .. math:: x = A \sinh(s \mu + \rho), \quad \log A = \log A_0 + \kappa a, \quad
              \rho = \rho_0 + \delta a

    For ``Hadamard`` with ``WeightDecay``: s = kappa = 2, delta = 0, A_0 = |u0 v0|,
    rho_0 = log|u0/v0| with u0 = (m0 + w0)/sqrt 2, v0 = (m0 - w0)/sqrt 2 (Eq. (9) of the paper,
    with the constants that hold: errata 1). Large A acts like L2, small A like L1.

    Parameters
    ----------
    log_A0, rho0 : Tensor
        log A_0 and rho_0 per coordinate.
    speed, decay : float
        s > 0 and kappa.
    drift : float
        delta, nonzero only for `Separable` with unequal coefficients.

    Examples
    --------
    >>> R = HyperbolicEntropy(torch.zeros(2, dtype=torch.float64), torch.zeros(2))
    >>> x = R.primal(torch.tensor([0.5, 0.0], dtype=torch.float64), a=-1.0)
    >>> R.mirror(x, a=-1.0)
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """

    elementwise = True

    def __init__(
        self,
        log_A0: Tensor,
        rho0: Tensor,
        speed: float = 2.0,
        decay: float | Tensor = 2.0,
        drift: float | Tensor = 0.0,
    ) -> None:
        self.log_A0, self.rho0 = torch.broadcast_tensors(log_A0, rho0)
        self.speed, self.decay, self.drift = speed, decay, drift
        self.shape, self.dtype = self.log_A0.shape, self.log_A0.dtype

    @classmethod
    def start(cls, g: Reparam, h: Regularizer, w0: Parameters) -> HyperbolicEntropy:
        """Read the constants from a start; ValueError where |m0| = |w0| (u0 v0 = 0)."""
        log_u2, log_v2, speed, up, down = _exponents(g, h, w0)
        one_sided = torch.isinf(log_u2) | torch.isinf(log_v2)
        if one_sided.any():
            raise ValueError(
                f"{g}: all coordinates or none must start with {_condition(g)}, where R_a is the "
                f"one-sided entropy, got {int(one_sided.sum())} of {one_sided.numel()} coordinates "
                f"with {_condition(g)}. Change some of w0."
            )
        # x = e^p - e^q with p, q = log u^2, log v^2 + ...: A = 2 e^{(p+q)/2}, rho = (p-q)/2.
        log_A0 = math.log(2) + 0.5 * (log_u2 + log_v2)
        rho0 = 0.5 * (log_u2 - log_v2)
        return cls(log_A0, rho0, speed, decay=0.5 * (up + down), drift=0.5 * (up - down))

    def log_A(self, a: Scalar) -> Tensor:
        """Return log A = log A_0 + kappa a per coordinate."""
        return self.log_A0 + self.decay * a

    def rho(self, a: Scalar) -> Tensor:
        """Return rho = rho_0 + delta a per coordinate."""
        return self.rho0 + self.drift * a

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return A sinh(s mu + rho), formed in logarithms so that only x itself can overflow."""
        checked(self, "mu", mu, a)
        return exp_sinh(self.log_A(a), self.speed * mu + self.rho(a))  # Eq. (9), errata 1

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Return (arcsinh(x/A) - rho) / s."""
        checked(self, "x", x, a)
        return (arcsinh_ratio(x, self.log_A(a)) - self.rho(a)) / self.speed  # grad R_a of Eq. (9)

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return sum (A/s) cosh(s mu + rho)."""
        checked(self, "mu", mu, a)
        t = self.speed * mu + self.rho(a)
        log_A = self.log_A(a)
        # cosh t by halves, with log A in the exponent: e^t alone may overflow.
        return self._sum(torch.exp(log_A + t) + torch.exp(log_A - t)) / (2 * self.speed)

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        """Evaluate R_a(x) from its closed form."""
        mu, A = self.mirror(x, a), torch.exp(self.log_A(a))
        # <x, mu> - R_a^*(mu), as A cosh t = sqrt(x^2 + A^2).
        return self._sum(x * mu - torch.hypot(x, A.expand_as(mu)) / self.speed)

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        r"""Evaluate the divergence without cancellation when x is close to y.

        With x = A sinh s, y = A sinh t and e = s - t it is
        (A/s) [cosh t (1 - cosh e + e sinh e) + sinh t (e cosh e - sinh e)].
        """
        checked(self, "x", x, a)
        checked(self, "y", y, a)
        log_A = self.log_A(a)
        A = torch.exp(log_A)
        far = arcsinh_ratio(x, log_A) - arcsinh_ratio(y, log_A)
        e = _arcsinh_difference(x, y, A, far)
        root_x, root_y = torch.hypot(x, A.expand_as(e)), torch.hypot(y, A.expand_as(e))
        small = e.abs() < 0.5
        tiny = torch.where(small, e, 0.0)
        # x = y cosh e + root_y sinh e, put into x e - root_x + root_y: the constant terms cancel.
        near = root_y * _bregman_even(tiny) + y * _bregman_odd(tiny)
        return self._sum(torch.where(small, near, x * e - root_x + root_y)) / self.speed

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return all of R."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return the diagonal 1 / (s sqrt(x^2 + A^2))."""
        checked(self, "x", x, a)
        A = torch.exp(self.log_A(a))
        # dx/dmu = s A cosh t = s sqrt(x^2 + A^2)
        return 1 / (self.speed * torch.hypot(*torch.broadcast_tensors(x, A)))

    def folded(self, a: Scalar, tilt: Scalar = 0.0) -> HyperbolicEntropy:
        """Return R_a(x) - <tilt, x>, whose constants are log A and rho + s tilt."""
        rho = self.rho(a) + self.speed * tilt  # mu + tilt in the place of mu
        return HyperbolicEntropy(self.log_A(a), rho, self.speed, self.decay, self.drift)

    def array_primal(self) -> ArrayPrimal:
        """Return x = A sinh(s mu + rho) and s A cosh(s mu + rho), in NumPy."""
        log_A0, rho0 = flat(self.log_A0), flat(self.rho0)
        decay, drift = (_per_coordinate(v, self.shape) for v in (self.decay, self.drift))

        def primal(mu: Array, a: float) -> tuple[Array, Array]:
            x, cosh = exp_sinh_cosh(log_A0 + decay * a, self.speed * mu + (rho0 + drift * a))
            return x, self.speed * cosh

        return primal

    def dual_problem(self, Z: Array) -> ExponentialProblem:
        """Return the problem of x = A sinh(s Z^T theta + rho)."""

        def make(Q: Array, a: float, log_unit: float) -> ExponentialDual:
            return HyperbolicDual(Q, flat(self.log_A(a)) - log_unit, flat(self.rho(a)), self.speed)

        def log_size(a: float) -> float:
            # A |sinh rho| < A e^|rho|
            return float((flat(self.log_A(a)) + np.abs(flat(self.rho(a)))).max(initial=-np.inf))

        # One path in tau needs x = e^tau times what theta makes: rho must not change with a.
        same_shape = shared_slope(self.drift) == 0
        return ExponentialProblem(
            Z, make, log_size, shared_slope(self.decay) if same_shape else None
        )

    def kkt_residual(self, x: Tensor, mu: Tensor, a: Scalar) -> float:
        """Return max |mirror(x, a) - mu| over the coordinates that do not underflow."""
        held = torch.maximum(x.abs(), self.primal(mu, a).abs()) > FAINT
        return kkt_residual(self.mirror(x, a), mu, held)


class OneSidedEntropy(LegendreFunction):
    r"""R_a(x) = (1/s) sum [|x| log|x| - |x| - |x| log(X_0 e^{kappa a})], the entropy of m = w.

    .. math:: x = \sigma X_0 e^{\kappa a + s \sigma \mu}, \quad \sigma = \pm 1

    For ``Hadamard`` with ``WeightDecay`` and m0 = w0: s = kappa = 2, X_0 = |x_0| (Eq. (10), with
    the prefactor 1/2 that the flow of m * w has).

    Parameters
    ----------
    log_x0 : Tensor
        log X_0 per coordinate.
    sign : Tensor
        sigma per coordinate: x keeps the sign it starts with.
    speed, decay : float
        s > 0 and kappa.
    """

    elementwise = True

    def __init__(
        self, log_x0: Tensor, sign: Tensor, speed: float = 2.0, decay: float | Tensor = 2.0
    ) -> None:
        self.log_x0, self.sign, self.speed, self.decay = log_x0, sign, speed, decay
        self.shape, self.dtype = log_x0.shape, log_x0.dtype

    @classmethod
    def start(cls, g: Reparam, h: Regularizer, w0: Parameters) -> OneSidedEntropy:
        """Read the constants from a start with u0 = 0 or v0 = 0 in every coordinate."""
        log_u2, log_v2, speed, up, down = _exponents(g, h, w0)
        positive = torch.isinf(log_v2)
        if not (positive ^ torch.isinf(log_u2)).all():
            raise ValueError(f"{g} must start with {_condition(g)} and x0 != 0 in every coordinate")
        same = not isinstance(up, Tensor) and not isinstance(down, Tensor) and up == down
        decay = up if same else torch.where(positive, up, down)
        sign = 2.0 * positive.to(log_u2.dtype) - 1
        return cls(torch.where(positive, log_u2, log_v2), sign, speed, decay)

    def log_scale(self, a: Scalar) -> Tensor:
        """Return log(X_0 e^{kappa a}), the logarithm of the centre."""
        return self.log_x0 + self.decay * a

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return sigma X_0 e^{kappa a + s sigma mu}."""
        checked(self, "mu", mu, a)
        # Eq. (10): x = x0 e^{2 (mu + a)}
        return self.sign * torch.exp(self.log_scale(a) + self.speed * self.sign * mu)

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Return sigma (log|x| - log(X_0 e^{kappa a})) / s; x = 0 is outside (mu is infinite)."""
        checked(self, "x", x, a)
        self._require(x, closed=False)
        return self.sign * (torch.log(x.abs()) - self.log_scale(a)) / self.speed  # 1/s: errata 9

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return sum |x| / s at x = primal(mu, a)."""
        return self._sum(self.primal(mu, a).abs()) / self.speed  # d|x| / (s dmu) = x

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        """Evaluate R_a(x); finite at x = 0."""
        checked(self, "x", x, a)
        self._require(x, closed=True)
        size = x.abs()
        # Eq. (10) with its factor 1/s (errata 9); xlogy makes it 0 at x = 0.
        return self._sum(torch.xlogy(size, size) - size * (1 + self.log_scale(a))) / self.speed

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        """Evaluate (1/s) sum [|x| log(x/y) - |x| + |y|], without cancellation when x ~ y."""
        checked(self, "x", x, a)
        checked(self, "y", y, a)
        self._require(x, closed=True)
        self._require(y, closed=False)
        r = (x - y) / y  # |x| log(x/y) - |x| + |y| = |y| [(1 + r) log(1 + r) - r]
        return self._sum(y.abs() * entropy_excess(r)) / self.speed

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return all of R."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def domain(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return the half-line on which x starts."""
        infinite, zero = torch.full(self.shape, torch.inf, dtype=self.dtype), torch.zeros(())
        return (
            torch.where(self.sign > 0, zero, -infinite),
            torch.where(self.sign > 0, infinite, zero),
        )

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return the diagonal 1 / (s |x|)."""
        checked(self, "x", x, a)
        self._require(x, closed=False)
        return 1 / (self.speed * x.abs())  # dx/dmu = s |x|

    def folded(self, a: Scalar, tilt: Scalar = 0.0) -> OneSidedEntropy:
        """Return R_a(x) - <tilt, x>, whose constant is log X_0 + kappa a + s sigma tilt."""
        scale = self.log_scale(a) + self.speed * self.sign * tilt
        return OneSidedEntropy(scale, self.sign, self.speed, self.decay)

    def array_primal(self) -> ArrayPrimal:
        """Return x = sigma X_0 e^{kappa a + s sigma mu} and s |x|, in NumPy."""
        log_x0, sign = flat(self.log_x0), flat(self.sign)
        decay = _per_coordinate(self.decay, self.shape)

        def primal(mu: Array, a: float) -> tuple[Array, Array]:
            size = np.exp(log_x0 + decay * a + self.speed * sign * mu)
            return sign * size, self.speed * size

        return primal

    def dual_problem(self, Z: Array) -> ExponentialProblem:
        """Return the problem of x = sigma X_0 e^{kappa a + s sigma Z^T theta}."""

        def make(Q: Array, a: float, log_unit: float) -> ExponentialDual:
            log_x0 = flat(self.log_scale(a)) - log_unit
            return OneSidedDual(Q, log_x0, flat(self.sign), self.speed)

        def log_size(a: float) -> float:
            return float(flat(self.log_scale(a)).max(initial=-np.inf))

        return ExponentialProblem(Z, make, log_size, shared_slope(self.decay))

    def kkt_residual(self, x: Tensor, mu: Tensor, a: Scalar) -> float:
        """Return max |mirror(x, a) - mu| over the coordinates that do not underflow."""
        held = torch.maximum(x.abs(), self.primal(mu, a).abs()) > FAINT
        try:
            mirror = self.mirror(torch.where(held, x, self.sign), a)
        except RangeError:
            return np.inf
        return kkt_residual(mirror, mu, held)

    def sparsity_ceiling(self, mu: Array) -> float:
        """Return the largest entry of sigma mu: x keeps its signs."""
        return float((flat(self.sign) * mu).max(initial=0.0))

    def _require(self, x: Tensor, closed: bool) -> None:
        """Raise `RangeError` unless x has the signs of the start."""
        inside = self.sign * x >= 0 if closed else self.sign * x > 0
        if not inside.all():
            where = tuple(torch.nonzero(~inside)[0].tolist())
            positive = self.sign.expand_as(inside)[where] > 0
            interval = "(0, inf)" if positive else "(-inf, 0)"
            raise RangeError(f"x{list(where)} = {x[where]:.6g} is outside the domain {interval}")


def _per_coordinate(value: float | Tensor, shape: torch.Size) -> Array | float:
    """Return a slope as a number, or as a vector of one number for each coordinate."""
    return flat(value.expand(shape)) if isinstance(value, Tensor) else float(value)


def _exponents(
    g: Reparam, h: Regularizer, w0: Parameters
) -> tuple[Tensor, Tensor, float, float, float]:
    r"""Return log U, log V, s, k_u, k_v so that x = U e^{s mu + k_u a} - V e^{-s mu + k_v a}.

    m * w = (u^2 - v^2)/2 with u = u0 e^{mu + a}, v = v0 e^{-mu + a} (weight decay), and for
    u^2 - v^2 with h = c_u u^2 - c_v v^2 the factors are u0 e^{2(mu + c_u a)} and
    v0 e^{2(-mu - c_v a)}.
    """
    if isinstance(g, Hadamard) or (isinstance(g, Depth) and g.k == 2):
        m, v = factors(w0)
        # U = u0^2 / 2 with u0 = (m0 + w0) / sqrt 2, and so V: errata 1.
        return 2 * torch.log((m + v).abs() / 2), 2 * torch.log((m - v).abs() / 2), 2.0, 2.0, 2.0
    assert isinstance(g, PowerDifference) and g.k == 1
    u, v = factors(w0)
    if isinstance(h, WeightDecay):
        up, down = 2.0, 2.0  # u = u0 e^{2 mu + a}, squared
    else:
        assert isinstance(h, Separable)
        cu, cv = h.coefficients(g)
        up, down = 4.0 * cu, -4.0 * cv  # u = u0 e^{2 (mu + c_u a)}, v = v0 e^{-2 (mu + c_v a)}
    return 2 * torch.log(u.abs()), 2 * torch.log(v.abs()), 4.0, up, down


def _condition(g: Reparam) -> str:
    """Name the start at which R_a is one-sided."""
    return "u0 = 0 or v0 = 0" if isinstance(g, PowerDifference) else "|m0| = |w0|"


def _arcsinh_difference(x: Tensor, y: Tensor, A: Tensor, direct: Tensor) -> Tensor:
    """Return arcsinh(x/A) - arcsinh(y/A), accurate when x is close to y."""
    x, y, A = torch.broadcast_tensors(x, y, A)
    close = (torch.sign(x) * torch.sign(y) > 0) & (direct.abs() < 1)
    # Ratios first: the products of two numbers of the size of A would underflow.
    p, q, A = torch.where(close, x, 1.0), torch.where(close, y, 1.0), torch.where(close, A, 0.0)
    # sinh(s - t) = (x^2 - y^2) / (x root_y + y root_x), x = A sinh s, root_x = A cosh s.
    root_p, root_q = torch.hypot(p, A), torch.hypot(q, A)
    ratio = ((p - q) / root_p) * ((p + q) / root_q) / (p / root_p + q / root_q)
    return torch.where(close, torch.asinh(ratio), direct)


def _series(
    e: Tensor, first: int, step: int, coefficient: Callable[[int], float], terms: int = 7
) -> Tensor:
    """Sum coefficient(k) e^k over k = first, first + step, ... so many ``terms``."""
    return sum(
        (coefficient(k) * e**k for k in range(first, first + terms * step, step)),
        start=torch.zeros_like(e),
    )


def _bregman_even(e: Tensor) -> Tensor:
    """Return 1 - cosh e + e sinh e for |e| < 1/2."""
    return _series(e, 2, 2, lambda k: 1 / math.factorial(k - 1) - 1 / math.factorial(k))


def _bregman_odd(e: Tensor) -> Tensor:
    """Return e cosh e - sinh e for |e| < 1/2."""
    return _series(e, 3, 2, lambda k: 1 / math.factorial(k - 1) - 1 / math.factorial(k))


def entropy_excess(r: Tensor) -> Tensor:
    """Return (1 + r) log(1 + r) - r for r >= -1, without cancellation near 0."""
    small = r.abs() < 0.1  # beyond, what cancels costs a digit at most
    # sum_{k >= 2} (-r)^k / (k (k - 1)): the 15th term is below rounding at |r| = 0.1.
    near = _series(torch.where(small, r, 0.0), 2, 1, lambda k: (-1) ** k / (k * (k - 1)), 15)
    far = torch.special.xlog1py(1 + r, r) - r  # 0 log 0 = 0 at r = -1
    return torch.where(small, near, far)
