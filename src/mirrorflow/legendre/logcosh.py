r"""R_a of log u - log v with the penalty log u + log v (Appendix E of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..regularizer import Regularizer, Separable
from ..reparam import LogRatio, Parameters, Reparam, factors
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

__all__ = ["LogCoshEntropy"]


class LogCoshEntropy(LegendreFunction):
    r"""R_a of x = log u - log v: a log-cosh whose scale falls as decay accumulates.

    .. math:: u^2 = U + 2\mu, \quad v^2 = V - 2\mu, \quad U = u_0^2 + 2 \kappa_u a, \quad
              V = v_0^2 + 2 \kappa_v a, \quad x = \tfrac12 \log (u^2 / v^2)

    so that mirror = 1/2 [V s(2x) - U s(-2x)] with the logistic function s, and

    .. math:: R_a(x) = \tfrac14 \sum [U \log(1 + e^{-2x}) + V \log(1 + e^{2x})] - \phi(a), \quad
              \phi(a) = \tfrac14 \sum [S \log S - S] + \text{const}, \quad S = U + V

    (Appendix E with +2a: errata 3). The term phi makes d R_a / d a = -h(w); without it,
    "contracting" would have no meaning. R_a exists as long as S > 0; the centre needs U, V > 0,
    that is 2a > -min(u0^2, v0^2) for the default penalty: past that u or v reaches 0 in finite
    time.

    Parameters
    ----------
    u2, v2 : Tensor
        u0^2 and v0^2 per coordinate, > 0.
    up, down : float
        kappa_u and kappa_v, the coefficients of log u and log v in h.
    """

    elementwise = True

    def __init__(
        self, u2: Tensor, v2: Tensor, up: float | Tensor = 1.0, down: float | Tensor = 1.0
    ) -> None:
        self.u2, self.v2, self.up, self.down = u2, v2, up, down
        self.shape, self.dtype = u2.shape, u2.dtype

    @classmethod
    def start(cls, g: Reparam, h: Regularizer, w0: Parameters) -> LogCoshEntropy:
        """Read the constants from u0 and v0, which must be positive."""
        assert isinstance(g, LogRatio) and isinstance(h, Separable)
        g.validate(w0)
        u, v = factors(w0)
        up, down = h.coefficients(g)
        return cls(u * u, v * v, up, -down)  # h = sum c_j g_j, with g_v = -log v

    def _ends(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return U and V; `RangeError` where their sum is not positive."""
        U, V = self.u2 + 2 * self.up * a, self.v2 + 2 * self.down * a  # +2a: errata 3
        if not (U + V > 0).all():
            raise RangeError(
                f"a = {a} is outside the range of accumulated decay: u0^2 + v0^2 + "
                f"2 (c_u + c_v) a must be positive, its minimum is {(U + V).min():.6g}"
            )
        return U, V

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return (-U/2, V/2) per coordinate; it narrows as decay accumulates."""
        U, V = self._ends(a)
        return -U / 2, V / 2

    def _squares(self, mu: Tensor, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return u^2 and v^2 after checking that both are positive."""
        checked(self, "mu", mu, a)
        lower, upper = self.range(a)
        inside = (mu > lower) & (mu < upper)
        if not inside.all():
            raise RangeError(outside(mu, lower, upper, inside))
        # du = (dmu + kappa_u da) / u gives u^2 = U + 2 mu, and dv likewise v^2 = V - 2 mu.
        return 2 * (mu - lower), 2 * (upper - mu)

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return 1/2 log(u^2 / v^2)."""
        p, n = self._squares(mu, a)
        return 0.5 * (torch.log(p) - torch.log(n))  # log u - log v

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        r"""Return 1/4 sum [u^2 log u^2 - u^2 + v^2 log v^2 - v^2], less its value at the start."""
        p, n = self._squares(mu, a)
        # d(s log s - s) = log s ds with d(u^2) = 2 dmu, d(v^2) = -2 dmu: the gradient is 4x.
        excess = _entropy(p) + _entropy(n) - _entropy(self.u2) - _entropy(self.v2)
        return self._sum(excess) / 4

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Return 1/2 [V s(2x) - U s(-2x)]."""
        checked(self, "x", x, a)
        U, V = self._ends(a)
        # U + 2 mu = e^{2x} (V - 2 mu), solved for mu.
        mu = 0.5 * (V * torch.sigmoid(2 * x) - U * torch.sigmoid(-2 * x))
        return interior(mu, -U / 2, V / 2)

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        """Evaluate R_a(x), finite for every x."""
        checked(self, "x", x, a)
        U, V = self._ends(a)
        shape = U * softplus(-2 * x) + V * softplus(2 * x)
        constant = _entropy(U + V) - _entropy(self.u2) - _entropy(self.v2)  # 4 phi(a)
        return self._sum(shape - constant) / 4

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        """Evaluate S/4 sum [softplus(2x) - softplus(2y) - 2 s(2y) (x - y)], each term >= 0."""
        checked(self, "x", x, a)
        checked(self, "y", y, a)
        U, V = self._ends(a)
        # R_a = S/4 softplus(2x) - U x / 2: the linear part has no divergence.
        return self._sum((U + V) * _softplus_excess(2 * y, 2 * (x - y))) / 4

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return the diagonal S s(2x) s(-2x)."""
        checked(self, "x", x, a)
        U, V = self._ends(a)
        return (U + V) * _logistic_slope(2 * x)  # S / (4 cosh^2 x): errata 12

    def folded(self, a: Scalar, tilt: Scalar = 0.0) -> LogCoshEntropy:
        """Return R_a(x) - <tilt, x>, whose constants are u^2 and v^2 at mu = tilt."""
        u2, v2 = self._squares(torch.as_tensor(tilt, dtype=self.dtype).expand(self.shape), a)
        return LogCoshEntropy(u2, v2, self.up, self.down)

    def shrunk(self, a: Scalar) -> tuple[LogCoshEntropy, float]:
        """Return the R_0 of a start from e^a (u0, v0), and ``|w|^2 / 2`` there."""
        scale = torch.exp(2 * torch.as_tensor(a, dtype=self.dtype))
        u2, v2 = self.u2 * scale, self.v2 * scale  # u0 -> e^a u0
        return LogCoshEntropy(u2, v2, self.up, self.down), float((u2 + v2).sum()) / 2


def _entropy(s: Tensor) -> Tensor:
    """Return s log s - s."""
    return torch.xlogy(s, s) - s


def _logistic_slope(y: Tensor) -> Tensor:
    """Return s(y) s(-y), the second derivative of softplus."""
    return torch.exp(logsigmoid(y) + logsigmoid(-y))


def _softplus_excess(y: Tensor, e: Tensor) -> Tensor:
    """Return softplus(y + e) - softplus(y) - s(y) e >= 0, accurate relative to itself."""
    # It stays the same if y and e change signs; s(y) <= 1/2 keeps the terms below apart.
    y, e = torch.where(y > 0, -y, y), torch.where(y > 0, -e, e)
    small, over = e.abs() < 1, y + e > 0
    near = near_bregman(_logistic_slope, y, torch.where(small, e, 0.0))
    # softplus(y + e) - softplus(y) = log(1 + s(y) (exp(e) - 1)) loses no digits while y + e <= 0.
    under = torch.where(small | over, -1.0, e)
    gain = torch.log1p(torch.exp(logsigmoid(y) + under) - torch.sigmoid(y))
    far = torch.where(over, softplus(y + e) - softplus(y), gain) - torch.sigmoid(y) * e
    return torch.where(small, near, far)
