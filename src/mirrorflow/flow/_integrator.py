"""The loop over the steps of an integrator: breakpoints, saved times, and failure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.integrate import DOP853, LSODA

from .._solution import Status
from ..legendre import RangeError
from ..schedule import Schedule
from ._views import Array, Coordinates

__all__ = ["SMALLEST_ATOL", "Integration"]

SMALLEST_ATOL = 1e-140  # solvers square velocity / atol: below it, a start at 0 overflows
SMALLEST_RTOL = 100 * float(np.finfo(np.float64).eps)  # solvers take no smaller one
INSIDE = (0.25, 0.5, 0.75)  # parts of a step at which `fine` states are kept as well
STUCK = 30  # steps in a row that time hardly resolves: x goes to infinity there


class Integration:
    """One integration: it owns the steps, the breakpoints, and the decision what is a failure."""

    def __init__(
        self,
        coordinates: Coordinates,
        schedule: Schedule,
        t_end: float,
        tolerances: tuple[float, float | None],
        method: str,
        max_steps: int,
        save_at: Array | None,
        fine: bool = False,
    ) -> None:
        self.coordinates, self.schedule, self.save_at = coordinates, schedule, save_at
        self.rtol, atol = tolerances
        lowest = float(np.min(schedule.accumulated(np.linspace(0, t_end, 101))))
        derived = np.maximum(1e-2 * self.rtol * coordinates.scales(lowest), SMALLEST_ATOL)
        self.faint = atol is None and self._faint(lowest, t_end)
        self.atol = derived if atol is None else atol
        self.method, self.max_steps, self.steps, self.evaluations = method, max_steps, 0, 0
        inner = [b for b in schedule.breakpoints if 0 < b < t_end]
        self.edges = [0.0, *inner, float(t_end)]
        self.now, self.state, self.latest = 0.0, coordinates.start(), 0.0
        self.t: list[float] = []
        self.y: list[Array] = []
        # What is integrated over the path needs it between the steps, which are long.
        self.fine: list[tuple[float, Array]] | None = [] if fine else None

    def _faint(self, lowest: float, t_end: float) -> bool:
        """Return whether what has decayed below the tolerance may come back, when decay is less."""
        rates = self.schedule.rate(np.linspace(0, t_end, 101))
        size = self.coordinates.scales(lowest / 2).min()  # e^a for weight decay
        return bool(rates[-1] < rates.max() and 1e-2 * self.rtol * size < SMALLEST_ATOL)

    def rows(self) -> tuple[Array, Array]:
        """Return the saved times and states."""
        return np.array(self.t), np.array(self.y)

    def fine_rows(self) -> tuple[Array, Array]:
        """Return times and states within every step, those of `rows` among them."""
        kept = [(t, y) for t, y in self.fine or [] if t <= self.now]
        return np.array([t for t, _ in kept]), np.array([y for _, y in kept])

    def integrate(self) -> Status:
        """Integrate piece by piece between the breakpoints; a status, never a traceback."""
        self._save(None)
        status = Status.completed
        with np.errstate(all="ignore"), warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="lsoda: ")  # its status is read instead
            for left, right in pairwise(self.edges):
                status = self._piece(left, right)
                if not status.ok:
                    break
            if not self._inside(self.now, self.state):
                status = Status.left_domain if status.ok else status
            if not status.ok:
                self._keep_what_is_good()
        return status

    def _keep_what_is_good(self) -> None:
        """End the path with the last state in the domain: LSODA does not look at where it ends."""
        if self.t[-1:] != [self.now]:
            self._append(self.now, self.state)
        while len(self.t) > 1 and not self._inside(self.t[-1], self.y[-1]):
            self.t.pop()
            self.y.pop()
        self.now, self.state = self.t[-1], self.y[-1]

    def _inside(self, t: float, y: Array) -> bool:
        """Return whether the flow can go on from a state."""
        try:
            return bool(np.isfinite(self._velocity(t, np.inf)(t, y)).all())
        except RangeError:
            return False

    def _piece(self, left: float, right: float) -> Status:
        """Integrate to the next breakpoint; a step that left the domain is tried again, smaller."""
        status, first = self._attempt(left, right, None), np.inf
        while status in (Status.diverged, Status.left_domain):
            first = min(first, min(self.latest, right) - self.now) / 10
            if not first > 16 * np.spacing(right):
                break
            before = self.now
            status = self._attempt(left, right, first)
            first = first if self.now == before else np.inf
        return status

    def _attempt(self, left: float, right: float, first: float | None) -> Status:
        """Integrate from here to the end of the piece, or to the first step that fails."""
        velocity, stuck = self._velocity(left, right), 0
        self.latest = self.now
        try:
            if not np.isfinite(velocity(self.now, self.state)).all():
                return Status.diverged
            solver = self._solver(velocity, right, first)
            while solver.status == "running":
                if self.steps >= self.max_steps:
                    return Status.max_steps
                self.steps += 1
                solver.step()
                if solver.status == "failed" or not np.isfinite(solver.y).all():
                    return Status.diverged
                stuck = stuck + 1 if solver.t - self.now < 64 * np.spacing(solver.t) else 0
                self.now, self.state = float(solver.t), solver.y.copy()
                self._save(solver)
                if stuck > STUCK and self.now < right:
                    return Status.diverged
        except RangeError:
            return Status.left_domain
        return Status.completed

    def _solver(self, velocity: Callable[[float, Array], Array], right: float, first: Any) -> Any:
        """Start SciPy's integrator at the last good state."""
        # DOP853 controls the mean square over all entries: one problem might take the error of m.
        share = math.sqrt(self.coordinates.problems) if self.method == "DOP853" else 1.0
        rtol, atol = max(self.rtol / share, SMALLEST_RTOL), self.atol / share
        common = {"rtol": rtol, "atol": atol, "first_step": first}
        if self.method == "DOP853":
            return DOP853(velocity, self.now, self.state, right, **common)
        jacobian, band = self.coordinates.jacobian(self.schedule), self.coordinates.band
        own = {"jac": jacobian, "lband": band, "uband": band}
        return LSODA(velocity, self.now, self.state, right, **common, **own)

    def _velocity(self, left: float, right: float) -> Callable[[float, Array], Array]:
        """Return the right-hand side on one piece, where the schedule is smooth."""
        inside = float(np.nextafter(right, left))

        def velocity(t: float, y: Array) -> Array:
            self.evaluations += 1
            self.latest = max(self.latest, t)
            if not math.isfinite(y @ y):  # the cheapest test; 1e154 is as good as infinite
                return np.full_like(y, np.nan)
            now = float(min(max(t, left), inside))  # solvers look past the end: stay on this piece
            return self.coordinates.velocity(now, y, self.schedule)

        return velocity

    def _save(self, solver: Any) -> None:
        """Keep this state, or those at the times that were asked for since the last."""
        if self.fine is not None:
            self._save_fine(solver)
        if self.save_at is None:
            return self._append(self.now, self.state)
        until = int(np.searchsorted(self.save_at, self.now, side="right"))
        dense = solver.dense_output() if solver and until > len(self.t) else None
        for t in self.save_at[len(self.t) : until]:
            self._append(t, self.state if dense is None or t == self.now else dense(t))

    def _save_fine(self, solver: Any) -> None:
        """Keep this state, some within the last step, and those that were asked for in it."""
        assert self.fine is not None
        if solver:
            dense, length = solver.dense_output(), self.now - solver.t_old
            asked = [] if self.save_at is None else self.save_at.tolist()
            inside = {t for t in asked if solver.t_old < t < self.now}
            inside |= {solver.t_old + part * length for part in INSIDE}
            self.fine += [(t, dense(t)) for t in sorted(inside)]
        self.fine.append((self.now, self.state))

    def _append(self, t: float, y: Array) -> None:
        self.t.append(float(t))
        self.y.append(y)
