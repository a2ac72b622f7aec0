"""Products of factors, coordinate by coordinate."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .model import Parameters, Reparam, factors

__all__ = ["Depth", "Hadamard", "reset_geometry"]


class _Products(Reparam):
    """Products of factors, coordinate by coordinate."""

    elementwise = True
    alike = True
    takes_arrays = True

    def penalty_advice(self, h: Any, mixed: bool) -> str:
        """Return what commutes with a product: for more than two factors, up to a clock."""
        if len(self.names) > 2:
            return (
                "A product of more than two factors commutes with multiples of its coordinates "
                "and, up to a change of clock, with WeightDecay()."
            )
        return (
            "h must commute with every coordinate of g: WeightDecay() does, and so do multiples of "
            f"the coordinates {'_i '.join(self.names)}_i."
        )


class Hadamard(_Products):
    """x = m * w, the diagonal linear network (Section 4)."""

    names = ("m", "w")

    def __call__(self, w: Parameters) -> Tensor:
        """Multiply the two factors."""
        m, v = w
        return m * v

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Return (w dx, m dx)."""
        m, v = w
        return v * dx, m * dx


class Depth(_Products):
    """x = w_1 * w_2 * … * w_k, the deep diagonal network (Theorem D.2).

    Parameters
    ----------
    k : int
        The number of factors, >= 2. ``Depth(2)`` equals `Hadamard`.
    """

    def __init__(self, k: int) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 2:
            raise ValueError(f"Depth: k must be an integer >= 2, got {k!r}")
        self.k = k
        self.names = tuple(f"w{i + 1}" for i in range(k))

    def __call__(self, w: Parameters) -> Tensor:
        """Multiply all factors."""
        return reduce(operator.mul, factors(w))

    def pullback(self, w: Parameters, dx: Tensor) -> Parameters:
        """Return dx times the product of the other factors, without dividing by one that is 0."""
        parts = factors(w)
        others = (parts[:i] + parts[i + 1 :] for i in range(self.k))
        return tuple(reduce(operator.mul, other) * dx for other in others)

    def __repr__(self) -> str:
        """Show the number of factors."""
        return f"Depth(k={self.k})"


def reset_geometry(x: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    r"""Return factors (m, w) of x = m * w with m^2 - w^2 = beta: the geometry of a fresh start.

    .. math:: m^2 = \tfrac12 \bigl(\sqrt{4 x^2 + \beta^2} + \beta\bigr), \qquad w = x / m

    Training moves x in a metric that depends on x and on ``|m^2 - w^2|``, which decay lowers to
    e^{2a} of what it was. With beta = ``|m_0^2 - w_0^2|`` the scale is again that of the first
    start (arXiv 2504.12801 does it in steps), and the centre is the present x: training then ends
    at the solution of least D_{R_0}(., x), not at argmin R_0 of the first start.

    Parameters
    ----------
    x : Tensor
        The model.
    beta : float or Tensor
        The imbalance, > 0; one number, or one for each coordinate.

    Raises
    ------
    ValueError
        If beta is not positive and finite.

    Examples
    --------
    >>> m, w = reset_geometry(torch.tensor([0.0, -1.2]), 1.0)
    >>> m * w, (m**2 - w**2).round(decimals=6)
    (tensor([ 0.0000, -1.2000]), tensor([1., 1.]))
    """
    size = torch.as_tensor(beta, dtype=x.dtype, device=x.device)
    if not bool((torch.isfinite(size) & (size > 0)).all()):
        raise ValueError(f"reset_geometry: beta must be positive and finite, got {beta}")
    m = torch.sqrt((torch.hypot(2 * x, size) + size) / 2)
    return m, x / m
