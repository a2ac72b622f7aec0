r"""Derivatives of an elementwise g without automatic differentiation, and when not to use them."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from ..reparam import Parameters, Reparam

__all__ = ["ComplexStep"]

# Of the size of w: its square is far below rounding also where w falls by e^{-80} within a step of
# an integration, and it is itself far above underflow.
STEP = 1e-60
AGREED = 1e-11  # relative to the largest derivative of a coordinate

Array = NDArray[np.float64]


class ComplexStep:
    r"""The derivatives of an analytic x_i = g(w_i1, ..., w_ik) at real w, to rounding.

    .. math:: \frac{\partial g}{\partial w_j} = \frac{\operatorname{Im} g(w + i h e_j)}{h}
              + O(h^2)

    Nothing is subtracted, so that h may be as small as 1e-60 times w (Squire and Trapp 1998, SIAM
    Review 40). One call of g does all factors, and nothing is recorded. It is wrong where g is not
    analytic (absolute values, rounding, a branch by the sign of w) or not elementwise: `agrees`
    compares it with automatic differentiation, and whoever integrates asks it for every state.

    Parameters
    ----------
    g : Reparam
        The parametrization.
    pair : bool
        Whether g takes a tuple of factors; else one tensor.
    shape : tuple of int
        The shape (k, ...) of the stacked factors.
    """

    def __init__(self, g: Reparam, pair: bool, shape: tuple[int, ...]) -> None:
        self.g, self.shape = g, shape
        count, rest = self.shape[0], self.shape[1:]
        # at[j, k] is factor j where factor k takes the step.
        at = np.zeros((count, *self.shape), dtype=np.complex128)
        self.real = at.real
        self.imag = at.imag.reshape(count * count, *rest)[:: count + 1]  # at[j, j], a view
        stepped = torch.from_numpy(at)
        self.w: Parameters = tuple(stepped.unbind(0)) if pair else stepped[0]
        self.per_step = np.ones(rest)
        self.direction = torch.from_numpy(np.random.default_rng(0).uniform(1.0, 2.0, rest))

    def adapt(self, state: Array) -> None:
        """Take steps that are small against the factors of each coordinate."""
        size = np.abs(state).max(0)
        self.imag[:] = STEP * np.where(size > 0, size, 1.0)
        self.per_step = 1 / self.imag[0]

    def slopes(self, state: Array) -> Array | None:
        """Return dg / dw_j, stacked over j; None where g refuses complex numbers."""
        self.real[:] = state[:, None]
        try:
            x = self.g(self.w)
        except Exception:  # any: g is the user's, and was written for real numbers
            return None
        if x.dtype != torch.complex128 or tuple(x.shape) != self.shape:
            return None
        return np.imag(x.numpy(force=True)) * self.per_step

    def agrees(self, state: Array, pulled: Array) -> bool:
        """Return whether the derivatives are right at w, to whose size steps are adapted.

        Parameters
        ----------
        state : ndarray, shape (k, ...)
            The factors.
        pulled : ndarray, shape (k, ...)
            J_g^T of `direction` there, by automatic differentiation. Its random entries tell a g
            that is not elementwise: J^T v has the entries of v alone for a diagonal J only.
        """
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of numbers whose imaginary part is thrown away
            self.adapt(state)
            slopes = self.slopes(state)
        if slopes is None:
            return False
        apart = np.abs(slopes * self.direction.numpy() - pulled)
        return bool((apart <= AGREED * np.abs(pulled).max(0)).all())  # NaN: no
