"""Schedules as plain values, for configuration files, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .combinators import Cyclic, Joined
from .schedules import Constant, Cosine, Linear, Piecewise, Schedule, SwitchOff, finite

__all__ = ["schedule_from_dict", "schedule_to_dict"]


def schedule_to_dict(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as plain values, for JSON or YAML; `schedule_from_dict` makes it again.

    Raises
    ------
    TypeError
        If it is not one of this module.

    Examples
    --------
    >>> schedule_to_dict(SwitchOff(0.1, at=600))
    {'kind': 'SwitchOff', 'rate': 0.1, 'at': 600.0}
    """
    kind = type(schedule).__name__
    if kind not in _makers() and not isinstance(schedule, Joined):
        raise TypeError(f"schedule must be one of {', '.join(_makers())}, got {schedule!r}")
    match schedule:
        case Constant(level=rate):
            return {"kind": kind, "rate": rate}
        case SwitchOff(level=rate, at=at):
            return {"kind": kind, "rate": rate, "at": at}
        case Piecewise(times=times, rates=rates):
            return {"kind": kind, "times": list(times), "rates": list(rates)}
        case Linear(start, end, duration) | Cosine(start, end, duration):
            return {"kind": kind, "start": start, "end": end, "duration": duration}
        case Joined(schedules, starts):
            parts = [schedule_to_dict(part) for part in schedules]
            return {"kind": "join", "schedules": parts, "starts": list(starts)}
        case Cyclic(inner, period, cycles):
            again = schedule_to_dict(inner)
            return {"kind": kind, "schedule": again, "period": period, "cycles": cycles}
    raise TypeError(f"schedule must be of this package, got {schedule!r} of the same name")


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
            f"schedule must be a mapping whose kind is one of {', '.join(makers)}, got {mapping!r}"
        )
    fields = {name: value for name, value in mapping.items() if name != "kind"}
    needed = list(inspect.signature(makers[kind]).parameters)
    if set(fields) != set(needed):
        raise ValueError(
            f"{kind}: the fields must be {' and '.join(needed)}, got "
            f"{' and '.join(map(str, fields)) or 'none'}"
        )
    return makers[kind](**fields)


def _makers() -> dict[Any, Callable[..., Schedule]]:
    """Return the function that makes each kind of schedule from plain values."""
    return {
        "Constant": Constant,
        "SwitchOff": SwitchOff,
        "Piecewise": Piecewise,
        "Linear": Linear,
        "Cosine": Cosine,
        "join": _joined,
        "Cyclic": _cyclic,
    }


def _joined(schedules: Sequence[Any], starts: Sequence[Any]) -> Joined:
    """Make a join, of the times at which its parts begin: durations would be rounded."""
    times = tuple(finite("join: starts", start) for start in starts)
    ascending = all(a < b for a, b in pairwise(times))
    if not times or times[0] != 0 or not ascending or len(times) != len(schedules):
        raise ValueError(
            f"join: starts must ascend from 0, one for each of the {len(schedules)} schedules, "
            f"got {starts!r}"
        )
    return Joined(tuple(map(schedule_from_dict, schedules)), times)


def _cyclic(schedule: Any, period: float, cycles: int) -> Cyclic:
    """Make a cyclic schedule."""
    return Cyclic(schedule_from_dict(schedule), period, cycles)
