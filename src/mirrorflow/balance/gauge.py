r"""Gauge projection: another balance D of the factors of the same product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._grams import check_pair, gram, is_sharded, layout, norm

__all__ = ["GaugeProjection", "gauge_projection"]

EPS = torch.finfo(torch.float64).eps
STEPS, HALVINGS = 200, 50
SYMMETRIC = 1e-9  # relative asymmetry up to which a wanted D counts as rounded
SINGULAR = 1e-13  # relative size up to which an eigenvalue counts as 0
REACHED = 1e-9  # relative error up to which a stalled iteration has found its floor of rounding


@dataclass(frozen=True, eq=False)
class GaugeProjection:
    """Factors of the same product with another balance.

    Attributes
    ----------
    A, B : Tensor
        ``A S`` and ``S^{-1} B``, in the dtypes of the factors.
    transform : Tensor of shape (..., r, r)
        S, float64: gradients and momentum of A transform with ``S^{-T}``, those of B with ``S^T``.
    """

    A: Tensor
    B: Tensor
    transform: Tensor


@torch.no_grad()
def gauge_projection(A: Tensor, B: Tensor, D_wanted: Tensor) -> GaugeProjection:
    r"""Return factors of the same product A B with ``A^T A - B B^T = D_wanted``.

    ``A S`` and ``S^{-1} B`` have the product A B for every invertible S. Newton's method finds S:
    with R what is still wanted, ``S <- S exp(t Lambda)`` where, with ``M = A^T A + B B^T`` of
    the present factors,

    .. math:: \Lambda M + M \Lambda = R,

    solved by the eigenvectors of M, and t halved until R shrinks. Where A and B have rank r each,
    every symmetric D can be reached: ``|A^T A|`` is bounded by ``|D|`` and ``|A B|``, and
    ``det(A^T A) det(B B^T)`` is fixed, so that M never becomes singular on the way. At LoRA's
    start, where B = 0, each positive definite D can.

    This is a control for experiments (does the balance matter?), not a promise that it does: the
    model computes the same before and after, and optimizers go on from other factors.

    Parameters
    ----------
    A : Tensor of shape (..., n, r)
        The left factor, any floating dtype; a DTensor also.
    B : Tensor of shape (..., r, m)
        The right factor, with the same leading dimensions.
    D_wanted : Tensor of shape (..., r, r)
        Symmetric, as ``e^{2a} D_0``.

    Returns
    -------
    GaugeProjection
        Computed in float64. D and the product hold to the rounding of the dtypes of A and B, so
        that in bfloat16 the product changes by some 1e-2 of itself.

    Raises
    ------
    ValueError
        If D_wanted has another shape, is not symmetric or cannot be reached; if ``M`` does not
        have rank r, so that some change of S does nothing; if a factor is not finite.

    Examples
    --------
    >>> A, B = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 1.0]])
    >>> balanced = gauge_projection(A, B, torch.zeros(1, 1))
    >>> [round(x, 4) for x in (balanced.A[0].item(), *balanced.B[0].tolist())]
    [1.6818, 1.1892, 1.1892]
    """
    check_pair(A, B, "A, B")
    gram_a, gram_b = _whole_gram(A, -2), _whole_gram(B, -1)
    wanted = _checked(D_wanted, gram_a, gram_b)
    S, inverse = _solve(gram_a, gram_b, wanted)
    return GaugeProjection(_times(A, S, right=True), _times(B, inverse, right=False), S)


def _whole_gram(factor: Tensor, axis: int) -> Tensor:
    """Return A^T A or B B^T of all processes."""
    where = layout(factor, axis)
    return where.whole(gram(where.take([factor], [axis])))[0]


def _checked(wanted: Tensor, gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """Return the wanted D in float64, of the shape of the Gram matrices, exactly symmetric."""
    if not (gram_a.shape == gram_b.shape == wanted.shape):
        shapes = ", ".join(str(tuple(m.shape)) for m in (wanted, gram_a, gram_b))
        raise ValueError(
            "D_wanted, A^T A and B B^T must have one shape (..., r, r), got "
            f"{shapes}. Expand the leading dimensions."
        )
    wanted = wanted.detach().to(gram_a)
    if not bool(torch.isfinite(gram_a + gram_b + wanted).all()):
        raise ValueError(
            "A, B and D_wanted must be finite, got NaN or infinite entries. Project weights that "
            "have not diverged."
        )
    asymmetry = norm(wanted - wanted.mT)
    if bool((asymmetry > SYMMETRIC * norm(wanted)).any()):
        raise ValueError(
            f"D_wanted must be symmetric, got |D - D^T| = {asymmetry.max().item():.3g}. Pass "
            "(D + D.mT) / 2."
        )
    return (wanted + wanted.mT) / 2


def _solve(gram_a: Tensor, gram_b: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return S and its inverse by damped Newton steps, all entries of a batch at once."""
    S = torch.eye(gram_a.shape[-1]).to(gram_a).expand_as(gram_a)
    inverse = S
    rest, size = _rest(gram_a, gram_b, wanted, S, inverse)
    for step in range(STEPS):
        # D of A (1 + L) and (1 - L) B, L symmetric, is D + L M + M L to first order.
        weights, vectors = torch.linalg.eigh(size)
        if bool((weights[..., 0] <= SINGULAR * weights[..., -1]).any()):
            if step == 0:
                raise ValueError(
                    "A^T A + B B^T must have full rank, got a smallest eigenvalue of "
                    f"{weights.min().item():.3g}. Use a smaller inner dimension r."
                )
            break
        turned = vectors.mT @ rest @ vectors
        turned = turned / (weights[..., :, None] + weights[..., None, :])  # Lambda M + M Lambda = R
        before = norm(rest)
        S, inverse = _damped(gram_a, gram_b, wanted, S, inverse, vectors @ turned @ vectors.mT)
        rest, size = _rest(gram_a, gram_b, wanted, S, inverse)
        if _settled(norm(rest), before, size):
            break
    if bool((norm(rest) > REACHED * _trace(size)).any()):
        raise ValueError(
            "D_wanted must be reachable by A S, S^{-1} B, got one from which the nearest found is "
            f"{norm(rest).max().item():.3g} away. Factors of rank r each reach every D; where one "
            "has less (B = 0 at LoRA's start), take an earlier D scaled by a positive number."
        )
    return S, inverse


def _rest(
    gram_a: Tensor, gram_b: Tensor, wanted: Tensor, S: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what is still wanted of D, and A^T A + B B^T, of the factors A S and S^{-1} B."""
    # (A S)^T A S and S^{-1} B (S^{-1} B)^T
    left, right = S.mT @ gram_a @ S, inverse @ gram_b @ inverse.mT
    rest, size = wanted - left + right, left + right
    return (rest + rest.mT) / 2, (size + size.mT) / 2


def _damped(
    gram_a: Tensor, gram_b: Tensor, wanted: Tensor, S: Tensor, inverse: Tensor, L: Tensor
) -> tuple[Tensor, Tensor]:
    """Return S exp(t L) and its inverse, t halved for each entry until the rest is smaller."""
    error = norm(_rest(gram_a, gram_b, wanted, S, inverse)[0])
    # exp(t L) instead of 1 + t L: it is invertible for every t, and its inverse is exp(-t L).
    powers, axes = torch.linalg.eigh((L + L.mT) / 2)
    t = torch.ones_like(error)
    for _ in range(HALVINGS):
        exponent = (t[..., None] * powers)[..., None, :]
        new = S @ (axes * exponent.exp()) @ axes.mT
        back = (axes * (-exponent).exp()) @ axes.mT @ inverse
        found = norm(_rest(gram_a, gram_b, wanted, new, back)[0])
        better = found < error * (1 - t / 4)  # R falls as 1 - t; NaN after an overflow is not less
        if bool(better.all()):
            break
        t = torch.where(better, t, t / 2)
    better = better[..., None, None]
    return torch.where(better, new, S), torch.where(better, back, inverse)


def _settled(error: Tensor, before: Tensor, size: Tensor) -> bool:
    """Return whether every entry is at rounding: below it, or small and no longer falling."""
    relative = error / _trace(size)  # Tr M bounds |D|, and is not 0 where D is
    done = (relative <= EPS) | ((relative <= REACHED) & (error > before / 2))
    return bool((done | (error == before)).all())


def _trace(matrices: Tensor) -> Tensor:
    """Return the traces of a batch."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _times(factor: Tensor, matrix: Tensor, right: bool) -> Tensor:
    """Return factor matrix, or matrix factor, in the dtype and the placements of the factor."""
    wide, placed = factor.detach().to(torch.float64), None
    if is_sharded(factor):
        from torch.distributed.tensor import Replicate, distribute_tensor

        whole: Any = factor
        placed = whole.placements
        matrix = distribute_tensor(matrix, whole.device_mesh, [Replicate()] * len(placed))
    found: Any = wide @ matrix if right else matrix @ wide
    if placed is not None:
        found = found.redistribute(placements=placed)
    return found.to(factor.dtype)
