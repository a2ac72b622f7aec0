"""What schedules with feedback remember, kept in the optimizer's groups and saved with them.

A process that resumes then continues the control whatever else it has kept: frameworks save the
optimizer, and not every one saves what a callback knows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from .feedback import Feedback
from .selection import Target

__all__ = ["MEMORY", "recall", "remember"]

MEMORY = "weight_decay_feedback"  # the key in a group: one tuple for each loop in it


def remember(targets: Sequence[Target], groups: Sequence[dict[str, Any]]) -> None:
    """Write what the loops remember to the groups that they act on."""
    for index, loops in _loops(targets).items():
        groups[index][MEMORY] = tuple(loop.memory() for loop in loops)


def recall(
    targets: Sequence[Target], groups: Sequence[Mapping[str, Any]], only_try: bool = False
) -> None:
    """Give the loops back what the loaded groups know of them.

    Parameters
    ----------
    targets : sequence of Target
        Whose schedules may be loops.
    groups : sequence of mapping
        Those of the optimizer, or of a checkpoint that it may load.
    only_try : bool
        Whether only copies of the loops take it back, to see that they can.

    Raises
    ------
    ValueError
        If they were written by other loops.
    """
    for index, loops in _loops(targets).items():
        known = groups[index].get(MEMORY, ())
        if known and len(known) != len(loops):
            raise ValueError(
                f"the optimizer's checkpoint holds the state of {len(known)} closed loops in group "
                f"{index}, this scheduler has {len(loops)} there: make it with the same schedules, "
                f"or remove the key {MEMORY!r} from the param_groups of the checkpoint"
            )
        for loop, memory in zip(loops, known, strict=False):  # none, if the checkpoint has none
            (copy.copy(loop) if only_try else loop).recall(memory)


def _loops(targets: Sequence[Target]) -> dict[int, list[Feedback]]:
    """Give the loops that act on each group, in the order of its sets of tensors."""
    found: dict[int, list[Feedback]] = {}
    for target in targets:
        if isinstance(target.schedule, Feedback):
            found.setdefault(target.group, []).append(target.schedule)
    return found
