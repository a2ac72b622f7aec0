"""What the settings of a controlled run have to be, checked before anything begins."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from ..spectrum.pairs import checked
from ..spectrum.records import COLUMNS
from ..weightdecay import Feedback, OffAtBudget, PerLayer, WeightDecayScheduler
from ..weightdecay._checks import one_of
from ..weightdecay._targets import check_schedule, rules
from ..weightdecay.coupling import KINDS
from ..weightdecay.units import CONVENTIONS

__all__ = ["check_settings"]


def check_settings(
    schedule: Any, track_every: Any, metric: Any, level: str, match: str | None, options: Any
) -> dict[str, Any]:
    """Raise unless the settings are possible; give the options, the rules of groups as a tuple.

    Raises
    ------
    TypeError, ValueError
        If one is not, with its name; also if a loop would never be fed.
    """
    if not isinstance(schedule, PerLayer):
        check_schedule(schedule, optional=True)
    if isinstance(track_every, bool) or not isinstance(track_every, int) or track_every < 0:
        raise ValueError(f"track_every must be an integer >= 0, got {track_every!r}")
    checked(level)
    _check_match(match)
    if not callable(metric) and metric not in COLUMNS:
        raise ValueError(
            f"metric must be one of {', '.join(COLUMNS)}, or a function of the Measurement, "
            f"got {metric!r}"
        )
    options = _checked(options)
    for loop in (schedule, *(of_group for _, of_group in options["groups"])):
        measured = isinstance(loop, (Feedback, PerLayer)) and not isinstance(loop, OffAtBudget)
        if measured and not track_every:
            raise ValueError(f"{type(loop).__name__} needs track_every > 0: it is fed by measuring")
    return options


def _check_match(match: str | None) -> None:
    """Raise unless it is a regular expression."""
    try:
        re.compile(match or "")
    except (re.error, TypeError) as error:
        raise ValueError(f"match must be a regular expression, got {match!r}: {error}") from error


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options for `WeightDecayScheduler`."""
    known = list(inspect.signature(WeightDecayScheduler).parameters)
    known = [name for name in known if name not in ("optimizer", "schedule", "model")]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(
            f"unknown option {', '.join(map(repr, unknown))}: beside track_every, metric, "
            "level, match, pairs, values and frozen there are those of WeightDecayScheduler: "
            f"{', '.join(known)}"
        )
    if options.get("convention") is not None:
        one_of("convention", options["convention"], CONVENTIONS)
    if options.get("coupling") is not None:
        one_of("coupling", options["coupling"], KINDS)
    return {**options, "groups": rules(options.get("groups", ()))}
