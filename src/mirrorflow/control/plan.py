"""Settings of a callback, from which every run starts afresh."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..weightdecay import Feedback, PerLayer
from .loop import ControlledDecay, check_settings
from .readings import Metric

__all__ = ["RunSettings"]


class RunSettings:
    """The settings of `ControlledDecay`, checked at once, for as many runs as there will be.

    Closed loops are copied for each run, so that a second one does not begin where the first has
    ended: switched off, say.

    Parameters
    ----------
    schedule : Schedule, callable, Feedback, PerLayer or None
        The rate at each optimizer step.
    schedule_for : callable int -> schedule, or None
        Instead of it: makes the schedule of a run that has so many optimizer steps.
    track_every, metric
        As for `ControlledDecay`.
    tracked : dict
        What is measured: the settings of `SpectralTracker`, and ``balance_every``.
    options : dict
        For `WeightDecayScheduler`.

    Raises
    ------
    TypeError, ValueError
        If a setting is impossible, or the schedule is missing or given twice.
    """

    def __init__(
        self,
        schedule: Any,
        schedule_for: Callable[[int], Any] | None,
        track_every: int,
        metric: Metric,
        tracked: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        if schedule_for is not None and not callable(schedule_for):
            raise TypeError(
                f"schedule_for must be a function of the number of steps, got {schedule_for!r}"
            )
        if schedule is not None and schedule_for is not None:
            raise ValueError("schedule and schedule_for must not both be given. Leave one out.")
        if schedule is None and schedule_for is None and not options.get("groups"):
            raise ValueError(
                "a schedule is missing. Give one, or schedule_for=lambda total: ..., or groups="
            )
        options = check_settings(
            schedule,
            track_every,
            metric,
            tracked["level"],
            tracked["match"],
            options,
            tracked["balance_every"],
        )
        self.schedule, self.schedule_for, self._options = schedule, schedule_for, options
        self._settings = {"track_every": track_every, "metric": metric, **tracked}

    def begin(self, model: torch.nn.Module, optimizer: Any, total: float) -> ControlledDecay:
        """Take the optimizer of a run over, which will have so many steps in all."""
        schedule: Any = self.schedule
        memo: dict[int, Any] = {}
        if self.schedule_for is not None:
            schedule = self.schedule_for(_length(total))
        groups = [(what, _fresh(of_group, memo)) for what, of_group in self._options["groups"]]
        options: dict[str, Any] = self._settings | self._options | {"groups": groups}
        control = ControlledDecay(model, optimizer, _fresh(schedule, memo), **options)
        if control.answers and 0 < total < control.track_every:  # -1 or inf: without an end
            warnings.warn(
                f"track_every={control.track_every} exceeds the run's {total:g} steps: closed-loop "
                "schedules only see the initial measurement",
                stacklevel=3,
            )
        return control


def _fresh(schedule: Any, memo: dict[int, Any]) -> Any:
    """Copy a closed loop, which changes; the same one to the same copy."""
    closed = isinstance(schedule, (Feedback, PerLayer))
    return copy.deepcopy(schedule, memo) if closed else schedule


def _length(total: float) -> int:
    """Return the number of steps of a run, if it has one."""
    if not (math.isfinite(total) and total > 0):
        raise ValueError(
            "schedule_for needs the number of steps, and the end of this run is unknown. Set "
            "max_steps, or give a schedule."
        )
    return int(total)
