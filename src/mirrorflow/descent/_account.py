r"""The exact account of a run: what decay, step size and noise did to R_a, per coordinate.

Under gradient descent on x = m * w the two sums u, v = m +- w move by factors of their own, for any
gradient G in x: u <- (1 - eta alpha - eta G) u and v <- (1 - eta alpha + eta G) v. Two logarithms
are all that a run leaves behind, and they are the two arguments of R_a.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._loss import LeastSquares
from ..regularizer import Regularizer, Separable, WeightDecay
from ..reparam import Depth, Hadamard, Parameters, PowerDifference, Reparam, SymmetricFactor

__all__ = ["Account", "Ledger", "Unaccounted", "coordinates"]

Array = NDArray[np.float64]
CHUNK = 2**16  # numbers per factor that a ledger keeps before it takes logarithms
COMMUTING = 1e-10  # relative size of off-diagonal entries below which matrices commute


class Unaccounted(Exception):
    """The reason why a run has no exact account."""


@dataclass(frozen=True)
class Account:
    r"""What a run of discrete training has put into the two arguments of R_a, at each saved step.

    .. math:: a = \text{decay} + \text{step} + \text{noise}, \qquad
              \mathrm{mirror}(x_k, a_k) = \mu_k

    The identity on the right is exact for every step size, minibatch, label and loss.
    ``R.folded(a, tilt)`` puts one row of ``a``, and the `tilt`, into R, for `limit`.

    Attributes
    ----------
    a, mu : Tensor of shape (saves, d), or (saves, m, d) for m problems at once
        The accumulated regularization and the dual variable, per coordinate, in float64. Where a
        factor of a step was exactly 0 (lr alpha = 1, say), a is -infinity from then on, and mu,
        which is the logarithm of 0/0, is NaN.
    decay : Tensor of the same shape
        The a of the same steps without any gradient: sum log|1 - lr alpha| without momentum.
    step : Tensor of the same shape
        What the gradients of the whole loss, at the points that the run visited, add to that.
    noise : Tensor of the same shape
        The rest: minibatches and label noise. Zero where neither acts.
    basis : Tensor of shape (d, d), or None
        For U U^T, the shared eigenvectors, in columns: coordinate i is then the entry
        (V^T X V)_ii. None where the coordinates are those of x.
    """

    a: Tensor
    mu: Tensor
    decay: Tensor
    step: Tensor
    noise: Tensor
    basis: Tensor | None = None

    def tilt(self, Z: Tensor) -> Tensor:
        r"""Return the part of the last mu outside the row space of Z, of order (lr G)^3.

        R_a(x) - <tilt, x> is what the run minimizes subject to its last Zx, exactly: the mirror
        map of that function takes x to a dual variable Z^T theta.

        Parameters
        ----------
        Z : Tensor of shape (n, d)
            The measurements, in the coordinates of the account; the tilt of m problems is (m, d).

        Raises
        ------
        ValueError
            If Z does not have one column for each coordinate.
        """
        mu = self.mu[-1]
        mu = mu if Z.ndim == mu.ndim == 2 else mu.reshape(-1)  # m problems, each in a row
        if Z.ndim < 2 or Z[0].numel() != mu.shape[-1]:
            raise ValueError(
                f"tilt: Z must have shape (n, {mu.shape[-1]}), got {tuple(Z.shape)}. Pass "
                "measurements in the coordinates of the account."
            )
        rows = Z.detach().to(mu).reshape(len(Z), -1)
        # mu = Z^T theta + tilt, with the tilt orthogonal to the rows.
        _, s, Vh = torch.linalg.svd(rows, full_matrices=False)
        eps = torch.finfo(s.dtype).eps * max(rows.shape)
        span = Vh[s > eps * s.max().clamp(min=torch.finfo(s.dtype).tiny)]
        # Twice: what rounding leaves of a large mu is as large as the tilt.
        for _ in range(2):
            mu = mu - (mu @ span.T) @ span
        return mu.reshape(self.mu.shape[1:])


@dataclass(frozen=True)
class Coordinates:
    """How one step acts per coordinate: the factors move by 1 - lr (decay alpha +- slope G).

    ``read`` takes a stack of gradients to the coordinates in which that holds; ``basis``
    is the basis of U U^T. R_a has |u/u0| = e^{decay a + slope mu} and
    |v/v0| = e^{decay a - slope mu}.
    """

    slope: float
    decay: float
    read: Callable[[Tensor], Tensor]
    basis: Tensor | None = None


def coordinates(g: Reparam, h: Regularizer, w0: Parameters, loss: object) -> Coordinates:
    """Return how steps of the pair act per coordinate; `Unaccounted` where they do not."""
    plain = isinstance(h, WeightDecay)
    even = isinstance(h, Separable) and h.c is None
    match g:
        case Hadamard() | Depth(k=2) if plain:
            return Coordinates(1.0, 1.0, _same)  # m +- w, each by 1 - lr (alpha +- G)
        case PowerDifference(k=1) if plain or even:  # d(u^2)/du = 2u, and so for h
            return Coordinates(2.0, 1.0 if plain else 2.0, _same)
        case SymmetricFactor() if plain:
            return _matrix_coordinates(g(w0), loss)
        case _:
            raise Unaccounted(
                f"{g} with {h} has no exact account per coordinate: m * w and U U^T with "
                "WeightDecay do, and u^2 - v^2"
            )


def _matrix_coordinates(X0: Tensor, loss: object) -> Coordinates:
    """Return the coordinates of the eigenvectors that the start shares with all gradients."""
    if not isinstance(loss, LeastSquares):
        raise Unaccounted(
            "the account of U U^T needs LeastSquares, whose matrices show whether gradients commute"
        )
    Z = _double(torch.cat([X0[None], (loss.Z + loss.Z.mT) / 2]))
    sizes = Z.abs().amax((1, 2), keepdim=True)
    Z = Z / torch.where(sizes > 0, sizes, 1.0)
    # The eigenvectors of a generic combination are those of all, also where one has equal ones.
    mix = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 1.5, len(Z))).to(Z)
    V = torch.linalg.eigh((mix[:, None, None] * Z).sum(0))[1]
    inner = V.mT @ Z @ V
    off = float((inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max())
    if off > max(COMMUTING, 1e3 * torch.finfo(X0.dtype).eps):
        raise Unaccounted(
            f"U0 U0^T and the sensing matrices do not commute (off by {off:.1e}), so that U U^T "
            "has no exact account"
        )
    # x_i = x_0 e^{2 (a + mu)} has u alone. With v, which -G would move, a gets the even powers of
    # lr G and mu the odd ones: outside the row space mu is of third order, as for m * w.
    return Coordinates(1.0, 1.0, lambda G: ((G @ V) * V).sum(-2), V)


class Ledger:
    """The running account of one run: gradients in, logarithms of factors out."""

    def __init__(
        self, coordinates: Coordinates, lr: float, momentum: float, rates: Array, saves: list[int]
    ) -> None:
        self.coordinates, self.lr, self.momentum, self.saves = coordinates, lr, momentum, saves
        self.rates = torch.from_numpy(coordinates.decay * rates)
        self.alone = _decay_alone(self.rates.numpy(), lr, momentum)
        self.k = 0  # steps in ``total``
        self.size = 1
        self.gradients: list[Tensor] = []
        self.whole: list[Tensor] = []
        self.carried: Array | None = None  # c of the last step, per factor
        self.total: Tensor | None = None  # log|u/u0|, log|v/v0|, and those of the whole loss
        self.rows: list[Tensor] = []

    def record(self, gradient: Tensor, whole: Tensor) -> None:
        """Take the gradients of a step and of the whole loss, the same object if it is one."""
        if self.total is None and not self.gradients:
            self.size = max(1, min(256, CHUNK // max(1, gradient.numel())))
        self.gradients.append(gradient)
        if whole is not gradient:
            self.whole.append(whole)
        if len(self.gradients) == self.size:
            self._fold()

    def account(self, count: int) -> Account:
        """Return the account at the first ``count`` saves."""
        if self.gradients:
            self._fold()
        assert self.total is not None  # a run has at least one step
        slope, decay = self.coordinates.slope, self.coordinates.decay
        logs = torch.stack([torch.zeros_like(self.total), *self.rows])[:count]
        up, down = logs[:, 0::2], logs[:, 1::2]
        # log|u/u0| = decay a + slope mu, log|v/v0| = decay a - slope mu.
        pairs = (up + down) / (2 * decay)  # of this run, and last of the whole loss
        a, mu, whole = pairs[:, 0], (up - down)[:, 0] / (2 * slope), pairs[:, -1]
        alone = torch.from_numpy(self.alone[self.saves[:count]] / decay)
        alone = alone.reshape(-1, *[1] * (a.ndim - 1)).expand_as(a).clone()
        return Account(a, mu, alone, whole - alone, a - whole, self.coordinates.basis)

    def _fold(self) -> None:
        """Take the logarithms of the factors of the steps that were recorded."""
        count = len(self.gradients)
        c = self._drives(count)
        if self.momentum:
            self.carried = _carry(c.numpy(), self.lr, self.momentum, self.carried)
        sums = _log_factor(c.mul_(-self.lr)).cumsum(0)  # log|1 - lr c|
        if self.total is not None:
            sums += self.total
        first, last = np.searchsorted(self.saves, [self.k, self.k + count], side="right")
        self.rows += [sums[k - self.k - 1].clone() for k in self.saves[first:last]]
        self.total = sums[-1].clone()
        self.k += count
        self.gradients, self.whole = [], []

    def _drives(self, count: int) -> Tensor:
        """Return decay alpha +- slope G of each step, then with the gradient of the whole loss."""
        rates = self.rates[self.k : self.k + count]
        stacks = [torch.stack(kind) for kind in (self.gradients, self.whole) if kind]
        pushes = [self.coordinates.slope * self.coordinates.read(_double(s)) for s in stacks]
        rates = rates.reshape(-1, *[1] * (pushes[0].ndim - 1))
        return torch.stack([half for push in pushes for half in (rates + push, rates - push)], 1)


def _carry(c: Array, lr: float, momentum: float, last: Array | None) -> Array:
    r"""Add what the buffer of heavy-ball steps holds, in place; return the last row.

    u_{k+1} = u_k - lr b_k with b_k = m b_{k-1} + drive_k u_k gives, for c = b/u,
    c_k = drive_k + m c_{k-1} u_{k-1}/u_k, and u_k/u_{k-1} is 1 - lr c_{k-1}.
    """
    held = np.zeros_like(c[0]) if last is None else last
    with np.errstate(all="ignore"):  # a factor of exactly 0 has no ratio
        for row in c:
            row += momentum * held / (1 - lr * held)
            held = row
    return held.copy()


def _decay_alone(rates: Array, lr: float, momentum: float) -> Array:
    """Return the logarithm of the factor without gradients, after 0, 1, ... steps."""
    c = rates
    if momentum:
        last, applied = 0.0, []
        for rate in rates.tolist():
            left = 1 - lr * last
            last = rate + (momentum * last / left if left else float("nan"))  # `_carry` with G = 0
            applied.append(last)
        c = np.array(applied)
    logs = _log_factor(torch.from_numpy(-lr * c)).numpy()
    return np.concatenate([[0.0], np.cumsum(logs)])


def _log_factor(z: Tensor) -> Tensor:
    """Return log|1 + z|, accurate for small z; a factor may be negative, as x has its square."""
    # |1 + z| = 1 + (-2 - z) where 1 + z < 0
    return torch.log1p(torch.where(z > -1, z, -2 - z))


def _double(stack: Tensor) -> Tensor:
    """Return float64 on the CPU."""
    return stack.detach().to("cpu", torch.float64)


def _same(stack: Tensor) -> Tensor:
    """Return the gradients themselves."""
    return stack
