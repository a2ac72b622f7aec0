"""Schedules as plain values, for configuration files, and back."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from . import combinators, schedules
from .combinators import Joined
from .schedules import Schedule, finite

__all__ = ["schedule_from_dict", "schedule_to_dict"]


def schedule_to_dict(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as plain values, for JSON or YAML; `schedule_from_dict` makes it again.

    Raises
    ------
    TypeError
        If it is not one of this module.

    Examples
    --------
    >>> from mirrorflow import SwitchOff
    >>> schedule_to_dict(SwitchOff(0.1, at=600))
    {'kind': 'SwitchOff', 'rate': 0.1, 'at': 600.0}
    """
    makers = _makers()
    kind = next((name for name, cls in _classes().items() if type(schedule) is cls), None)
    if kind is None:
        raise TypeError(f"schedule must be one of {', '.join(makers)}, got {schedule!r}")
    names = inspect.signature(makers[kind]).parameters
    given: Any = schedule  # a dataclass, which the abstract class does not say
    values = (_plain(getattr(given, field.name)) for field in fields(given))
    return {"kind": kind, **dict(zip(names, values, strict=True))}


def _plain(value: Any) -> Any:
    """Return a parameter of a schedule as plain values."""
    if isinstance(value, Schedule):
        return schedule_to_dict(value)
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def schedule_from_dict(mapping: Mapping[str, Any]) -> Schedule:
    """Make a schedule from plain values, as a JSON or YAML file holds them.

    Parameters
    ----------
    mapping : mapping
        ``kind``, the name of the schedule, and its parameters by name; of a join ``schedules``, a
        list of such mappings, and ``starts``, the times at which they begin, the first 0.

    Raises
    ------
    ValueError
        If the kind or a parameter is not known, missing or not possible; what is known is named.

    Examples
    --------
    >>> schedule_from_dict({"kind": "SwitchOff", "rate": 0.1, "at": 600})
    SwitchOff(0.1, at=600.0)
    """
    makers = _makers()
    kind = mapping.get("kind") if isinstance(mapping, Mapping) else None
    if not isinstance(kind, str) or kind not in makers:
        raise ValueError(
            f"schedule must be a mapping whose kind is one of {', '.join(makers)}, got "
            f"{reprlib.repr(mapping)}"
        )
    given = {name: value for name, value in mapping.items() if name != "kind"}
    needed = list(inspect.signature(makers[kind]).parameters)
    if set(given) != set(needed):
        raise ValueError(
            f"{kind}: the fields must be {' and '.join(needed)}, got "
            f"{' and '.join(map(str, given)) or 'none'}"
        )
    try:
        return makers[kind](**{name: _made(value) for name, value in given.items()})
    except (TypeError, OverflowError, RecursionError) as error:
        nested = isinstance(error, RecursionError)
        reason = "it is nested too deeply" if nested else f"a field has another type: {error}"
        raise ValueError(f"{kind}: {reason}") from error


def _made(value: Any) -> Any:
    """Return a parameter, made if it is a schedule as plain values."""
    return schedule_from_dict(value) if isinstance(value, Mapping) else value


def _classes() -> dict[str, type[Schedule]]:
    """Return the schedules of this package by the names that they have in a file.

    They are what the modules define, so that a new one needs no entry here.
    """
    found = [cls for module in (schedules, combinators) for cls in vars(module).values()]
    kinds = [cls for cls in found if isinstance(cls, type) and issubclass(cls, Schedule)]
    return {"join" if cls is Joined else cls.__name__: cls for cls in kinds if cls is not Schedule}


def _makers() -> dict[str, Callable[..., Schedule]]:
    """Return what makes each schedule from plain values."""
    return {**_classes(), "join": _joined}


def _joined(schedules: Sequence[Any], starts: Sequence[Any]) -> Joined:
    """Make a join, of the times at which its parts begin: durations would be rounded."""
    times = tuple(finite("join: starts", start) for start in starts)
    ascending = all(a < b for a, b in pairwise(times))
    if not times or times[0] != 0 or not ascending or len(times) != len(schedules):
        raise ValueError(
            f"join: starts must ascend from 0, one for each of the {len(schedules)} schedules, "
            f"got {reprlib.repr(starts)}"
        )
    return Joined(tuple(map(schedule_from_dict, schedules)), times)
