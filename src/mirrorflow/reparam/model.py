"""The abstract parametrization x = g(w), and the parameters w of one or several factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Parameters",
    "Reparam",
    "factors",
    "flatten",
    "row_singular_values",
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


def row_singular_values(matrix: Tensor) -> Tensor:
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
        return row_singular_values(J)

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
