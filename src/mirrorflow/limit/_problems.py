r"""The Legendre functions whose conjugate is a sum of exponentials, as one kind of dual problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..legendre import (
    HyperbolicEntropy,
    LegendreFunction,
    MatrixEntropy,
    OneSidedEntropy,
    QuadraticEntropy,
    RangeError,
)
from ._constraints import Rows, length
from ._continuation import Point, follow
from ._duals import (
    ColumnDual,
    ExponentialDual,
    HyperbolicDual,
    MatrixDual,
    OneSidedDual,
    smat,
    svec,
)
from ._l1_vertex import at_vertex

__all__ = ["Family", "family"]

Array = NDArray[np.float64]
LARGEST = 600.0  # log of the largest scale of x: some room to 709, where float64 ends


@dataclass(frozen=True)
class Family:
    """How a Legendre function becomes the dual problem ``Z' x' = y`` of `follow`.

    Attributes
    ----------
    Z : array of shape (n, d')
        The measurements in the coordinates x'.
    make : callable
        Gives the dual from (Q, a, log_unit), for x' in units of e^log_unit.
    top : callable
        Gives the logarithm of the largest scale of x at ``a``.
    decay : float or None
        The slope in ``a`` of a log-scale that all coordinates share; None if they share none.
    expand : callable
        Gives x, flattened, from x'.
    """

    Z: Array
    make: Callable[[Array, float, float], ExponentialDual]
    top: Callable[[float], float]
    decay: float | None
    expand: Callable[[Array], Array]

    def solve(self, rows: Rows, a: Sequence[float], max_steps: int) -> list[Point]:
        """Solve for each ``a``: along one path where the log-scale is shared, else one by one."""
        for ai in a:
            if self.top(ai) > LARGEST:
                raise RangeError(
                    f"a = {ai}: x has the scale e^{self.top(ai):.0f}, beyond float64; a is "
                    "-int alpha dt, negative for decay"
                )
        if self.decay is None:
            return [self._follow(rows, ai, [0.0], max_steps)[0] for ai in a]
        scales = self.decay * np.asarray(a)
        order = np.argsort(-scales, kind="stable")
        lowest = int(order[-1])
        taus = [float(scales[i] - scales[lowest]) for i in order]
        points = self._follow(rows, a[lowest], taus, max_steps)
        return [points[i] for i in np.argsort(order)]

    def _follow(self, rows: Rows, a: float, taus: list[float], max_steps: int) -> list[Point]:
        """Solve in units in which b has norm 1, or, where y is 0, in units of x at theta = 0."""
        size = length(rows.b)
        log_unit = math.log(size) if size > 0 else self.top(a)
        if not math.isfinite(log_unit):  # no coordinate at all
            log_unit = 0.0
        unit = math.exp(log_unit)  # may underflow where y is 0: then so does x
        dual, b = self.make(rows.Q, a, log_unit), rows.b / (unit if size > 0 else 1.0)
        vertex = None
        if isinstance(dual, ColumnDual) and dual.large and len(taus) == 1 and size > 0:
            vertex = at_vertex(dual, b, taus[0])
        points = [vertex] if vertex else follow(dual, b, taus, max_steps)
        return [replace(p, x=self.expand(p.x * unit)) for p in points]


def family(R: LegendreFunction, Z: Array) -> Family | None:
    """Give the family of R for the measurements Z (n, d), or None where R has none."""
    match R:
        case HyperbolicEntropy():
            return _hyperbolic(R, Z)
        case OneSidedEntropy():
            return _one_sided(R, Z)
        case QuadraticEntropy():
            return _quadratic(R, Z)
        case MatrixEntropy():
            return _matrix(R, Z)
        case _:
            return None


def _hyperbolic(R: HyperbolicEntropy, Z: Array) -> Family:
    def make(Q: Array, a: float, log_unit: float) -> ExponentialDual:
        return HyperbolicDual(Q, _flat(R.log_A(a)) - log_unit, _flat(R.rho(a)), R.speed)

    decay, drift = _shared(R.decay), _shared(R.drift)

    def top(a: float) -> float:
        return float((_flat(R.log_A(a)) + np.abs(_flat(R.rho(a)))).max(initial=-np.inf))

    return Family(Z, make, top, decay if drift == 0 else None, _same)


def _one_sided(R: OneSidedEntropy, Z: Array) -> Family:
    def make(Q: Array, a: float, log_unit: float) -> ExponentialDual:
        return OneSidedDual(Q, _flat(R.log_scale(a)) - log_unit, _flat(R.sign), R.speed)

    def top(a: float) -> float:
        return float(_flat(R.log_scale(a)).max(initial=-np.inf))

    return Family(Z, make, top, _shared(R.decay), _same)


def _quadratic(R: QuadraticEntropy, Z: Array) -> Family:
    """Solve for the halved squares s_k of w in the eigenbasis: x = Lambda s, s > 0 one-sided."""
    eigenvalues = R.eigenvalues.numpy().astype(np.float64)

    def make(Q: Array, a: float, log_unit: float) -> ExponentialDual:
        log_s = _flat(R.log_c2) + 2 * a - math.log(2) - log_unit
        return OneSidedDual(Q, log_s, np.ones(len(log_s)), 2.0)

    def top(a: float) -> float:
        return float(_flat(R.log_c2).max(initial=-np.inf)) + 2 * a

    return Family(Z @ eigenvalues, make, top, 2.0, lambda s: eigenvalues @ s)


def _matrix(R: MatrixEntropy, Z: Array) -> Family:
    full = Z.reshape(-1, R.n, R.n)

    def make(Q: Array, a: float, log_unit: float) -> ExponentialDual:
        return MatrixDual(Q, R.n, float(R.log_scale(a)) - log_unit)

    half = svec((full + full.transpose(0, 2, 1)) / 2)

    def top(a: float) -> float:
        return float(R.log_scale(a))

    return Family(half, make, top, 2.0, lambda v: smat(v, R.n).reshape(-1))


def _flat(value: torch.Tensor) -> Array:
    """Give a float64 vector."""
    return value.detach().numpy().astype(np.float64, copy=False).reshape(-1)


def _shared(slope: float | torch.Tensor) -> float | None:
    """Give the one value of a slope, or None if it differs between coordinates."""
    if not isinstance(slope, torch.Tensor):
        return float(slope)
    lowest, highest = float(slope.min()), float(slope.max())
    return lowest if lowest == highest else None


def _same(x: Array) -> Array:
    """Give x' itself."""
    return x
