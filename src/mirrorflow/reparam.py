r"""Parametrizations x = g(w), with what a flow needs of them: J_g^T applied to a vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CommutingQuadratic",
    "CustomReparam",
    "Depth",
    "Hadamard",
    "Identity",
    "LogRatio",
    "Parameters",
    "PowerDifference",
    "Product",
    "Reparam",
    "SeparableReparam",
    "SymmetricFactor",
    "factors",
    "flatten",
    "unflatten",
]

Parameters = Tensor | tuple[Tensor, ...]


def factors(w: Parameters) -> tuple[Tensor, ...]:
    """Give the factor tensors of ``w``, which is one tensor or a tuple of them."""
    return (w,) if isinstance(w, Tensor) else tuple(w)


def flatten(w: Parameters) -> Tensor:
    """Join the factors of ``w`` into one vector."""
    return torch.cat([f.reshape(-1) for f in factors(w)])


def unflatten(vector: Tensor, like: Parameters) -> Parameters:
    """Cut ``vector`` into factors with the shapes of ``like``; the inverse of `flatten`."""
    parts = torch.split(vector, [f.numel() for f in factors(like)])
    shaped = tuple(p.reshape(f.shape) for p, f in zip(parts, factors(like), strict=True))
    return shaped[0] if isinstance(like, Tensor) else shaped


class Reparam(ABC):
    r"""An overparametrization x = g(w).

    Attributes
    ----------
    elementwise : bool
        Whether x_i depends on the i-th entries of the factors only, so that J_g J_g^T is diagonal.
    names : tuple of str
        The names of the factors, for messages.
    """

    elementwise: bool = False
    names: tuple[str, ...] = ("w",)

    @abstractmethod
    def __call__(self, w: Parameters) -> Tensor:
        """Evaluate x = g(w)."""

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        r"""Apply J_g(w)^T to ``dx``: the direction in which a gradient in x moves w."""
        vjp = torch.func.vjp(self.__call__, w)[1]
        return vjp(dx)[0]

    def pushforward(self, w: Parameters, dw: Parameters) -> Tensor:
        r"""Apply J_g(w) to ``dw``: how x moves when w does."""
        return torch.func.jvp(self.__call__, (w,), (dw,))[1]

    def project(self, dx: Tensor) -> Tensor:
        """Project ``dx`` on the directions that x can take (symmetric matrices for U U^T)."""
        return dx

    def validate(self, w: Parameters) -> None:
        """Raise an error that names what is wrong with ``w`` as a starting point."""
        parts = factors(w)
        if not all(isinstance(f, Tensor) for f in parts):
            got = ", ".join(sorted({type(f).__name__ for f in parts}))
            raise TypeError(f"{self}: w must be a torch tensor or a tuple of them, got {got}")
        if len(parts) != len(self.names):
            expected = f"({', '.join(self.names)})"
            raise ValueError(f"{self}: w must hold {expected}, got {len(parts)} tensor(s)")
        for name, f in zip(self.names, parts, strict=True):
            if not f.is_floating_point():
                raise TypeError(f"{self}: {name} must have a floating dtype, got {f.dtype}")
            if not torch.isfinite(f).all():
                raise ValueError(f"{self}: {name} holds NaN or infinite entries")
        if self.elementwise and any(f.shape != parts[0].shape for f in parts):
            shapes = ", ".join(
                f"{n} {tuple(f.shape)}" for n, f in zip(self.names, parts, strict=True)
            )
            raise ValueError(f"{self}: the factors must have one shape, got {shapes}")

    def __repr__(self) -> str:
        """Show the class with its arguments."""
        return f"{type(self).__name__}()"


class SeparableReparam(Reparam):
    """x_i = sum_j g_ij(w_ij): each factor contributes a term of its own (Corollary 3.7)."""

    elementwise = True
    signs: tuple[float, ...] = (1.0,)  # of the terms; Separable() uses them to make h positive

    @abstractmethod
    def terms(self, w: Parameters) -> tuple[Tensor, ...]:
        """Give the terms g_ij(w_ij), one tensor per factor, with their signs."""

    @abstractmethod
    def slopes(self, w: Parameters) -> tuple[Tensor, ...]:
        """Give the derivatives g_ij'(w_ij), one tensor per factor."""

    def __call__(self, w: Parameters) -> Tensor:
        """Evaluate x as the sum of the terms."""
        return torch.stack(torch.broadcast_tensors(*self.terms(w))).sum(0)

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Apply the diagonal blocks g_ij' to ``dx``."""
        moved = tuple(s * dx for s in self.slopes(w))
        return moved[0] if isinstance(w, Tensor) else moved


class Identity(SeparableReparam):
    """x = w: the model without overparametrization (Corollary D.1)."""

    names = ("x",)

    def terms(self, w: Parameters) -> tuple[Tensor, ...]:
        """Give w itself."""
        return factors(w)

    def slopes(self, w: Parameters) -> tuple[Tensor, ...]:
        """Give ones."""
        return (torch.ones_like(factors(w)[0]),)


class PowerDifference(SeparableReparam):
    r"""x = u^{2k} - v^{2k}, for an integer k >= 1 (Section 4; k = 1 is a quadratic).

    Parameters
    ----------
    k : int
        Half the power; 2k is a proxy of the depth of a network.
    """

    names = ("u", "v")
    signs = (1.0, -1.0)

    def __init__(self, k: int) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"PowerDifference: k must be an integer >= 1, got {k!r}")
        self.k = k

    def terms(self, w: Parameters) -> tuple[Tensor, ...]:
        """Give u^{2k} and -v^{2k}."""
        u, v = w
        return u ** (2 * self.k), -(v ** (2 * self.k))

    def slopes(self, w: Parameters) -> tuple[Tensor, ...]:
        """Give 2k u^{2k-1} and -2k v^{2k-1}."""
        u, v = w
        power = 2 * self.k
        return power * u ** (power - 1), -power * v ** (power - 1)

    def __repr__(self) -> str:
        """Show k."""
        return f"PowerDifference(k={self.k})"


class LogRatio(SeparableReparam):
    """x = log u - log v, for u, v > 0 (Appendix E)."""

    names = ("u", "v")
    signs = (1.0, -1.0)

    def terms(self, w: Parameters) -> tuple[Tensor, ...]:
        """Give log u and -log v."""
        u, v = w
        return torch.log(u), -torch.log(v)

    def slopes(self, w: Parameters) -> tuple[Tensor, ...]:
        """Give 1/u and -1/v."""
        u, v = w
        return 1 / u, -1 / v

    def validate(self, w: Parameters) -> None:
        """Require u and v to be positive."""
        super().validate(w)
        for name, f in zip(self.names, factors(w), strict=True):
            if not (f > 0).all():
                raise ValueError(f"LogRatio(): {name} must be positive, its minimum is {f.min()}")


class Hadamard(Reparam):
    """x = m * w, the diagonal linear network (Section 4)."""

    elementwise = True
    names = ("m", "w")

    def __call__(self, w: Parameters) -> Tensor:
        """Multiply the two factors."""
        m, v = w
        return m * v

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Give (w dx, m dx)."""
        m, v = w
        return v * dx, m * dx


class Depth(Reparam):
    """x = w_1 * w_2 * ... * w_k, the deep diagonal network (Theorem D.2).

    Parameters
    ----------
    k : int
        The number of factors, >= 2. ``Depth(2)`` equals `Hadamard`.
    """

    elementwise = True

    def __init__(self, k: int) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 2:
            raise ValueError(f"Depth: k must be an integer >= 2, got {k!r}")
        self.k = k
        self.names = tuple(f"w{i + 1}" for i in range(k))

    def __call__(self, w: Parameters) -> Tensor:
        """Multiply all factors."""
        return torch.stack(factors(w)).prod(0)

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Give dx times the product of the other factors, without dividing by one that is 0."""
        parts = factors(w)
        others = (torch.stack(parts[:i] + parts[i + 1 :]).prod(0) for i in range(self.k))
        return tuple(o * dx for o in others)

    def __repr__(self) -> str:
        """Show the number of factors."""
        return f"Depth(k={self.k})"


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
            raise ValueError("CommutingQuadratic: A holds NaN or infinite entries")
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
        """Give (sum_i dx_i A_i) w."""
        v = factors(w)[0]
        moved = torch.einsum("i,ijk,k->j", dx, self.A.to(v.dtype), v)
        return moved if isinstance(w, Tensor) else (moved,)

    def validate(self, w: Parameters) -> None:
        """Require a vector of length D."""
        super().validate(w)
        if factors(w)[0].shape != self.A.shape[1:2]:
            shape = tuple(factors(w)[0].shape)
            raise ValueError(f"{self}: w must have shape ({self.A.shape[1]},), got {shape}")

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
        """Give sym(dx) U, half of the transposed Jacobian (see the class)."""
        moved = self.project(dx) @ factors(w)[0]
        return moved if isinstance(w, Tensor) else (moved,)

    def project(self, dx: Tensor) -> Tensor:
        """Give the symmetric part."""
        return 0.5 * (dx + dx.mT)

    def validate(self, w: Parameters) -> None:
        """Require a matrix."""
        super().validate(w)
        if factors(w)[0].ndim != 2:
            raise ValueError(f"SymmetricFactor(): U must be a matrix, got {factors(w)[0].ndim}-d")


class Product(Reparam):
    """X = A B, as in LoRA and Q K^T."""

    names = ("A", "B")

    def __call__(self, w: Parameters) -> Tensor:
        """Multiply the factors."""
        A, B = w
        return A @ B

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Give (dx B^T, A^T dx)."""
        A, B = w
        return dx @ B.mT, A.mT @ dx

    def validate(self, w: Parameters) -> None:
        """Require matrices that can be multiplied."""
        super().validate(w)
        A, B = w
        if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[0]:
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise ValueError(f"Product(): A (n, r) and B (r, m) are needed, got {shapes}")


class CustomReparam(Reparam):
    """x = fn(w) for a torch function that torch.func can trace.

    Parameters
    ----------
    fn : callable
        Takes what is passed as w0 (a tensor or a tuple of tensors) and returns a tensor.
    elementwise : bool
        Promise that x_i depends on the i-th entries of the factors only; `check` tests it.
        It makes R_a available for many coordinates.
    """

    def __init__(self, fn: Callable[[Any], Tensor], elementwise: bool = False) -> None:
        if not callable(fn):
            raise TypeError(f"CustomReparam: fn must be callable, got {type(fn).__name__}")
        self.fn = fn
        self.elementwise = elementwise

    def __call__(self, w: Parameters) -> Tensor:
        """Call fn."""
        return self.fn(w)

    def validate(self, w: Parameters) -> None:
        """Take any number of factors."""
        self.names = tuple(f"w{i + 1}" for i in range(len(factors(w))))
        super().validate(w)
        if self.elementwise and self.fn(w).shape != factors(w)[0].shape:
            raise ValueError(f"{self}: elementwise=True needs fn(w) of the shape of its factors")

    def __repr__(self) -> str:
        """Show the function's name."""
        return f"CustomReparam({getattr(self.fn, '__name__', 'fn')})"
