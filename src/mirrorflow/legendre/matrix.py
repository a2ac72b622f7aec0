r"""R_a of X = U U^T with weight decay: the von Neumann entropy (Corollary C.3)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..regularizer import Regularizer, WeightDecay
from ..reparam import Parameters, Reparam, SymmetricFactor
from ._matrix_dual import MatrixDual, commutator, smat, svec
from .base import LegendreFunction, RangeError, Scalar, checked
from .dual import Array, ExponentialDual, ExponentialProblem
from .hyperbolic import entropy_excess

__all__ = ["MatrixEntropy"]

COMMUTING = 1e-10  # relative size of commutators below which sensing matrices commute


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
        if not beta > 0 or off > max(1e-10, 100 * torch.finfo(X0.dtype).eps) * beta:
            raise ValueError(
                f"{g}: U0 must satisfy U0 U0^T = beta I with beta > 0 (Corollary C.3), got a start "
                f"that is off by {off:.1e}. Take U0 = sqrt(beta) times an orthogonal matrix."
            )
        return cls(len(X0), math.log(float(beta)), X0.dtype)

    def log_scale(self, a: Scalar) -> Scalar:
        """Return log(beta e^{2a})."""
        return self.log_beta + 2 * a

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return all symmetric matrices."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def domain(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return the bounds of the eigenvalues: X must be positive definite."""
        return torch.zeros((), dtype=self.dtype), torch.tensor(torch.inf, dtype=self.dtype)

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return beta e^{2a} exp(2 mu) for a symmetric mu."""
        self._check("mu", mu, a)
        shift = torch.as_tensor(self.log_scale(a), dtype=mu.dtype)
        eye = torch.eye(self.n, dtype=mu.dtype)
        # Corollary C.3: beta e^{2a} exp(2 mu), with the scale in the exponent.
        return torch.linalg.matrix_exp(2 * mu + shift * eye)

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Return 1/2 (log X - log(beta e^{2a}) I); `RangeError` unless X is positive definite."""
        self._check("x", x, a)
        eye = torch.eye(self.n, dtype=x.dtype)
        # The factor 1/2 is that of the flow dU = -(grad f + alpha) U (errata 9 and 17).
        return 0.5 * (_Log.apply(x) - self.log_scale(a) * eye)  # pyright: ignore

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return 1/2 Tr X at X = primal(mu, a)."""
        return 0.5 * self.primal(mu, a).diagonal(dim1=-2, dim2=-1).sum(-1)  # d(1/2 Tr X) = <X, dmu>

    def value(self, x: Tensor, a: Scalar) -> Tensor:
        """Evaluate R_a(X); finite also on the boundary, where X is singular."""
        self._check("x", x, a)
        trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)
        # Eq. (17) with its factor 1/2 (errata 9)
        return 0.5 * (_Entropy.apply(x) - trace * (1 + self.log_scale(a)))  # pyright: ignore

    def bregman(self, x: Tensor, y: Tensor, a: Scalar) -> Tensor:
        """Evaluate 1/2 Tr[X (log X - log Y) - X + Y], half the quantum relative entropy."""
        self._check("x", x, a)
        self._check("y", y, a)
        return 0.5 * _Divergence.apply(x, y)  # pyright: ignore

    def apply_metric(self, x: Tensor, a: Scalar, direction: Tensor) -> Tensor:
        """Apply the Hessian of R_a at X to a symmetric direction: half the derivative of log."""
        self._check("x", x, a)
        # d mu = 1/2 D log(X)[direction], and D log(X) = D exp(log X)^{-1}.
        return 0.5 * _InverseExpDerivative.apply(_Log.apply(x), direction)  # pyright: ignore

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return the Hessian as an (n^2, n^2) matrix that acts on flattened symmetric matrices."""
        self._check("x", x, a)
        basis = torch.eye(self.n**2, dtype=x.dtype).reshape(-1, self.n, self.n)
        return self.apply_metric(x, a, basis).reshape(self.n**2, self.n**2)

    def dual_problem(self, Z: Array) -> ExponentialProblem:
        """Return the problem of X = beta e^{2a} expm(2 sum theta_i Z_i), on half-vectors."""

        def make(Q: Array, a: float, log_unit: float) -> ExponentialDual:
            return MatrixDual(Q, self.n, float(self.log_scale(a)) - log_unit)

        def log_size(a: float) -> float:
            return float(self.log_scale(a))

        half = svec(self._symmetric(Z))
        return ExponentialProblem(half, make, log_size, 2.0, lambda v: smat(v, self.n).reshape(-1))

    def describes_training(self, Z: Array) -> bool:
        """Return whether the sensing matrices commute; else the flow of U U^T ends elsewhere."""
        return commutator(self._symmetric(Z)) <= COMMUTING

    def kkt_residual(self, x: Tensor, mu: Tensor, a: Scalar) -> float:
        """Return |X - primal(mu, a)| / |X|: `mirror` loses the small eigenvalues to rounding."""
        return self._primal_residual(x, (mu + mu.mT) / 2, a)

    def sparsity_norm(self, x: Array) -> float:
        """Return the trace norm of X."""
        return float(np.abs(self._eigenvalues(x)).sum())

    def sparsity_ceiling(self, mu: Array) -> float:
        """Return the largest eigenvalue: X has no negative ones."""
        return float(self._eigenvalues(mu).max(initial=0.0))

    def _symmetric(self, Z: Array) -> Array:
        """Return the symmetric parts of flattened matrices."""
        full = Z.reshape(*Z.shape[:-1], self.n, self.n)
        return (full + np.swapaxes(full, -1, -2)) / 2

    def _eigenvalues(self, v: Array) -> Array:
        return np.asarray(np.linalg.eigvalsh(self._symmetric(v)), dtype=np.float64)

    def _check(self, name: str, matrix: Tensor, a: Scalar) -> None:
        """Require a symmetric matrix of the right shape."""
        checked(self, name, matrix, a)
        gap, size = (matrix - matrix.mT).abs().max(), matrix.abs().max()
        # A dual matrix may be nothing but rounding around 0; X has a scale, however small.
        if gap > 1e-6 * (size if name != "mu" else 1 + size):
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
        # D log(X) = D exp(log X)^{-1}, which is its own adjoint.
        return _InverseExpDerivative.apply(log, grads[0])


class _InverseExpDerivative(torch.autograd.Function):
    """Solve D exp(L)[E] = G for E, symmetric L and G."""

    @staticmethod
    def forward(ctx: Any, L: Tensor, G: Tensor) -> Tensor:
        s, V = torch.linalg.eigh(L)
        inner = V.mT @ (0.5 * (G + G.mT)) @ V
        # Daleckii and Krein: D exp(L) multiplies entry (i, j) by (e^{s_i} - e^{s_j}) / (s_i - s_j).
        E = V @ (inner * _divided_log(s)) @ V.mT
        ctx.save_for_backward(L, E)
        return E

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        L, E = ctx.saved_tensors
        # E solves D exp(L)[E] = G, so that dG = D exp(L)[dE] + D^2 exp(L)[dL, E]. The pullback of
        # the last term is taken in L alone: E, which depends on L, is constant in it.
        solved = _InverseExpDerivative.apply(L, grads[0])

        def derivative(matrix: Tensor) -> Tensor:
            return torch.func.jvp(torch.linalg.matrix_exp, (matrix.expand_as(E),), (E,))[1]

        pulled = torch.func.vjp(derivative, L)[1](solved)[0]
        return -pulled, solved


class _Entropy(torch.autograd.Function):
    """Tr X log X, finite where X is singular; its derivative log X + I is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        s = torch.linalg.eigvalsh(x)
        _positive(s, closed=True)
        return torch.xlogy(s.clamp(min=0), s.clamp(min=0)).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        # d Tr(X log X) = <log X + I, dX>
        return grads[0][..., None, None] * (_Log.apply(x) + torch.eye(x.shape[-1], dtype=x.dtype))


class _Divergence(torch.autograd.Function):
    """Tr[X (log X - log Y) - X + Y], from the eigenvalues s of X and t of Y and the overlaps.

    It is sum_ij (v_i . u_j)^2 t_j [(1 + r) log(1 + r) - r] with r = s_i / t_j - 1, where every term
    is >= 0: the difference of two values of R_a would lose its digits for X close to Y.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        (s, V), (t, U) = torch.linalg.eigh(x), torch.linalg.eigh(y)
        _positive(s, closed=True)
        _positive(t, closed=False)
        s, t = s.clamp(min=0)[..., :, None], t[..., None, :]
        # t [(1 + r) log(1 + r) - r] = s log(s/t) - s + t
        return ((V.mT @ U) ** 2 * t * entropy_excess((s - t) / t)).sum((-2, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y = ctx.saved_tensors
        log_y, by = _Log.apply(y), grads[0][..., None, None]
        # d/dY of -Tr(X log Y) + Tr Y is -D log(Y)[X] + I, and D log(Y)[Y] = I.
        curved = _InverseExpDerivative.apply(log_y, y - x)
        return by * (_Log.apply(x) - log_y), by * curved


def _divided_log(log_s: Tensor) -> Tensor:
    """Return (log s_i - log s_j)/(s_i - s_j), and 1/s_i where they meet, from log s."""
    one, two = log_s[..., :, None], log_s[..., None, :]
    apart = (one - two).abs()
    # |s_i - s_j| = s_max (1 - e^-apart)
    ratio = torch.where(apart > 0, apart / -torch.expm1(-apart), 1.0)
    return ratio * torch.exp(-torch.maximum(one, two))


def _positive(s: Tensor, closed: bool) -> None:
    """Raise `RangeError` unless the eigenvalues are positive (or zero up to rounding)."""
    lowest, slack = s.min(), 1e-12 * s.abs().max() if closed else 0.0
    if not (lowest >= -slack if closed else lowest > 0):
        raise RangeError(
            f"X has the eigenvalue {lowest:.3g}, outside the domain (0, inf): X must be positive "
            "definite"
        )
