"""The ledgers of an optimizer, which agree with the checkpoint that the optimizer loads.

The numbers travel twice: with the record in the scheduler's state, and as plain floats in the
optimizer's parameter groups, whose checkpoint therefore knows the step that it belongs to.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from .coupling import coupling
from .ledger import Entry

__all__ = ["TOTALS", "Account", "begun"]

TOTALS = "weight_decay_ledger"  # the key in a group: (steps, taken, absorbed, held, taken, ...)

Groups = Sequence[dict[str, Any]]


class Account:
    """The number of steps that an optimizer has taken, and one entry for each set of tensors.

    Attributes
    ----------
    steps : int
        The optimizer's steps, skipped ones not counted.
    fresh : bool
        Whether a step has been taken since somebody set this to False, or since a state was loaded.
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
    (1, 1, 0.05, nan)
    """

    def __init__(self) -> None:
        self.steps, self.fresh = 0, False
        self.entries: list[Entry] = []
        self._group_of: list[int] = []
        self._missing: tuple[int, int] | None = None

    def open(self, entry: Entry, group: int) -> None:
        """Add a ledger for tensors of a group."""
        self.entries.append(entry)
        self._group_of.append(group)

    def close_step(self, groups: Groups) -> None:
        """Count a step whose entries have been made."""
        self.steps += 1
        self.fresh = True
        self.share(groups)

    def share(self, groups: Groups) -> None:
        """Write the totals to the optimizer's groups."""
        totals: list[list[float]] = [[self.steps] for _ in groups]
        for entry, index in zip(self.entries, self._group_of, strict=True):
            totals[index].extend(entry.totals())
        for group, values in zip(groups, totals, strict=True):
            group[TOTALS] = tuple(values)

    def agree(self, groups: Groups) -> None:
        """Move to the step of the optimizer's groups: it is the step of the weights."""
        known = [group[TOTALS] for group in groups if TOTALS in group]
        if not known:
            self.share(groups)
        elif known[0][0] != self.steps:
            self._adopt(groups, int(known[0][0]))

    def _adopt(self, groups: Groups, steps: int) -> None:
        """Take over the totals of the groups at another step."""
        totals = [list(_triples(group.get(TOTALS, ()))) for group in groups]
        ours = [self._group_of.count(index) for index in range(len(groups))]
        if any(known and len(known) != n for known, n in zip(totals, ours, strict=True)):
            raise ValueError(
                "the optimizer's checkpoint was written with other rules (groups=, decoupled=): "
                f"its groups hold {[len(t) for t in totals]} ledgers, here they need {ours}. Make "
                "the scheduler with the same rules, or remove the key "
                f"{TOTALS!r} from the param_groups of the checkpoint to begin at step 0"
            )
        for entry, index in zip(self.entries, self._group_of, strict=True):
            if totals[index]:
                entry.adopt(totals[index].pop(0), self.steps, steps)
        self._missing = (self.steps, steps) if steps > self.steps else None
        self.steps, self.fresh = steps, False

    def warn_if_missing(self) -> None:
        """Say, once, which steps the record lacks."""
        if self._missing is None:
            return
        (start, stop), self._missing = self._missing, None
        warnings.warn(
            f"the optimizer is at step {stop}, the state of WeightDecayScheduler at step {start}: "
            "it was not loaded, or not saved together with the optimizer's. Schedule and totals go "
            f"on from step {stop}; only the record of steps {start} to {stop} is lost to audit()",
            stacklevel=4,
        )

    def state(self) -> dict[str, Any]:
        """Give everything in plain numbers and lists."""
        return {"steps": self.steps, "entries": [entry.state() for entry in self.entries]}

    def load(self, state: Mapping[str, Any], groups: Groups) -> None:
        """Continue from what `state` gave, at the step that the optimizer is at."""
        entries = _checked(state, len(self.entries))
        for entry, saved in zip(self.entries, entries, strict=True):
            entry.load(saved)
        self.steps, self._missing = int(state["steps"]), None
        self.fresh = False
        if any(group.get(TOTALS, (0,))[0] for group in groups):
            self.agree(groups)
        else:
            self.share(groups)  # a new optimizer, which may load its own checkpoint yet


def begun(optimizer: Optimizer, group: Mapping[str, Any], kind: str | None) -> Entry:
    """Begin the ledger of a group, whose kind of decay is tried out if it is not given."""
    buffers = any("momentum_buffer" in optimizer.state.get(p, ()) for p in group["params"])
    return Entry(kind or coupling(optimizer, group), held=0.0 if buffers else None)


def _triples(values: Sequence[float]) -> Any:
    """Divide (steps, taken, absorbed, held, ...) into its (taken, absorbed, held)."""
    return zip(map(int, values[1::3]), values[2::3], values[3::3], strict=True)


def _checked(state: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """Give the entries of a state, or say why they are not those of this scheduler."""
    if not {"steps", "entries"} <= set(state):
        raise ValueError(
            f"not a state of WeightDecayScheduler: expected the keys steps and entries, got "
            f"{sorted(map(str, state))}"
        )
    entries = list(state["entries"])
    if len(entries) != count:
        raise ValueError(
            f"the state has {len(entries)} ledgers, this optimizer needs {count}: one for each "
            "parameter group, or for each set of tensors that groups= chooses. Add the groups that "
            "were added in the run, then load"
        )
    return entries
