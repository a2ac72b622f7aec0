"""Which tensors of an optimizer follow which schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..schedule import Schedule
from .checks import no_schedule
from .choosing import WHAT, checked, cleaned, parameter_names, places

__all__ = [
    "NoValueError",
    "Rule",
    "Target",
    "check_schedule",
    "labels",
    "rate_at",
    "rules",
    "settled",
    "targets",
]

Rule = tuple[Any, Any]


class NoValueError(RuntimeError):
    """A schedule has no value at a step, because it is shorter than the run."""


@dataclass(frozen=True)
class Target:
    """A group, or some of the tensors in it, with the schedule of their decay.

    Parameters
    ----------
    group : int
        The index of the group.
    positions : tuple of int or None
        The places of the tensors within the group; None for all of them.
    schedule : Schedule, callable or None
        None leaves the decay that the group has.
    asked : bool
        Whether a rule chose it, so that it is scheduled even if its own decay is 0.
    """

    group: int
    positions: tuple[int, ...] | None
    schedule: Any
    asked: bool

    def params(self, group: Mapping[str, Any]) -> list[torch.Tensor]:
        """Give the tensors, from the live group."""
        params = group["params"]
        return params if self.positions is None else [params[i] for i in self.positions]


def rules(groups: Iterable[Rule]) -> tuple[Rule, ...]:
    """Check the (what, schedule) pairs of a user.

    Raises
    ------
    TypeError, ValueError
        If they are no pairs, or a pair does not say what or how.
    """
    if isinstance(groups, (Mapping, str)) or not isinstance(groups, Iterable):
        raise TypeError(
            f"groups: expected a list of (what, schedule) pairs, got {groups!r}"
            + (": give list(groups.items())" if isinstance(groups, Mapping) else "")
        )
    found = []
    for pair in groups:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise TypeError(f"groups: expected (what, schedule) pairs, what being {WHAT}: {pair!r}")
        what, schedule = pair
        check_schedule(schedule, optional=True)
        found.append((checked(what), schedule))
    return tuple(found)


def check_schedule(schedule: Any, optional: bool = False) -> None:
    """Raise unless this is a schedule, or a function of the step."""
    known = isinstance(schedule, Schedule) or callable(schedule)
    if (known and not isinstance(schedule, type)) or (optional and schedule is None):
        return
    raise TypeError(no_schedule(schedule))


def rate_at(schedule: Any, step: int) -> float:
    """Evaluate a schedule at an optimizer step, as a Python float that is >= 0 and finite.

    Examples
    --------
    >>> from mirrorflow import SwitchOff
    >>> rate_at(SwitchOff(0.1, at=10), 9), rate_at(lambda step: 1 / (step + 1), 3)
    (0.1, 0.25)
    """
    try:
        value = schedule.rate(float(step)) if isinstance(schedule, Schedule) else schedule(step)
    except (LookupError, StopIteration) as error:  # a list, table or iterator that has ended
        raise NoValueError(
            f"the decay schedule {schedule!r} has no value at step {step}: if it is shorter than "
            "the run, let it keep its last value"
        ) from error
    try:
        rate = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # of a string, or of several elements
        raise TypeError(
            f"the decay schedule {schedule!r} gives {value!r} at step {step}: a weight decay is a "
            "number"
        ) from error
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(
            f"the decay schedule {schedule!r} gives {rate} at step {step}: "
            "a weight decay is a finite number >= 0"
        )
    return rate


def targets(
    index: int,
    group: Mapping[str, Any],
    chosen: Sequence[Rule],
    default: Any,
    names: Mapping[int, str],
    per_tensor: bool,
) -> list[Target]:
    """Divide a group by the first rule that chooses each tensor.

    Parameters
    ----------
    index : int
        The place of the group in the optimizer.
    group : mapping
        The live group.
    chosen : sequence of (what, schedule)
        The rules, the first that fits counts.
    default : Schedule, callable or None
        For what no rule chooses.
    names : mapping of id to str
        Names of parameters beyond those in the group.
    per_tensor : bool
        Whether a rule may choose a part of the group.

    Raises
    ------
    ValueError
        If a rule chooses a part of the group, and decay cannot differ within it.
    """
    left = set(range(len(group["params"])))
    found = []
    for what, schedule in chosen:
        mine = tuple(sorted(places(what, index, group, names) & left))
        if mine or (what == index and isinstance(what, int)):
            left -= set(mine)
            found.append(Target(index, mine, schedule, asked=True))
    if left or not found:
        found.append(Target(index, tuple(sorted(left)), default, asked=False))
    if len(found) == 1:
        return [replace(found[0], positions=None)]
    if not per_tensor:
        raise ValueError(
            f"a rule of groups= chooses {len(found[0].positions or ())} of the "
            f"{len(group['params'])} tensors of parameter group {index}, which has one "
            "weight_decay: split the group when making the optimizer, or use decoupled=True, "
            "which decays tensor by tensor"
        )
    return found


def settled(target: Target, group: Mapping[str, Any], own: float, relative: bool) -> Target:
    """Leave a group without decay alone, unless a rule asks for it.

    Raises
    ------
    ValueError
        If the group's own decay, which is 0, was to be multiplied.
    """
    if own != 0 or target.schedule is None or ("weight_decay" not in group and not relative):
        return target
    if not target.asked:
        return replace(target, schedule=None)
    if relative:
        raise ValueError(
            f"relative=True multiplies the decay of group {target.group}, which is 0: "
            "give the group a weight_decay > 0, or use relative=False"
        )
    return target


def labels(
    divided: Sequence[Target], group: Mapping[str, Any], names: Mapping[int, str]
) -> list[str]:
    """Name the sets of tensors that a group is divided into.

    Returns
    -------
    list of str
        The group's name or index for all of it; for a part, in brackets, its parameter, the module
        of its parameters, or their first and how many there are; places where there are no names.

    Examples
    --------
    >>> group = {"params": [torch.ones(1)] * 4,
    ...          "param_names": ["a.q", "a.k", "module.b.weight", "c.weight"]}
    >>> parts = [Target(0, (0, 1), None, True), Target(0, (2,), None, True),
    ...          Target(0, (3,), None, False)]
    >>> labels(parts, group, {})
    ['0[a]', '0[b.weight]', '0[c.weight]']
    """
    name = str(group.get("name", divided[0].group))
    if len(divided) == 1 and divided[0].positions is None:
        return [name]
    known = parameter_names(group, names)
    parts = [[known[i] for i in t.positions or ()] for t in divided]
    if any(one is None for part in parts for one in part):
        return [f"{name}[{','.join(map(str, t.positions or ()))}]" for t in divided]
    cleaner = [[cleaned(str(one)) for one in part] for part in parts]
    modules = [_module(p) if t.asked else "" for t, p in zip(divided, cleaner, strict=True)]
    unique = [m if modules.count(m) == 1 else "" for m in modules]
    return [f"{name}[{m or _listed(p)}]" for m, p in zip(unique, cleaner, strict=True)]


def _module(names: Sequence[str]) -> str:
    """Give the innermost module that several parameters lie in; the name of a single one."""
    if len(names) == 1:
        return names[0]
    common: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _listed(names: Sequence[str]) -> str:
    """Give the first of several names, which no other set has, and the number of the others."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)
