r"""The entropies of quadratic models: hyperbolic (m * w) and one-sided (m = w)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..regularizer import Regularizer, Separable, WeightDecay
from ..reparam import Depth, Hadamard, Parameters, PowerDifference, Reparam, factors
from .base import LegendreFunction, RangeError, Scalar, checked

__all__ = ["HyperbolicEntropy", "OneSidedEntropy", "arcsinh_ratio", "entropy_excess"]


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
                f"{int(one_sided.sum())} of {one_sided.numel()} coordinates of {g} start with "
                f"{_condition(g)}, where R_a is the one-sided entropy; start all coordinates so, "
                "or none"
            )
        # x = e^p - e^q with p, q = log u^2, log v^2 + ...: A = 2 e^{(p+q)/2}, rho = (p-q)/2.
        log_A0 = math.log(2) + 0.5 * (log_u2 + log_v2)
        rho0 = 0.5 * (log_u2 - log_v2)
        return cls(log_A0, rho0, speed, decay=0.5 * (up + down), drift=0.5 * (up - down))

    def log_A(self, a: Scalar) -> Tensor:
        """Give log A = log A_0 + kappa a per coordinate."""
        return self.log_A0 + self.decay * a

    def rho(self, a: Scalar) -> Tensor:
        """Give rho = rho_0 + delta a per coordinate."""
        return self.rho0 + self.drift * a

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give A sinh(s mu + rho), formed in logarithms so that only x itself can overflow."""
        checked(self, "mu", mu, a)
        return _exp_sinh(self.log_A(a), self.speed * mu + self.rho(a))

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Give (arcsinh(x/A) - rho) / s."""
        checked(self, "x", x, a)
        return (arcsinh_ratio(x, self.log_A(a)) - self.rho(a)) / self.speed

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give sum (A/s) cosh(s mu + rho)."""
        checked(self, "mu", mu, a)
        t = self.speed * mu + self.rho(a)
        log_A = self.log_A(a)
        return self._sum(torch.exp(log_A + t) + torch.exp(log_A - t)) / (2 * self.speed)

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        """Evaluate R_a(x) from its closed form."""
        mu, A = self.mirror(x, a), torch.exp(self.log_A(a))
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
        near = root_y * _bregman_even(tiny) + y * _bregman_odd(tiny)
        return self._sum(torch.where(small, near, x * e - root_x + root_y)) / self.speed

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Give all of R."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Give the diagonal 1 / (s sqrt(x^2 + A^2))."""
        checked(self, "x", x, a)
        A = torch.exp(self.log_A(a))
        return 1 / (self.speed * torch.hypot(*torch.broadcast_tensors(x, A)))


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
        decay = torch.where(positive, up, down) if up != down else up
        return cls(torch.where(positive, log_u2, log_v2), 2.0 * positive - 1, speed, decay)

    def log_scale(self, a: Scalar) -> Tensor:
        """Give log(X_0 e^{kappa a}), the logarithm of the centre."""
        return self.log_x0 + self.decay * a

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give sigma X_0 e^{kappa a + s sigma mu}."""
        checked(self, "mu", mu, a)
        return self.sign * torch.exp(self.log_scale(a) + self.speed * self.sign * mu)

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Give sigma (log|x| - log(X_0 e^{kappa a})) / s; x = 0 is outside (mu is infinite)."""
        checked(self, "x", x, a)
        self._require(x, closed=False)
        return self.sign * (torch.log(x.abs()) - self.log_scale(a)) / self.speed

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give sum |x| / s at x = primal(mu, a)."""
        return self._sum(self.primal(mu, a).abs()) / self.speed

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        """Evaluate R_a(x); finite at x = 0."""
        checked(self, "x", x, a)
        self._require(x, closed=True)
        size = x.abs()
        return self._sum(torch.xlogy(size, size) - size * (1 + self.log_scale(a))) / self.speed

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        """Evaluate (1/s) sum [|x| log(x/y) - |x| + |y|], without cancellation when x ~ y."""
        checked(self, "x", x, a)
        checked(self, "y", y, a)
        self._require(x, closed=True)
        self._require(y, closed=False)
        r = (x - y) / y
        return self._sum(y.abs() * entropy_excess(r)) / self.speed

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Give all of R."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def domain(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Give the half-line on which x starts."""
        infinite, zero = torch.full(self.shape, torch.inf, dtype=self.dtype), torch.zeros(())
        return (
            torch.where(self.sign > 0, zero, -infinite),
            torch.where(self.sign > 0, infinite, zero),
        )

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Give the diagonal 1 / (s |x|)."""
        checked(self, "x", x, a)
        self._require(x, closed=False)
        return 1 / (self.speed * x.abs())

    def _require(self, x: Tensor, closed: bool) -> None:
        """Raise `RangeError` unless x has the signs of the start."""
        inside = self.sign * x >= 0 if closed else self.sign * x > 0
        if not inside.all():
            where = tuple(torch.nonzero(~inside)[0].tolist())
            positive = self.sign.expand_as(inside)[where] > 0
            interval = "(0, inf)" if positive else "(-inf, 0)"
            raise RangeError(f"x{list(where)} = {x[where]:.6g} is outside the domain {interval}")


def _exponents(
    g: Reparam, h: Regularizer, w0: Parameters
) -> tuple[Tensor, Tensor, float, float, float]:
    r"""Give log U, log V, s, k_u, k_v so that x = U e^{s mu + k_u a} - V e^{-s mu + k_v a}.

    m * w = (u^2 - v^2)/2 with u = u0 e^{mu + a}, v = v0 e^{-mu + a} (weight decay), and for
    u^2 - v^2 with h = c_u u^2 - c_v v^2 the factors are u0 e^{2(mu + c_u a)} and
    v0 e^{2(-mu - c_v a)}.
    """
    if isinstance(g, Hadamard) or (isinstance(g, Depth) and g.k == 2):
        m, v = factors(w0)
        return 2 * torch.log((m + v).abs() / 2), 2 * torch.log((m - v).abs() / 2), 2.0, 2.0, 2.0
    assert isinstance(g, PowerDifference) and g.k == 1
    u, v = factors(w0)
    if isinstance(h, WeightDecay):
        up, down = 2.0, 2.0
    else:
        assert isinstance(h, Separable)
        cu, cv = h.coefficients(g)
        up, down = 4.0 * cu, -4.0 * cv
    return 2 * torch.log(u.abs()), 2 * torch.log(v.abs()), 4.0, up, down


def _condition(g: Reparam) -> str:
    """Name the start at which R_a is one-sided."""
    return "u0 = 0 or v0 = 0" if isinstance(g, PowerDifference) else "|m0| = |w0|"


def _exp_sinh(log_A: Tensor, t: Tensor) -> Tensor:
    """Give A sinh(t) without forming e^t alone, which may overflow where A e^t does not."""
    log_A, t = torch.broadcast_tensors(log_A, t)
    small, size = t.abs() < 1, t.abs()
    near = torch.exp(log_A) * torch.sinh(torch.where(small, t, 0.0))
    far = torch.sign(t) * torch.exp(log_A + size) * (-torch.expm1(-2 * size)) / 2
    return torch.where(small, near, far)


def arcsinh_ratio(x: Tensor, log_A: Tensor) -> Tensor:
    """Give arcsinh(x/A): in logarithms where |x|/A > 1e8, where the derivative overflows too."""
    x, log_A = torch.broadcast_tensors(x, log_A)
    size = x.abs()
    big = torch.log(torch.where(size > 0, size, 1.0)) - log_A > 18.4
    big = big & (size > 0)
    # Both branches are made finite before `where`, so that neither spoils the other's gradient.
    small_x, safe_log = torch.where(big, 0.0, x), torch.where(big, 0.0, log_A)
    near = torch.asinh(small_x * torch.exp(-safe_log.clamp(min=-_log_max(log_A.dtype))))
    far = torch.sign(x) * (math.log(2) + torch.log(torch.where(big, size, 1.0)) - log_A)
    return torch.where(big, far, near)


def _log_max(dtype: torch.dtype) -> float:
    """Give the largest number whose exponential is finite, less a margin."""
    return math.log(torch.finfo(dtype).max) - 1


def _arcsinh_difference(x: Tensor, y: Tensor, A: Tensor, direct: Tensor) -> Tensor:
    """Give arcsinh(x/A) - arcsinh(y/A), accurate when x is close to y."""
    x, y, A = torch.broadcast_tensors(x, y, A)
    close = (torch.sign(x) * torch.sign(y) > 0) & (direct.abs() < 1)
    # Ratios first: the products of two numbers of the size of A would underflow.
    p, q, A = torch.where(close, x, 1.0), torch.where(close, y, 1.0), torch.where(close, A, 0.0)
    root_p, root_q = torch.hypot(p, A), torch.hypot(q, A)
    ratio = ((p - q) / root_p) * ((p + q) / root_q) / (p / root_p + q / root_q)
    return torch.where(close, torch.asinh(ratio), direct)


def _series(e: Tensor, first: int, step: int, coefficient: Callable[[int], float]) -> Tensor:
    """Sum coefficient(k) e^k over k = first, first + step, ...: exact to rounding at |e| < 1/2."""
    return sum(
        (coefficient(k) * e**k for k in range(first, first + 7 * step, step)),
        start=torch.zeros_like(e),
    )


def _bregman_even(e: Tensor) -> Tensor:
    """Give 1 - cosh e + e sinh e for |e| < 1/2."""
    return _series(e, 2, 2, lambda k: 1 / math.factorial(k - 1) - 1 / math.factorial(k))


def _bregman_odd(e: Tensor) -> Tensor:
    """Give e cosh e - sinh e for |e| < 1/2."""
    return _series(e, 3, 2, lambda k: 1 / math.factorial(k - 1) - 1 / math.factorial(k))


def entropy_excess(r: Tensor) -> Tensor:
    """Give (1 + r) log(1 + r) - r for r >= -1, without cancellation near 0."""
    small = r.abs() < 0.02
    near = _series(torch.where(small, r, 0.0), 2, 1, lambda k: (-1) ** k / (k * (k - 1)))
    far = torch.xlogy(1 + r, 1 + r) - r
    return torch.where(small, near, far)
