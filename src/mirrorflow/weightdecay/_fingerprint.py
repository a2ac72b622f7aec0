"""Fingerprints of schedules in plain numbers and strings, for a resumed run to compare.

A checkpoint does not hold the schedule, which the program gives. The fingerprint of a schedule of
mirrorflow is its parameters; of a function its values at some steps; of a closed loop its class.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..schedule import Schedule
from ._targets import Target
from .conventions import rate_at
from .feedback import Feedback

__all__ = ["Fingerprints", "changes", "fingerprint"]

_LAST = 1_000_000
_RATIO = 1.1  # between the steps at which a function is asked
_ROUNDING = 1e-9


class Fingerprints:
    """The fingerprints of the schedules of sets of tensors, each taken once: none may change.

    Examples
    --------
    >>> from mirrorflow import Constant
    >>> was = Fingerprints().state([Target(0, None, Constant(0.1), False)])
    >>> was
    {'schedules': [{'name': 'Constant(0.1)'}], 'follows': [0]}
    >>> Fingerprints().change(was, [Target(0, None, Constant(0.2), False)])[:51]
    "the schedule differs from the checkpoint's: Constan"
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, dict[str, Any]]] = {}  # by id, which the schedule keeps

    def state(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Return the fingerprints, and which of them each set of tensors follows."""
        for schedule in (target.schedule for target in targets):
            if id(schedule) not in self._known:
                self._known[id(schedule)] = schedule, fingerprint(schedule)
        order = list(dict.fromkeys(id(target.schedule) for target in targets))
        return {
            "schedules": [self._known[key][1] for key in order],
            "follows": [order.index(id(target.schedule)) for target in targets],
        }

    def change(self, state: Mapping[str, Any], targets: Sequence[Target]) -> str:
        """Return how the schedules differ from those of a state, as far as it knows them."""
        now = self.state(targets)
        if not isinstance(state, Mapping) or len(state.get("follows", ())) != len(targets):
            return ""  # a state without them, or of other sets, which is refused elsewhere
        was, new = ([s["schedules"][i] for i in s["follows"]] for s in (state, now))
        found = changes(was, new)
        return found and f"the schedule differs from the checkpoint's: {found}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the ids, which a copy does not have."""
        return {"_known": {}}


def fingerprint(schedule: Any) -> dict[str, Any]:
    """Return the fingerprint of a schedule.

    Parameters
    ----------
    schedule : Schedule, callable or None
        A function is asked at steps up to a million, a tenth apart; None stands where it fails.

    Returns
    -------
    dict
        ``name``, and for a function ``values``.

    Examples
    --------
    >>> from mirrorflow import SwitchOff
    >>> fingerprint(SwitchOff(0.1, at=600))
    {'name': 'SwitchOff(0.1, at=600.0)'}
    >>> fingerprint([0.3, 0.2].__getitem__)["values"][:3]
    [0.3, 0.2, None]
    """
    by_value = schedule is None or isinstance(schedule, Schedule)
    if by_value and " at 0x" not in repr(
        schedule
    ):  # an address is not a description, and never the same
        return {"name": repr(schedule)}
    if isinstance(schedule, Feedback):
        return {"name": type(schedule).__qualname__}
    name = getattr(schedule, "__qualname__", type(schedule).__qualname__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of an overflow far beyond the run
        return {"name": name, "values": [_value(schedule, step) for step in _steps()]}


def changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """Return how schedules differ from those of a checkpoint; nothing, if they do not.

    Examples
    --------
    >>> from mirrorflow import Constant
    >>> was, new = (fingerprint(s) for s in (Constant(0.1), lambda step: 0.1))
    >>> changes([was], [was])
    ''
    >>> changes([was], [fingerprint(Constant(0.2))])
    'Constant(0.1) is Constant(0.2)'
    """
    found = [_change(a, b) for a, b in zip(before, now, strict=True)]
    return "; ".join(dict.fromkeys(filter(None, found)))


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return how a schedule differs."""
    old, new = before.get("values"), now.get("values")
    if old is None or new is None or len(old) != len(new):
        same = before["name"] == now["name"] and old is new
        return "" if same else f"{before['name']} is {now['name']}"
    for step, a, b in zip(_steps(), old, new, strict=True):
        if not _equal(a, b):
            return f"{before['name']}, {_shown(a)} at step {step}, is {now['name']}, {_shown(b)}"
    return ""


def _steps() -> list[int]:
    """Return the steps at which a function is asked."""
    count = math.ceil(math.log(_LAST, _RATIO))
    return sorted({0} | {round(_RATIO**k) for k in range(count + 1)})


def _value(schedule: Any, step: int) -> float | None:
    """Return the value of a function of a user for a step that may lie outside of its domain."""
    try:
        return rate_at(schedule, step)
    except Exception:  # it may fail in any way there; that it does so is what is compared
        return None


def _equal(a: float | None, b: float | None) -> bool:
    """Return whether two values are equal, up to rounding on another machine."""
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=0.0)


def _shown(value: float | None) -> str:
    """Return a value as text."""
    return "without a value" if value is None else f"{value:g}"
