"""Differences of two terms, coordinate by coordinate: x = g_1(u) - g_2(v)."""

from __future__ import annotations

from abc import abstractmethod
from math import inf
from typing import Any

import torch
from torch import Tensor

from .model import Parameters, Reparam, factors

__all__ = ["Identity", "LogRatio", "PowerDifference", "SeparableReparam"]


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
