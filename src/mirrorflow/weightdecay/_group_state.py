"""The state of a scheduler in the optimizer's groups, which save and load it with their own.

A process that resumes then continues the control whatever else it has kept: frameworks save the
optimizer, and not every one saves what a callback knows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from ._ledger import TENSORS, TOTALS
from .feedback import Feedback

__all__ = [
    "INITIAL",
    "MEMORY",
    "cleared",
    "own_decay",
    "recall",
    "separated",
    "undone_if_it_fails",
]

MEMORY = "weight_decay_feedback"  # the key in a group: one tuple for each loop in it


def recall(
    by_group: Mapping[int, Sequence[Feedback]],
    groups: Sequence[Mapping[str, Any]],
    only_try: bool = False,
) -> None:
    """Restore the loops from what the loaded groups know of them.

    Parameters
    ----------
    by_group : mapping of int to loops
        The loops that act on each group, in the order of its sets of tensors.
    groups : sequence of mapping
        Those of the optimizer, or of a checkpoint that it may load.
    only_try : bool
        Whether only copies of the loops take it back, to see that they can.

    Raises
    ------
    ValueError
        If they were written by other loops.
    """
    for index, loops in by_group.items():
        known = groups[index].get(MEMORY, ())
        if known and len(known) != len(loops):
            raise ValueError(
                f"the optimizer's checkpoint holds the state of {len(known)} closed loops in group "
                f"{index}, this scheduler has {len(loops)} there: make it with the same schedules, "
                f"or remove the key {MEMORY!r} from the param_groups of the checkpoint"
            )
        for loop, memory in zip(loops, known, strict=False):  # none, if the checkpoint has none
            (copy.copy(loop) if only_try else loop).recall(memory)


# What a scheduler leaves in the groups of an optimizer, and how it is taken away again.

INITIAL = "initial_weight_decay"  # the key in a group, as LR schedulers keep initial_lr
LEFT = "own_weight_decay"  # (own, left): what a closed scheduler has replaced, and by what
_KEYS = (INITIAL, LEFT, TOTALS, TENSORS, MEMORY, "weight_decay")


def own_decay(group: dict[str, Any]) -> float:
    """Return a group's own decay: the checkpoint's, from before a closed scheduler, or its own.

    Examples
    --------
    >>> own_decay({"weight_decay": 0.0, "initial_weight_decay": 0.1})
    0.1

    A closed scheduler has left 0 where 0.1 was; who sets something else then has chosen anew:

    >>> left = (0.1, 0.0)
    >>> [own_decay({"weight_decay": d, "own_weight_decay": left}) for d in (0.0, 0.4)]
    [0.1, 0.4]
    """
    if INITIAL in group:
        return float(group[INITIAL])
    now = float(group.get("weight_decay", 0.0))
    own, left = group.get(LEFT, (now, now))
    return own if left == now else now


def separated(groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Make each group's decay a tensor of its own, where several share one.

    torch puts the same tensor into every group and into the defaults of groups to come: filled
    for one of them, it would change all. The first keeps it, since a graph may hold it.

    Examples
    --------
    >>> shared = torch.tensor(0.5)
    >>> groups = [{"weight_decay": shared}, {"weight_decay": shared}]
    >>> separated(groups, {"weight_decay": shared})
    >>> groups[0]["weight_decay"] is shared, groups[1]["weight_decay"] is shared
    (True, False)
    """
    seen: set[int] = set()
    for group in (*groups, defaults):
        decay = group.get("weight_decay")
        if isinstance(decay, torch.Tensor) and id(decay) in seen:
            group["weight_decay"] = decay.clone()
        seen.add(id(decay))


def cleared(groups: list[dict[str, Any]]) -> None:
    """Take the scheduler's keys away; where its decay stays, note what was there before it."""
    for group in groups:
        own, now = own_decay(group), float(group.get("weight_decay", 0.0))
        for key in (INITIAL, LEFT, TOTALS, TENSORS, MEMORY):
            group.pop(key, None)
        if own != now and "weight_decay" in group:
            group[LEFT] = (own, now)


@contextmanager
def undone_if_it_fails(optimizer: Optimizer) -> Iterator[None]:
    """Leave the groups as they were, unless the block ends well."""
    groups = [*optimizer.param_groups, optimizer.defaults]
    before = [{key: _kept(group[key]) for key in _KEYS if key in group} for group in groups]
    try:
        yield
    except BaseException:
        for group, kept in zip(groups, before, strict=True):
            _put_back(group, kept)
        raise


def _kept(value: Any) -> tuple[Any, Any]:
    """Keep an object, and what is in it if it can be filled."""
    return value, value.clone() if isinstance(value, torch.Tensor) else None


def _put_back(group: dict[str, Any], kept: Mapping[str, tuple[Any, Any]]) -> None:
    """Put back what `_kept` kept."""
    for key in _KEYS:
        group.pop(key, None)
    for key, (value, content) in kept.items():
        group[key] = value if content is None else value.copy_(content)
