"""The sets of tensors that are in half precision, and what it lets through of their decay."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from ._ledger import Entry, Part
from ._rounding import HALF, Passed, RoundedSet, half, warn_if_rounded
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
) -> tuple[dict[int, tuple[float, float]], dict[int, dict[tuple[int, ...], Part]]]:
    """Return the parts of each set's decay that enter its gradient, and reach its weights.

    Returns
    -------
    dict of int to (float, float)
        By place the mean over the entries of the set.
    dict of int to dict
        By place what it is of each tensor, where tensors of several precisions are in a set.
    """
    means, parts = {}, {}
    for place, tried in rounded.items():
        (target, entry), found = ledgers[place], effective[place]
        moved, passed = _by_dtype(found.params, target.group in ungated), {}
        lr = lr_of(found.settings)
        for dtype, (places, params) in moved.items():
            held = entry.others.get(places[0], entry).held
            acts = (params, found.decay, lr, step, held)
            passed[tuple(places)] = tried.passed(*acts) if dtype in HALF else Passed()
        means[place] = _mean([*passed.values()], [params for _, params in moved.values()])
        if len(set(passed.values())) > 1:
            parts[place] = {places: one.part for places, one in passed.items()}
    return means, parts


def _by_dtype(
    params: Sequence[torch.Tensor], everything: bool
) -> dict[torch.dtype, tuple[list[int], list[torch.Tensor]]]:
    """Return the places and the tensors that a step moves, by their precision."""
    found: dict[torch.dtype, tuple[list[int], list[torch.Tensor]]] = {}
    for place, p in enumerate(params):
        if everything or p.grad is not None:
            if (pair := found.get(p.dtype)) is None:
                pair = found[p.dtype] = [], []
            places, some = pair
            places.append(place)
            some.append(p)
    return found


def _mean(
    passed: Sequence[Passed], params: Sequence[Sequence[torch.Tensor]]
) -> tuple[float, float]:
    """Return the mean over entries of what entered, and of what reached the weights."""
    if len(set(passed)) == 1:
        return passed[0].entered, passed[0].reached
    sizes = [sum(p.numel() for p in some) for some in params]
    total = max(1, sum(sizes))
    pairs = [(n / total, found) for n, found in zip(sizes, passed, strict=True)]
    entered = 1 + sum(share * (found.entered - 1) for share, found in pairs)
    return entered, 1 + sum(share * (found.reached - 1) for share, found in pairs)


def warn_of_rounding(ledgers: Ledgers, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Warn where the precision of weights changes their decay, and return whether it does."""
    return any(
        warn_if_rounded(t.params(groups[t.group]), entry.acting_part, entry.taken, t.group)
        for t, entry in ledgers
    )
