"""The sets of tensors that are in half precision, and what it lets through of their decay."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ._ledger import Entry
from ._rounding import RoundedSet, half, warn_if_rounded
from ._targets import Target
from .conventions import EffectiveDecay, lr_of
from .coupling import COUNTED

if TYPE_CHECKING:
    from ._coverage import CoveragePlan

__all__ = ["let_through", "rounded_sets", "warn_of_rounding"]

Ledgers = Sequence[tuple[Target, Entry]]


def rounded_sets(
    plan: CoveragePlan, optimizer: Optimizer, ledgers: Ledgers
) -> dict[int, RoundedSet]:
    """Return the sets that have tensors in half precision, by their places."""
    if plan.rounding is not None or plan.mask is not None:
        return {}  # what is rounded by chance acts as a whole; a mask counts by itself
    groups = optimizer.param_groups
    return {
        place: RoundedSet(entry.coupling, plan.decoupled, optimizer, target.group)
        for place, (target, entry) in enumerate(ledgers)
        if entry.coupling in COUNTED and half(target.params(groups[target.group]))
    }


def let_through(
    rounded: Mapping[int, RoundedSet],
    ledgers: Ledgers,
    effective: Sequence[EffectiveDecay],
    ungated: Collection[int],
    step: int,
) -> dict[int, tuple[float, float]]:
    """Return the parts of each set's decay that enter its gradient, and reach its weights."""
    parts = {}
    for place, tried in rounded.items():
        (target, entry), found = ledgers[place], effective[place]
        everything = target.group in ungated
        moved = [p for p in found.params if p.grad is not None or everything]
        part = tried.passed(moved, found.decay, lr_of(found.settings), step, entry.held)
        parts[place] = part.entered, part.reached
    return parts


def warn_of_rounding(ledgers: Ledgers, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Warn where the precision of weights changes their decay, and return whether it does."""
    return any(
        warn_if_rounded(t.params(groups[t.group]), entry.acting_part, entry.taken, t.group)
        for t, entry in ledgers
    )
