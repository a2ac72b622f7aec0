"""The report of a run: numbers as frozen data, plain text, JSON and a page."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._html import html_page, html_table
from ..spectrum.records import without_nan

__all__ = ["DRow", "DecayRow", "LoopRow", "ProductRow", "RunReport", "save_report"]

MOST_ROWS = 12  # of a kind in the text; the data has all


@dataclass(frozen=True)
class DecayRow:
    """The decay of a group, or of a set of tensors in it.

    Attributes
    ----------
    group, kind : str
        Its name, and how its decay acts, one of ``mirrorflow.weightdecay.COUPLINGS``.
    asked : float
        The sum of lr x decay, for the tensor that absorbed most, over the steps in which it had a
        gradient; NaN where a resumed run does not know it.
    acted : float
        ``-a_T``, what of it that tensor has absorbed; NaN where no such number exists.
    steps : int
        How many steps moved the group, or any of its tensors.
    off_from : int or None
        The step from which on the decay was 0; None if it was not 0 at the end, or always.
    left : float
        ``prod (1 - s)`` over the steps of that tensor, s being the part that a step took of the
        entries that decay most; NaN where the steps have no such factors (momentum, rounding), or
        a resumed run does not know them.
    """

    group: str
    kind: str
    asked: float
    acted: float
    steps: int
    off_from: int | None
    left: float = math.nan

    @property
    def shrinkage(self) -> float:
        """The most by which this decay alone has shrunk a product: ``1 - left^2``.

        Where that is not known about ``1 - e^{2a}``, a little less than it.
        """
        return -math.expm1(-2 * self.acted) if math.isnan(self.left) else 1 - self.left**2


@dataclass(frozen=True)
class ProductRow:
    """Ratio and effective rank of a product, or head: before, after, and of random factors.

    Attributes
    ----------
    name : str
        With the adapter and the head.
    shape : (int, int, int)
        (n, r, m).
    ratio_before, ratio_after, ratio_random : float
        Nuclear over Frobenius norm; NaN where the product was 0, as LoRA's at its start. The last
        is that of independent normal factors of this shape.
    rank_before, rank_after, rank_random : float
        The effective rank, likewise.
    """

    name: str
    shape: tuple[int, int, int]
    ratio_before: float
    ratio_after: float
    ratio_random: float
    rank_before: float
    rank_after: float
    rank_random: float


@dataclass(frozen=True)
class DRow:
    """The exact account of D = A^T A - B B^T of a product, over its heads if it has several.

    Attributes
    ----------
    name : str
    fraction_left : float
        ``|D| / |D_0|``.
    decay_alone : float
        ``|D| / |D_0|`` if nothing but the decay had acted.
    decay, optimizer, step_and_noise, unsplit, outside : float
        What of ``|D|^2`` each part makes, ``<part, D> / |D|^2``, which add up to 1: what decay left
        of D_0; what the optimizer (momentum, Adam) put in; finite steps and the noise of
        minibatches; the last two together where only the ends of intervals were seen; and what was
        not training. Parts may be negative, and exceed 1 where another takes them back.
    n_steps, n_intervals : int
        How many steps were split, and how many intervals were seen from their ends.
    """

    name: str
    fraction_left: float
    decay_alone: float
    decay: float
    optimizer: float
    step_and_noise: float
    unsplit: float
    outside: float
    n_steps: int
    n_intervals: int


@dataclass(frozen=True)
class LoopRow:
    """What has become of a closed loop.

    Attributes
    ----------
    name : str
        Its class, and its layer.
    fired_at : int or None
        The step at which it switched the decay off; None if it did not, or does not switch.
    outcome : str
        In a sentence.
    """

    name: str
    fired_at: int | None
    outcome: str


@dataclass(frozen=True, repr=False)
class RunReport:
    """What decay did in a run, as far as the run can tell: `ControlledDecay.report` makes it.

    Attributes
    ----------
    optimizer : str
        Its class.
    steps : int
        How many it has taken.
    measured : (int, int) or None
        The steps of the first and of the last measurement.
    accounted : (int, int) or None
        The step where the account of D began, and the one it has come to.
    decay : tuple of DecayRow
    products : tuple of ProductRow
    D : tuple of DRow
    loops : tuple of LoopRow
    shows, cannot_show : tuple of str
        What follows from these numbers, and what does not, in sentences.
    track_every : int
        After how many steps the spectra were to be measured; 0 for never.
    """

    optimizer: str
    steps: int
    measured: tuple[int, int] | None
    accounted: tuple[int, int] | None
    decay: tuple[DecayRow, ...]
    products: tuple[ProductRow, ...]
    D: tuple[DRow, ...]
    loops: tuple[LoopRow, ...]
    shows: tuple[str, ...] = ()
    cannot_show: tuple[str, ...] = ()
    track_every: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is NaN is None, as JSON has no NaN."""
        return without_nan(asdict(self))

    def to_json(self, indent: int | None = 1) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_html(self) -> str:
        """Return a page of the report, which runs no script and needs no network."""
        products = ["product"]
        products += [
            f"{of} {when}" for of in ("ratio", "rank") for when in ("before", "after", "of random")
        ]
        lead = f"{self.optimizer}, {self.steps:,} steps. The ratio is that of the nuclear to the "
        lead += "Frobenius norm, the rank the effective one; random factors have the same shape."
        first, last = self.measured or (0, 0)
        where = f"Products at steps {first:,} and {last:,}"
        sections = [
            ("What this run shows", (), self.shows),
            ("What it cannot show", (), self.cannot_show),
            ("Decay asked and acted", _DECAY, [_decay_cells(row) for row in self.decay]),
            (where, products, [_product_cells(row) for row in self.products]),
            ("What D = A^T A - B B^T consists of", _D, [_D_cells(row) for row in self.D]),
            ("Closed loops", (), [f"{row.name}: {row.outcome}" for row in self.loops]),
        ]
        return html_page("Weight decay in a run", lead, sections)

    def __repr__(self) -> str:
        """Say of how long a run it is, and of how many groups and products."""
        counts = f"{len(self.decay)} groups, {len(self.products)} products"
        return f"RunReport({self.steps:,} steps of {self.optimizer}, {counts})"

    def _repr_html_(self) -> str:
        """Show the decay, the products, and what the run shows and cannot show."""
        parts = [
            html_table(repr(self), _DECAY, map(_decay_cells, self.decay)),
            html_table(self._title(), _PRODUCTS, map(_product_cells, self.products)),
            html_table("What this run shows", [], [], self.shows),
            html_table("What it cannot show", [], [], self.cannot_show),
        ]
        return "".join(parts)

    def __str__(self) -> str:
        """Return the report as plain text."""
        parts = [
            f"Weight decay in {self.steps:,} steps of {self.optimizer}",
            *_table("decay", _DECAY, [_decay_cells(row) for row in self.decay]),
            *_table(self._title(), _PRODUCTS, [_product_cells(row) for row in self.products]),
            *_table("D = A^T A - B B^T, and what it consists of", _D, [*map(_D_cells, self.D)]),
            *_list("closed loops", [f"{row.name}: {row.outcome}" for row in self.loops]),
            *_list("what this run shows", self.shows),
            *_list("what it cannot show", self.cannot_show),
        ]
        return "\n".join(parts)

    def _title(self) -> str:
        """Return the title of the products, with the steps they were measured at."""
        first, last = self.measured or (0, 0)
        return f"products at steps {first:,} and {last:,}, and random factors of their shape"


def save_report(report: RunReport, path: Path) -> None:
    """Write a report as JSON, and as a page beside it; a warning if that fails.

    The run itself has ended well.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report.to_json(), encoding="utf-8")
        page = report.to_html()
        path.with_suffix(".html").write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        warnings.warn(f"the report could not be written to {path}: {error}", stacklevel=3)


_DECAY = ("group", "kind", "asked", "acted", "shrinks a product by", "off from")
_PRODUCTS = ("product", "ratio", "", "random", "eff. rank", "", "random")
_D = ("product", "|D| left", "decay alone", "decay", "optimizer", "step, noise", "unsplit", "other")


def _decay_cells(row: DecayRow) -> list[str]:
    """Return the cells of a row."""
    off = "-" if row.off_from is None else f"{row.off_from:,}"
    shrinks = _percent(row.shrinkage)
    return [row.group, row.kind, _cell(row.asked), _cell(row.acted), shrinks, off]


def _product_cells(row: ProductRow) -> list[str]:
    """Return the cells of a row."""
    ratios = (row.ratio_before, row.ratio_after, row.ratio_random)
    ranks = (row.rank_before, row.rank_after, row.rank_random)
    return [row.name, *map(_cell, (*ratios, *ranks))]


def _D_cells(row: DRow) -> list[str]:
    """Return the cells of a row."""
    parts = (row.decay, row.optimizer, row.step_and_noise, row.unsplit, row.outside)
    return [row.name, _cell(row.fraction_left), _cell(row.decay_alone), *map(_percent, parts)]


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _table(title: str, head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Return lines: a title, the columns' heads, and the first rows; nothing without rows."""
    if not rows:
        return []
    shown = [list(head), *rows[:MOST_ROWS]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in shown
    ]
    more = len(rows) - MOST_ROWS
    return ["", title, *lines, *([f"  ... and {more} more"] if more > 0 else [])]


def _list(title: str, sentences: Any) -> list[str]:
    """Return lines: a title and its sentences; nothing without any."""
    lines = [f"  - {sentence}" for sentence in sentences]
    more = len(lines) - MOST_ROWS
    shown = [*lines[:MOST_ROWS], *([f"  ... and {more} more"] if more > 0 else [])]
    return ["", title, *shown] if lines else []
