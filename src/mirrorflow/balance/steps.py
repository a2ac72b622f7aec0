r"""Exact accounts of one step: of m * w per coordinate, and of a product A B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._grams import Number, accumulate, check_pair, finite, gram, layout, zeros

__all__ = ["DiagonalStep", "ProductStep", "diagonal_step", "product_step"]


@dataclass(frozen=True, eq=False)
class DiagonalStep:
    r"""One step of m * w: what it adds to a and to mu, per coordinate, and where it leads.

    Attributes
    ----------
    m, w : Tensor
        The factors after the step.
    mu : Tensor
        What the step adds to the dual variable.
    decay, step, noise : Tensor
        What the step adds to a: the decay's share; that of a step of this size with ``full_grad``;
        and the rest, which the minibatch makes. ``step`` and ``noise`` are NaN where ``full_grad``
        is not given: one minibatch does not say what all data would have done.
    step_and_noise : Tensor
        The sum of the last two, which is always known.
    """

    m: Tensor
    w: Tensor
    mu: Tensor
    decay: Tensor
    step: Tensor
    noise: Tensor
    step_and_noise: Tensor

    @property
    def a(self) -> Tensor:
        """What the step adds to a."""
        return self.decay + self.step_and_noise


def diagonal_step(
    m: Tensor,
    w: Tensor,
    grad_x: Tensor,
    lr: float,
    decay: float = 0.0,
    full_grad: Tensor | None = None,
) -> DiagonalStep:
    r"""Take a step of gradient descent on x = m * w, and return its exact account per coordinate.

    With ``s = 1 - lr decay``, ``q = lr G / s``, ``u = m + w`` and ``v = m - w``, a step is
    ``u <- s (1 - q) u``, ``v <- s (1 + q) v``. Hence, for every loss, batch and label noise,

    .. math:: \Delta a = \log|s| + \tfrac12 \log|1 - q^2|, \qquad
              \Delta\mu = \tfrac12 \log\left|\frac{1 - q}{1 + q}\right|, \qquad
              x = A_0 e^{2a} \sinh(2\mu + \rho),

    with ``A_0 = |u_0 v_0| / 2`` and ``rho = log|u_0 / v_0|``, also after steps so long that they
    turn u or v. A run that fits ends at the minimizer of R_a with this vector a, up to the part of
    mu outside the row space of the data, which is O(lr^3 G^3).

    Parameters
    ----------
    m, w : Tensor
        The factors before the step, of one shape.
    grad_x : Tensor
        G, the gradient of this minibatch's loss in x, at ``x = m * w``.
    lr, decay : float
        The learning rate and the weight decay of the step, both of SGD and of decoupled decay.
    full_grad : Tensor, optional
        The gradient of the whole data's loss at the same x, which splits step from noise.

    Returns
    -------
    DiagonalStep
        Minus infinity where the step makes u or v exactly 0.

    Raises
    ------
    ValueError
        If ``lr * decay`` is 1 or not finite, or the shapes differ.

    Examples
    --------
    >>> ones = torch.ones(1, dtype=torch.float64)
    >>> taken = diagonal_step(ones, 0 * ones, ones, lr=0.1, decay=0.5)
    >>> round(taken.decay.item(), 6), round(taken.step_and_noise.item(), 6)
    (-0.051293, -0.005571)
    """
    s = 1 - finite(lr, "lr") * finite(decay, "decay")
    if s == 0:
        raise ValueError(
            "lr * decay must differ from 1, got 1: the step erases the weights, and a has no value "
            "after it. Use a smaller rate."
        )
    if not m.shape == w.shape == grad_x.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (m, w, grad_x))
        raise ValueError(
            f"m, w and grad_x must have one shape, got {shapes}. Expand the smaller ones."
        )
    m, w, q = m.detach(), w.detach(), lr * grad_x.detach() / s
    # m <- s m - lr G w and w <- s w - lr G m, in u = m + w and v = m - w.
    u, v = s * (1 - q) * (m + w), s * (1 + q) * (m - w)
    both = _log_beside_decay(q)
    unknown = torch.full_like(q, math.nan)
    step = unknown if full_grad is None else _log_beside_decay(lr * full_grad.detach() / s)
    share = torch.full_like(q, math.log(abs(s)))  # log|s| of a, in both factors alike
    return DiagonalStep((u + v) / 2, (u - v) / 2, _log_ratio(q), share, step, both - step, both)


def _log_beside_decay(q: Tensor) -> Tensor:
    """Return 1/2 log|1 - q^2|, to rounding where q is small and where it is near 1."""
    near = (q * q).clamp(max=0.5)
    # log1p has the digits of a small q^2, and (1 - q)(1 + q) those of |q| near 1.
    return torch.where(q * q < 0.5, torch.log1p(-near), ((1 - q) * (1 + q)).abs().log()) / 2


def _log_ratio(q: Tensor) -> Tensor:
    """Return 1/2 log|(1 - q)/(1 + q)|: -artanh(q), or -artanh(1/q) where a factor turns."""
    # |(1 - q)/(1 + q)| is the same for q and 1/q.
    return -torch.atanh(torch.where(q.abs() <= 1, q, 1 / q))


@dataclass(frozen=True, eq=False)
class ProductStep:
    """One step of a product A B: what it adds to ``D = A^T A - B B^T``, in float64.

    Attributes
    ----------
    D : Tensor of shape (..., r, r)
        Before the step.
    decay : Tensor of shape (..., r, r)
        ``((1 - lr decay)^2 - 1) D``; with factors that shrink by different numbers,
        ``(s_A^2 - 1) A^T A - (s_B^2 - 1) B B^T``.
    optimizer : Tensor of shape (..., r, r)
        ``-s_A (A^T P + P^T A) + s_B (B Q^T + Q B^T)``.
    second_order : Tensor of shape (..., r, r)
        ``P^T P - Q Q^T``: the finite step, and the noise of its minibatch.
    """

    D: Tensor
    decay: Tensor
    optimizer: Tensor
    second_order: Tensor

    @property
    def D_next(self) -> Tensor:
        """D after the step: the sum of all four."""
        return self.D + self.decay + self.optimizer + self.second_order


@torch.no_grad()
def product_step(
    A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor, lr: Number, decay: Number
) -> ProductStep:
    r"""Split one step of a product A B into decay, optimizer, and step and noise, exactly.

    What the optimizer applied is recovered from the weights: ``P = (1 - lr decay) A - A_next``,
    ``Q = (1 - lr decay) B - B_next``, so that the sum of the parts with ``A^T A - B B^T`` is the
    next one whatever took the step. Everything is accumulated in float64, with an error of some
    ``1e-15 (|A|^2 + |B|^2)``. The optimizer's part is 0 for gradient descent, on minibatches also,
    if the loss depends on the factors through A B alone (attention with biases does not) and both
    factors have the same rates.

    Parameters
    ----------
    A, A_next : Tensor of shape (..., n, r)
        The left factor before and after, any floating dtype. For attention: Q's weights transposed,
        one batch entry per head. A ``DTensor`` is reduced over its mesh; all ranks have to call.
    B, B_next : Tensor of shape (..., r, m)
        The right factor; leading dimensions broadcast against those of A.
    lr, decay : float or (float, float)
        The rates that acted in this step, one for both factors or one for A and one for B. Only
        their product counts: an optimizer that shrinks by the decay alone has lr = 1. If the decay
        goes through momentum (SGD's own), it stands here as the gradient's ``decay * w``, and what
        the buffer makes of it is the optimizer's.

    Returns
    -------
    ProductStep
        On the device of the factors.

    Raises
    ------
    ValueError
        If shapes do not fit, a rate is not finite, or a factor has no floating-point data.

    Examples
    --------
    >>> A, B = torch.eye(3)[:, :1], torch.ones(1, 2)
    >>> taken = product_step(A, B, 0.9 * A, 0.9 * B - 0.1, lr=0.1, decay=1.0)
    >>> [round(part.item(), 6) for part in (taken.decay, taken.optimizer, taken.second_order)]
    [0.19, 0.36, -0.02]
    >>> round(taken.D_next.item(), 6)  # 0.81 - 2 x 0.64
    -0.47
    """
    s_a, s_b = _shrink_factors(lr, decay)
    check_pair(A, B, "A, B")
    a, b = _factor_step(A, A_next, -2, s_a), _factor_step(B, B_next, -1, s_b)
    return ProductStep(*(left - right for left, right in zip(a, b, strict=True)))


def _factor_step(
    before: Tensor, after: Tensor, axis: int, s: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return A^T A, and what decay, the optimizer and the second order add to it."""
    if before.shape != after.shape:
        raise ValueError(
            f"a factor must keep its shape, got {tuple(before.shape)} and {tuple(after.shape)}. "
            "Pass the same factor before and after one step."
        )
    where = layout(before, axis)
    old = where.take([before], [axis])
    sums = zeros((2,), old)
    accumulate(sums, old, layout(after, axis).take([after], [axis]), s)
    found, cross, square = where.whole(torch.cat([gram(old)[None], sums]))[:, 0]
    # A^T A, (s^2 - 1) A^T A, s (A^T C + C^T A), C^T C: they sum to A_next^T A_next.
    return found, (s * s - 1) * found, cross + cross.mT, square


def _for_both(rate: Any, name: str) -> Sequence[float]:
    """Return the number for A and that for B."""
    if not isinstance(rate, (tuple, list)):
        return rate, rate
    if len(rate) != 2:
        raise ValueError(f"{name} must be a number, or one for A and one for B, got {rate!r}")
    return rate


def _shrink_factors(lr: Number, decay: Number) -> tuple[float, float]:
    """Return 1 - lr decay for A and for B."""
    lrs, decays = (_for_both(rate, name) for rate, name in ((lr, "lr"), (decay, "decay")))
    a, b = (
        1 - finite(rate, "lr") * finite(each, "decay")
        for rate, each in zip(lrs, decays, strict=True)
    )
    return a, b
