r"""The flow dw = -(J_g^T grad f + alpha grad h) dt, integrated in w, in mu, or in x."""

from __future__ import annotations

import math
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
from .regularizer import Regularizer, WeightDecay
from .reparam import Hadamard, Parameters, Reparam, factors, flatten, unflatten
from .schedule import Schedule
from .solution import Path, Solution, Status

__all__ = ["FlowStats", "flow"]

Array = NDArray[np.float64]
Loss = Callable[[Tensor], Tensor]
VIEWS = ("parameters", "mirror", "primal")
STIFF_LIMIT = 100  # unknowns; above it LSODA's finite-difference Jacobians cost more than they save


@dataclass(frozen=True)
class FlowStats:
    """What an integration took: steps, evaluations of the gradient, seconds, and how far it got."""

    steps: int
    evaluations: int
    seconds: float
    method: str
    view: str
    t: float


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
    atol: float | None = None,
    method: Literal["LSODA", "DOP853"] | None = None,
    max_steps: int = 100_000,
) -> Solution:
    r"""Integrate the regularized gradient flow, in one of three views that agree (Theorem 3.2).

    - ``"parameters"``: ``dw = -(J_g^T grad f(x) + alpha_t grad h(w)) dt``, for any pair.
    - ``"mirror"``: ``dmu = -grad f(x) dt`` with ``x = primal(mu, a_t)``; for `LeastSquares` in the
      n dual numbers theta with ``mu = Z^T theta``.
    - ``"primal"``: ``dx = (hess R_a)^{-1} dmu + d primal/da da``, the Riemannian flow of Eq. (7).

    Parameters
    ----------
    loss : callable
        f, from x to a scalar tensor; `LeastSquares` is faster than a function of your own.
    g, h, w0
        The pair and its start. The views "mirror" and "primal" need a commuting pair. Everything
        is evaluated in the dtype of w0; the state is integrated in float64.
    schedule : Schedule
        alpha(t); the integration stops and restarts at its breakpoints.
    t_end : float
        The end of time, > 0.
    view : str
        The coordinates to integrate in.
    save_at : sequence of float, optional
        Ascending times in [0, t_end] at which to give the path (interpolated, at no extra steps);
        by default the solver's own steps, with the breakpoints among them.
    rtol : float
        The relative tolerance, in [100 eps, 1) for the eps of the dtype of w0.
    atol : float, optional
        The absolute tolerance of all entries of the state. By default a hundredth of ``rtol`` times
        the size that each entry has when it has decayed most (e^{2a} |w0|, say): weights of
        e^{-100} still decide where x goes.
    method : str, optional
        LSODA (switches to a stiff method by itself; the default up to 100 unknowns) or DOP853
        (order 8, no linear algebra; the default above).
    max_steps : int
        The limit on the number of steps.

    Returns
    -------
    Solution
        ``value`` the final x. ``path``, of tensors: t and a (float64), x, mu, and in the view
        "parameters" w. ``status`` completed, diverged, left_domain or max_steps, with a
        RuntimeWarning unless completed: then the last row of the path, and ``value``, are the last
        good state, at the time ``stats.t``.

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
    _check_arguments(view, schedule, t_end, method, max_steps)
    g.validate(w0)
    h.validate(g)
    w0 = unflatten(flatten(w0).detach(), w0)
    _check_loss(loss, g(w0))
    _check_tolerances(rtol, atol, w0)
    times = None if save_at is None else _save_times(save_at, t_end)
    begun = time.perf_counter()
    coordinates = _coordinates(view, loss, g, h, w0)
    method = method or ("LSODA" if len(coordinates.start()) <= STIFF_LIMIT else "DOP853")
    run = _Run(coordinates, schedule, t_end, (rtol, atol), method, max_steps, times)
    status = run.integrate()
    if not status.ok:
        warnings.warn(f"flow: {status.value} (t = {run.now:.6g})", RuntimeWarning, stacklevel=2)
    path = coordinates.path(*run.rows(), schedule)
    last = coordinates.path(np.array([run.now]), run.state[None], schedule)
    seconds = time.perf_counter() - begun
    stats = FlowStats(run.steps, run.evaluations, seconds, method, view, run.now)
    return Solution(last.x[0], status, stats, path)


class _Coordinates(ABC):
    """One view of the flow: its start, its velocity, and how to read x, mu and w from it."""

    def __init__(self, loss: Loss, g: Reparam, w0: Parameters) -> None:
        self.loss, self.g, self.w0 = loss, g, w0
        self.shape, self.dtype = g(w0).shape, factors(w0)[0].dtype
        # Least squares: mu = Z^T theta, so that the n numbers theta replace mu.
        self.linear = loss if isinstance(loss, LeastSquares) else None
        self.duals = len(self.linear.y) if self.linear else self.shape.numel()

    @abstractmethod
    def start(self) -> Array:
        """Give the state at t = 0."""

    @abstractmethod
    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        """Give dy/dt."""

    @abstractmethod
    def scales(self, a: float) -> Array:
        """Give the size of each entry of the state, at its smallest, for the absolute tolerance."""

    @abstractmethod
    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        """Read the trajectory from the saved states."""

    def jacobian(self, schedule: Schedule) -> Callable[[float, Array], Array] | None:
        """Give d velocity / dy, where it is cheap."""
        return None

    def slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give grad f(x), and what mu is integrated from: grad f, or (Zx - y)/n."""
        if self.linear:
            residual = self.linear.dual_gradient(self.linear.predict(x))
            return self.linear.transpose(residual), residual
        if not torch.isfinite(x).all():
            return torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(point), point)
        return gradient, gradient

    def dual_scales(self) -> Array:
        """Give the change of each dual number that changes an entry of mu by about 1."""
        Z = self.linear.Z.reshape(self.duals, -1) if self.linear else torch.ones(1, 1)
        return np.full(self.duals, 1 / (float(Z.norm(dim=0).max()) or 1.0))

    def mu(self, dual: Tensor) -> Tensor:
        """Give mu from what was integrated; rows are times."""
        if self.linear:
            dual = dual @ self.linear.Z.reshape(self.duals, -1)
        return self.g.project(dual.reshape(-1, *self.shape))

    def tensor(self, y: Array) -> Tensor:
        """Give a state in the dtype of w0, in which everything is evaluated."""
        return torch.from_numpy(y).to(self.dtype)


class _ParameterView(_Coordinates):
    """State (w, mu): the flow as it is trained, with mu carried along."""

    def __init__(self, loss: Loss, g: Reparam, h: Regularizer, w0: Parameters) -> None:
        super().__init__(loss, g, w0)
        self.h, self.size = h, flatten(w0).numel()

    def start(self) -> Array:
        return np.concatenate([_numpy(flatten(self.w0)), np.zeros(self.duals)])

    def scales(self, a: float) -> Array:
        size = np.exp(2 * a) * _smallest(flatten(self.w0))  # w decays like e^a, or e^{2a}
        return np.concatenate([np.full(self.size, size), self.dual_scales()])

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        rate = schedule.rate(t)
        w = unflatten(self.tensor(y[: self.size]), self.w0)
        slope, carried = self.slope(self.g(w))
        dw = flatten(self.g.pullback(w, slope))
        if rate:
            dw = dw + rate * flatten(self.h.gradient(w, self.g))
        return -_numpy(torch.cat([dw, carried.reshape(-1)]))

    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        state = self.tensor(y)
        parts = torch.split(state[:, : self.size], [f.numel() for f in factors(self.w0)], dim=1)
        w = tuple(p.reshape(-1, *f.shape) for p, f in zip(parts, factors(self.w0), strict=True))
        rows = w[0] if isinstance(self.w0, Tensor) else w
        x = torch.func.vmap(self.g)(rows)
        return Path(torch.from_numpy(t), x, self.mu(state[:, self.size :]), _a(schedule, t), rows)


class _HadamardView(_ParameterView):
    """The parameter view of m * w with weight decay and least squares, in NumPy."""

    def __init__(self, loss: LeastSquares, g: Reparam, h: Regularizer, w0: Parameters) -> None:
        super().__init__(loss, g, h, w0)
        Z = _numpy(loss.Z).reshape(self.duals, -1)
        self.Z, self.y = Z / self.duals, _numpy(loss.y) / self.duals
        self.ZT = np.ascontiguousarray(Z.T)

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        rate, (m, w, _) = schedule.rate(t), np.split(y, (self.size // 2, self.size))
        residual = self.Z @ (m * w) - self.y
        slope = self.ZT @ residual
        return -np.concatenate([w * slope + rate * m, m * slope + rate * w, residual])


class _MirrorView(_Coordinates):
    """State mu (or theta with mu = Z^T theta): x = primal(mu, a_t)."""

    def __init__(self, loss: Loss, g: Reparam, w0: Parameters, R: LegendreFunction) -> None:
        super().__init__(loss, g, w0)
        self.R = R

    def start(self) -> Array:
        return np.zeros(self.duals)

    def scales(self, a: float) -> Array:
        return self.dual_scales()

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        mu = self.mu(self.tensor(y))[0]
        return -_numpy(self.slope(self.R.primal(mu, schedule.accumulated(t)))[1]).reshape(-1)

    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        a, mu = _a(schedule, t), self.mu(self.tensor(y))
        if self.R.elementwise:
            x = self.R.primal(mu, a.to(self.dtype).reshape(-1, *[1] * len(self.shape)))
        else:
            x = torch.stack([self.R.primal(m, float(ai)) for m, ai in zip(mu, a, strict=True)])
        return Path(torch.from_numpy(t), x, mu, a)


class _HyperbolicView(_MirrorView):
    """The mirror view of m * w with least squares, in NumPy: what diagonal networks need."""

    def __init__(
        self, loss: LeastSquares, g: Reparam, w0: Parameters, R: HyperbolicEntropy
    ) -> None:
        super().__init__(loss, g, w0, R)
        Z = _numpy(loss.Z).reshape(self.duals, -1)
        self.Z, self.y = Z / self.duals, _numpy(loss.y) / self.duals
        self.ZT = R.speed * np.ascontiguousarray(Z.T)
        self.log_A0, self.rho0, self.decay, self.drift = (
            np.broadcast_to(_numpy(torch.as_tensor(v)), self.shape).reshape(-1)
            for v in (R.log_A0, R.rho0, R.decay, R.drift)
        )

    def halves(self, t: float, y: Array, schedule: Schedule) -> tuple[Array, Array]:
        """Give A e^s and A e^{-s}, s = speed mu + rho, which overflow only where x does.

        Their difference is off by eps A near x = 0, as if mu were off by eps.
        """
        a = schedule.accumulated(t)
        log_A, s = self.log_A0 + a * self.decay, self.ZT @ y + self.rho0 + a * self.drift
        return np.exp(log_A + s), np.exp(log_A - s)

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        up, down = self.halves(t, y, schedule)
        return self.y - self.Z @ ((up - down) / 2)

    def jacobian(self, schedule: Schedule) -> Callable[[float, Array], Array]:
        def jacobian(t: float, y: Array) -> Array:
            up, down = self.halves(t, y, schedule)
            return (self.Z * (up + down) / -2) @ self.ZT

        return jacobian


class _PrimalView(_Coordinates):
    """State (x, mu): the Riemannian gradient flow of Eq. (7), with mu carried along."""

    def __init__(self, loss: Loss, g: Reparam, w0: Parameters, R: LegendreFunction) -> None:
        super().__init__(loss, g, w0)
        self.R, self.size = R, self.shape.numel()

    def start(self) -> Array:
        return np.concatenate([_numpy(self.g(self.w0)).reshape(-1), np.zeros(self.duals)])

    def scales(self, a: float) -> Array:
        # What 1 in mu changes in x: J J^T, which decays like e^{2a}, or e^{4a}.
        pulled = flatten(self.g.pullback(self.w0, torch.ones(self.shape, dtype=self.dtype)))
        size = np.exp(4 * a) * _smallest(pulled) ** 2
        return np.concatenate([np.full(self.size, size), self.dual_scales()])

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        rate, a = schedule.rate(t), schedule.accumulated(t)
        x = self.tensor(y[: self.size]).reshape(self.shape)
        slope, carried = self.slope(x)
        dx = self._pushed(self.R.mirror(x, a), a, self.g.project(slope), rate)
        return -np.concatenate([_numpy(dx).reshape(-1), _numpy(carried).reshape(-1)])

    def _pushed(self, mu: Tensor, a: float, dmu: Tensor, da: float) -> Tensor:
        """Give d primal/dmu dmu + d primal/da da."""
        if self.R.elementwise:  # both derivatives are diagonal: one backward pass gives them
            with torch.enable_grad():
                at = mu.requires_grad_(), torch.full_like(mu, a, requires_grad=True)
                by_mu, by_a = torch.autograd.grad(self.R.primal(*at).sum(), at)
            return by_mu * dmu + by_a * da
        zero = torch.zeros((), dtype=mu.dtype)
        _, moved = torch.autograd.functional.jvp(
            lambda s: self.R.primal(mu + s * dmu, a + s * da), zero, torch.ones_like(zero)
        )
        return torch.as_tensor(moved)

    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        state = self.tensor(y)
        x = state[:, : self.size].reshape(-1, *self.shape)
        return Path(torch.from_numpy(t), x, self.mu(state[:, self.size :]), _a(schedule, t))


class _Run:
    """The one loop: it owns the steps, the breakpoints, and what counts as failure."""

    def __init__(
        self,
        coordinates: _Coordinates,
        schedule: Schedule,
        t_end: float,
        tolerances: tuple[float, float | None],
        method: str,
        max_steps: int,
        save_at: Array | None,
    ) -> None:
        self.coordinates, self.schedule, self.save_at = coordinates, schedule, save_at
        self.rtol, atol = tolerances
        lowest = float(np.min(schedule.accumulated(np.linspace(0, t_end, 101))))
        derived = np.maximum(1e-2 * self.rtol * coordinates.scales(lowest), 1e-300)
        self.atol = derived if atol is None else atol
        self.method, self.max_steps, self.steps, self.evaluations = method, max_steps, 0, 0
        inner = [b for b in schedule.breakpoints if 0 < b < t_end]
        self.edges = [0.0, *inner, float(t_end)]
        self.now, self.state, self.latest = 0.0, coordinates.start(), 0.0
        self.t: list[float] = []
        self.y: list[Array] = []

    def rows(self) -> tuple[Array, Array]:
        """Give the saved times and states."""
        return np.array(self.t), np.array(self.y)

    def integrate(self) -> Status:
        """Integrate piece by piece between the breakpoints; a status, never a traceback."""
        self._save(None)
        status = Status.completed
        with np.errstate(all="ignore"), warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="lsoda: ")  # its status is read instead
            for left, right in zip(self.edges[:-1], self.edges[1:], strict=True):
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
        """Say whether the flow can go on from a state."""
        try:
            return bool(np.isfinite(self._velocity(t, np.inf)(t, y)).all())
        except RangeError:
            return False

    def _piece(self, left: float, right: float) -> Status:
        """Integrate to the next breakpoint; a step that left the domain is tried again, smaller."""
        status, first = self._attempt(left, right, None), np.inf
        while status in (Status.diverged, Status.left_domain):
            first = min(first, self.latest - self.now) / 10
            if not first > 16 * np.spacing(right):
                break
            before = self.now
            status = self._attempt(left, right, first)
            first = first if self.now == before else np.inf
        return status

    def _attempt(self, left: float, right: float, first: float | None) -> Status:
        """Integrate from here to the end of the piece, or to the first step that fails."""
        velocity = self._velocity(left, right)
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
                stuck = solver.t - self.now < 64 * np.spacing(solver.t)  # at a singularity
                self.now, self.state = float(solver.t), solver.y.copy()
                self._save(solver)
                if stuck and self.now < right:
                    return Status.diverged
        except RangeError:
            return Status.left_domain
        return Status.completed

    def _solver(self, velocity: Callable[[float, Array], Array], right: float, first: Any) -> Any:
        """Start SciPy's integrator at the last good state."""
        options = {"rtol": self.rtol, "atol": self.atol, "first_step": first}
        if self.method == "DOP853":
            return DOP853(velocity, self.now, self.state, right, **options)
        jacobian = self.coordinates.jacobian(self.schedule)
        return LSODA(velocity, self.now, self.state, right, jac=jacobian, **options)

    def _velocity(self, left: float, right: float) -> Callable[[float, Array], Array]:
        """Give the right-hand side on one piece, where the schedule is smooth."""
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
        if self.save_at is None:
            return self._append(self.now, self.state)
        until = int(np.searchsorted(self.save_at, self.now, side="right"))
        dense = solver.dense_output() if solver and until > len(self.t) else None
        for t in self.save_at[len(self.t) : until]:
            self._append(t, self.state if dense is None or t == self.now else dense(t))

    def _append(self, t: float, y: Array) -> None:
        self.t.append(float(t))
        self.y.append(y)


def _coordinates(view: str, loss: Loss, g: Reparam, h: Regularizer, w0: Parameters) -> _Coordinates:
    """Choose the coordinates of a view."""
    if view == "parameters":
        fast = isinstance(g, Hadamard) and isinstance(h, WeightDecay)
        if fast and isinstance(loss, LeastSquares) and loss.Z.dtype == torch.float64:
            return _HadamardView(loss, g, h, w0)
        return _ParameterView(loss, g, h, w0)
    R = legendre(g, h, w0)
    if view == "primal":
        return _PrimalView(loss, g, w0, R)
    if isinstance(loss, LeastSquares) and isinstance(R, HyperbolicEntropy):
        return _HyperbolicView(loss, g, w0, R)
    return _MirrorView(loss, g, w0, R)


def _check_arguments(
    view: str, schedule: Schedule, t_end: float, method: str | None, max_steps: int
) -> None:
    """Name the first bad argument."""
    if view not in VIEWS:
        raise ValueError(f"flow: view must be one of {VIEWS}, got {view!r}")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"flow: schedule must be a Schedule, as Constant(0.1), got {schedule!r}")
    if method not in ("LSODA", "DOP853", None):
        raise ValueError(f"flow: method must be 'LSODA' or 'DOP853', got {method!r}")
    if not (np.isfinite(t_end) and t_end > 0):
        raise ValueError(f"flow: t_end must be positive and finite, got {t_end}")
    if max_steps < 1:
        raise ValueError(f"flow: max_steps must be >= 1, got {max_steps}")


def _check_loss(loss: Loss, x: Tensor) -> None:
    """Require measurements of the shape and dtype of x."""
    if isinstance(loss, LeastSquares) and loss.Z.shape[1:] != x.shape:
        raise ValueError(
            f"flow: Z must be (n, {', '.join(map(str, x.shape))}) to measure g(w0), "
            f"got {tuple(loss.Z.shape)}"
        )
    if isinstance(loss, LeastSquares) and not loss.Z.dtype == loss.y.dtype == x.dtype:
        raise TypeError(
            f"flow: w0, Z and y must have one dtype, got {x.dtype}, {loss.Z.dtype}, {loss.y.dtype}"
        )


def _check_tolerances(rtol: float, atol: float | None, w0: Parameters) -> None:
    """Require tolerances that the dtype resolves."""
    dtype = factors(w0)[0].dtype
    floor = 100 * torch.finfo(dtype).eps
    if not floor <= rtol < 1:
        raise ValueError(
            f"flow: rtol must be in [{floor:.1e}, 1), which {dtype} resolves, got {rtol}"
        )
    if atol is not None and not 0 < atol < np.inf:
        raise ValueError(f"flow: atol must be positive and finite, got {atol}")


def _smallest(values: Tensor) -> float:
    """Give the smallest size of an entry that is not 0; 1 if all are."""
    sizes = values[values != 0].abs()
    return float(sizes.min()) if len(sizes) else 1.0


def _save_times(save_at: Any, t_end: float) -> Array:
    """Check the times at which the path is wanted."""
    times = np.atleast_1d(np.asarray(save_at, dtype=np.float64))
    inside = ((times >= 0) & (times <= t_end)).all()
    if times.ndim != 1 or not len(times) or not inside or (np.diff(times) < 0).any():
        raise ValueError(f"flow: save_at must be ascending times in [0, {t_end}]")
    return times


def _a(schedule: Schedule, t: Array) -> Tensor:
    """Give a_t at the saved times."""
    return torch.from_numpy(np.asarray(schedule.accumulated(t)))


def _numpy(value: Tensor) -> Array:
    """Give a float64 NumPy array."""
    return value.detach().to(torch.float64).numpy()
