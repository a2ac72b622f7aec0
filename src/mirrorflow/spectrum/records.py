"""Records of measured products: data, their means, and a table of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isfinite, isnan, nan, sqrt
from typing import Any

from .._html import html_table
from ._text import aligned
from .pairs import label
from .reference import random_product

__all__ = ["Measurement", "Record", "table", "without_nan"]

SAME = 0.05  # a mean ratio within it of a random one is about as high
BESIDE = ("random_ratio", "highest_ratio")
COLUMNS = ("ratio", "nuclear", "frobenius", "effective_rank", "stable_rank", "gap", "imbalance")

# The columns of the table: attributes of a record, and their heads.
SHOWN = {
    "ratio": "ratio", "random_ratio": "random", "highest_ratio": "most",
    "effective_rank": "eff.rank", "stable_rank": "stable", "rank_90": "90%", "rank_95": "95%",
    "rank_99": "99%", "nuclear": "nuclear", "frobenius": "frobenius", "gap": "gap",
    "imbalance": "imbalance",
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    r"""The spectrum of one product, as numbers.

    Attributes
    ----------
    name, kind, adapter, notes
        Of the `Pair`.
    head : int or None
        Which query head; None for the whole layer.
    shape : tuple of int
        (n, r, m) of the product that was measured.
    status : str
        "ok"; "undefined" where A B = 0, so that it has no ratio (LoRA at its start); "not finite"
        where a factor holds NaN or infinite entries.
    nuclear, frobenius, spectral : float
        Norms of scale A B.
    ratio, effective_rank, stable_rank : float
        NaN unless the status is "ok".
    gap : float
        ``(|A|_F^2 + |B|_F^2) / 2 - |A B|_*``, of the factors as they are stored, without the scale.
    imbalance : float
        ``|A^T A - B B^T|_F``, likewise. Decay shrinks it, the optimizer and the noise of
        minibatches make it grow: `mirrorflow.balance` tells them apart.
    rank_90, rank_95, rank_99 : int, or NaN
        The smallest rank that holds this share of the squared singular values; 0 where A B = 0,
        NaN where a factor is not finite.
    scale : float
        The model adds scale A B.
    """

    name: str
    kind: str
    head: int | None
    adapter: str
    shape: tuple[int, int, int]
    status: str
    nuclear: float
    frobenius: float
    spectral: float
    ratio: float
    effective_rank: float
    stable_rank: float
    gap: float
    imbalance: float
    rank_90: int | float
    rank_95: int | float
    rank_99: int | float
    scale: float
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, with the adapter and the head."""
        name = label(self.name, self.kind, self.adapter)
        return name if self.head is None else f"{name} head {self.head}"

    @property
    def random_ratio(self) -> float:
        """The mean ratio of random factors of this shape, beside which the ratio is low or high."""
        return random_product(*self.shape).ratio

    @property
    def highest_ratio(self) -> float:
        """The ratio of equal singular values: the square root of the largest possible rank."""
        return sqrt(min(self.shape))


@dataclass(frozen=True, repr=False)
class Measurement:
    """The records of all pairs, and their means.

    Attributes
    ----------
    records : tuple of Record
    skipped : tuple of (str, str)
        Names that look like factors and were not measured, each with the reason.
    notes : tuple of str
        What has to be known of the whole, as that it is one shard of several.
    """

    records: tuple[Record, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Say how many products there are, and their mean ratio."""
        skipped = f", {len(self.skipped)} not measured" if self.skipped else ""
        mean = _cell(self.mean_ratio)
        return f"Measurement({len(self.records)} products, mean ratio {mean}{skipped})"

    def _repr_html_(self) -> str:
        """Show the table of the products, and what has to be known of them."""
        rows = [[r.label, r.shape[1], *(getattr(r, c) for c in SHOWN)] for r in self.records]
        return html_table(repr(self), ["product", "r", *SHOWN.values()], rows, _remarks(self))

    @property
    def defined(self) -> tuple[Record, ...]:
        """The records that have a ratio: what the means are taken over."""
        return tuple(record for record in self.records if record.status == "ok")

    @property
    def undefined(self) -> int:
        """How many products are 0, so that they have no ratio."""
        return sum(record.status == "undefined" for record in self.records)

    @property
    def not_finite(self) -> int:
        """How many products have NaN or infinite factors."""
        return sum(record.status == "not finite" for record in self.records)

    @property
    def mean_ratio(self) -> float:
        """The mean of the ratios that are defined; NaN if none is."""
        return self.mean("ratio")

    @property
    def ratio_of_means(self) -> float:
        """The mean nuclear norm over the mean Frobenius norm: what the paper plots."""
        nuclear, frobenius = self.mean("nuclear"), self.mean("frobenius")
        return nuclear / frobenius if frobenius else nan

    @property
    def verdict(self) -> str:
        """One sentence that says whether the ratios are low; empty where none is defined."""
        if not (found := self.defined):
            return ""
        ratio, random = self.mean_ratio, sum(r.random_ratio for r in found) / len(found)
        part, most = ratio / random, sum(r.highest_ratio for r in found) / len(found)
        how = "above" if part > 1 + SAME else "below" if part < 1 - SAME else "about as high as"
        nothing = "" if part < 1 - SAME else "; it does not show that decay has acted"
        return (
            f"Random factors of these shapes have a mean ratio of {random:.4g} ({most:.4g} at "
            f"most): the {ratio:.4g} here is {how} that ({part:.0%}){nothing}."
        )

    def summary(self) -> dict[str, float]:
        """Return the numbers for a log: the means, and the counts of what is not in them."""
        means = {f"mean_{column}": self.mean(column) for column in COLUMNS}
        counts = {"undefined": float(self.undefined), "not_finite": float(self.not_finite)}
        return {**means, "ratio_of_means": self.ratio_of_means, **counts}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is NaN is None, as JSON has no NaN."""
        skipped = [{"name": name, "reason": reason} for name, reason in self.skipped]
        found = {
            "summary": self.summary(),
            "records": [
                asdict(r) | {name: getattr(r, name) for name in BESIDE} for r in self.records
            ],
            "verdict": self.verdict,
            "notes": self.notes,
            "skipped": skipped,
        }
        return without_nan(found)

    def to_json(self, indent: int | None = 1) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def mean(self, column: str) -> float:
        """Return the mean of an attribute of the records over the defined ones; NaN if none is."""
        values = [getattr(record, column) for record in self.defined]
        return sum(values) / len(values) if values else nan


def table(measurement: Measurement, width: int | None = None) -> str:
    """Return a measurement as lines of text: a row for each record, and the means.

    Parameters
    ----------
    measurement : Measurement
    width : int, optional
        Columns of the terminal: a wider table is cut into blocks of columns.

    Examples
    --------
    >>> import torch
    >>> from mirrorflow.spectrum import SpectralTracker
    >>> attention = torch.nn.MultiheadAttention(8, 2)
    >>> print(table(SpectralTracker(attention, level="head").measure()).splitlines()[0].split())
    ['product', 'r', 'ratio', 'random', 'most', 'eff.rank', 'stable', '90%', '95%', '99%', \
'nuclear', 'frobenius', 'gap', 'imbalance']
    """
    rows = [["product", "r", *SHOWN.values()]]
    for record in measurement.records:
        cells = [_cell(getattr(record, column)) for column in SHOWN]
        if record.status != "ok":
            cells[0] = record.status
        rows.append([record.label, str(record.shape[1]), *cells])
    rows.append(["mean", "", *(_cell(measurement.mean(column)) for column in SHOWN)])
    return "\n".join([*aligned(rows, width), *_remarks(measurement)])


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "-" if isnan(value) else f"{value:.4g}"


def _remarks(measurement: Measurement) -> list[str]:
    """Say what is not in the means, and what has to be known of the rest."""
    lines = [f"ratio of the mean norms: {_cell(measurement.ratio_of_means)}", *measurement.notes]
    lines += [measurement.verdict] if measurement.verdict else []
    if measurement.undefined:
        lines.append(f"{measurement.undefined} undefined (A B = 0), not in the means")
    if measurement.not_finite:
        lines.append(f"{measurement.not_finite} not finite (NaN or infinite), not in the means")
    noted: dict[str, int] = {}
    for record in measurement.records:
        for note in record.notes:
            noted[note] = noted.get(note, 0) + 1
    lines += [f"note on {count}: {note}" for note, count in noted.items()]
    return [*lines, *(f"not measured: {name}: {reason}" for name, reason in measurement.skipped)]


def without_nan(value: Any) -> Any:
    """Put None for NaN and infinity, at any depth."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value
