"""Results of solvers: a value, the reason for stopping, and measurements on the way."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Path", "Solution", "Status"]


class Status(enum.Enum):
    """Why a solver stopped; the value of a member is the message a user reads."""

    converged = "converged to the requested tolerance"
    completed = "ran to the end of the requested time"
    vertex = "reached the L1 vertex: a smaller A changes x by less than the tolerance"
    surrogate = (
        "this minimizes R_a subject to the measurements, but training ends elsewhere: sensing "
        "matrices that do not commute, or steps by the signs of gradients"
    )
    inconsistent = "no x in the domain of R_a satisfies Zx = y: see stats.residual"
    max_steps = "stopped at the step limit before reaching the requested tolerance"
    stalled = "stopped because a step no longer improved the result in this precision"
    diverged = "stopped because the iterates became infinite or NaN"
    left_domain = "stopped because the flow left the domain of R_a in finite time"

    @property
    def ok(self) -> bool:
        """Return whether the value is what was asked for."""
        return self in (Status.converged, Status.completed, Status.vertex)


@dataclass(frozen=True)
class Path:
    """A trajectory: rows are the saved times; what a solver does not know is None.

    Attributes
    ----------
    t : array of shape (k,)
        Times (for discrete training: learning rate times steps).
    x, mu : array of shape (k, ...)
        The model g(w) and the dual variable mu = -int grad f.
    a : array of shape (k,)
        The accumulated regularization of the schedule, <= 0 for decay that is never negative.
    w : array, tuple of arrays, or None
        The parameters, with the structure of ``w0``.
    account : Account or None
        For discrete training, what decay, step and noise stored, per coordinate; see
        `mirrorflow.descent.Account`. For `flow` with ``lr``, what training would store.
    """

    t: Any
    x: Any
    mu: Any = None
    a: Any = None
    w: Any = None
    account: Any = None


@dataclass(frozen=True)
class Solution:
    """The result of a solver, as data: failure is in ``status``, never hidden in ``value``.

    Attributes
    ----------
    value : Tensor
        The final x. When ``status.ok`` is false it is the best that was computed.
    status : Status
        Why the solver stopped.
    stats : dataclass
        What was measured: steps, residuals, seconds.
    path : Path or None
        The trajectory, where there is one.
    aux : dict
        Everything else, such as dual variables.
    """

    value: Any
    status: Status
    stats: Any
    path: Path | None = None
    aux: dict[str, Any] = field(default_factory=dict)
