"""Penalties h(w) that are added to the loss with strength alpha_t."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from .reparam import Parameters, Reparam, SeparableReparam, factors

__all__ = [
    "CustomRegularizer",
    "Regularizer",
    "Separable",
    "WeightDecay",
    "detached_gradient",
    "require_pair",
    "require_rows",
]


class Regularizer(ABC):
    """A penalty h(w); ``g`` is passed along because `Separable` is made of the terms of g.

    Attributes
    ----------
    elementwise : bool
        Whether h is a sum over coordinates.
    alike : bool
        Whether all coordinates follow one formula: `check` then looks at a few of many. It tests
        ``elementwise`` where this is not known.
    consists_of_terms : bool
        Whether h is a combination of the terms of a separable g.
    takes_arrays : bool
        Whether `gradient` takes a tuple of NumPy arrays as well; `flow` is faster then.
    """

    elementwise: bool = False
    alike: bool = False
    consists_of_terms: bool = False
    takes_arrays: bool = False

    @abstractmethod
    def value(self, w: Parameters, g: Reparam) -> Tensor:
        """Evaluate h(w), a scalar."""

    def gradient(self, w: Parameters, g: Reparam) -> Parameters:
        """Evaluate grad h(w), with the structure of ``w``."""
        return torch.func.grad(lambda p: self.value(p, g))(w)

    def followed(self, w: Parameters, a: float | Tensor) -> Parameters | None:
        """Return where dw = grad h da leads from ``w``; None where that has to be integrated.

        ``a`` is a number, or one for each coordinate.
        """
        return None

    def bounded_below(self, g: Reparam) -> tuple[bool, str] | None:
        """Return whether h is bounded below, and a sentence why; None where that is not known."""
        return None

    def why_not_elementwise(self) -> str:
        """Return why R_a is not a sum over coordinates, for messages."""
        return f"{self} is not a sum over coordinates"

    def validate(self, g: Reparam) -> None:  # noqa: B027 - most penalties fit every g
        """Raise an error if h makes no sense for ``g``."""

    def __repr__(self) -> str:
        """Show the class with its arguments."""
        return f"{type(self).__name__}()"


class WeightDecay(Regularizer):
    r"""h(w) = ``1/2 |w|^2``, so that alpha is what SGD and AdamW call ``weight_decay``."""

    elementwise = True
    alike = True
    takes_arrays = True

    def value(self, w: Parameters, g: Reparam) -> Tensor:
        """Evaluate half the squared norm of all factors."""
        return 0.5 * sum(((f * f).sum() for f in factors(w)), start=torch.zeros(()))

    def gradient(self, w: Parameters, g: Reparam) -> Parameters:
        """Return w."""
        return w

    def followed(self, w: Parameters, a: float | Tensor) -> Parameters:
        """Return e^a w."""
        parts = factors(w)
        scale = torch.exp(torch.as_tensor(a, dtype=parts[0].dtype))
        moved = tuple(scale * f for f in parts)
        return moved[0] if isinstance(w, Tensor) else moved

    def bounded_below(self, g: Reparam) -> tuple[bool, str]:
        """Return that it is, by 0."""
        return True, "h = |w|^2/2 is bounded below"


class Separable(Regularizer):
    r"""h(w) = sum_ij c_ij g_ij(w_ij), the only penalties that commute with a separable g.

    Parameters
    ----------
    c : sequence of float or Tensor, optional
        One coefficient (or tensor of coefficients) per factor. The default takes the signs that
        make every term positive: u^{2k} + v^{2k} for `PowerDifference`, log u + log v for
        `LogRatio`.

    Notes
    -----
    Corollary 3.7: for analytic separable g and h, Theorem 3.2 applies if and only if h has this
    form.
    """

    elementwise = True
    consists_of_terms = True

    def __init__(self, c: Sequence[float | Tensor] | None = None) -> None:
        self.c = None if c is None else tuple(c)
        self.alike = not any(torch.as_tensor(ci).ndim for ci in self.c or ())
        self.takes_arrays = not any(isinstance(ci, Tensor) for ci in self.c or ())
        for ci in self.c or ():
            if not torch.isfinite(torch.as_tensor(ci)).all():
                raise ValueError("Separable: c must be finite, got NaN or infinite entries")

    def coefficients(self, g: Reparam) -> tuple[Any, ...]:
        """Return the c_ij for ``g``, one per factor."""
        self.validate(g)
        assert isinstance(g, SeparableReparam)  # or `validate` has raised
        return g.signs if self.c is None else self.c

    def value(self, w: Parameters, g: Reparam) -> Tensor:
        """Sum the weighted terms of g."""
        c = self.coefficients(g)
        assert isinstance(g, SeparableReparam)
        terms = [(ci * term).sum() for ci, term in zip(c, g.terms(w), strict=True)]
        return torch.stack(terms).sum()

    def gradient(self, w: Parameters, g: Reparam) -> Parameters:
        """Return c_ij g_ij'."""
        c = self.coefficients(g)
        assert isinstance(g, SeparableReparam)
        grads = tuple(ci * slope for ci, slope in zip(c, g.slopes(w), strict=True))
        return grads[0] if isinstance(w, Tensor) else grads

    def bounded_below(self, g: Reparam) -> tuple[bool, str] | None:
        """Return whether every c_ij g_ij is, from the bounds of the terms of g."""
        c = self.coefficients(g)
        assert isinstance(g, SeparableReparam)
        if g.bounds is None:
            return None
        for ci, (low, high) in zip(c, g.bounds, strict=True):
            ci = torch.as_tensor(ci)
            if (low == -inf and bool((ci > 0).any())) or (high == inf and bool((ci < 0).any())):
                return False, g.unbounded
        return True, "every term of h is bounded below"

    def validate(self, g: Reparam) -> None:
        """Require a separable g with as many factors as there are coefficients."""
        if not isinstance(g, SeparableReparam):
            raise TypeError(
                f"Separable(): g must be separable (PowerDifference, LogRatio, Identity), got {g}. "
                "Use WeightDecay() for m * w."
            )
        if self.c is not None and len(self.c) != len(g.names):
            raise ValueError(
                f"Separable: c must have {len(g.names)} entries for {g}, got {len(self.c)}"
            )

    def __repr__(self) -> str:
        """Show the coefficients if they were chosen."""
        return "Separable()" if self.c is None else f"Separable(c={self.c})"


class CustomRegularizer(Regularizer):
    """h(w) = fn(w) for a torch function that torch.func can trace.

    Parameters
    ----------
    fn : callable
        Takes w (as passed for w0) and returns a scalar tensor.
    elementwise : bool
        Promise that h is a sum over coordinates, each a function of the i-th entries of the
        factors; `check` tests it.
    """

    def __init__(self, fn: Callable[[Any], Tensor], elementwise: bool = False) -> None:
        if not callable(fn):
            raise TypeError(f"CustomRegularizer: fn must be callable, got {type(fn).__name__}")
        self.fn = fn
        self.elementwise = elementwise

    def value(self, w: Parameters, g: Reparam) -> Tensor:
        """Call fn."""
        h = self.fn(w)
        if h.ndim != 0:
            raise ValueError(f"CustomRegularizer: fn must return a scalar, got {tuple(h.shape)}")
        return h

    def why_not_elementwise(self) -> str:
        """Return what to promise."""
        return (
            f"{self} is not marked elementwise. Pass elementwise=True to CustomRegularizer if h is "
            "a sum over coordinates"
        )

    def __repr__(self) -> str:
        """Show the function's name."""
        return f"CustomRegularizer({getattr(self.fn, '__name__', 'fn')})"


def detached_gradient(h: Regularizer, w: Parameters, g: Reparam) -> Parameters:
    """Return h.gradient(w, g) without a graph: integrators call it thousands of times."""
    if type(h).gradient is not Regularizer.gradient:
        with torch.no_grad():
            return h.gradient(w, g)
    parts = tuple(f.detach().requires_grad_() for f in factors(w))
    with torch.enable_grad():
        value = h.value(parts[0] if isinstance(w, Tensor) else parts, g)
        moved = torch.autograd.grad(value, parts, materialize_grads=True)
    return moved[0] if isinstance(w, Tensor) else moved


def require_pair(caller: str, g: Any, h: Any, w0: Parameters) -> None:
    """Raise an error unless g and h are of the kinds that ``caller`` takes, and fit w0."""
    if not isinstance(g, Reparam) or not isinstance(h, Regularizer):
        raise TypeError(
            f"{caller}: g and h must be a Reparam and a Regularizer, got {_kind(g)} and "
            f"{_kind(h)}. Wrap torch functions in CustomReparam and CustomRegularizer."
        )
    g.validate(w0)
    h.validate(g)


def require_rows(caller: str, g: Reparam, h: Regularizer) -> None:
    """Raise an error unless each row of w0 is a problem of its own, for y of shape (n, m)."""
    for part in (g, h):
        if not part.elementwise:
            raise ValueError(
                f"{caller}: g and h must be elementwise for y of shape (n, m), got {part}: "
                f"{part.why_not_elementwise()}. Call once for each column."
            )


def _kind(value: Any) -> str:
    """Name the type of an object, or a class that was passed instead of one."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__
