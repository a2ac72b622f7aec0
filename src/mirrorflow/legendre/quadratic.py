r"""R_a of commuting quadratic forms with weight decay (Theorem 3.10)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..regularizer import Regularizer, WeightDecay
from ..reparam import CommutingQuadratic, Parameters, Reparam, factors
from ._exponential_duals import OneSidedDual, flat
from .base import LegendreFunction, RangeError, Scalar, checked, near_bregman
from .dual import Array, ExponentialDual, ExponentialProblem

__all__ = ["QuadraticEntropy", "in_double"]


class QuadraticEntropy(LegendreFunction):
    r"""R_a of x_i = 1/2 w^T A_i w, as the conjugate of a sum of exponentials.

    In a joint orthonormal eigenbasis of the A_i, with eigenvalues lambda_ik and c = V^T w0,

    .. math:: R_a^*(\mu) = \tfrac14 \sum_k c_k^2 \exp\bigl(2 a + 2 \sum_i \mu_i \lambda_{ik}\bigr)

    (Theorem 3.10 with B = I). The metric is a d x d matrix.

    Parameters
    ----------
    eigenvalues : Tensor of shape (d, D)
        lambda_ik.
    log_c2 : Tensor of shape (D,)
        log c_k^2, -inf where w0 has no such component.
    """

    def __init__(self, eigenvalues: Tensor, log_c2: Tensor) -> None:
        self.eigenvalues, self.log_c2 = eigenvalues, log_c2
        self.shape, self.dtype = eigenvalues.shape[:1], eigenvalues.dtype

    @classmethod
    def start(cls, g: Reparam, h: Regularizer, w0: Parameters) -> QuadraticEntropy:
        """Diagonalize the A_i jointly; ValueError if they do not commute or g is not regular."""
        assert isinstance(g, CommutingQuadratic) and isinstance(h, WeightDecay)
        g.validate(w0)
        w, A = factors(w0)[0], g.A
        V, eigenvalues, off = _diagonalized(A)
        if off > _rounding(A):
            raise ValueError(f"{g}: the A_i must commute, got an off-diagonal part of {off:.1e}")
        c = (V.mT @ w.to(torch.float64)).abs()
        if torch.linalg.matrix_rank(eigenvalues * c) < len(A):  # of the vectors A_i w0
            raise ValueError(f"{g}: the vectors A_i w0 must be independent, got w0 = {w0}")
        return cls(eigenvalues.to(A.dtype), (2 * torch.log(c)).to(A.dtype))

    def _weights(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return the squared components of w(mu, a) in the eigenbasis."""
        # Theorem 3.10: w(mu, a) = exp(a I + sum mu_i A_i) w0, each component squared.
        return torch.exp(self.log_c2 + 2 * a + 2 * mu @ self.eigenvalues)

    def _hessian(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return d primal / d mu = J J^T."""
        # J has the rows (A_i w)^T
        return (self.eigenvalues * self._weights(mu, a)) @ self.eigenvalues.mT

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return all of R^d."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return x_i = 1/2 sum_k lambda_ik w_k^2."""
        checked(self, "mu", mu, a)
        return 0.5 * self._weights(mu, a) @ self.eigenvalues.mT

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return 1/4 |w(mu, a)|^2."""
        checked(self, "mu", mu, a)
        return 0.25 * self._weights(mu, a).sum(-1)  # the potential of Theorem 3.10

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Minimize conjugate(mu) - <mu, x> by Newton's method; `RangeError` if x is unreachable."""
        checked(self, "x", x, a)
        if x.ndim > 1:
            return torch.stack([self.mirror(row, a) for row in x])
        return _Mirror.apply(x, torch.as_tensor(a, dtype=self.dtype), self)  # pyright: ignore

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return the inverse of J J^T."""
        return torch.linalg.inv(self._hessian(self.mirror(x, a), a))  # hess R_a = (J J^T)^{-1}

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        r"""Evaluate the divergence by the one of the conjugate, a sum of terms >= 0.

        With mu, nu the mirrors of x, y and e = 2 lambda^T (nu - mu) it is
        1/4 sum_k w_k(mu)^2 (exp(e_k) - 1 - e_k).
        """
        checked(self, "x", x, a)
        checked(self, "y", y, a)
        mu, nu = self.mirror(x, a), self.mirror(y, a)
        # D_R(x, y) = D_{R^*}(nu, mu)
        return (self._weights(mu, a) * _exp_excess(2 * (nu - mu) @ self.eigenvalues)).sum(-1) / 4

    def dual_problem(self, Z: Array) -> ExponentialProblem:
        """Return the problem of s, the halved squares of w in the eigenbasis: x = Lambda s."""
        eigenvalues = self.eigenvalues.numpy().astype(np.float64)

        def make(Q: Array, a: float, log_unit: float) -> ExponentialDual:
            # s_k = w_k^2 / 2 = c_k^2 / 2 e^{2a + 2 lambda_k^T mu}: one-sided, with speed 2.
            log_s = flat(self.log_c2) + 2 * a - math.log(2) - log_unit
            return OneSidedDual(Q, log_s, np.ones(len(log_s)), 2.0)

        def log_size(a: float) -> float:
            return float(flat(self.log_c2).max(initial=-np.inf)) + 2 * a

        return ExponentialProblem(Z @ eigenvalues, make, log_size, 2.0, lambda s: eigenvalues @ s)

    def kkt_residual(self, x: Tensor, mu: Tensor, a: Scalar) -> float:
        """Return |x - primal(mu, a)| / |x|: `mirror` loses the small squares of w to rounding."""
        return self._primal_residual(x, mu, a)


class _Mirror(torch.autograd.Function):
    """mu(x, a), with implicit derivatives in the saved output: H dmu = dx - 2 x da."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, R: QuadraticEntropy) -> Tensor:
        mu = _newton(R, x, a)
        ctx.save_for_backward(mu, a)
        ctx.R = R
        return mu

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        mu, a = ctx.saved_tensors
        dx = torch.linalg.solve(ctx.R._hessian(mu, a), grads[0])  # dx/da = 2x at fixed mu
        return dx, -2 * (dx * ctx.R.primal(mu, a)).sum(), None


def in_double(g: Reparam) -> Reparam:
    """Return g in float64, the precision of `check`; only quadratic forms hold numbers.

    Matrices that commute up to the rounding of a lower precision then commute.
    """
    if not isinstance(g, CommutingQuadratic) or g.A.dtype == torch.float64:
        return g
    V, eigenvalues, off = _diagonalized(g.A)
    A = (V * eigenvalues[:, None]) @ V.mT if off <= _rounding(g.A) else g.A.to(torch.float64)
    return CommutingQuadratic((A + A.mT) / 2)


def _diagonalized(A: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return joint eigenvectors, the eigenvalues, and what is left off the diagonal, in float64."""
    A = A.to(torch.float64)
    # A generic combination of commuting matrices has their joint eigenvectors.
    mix = torch.randn(len(A), generator=torch.Generator().manual_seed(0), dtype=A.dtype)
    V = torch.linalg.eigh(torch.einsum("i,ijk->jk", mix, A))[1]
    rotated = V.mT @ A @ V
    eigenvalues = rotated.diagonal(dim1=-2, dim2=-1)
    off = (rotated - torch.diag_embed(eigenvalues)).abs().max() / A.abs().max()
    return V, eigenvalues, float(off)


def _rounding(A: Tensor) -> float:
    """Return the off-diagonal part that rounding may leave."""
    return max(1e-8, 100 * torch.finfo(A.dtype).eps)


def _newton(R: QuadraticEntropy, x: Tensor, a: Tensor, steps: int = 1000) -> Tensor:
    """Minimize conjugate(mu) - <mu, x>, in float64 and on the scale of x.

    Along a step p every term is an exponential of rate at most r = max |2 lambda^T p|. Therefore
    the fraction log(1 + r) / r of Newton's step always descends, without a line search; and where
    the terms are e^{-300} of what they have to be, one step takes them most of the way.
    """
    known = torch.isfinite(R.log_c2)
    rates = 2 * R.eigenvalues[:, known].to(torch.float64)
    logs, target = (R.log_c2[known] + 2 * a).to(torch.float64), x.to(torch.float64)
    size = target.abs().max()
    log_unit = torch.log(size) if size > 0 else logs.max()  # in these units the largest target is 1
    logs, target = logs - log_unit, target * torch.exp(-log_unit)
    mu, error = torch.zeros_like(target), torch.inf
    for _ in range(steps):
        moved = mu @ rates
        terms = torch.exp(logs + moved)
        gradient = rates @ terms / 4 - target  # d R^* / dmu - x
        scale = rates.abs() @ terms / 4 + target.abs()
        error = float((gradient.abs() / scale.clamp(min=1e-300)).max())
        # An exponent that is the sum of two numbers of size 300 is known to 300 eps.
        if error <= 2e-16 * (len(logs) + float(logs.abs().max() + moved.abs().max())):
            break
        mu = mu + _descent(rates, logs + moved, gradient)
    if not error <= 1e-9:
        raise RangeError(
            f"x is outside the domain of R_a: no w on the flow has g(w) = x (residual "
            f"{error:.1e}); x must be a positive combination of the columns of the eigenvalues"
        )
    return mu.to(x.dtype)


def _descent(rates: Tensor, exponents: Tensor, gradient: Tensor) -> Tensor:
    """Return the step log(1 + r) / r of Newton's, for the Hessian 1/4 rates exp(exponents) rates^T.

    The largest term is taken out of the Hessian. Its rows are sorted for the QR factorization,
    which then keeps the digits of terms of very different size.
    """
    exponents, order = torch.sort(exponents, descending=True)
    rates, top = rates[:, order], exponents[0]
    weights = torch.exp(((exponents - top) / 2).clamp(min=-300))  # never 0: the root is regular
    # H = e^top R^T R: the triangle has the square root of H's condition.
    root = torch.linalg.qr((weights * rates / 2).mT, mode="r")[1]
    half = torch.linalg.solve_triangular(root.mT, -gradient[:, None], upper=False)
    step = torch.linalg.solve_triangular(root, half, upper=True)[:, 0]
    reach = (step @ rates).abs().max()
    # Newton's step is e^-top step, its r = e^-top reach: log(1 + r) / r of it.
    return step * torch.logaddexp(torch.zeros_like(top), torch.log(reach) - top) / reach


def _exp_excess(e: Tensor) -> Tensor:
    """Return exp(e) - 1 - e, without cancellation near 0."""
    small = e.abs() < 1
    # e^2 int_0^1 (1 - s) exp(s e) ds
    near = near_bregman(torch.exp, torch.zeros_like(e), torch.where(small, e, 0.0))
    return torch.where(small, near, torch.expm1(e) - e)
