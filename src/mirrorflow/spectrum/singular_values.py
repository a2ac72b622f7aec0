"""The singular values of a product: from Gram matrices where they are exact enough.

Squaring costs half of the digits. The error is bounded each time, and what has lost too much is
computed again, more slowly, with the error of a dense SVD.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gram import double, trace

__all__ = ["Entry", "of_grams", "of_matrix"]

EPS = torch.finfo(torch.float64).eps
TRUSTED = 1e-10  # the relative error of the nuclear norm that the fast ways may have
ROUNDING = 256 * EPS  # A B below r times this much of |A| |B| is rounding
UNKNOWN = 64 * EPS**0.5  # A B below this much of |A| |B| cannot be known from Gram matrices alone

# Gives (A^T, B) of one product of a batch, as rows (r, n) and (r, m).
Entry = Callable[[tuple[int, ...]], tuple[Tensor, Tensor]]


def of_matrix(product: Tensor, scale: Tensor) -> Tensor:
    """Give the singular values of formed products (..., n, m), of factors with scale = r |A| |B|.

    Half the work of the SVD is saved where the eigenvalues of P P^T are exact enough.
    """
    wide = product.mT if product.shape[-2] > product.shape[-1] else product
    values = torch.linalg.eigvalsh(wide @ wide.mT).flip(-1).clamp_(min=0).sqrt_()
    error = EPS * (values[..., :1] ** 2 / values).sum(-1)
    exact = error < TRUSTED * values.sum(-1)
    if not exact.all():
        values[~exact] = torch.linalg.svdvals(wide[~exact])
    return torch.where((values[..., 0] > ROUNDING * scale)[..., None], values, 0.0)


def of_grams(gram_a: Tensor, gram_b: Tensor, size: float, entry: Entry | None) -> Tensor:
    """Give the singular values of A B: the fast way, and where it was too inexact again.

    The eigenvalues of the squared core have the error EPS size, size >= |A^T A| |B B^T|, so that
    s_i has EPS size / s_i: none is looked at singly where the smallest of all is large enough.
    """
    lower, failed = torch.linalg.cholesky_ex(gram_a)
    times = torch.bmm if gram_a.ndim == 3 and gram_a.shape == gram_b.shape else torch.matmul
    squares = torch.linalg.eigvalsh(times(lower.mT, times(gram_b, lower)))
    exact = squares.numel() and squares.min().item() > EPS / TRUSTED * size
    if exact and failed.count_nonzero().item() == 0:
        return squares.flip(-1).sqrt_()
    values = squares.flip(-1).clamp_(min=0).sqrt_()
    return _repaired(values, gram_a, gram_b, failed, entry)


def _repaired(
    values: Tensor,
    gram_a: Tensor,
    gram_b: Tensor,
    failed: Tensor,
    entry: Entry | None,
) -> Tensor:
    """Compute those singular values again that have lost too much."""
    size = (trace(gram_a) * trace(gram_b)).sqrt()
    norms = torch.linalg.matrix_norm(gram_a) * torch.linalg.matrix_norm(gram_b)
    error = EPS * (norms[..., None] / values).sum(-1)
    exact = (error < TRUSTED * values.sum(-1)) & (failed == 0)
    again = ~exact & (size > 0)
    rounding = ROUNDING * gram_a.shape[-1] * size
    if entry is None:
        values[again] = _from_roots(gram_a, gram_b, again)
        rounding = UNKNOWN * size
    else:
        for index in again.nonzero().tolist():
            found = _from_factors(*entry(tuple(index)))
            values[tuple(index)] = 0.0
            values[tuple(index)][: len(found)] = found
    return torch.where((values[..., 0] > rounding)[..., None], values, 0.0)


def _from_factors(left: Tensor, right: Tensor) -> Tensor:
    """Give the singular values of A B from A^T (r, n) and B (r, m), as exact as the dense SVD."""
    return torch.linalg.svdvals(_triangle(left) @ _triangle(right).mT)


def _triangle(rows: Tensor) -> Tensor:
    """Give R, with rows^T = Q R; the transposed rows themselves if they are no taller than wide."""
    tall = double(rows).mT
    return torch.linalg.qr(tall, mode="r").R if len(tall) > tall.shape[1] else tall


def _from_roots(gram_a: Tensor, gram_b: Tensor, which: Tensor) -> Tensor:
    """Give the singular values of L^T M with L L^T = A^T A and M M^T = B B^T."""
    shape = (*which.shape, *gram_a.shape[-2:])
    root_a, root_b = (_root(g.expand(shape)[which]) for g in (gram_a, gram_b))
    return torch.linalg.svdvals(root_a.mT @ root_b)


def _root(gram: Tensor) -> Tensor:
    """Give L with L L^T = gram, for a semi-definite gram; rounding counts as 0."""
    values, vectors = torch.linalg.eigh(gram)
    zero = values <= EPS * gram.shape[-1] * values[..., -1:]
    return vectors * torch.where(zero, 0.0, values).sqrt()[..., None, :]
