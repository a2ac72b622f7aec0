"""Conditions, the report of them, and advice where they fail."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .._html import html_table
from ..regularizer import Regularizer
from ..reparam import Reparam

__all__ = ["Condition", "Report", "advice"]


@dataclass(frozen=True)
class Condition:
    """One condition: whether it holds, the size of what decides it, and what that is."""

    name: str
    ok: bool
    size: float
    detail: str


@dataclass(frozen=True, repr=False)
class Report:
    """The result of `check`; true in a boolean context if Theorem 3.2 applies.

    Attributes
    ----------
    pair : str
        The pair that was checked.
    conditions : tuple of Condition
        In the order of the argument.
    advice : str
        What would work, where the theory says so; empty if nothing failed.
    degree : float or None
        The degree k of a homogeneous g with `WeightDecay`, if the theory applies; the pair commutes
        for k = 2, else up to the clock nu = -int e^{(k-2) a} grad f dt.
    """

    pair: str
    conditions: tuple[Condition, ...]
    advice: str = ""
    degree: float | None = None

    def _all(self, name: str) -> bool:
        return all(c.ok for c in self.conditions if c.name == name)

    @property
    def regular(self) -> bool:
        """Return whether J_g has full rank at w0 and along the flow (Definition A.3)."""
        return self._all("regular")

    @property
    def commuting(self) -> bool:
        """Return whether all Lie brackets vanish (Definition A.5), up to a change of clock."""
        return self._all("commuting")

    @property
    def well_posed(self) -> bool:
        """Return whether h is bounded below."""
        return self._all("well posed")

    @property
    def contracting(self) -> bool:
        """Return whether d R_a / d a = -h(w) <= 0 along the flow (Definition 3.3)."""
        return self._all("contracting")

    @property
    def applies(self) -> bool:
        """Return whether Theorem 3.2 holds: the pair is regular and commutes."""
        return self.regular and self.commuting

    def __bool__(self) -> bool:
        """Return `applies`."""
        return self.applies

    def explain(self) -> str:
        """Return in words which conditions hold, by how much others fail, and what would work."""
        verdict = "applies" if self.applies else "does not apply"
        if self.applies and self.degree not in (None, 2.0):
            verdict += (
                f" up to a change of clock (g has degree k = {self.degree:g}): its dual variable "
                "is nu = -int e^{(k-2) a} grad f dt"
            )
        lines = [f"{self.pair}: Theorem 3.2 {verdict}."]
        for c in self.conditions:
            size = "" if np.isnan(c.size) else f" ({c.size:.2g})"
            lines.append(f"  {'yes' if c.ok else 'NO ':3} {c.name}{size}: {c.detail}")
        return "\n".join([*lines, *([f"  {self.advice}"] if self.advice else [])])

    def __repr__(self) -> str:
        """Say whether the theory applies to the pair."""
        return f"Report({self.pair}: Theorem 3.2 {'applies' if self.applies else 'does not apply'})"

    def _repr_html_(self) -> str:
        """Show the conditions as a table."""
        rows = [("yes" if c.ok else "NO", c.name, float(c.size), c.detail) for c in self.conditions]
        heads = ("", "condition", "size", "what decides it")
        return html_table(repr(self), heads, rows, [self.advice] if self.advice else [])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; a size that is not a number is None, as JSON has no NaN."""
        conditions = [
            asdict(c) | {"ok": bool(c.ok), "size": _finite(c.size)} for c in self.conditions
        ]
        return {
            "pair": self.pair,
            "applies": self.applies,
            "degree": self.degree,
            "conditions": conditions,
            "advice": self.advice,
        }


def _finite(size: float) -> float | None:
    """Return a number that JSON can hold."""
    return float(size) if np.isfinite(size) else None


def advice(g: Reparam, h: Regularizer, conditions: list[Condition], ranks: tuple[int, int]) -> str:
    """Return what would work where a pair fails: the start, the promise, or the penalty.

    Parameters
    ----------
    g, h : Reparam, Regularizer
        The pair; what to advise is for g to know.
    conditions : list of Condition
        Those that were measured.
    ranks : tuple of int
        The smallest rank of J_g at w0 and along its flow, and that at random points.
    """
    mixed = any("[grad g_i, grad g_j]" in c.detail and not c.ok for c in conditions)
    if not all(c.ok for c in conditions if c.name == "regular"):
        return g.start_advice(mixed, *ranks)
    if any("was promised" in c.detail for c in conditions):
        return "Leave elementwise=True out: coordinates that are mixed are followed together."
    return g.penalty_advice(h, mixed)
