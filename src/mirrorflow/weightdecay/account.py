"""The ledgers of an optimizer, which agree with the checkpoint that the optimizer loads.

The numbers travel twice: with the record in the scheduler's state, and as plain numbers in the
optimizer's parameter groups, whose checkpoint therefore knows the step that it belongs to.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from .coupling import coupling
from .ledger import Entry

__all__ = ["TOTALS", "Account", "begun"]

TOTALS = (
    "weight_decay_ledger"  # the key in a group: (steps, kind, taken, absorbed, held, kind, ...)
)

Groups = Sequence[Mapping[str, Any]]
Totals = tuple[str, int, float, float]


class Account:
    """The number of steps that an optimizer has taken, and one entry for each set of tensors.

    Attributes
    ----------
    steps : int
        The optimizer's steps, skipped ones not counted.
    fresh : bool
        Whether a step has been taken since somebody set this to False, or since a state was loaded.
    alone : bool
        Whether a state was loaded whose step the optimizer has not heard of: it is new, or it will
        load its own yet.
    entries : list of Entry
        The ledgers.

    Examples
    --------
    >>> groups = [{"lr": 0.5}]
    >>> account = Account()
    >>> account.open(Entry("decoupled"), group=0)
    >>> account.entries[0].record(0, 0.1, groups[0])
    >>> account.close_step(groups)
    >>> groups[0]["weight_decay_ledger"]
    (1, 'decoupled', 1, 0.05, nan)
    """

    def __init__(self) -> None:
        self.steps, self.fresh, self.alone = 0, False, False
        self.entries: list[Entry] = []
        self._group_of: list[int] = []
        self._loaded: Mapping[str, Any] | None = None  # since the last step
        self._shared: list[tuple[Any, ...]] = []  # what the groups hold while nobody loads them
        self._missing: tuple[int, int] | None = None

    def open(self, entry: Entry, group: int) -> None:
        """Add a ledger for tensors of a group."""
        self.entries.append(entry)
        self._group_of.append(group)

    def close_step(self, groups: Sequence[dict[str, Any]]) -> None:
        """Count a step whose entries have been made."""
        self.steps += 1
        self.fresh, self._loaded = True, None
        self.share(groups)

    def share(self, groups: Sequence[dict[str, Any]]) -> None:
        """Write the totals to the optimizer's groups."""
        self._shared = self._totals(len(groups))
        for group, values in zip(groups, self._shared, strict=True):
            group[TOTALS] = values

    def _totals(self, count: int) -> list[tuple[Any, ...]]:
        """Give what travels in each of the groups."""
        totals: list[list[Any]] = [[self.steps] for _ in range(count)]
        for entry, index in zip(self.entries, self._group_of, strict=True):
            totals[index].extend(entry.totals())
        return [tuple(values) for values in totals]

    # What the optimizer knows counts: it is that of the weights

    def agree(self, groups: Sequence[dict[str, Any]]) -> None:
        """Move to the step and the totals of the optimizer's groups, if they are others."""
        known = [group.get(TOTALS) for group in groups]
        if len(known) == len(self._shared) and all(map(operator.is_, known, self._shared)):
            return
        if not any(known):
            self.share(groups)
        elif not self._is_that_of(groups) and not self._is_that_loaded(groups):
            self._adopt(groups)

    def _is_that_of(self, groups: Groups) -> bool:
        """Tell whether the groups know these totals; new groups know none yet."""
        mine = self._totals(len(groups))
        pairs = zip((group.get(TOTALS) for group in groups), mine, strict=True)
        return all(theirs is None or _same(theirs, ours) for theirs, ours in pairs)

    def _is_that_loaded(self, groups: Groups) -> bool:
        """Go back to the state that was loaded last, and tell whether the groups know its totals.

        A state loaded before the optimizer's own has moved to the step where the optimizer was.
        """
        if self._loaded is None:
            return False
        self._take(self._loaded)
        return self._is_that_of(groups)

    def check(self, groups: Groups) -> None:
        """Raise if the totals in the groups are not those of such ledgers.

        Raises
        ------
        ValueError
            If they were written with other rules, or for a decay that acts in another way.
        """
        for index, group in enumerate(groups):
            theirs = list(_divided(group.get(TOTALS, ())))
            ours = [e for e, i in zip(self.entries, self._group_of, strict=True) if i == index]
            if theirs and len(theirs) != len(ours):
                raise ValueError(
                    "the optimizer's checkpoint was written with other rules (groups=, decoupled=):"
                    f" its group {index} holds {len(theirs)} ledgers, here it needs {len(ours)}. "
                    "Make the scheduler with the same rules, or remove the key "
                    f"{TOTALS!r} from the param_groups of the checkpoint to begin at step 0"
                )
            for entry, totals in zip(ours, theirs, strict=False):
                _check_kind(entry.kind, totals[0], totals[1], f"group {index}")

    def _adopt(self, groups: Groups) -> None:
        """Take over the totals of the groups."""
        self.check(groups)
        known = [list(_divided(group.get(TOTALS, ()))) for group in groups]
        steps = next(int(group[TOTALS][0]) for group in groups if TOTALS in group)
        moves = [
            (entry, known[index].pop(0))
            for entry, index in zip(self.entries, self._group_of, strict=True)
            if known[index]
        ]
        ours, self.steps, self.fresh = self.steps, steps, False
        if all(entry.fits(totals, ours, steps) for entry, totals in moves):
            for entry, totals in moves:
                entry.adopt(totals, ours, steps)
            self._missing = (ours, steps) if steps > ours else None
            return
        for entry, totals in moves:
            entry.replace(totals, steps)
        self._missing = (0, steps)

    def warn_if_missing(self) -> None:
        """Say, once, which steps the record lacks."""
        if self._missing is None:
            return
        (start, stop), self._missing = self._missing, None
        if stop == start:
            return
        warnings.warn(
            f"the optimizer is at step {stop}, the state of WeightDecayScheduler at step {start}: "
            "it was not loaded, not saved together with the optimizer's, or is of another run. "
            f"Schedule and totals go on from step {stop}; only the record of steps {start} to "
            f"{stop} is lost to audit()",
            stacklevel=4,
        )

    # The scheduler's own state

    def state(self) -> dict[str, Any]:
        """Give everything in plain numbers, strings and lists."""
        return {"steps": self.steps, "entries": [entry.state() for entry in self.entries]}

    def load(self, state: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """Continue from what `state` gave, at the step that the optimizer is at.

        Raises
        ------
        ValueError
            If it is not the state of such ledgers; nothing is changed then.
        """
        entries = _checked(state, len(self.entries))
        for i, (entry, saved) in enumerate(zip(self.entries, entries, strict=True)):
            _check_kind(entry.kind, saved.get("kind", entry.kind), saved["taken"], f"ledger {i}")
        self._loaded = {"steps": state["steps"], "entries": entries}
        self._take(self._loaded)
        if any(group.get(TOTALS, (0,))[0] for group in groups):
            self.agree(groups)
        else:
            self.alone = self.steps > 0
            self.share(groups)

    def _take(self, state: Mapping[str, Any]) -> None:
        """Take over a state that has been checked."""
        for entry, saved in zip(self.entries, state["entries"], strict=True):
            entry.load(saved)
        self._shared = []
        self.steps, self.fresh, self._missing = int(state["steps"]), False, None


def begun(optimizer: Optimizer, group: Mapping[str, Any], kind: str | None) -> Entry:
    """Begin the ledger of a group, whose kind of decay is tried out if it is not given."""
    buffers = any("momentum_buffer" in optimizer.state.get(p, ()) for p in group["params"])
    return Entry(kind or coupling(optimizer, group), held=0.0 if buffers else None)


def _divided(values: Sequence[Any]) -> list[Totals]:
    """Divide (steps, kind, taken, absorbed, held, ...) into its (kind, taken, absorbed, held)."""
    if len(values) % 4 != bool(values):
        raise ValueError(
            f"the optimizer's checkpoint holds {TOTALS}={tuple(values)!r}, which this version did "
            "not write: remove the key from its param_groups to begin at step 0"
        )
    parts = zip(values[1::4], values[2::4], values[3::4], values[4::4], strict=True)
    return [(str(kind), int(n), float(a), float(held)) for kind, n, a, held in parts]


def _same(theirs: Sequence[Any], ours: Sequence[Any]) -> bool:
    """Compare totals, in which NaN stands for what is not known."""
    if len(theirs) != len(ours):
        return False
    return all(a == b or (a != a and b != b) for a, b in zip(theirs, ours, strict=True))


def _check_kind(ours: str, theirs: str, taken: int, where: str) -> None:
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
    """Give the entries of a state, or say why they are not those of this scheduler."""
    if not isinstance(state, Mapping) or not {"steps", "entries"} <= set(state):
        known = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"not a state of WeightDecayScheduler: expected the keys steps and entries, got {known}"
        )
    entries: list[Mapping[str, Any]] = [dict(entry) for entry in state["entries"]]
    if len(entries) != count:
        raise ValueError(
            f"the state has {len(entries)} ledgers, this optimizer needs {count}: one for each "
            "parameter group, or for each set of tensors that groups= chooses. Add the groups that "
            "were added in the run, then load"
        )
    return entries
