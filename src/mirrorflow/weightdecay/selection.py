"""Which tensors of an optimizer follow which schedule."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..schedule import Schedule
from .checks import no_schedule

__all__ = [
    "Rule",
    "Target",
    "check_schedule",
    "names_of",
    "rate_at",
    "rules",
    "settled",
    "targets",
    "warn_if_unused",
]

Rule = tuple[Any, Any]
_WHAT = "an index, a regular expression of names, a module, or parameters"


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
    """Check the (what, schedule) pairs of a user; what is iterated once is kept as a list."""
    checked = []
    for pair in groups:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise TypeError(
                f"groups: expected (what, schedule) pairs, what being {_WHAT}: {pair!r}"
            )
        what, schedule = pair
        check_schedule(schedule, optional=True)
        simple = isinstance(what, (int, str, re.Pattern, torch.nn.Module, torch.Tensor))
        checked.append((what if simple else list(what), schedule))
    return tuple(checked)


def check_schedule(schedule: Any, optional: bool = False) -> None:
    """Raise unless this is a schedule, or a function of the step."""
    if isinstance(schedule, Schedule) or callable(schedule) or (optional and schedule is None):
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
        raise RuntimeError(
            f"the decay schedule {schedule!r} has no value at step {step}: if it is shorter than "
            "the run, let it keep its last value, for the step after the last too"
        ) from error
    try:
        rate = float(value)
    except TypeError as error:
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
        places = _places(what, index, group, names)
        mine = tuple(sorted(places & left))
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


def warn_if_unused(
    chosen: Sequence[Rule], groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> None:
    """Warn of a rule that chooses nothing: it may be misspelt, or wait for a later group."""
    for what, _ in chosen:
        if any(_places(what, i, group, names) or what is i for i, group in enumerate(groups)):
            continue
        shown = repr(what) if isinstance(what, (int, str, re.Pattern)) else type(what).__name__
        warnings.warn(f"groups: {shown} chooses no parameter of the optimizer yet", stacklevel=5)


def names_of(model: torch.nn.Module | None) -> dict[int, str]:
    """Name the parameters of a model by their ids."""
    return {} if model is None else {id(p): name for name, p in model.named_parameters()}


def _places(what: Any, index: int, group: Mapping[str, Any], names: Mapping[int, str]) -> set[int]:
    """Give the places of the tensors of a group that a selector chooses."""
    params = group["params"]
    if isinstance(what, int):
        return set(range(len(params))) if what == index else set()
    if isinstance(what, (str, re.Pattern)):
        return _named(re.compile(what), group, names)
    if isinstance(what, torch.nn.Module):
        what = what.parameters()
    wanted = {id(p) for p in ([what] if isinstance(what, torch.Tensor) else what)}
    return {i for i, p in enumerate(params) if id(p) in wanted}


def _named(
    pattern: re.Pattern[str], group: Mapping[str, Any], names: Mapping[int, str]
) -> set[int]:
    """Give the places of the tensors whose name, or whose group's name, has the pattern in it."""
    params = group["params"]
    if pattern.search(str(group.get("name", ""))) and "name" in group:
        return set(range(len(params)))
    own = group.get("param_names") or [names.get(id(p)) for p in params]
    if "name" not in group and any(name is None for name in own):
        raise ValueError(
            f"groups: {pattern.pattern!r} chooses by name, and not all parameters have one: give "
            "model=, make the optimizer from model.named_parameters(), or name its groups"
        )
    return {i for i, name in enumerate(own) if name is not None and pattern.search(name)}
