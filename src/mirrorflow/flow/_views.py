r"""The coordinates in which a flow can be integrated: w, mu (or theta), and x."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._loss import LeastSquares, slope
from .._solution import Path
from ..legendre import LegendreFunction, legendre
from ..legendre.dual import ArrayPrimal
from ..regularizer import Regularizer
from ..reparam import Parameters, Reparam, factors, flatten, unflatten
from ..schedule import Schedule

__all__ = [
    "Array",
    "ArrayMirrorView",
    "ArrayParameterView",
    "ClockedView",
    "Coordinates",
    "Loss",
    "MirrorView",
    "ParameterView",
    "PrimalView",
    "make",
]

Array = NDArray[np.float64]
Loss = Callable[[Tensor], Tensor]
Product = Callable[[Array], Array]
# Before 1.16 LSODA read bands in a wider array than documented: it then differentiates itself.
READS_BANDS = tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 16)


class Coordinates(ABC):
    """One view of the flow: its start, its velocity, and how to read x, mu and w from it.

    Attributes
    ----------
    problems : int
        The number m of problems, of each of which every part of the state has a row.
    parts : list of int
        The lengths of the arrays that are joined to the state.
    band : int or None
        The entries of dy/dt depend on so many of y on either side; None where they do on all.
    """

    parts: list[int]
    band: int | None = None

    def __init__(self, loss: Loss, g: Reparam, w0: Parameters) -> None:
        self.loss, self.g, self.w0 = loss, g, w0
        self.shape, self.dtype = g(w0).shape, factors(w0)[0].dtype
        # Least squares: mu = Z^T theta, so that n numbers theta replace mu; for m problems m rows.
        self.linear = loss if isinstance(loss, LeastSquares) else None
        self.duals = self.linear.y.numel() if self.linear else self.shape.numel()
        self.problems = self.duals // len(self.linear.y) if self.linear else 1

    @abstractmethod
    def start(self) -> Array:
        """Return the state at t = 0."""

    @abstractmethod
    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        """Return dy/dt."""

    @abstractmethod
    def scales(self, a: float) -> Array:
        """Return the smallest size of each entry of the state, for the absolute tolerance."""

    @abstractmethod
    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        """Read the trajectory from the saved states."""

    def jacobian(self, schedule: Schedule) -> Callable[[float, Array], Array] | None:
        """Return d velocity / dy, where it is cheap."""
        return None

    def slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return grad f(x), and what mu is integrated from: grad f, or (Zx - y)/n."""
        if self.linear:
            residual = self.linear.dual_gradient(self.linear.predict(x))
            carried = residual.mT if self.linear.several else residual
            return self.linear.transpose(residual), carried
        if not torch.isfinite(x).all():
            return torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        gradient = slope(self.loss, x)
        return gradient, gradient

    def dual_scales(self) -> Array:
        """Return the change of each dual number that changes an entry of mu by about 1."""
        Z = self.linear.Z.flatten(1) if self.linear else torch.ones(1, 1)
        return np.full(self.duals, 1 / (float(Z.norm(dim=0).max()) or 1.0))

    def mu(self, dual: Tensor) -> Tensor:
        """Return mu from what was integrated; rows are times."""
        if self.linear:
            dual = dual.reshape(-1, len(self.linear.y)) @ self.linear.Z.flatten(1)
        return self.g.project(dual.reshape(-1, *self.shape))

    def tensor(self, y: Array) -> Tensor:
        """Return a state in the dtype of w0, in which everything is evaluated."""
        return torch.from_numpy(y).to(self.dtype)


class ParameterView(Coordinates):
    """State (w, mu): the flow as it is trained, with mu carried along."""

    def __init__(self, loss: Loss, g: Reparam, h: Regularizer, w0: Parameters) -> None:
        super().__init__(loss, g, w0)
        self.h, self.size = h, flatten(w0).numel()
        self.parts = [*(f.numel() for f in factors(w0)), self.duals]

    def start(self) -> Array:
        """Return (w0, 0)."""
        return np.concatenate([_numpy(flatten(self.w0)), np.zeros(self.duals)])

    def scales(self, a: float) -> Array:
        """Return the size of w where it has decayed most, and 1 in mu."""
        size = np.exp(2 * a) * _smallest(flatten(self.w0))  # weights decay like e^a or e^{2a}
        return np.concatenate([np.full(self.size, size), self.dual_scales()])

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        """Return -(J_g^T grad f + alpha grad h) and -grad f."""
        rate = schedule.rate(t)
        w = unflatten(self.tensor(y[: self.size]), self.w0)
        slope, carried = self.slope(self.g(w))
        dw = flatten(self.g.pullback(w, slope))
        if rate:
            dw = dw + rate * flatten(self.h.gradient(w, self.g))
        return -_numpy(torch.cat([dw, carried.reshape(-1)]))

    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        """Read w and mu, and x = g(w)."""
        state = self.tensor(y)
        parts = torch.split(state[:, : self.size], [f.numel() for f in factors(self.w0)], dim=1)
        w = tuple(p.reshape(-1, *f.shape) for p, f in zip(parts, factors(self.w0), strict=True))
        rows = w[0] if isinstance(self.w0, Tensor) else w
        x = torch.func.vmap(self.g)(rows)
        return Path(torch.from_numpy(t), x, self.mu(state[:, self.size :]), _a(schedule, t), rows)


class ArrayParameterView(ParameterView):
    """The parameter view with least squares, in NumPy, of a pair whose formulas take arrays."""

    def __init__(self, loss: LeastSquares, g: Reparam, h: Regularizer, w0: Parameters) -> None:
        super().__init__(loss, g, h, w0)
        Z, ZT, self.y = _scaled(loss)
        self.measured, self.pulled = _products(loss, Z, ZT)
        self.cuts = np.cumsum([f.numel() for f in factors(self.w0)])

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        """Return -(J_g^T Z^T r + alpha grad h) and -r, r = (Zx - y)/n."""
        rate, (*w, _) = schedule.rate(t), np.split(y, self.cuts)
        parts: Any = tuple(w)
        x: Any = self.g(parts)  # arrays, as the parts are
        residual = self.measured(x) - self.y
        slope: Any = self.pulled(residual)
        moved = self.g.pullback(parts, slope)
        decay: Any = self.h.gradient(parts, self.g)
        steps = [m + rate * d for m, d in zip(moved, decay, strict=True)]
        return -np.concatenate([*steps, residual])


class MirrorView(Coordinates):
    """State mu (or theta with mu = Z^T theta): x = primal(mu, a_t)."""

    def __init__(self, loss: Loss, g: Reparam, w0: Parameters, R: LegendreFunction) -> None:
        super().__init__(loss, g, w0)
        self.R, self.parts = R, [self.duals] * (2 if R.clocked else 1)

    def start(self) -> Array:
        """Return mu = 0."""
        return np.zeros(self.duals)

    def scales(self, a: float) -> Array:
        """Return 1 in mu."""
        return self.dual_scales()

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        """Return -grad f at x = primal(mu, a_t)."""
        mu = self.mu(self.tensor(y))[0]
        return -_numpy(self.slope(self.R.primal(mu, schedule.accumulated(t)))[1]).reshape(-1)

    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        """Read mu, and x = primal(mu, a_t)."""
        a, mu = _a(schedule, t), self.mu(self.tensor(y))
        if self.R.elementwise:
            x = self.R.primal(mu, a.to(self.dtype).reshape(-1, *[1] * len(self.shape)))
        else:
            x = torch.stack([self.R.primal(m, float(ai)) for m, ai in zip(mu, a, strict=True)])
        return Path(torch.from_numpy(t), x, mu, a)


class ClockedView(MirrorView):
    r"""State (nu, mu), for an R whose dual variable runs on a clock of its own.

    x = primal(nu, a_t), dnu = clock(a_t) dmu and dmu = -grad f dt, or theta and theta' with
    nu = Z^T theta, mu = Z^T theta'. mu is carried along, so that it is in the path of every view.
    """

    def start(self) -> Array:
        """Return nu = mu = 0."""
        return np.zeros(2 * self.duals)

    def scales(self, a: float) -> Array:
        """Return 1 in nu and in mu."""
        return np.tile(self.dual_scales(), 2)

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        """Return -clock(a_t) grad f and -grad f at x = primal(nu, a_t)."""
        slope = super().velocity(t, y[: self.duals], schedule)
        return np.concatenate([self.R.clock(schedule.accumulated(t)) * slope, slope])

    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        """Read x = primal(nu, a_t) and mu."""
        clocked = super().path(t, y[:, : self.duals], schedule)
        return Path(clocked.t, clocked.x, self.mu(self.tensor(y[:, self.duals :])), clocked.a)


class ArrayMirrorView(MirrorView):
    """The mirror view with least squares, in NumPy, of an R that knows x and d x / d mu there."""

    def __init__(
        self,
        loss: LeastSquares,
        g: Reparam,
        w0: Parameters,
        R: LegendreFunction,
        primal: ArrayPrimal,
    ) -> None:
        super().__init__(loss, g, w0, R)
        self.primal = primal
        self.Z, self.ZT, self.y = _scaled(loss)
        self.measured, self.pulled = _products(loss, self.Z, self.ZT)
        self.rows = (self.problems, 1, -1) if loss.several else (-1,)

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        """Return -(Zx - y)/n at x = primal(Z^T theta, a_t)."""
        return self.y - self.measured(self.primal(self.pulled(y), schedule.accumulated(t))[0])

    def jacobian(self, schedule: Schedule) -> Callable[[float, Array], Array]:
        """Return -Z diag(d primal/dmu) Z^T / n, for m problems of shape (m, n, n)."""

        def jacobian(t: float, y: Array) -> Array:
            slope = self.primal(self.pulled(y), schedule.accumulated(t))[1]
            return (self.Z * -slope.reshape(self.rows)) @ self.ZT

        return jacobian


class PrimalView(Coordinates):
    """State (x, mu): the Riemannian gradient flow of Eq. (7), with mu carried along."""

    def __init__(self, loss: Loss, g: Reparam, w0: Parameters, R: LegendreFunction) -> None:
        super().__init__(loss, g, w0)
        self.R, self.size = R, self.shape.numel()
        self.parts = [self.size, self.duals]

    def start(self) -> Array:
        """Return (g(w0), 0)."""
        return np.concatenate([_numpy(self.g(self.w0)).reshape(-1), np.zeros(self.duals)])

    def scales(self, a: float) -> Array:
        """Return what 1 in mu changes in x where that is least, and 1 in mu."""
        # That is J J^T, which decays like e^{2a}, or e^{4a}, or e^{(2k-2) a} for degree k.
        pulled = flatten(self.g.pullback(self.w0, torch.ones(self.shape, dtype=self.dtype)))
        decay = min(np.exp(4 * a), np.exp(2 * a) * self.R.clock(a) ** 2)
        size = decay * _smallest(pulled) ** 2
        return np.concatenate([np.full(self.size, size), self.dual_scales()])

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        """Return Eq. (7) with the time derivative of R_a's gradient, and -grad f."""
        rate, a = schedule.rate(t), schedule.accumulated(t)
        x = self.tensor(y[: self.size]).reshape(self.shape)
        slope, carried = self.slope(x)
        dmu = self.g.project(slope) * self.R.clock(a)
        dx = self._pushed(self.R.mirror(x, a), a, dmu, rate)
        return -np.concatenate([_numpy(dx).reshape(-1), _numpy(carried).reshape(-1)])

    def _pushed(self, mu: Tensor, a: float, dmu: Tensor, da: float) -> Tensor:
        """Return d primal/dmu dmu + d primal/da da."""
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
        """Read x and mu."""
        state = self.tensor(y)
        x = state[:, : self.size].reshape(-1, *self.shape)
        return Path(torch.from_numpy(t), x, self.mu(state[:, self.size :]), _a(schedule, t))


class ByProblem(Coordinates):
    """A view of m problems, with the entries of each problem in one block of the state.

    Its Jacobian is then a band of the width of one problem, which is what LSODA can use.
    """

    def __init__(self, view: Coordinates) -> None:
        self.view, self.problems = view, view.problems
        problem = np.concatenate([np.arange(p) // (p // self.problems) for p in view.parts])
        self.order = np.argsort(problem, kind="stable")
        self.back = np.argsort(self.order)
        self.band = len(problem) // self.problems - 1

    def start(self) -> Array:
        """Return the start of the view, in blocks."""
        return self.view.start()[self.order]

    def scales(self, a: float) -> Array:
        """Return the scales of the view, in blocks."""
        return self.view.scales(a)[self.order]

    def velocity(self, t: float, y: Array, schedule: Schedule) -> Array:
        """Return the velocity of the view, in blocks."""
        return self.view.velocity(t, y[self.back], schedule)[self.order]

    def path(self, t: Array, y: Array, schedule: Schedule) -> Path:
        """Read the trajectory of the view."""
        return self.view.path(t, y[:, self.back], schedule)

    def jacobian(self, schedule: Schedule) -> Callable[[float, Array], Array] | None:
        """Return the blocks on the diagonal as the bands that LSODA reads."""
        blocks = self.view.jacobian(schedule) if READS_BANDS else None
        return None if blocks is None else lambda t, y: _bands(blocks(t, y))


def make(view: str, loss: Loss, g: Reparam, h: Regularizer, w0: Parameters) -> Coordinates:
    """Choose the coordinates of a view."""
    coordinates = _chosen(view, loss, g, h, w0)
    if isinstance(loss, LeastSquares) and loss.several:
        return ByProblem(coordinates)
    return coordinates


def _chosen(view: str, loss: Loss, g: Reparam, h: Regularizer, w0: Parameters) -> Coordinates:
    """Choose the coordinates of one problem, or of several as rows."""
    linear = None  # the views in NumPy are for float64
    if isinstance(loss, LeastSquares) and loss.Z.dtype == torch.float64:
        linear = loss
    if view == "parameters":
        if linear and g.elementwise and g.takes_arrays and h.takes_arrays:
            return ArrayParameterView(linear, g, h, w0)
        return ParameterView(loss, g, h, w0)
    R = legendre(g, h, w0)
    if view == "primal":
        return PrimalView(loss, g, w0, R)
    if R.integrates_weights:
        # w(mu, a) is carried along: to integrate it anew from w0 at every step costs 50 times more.
        return ParameterView(loss, g, h, w0)
    if R.clocked:
        return ClockedView(loss, g, w0, R)
    primal = R.array_primal() if linear else None
    if linear and primal is not None:
        return ArrayMirrorView(linear, g, w0, R, primal)
    return MirrorView(loss, g, w0, R)


def _smallest(values: Tensor) -> float:
    """Return the smallest size of an entry that is not 0; 1 if all are."""
    sizes = values[values != 0].abs()
    return float(sizes.min()) if len(sizes) else 1.0


def _scaled(loss: LeastSquares) -> tuple[Array, Array, Array]:
    """Return Z/n, on flattened x, n (Z/n)^T, and y/n, flattened; for m problems in m rows.

    Z/n x - y/n is the derivative in the predictions.
    """
    n = len(loss.y)
    Z = _numpy(loss.Z).reshape(n, -1) / n
    return Z, np.ascontiguousarray(Z.T) * n, _numpy(loss.y.movedim(0, -1)).reshape(-1) / n


def _products(loss: LeastSquares, Z: Array, ZT: Array) -> tuple[Product, Product]:
    """Return the products of Z and ZT with flat arrays; for m problems with each of m rows."""
    if not loss.several:
        return Z.dot, ZT.dot
    return (
        lambda x: (x.reshape(-1, len(ZT)) @ Z.T).reshape(-1),
        lambda r: (r.reshape(-1, len(Z)) @ ZT.T).reshape(-1),
    )


def _bands(blocks: Array) -> Array:
    """Return the matrix with the diagonal blocks (m, n, n), entry (i, j) in row n - 1 + i - j."""
    m, n, _ = blocks.shape
    i, j = np.indices((n, n))
    bands = np.zeros((2 * n - 1, m, n))
    bands[n - 1 + i - j, :, j] = blocks.transpose(1, 2, 0)
    return bands.reshape(2 * n - 1, m * n)


def _a(schedule: Schedule, t: Array) -> Tensor:
    """Return a_t at the saved times."""
    return torch.from_numpy(np.asarray(schedule.accumulated(t)))


def _numpy(value: Tensor) -> Array:
    """Return a float64 NumPy array."""
    return value.detach().to(torch.float64).numpy()
