"""What a run shows, and what it cannot show: a report made from its ledgers and measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..balance import BalanceSplit
from ..spectrum import Measurement
from ..spectrum.pairs import Pair
from ..spectrum.records import Record
from ..spectrum.reference import random_product
from ..weightdecay import Feedback, OffAtBudget, WeightDecayScheduler
from .report import DecayRow, DRow, LoopRow, ProductRow, RunReport

__all__ = ["D_rows", "decay_rows", "first_numbers", "loop_rows", "product_rows", "verdict"]

TOO_LITTLE = 0.01  # a product shrunk by less is as good as not shrunk
APART = 0.1  # relative difference of asked and acted from which it deserves a sentence

Numbers = Mapping[str, Sequence[float | None]]  # ratio and effective rank by product


def first_numbers(found: Measurement) -> dict[str, list[float | None]]:
    """Return ratio and effective rank of each product, for a state; None for NaN."""
    return {
        record.label: [
            value if math.isfinite(value) else None
            for value in (record.ratio, record.effective_rank)
        ]
        for record in found.records
    }


# The rows


def decay_rows(scheduler: WeightDecayScheduler) -> tuple[DecayRow, ...]:
    """Return what was asked for and what acted, of each set of tensors that has a decay."""
    groups = scheduler.optimizer.param_groups
    found = []
    for target, entry in zip(scheduler.targets, scheduler.account.entries, strict=True):
        if entry.asked != 0 or entry.absorbed != 0:
            name, own = scheduler.name(target), entry.smallest(target.count(groups[target.group]))
            off, kind = _off_from(entry.rows(name)), entry.coupling
            found.append(DecayRow(name, kind, own.asked, own.absorbed, entry.taken, off, own.left))
    return tuple(found)


def _off_from(rows: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the first step of the run of steps without decay that ends the record."""
    start, acted = None, False
    for row in rows:
        off = row["decay"] == row["decay_end"] == 0
        start = (row["start"] if start is None else start) if off else None
        acted = acted or not off
    return start if acted else None


def product_rows(
    first: Numbers, last: Measurement | None, pairs: Iterable[Pair]
) -> tuple[ProductRow, ...]:
    """Return ratio and rank of each product before and after, and of random factors."""
    inner = {pair.label: _independent(pair) for pair in pairs}
    records = () if last is None else last.records
    return tuple(_product_row(record, first.get(record.label), inner) for record in records)


def _independent(pair: Pair) -> float:
    """Return the part of the inner dimension that a layer's rank is limited to: shared keys."""
    return (pair.key_heads or 1) / (pair.heads or 1)


def _product_row(
    record: Record, before: Sequence[float | None] | None, inner: Mapping[str, float]
) -> ProductRow:
    """Return the row of a record."""
    ratio, rank = (_known(value) for value in before or (None, None))
    n, r, m = record.shape
    kept = 1.0 if record.head is not None else inner.get(record.label, 1.0)
    random = random_product(n, max(1, round(r * kept)), m)
    return ProductRow(
        record.label,
        record.shape,
        ratio,
        record.ratio,
        random.ratio,
        rank,
        record.effective_rank,
        random.effective_rank,
    )


def _known(value: float | None) -> float:
    """Return NaN for None."""
    return math.nan if value is None else float(value)


def D_rows(splits: Mapping[str, BalanceSplit]) -> tuple[DRow, ...]:
    """Return the account of each product, over its heads."""
    return tuple(_D_row(name, split) for name, split in splits.items())


def _D_row(name: str, split: BalanceSplit) -> DRow:
    """Return the row of a product."""
    today, start = split.D, _size(split.D_0)
    size = _size(today)
    parts = {part: _over(_inner(found, today), size) for part, found in split.parts.items()}
    return DRow(
        name,
        math.sqrt(_over(size, start)),
        math.sqrt(_over(_size(split.left_by_decay), start)),
        parts["left_by_decay"],
        parts["optimizer"],
        parts["second_order"],
        parts["unsplit"],
        parts["outside"],
        split.n_steps,
        split.n_intervals,
    )


def _size(matrices: Tensor) -> float:
    """Return the sum of the squares of a batch."""
    return _inner(matrices, matrices)


def _inner(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two batches."""
    return float((a * b).sum())


def _over(a: float, b: float) -> float:
    """Return a / b; NaN where b is 0."""
    return a / b if b else math.nan


def loop_rows(
    loops: Iterable[tuple[str, Feedback]], absorbed: Mapping[int, float]
) -> tuple[LoopRow, ...]:
    """Return what has become of each loop; ``absorbed`` is what those with a budget have spent."""
    return tuple(
        LoopRow(
            f"{type(loop).__name__} {name}".strip(),
            None if loop.fired_at is None else int(loop.fired_at),
            loop.outcome() + _spent(loop, absorbed.get(id(loop), math.nan)),
        )
        for name, loop in loops
    )


def _spent(loop: Feedback, absorbed: float) -> str:
    """Return how much of a budget that was not spent has been."""
    if not isinstance(loop, OffAtBudget) or loop.fired_at is not None or math.isnan(absorbed):
        return ""
    return f" ({absorbed:.3g} was)"


# The sentences


def verdict(report: RunReport) -> RunReport:
    """Return a report with the sentences that follow from its numbers."""
    shows = (*_of_decay(report), *_of_spectra(report), *_of_D(report))
    return replace(report, shows=shows, cannot_show=tuple(_limits(report)))


def _of_decay(report: RunReport) -> list[str]:
    """Return what is known of the decay."""
    if not report.decay:
        return ["No decay acted: lr x decay was 0 throughout."]
    known = [row for row in report.decay if not math.isnan(row.acted)]
    said = [
        _of_asked(row) for row in known if row.asked > 0 and abs(row.acted / row.asked - 1) > APART
    ]
    if known:
        most = max(known, key=lambda row: row.shrinkage)
        text = f"Decay alone has shrunk a product by {_of_size(most)}"
        little = most.shrinkage < TOO_LITTLE
        said.append(f"{text}: too little to matter as drag or as bias." if little else f"{text}.")
    return said


def _of_size(row: DecayRow) -> str:
    """Return by how much: a bound where the factors of all steps are known, else by a alone."""
    size, a = f"{100 * row.shrinkage:.3g}% of its size", f"a = {-row.acted:.3g}"
    if math.isnan(row.left):
        return f"about {size} (1 - e^(2a), {a})"
    return f"{size} at most ({a})"


def _of_asked(row: DecayRow) -> str:
    """Return how much more, or less, has acted than lr x decay adds up to."""
    share = row.acted / row.asked
    if row.kind == "sgd":
        return f"Momentum has let {share:.3g} times the lr x decay of group {row.group} act."
    return f"Of the decay asked for in group {row.group}, {share:.0%} has acted."


def _of_spectra(report: RunReport) -> list[str]:
    """Return how the mean ratio has moved, over the products that have one before and after."""
    rows = [r for r in report.products if not math.isnan(r.ratio_before + r.ratio_after)]
    if not rows:
        return []
    before, after, random = (
        sum(getattr(row, f"ratio_{name}") for row in rows) / len(rows)
        for name in ("before", "after", "random")
    )
    first, last = (f"at step {step:,}" for step in report.measured or (0, 0))
    was, now = f"{before:.3g}", f"{after:.3g}"
    moved = f"{'fell' if after < before else 'rose'} from {was} {first} to {now} {last}"
    if was == now:
        moved = f"was {was} {first}, and {last}"
    count = "1 product" if len(rows) == 1 else f"{len(rows)} products"
    return [f"The mean ratio of {count} {moved}; random factors have {random:.3g}."]


def _of_D(report: RunReport) -> list[str]:
    """Return what D consists of, of the products that have a D."""
    rows = [row for row in report.D if not math.isnan(row.fraction_left + row.decay)]
    if not rows:
        return []
    mean = {
        name: sum(getattr(row, name) for row in rows) / len(rows)
        for name in ("fraction_left", "decay_alone", "decay", "optimizer", "step_and_noise")
    }
    text = (
        f"{mean['fraction_left']:.3g} of |D| is left in the mean, where decay alone would have "
        f"left {mean['decay_alone']:.3g}"
    )
    if all(row.n_intervals == 0 for row in rows):
        text += (
            f": of today's D {mean['decay']:.0%} is the start's, {mean['optimizer']:.0%} the "
            f"optimizer's, and {mean['step_and_noise']:.0%} of finite steps and noise"
        )
    return [f"{text}."]


def _limits(report: RunReport) -> list[str]:
    """Return what these numbers do not say."""
    said = [
        "Whether loss, ratio or rank would differ without this decay: that takes a second run, "
        "with the decay at 0 and all else equal."
    ]
    if any(math.isnan(row.acted) for row in report.decay):
        said.append(
            "How much decay has acted where it goes through a rescaled gradient (L2 in Adam): no "
            "number describes it. decoupled=True has one."
        )
    if not report.products:
        said.append(f"What became of the spectra: {_why_unmeasured(report)}.")
    elif report.measured and report.measured[0] > 0:
        said.append(
            f"What the spectra were before step {report.measured[0]:,}, where they were first "
            "measured."
        )
    if not report.D and report.products:
        said.append(
            "How much of the change of D = A^T A - B B^T is decay's: its size does not say so. "
            "Pass balance_every=1 for the exact account."
        )
    if any(row.n_intervals for row in report.D):
        said.append(
            "How D divides between optimizer, and step and noise, where only the ends of intervals "
            "were seen: balance_every=1 splits each step."
        )
    if report.products:
        said.append(
            "That the end minimizes a known R_a: the theorem is of gradient flow on commuting "
            f"pairs, and products of matrices under {report.optimizer} are not that."
        )
    return said


def _why_unmeasured(report: RunReport) -> str:
    """Return why nothing was measured, and what to pass."""
    if not report.track_every:
        return "pass track_every=50, say"
    if report.track_every > report.steps:
        return f"track_every={report.track_every} exceeds the {report.steps:,} steps, pass less"
    return f"nothing was measured, for all that track_every={report.track_every}"
