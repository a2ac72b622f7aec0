r"""The flow dw = -(J_g^T grad f + alpha grad h) dt, integrated in w, in mu, or in x."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import DOP853, LSODA
from torch import Tensor

from .legendre import HyperbolicEntropy, LegendreFunction, RangeError, legendre
from .loss import LeastSquares
from .regularizer import Regularizer
from .reparam import Parameters, Reparam, flatten, unflatten
from .schedule import Schedule
from .solution import Path, Solution, Status

__all__ = ["FlowStats", "flow"]

Array = NDArray[np.float64]
Loss = Callable[[Tensor], Tensor]
VIEWS = ("parameters", "mirror", "primal")


@dataclass(frozen=True)
class FlowStats:
    """What an integration took: steps, evaluations of the gradient, seconds, and the method."""

    steps: int
    evaluations: int
    seconds: float
    method: str
    view: str


def flow(
    loss: Loss,
    g: Reparam,
    h: Regularizer,
    w0: Parameters,
    schedule: Schedule,
    t_end: float,
    view: Literal["parameters", "mirror", "primal"] = "parameters",
    save_at: Any = None,
    rtol: float = 1e-8,
    method: Literal["LSODA", "DOP853"] | None = None,
    max_steps: int = 100_000,
) -> Solution:
    r"""Integrate the regularized gradient flow, in one of three views that agree (Theorem 3.2).

    - ``"parameters"``: ``dw = -(J_g^T grad f(x) + alpha_t grad h(w)) dt``, for any pair.
    - ``"mirror"``: ``dmu = -grad f(x) dt`` with ``x = primal(mu, a_t)``; for `LeastSquares` in the n
      dual numbers theta with ``mu = Z^T theta``.
    - ``"primal"``: ``dx = (hess R_a)^{-1} dmu + d primal/da da``, the Riemannian flow of Eq. (7).

    Parameters
    ----------
    loss : callable
        f, from x to a scalar tensor; `LeastSquares` is faster than a function of your own.
    g, h, w0
        The pair and its start. The views "mirror" and "primal" need a commuting pair.
    schedule : Schedule
        alpha(t); the integration stops and restarts at its breakpoints.
    t_end : float
        The end of time, > 0.
    view : str
        The coordinates to integrate in.
    save_at : sequence of float, optional
        Ascending times in [0, t_end] at which to give the path; by default the solver's own steps.
    rtol : float
        The relative tolerance; the absolute one is a hundredth of it, relative to the start's size.
    method : str, optional
        LSODA (switches to a stiff method by itself; the default up to 100 unknowns) or DOP853
        (order 8, no linear algebra; the default above).
    max_steps : int
        The limit on the number of steps.

    Returns
    -------
    Solution
        ``value`` the final x; ``path`` with t, x, mu, a (and w in the view "parameters");
        ``status`` completed, or why it stopped: what was computed until then is in the path.

    Raises
    ------
    ValueError
        For a bad argument; `IncompatiblePair` if the view needs an R_a that does not exist.

    Examples
    --------
    >>> import mirrorflow as mf
    >>> Z = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    >>> loss = mf.LeastSquares(Z, torch.tensor([1.0], dtype=torch.float64))
    >>> w0 = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    >>> sol = flow(loss, mf.Hadamard(), mf.WeightDecay(), w0, mf.SwitchOff(0.1, 5.0), t_end=200.0)
    >>> round((Z @ sol.value).item(), 6), sol.status.name
    (1.0, 'completed')
    """
    _check_arguments(view, t_end, rtol, method)
    g.validate(w0)
    h.validate(g)
    times = None if save_at is None else _save_times(save_at, t_end)
    coordinates = _coordinates(view, loss, g, h, w0, schedule)
    begun = time.perf_counter()
    method = method or ("LSODA" if len(coordinates.start()) <= 100 else "DOP853")
    run = _Run(coordinates, schedule, t_end, rtol, method, max_steps, times)
    status = run.integrate()
    if not status.ok:
        warnings.warn(f"flow: {status.value} (t = {run.t[-1]:.6g})", RuntimeWarning, stacklevel=2)
    seconds = time.perf_counter() - begun
    stats = FlowStats(run.steps, coordinates.evaluations, seconds, method, view)
    path = coordinates.path(np.array(run.t), np.array(run.y), schedule)
    return Solution(path.x[-1], status, stats, path)


class _Coordinates(ABC):
    """One view of the flow: its start, its velocity, and how to read x, mu and w from it."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.evaluations = loss, 0

    @abstractmethod
    def start(self) -> Array:
        """Give the state at t = 0."""

    @abstractmethod
    def velocity(self, y: Array, t: float, schedule: Schedule) -> Array:
        """Give dy/dt."""

    @abstractmethod
    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        """Read the trajectory from the saved states."""

    def gradient(self, x: Tensor) -> Tensor:
        """Give grad f(x)."""
        if isinstance(self.loss, LeastSquares):
            return self.loss.gradient(x)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.loss(point), point)
        return grad


class _ParameterView(_Coordinates):
    """State (w, mu): the flow as it is trained, with mu carried along."""

    def __init__(self, loss: Loss, g: Reparam, h: Regularizer, w0: Parameters) -> None:
        super().__init__(loss)
        self.g, self.h, self.w0 = g, h, w0
        self.size = flatten(w0).numel()
        # Least squares: mu = Z^T theta, so that the n numbers theta are carried instead of mu.
        self.dual = isinstance(loss, LeastSquares)
        self.extra = len(loss.y) if isinstance(loss, LeastSquares) else g(w0).numel()

    def start(self) -> Array:
        return np.concatenate([_numpy(flatten(self.w0)), np.zeros(self.extra)])

    def velocity(self, y: Array, t: float, schedule: Schedule) -> Array:
        rate = schedule.rate(t)
        w = unflatten(torch.from_numpy(y[: self.size]), self.w0)
        x = self.g(w)
        if self.dual:
            residual = self.loss.dual_gradient(self.loss.predict(x))  # pyright: ignore
            slope, carried = self.loss.transpose(residual), residual  # pyright: ignore
        else:
            slope = carried = self.gradient(x)
        dw = flatten(self.g.pullback(w, slope))
        if rate:
            dw = dw + rate * flatten(self.h.gradient(w, self.g))
        return -torch.cat([dw, carried.reshape(-1)]).numpy()

    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        rows = [unflatten(row, self.w0) for row in torch.from_numpy(y[:, : self.size])]
        x = torch.stack([self.g(w) for w in rows])
        carried = torch.from_numpy(y[:, self.size :])
        if self.dual:
            mu = torch.stack([self.loss.transpose(c) for c in carried])  # pyright: ignore
        else:
            mu = carried.reshape(x.shape)
        one = isinstance(self.w0, Tensor)
        w = torch.stack(rows) if one else tuple(torch.stack(f) for f in zip(*rows, strict=True))  # pyright: ignore
        return Path(torch.from_numpy(t), x, mu, _a(schedule, t), w)


class _MirrorView(_Coordinates):
    """State mu (or theta with mu = Z^T theta): x = primal(mu, a_t)."""

    def __init__(self, loss: Loss, R: LegendreFunction) -> None:
        super().__init__(loss)
        self.R, self.dual = R, isinstance(loss, LeastSquares)
        self.size = len(loss.y) if isinstance(loss, LeastSquares) else R.shape.numel()

    def start(self) -> Array:
        return np.zeros(self.size)

    def mu(self, y: Array) -> Tensor:
        """Give mu at a state."""
        state = torch.from_numpy(y)
        return self.loss.transpose(state) if self.dual else state.reshape(self.R.shape)  # pyright: ignore

    def velocity(self, y: Array, t: float, schedule: Schedule) -> Array:
        x = self.R.primal(self.mu(y), schedule.accumulated(t))
        if self.dual:
            return -self.loss.dual_gradient(self.loss.predict(x)).numpy()  # pyright: ignore
        return -self.gradient(x).reshape(-1).numpy()

    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        a = _a(schedule, t)
        mu = torch.stack([self.mu(row) for row in y])
        if self.R.elementwise:
            x = self.R.primal(mu, a.reshape(-1, *[1] * len(self.R.shape)))
        else:
            x = torch.stack([self.R.primal(m, float(ai)) for m, ai in zip(mu, a, strict=True)])
        return Path(torch.from_numpy(t), x, mu, a)


class _HyperbolicView(_MirrorView):
    """The mirror view of m * w with least squares, in NumPy: what diagonal networks need."""

    def __init__(self, loss: LeastSquares, R: HyperbolicEntropy) -> None:
        super().__init__(loss, R)
        self.Z, self.y = _numpy(loss.Z), _numpy(loss.y)
        self.log_A0, self.rho0 = _numpy(R.log_A0), _numpy(R.rho0)
        self.entropy, self.ZT = R, np.ascontiguousarray(self.Z.T)

    def velocity(self, y: Array, t: float, schedule: Schedule) -> Array:
        R, a = self.entropy, -schedule.integral(t)
        s = self.ZT @ (R.speed * y) + (self.rho0 + _numpy(R.drift) * a)
        size = np.abs(s)
        # A sinh s, formed in logarithms (see HyperbolicEntropy.primal).
        x = np.exp(self.log_A0 + _numpy(R.decay) * a + size) * (np.expm1(-2 * size) / -2)
        return (self.y - self.Z @ np.copysign(x, s)) / len(self.y)


class _PrimalView(_Coordinates):
    """State (x, mu): the Riemannian gradient flow of Eq. (7), with mu carried along."""

    def __init__(self, loss: Loss, R: LegendreFunction) -> None:
        super().__init__(loss)
        self.R, self.size = R, R.shape.numel()

    def start(self) -> Array:
        x = _numpy(self.R.centre(0.0)).reshape(-1)
        return np.concatenate([x, np.zeros_like(x)])

    def velocity(self, y: Array, t: float, schedule: Schedule) -> Array:
        rate, a = schedule.rate(t), schedule.accumulated(t)
        x = torch.from_numpy(y[: self.size]).reshape(self.R.shape)
        slope = self.gradient(x)
        mu = self.R.mirror(x, a).detach()

        def along(s: Tensor) -> Tensor:  # primal on the line (mu, a) - s (grad f, alpha)
            return self.R.primal(mu - s * slope, a - s * rate)

        zero = torch.zeros((), dtype=x.dtype)
        dx = torch.autograd.functional.jvp(along, zero, torch.ones_like(zero))[1]
        return np.concatenate([_numpy(dx).reshape(-1), -_numpy(slope).reshape(-1)])

    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        both = torch.from_numpy(y).reshape(len(t), 2, *self.R.shape)
        return Path(torch.from_numpy(t), both[:, 0], both[:, 1], _a(schedule, t))


class _Run:
    """The one loop: it owns the steps, the breakpoints, and what counts as failure."""

    def __init__(
        self,
        coordinates: _Coordinates,
        schedule: Schedule,
        t_end: float,
        rtol: float,
        method: str,
        max_steps: int,
        save_at: Array | None,
    ) -> None:
        self.coordinates, self.schedule, self.save_at = coordinates, schedule, save_at
        self.rtol, self.method, self.max_steps, self.steps = rtol, method, max_steps, 0
        inner = [b for b in schedule.breakpoints if 0 < b < t_end]
        self.edges = [0.0, *inner, float(t_end)]
        y0 = coordinates.start()
        self.t, self.y = [0.0], [y0]
        self.atol = rtol * 1e-2 * max(1e-6, float(np.abs(y0).max())) if y0.any() else rtol * 1e-2
        self.next = 0 if save_at is None else int(np.searchsorted(save_at, 0.0, side="right"))
        if save_at is not None and self.next == 0:
            self.t, self.y = [], []

    def integrate(self) -> Status:
        """Integrate piece by piece between the breakpoints; a status, never a traceback."""
        y, status = self.coordinates.start(), Status.completed
        for left, right in zip(self.edges[:-1], self.edges[1:], strict=True):
            try:
                y, status = self._piece(y, left, right)
            except RangeError:
                status = Status.left_domain
            if not status.ok:
                break
        if not self.t:
            self.t, self.y = [0.0], [self.coordinates.start()]
        return status

    def _velocity(self, left: float, right: float) -> Callable[[float, Array], Array]:
        """Give the right-hand side on one piece, where the schedule is smooth."""
        inside = float(np.nextafter(right, left))

        def velocity(t: float, y: Array) -> Array:
            self.coordinates.evaluations += 1
            now = float(min(max(t, left), inside))  # solvers look past the end: stay on this piece
            return self.coordinates.velocity(y, now, self.schedule)

        return velocity

    def _piece(self, y: Array, left: float, right: float) -> tuple[Array, Status]:
        """Integrate from one breakpoint to the next."""
        maker = LSODA if self.method == "LSODA" else DOP853
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # LSODA's own messages: its status is read instead
            solver = maker(
                self._velocity(left, right), left, y, right, rtol=self.rtol, atol=self.atol
            )
            while solver.status == "running":
                if self.steps >= self.max_steps:
                    return solver.y, Status.max_steps
                solver.step()
                self.steps += 1
                if solver.status == "failed" or not np.isfinite(solver.y).all():
                    return solver.y, Status.diverged
                self._save(solver, last=solver.status == "finished")
        return solver.y.copy(), Status.completed

    def _save(self, solver: Any, last: bool) -> None:
        """Keep this step, or the times that were asked for and lie in it."""
        if self.save_at is None:
            self.t.append(float(solver.t))
            self.y.append(solver.y.copy())
            return
        until = int(np.searchsorted(self.save_at, solver.t, side="right"))
        if until > self.next:
            dense = solver.dense_output()
            for t in self.save_at[self.next : until]:
                self.t.append(float(t))
                self.y.append(solver.y.copy() if t == solver.t else dense(t))
            self.next = until


def _coordinates(
    view: str, loss: Loss, g: Reparam, h: Regularizer, w0: Parameters, schedule: Schedule
) -> _Coordinates:
    """Choose the coordinates of a view."""
    if view == "parameters":
        return _ParameterView(loss, g, h, w0)
    R = legendre(g, h, w0)
    if view == "primal":
        return _PrimalView(loss, R)
    if isinstance(loss, LeastSquares) and isinstance(R, HyperbolicEntropy):
        return _HyperbolicView(loss, R)
    return _MirrorView(loss, R)


def _check_arguments(view: str, t_end: float, rtol: float, method: str | None) -> None:
    """Name the first bad argument."""
    if view not in VIEWS:
        raise ValueError(f"flow: view must be one of {VIEWS}, got {view!r}")
    if method not in ("LSODA", "DOP853", None):
        raise ValueError(f"flow: method must be 'LSODA' or 'DOP853', got {method!r}")
    for name, number in (("t_end", t_end), ("rtol", rtol)):
        if not (np.isfinite(number) and number > 0):
            raise ValueError(f"flow: {name} must be positive and finite, got {number}")


def _save_times(save_at: Any, t_end: float) -> Array:
    """Check the times at which the path is wanted."""
    times = np.atleast_1d(np.asarray(save_at, dtype=np.float64))
    if not len(times) or not ((times >= 0) & (times <= t_end)).all() or (np.diff(times) < 0).any():
        raise ValueError(f"flow: save_at must be ascending times in [0, {t_end}]")
    return times


def _a(schedule: Schedule, t: Array) -> Tensor:
    """Give a_t at the saved times."""
    return torch.from_numpy(np.asarray(schedule.accumulated(t)))


def _numpy(value: Any) -> Any:
    """Give a float64 NumPy array (or the number itself) without gradients."""
    return value.detach().to(torch.float64).numpy() if isinstance(value, Tensor) else value
