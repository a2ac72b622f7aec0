r"""Parametrizations x = g(w): their derivatives, and what the theory knows about each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import inf
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
    "detached_pullback",
    "factors",
    "flatten",
    "unflatten",
]

Parameters = Tensor | tuple[Tensor, ...]


def factors(w: Parameters) -> tuple[Tensor, ...]:
    """Return the factor tensors of ``w``, which is one tensor or a tuple of them."""
    return (w,) if isinstance(w, Tensor) else tuple(w)


def flatten(w: Parameters) -> Tensor:
    """Join the factors of ``w`` into one vector."""
    return torch.cat([f.reshape(-1) for f in factors(w)])


def unflatten(vector: Tensor, like: Parameters) -> Parameters:
    """Cut ``vector`` into factors with the shapes of ``like``; the inverse of `flatten`."""
    parts = torch.split(vector, [f.numel() for f in factors(like)])
    shaped = tuple(p.reshape(f.shape) for p, f in zip(parts, factors(like), strict=True))
    return shaped[0] if isinstance(like, Tensor) else shaped


# What `check` advises for products of matrices.
ALIGNED = (
    "What is needed: gradients that stay aligned with the factors (shared singular vectors), or "
    "measurements <A_i, X> with commuting A_i: pass them as sensing=."
)


def _row_singular_values(matrix: Tensor) -> Tensor:
    """Return one singular value for each row, descending: some are 0 for a tall matrix."""
    s = torch.linalg.svdvals(matrix)
    return torch.nn.functional.pad(s, (0, max(0, matrix.shape[0] - len(s))))


class Reparam(ABC):
    r"""An overparametrization x = g(w).

    Attributes
    ----------
    elementwise : bool
        Whether x_i depends on the i-th entries of the factors only, so that J_g J_g^T is diagonal.
    alike : bool
        Whether all coordinates follow one formula: `check` then looks at a few of many. It tests
        ``elementwise`` where this is not known.
    names : tuple of str
        The names of the factors, for messages.
    takes_arrays : bool
        Whether g and `pullback` take a tuple of NumPy arrays as well; `flow` is faster then.
    """

    elementwise: bool = False
    alike: bool = False
    takes_arrays: bool = False
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

    def singular_values(self, w: Parameters) -> Tensor:
        """Return the singular values of J_g(w), descending, one for each coordinate of x."""
        flat = flatten(w)
        J = torch.func.jacrev(lambda v: self(unflatten(v, w)).reshape(-1))(flat)
        return _row_singular_values(J)

    # What the theory knows, for `check` and `legendre`.

    def closed_form(self, h: Any, w0: Parameters) -> Any:
        """Return the Legendre function of (g, h) started at w0, or None where g knows of none.

        A model of your own may return a `LegendreFunction` of your own. Where this is None,
        `legendre` uses those of this package, and integrates w for all others.
        """
        return None

    def start_advice(self, mixed: bool, rank: int, generic_rank: int) -> str:
        """Return which start would do where J_g(w0) does not have full rank.

        Parameters
        ----------
        mixed : bool
            Whether some coordinates of g do not commute with each other.
        rank, generic_rank : int
            The smallest rank of J_g at w0 and along its flow, and that at random points.
        """
        if generic_rank <= rank:
            return (
                f"Definition A.3: J_g has rank {generic_rank} at random points as well, so that x "
                "moves on a surface of that dimension whatever the start. Leave out the "
                "coordinates of x that the others determine."
            )
        if self.elementwise:
            return (
                "Definition A.3: start where no row of J_g vanishes (not at a zero of all factors)."
            )
        return (
            f"Definition A.3: start where J_g has rank {generic_rank}, as at random points; from "
            f"w0 it falls to {rank}."
        )

    def penalty_advice(self, h: Any, mixed: bool) -> str:
        """Return which penalty would commute with g, where h does not."""
        if mixed:
            return "The coordinates of g do not commute with each other: no penalty mends that."
        return (
            "h must commute with every coordinate of g; a multiple of a coordinate of g always "
            "does."
        )

    def why_not_elementwise(self) -> str:
        """Return why R_a is not a sum over coordinates, for messages."""
        return f"the coordinates of {self} share parameters"

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
                raise ValueError(f"{self}: {name} must be finite, got NaN or infinite entries")
        if self.elementwise and any(f.shape != parts[0].shape for f in parts):
            shapes = ", ".join(
                f"{n} {tuple(f.shape)}" for n, f in zip(self.names, parts, strict=True)
            )
            raise ValueError(f"{self}: the factors must have one shape, got {shapes}")

    def __repr__(self) -> str:
        """Show the class with its arguments."""
        return f"{type(self).__name__}()"


def detached_pullback(g: Reparam, w: Parameters, dx: Tensor) -> Parameters:
    r"""Return g.pullback(w, dx) without a graph.

    Integrators call it thousands of times: torch.func costs three times as much as autograd.
    """
    if type(g).pullback is not Reparam.pullback:
        with torch.no_grad():
            return g.pullback(w, dx)
    parts = tuple(f.detach().requires_grad_() for f in factors(w))
    with torch.enable_grad():
        x = g(parts[0] if isinstance(w, Tensor) else parts)
        moved = torch.autograd.grad(x, parts, dx, materialize_grads=True)
    return moved[0] if isinstance(w, Tensor) else moved


class SeparableReparam(Reparam):
    """x_i = sum_j g_ij(w_ij): each factor contributes a term of its own (Corollary 3.7).

    Attributes
    ----------
    signs : tuple of float
        One for each factor. The default `Separable` multiplies the terms with them, to make h
        positive.
    formulas : tuple of str or None
        sign * term for each factor, as "u^4" and "v^4", from which advice writes h.
    bounds : tuple of (float, float) or None
        The infimum and supremum of each term. None if not known: `check` samples h.
    unbounded : str
        What `check` says of an h that one of the terms lets fall without bound.
    """

    elementwise = True
    signs: tuple[float, ...] = (1.0,)
    formulas: tuple[str, ...] | None = None
    bounds: tuple[tuple[float, float], ...] | None = None
    unbounded: str = "a term of h falls without bound"

    @abstractmethod
    def terms(self, w: Parameters) -> tuple[Tensor, ...]:
        """Return the terms g_ij(w_ij), one tensor per factor, with their signs."""

    @abstractmethod
    def slopes(self, w: Parameters) -> tuple[Tensor, ...]:
        """Return the derivatives g_ij'(w_ij), one tensor per factor."""

    def __call__(self, w: Parameters) -> Tensor:
        """Evaluate x as the sum of the terms."""
        first, *others = self.terms(w)
        return sum(others, start=first)

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Apply the diagonal blocks g_ij' to ``dx``."""
        moved = tuple(s * dx for s in self.slopes(w))
        return moved[0] if isinstance(w, Tensor) else moved

    def positive_terms(self) -> str:
        """Return the formula of the default `Separable` penalty, sum_j sign_j g_j."""
        if self.formulas is not None:
            return " + ".join(self.formulas)
        signed = zip(self.signs, self.names, strict=True)
        terms = "".join(f" {'-' if s < 0 else '+'} g_{n}({n})" for s, n in signed)
        return f"{terms.removeprefix(' +').strip()} for the terms g_{', g_'.join(self.names)} of g"

    def penalty_advice(self, h: Any, mixed: bool) -> str:
        """Return Corollary 3.7: h has to consist of the terms of g."""
        if h.consists_of_terms or mixed:
            return super().penalty_advice(h, mixed)
        return (
            "Corollary 3.7: h must be a combination of the terms of g; use Separable(), "
            f"h = {self.positive_terms()}."
        )


class Identity(SeparableReparam):
    """x = w: the model without overparametrization (Corollary D.1)."""

    names = ("x",)
    alike = True
    formulas = ("x",)
    bounds = ((-inf, inf),)

    def terms(self, w: Parameters) -> tuple[Tensor, ...]:
        """Return w itself."""
        return factors(w)

    def slopes(self, w: Parameters) -> tuple[Tensor, ...]:
        """Return ones."""
        return (torch.ones_like(factors(w)[0]),)

    def penalty_advice(self, h: Any, mixed: bool) -> str:
        """Return Corollary D.1: only a linear h commutes."""
        return (
            "Corollary D.1: without overparametrization only a linear h commutes, and none is "
            "positive; WeightDecay() commutes up to a change of clock."
        )


class PowerDifference(SeparableReparam):
    r"""x = u^{2k} - v^{2k}, for an integer 2k >= 2 (Section 4; k = 1 is a quadratic).

    Parameters
    ----------
    k : int or float
        Half the power; 2k is a proxy of the depth of a network. For an odd power (k = 3/2, say)
        u and v start positive, and stay so.
    """

    names = ("u", "v")
    signs = (1.0, -1.0)
    alike = True
    takes_arrays = True
    bounds = ((0.0, inf), (-inf, 0.0))
    unbounded = "a term of h has a negative coefficient, and falls without bound"

    def __init__(self, k: float) -> None:
        number = isinstance(k, int | float) and not isinstance(k, bool)
        if not (number and 1 <= k < inf and 2 * k == int(2 * k)):
            raise ValueError(f"PowerDifference: 2k must be an integer >= 2, got k = {k!r}")
        self.k, self.power = (int(k) if k == int(k) else k), int(2 * k)
        self.formulas = (f"u^{self.power}", f"v^{self.power}")

    def terms(self, w: Parameters) -> tuple[Tensor, ...]:
        """Return u^{2k} and -v^{2k}."""
        u, v = w
        return u**self.power, -(v**self.power)

    def slopes(self, w: Parameters) -> tuple[Tensor, ...]:
        """Return 2k u^{2k-1} and -2k v^{2k-1}."""
        u, v = w
        power = self.power
        return power * u ** (power - 1), -power * v ** (power - 1)

    def validate(self, w: Parameters) -> None:
        """Require u and v to be positive for an odd power."""
        super().validate(w)
        if self.power % 2:
            _require_positive(self, w)

    def __repr__(self) -> str:
        """Show k."""
        return f"PowerDifference(k={self.k})"


class LogRatio(SeparableReparam):
    """x = log u - log v, for u, v > 0 (Appendix E)."""

    names = ("u", "v")
    signs = (1.0, -1.0)
    alike = True
    formulas = ("log u", "log v")
    bounds = ((-inf, inf), (-inf, inf))
    unbounded = (
        "h has logarithms, which fall without bound: keep u, v >= 1 by switching off in time"
    )

    def terms(self, w: Parameters) -> tuple[Tensor, ...]:
        """Return log u and -log v."""
        u, v = w
        return torch.log(u), -torch.log(v)

    def slopes(self, w: Parameters) -> tuple[Tensor, ...]:
        """Return 1/u and -1/v."""
        u, v = w
        return 1 / u, -1 / v

    def validate(self, w: Parameters) -> None:
        """Require u and v to be positive."""
        super().validate(w)
        _require_positive(self, w)


def _require_positive(g: Reparam, w: Parameters) -> None:
    """Raise an error that names the factor that is not positive."""
    for name, f in zip(g.names, factors(w), strict=True):
        if not (f > 0).all():
            raise ValueError(f"{g}: {name} must be positive, got a minimum of {f.min()}")


class _Products(Reparam):
    """Products of factors, coordinate by coordinate."""

    elementwise = True
    alike = True

    def penalty_advice(self, h: Any, mixed: bool) -> str:
        """Return what commutes with a product: for more than two factors, up to a clock."""
        if len(self.names) > 2:
            return (
                "A product of more than two factors commutes with multiples of its coordinates "
                "and, up to a change of clock, with WeightDecay()."
            )
        return (
            "h must commute with every coordinate of g: WeightDecay() does, and so do multiples of "
            f"the coordinates {'_i '.join(self.names)}_i."
        )


class Hadamard(_Products):
    """x = m * w, the diagonal linear network (Section 4)."""

    takes_arrays = True
    names = ("m", "w")

    def __call__(self, w: Parameters) -> Tensor:
        """Multiply the two factors."""
        m, v = w
        return m * v

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Return (w dx, m dx)."""
        m, v = w
        return v * dx, m * dx


class Depth(_Products):
    """x = w_1 * w_2 * ... * w_k, the deep diagonal network (Theorem D.2).

    Parameters
    ----------
    k : int
        The number of factors, >= 2. ``Depth(2)`` equals `Hadamard`.
    """

    def __init__(self, k: int) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 2:
            raise ValueError(f"Depth: k must be an integer >= 2, got {k!r}")
        self.k = k
        self.names = tuple(f"w{i + 1}" for i in range(k))

    def __call__(self, w: Parameters) -> Tensor:
        """Multiply all factors."""
        return torch.stack(factors(w)).prod(0)

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Return dx times the product of the other factors, without dividing by one that is 0."""
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
        return _row_singular_values(factors(w)[0])

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
        one, two = _row_singular_values(A), _row_singular_values(B.mT)
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

    def why_not_elementwise(self) -> str:
        """Return what to promise."""
        return (
            f"{self} is not marked elementwise. Pass elementwise=True to CustomReparam if x_i "
            "depends on the i-th entries of the factors only"
        )

    def validate(self, w: Parameters) -> None:
        """Take any number of factors."""
        self.names = tuple(f"w{i + 1}" for i in range(len(factors(w))))
        super().validate(w)
        if self.elementwise and self.fn(w).shape != factors(w)[0].shape:
            got = f"{tuple(self.fn(w).shape)} for {tuple(factors(w)[0].shape)}"
            raise ValueError(
                f"{self}: fn(w) must have the shape of the factors, got {got}. Leave "
                "elementwise=True out."
            )

    def __repr__(self) -> str:
        """Show the function's name."""
        return f"CustomReparam({getattr(self.fn, '__name__', 'fn')})"
