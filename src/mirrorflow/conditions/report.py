"""What `check` gives: the conditions, and the report of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Condition", "Report"]


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
        """Whether J_g has full rank at w0 and along the flow (Definition A.3)."""
        return self._all("regular")

    @property
    def commuting(self) -> bool:
        """Whether all Lie brackets vanish (Definition A.5), up to a change of clock."""
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
