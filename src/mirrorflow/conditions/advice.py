"""What would work where a pair fails: the penalty, the start, or the measurements."""

from __future__ import annotations

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
from .report import Condition

__all__ = ["advice"]


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
        return (
            "A product of more than two factors commutes with multiples of itself and, up to a "
            "change of clock, with WeightDecay()."
        )
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
    return f"u^{g.power} + v^{g.power}" if isinstance(g, PowerDifference) else "log u + log v"
