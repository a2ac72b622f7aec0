r"""R_a of sign descent on m * w with decoupled decay: it tends to |x|^{3/2}, not to |x|."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reparam import Hadamard, Parameters, factors
from .base import LegendreFunction, Scalar, checked
from .dual import Array, ArrayPrimal

__all__ = ["SignEntropy"]

FAR = 340.0  # |a| up to which e^{2a} leaves room in float64


class SignEntropy(LegendreFunction):
    r"""R_a of x = m * w under dm = -sign(w grad f) dt - alpha m dt, and so for w.

    That is sign descent with decoupled decay, the limit of AdamW for betas of 0. With
    delta = e^a ``||w_0| - |m_0||``, which takes the place of m^2 - w^2 for gradient descent,

    .. math:: R_a(x) = e^{-a} \sum \Bigl[\tfrac{1}{12} (4|x| + \delta^2)^{3/2}
              - \tfrac12 \delta |x|\Bigr] - \langle \rho, x \rangle + \text{const}, \qquad
              R_a''(x) = e^{-a} / \sqrt{4|x| + \delta^2},

    rho = sign(x_0) min(``|m_0|, |w_0|``), which puts the centre at the start. Its dual variable has
    the sign of the gradient in it, and a clock:

    .. math:: \nabla R_{a_t}(x_t) = \nu_t, \qquad d\nu = -e^{-a} \operatorname{sign}(\nabla f)\,dt .

    R_a tends to (2/3) e^{-a} ``|x|^{3/2}`` as a falls: no amount of decay makes it an L1 norm.

    Parameters
    ----------
    delta : Tensor
        ``||w_0| - |m_0||`` per coordinate, > 0.
    rho : Tensor
        sign(x_0) min(``|m_0|, |w_0|``).

    Notes
    -----
    `limit` minimizes R_a subject to Zx = y. Sign descent does not end there: the signs of a
    gradient Z^T r are not in the row space of Z, and nor is nu. So the status of such an end is
    ``surrogate``; the law above is what holds along the way.

    Examples
    --------
    >>> R = SignEntropy.start((torch.tensor([0.0]).double(), torch.tensor([1.0]).double()))
    >>> R.primal(torch.tensor([2.0]).double(), 0.0)  # m = 2, w = 1 + 2
    tensor([6.], dtype=torch.float64)
    """

    elementwise = True
    clocked = True

    def __init__(self, delta: Tensor, rho: Tensor) -> None:
        if not bool((delta > 0).all()):
            raise ValueError(
                f"SignEntropy: delta must be > 0, got {float(delta.min())}. Start with |m| and |w| "
                "apart: from |m| = |w| both reach 0 together and stay."
            )
        self.delta, self.rho = delta, rho
        self.shape, self.dtype = delta.shape, delta.dtype

    @classmethod
    def start(cls, w0: Parameters) -> SignEntropy:
        """Read the constants from (m0, w0)."""
        Hadamard().validate(w0)
        m, w = factors(w0)
        small = torch.minimum(m.abs(), w.abs())
        # Both factors move at rate 1, so that |w| - |m| stays: beyond.md, sign descent, line 1.
        return cls((w.abs() - m.abs()).abs(), torch.sign(m * w) * small)

    def clock(self, a: Scalar) -> Any:
        """Return d nu / d mu = e^{-a}, mu = -int sign(grad f) dt."""
        return torch.exp(-a) if isinstance(a, Tensor) else math.exp(-a)

    def range(self, a: Scalar) -> tuple[Tensor, Tensor]:
        """Return all of R."""
        infinite = torch.full(self.shape, torch.inf, dtype=self.dtype)
        return -infinite, infinite

    def primal(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return ``e^{2a} sign(q) (q^2 + delta_0 |q|)``, q = nu + rho being the smaller factor."""
        checked(self, "mu", mu, a)
        q = mu + self.rho
        # The factors are e^a |q| and e^a (|q| + delta_0).
        return _squared(a) * q * (q.abs() + self.delta)

    def mirror(self, x: Tensor, a: Scalar) -> Tensor:
        """Return ``sign(x) (sqrt(4 |z| + delta_0^2) - delta_0) / 2 - rho`` at z = e^{-2a} x."""
        checked(self, "x", x, a)
        z = x / _squared(a)  # |z| = |q| (|q| + delta_0), solved for |q|
        root = torch.sqrt(4 * z.abs() + self.delta**2)
        return 2 * z / (root + self.delta) - self.rho  # without the difference of two roots

    def conjugate(self, mu: Tensor, a: Scalar) -> Tensor:
        """Return ``e^{2a} sum (|q|^3 / 3 + delta_0 q^2 / 2)`` over the coordinates."""
        checked(self, "mu", mu, a)
        q = mu + self.rho
        return self._sum(_squared(a) * (q.abs() ** 3 / 3 + self.delta * q * q / 2))  # int x dnu

    def metric(self, x: Tensor, a: Scalar) -> Tensor:
        """Return ``e^{-2a} / sqrt(4 |z| + delta_0^2)``, the diagonal of the Hessian."""
        checked(self, "x", x, a)
        unit = _squared(a)
        # R_a'' = e^-a / sqrt(4 |x| + delta^2) with delta = e^a delta_0.
        return 1 / (unit * torch.sqrt(4 * (x / unit).abs() + self.delta**2))

    def array_primal(self) -> ArrayPrimal:
        """Return x and d x / d nu in NumPy."""
        delta, rho = (
            v.detach().cpu().to(torch.float64).numpy().reshape(-1) for v in (self.delta, self.rho)
        )

        def primal(mu: Array, a: float) -> tuple[Array, Array]:
            q, unit = mu + rho, math.exp(min(2 * a, 2 * FAR))
            size = np.abs(q)
            # dx/dnu = |m| + |w|, in units of e^{2a}.
            return unit * q * (size + delta), unit * (2 * size + delta)

        return primal

    def describes_training(self, Z: Array) -> bool:
        """Return False: nu leaves the row space of Z."""
        return False


def _squared(a: Scalar) -> Any:
    """Return e^{2a}."""
    return torch.exp(2 * a) if isinstance(a, Tensor) else math.exp(2 * a)
