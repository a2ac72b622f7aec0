r"""R_a of commuting quadratic forms with weight decay (Theorem 3.10)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..regularizer import Regularizer, WeightDecay
from ..reparam import CommutingQuadratic, Parameters, Reparam, factors
from .function import LegendreFunction, RangeError, Scalar, checked

__all__ = ["QuadraticEntropy"]


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
        # A generic combination of commuting matrices has their joint eigenvectors.
        mix = torch.randn(len(A), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        _, V = torch.linalg.eigh(torch.einsum("i,ijk->jk", mix.to(A.dtype), A))
        rotated = V.mT @ A @ V
        eigenvalues = rotated.diagonal(dim1=-2, dim2=-1)
        off = (rotated - torch.diag_embed(eigenvalues)).abs().max() / A.abs().max()
        if off > 1e-8:
            raise ValueError(f"{g}: the A_i do not commute (off-diagonal part {off:.1e})")
        R = cls(eigenvalues, 2 * torch.log((V.mT @ w).abs()))
        if torch.linalg.matrix_rank(R._hessian(torch.zeros_like(mix), 0.0)) < len(A):
            raise ValueError(f"{g} is not regular at w0: the vectors A_i w0 are dependent")
        return R

    def _weights(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give the squared components of w(mu, a) in the eigenbasis."""
        return torch.exp(self.log_c2 + 2 * a + 2 * mu @ self.eigenvalues)

    def _hessian(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give d primal / d mu = J J^T."""
        return (self.eigenvalues * self._weights(mu, a)) @ self.eigenvalues.mT

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Give all of R^d."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give x_i = 1/2 sum_k lambda_ik w_k^2."""
        checked(self, "mu", mu, a)
        return 0.5 * self._weights(mu, a) @ self.eigenvalues.mT

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give 1/4 |w(mu, a)|^2."""
        checked(self, "mu", mu, a)
        return 0.25 * self._weights(mu, a).sum(-1)

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Minimize conjugate(mu) - <mu, x> by Newton's method; `RangeError` if x is unreachable."""
        checked(self, "x", x, a)
        return _Mirror.apply(x, torch.as_tensor(a, dtype=self.dtype), self)  # pyright: ignore

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Give the inverse of J J^T."""
        return torch.linalg.inv(self._hessian(self.mirror(x, a), a))


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
        dx = torch.linalg.solve(ctx.R._hessian(mu, a), grads[0])
        return dx, -2 * (dx * ctx.R.primal(mu, a)).sum(), None


def _newton(R: QuadraticEntropy, x: Tensor, a: Tensor, steps: int = 200) -> Tensor:
    """Minimize the convex conjugate(mu) - <mu, x> with a damped step."""
    mu = torch.zeros_like(x)

    def objective(m: Tensor) -> Tensor:
        return R.conjugate(m, a) - m @ x

    for _ in range(steps):
        gradient = R.primal(mu, a) - x
        if gradient.abs().max() <= 4e-16 * (1 + x.abs().max()) * len(x):
            return mu
        step = -torch.linalg.lstsq(R._hessian(mu, a), gradient[:, None]).solution[:, 0]
        slope, size, start = gradient @ step, 1.0, objective(mu)
        while not objective(mu + size * step) <= start + 1e-4 * size * slope and size > 1e-10:
            size /= 2
        if size <= 1e-10:
            break
        mu = mu + size * step
    residual = (R.primal(mu, a) - x).abs().max()
    if residual > 1e-9 * (1 + x.abs().max()):
        raise RangeError(
            f"x is outside the domain of R_a: no w on the flow has g(w) = x (residual "
            f"{residual:.1e}); x must be a positive combination of the columns of the eigenvalues"
        )
    return mu
