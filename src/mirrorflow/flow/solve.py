r"""The flow dw = -(J_g^T grad f + alpha grad h) dt, integrated in w, in mu, or in x."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from .._devices import CPU, device_of, loss_on, moved
from .._loss import LeastSquares
from .._solution import Path, Solution, Status
from .._threads import few_threads, small_on_one_thread
from ..descent import Account, predicted_account
from ..descent.prediction import require_predictable
from ..regularizer import Regularizer, require_pair, require_rows
from ..reparam import Parameters, Reparam, factors, flatten, unflatten
from ..schedule import Schedule
from ._integrator import SMALLEST_ATOL, Integration
from ._views import Array, Coordinates, Loss, make

__all__ = ["FlowStats", "flow"]

VIEWS = ("parameters", "mirror", "primal")
STIFF_LIMIT = 100  # unknowns; above it LSODA's finite-difference Jacobians cost more than they save


@dataclass(frozen=True)
class FlowStats:
    """The cost of an integration: steps, evaluations, seconds, and the time t that it reached."""

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
    lr: float | None = None,
) -> Solution:
    r"""Integrate the regularized gradient flow, in one of three views that agree (Theorem 3.2).

    - ``"parameters"``: ``dw = -(J_g^T grad f(x) + alpha_t grad h(w)) dt``, for any pair.
    - ``"mirror"``: ``dmu = -grad f(x) dt`` with ``x = primal(mu, a_t)``; for `LeastSquares` in the
      n dual numbers theta with ``mu = Z^T theta``.
    - ``"primal"``: ``dx = (hess R_a)^{-1} dmu + d primal/da da``, the Riemannian flow of Eq. (7).

    Where R_a has a clock (`RescaledFunction`), dnu = clock(a_t) dmu takes the place of dmu in the
    last two; ``path.mu`` is mu = -int grad f dt in all three. Where R_a has no closed form
    (`Inversion`), the mirror view carries w along, as the first does.

    With y of shape (n, m) one call integrates m problems, a row of each factor of w0 (m, d) for
    each: right-hand sides, or starts with equal columns of y. g and h have to be elementwise. All
    problems take the same steps, and the tolerance holds for each: the one that needs the shortest
    step decides, and the first one that fails ends the flow.

    Parameters
    ----------
    loss : callable
        f, from x to a scalar tensor; `LeastSquares` is faster than a function of your own, and
        takes several right-hand sides.
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
        Ascending times in [0, t_end] at which to return the path (interpolated, at no extra steps);
        by default the solver's own steps, with the breakpoints among them.
    rtol : float
        The relative tolerance, in [100 eps, 1) for the eps of the dtype of w0.
    atol : float, optional
        The absolute tolerance of all entries of the state. By default a hundredth of ``rtol`` times
        the size that each entry has when it has decayed most (``e^{2a} |w0|``, say): weights of
        e^{-100} still decide where x goes. At least 1e-140: the solvers square what is divided by
        it.
    method : str, optional
        LSODA (switches to a stiff method by itself; the default up to 100 unknowns, of each problem
        where there are several) or DOP853 (order 8, no linear algebra; the default above).
    max_steps : int
        The limit on the number of steps.
    lr : float, optional
        The learning rate, > 0, of gradient descent that this flow stands for. ``path.account`` is
        then what its steps store per coordinate beside the decay, to first order in lr and without
        training: ``a_i = -int alpha dt - (lr/2) int (alpha^2 + G_i^2) dt``, G the gradient in x.
        For m * w with `WeightDecay`. `predicted_account` adds minibatches, noise and momentum.

    Returns
    -------
    Solution
        On the device of w0; the flow is integrated on the CPU.
        ``value`` the final x, of shape (m, d) for m problems. ``path``, of tensors with a row for
        each time: t and a (float64), x, mu, and in the view "parameters" w. ``status`` completed,
        diverged, left_domain or max_steps, with a RuntimeWarning unless completed: then the last
        row of the path, and ``value``, are the last good state, at the time ``stats.t``. A
        RuntimeWarning also if decay, before it ends, takes w or x below what ``atol`` can resolve.

    Raises
    ------
    ValueError
        For a bad argument; for ``lr`` with a pair whose share of the step is not derived; for
        several right-hand sides with a g or h that is not elementwise.
        `IncompatiblePair` if the view needs an R_a that does not exist.

    Examples
    --------
    >>> import mirrorflow as mf
    >>> Z = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    >>> loss = mf.LeastSquares(Z, torch.tensor([1.0], dtype=torch.float64))
    >>> w0 = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    >>> sol = flow(loss, mf.Hadamard(), mf.WeightDecay(), w0, mf.SwitchOff(0.1, 5.0), t_end=200.0)
    >>> round((Z @ sol.value).item(), 6), sol.status.name
    (1.0, 'completed')

    Two starts at once, without decay: the smaller one ends at a sparser solution.

    >>> starts = (torch.zeros(2, 3).double(), torch.tensor([[1.0], [0.1]]).double().expand(2, 3))
    >>> both = mf.LeastSquares(Z, loss.y[:, None].expand(1, 2))
    >>> flow(both, mf.Hadamard(), mf.WeightDecay(), starts, mf.Constant(0.0), t_end=200.0).value
    tensor([[0.1817, 0.3868, 0.0895],
            [0.0345, 0.4806, 0.0086]], dtype=torch.float64)

    Steps of length 0.1 store a decay of their own, most where the column of Z is large; here that
    makes the end slightly less sparse than the flow's:

    >>> path = flow(loss, mf.Hadamard(), mf.WeightDecay(), w0, mf.Constant(0.0), 50.0, lr=0.1).path
    >>> path.a[-1].item(), path.account.a[-1]
    (0.0, tensor([-0.0046, -0.0184, -0.0011], dtype=torch.float64))
    """
    _check_arguments(view, schedule, t_end, method, max_steps)
    require_pair("flow", g, h, w0)
    device = device_of(w0)
    loss, g, h, w0 = loss_on(loss, device), moved(g, CPU), moved(h, CPU), moved(w0, CPU)
    w0 = unflatten(flatten(w0).detach(), w0)
    if isinstance(loss, LeastSquares):
        if loss.several:
            require_rows("flow", g, h)
        loss.require(g(w0), "flow")
    _check_tolerances(rtol, atol, w0)
    if lr is not None:
        _check_rate(lr)
        require_predictable("flow", g, h, w0, loss)
    times = None if save_at is None else _save_times(save_at, t_end)
    begun = time.perf_counter()
    coordinates = make(view, loss, g, h, w0)
    unknowns = len(coordinates.start()) // coordinates.problems
    method = method or ("LSODA" if unknowns <= STIFF_LIMIT else "DOP853")
    tolerances, fine = (rtol, atol), lr is not None
    size = loss.Z.numel() if isinstance(loss, LeastSquares) else coordinates.shape.numel()
    with small_on_one_thread(size), few_threads(size):
        run = Integration(coordinates, schedule, t_end, tolerances, method, max_steps, times, fine)
        status = run.integrate()
    if not status.ok:
        warnings.warn(f"flow: {status.value} (t = {run.now:.6g})", RuntimeWarning, stacklevel=2)
    if run.faint:
        warnings.warn(
            f"flow: decay takes the state below {SMALLEST_ATOL:.0e}, which the view {view!r} does "
            "not resolve: what comes back after the decay comes back too soon; view='mirror' "
            "follows it",
            RuntimeWarning,
            stacklevel=2,
        )
    path = coordinates.path(*run.rows(), schedule)
    if lr is not None:
        path = replace(path, account=_account(run, coordinates, schedule, loss, lr, path))
    last = coordinates.path(np.array([run.now]), run.state[None], schedule)
    seconds = time.perf_counter() - begun
    stats = FlowStats(run.steps, run.evaluations, seconds, method, view, run.now)
    return moved(Solution(last.x[0], status, stats, path), device)


def _account(
    run: Integration,
    coordinates: Coordinates,
    schedule: Schedule,
    loss: Loss,
    lr: float,
    path: Path,
) -> Account:
    """Return the account at the times of the path, integrated over more of them."""
    whole = coordinates.path(*run.fine_rows(), schedule)
    account = predicted_account(Solution(whole.x[-1], Status.completed, None, whole), loss, lr)
    at = torch.searchsorted(whole.t, path.t)
    rows = (account.a, account.mu, account.decay, account.step, account.noise)
    return Account(*(row[at] for row in rows))


def _check_rate(lr: float) -> None:
    """Require a learning rate."""
    if not 0 < lr < np.inf:
        raise ValueError(f"flow: lr must be positive and finite, got {lr}")


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


def _check_tolerances(rtol: float, atol: float | None, w0: Parameters) -> None:
    """Require tolerances that the dtype resolves."""
    dtype = factors(w0)[0].dtype
    floor = 100 * torch.finfo(dtype).eps
    if not floor <= rtol < 1:
        raise ValueError(
            f"flow: rtol must be in [{floor:.1e}, 1), which {dtype} resolves, got {rtol}"
        )
    if atol is not None and not SMALLEST_ATOL <= atol < np.inf:
        raise ValueError(f"flow: atol must be finite and >= {SMALLEST_ATOL}, got {atol}")


def _save_times(save_at: Any, t_end: float) -> Array:
    """Check the times at which the path is wanted."""
    times = np.atleast_1d(np.asarray(save_at, dtype=np.float64))
    inside = ((times >= 0) & (times <= t_end)).all()
    if times.ndim != 1 or not len(times) or not inside or (np.diff(times) < 0).any():
        raise ValueError(f"flow: save_at must be ascending times in [0, {t_end}], got {save_at!r}")
    return times
