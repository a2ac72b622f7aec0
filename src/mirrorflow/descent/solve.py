r"""Gradient descent as practitioners run it: with momentum, minibatches and label noise."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._loss import LeastSquares, slope
from .._solution import Path, Solution, Status
from ..regularizer import Regularizer, require_pair, require_rows
from ..reparam import Parameters, Reparam, factors
from ..schedule import Schedule
from ._account import Ledger, Unaccounted, coordinates

__all__ = ["DescentStats", "descend"]

Loss = Callable[[Tensor], Tensor]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class DescentStats:
    """What a training run took.

    Attributes
    ----------
    steps : int
        Steps that were taken.
    seconds : float
        Wall time of the call.
    unaccounted : str or None
        The reason why ``path.account`` is None.
    """

    steps: int
    seconds: float
    unaccounted: str | None = None


def descend(
    loss: Loss,
    g: Reparam,
    h: Regularizer,
    w0: Parameters,
    schedule: Schedule,
    lr: float,
    steps: int,
    momentum: float = 0.0,
    save_every: int | None = None,
    batch: int | None = None,
    label_noise: float | Schedule = 0.0,
    seed: int = 0,
    split_every: int = 1,
) -> Solution:
    r"""Run gradient descent with the penalty in the gradient, as ``torch.optim.SGD`` does.

    .. math:: d_k = J_g^T \nabla f(x_k) + \alpha(k\,lr) \nabla h(w_k), \quad
              b_k = \beta b_{k-1} + d_k, \quad w_{k+1} = w_k - lr\, b_k

    Parameters
    ----------
    loss, g, h, w0, schedule
        As for `flow`, also for m problems at once; the schedule is read at the time t = k lr, so
        that both share a clock.
    lr : float
        The learning rate, > 0. For `SymmetricFactor` see its note on the factor 2.
    steps : int
        The number of steps, >= 1.
    momentum : float
        beta in [0, 1). The buffer includes the decay, which lives on in it after a switch-off.
        Heavy-ball steps are 1/(1 - beta) times as long: as lr -> 0, x at k lr is the flow's x at
        k lr/(1 - beta), with the rate read at k lr. The a to put into R_a is ``path.account.a``
        or, in the limit lr -> 0, the path's a over 1 - beta; `predicted_account` has the next
        order.
    save_every : int, optional
        Save the state every so many steps; by default about 100 times.
    batch : int, optional
        The size of minibatches of the rows of a `LeastSquares` loss, in [1, n]: a new permutation
        in each epoch, without replacement, the last batch of an epoch smaller where n is not a
        multiple, as ``DataLoader(shuffle=True)`` does. By default all rows at each step. m problems
        share their minibatches.
    label_noise : float or Schedule
        The delta >= 0 of the noise +-delta that each label of a step gets, drawn anew at each step;
        as a schedule it is read at t = k lr. For a `LeastSquares` loss.
    seed : int
        ``numpy.random.default_rng(seed).spawn(2)`` draws the permutations and the signs.
    split_every : int
        Compute the gradient of the whole loss every so many steps, and hold it in between, to tell
        the account's noise from its step: at each step it costs as much as n rows, however small
        the batch. a, mu and decay of the account stay exact.

    Returns
    -------
    Solution
        ``value`` the final x, ``path`` with t = k lr, x, a = -sum lr alpha, and w; ``status``
        completed, or diverged (with a RuntimeWarning): then the path ends, and ``value`` is, at the
        last save before NaN or infinity. For m * w, u^2 - v^2 and commuting U U^T (a `LeastSquares`
        loss shows whether it is), ``path.account`` is the exact `Account` and ``path.mu`` its mu;
        for other pairs both are None, and ``stats.unaccounted`` says why.

    Raises
    ------
    ValueError, TypeError
        If an argument is bad, or the shape or dtype of the measurements; if a batch or label noise
        is asked of a loss without rows.

    Examples
    --------
    >>> import mirrorflow as mf
    >>> zeros, ones = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    >>> loss, w0 = mf.LeastSquares(torch.diag(ones), ones), (zeros, ones)
    >>> sol = descend(loss, mf.Hadamard(), mf.WeightDecay(), w0, mf.Constant(0.0), 0.1, 500)
    >>> [round(x, 6) for x in sol.value.tolist()]
    [1.0, 1.0]

    With the account, the law of R_a is exact for these steps:

    >>> R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), w0)
    >>> torch.allclose(R.primal(sol.path.mu[-1], sol.path.account.a[-1]), sol.value, rtol=1e-12)
    True
    """
    _check_arguments(schedule, lr, steps, momentum, save_every, split_every)
    require_pair("descend", g, h, w0)
    if isinstance(loss, LeastSquares):
        if loss.several:
            require_rows("descend", g, h)
        loss.require(g(w0), "descend")
    amplitudes = drawn_amplitudes("descend", loss, batch, label_noise, lr * np.arange(steps))
    begun = time.perf_counter()
    # One call for all rates: the schedule at t = k lr, and the sums that a needs.
    rates = schedule.rate(lr * np.arange(steps))
    sums = np.concatenate([[0.0], -lr * np.cumsum(rates)])  # a_k = -sum lr alpha
    every = save_every or max(1, steps // 100)
    with torch.no_grad():
        ledger, unaccounted = _opened(loss, g, h, w0, lr, momentum, rates, every)
        draws = None
        if amplitudes is not None and isinstance(loss, LeastSquares):
            draws = _Draws(loss, batch or len(loss.y), amplitudes, seed)
        gradients = _Gradients(loss, draws, ledger, split_every)
        run = _Run(gradients, g, h, w0, lr, momentum, every)
        status = run.steps(rates.tolist())
    if not status.ok:
        warnings.warn(f"descend: {status.value} (by step {run.k})", RuntimeWarning, stacklevel=2)
    path = run.path(sums, ledger)
    stats = DescentStats(run.k, time.perf_counter() - begun, unaccounted)
    return Solution(path.x[-1], status, stats, path)


class _Draws:
    """Minibatches of the rows of a loss, with noise on their labels."""

    def __init__(self, loss: LeastSquares, batch: int, amplitudes: Array, seed: int) -> None:
        self.Z, self.y, self.batch = loss.Z.reshape(len(loss.y), -1), loss.y, batch
        self.rows, self.signs = np.random.default_rng(seed).spawn(2)
        self.amplitudes = iter(amplitudes.tolist())
        self.left: tuple[Tensor, ...] = ()

    def gradient(self, x: Tensor) -> Tensor:
        """Return the gradient of the next minibatch at x."""
        Z, y = self.Z, self.y
        if self.batch < len(y):
            at = self._next()
            Z, y = Z[at], y[at]
        if amplitude := next(self.amplitudes):
            signs = 2 * self.signs.integers(0, 2, tuple(y.shape)) - 1
            y = y + amplitude * torch.from_numpy(signs).to(y)
        if y.ndim == 2:  # a row of x for each column of y
            return (Z @ x.mT - y).mT @ Z / len(y)
        return ((Z @ x.reshape(-1) - y) @ Z / len(y)).reshape(x.shape)  # grad of |Zx - y|^2 / (2b)

    def _next(self) -> Tensor:
        """Return the next rows of this epoch, or the first ones of a new one."""
        if not self.left:
            order = torch.from_numpy(self.rows.permutation(len(self.y))).to(self.Z.device)
            self.left = order.split(self.batch)
        at, *rest = self.left
        self.left = tuple(rest)
        return at


class _Gradients:
    """The gradients in x that a run steps along, each entered into the account."""

    def __init__(
        self, loss: Loss, draws: _Draws | None, ledger: Ledger | None, split_every: int
    ) -> None:
        self.whole = loss.gradient if isinstance(loss, LeastSquares) else partial(slope, loss)
        self.draws, self.ledger, self.split_every = draws, ledger, split_every
        self.k = 0
        self.held: Tensor | None = None  # the last gradient of the whole loss

    def at(self, x: Tensor) -> Tensor:
        """Return the gradient of the next step."""
        gradient = self.draws.gradient(x) if self.draws else self.whole(x)
        if self.ledger:
            if self.draws is None:
                self.held = gradient
            elif self.held is None or self.k % self.split_every == 0:
                self.held = self.whole(x)
            self.ledger.record(gradient, self.held)
        self.k += 1
        return gradient


class _Run:
    """The loop over the steps, and what it keeps."""

    def __init__(
        self,
        gradients: _Gradients,
        g: Reparam,
        h: Regularizer,
        w0: Parameters,
        lr: float,
        momentum: float,
        every: int,
    ) -> None:
        self.gradients, self.g, self.h = gradients, g, h
        self.lr, self.momentum, self.every = lr, momentum, every
        self.one = isinstance(w0, Tensor)
        self.w = tuple(f.detach().clone() for f in factors(w0))
        self.buffer: tuple[Tensor, ...] | None = None
        self.k = 0
        self.saved = [(0, self.w, g(self.point()))]

    def point(self) -> Parameters:
        """Return the parameters with the structure of w0."""
        return self.w[0] if self.one else self.w

    def steps(self, rates: list[float]) -> Status:
        """Take all steps, or stop at the first save at which something is not finite."""
        for rate in rates:
            self._step(rate)
            self.k += 1
            if self.k % self.every == 0 or self.k == len(rates):
                x = self.g(self.point())
                if not all(bool(torch.isfinite(p).all()) for p in (*self.w, x)):
                    return Status.diverged
                self.saved.append((self.k, self.w, x))
        return Status.completed

    def _step(self, rate: float) -> None:
        """Take one step, with the penalty in the gradient and so in the buffer."""
        w = self.point()
        d = factors(self.g.pullback(w, self.gradients.at(self.g(w))))
        if rate:
            decay = factors(self.h.gradient(w, self.g))
            d = tuple(di + rate * hi for di, hi in zip(d, decay, strict=True))
        if self.momentum:
            if self.buffer is not None:
                # b_k = beta b_{k-1} + d_k, and b_0 = d_0 as in torch.
                d = tuple(self.momentum * b + di for b, di in zip(self.buffer, d, strict=True))
            self.buffer = d
        self.w = tuple(p - self.lr * di for p, di in zip(self.w, d, strict=True))

    def path(self, sums: Array, ledger: Ledger | None) -> Path:
        """Stack what was saved."""
        k = [k for k, _, _ in self.saved]
        w = tuple(torch.stack(f) for f in zip(*(w for _, w, _ in self.saved), strict=True))
        t = torch.tensor(k, dtype=torch.float64) * self.lr
        x = torch.stack([x for _, _, x in self.saved])
        account = ledger.account(len(k)) if ledger else None
        mu = account.mu if account else None
        return Path(t, x, mu, torch.from_numpy(sums[k]), w[0] if self.one else w, account)


def _opened(
    loss: Loss,
    g: Reparam,
    h: Regularizer,
    w0: Parameters,
    lr: float,
    momentum: float,
    rates: Array,
    every: int,
) -> tuple[Ledger | None, str | None]:
    """Return the account to keep, or the reason why there is none."""
    try:
        acting = coordinates(g, h, w0, loss)
    except Unaccounted as reason:
        return None, str(reason)
    saves = [*range(0, len(rates), every), len(rates)]
    return Ledger(acting, lr, momentum, rates, saves), None


def drawn_amplitudes(
    caller: str, loss: Loss, batch: int | None, label_noise: float | Schedule, times: NDArray[Any]
) -> Array | None:
    """Return the label noise at each time; None where every step takes the whole loss as it is."""
    noise = label_noise.rate(times) if isinstance(label_noise, Schedule) else label_noise
    amplitudes = np.broadcast_to(np.asarray(noise, dtype=np.float64), times.shape)
    if not (np.isfinite(amplitudes) & (amplitudes >= 0)).all():
        raise ValueError(f"{caller}: label_noise must be finite and >= 0, got {label_noise}")
    if batch is None and not amplitudes.any():
        return None
    if not isinstance(loss, LeastSquares):
        raise TypeError(
            f"{caller}: batch and label_noise must have rows to draw from, got a loss of type "
            f"{type(loss).__name__}. Use LeastSquares."
        )
    if batch is not None and not 1 <= batch <= len(loss.y):
        raise ValueError(f"{caller}: batch must be in [1, {len(loss.y)}], got {batch}")
    return amplitudes


def _check_arguments(
    schedule: Schedule,
    lr: float,
    steps: int,
    momentum: float,
    save_every: int | None,
    split_every: int,
) -> None:
    """Name the first bad argument."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"descend: schedule must be a Schedule, as Constant(0.1), got {schedule!r}")
    if not 0 < lr < float("inf"):
        raise ValueError(f"descend: lr must be positive and finite, got {lr}")
    if steps < 1:
        raise ValueError(f"descend: steps must be >= 1, got {steps}")
    if not 0 <= momentum < 1:
        raise ValueError(f"descend: momentum must be in [0, 1), got {momentum}")
    if save_every is not None and save_every < 1:
        raise ValueError(f"descend: save_every must be >= 1, got {save_every}")
    if split_every < 1:
        raise ValueError(f"descend: split_every must be >= 1, got {split_every}")
