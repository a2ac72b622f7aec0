"""Two measurements of the same products, product by product."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Any

from ._text import aligned
from .records import Measurement, Record, without_nan

__all__ = ["Comparison", "compare"]

COLUMNS = {  # attributes of a record, and what the table calls them
    "ratio": "ratio", "effective_rank": "eff.rank", "rank_99": "99%", "nuclear": "nuclear",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """The products that two measurements have in common, and those that only one has.

    Attributes
    ----------
    pairs : tuple of (Record, Record)
        Of the same name, adapter, head and shape: of the first measurement, and of the other.
    only_here, only_there : tuple of str
        The labels of the rest.
    """

    pairs: tuple[tuple[Record, Record], ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]

    def difference(self, column: str) -> float:
        """Return the mean of first minus other over the pairs of which both have a ratio."""
        found = [getattr(a, column) - getattr(b, column) for a, b in self._defined()]
        return sum(found) / len(found) if found else float("nan")

    def _defined(self) -> list[tuple[Record, Record]]:
        return [(a, b) for a, b in self.pairs if a.status == b.status == "ok"]

    @property
    def verdict(self) -> str:
        """One sentence that says in how many products the ratio is lower."""
        if not (found := self._defined()):
            return "No product has a ratio in both."
        lower = sum(a.ratio < b.ratio for a, b in found)
        return (
            f"The ratio is lower than in the other in {lower} of {len(found)} products, "
            f"by {-self.difference('ratio'):.4g} on average."
        )

    def table(self, width: int | None = None) -> str:
        """Return lines of text: a row for each pair, with first minus other beside each number."""
        heads = [head for name in COLUMNS.values() for head in (name, "other", "change")]
        rows = [["product", *heads]]
        for a, b in self.pairs:
            numbers = [(getattr(a, key), getattr(b, key)) for key in COLUMNS]
            rows.append([a.label, *(_cell(v) for x, y in numbers for v in (x, y, x - y))])
        lines = aligned(rows, width) if self.pairs else []
        lines += [f"only here: {label}" for label in self.only_here]
        lines += [f"only in the other: {label}" for label in self.only_there]
        return "\n".join([*lines, self.verdict])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is NaN is None, as JSON has no NaN."""
        rows = []
        for a, b in self.pairs:
            row: dict[str, Any] = {"product": a.label}
            for key in COLUMNS:
                x, y = getattr(a, key), getattr(b, key)
                row |= {key: x, f"{key}_other": y, f"{key}_change": x - y}
            rows.append(row)
        return without_nan(
            {
                "verdict": self.verdict,
                "products": rows,
                "only_here": self.only_here,
                "only_there": self.only_there,
            }
        )


def compare(here: Measurement, there: Measurement) -> Comparison:
    """Return the products of a measurement beside those of another of the same model.

    Parameters
    ----------
    here, there : Measurement
        Two checkpoints of one training, or of two trainings of one model.

    Examples
    --------
    >>> import torch
    >>> from mirrorflow.spectrum import SpectralTracker
    >>> attention = torch.nn.MultiheadAttention(8, 2)
    >>> before = SpectralTracker(attention).measure()
    >>> with torch.no_grad():
    ...     _ = attention.in_proj_weight[:4].mul_(0.1)
    >>> after = SpectralTracker(attention).measure()
    >>> found = compare(after, before)
    >>> found.pairs[0][0].nuclear < found.pairs[0][1].nuclear
    True
    """
    others = {(record.label, record.shape): record for record in there.records}
    pairs, alone = [], []
    for record in here.records:
        other = others.pop((record.label, record.shape), None)
        if other is None:
            alone.append(record.label)
        else:
            pairs.append((record, other))
    left = tuple(record.label for record in others.values())
    return Comparison(tuple(pairs), tuple(alone), left)


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "-" if isnan(value) else f"{value:.4g}"
