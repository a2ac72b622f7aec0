"""The agreement of ledgers with a checkpoint: the form of what it holds, and what fits together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ._ledger import TENSORS, TOTALS, Account, Entry, Piece
from ._ledger_state import adopt, replace_account, take_parted, take_state

__all__ = ["check", "load", "settle", "warn_if_missing"]

Groups = Sequence[Mapping[str, Any]]
Totals = tuple[str, int, float, float]
_OF_ENTRY = {"taken", "absorbed", "held", "span", "pieces"}  # of the state of a ledger, at least
_ROUNDING = 1e-7  # of sums in another order, relative to the sum


def settle(account: Account, groups: Sequence[dict[str, Any]]) -> None:
    """Move to the step and the totals of the optimizer's groups, which belong to the weights."""
    if not any(group.get(TOTALS) for group in groups):
        account.share(groups)
    elif not _is_that_of(account, groups) and not _is_that_loaded(account, groups):
        _adopt(account, groups)


def _is_that_of(account: Account, groups: Groups) -> bool:
    """Return whether the groups know these totals; new groups know none yet."""
    mine = account.totals(len(groups))
    pairs = zip((group.get(TOTALS) for group in groups), mine, strict=True)
    return all(theirs is None or _same(theirs, ours) for theirs, ours in pairs)


def _is_that_loaded(account: Account, groups: Groups) -> bool:
    """Go back to the state that was loaded last; return whether the groups know its totals.

    A state loaded before the optimizer's own has moved to the step where the optimizer was.
    """
    if account.loaded is None:
        return False
    take_state(account, account.loaded)
    return _is_that_of(account, groups)


def check(account: Account, groups: Groups) -> None:
    """Raise if the totals in the groups are not those of such ledgers.

    Raises
    ------
    ValueError
        If they were written with other rules, or for a decay that acts in another way.
    """
    for index, group in enumerate(groups):
        theirs = list(_divided(group.get(TOTALS, ())))
        ours = [e for e, i in zip(account.entries, account.group_of, strict=True) if i == index]
        if theirs and len(theirs) != len(ours):
            raise ValueError(
                "the optimizer's checkpoint was written with other rules (groups=, decoupled=):"
                f" its group {index} holds {len(theirs)} ledgers, here it needs {len(ours)}. "
                "Make the scheduler with the same rules, or remove the key "
                f"{TOTALS!r} from the param_groups of the checkpoint to begin at step 0"
            )
        for entry, totals in zip(ours, theirs, strict=False):
            _check_coupling(entry.coupling, totals[0], totals[1], f"group {index}")


def _adopt(account: Account, groups: Groups) -> None:
    """Take over the totals of the groups."""
    check(account, groups)
    known = [list(_divided(group.get(TOTALS, ()))) for group in groups]
    steps = next(int(group[TOTALS][0]) for group in groups if TOTALS in group)
    moves = [
        (entry, known[index].pop(0))
        for entry, index in zip(account.entries, account.group_of, strict=True)
        if known[index]
    ]
    parted = [list(group.get(TENSORS, ())) for group in groups]
    for entry, index in zip(account.entries, account.group_of, strict=True):
        take_parted(entry, parted[index].pop(0) if parted[index] else ())
    ours, account.steps, account.fresh = account.steps, steps, False
    if all(_fits(entry, totals, ours, steps) for entry, totals in moves):
        for entry, totals in moves:
            adopt(entry, totals, ours, steps)
        account.missing = (ours, steps) if steps > ours else None
        return
    for entry, totals in moves:
        replace_account(entry, totals, steps)
    account.missing = (0, steps)


def _fits(entry: Entry, totals: tuple[str, int, float, float], ours: int, theirs: int) -> bool:
    """Return whether the totals of step ``theirs`` can be those of this record's own run.

    What a step takes is >= 0, so that a later sum is not smaller; an earlier one has to be the
    record's up to there, or lie within a piece of it.
    """
    _, taken, absorbed, _ = totals
    if theirs > ours:
        more = taken - entry.taken
        return 0 <= more <= theirs - ours and _between(entry.absorbed, absorbed, math.inf)
    if theirs == ours and taken != entry.taken:
        return False
    low = sum(p.absorbed for p in entry.pieces if p.stop <= theirs)
    parts = [_part(entry, p, theirs) for p in entry.pieces if p.start < theirs < p.stop]
    least, most = (low + sum(ends) for ends in zip((0.0, 0.0), *parts, strict=True))
    return taken <= entry.taken and _between(least, absorbed, most)


def _part(entry: Entry, piece: Piece, step: int) -> tuple[float, float]:
    """Return bounds of what a piece had absorbed at a step within it."""
    even = piece.constant(piece.decay) and piece.lr == piece.lr_end
    even = even and entry.passed == entry.asked  # what rounding lets through changes
    if not even or entry.coupling == "sgd":  # whose buffer fills by and by
        return 0.0, piece.absorbed
    part = piece.absorbed * (step - piece.start) / (piece.stop - piece.start)
    return part, part


def _between(low: float, value: float, high: float) -> bool:
    """Return whether a sum lies between two others, up to rounding; of NaN nothing is known."""
    if math.isnan(low) or math.isnan(value) or math.isnan(high):
        return True
    slack = _ROUNDING * max(abs(low), abs(value))
    return low - slack <= value <= high + slack


def warn_if_missing(account: Account) -> None:
    """Warn, once, of the steps that the record lacks."""
    (start, stop), account.missing = account.missing or (0, 0), None
    if stop == start:
        return
    warnings.warn(
        f"the optimizer is at step {stop}, the state of WeightDecayScheduler at step {start}: "
        "it was not loaded, not saved together with the optimizer's, or is of another run. "
        f"Schedule and totals go on from step {stop}; only the record of steps {start} to "
        f"{stop} is lost to audit()",
        stacklevel=4,
    )


def load(account: Account, state: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Continue from what `Account.state` gave, at the step that the optimizer is at.

    Raises
    ------
    ValueError
        If it is not the state of such ledgers; nothing is changed then.
    """
    entries = _checked(state, len(account.entries))
    for i, (entry, saved) in enumerate(zip(account.entries, entries, strict=True)):
        kind = saved.get("kind", entry.coupling)
        _check_coupling(entry.coupling, kind, saved["taken"], f"ledger {i}")
    account.loaded = {"steps": state["steps"], "entries": entries}
    take_state(account, account.loaded)
    if any(group.get(TOTALS, (0,))[0] for group in groups):
        settle(account, groups)
    else:
        account.alone = account.steps > 0
        account.share(groups)


def _divided(values: Sequence[Any]) -> list[Totals]:
    """Return (steps, kind, taken, absorbed, held, ...) as tuples (kind, taken, absorbed, held)."""
    if len(values) % 4 != bool(values):
        raise ValueError(
            f"the optimizer's checkpoint holds {TOTALS}={tuple(values)!r}, which this version did "
            "not write: remove the key from its param_groups to begin at step 0"
        )
    parts = zip(values[1::4], values[2::4], values[3::4], values[4::4], strict=True)
    return [(str(kind), int(n), float(a), float(held)) for kind, n, a, held in parts]


def _same(theirs: Sequence[Any], ours: Sequence[Any]) -> bool:
    """Return whether totals are the same, in which NaN stands for what is not known."""
    if len(theirs) != len(ours):
        return False
    return all(a == b or (a != a and b != b) for a, b in zip(theirs, ours, strict=True))


def _check_coupling(ours: str, theirs: str, taken: int, where: str) -> None:
    """Raise if what was taken so far acted in another way than the decay acts here."""
    if ours == theirs or not taken:
        return
    raise ValueError(
        f"the decay of {where} acts as {ours!r} here, and as {theirs!r} in the checkpoint: one sum "
        "cannot go on as the other. Make the scheduler with the optimizer, decoupled= and "
        "coupling= of the run that wrote it; or begin a new account: remove the key "
        f"{TOTALS!r} from the param_groups of the optimizer's checkpoint, and do not load the "
        "scheduler's state"
    )


def _checked(state: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """Return the entries of a state; raise if they are not those of this scheduler."""
    if not isinstance(state, Mapping) or not {"steps", "entries"} <= set(state):
        known = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            "not a state of WeightDecayScheduler: it must have the keys steps and entries, got "
            f"{known}"
        )
    entries: list[Mapping[str, Any]] = list(state["entries"])
    for place, entry in enumerate(entries):
        lacks = _OF_ENTRY - set(entry) if isinstance(entry, Mapping) else _OF_ENTRY
        if lacks:
            raise ValueError(
                f"ledger {place} of the state must have the keys {', '.join(sorted(_OF_ENTRY))}, "
                f"got {entry!r:.60}. Pass what WeightDecayScheduler.state_dict() returned"
            )
    entries = [dict(entry) for entry in entries]
    if len(entries) != count:
        raise ValueError(
            f"the state has {len(entries)} ledgers, this optimizer needs {count}: one for each "
            "parameter group, or for each set of tensors that groups= chooses. Add the groups that "
            "were added in the run, then load"
        )
    return entries
