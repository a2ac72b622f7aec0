"""What `check` gives: the conditions, and the report of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..regularizer import Regularizer, Separable
from ..reparam import (
    CommutingQuadratic,
    Depth,
    Identity,
    PowerDifference,
    Product,
    Reparam,
    SeparableReparam,
    SymmetricFactor,
)

__all__ = ["Condition", "Report", "advice"]


@dataclass(frozen=True)
class Condition:
    """One condition: whether it holds, the size of what decides it, and what that is."""

    name: str
    ok: bool
    size: float
    detail: str


@dataclass(frozen=True)
class Report:
    """What `check` found; true in a boolean context if Theorem 3.2 applies.

    Attributes
    ----------
    pair : str
        The pair that was checked.
    conditions : tuple of Condition
        In the order of the argument.
    advice : str
        What would work, where the theory says so; empty if nothing failed.
    """

    pair: str
    conditions: tuple[Condition, ...]
    advice: str = ""

    def _all(self, name: str) -> bool:
        return all(c.ok for c in self.conditions if c.name == name)

    @property
    def regular(self) -> bool:
        """Whether J_g has full rank at w0 and along the flow (Definition A.3)."""
        return self._all("regular")

    @property
    def commuting(self) -> bool:
        """Whether all Lie brackets vanish (Definition A.5)."""
        return self._all("commuting")

    @property
    def well_posed(self) -> bool:
        """Whether h is bounded below."""
        return self._all("well posed")

    @property
    def contracting(self) -> bool:
        """Whether d R_a / d a = -h(w) <= 0 along the flow (Definition 3.3)."""
        return self._all("contracting")

    @property
    def applies(self) -> bool:
        """Whether Theorem 3.2 holds: the pair is regular and commutes."""
        return self.regular and self.commuting

    def __bool__(self) -> bool:
        """Give `applies`."""
        return self.applies

    def explain(self) -> str:
        """Say in words which conditions hold, by how much others fail, and what would work."""
        verdict = "applies" if self.applies else "does not apply"
        lines = [f"{self.pair}: Theorem 3.2 {verdict}."]
        for c in self.conditions:
            size = "" if np.isnan(c.size) else f" ({c.size:.2g})"
            lines.append(f"  {'yes' if c.ok else 'NO ':3} {c.name}{size}: {c.detail}")
        return "\n".join([*lines, *([f"  {self.advice}"] if self.advice else [])])


# What would work where a pair fails: the penalty, the start, or the measurements.


def advice(g: Reparam, h: Regularizer, conditions: list[Condition]) -> str:
    """Say what would work, where the theory says so."""
    mixed = any("[grad g_i, grad g_j]" in c.detail and not c.ok for c in conditions)
    if isinstance(g, SymmetricFactor) and not mixed:
        return "Corollary C.3: start from U0 U0^T = beta I; U needs full row rank."
    if isinstance(g, Product | SymmetricFactor):
        return (
            "What is needed: gradients that stay aligned with the factors (shared singular "
            "vectors), or measurements <A_i, X> with commuting A_i: pass them as sensing=."
        )
    if not all(c.ok for c in conditions if c.name == "regular"):
        return "Definition A.3: start where no row of J_g vanishes (not at a zero of all factors)."
    if any("was promised" in c.detail for c in conditions):
        return "Leave elementwise=True out: coordinates that are mixed are followed together."
    if isinstance(g, Identity):
        return (
            "Corollary D.1: without overparametrization only a linear h commutes; none is positive."
        )
    if isinstance(g, Depth):
        return "Theorem D.2: a product of more than two factors does not commute with weight decay."
    if isinstance(g, SeparableReparam) and not isinstance(h, Separable):
        return (
            "Corollary 3.7: h must be a combination of the terms of g; use Separable(), "
            f"h = {_positive_terms(g)}."
        )
    if isinstance(g, CommutingQuadratic) and mixed:
        return "Theorem 3.10: the matrices A_i must commute with each other; no penalty mends that."
    if isinstance(g, CommutingQuadratic):
        return (
            "Theorem 3.10: h = 1/2 w^T B w works for a symmetric B that commutes with every A_i; "
            "B = I is WeightDecay()."
        )
    if mixed:
        return "The coordinates of g do not commute with each other: no penalty mends that."
    return "h must commute with every coordinate of g; a multiple of a coordinate of g always does."


def _positive_terms(g: SeparableReparam) -> str:
    """Write the default penalty of a separable g."""
    return f"u^{2 * g.k} + v^{2 * g.k}" if isinstance(g, PowerDifference) else "log u + log v"
