"""What schedules with feedback remember, kept in the optimizer's groups and saved with them.

A process that resumes then continues the control whatever else it has kept: frameworks save the
optimizer, and not every one saves what a callback knows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from ._ledger import TOTALS
from ._targets import Target
from .feedback import Feedback

__all__ = [
    "INITIAL",
    "MEMORY",
    "cleared",
    "followed",
    "own_decay",
    "recall",
    "remember",
    "separated",
    "shrink",
    "skipped",
    "undone_if_it_fails",
    "write",
]

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


# What is done to an optimizer from outside: its decay set, its weights shrunk.

_HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def shrink(params: list[torch.Tensor], factor: float) -> None:
    """Multiply parameters, in place.

    Examples
    --------
    >>> w = torch.ones(2)
    >>> shrink([w], 0.5)
    >>> w
    tensor([0.5000, 0.5000])
    """
    if factor == 1:
        return
    # On a CPU foreach rounds the factor to the precision of the weights: in bfloat16 0.99 is
    # 0.98828, and decay is a sixth more than it should be. mul_ computes in float32.
    half, rest = [], []
    for p in params:
        (half if p.dtype in _HALF and p.device.type == "cpu" else rest).append(p)
    for p in half:
        p.mul_(factor)
    if rest:
        torch._foreach_mul_(rest, factor)  # pyright: ignore[reportPrivateImportUsage]


def skipped(optimizer: Optimizer) -> bool:
    """Tell whether a GradScaler makes a fused optimizer skip this step.

    Other optimizers it does not call at all then.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def followed(after: Callable[[], None], args: Any, kwargs: Any) -> Any:
    """Let something follow each call of the closure of a step, if it has one.

    Parameters
    ----------
    after : callable
        What follows: the gradients are there then.
    args, kwargs : tuple and dict
        Those of ``optimizer.step``, the optimizer first.

    Returns
    -------
    None or (args, kwargs)
        As a step hook of torch returns them, with the closure replaced.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None

    def closure_and_after() -> Any:
        loss = closure()
        after()
        return loss

    return (args[0], closure_and_after), {k: v for k, v in kwargs.items() if k != "closure"}


def write(group: dict[str, Any], decay: float) -> None:
    """Set the decay of a group that has one; a tensor in place, since a graph may hold it.

    Examples
    --------
    >>> group = {"weight_decay": torch.tensor(0.1)}
    >>> write(group, 0.5)
    >>> group
    {'weight_decay': tensor(0.5000)}
    """
    if isinstance(group.get("weight_decay"), torch.Tensor):
        group["weight_decay"].fill_(decay)
    elif "weight_decay" in group:
        group["weight_decay"] = decay


# What a scheduler leaves in the groups of an optimizer, and how it is taken away again.

INITIAL = "initial_weight_decay"  # the key in a group, as LR schedulers keep initial_lr
LEFT = "own_weight_decay"  # (own, left): what a closed scheduler has replaced, and by what
_KEYS = (INITIAL, LEFT, TOTALS, MEMORY, "weight_decay")


def own_decay(group: dict[str, Any]) -> float:
    """Give a group's own decay: that of a checkpoint, from before a closed scheduler, or its own.

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
    """Give each group a tensor of its own as decay, where several share one.

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
        for key in (INITIAL, LEFT, TOTALS, MEMORY):
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
