r"""What a practitioner runs instead of the flow: gradient descent, with or without momentum."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._loss import LeastSquares, slope
from ._solution import Path, Solution, Status
from .regularizer import Regularizer, require_pair
from .reparam import Parameters, Reparam, factors
from .schedule import Schedule

__all__ = ["DescentStats", "descend"]

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DescentStats:
    """What a training run took."""

    steps: int
    seconds: float


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
) -> Solution:
    r"""Run gradient descent with the penalty in the gradient, as ``torch.optim.SGD`` does.

    .. math:: d_k = J_g^T \nabla f(x_k) + \alpha(k\,lr) \nabla h(w_k), \quad
              b_k = m b_{k-1} + d_k, \quad w_{k+1} = w_k - lr\, b_k

    Parameters
    ----------
    loss, g, h, w0, schedule
        As for `flow`; the schedule is read at the time t = k lr, so that both share a clock.
    lr : float
        The learning rate, > 0. For `SymmetricFactor` see its note on the factor 2.
    steps : int
        The number of steps, >= 1.
    momentum : float
        m in [0, 1). The buffer includes the decay, which lives on in it after it is switched off.
        Heavy-ball steps are 1/(1 - m) times as long: as lr -> 0, x at k lr is the flow's x at
        k lr/(1 - m), with the rate read at k lr. The a to put into R_a is then the path's a over
        1 - m.
    save_every : int, optional
        Save the state every so many steps; by default about 100 times.

    Returns
    -------
    Solution
        ``value`` the final x, ``path`` with t = k lr, x, a = -sum lr alpha, and w; ``status``
        completed, or diverged (with a RuntimeWarning): then the path ends, and ``value`` is, at the
        last save before NaN or infinity.

    Raises
    ------
    ValueError, TypeError
        If lr, steps, momentum, save_every, w0 or the shape or dtype of the measurements is bad.

    Examples
    --------
    >>> import mirrorflow as mf
    >>> zeros, ones = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    >>> loss, w0 = mf.LeastSquares(torch.diag(ones), ones), (zeros, ones)
    >>> sol = descend(loss, mf.Hadamard(), mf.WeightDecay(), w0, mf.Constant(0.0), 0.1, 500)
    >>> [round(x, 6) for x in sol.value.tolist()]
    [1.0, 1.0]
    """
    _check_arguments(schedule, lr, steps, momentum, save_every)
    require_pair("descend", g, h, w0)
    if isinstance(loss, LeastSquares):
        loss.require(g(w0), "descend")
    begun = time.perf_counter()
    # One call for all rates: the schedule at t = k lr, and the sums that a needs.
    rates = schedule.rate(lr * np.arange(steps))
    sums = np.concatenate([[0.0], -lr * np.cumsum(rates)])
    with torch.no_grad():
        run = _Run(loss, g, h, w0, lr, momentum, save_every or max(1, steps // 100))
        status = run.steps(rates.tolist())
    if not status.ok:
        warnings.warn(f"descend: {status.value} (by step {run.k})", RuntimeWarning, stacklevel=2)
    path = run.path(sums)
    return Solution(path.x[-1], status, DescentStats(run.k, time.perf_counter() - begun), path)


class _Run:
    """The loop over the steps, and what it keeps."""

    def __init__(
        self,
        loss: Loss,
        g: Reparam,
        h: Regularizer,
        w0: Parameters,
        lr: float,
        momentum: float,
        every: int,
    ) -> None:
        self.g, self.h, self.lr, self.momentum, self.every = g, h, lr, momentum, every
        self.gradient = loss.gradient if isinstance(loss, LeastSquares) else partial(slope, loss)
        self.one = isinstance(w0, Tensor)
        self.w = tuple(f.detach().clone() for f in factors(w0))
        self.buffer: tuple[Tensor, ...] | None = None
        self.k = 0
        self.saved = [(0, self.w, g(self.point()))]

    def point(self) -> Parameters:
        """Give the parameters with the structure of w0."""
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
        d = factors(self.g.pullback(w, self.gradient(self.g(w))))
        if rate:
            decay = factors(self.h.gradient(w, self.g))
            d = tuple(di + rate * hi for di, hi in zip(d, decay, strict=True))
        if self.momentum:
            if self.buffer is not None:
                d = tuple(self.momentum * b + di for b, di in zip(self.buffer, d, strict=True))
            self.buffer = d
        self.w = tuple(p - self.lr * di for p, di in zip(self.w, d, strict=True))

    def path(self, sums: NDArray[np.float64]) -> Path:
        """Stack what was saved."""
        k = [k for k, _, _ in self.saved]
        w = tuple(torch.stack(f) for f in zip(*(w for _, w, _ in self.saved), strict=True))
        t = torch.tensor(k, dtype=torch.float64) * self.lr
        x = torch.stack([x for _, _, x in self.saved])
        return Path(t, x, None, torch.from_numpy(sums[k]), w[0] if self.one else w)


def _check_arguments(
    schedule: Schedule, lr: float, steps: int, momentum: float, save_every: int | None
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
