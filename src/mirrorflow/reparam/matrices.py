"""Matrices from factors: quadratic forms, U U^T, and A B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import Parameters, Reparam, factors, row_singular_values

__all__ = ["CommutingQuadratic", "Product", "SymmetricFactor"]

# What `check` advises for products of matrices.
ALIGNED = (
    "What is needed: gradients that stay aligned with the factors (shared singular vectors), or "
    "measurements <A_i, X> with commuting A_i: pass them as sensing=."
)


class CommutingQuadratic(Reparam):
    r"""x_i = 1/2 w^T A_i w for symmetric matrices A_i (Theorem 3.10).

    Parameters
    ----------
    A : Tensor of shape (d, D, D)
        The symmetric matrices. Whether they commute is for `check` to say.
    """

    def __init__(self, A: Tensor) -> None:
        if not isinstance(A, Tensor) or not A.is_floating_point():
            kind = A.dtype if isinstance(A, Tensor) else type(A).__name__
            raise TypeError(f"CommutingQuadratic: A must be a tensor of floats, got {kind}")
        if A.ndim != 3 or A.shape[1] != A.shape[2]:
            raise ValueError(f"CommutingQuadratic: A must be (d, D, D), got {tuple(A.shape)}")
        if not torch.isfinite(A).all():
            raise ValueError("CommutingQuadratic: A must be finite, got NaN or infinite entries")
        skew, size = (A - A.mT).abs().sum(), A.abs().sum()
        if skew > max(1e-10, 100 * torch.finfo(A.dtype).eps) * size:
            raise ValueError(
                f"CommutingQuadratic: each A_i must be symmetric, A is off by {skew / size:.1e}"
            )
        self.A = (A + A.mT) / 2

    def __call__(self, w: Parameters) -> Tensor:
        """Evaluate the d quadratic forms."""
        v = factors(w)[0]
        return 0.5 * torch.einsum("ijk,j,k->i", self.A.to(v.dtype), v, v)

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Return (sum_i dx_i A_i) w."""
        v = factors(w)[0]
        moved = torch.einsum("i,ijk,k->j", dx, self.A.to(v.dtype), v)
        return moved if isinstance(w, Tensor) else (moved,)

    def validate(self, w: Parameters) -> None:
        """Require a vector of length D."""
        super().validate(w)
        if factors(w)[0].shape != self.A.shape[1:2]:
            shape = tuple(factors(w)[0].shape)
            raise ValueError(f"{self}: w must have shape ({self.A.shape[1]},), got {shape}")

    def penalty_advice(self, h: Any, mixed: bool) -> str:
        """Return Theorem 3.10: which matrices have to commute."""
        if mixed:
            return (
                "Theorem 3.10: the matrices A_i must commute with each other; no penalty mends "
                "that."
            )
        return (
            "Theorem 3.10: h = 1/2 w^T B w works for a symmetric B that commutes with every A_i; "
            "B = I is WeightDecay()."
        )

    def __repr__(self) -> str:
        """Show the numbers of forms and parameters."""
        return f"CommutingQuadratic(d={self.A.shape[0]}, D={self.A.shape[1]})"


class SymmetricFactor(Reparam):
    r"""X = U U^T, the matrix sensing model (Corollary C.3).

    The flow of the paper is dU = -grad f(X) U dt - alpha U dt. Automatic differentiation of
    f(U U^T) gives 2 grad f(X) U for a symmetric grad f, so `pullback` is *half* of J_g^T: a
    learning rate eta here is eta/2 of an optimizer that differentiates f(U U^T).
    """

    names = ("U",)

    def __call__(self, w: Parameters) -> Tensor:
        """Evaluate U U^T."""
        U = factors(w)[0]
        return U @ U.mT

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Return sym(dx) U, half of the transposed Jacobian (see the class)."""
        moved = self.project(dx) @ factors(w)[0]
        return moved if isinstance(w, Tensor) else (moved,)

    def project(self, dx: Tensor) -> Tensor:
        """Return the symmetric part."""
        return 0.5 * (dx + dx.mT)

    def singular_values(self, w: Parameters) -> Tensor:
        """Return those of U: dX = dU U^T + U dU^T is onto if and only if U has full row rank."""
        return row_singular_values(factors(w)[0])

    def start_advice(self, mixed: bool, rank: int, generic_rank: int) -> str:
        """Return the start of Corollary C.3."""
        return self.penalty_advice(None, mixed)

    def penalty_advice(self, h: Any, mixed: bool) -> str:
        """Return the start of Corollary C.3, or what measurements have to share."""
        if mixed:
            return ALIGNED
        return "Corollary C.3: start from U0 U0^T = beta I; U needs full row rank."

    def validate(self, w: Parameters) -> None:
        """Require a matrix."""
        super().validate(w)
        if factors(w)[0].ndim != 2:
            raise ValueError(f"SymmetricFactor(): U must be a matrix, got {factors(w)[0].ndim}-d")


class Product(Reparam):
    """X = A B, as in LoRA and Q K^T."""

    names = ("A", "B")

    def singular_values(self, w: Parameters) -> Tensor:
        """Return those of A or B^T: dX = dA B + A dB is onto iff A or B^T has full row rank."""
        A, B = factors(w)
        one, two = row_singular_values(A), row_singular_values(B.mT)
        return max((one, two), key=lambda s: float(s[-1] / s[0]) if s[0] > 0 else 0.0)

    def start_advice(self, mixed: bool, rank: int, generic_rank: int) -> str:
        """Return what measurements have to share: the start does not help."""
        return ALIGNED

    def penalty_advice(self, h: Any, mixed: bool) -> str:
        """Return what measurements have to share: a penalty does not help."""
        return ALIGNED

    def __call__(self, w: Parameters) -> Tensor:
        """Multiply the factors."""
        A, B = w
        return A @ B

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Return (dx B^T, A^T dx)."""
        A, B = w
        return dx @ B.mT, A.mT @ dx

    def validate(self, w: Parameters) -> None:
        """Require matrices that can be multiplied."""
        super().validate(w)
        A, B = w
        if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[0]:
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise ValueError(f"Product(): A and B must be (n, r) and (r, m), got {shapes}")
