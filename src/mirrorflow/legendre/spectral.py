r"""R_a of X = U U^T with weight decay: the von Neumann entropy (Corollary C.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..regularizer import Regularizer, WeightDecay
from ..reparam import Parameters, Reparam, SymmetricFactor
from .function import LegendreFunction, RangeError, Scalar, checked

__all__ = ["MatrixEntropy"]


class MatrixEntropy(LegendreFunction):
    r"""R_a(X) = 1/2 Tr[X log X - X - X log(beta e^{2a})], for X symmetric positive definite.

    .. math:: X = \beta e^{2a} \exp(2M), \quad
              \mathrm{mirror}(X) = \tfrac12 (\log X - \log(\beta e^{2a}) I)

    It is the flow's Legendre function where the sensing matrices commute (Corollary C.3, with the
    flow dU = -grad f(X) U - alpha U). Where they do not, the flow of U U^T has none, and minimizing
    R_a is only a surrogate: `limit` says which of the two it solved.

    Parameters
    ----------
    n : int
        The size of X.
    log_beta : float
        The logarithm of beta, for a start U0 U0^T = beta I.
    """

    def __init__(self, n: int, log_beta: float, dtype: torch.dtype = torch.float64) -> None:
        self.n, self.log_beta, self.dtype = n, log_beta, dtype
        self.shape = torch.Size((n, n))

    @classmethod
    def start(cls, g: Reparam, h: Regularizer, w0: Parameters) -> MatrixEntropy:
        """Read beta from U0; ValueError unless U0 U0^T = beta I with beta > 0."""
        assert isinstance(g, SymmetricFactor) and isinstance(h, WeightDecay)
        g.validate(w0)
        X0 = g(w0)
        beta = X0.diagonal().mean()
        off = (X0 - beta * torch.eye(len(X0), dtype=X0.dtype)).abs().max()
        if not beta > 0 or off > 1e-10 * beta:
            raise ValueError(
                f"{g}: R_a is known for U0 U0^T = beta I with beta > 0 only (Corollary C.3); the "
                f"start is off by {off:.1e}. Take U0 = sqrt(beta) times an orthogonal matrix"
            )
        return cls(len(X0), math.log(float(beta)), X0.dtype)

    def log_scale(self, a: Scalar) -> Scalar:
        """Give log(beta e^{2a})."""
        return self.log_beta + 2 * a

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Give all symmetric matrices."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def domain(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Give the bounds of the eigenvalues: X must be positive definite."""
        return torch.zeros((), dtype=self.dtype), torch.tensor(torch.inf, dtype=self.dtype)

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give beta e^{2a} exp(2 mu) for a symmetric mu."""
        self._check("mu", mu, a)
        shift = torch.as_tensor(self.log_scale(a), dtype=mu.dtype)
        eye = torch.eye(self.n, dtype=mu.dtype)
        return torch.linalg.matrix_exp(2 * mu + shift * eye)

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Give 1/2 (log X - log(beta e^{2a}) I); `RangeError` unless X is positive definite."""
        self._check("x", x, a)
        eye = torch.eye(self.n, dtype=x.dtype)
        return 0.5 * (_Log.apply(x) - self.log_scale(a) * eye)  # pyright: ignore

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Give 1/2 Tr X at X = primal(mu, a)."""
        return 0.5 * self.primal(mu, a).diagonal(dim1=-2, dim2=-1).sum(-1)

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        """Evaluate R_a(X); finite on the boundary too, where X is singular."""
        self._check("x", x, a)
        eigenvalues = torch.linalg.eigvalsh(x)
        _positive(eigenvalues, closed=True)
        s = eigenvalues.clamp(min=0)
        return 0.5 * (torch.xlogy(s, s) - s * (1 + self.log_scale(a))).sum(-1)

    def apply_metric(self, x: Tensor, a: Scalar, direction: Tensor) -> Tensor:
        """Apply the Hessian of R_a at X to a symmetric direction: half the derivative of log."""
        self._check("x", x, a)
        s, V = torch.linalg.eigh(x)
        _positive(s, closed=False)
        inner = V.mT @ direction @ V
        return 0.5 * V @ (inner * _divided_log(s)) @ V.mT

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Give the Hessian as an (n^2, n^2) matrix that acts on flattened symmetric matrices."""
        basis = torch.eye(self.n**2, dtype=x.dtype).reshape(-1, self.n, self.n)
        return self.apply_metric(x, a, basis).reshape(self.n**2, self.n**2)

    def _check(self, name: str, matrix: Tensor, a: Scalar) -> None:
        """Require a symmetric matrix of the right shape."""
        checked(self, name, matrix, a)
        gap = (matrix - matrix.mT).abs().max()
        if gap > 1e-6 * (1 + matrix.abs().max()):
            raise ValueError(f"{name} must be symmetric, it is off by {gap:.1e}")


class _Log(torch.autograd.Function):
    """The logarithm of a symmetric matrix, with derivatives that hold at equal eigenvalues.

    The backward pass is the inverse of the derivative of exp at the saved output, which is
    differentiable again: eigh's own derivative is not, where eigenvalues coincide.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s, V = torch.linalg.eigh(x)
        _positive(s, closed=False)
        log = V @ (torch.log(s)[..., None] * V.mT)
        ctx.save_for_backward(log)
        return log

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (log,) = ctx.saved_tensors
        return _InverseExpDerivative.apply(log, grads[0])


class _InverseExpDerivative(torch.autograd.Function):
    """Solve D exp(L)[E] = G for E, symmetric L and G."""

    @staticmethod
    def forward(ctx: Any, L: Tensor, G: Tensor) -> Tensor:
        s, V = torch.linalg.eigh(L)
        inner = V.mT @ (0.5 * (G + G.mT)) @ V
        E = V @ (inner * _divided_log(torch.exp(s))) @ V.mT
        ctx.save_for_backward(L, E)
        return E

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        L, E = ctx.saved_tensors
        # E solves D exp(L)[E] = G, so that dG = D exp(L)[dE] + D^2 exp(L)[dL, E]. The pullback of
        # the last term is taken in L alone: E, which depends on L, is constant in it.
        solved = _InverseExpDerivative.apply(L, grads[0])

        def derivative(matrix: Tensor) -> Tensor:
            return torch.func.jvp(torch.linalg.matrix_exp, (matrix,), (E,))[1]

        pulled = torch.func.vjp(derivative, L)[1](solved)[0]
        return -pulled, solved


def _divided_log(s: Tensor) -> Tensor:
    """Give (log s_i - log s_j)/(s_i - s_j), and 1/s_i where they meet."""
    ratio = (s[..., :, None] - s[..., None, :]) / s[..., None, :]
    close = ratio.abs() < 1e-4
    safe = torch.where(close, 1.0, ratio)
    far = torch.log1p(safe) / safe
    near = 1 - ratio / 2 + ratio**2 / 3 - ratio**3 / 4
    return torch.where(close, near, far) / s[..., None, :]


def _positive(s: Tensor, closed: bool) -> None:
    """Raise `RangeError` unless the eigenvalues are positive (or zero up to rounding)."""
    lowest, slack = s.min(), 1e-12 * s.abs().max() if closed else 0.0
    if not (lowest >= -slack if closed else lowest > 0):
        raise RangeError(
            f"X has the eigenvalue {lowest:.3g}, outside the domain (0, inf): X must be positive "
            "definite"
        )
