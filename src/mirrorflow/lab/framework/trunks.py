"""Training runs that share their beginnings: where they part, and the states stored there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .storage import replacing

__all__ = ["Checkpoints", "Timeline", "branch_points", "steps_saved"]


@dataclass(frozen=True)
class Timeline:
    """What a training run does, step by step: two runs are the same for as long as these are.

    Attributes
    ----------
    shared : dict
        All that decides the run besides the decay (model, data, seed, learning rate), as JSON.
    rates : array, (steps,) or (steps, k)
        The decay that acts in each step.
    """

    shared: Mapping[str, Any]
    rates: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Refuse rates that are not finite float64 numbers."""
        if self.rates.dtype != np.float64 or not np.isfinite(self.rates).all():
            raise ValueError("the rates of a timeline must be finite float64 numbers")

    @property
    def steps(self) -> int:
        """The length of the run."""
        return len(self.rates)

    def key(self, step: int) -> str:
        """Name the state after ``step`` steps: the same for every run that passes through it."""
        if not 0 <= step <= self.steps:
            raise ValueError(f"step {step} is outside of a run of {self.steps} steps")
        digest = hashlib.sha256(json.dumps(self.shared, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.rates[:step]).tobytes())
        return digest.hexdigest()[:16]

    def common(self, other: Timeline) -> int:
        """Count the steps in which two runs are the same."""
        length = min(self.steps, other.steps)
        if self.shared != other.shared or self.rates.shape[1:] != other.rates.shape[1:]:
            return 0
        differs = (self.rates[:length] != other.rates[:length]).reshape(length, -1).any(axis=1)
        return int(differs.argmax()) if differs.any() else length


def branch_points(timelines: Mapping[str, Timeline]) -> dict[str, tuple[int, ...]]:
    """Return the steps at which each run must be stored, because another one goes on from there."""
    found: dict[str, set[int]] = {name: set() for name in timelines}
    for (one, left), (two, right) in combinations(timelines.items(), 2):
        if step := left.common(right):
            found[one].add(step)
            found[two].add(step)
    return {name: tuple(sorted(steps)) for name, steps in found.items()}


def steps_saved(timelines: Mapping[str, Timeline]) -> tuple[int, int]:
    """Count the steps of all runs one by one, and those that remain when beginnings are shared."""
    runs = list(timelines.values())
    alone = sum(run.steps for run in runs)
    # Each run adds what no earlier one has trained: all beyond its longest common beginning.
    shared = sum(
        run.steps - max((run.common(earlier) for earlier in runs[:i]), default=0)
        for i, run in enumerate(runs)
    )
    return alone, shared


class Checkpoints:
    """States of training runs in a folder, found by what led to them.

    A state is whatever ``torch.save`` writes and ``torch.load(weights_only=True)`` reads. A file is
    written under a temporary name, synced, and renamed: a kill leaves no half of one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, timeline: Timeline, step: int, state: Any) -> Path:
        """Store the state of a run after ``step`` steps, unless it is stored."""
        import torch

        path = self._path(timeline, step)
        if path.exists():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            try:
                torch.save(state, stream)
            except RuntimeError as error:  # torch's writer hides what the disk has said
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        return path

    def latest(self, timeline: Timeline, until: int | None = None) -> tuple[int, Any]:
        """Read the last stored state on the way of a run: (step, state), or (0, None)."""
        import torch

        last = timeline.steps if until is None else until
        for step in sorted((s for s in self._steps() if 0 < s <= last), reverse=True):
            if (path := self._path(timeline, step)).exists():
                return step, torch.load(path, weights_only=True)
        return 0, None

    def has(self, timeline: Timeline, step: int) -> bool:
        """Whether the state of a run after ``step`` steps is stored."""
        return self._path(timeline, step).exists()

    def drop(self, timeline: Timeline, step: int) -> None:
        """Remove the state of a run after ``step`` steps, if it is stored."""
        self._path(timeline, step).unlink(missing_ok=True)

    def _path(self, timeline: Timeline, step: int) -> Path:
        return self.folder / f"{step}-{timeline.key(step)}.pt"

    def _steps(self) -> set[int]:
        """Return the steps at which any run has a stored state."""
        return {int(path.name.split("-")[0]) for path in self.folder.glob("[0-9]*-*.pt")}
