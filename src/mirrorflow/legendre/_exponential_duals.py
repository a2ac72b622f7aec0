"""Dual problems of x with one exponential for each coordinate: sinh, and one-sided."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ._kernels import LOG_2, exp_sinh_cosh, outside_cone
from .dual import Array, ExponentialDual

__all__ = ["ColumnDual", "HyperbolicDual", "OneSidedDual", "flat", "shared_slope"]

LARGE = 5_000_000  # r^2 d, from which Newton steps are computed in single precision
APART = 1e-9  # distance from b to the x of the right signs that proves Zx = b infeasible


def flat(value: torch.Tensor) -> Array:
    """Return a float64 vector."""
    return value.detach().cpu().numpy().astype(np.float64, copy=False).reshape(-1)


def shared_slope(slope: float | torch.Tensor) -> float | None:
    """Return the one value of a slope, or None if it differs between coordinates."""
    if not isinstance(slope, torch.Tensor):
        return float(slope)
    lowest, highest = float(slope.min()), float(slope.max())
    return lowest if lowest == highest else None


class ColumnDual(ExponentialDual):
    """A dual with one exponent for each column of Q: t = s Q^T theta + shift, or sigma times it."""

    one_sided: bool  # whether x keeps its signs

    def __init__(self, Q: Array, speed: float, shift: Array | float) -> None:
        self.Q, self.QT, self.speed, self.shift = Q, np.ascontiguousarray(Q.T), speed, shift
        self.large = self.QT.size * len(Q) > LARGE

    @cached_property
    def single_precision(self) -> NDArray[np.float32] | None:
        """Q^T in single precision, where systems are so large that it pays."""
        return self.QT.astype(np.float32) if self.large else None

    def basis(self) -> Array:
        """Return Q^T."""
        return self.QT

    def max_exponent_change(self, step: Array) -> float:
        """Return the largest change of an exponent along a step."""
        return float(self.speed * np.abs(self.QT @ step).max(initial=0.0))

    @abstractmethod
    def log_scale(self, tau: float) -> Array:
        """Return log(|x| e^-t) for large exponents t."""

    @abstractmethod
    def signs(self) -> Array | float:
        """Return the signs that x keeps, or 1."""

    def signed(self) -> Array:
        """Return Q, its columns turned to the signs that x keeps, if it does."""
        return self.Q * self.signs() if self.one_sided else self.Q


class HyperbolicDual(ColumnDual):
    """x = A sinh(s Q^T theta + rho)."""

    one_sided = False

    def __init__(self, Q: Array, log_A: Array, rho: Array, speed: float) -> None:
        super().__init__(Q, speed, rho)
        self.log_A = log_A

    def evaluate(self, theta: Array, tau: float) -> None:
        """Compute x and its derivative; see `ExponentialDual`."""
        t = self.QT @ (self.speed * theta)
        t += self.shift
        self.largest = float(np.abs(t).max(initial=0.0))
        # x = A e^tau sinh t and (dx/dmu) / s = A e^tau cosh t: Eq. (9) with errata 1.
        self.x, self.weight = exp_sinh_cosh(self.log_A + tau, t)
        self.mass = self.x  # d x / d tau at fixed theta: tau only scales

    def ceiling(self, theta: Array) -> float:
        """Return the largest |<theta, Qx>|, of either sign."""
        return float(np.abs(self.QT @ theta).max(initial=0.0))  # the dual norm of L1

    def starting_scale(self) -> float:
        """Return the scale at which the largest x(0) is about 1."""
        # x(0) = A e^tau sinh(rho), about e^{tau + log A + |rho|} / 2.
        return LOG_2 - float((self.log_A + np.abs(self.shift)).max(initial=-np.inf))

    def log_scale(self, tau: float) -> Array:
        """Return log(A/2)."""
        return self.log_A - LOG_2 + tau

    def signs(self) -> float:
        """Return 1: x has either sign."""
        return 1.0


class OneSidedDual(ColumnDual):
    """x = sigma X_0 e^{tau + s sigma Q^T theta}, sigma = +-1 per coordinate."""

    one_sided = True

    def __init__(self, Q: Array, log_x0: Array, sign: Array, speed: float) -> None:
        super().__init__(Q, speed, 0.0)
        self.log_x0, self.sign = log_x0, sign

    def evaluate(self, theta: Array, tau: float) -> None:
        """Compute x and its derivative; see `ExponentialDual`."""
        t = self.speed * self.sign * (self.QT @ theta)
        self.largest = float(np.abs(t).max(initial=0.0))
        # |x| = X_0 e^{tau + t}, Eq. (10); (dx/dmu) / s is |x| as well, since sigma^2 = 1.
        self.weight = np.exp(self.log_x0 + tau + t)
        self.x = self.mass = self.sign * self.weight

    def ceiling(self, theta: Array) -> float:
        """Return the largest <theta, Qx> for the signs that x has."""
        return float((self.sign * (self.QT @ theta)).max(initial=0.0))

    def starting_scale(self) -> float:
        """Return the scale at which the largest x(0) is about 1."""
        return -float(self.log_x0.max(initial=-np.inf))

    def log_scale(self, tau: float) -> Array:
        """Return log X_0."""
        return self.log_x0 + tau

    def signs(self) -> Array:
        """Return sigma."""
        return self.sign

    def certifies_infeasible(self, b: Array, theta: Array) -> bool:
        """Return whether b, of norm 1 or 0, is outside the cone of the signed columns of Q."""
        # Farkas: some x with these signs has Qx = b unless b is off their cone, by NNLS's distance.
        return outside_cone(self.Q * self.sign, b, APART)
