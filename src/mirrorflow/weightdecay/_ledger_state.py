"""The accounts of decay as plain numbers: saved, loaded, and taken over from the groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._ledger import Account, Entry, Piece

__all__ = ["account_state", "adopt", "replace_account", "take_parted", "take_state"]

Totals = tuple[
    str, int, float, float
]  # coupling, steps, sum and buffer, as `Entry.totals` has them
_NUMBERS = ("taken", "absorbed", "held", "asked", "passed", "kept", "span")


def account_state(account: Account) -> dict[str, Any]:
    """Return everything in plain numbers, strings and lists."""
    return {"steps": account.steps, "entries": [_entry_state(entry) for entry in account.entries]}


def take_state(account: Account, state: Mapping[str, Any]) -> None:
    """Take over a state that has been checked."""
    for entry, saved in zip(account.entries, state["entries"], strict=True):
        _load(entry, saved)
    account.shared = []
    account.steps, account.fresh, account.missing = int(state["steps"]), False, None


def adopt(entry: Entry, totals: Totals, ours: int, theirs: int) -> None:
    """Move from step ``ours`` to step ``theirs``, whose totals the optimizer knows."""
    before = entry.absorbed
    _take(entry, totals)
    if theirs > ours:
        entry.pieces.append(_unknown(ours, theirs, entry.absorbed - before))
    else:
        _cut(entry, theirs)


def replace_account(entry: Entry, totals: Totals, steps: int) -> None:
    """Take the totals of another run; of its steps nothing but the sum is known."""
    _take(entry, totals)
    entry.pieces = [_unknown(0, steps, entry.absorbed)] if entry.taken else []


def take_parted(entry: Entry, known: Sequence[Sequence[Any]]) -> None:
    """Take over what `Entry.parted` gave, or a state, which has more numbers of each."""
    others: dict[int, Entry] = {}
    shared: dict[str, Entry] = {}
    for places, taken, absorbed, held, *more in known:
        own = Entry(entry.coupling)
        _take(own, (own.coupling, int(taken), float(absorbed), float(held)))
        if more:
            own.asked, own.passed, own.kept, own.left = map(_nan_for_none, more)
        own = shared.setdefault(repr(own), own)  # older ones are one for each place
        others |= dict.fromkeys([places] if isinstance(places, int) else places, own)
    entry.set_others(others)


def _entry_state(entry: Entry) -> dict[str, Any]:
    """Return the numbers of an entry, and its record."""
    values = {name: getattr(entry, name) for name in _NUMBERS}
    others = [
        [list(places), *totals, *_more(entry.others[places[0]])]
        for places, *totals in entry.parted()
    ]
    pieces = [list(vars(piece).values()) for piece in entry.pieces]
    left = _none_for_nan(entry.left)
    return {"kind": entry.coupling} | values | {"left": left, "others": others, "pieces": pieces}


def _more(entry: Entry) -> Iterable[float | None]:
    """Return what a state knows of a tensor beside what travels in the groups."""
    return map(_none_for_nan, (entry.asked, entry.passed, entry.kept, entry.left))


def _load(entry: Entry, state: Mapping[str, Any]) -> None:
    """Continue from what `_entry_state` gave."""
    entry.taken, entry.absorbed = int(state["taken"]), float(state["absorbed"])
    entry.held, entry.span = state["held"], int(state["span"])
    entry.asked = float(state.get("asked", math.nan))
    entry.passed = float(state.get("passed", math.nan))
    entry.kept = float(state.get("kept", math.nan))
    entry.left = _nan_for_none(state.get("left", None if entry.absorbed else 1.0))
    take_parted(entry, state.get("others", ()))
    if entry.kept == 1:  # no decay has acted since the last call, nor on the others
        for own in entry.others.values():
            own.kept = 1.0
    entry.pieces = [Piece(*piece) for piece in state["pieces"]]


def _take(entry: Entry, totals: Totals) -> None:
    """Take over the numbers."""
    _, entry.taken, entry.absorbed, held = totals
    entry.held = None if math.isnan(held) else held
    entry.asked = entry.passed = entry.kept = math.nan
    entry.left = math.nan if entry.absorbed else 1.0


def _cut(entry: Entry, step: int) -> None:
    """Forget the record from a step on; the last piece takes up the difference."""
    entry.pieces = [piece for piece in entry.pieces if piece.start < step]
    if entry.pieces and entry.pieces[-1].stop > step:
        last = entry.pieces[-1]
        last.stop = step
        last.decay_end = last.decay if last.constant(last.decay) else math.nan
        last.lr_end = last.lr if last.lr == last.lr_end else math.nan
        # The pieces have to sum to what is known of the whole.
        last.absorbed = entry.absorbed - sum(p.absorbed for p in entry.pieces[:-1])


def _none_for_nan(value: float) -> float | None:
    """Return a number for a state, which equals itself."""
    return None if math.isnan(value) else value


def _nan_for_none(value: Any) -> float:
    """Return a number of a state."""
    return math.nan if value is None else float(value)


def _unknown(start: int, stop: int, absorbed: float) -> Piece:
    """Return a piece of which only the sum is known."""
    nan = math.nan
    return Piece(start, stop, nan, nan, nan, nan, absorbed)
