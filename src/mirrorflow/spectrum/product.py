r"""Spectra of products A B from their factors: r x r Gram matrices, never the product itself.

LoRA's update B A and attention's Q K^T are products through a small inner dimension r. Their
singular values are those of an r x r core, so that the quantities that weight decay moves (the
ratio of the nuclear to the Frobenius norm above all) cost next to nothing. Only where r is not the
smallest dimension, so that the product is not larger than its factors, is it formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .._threads import few_threads
from ._grams import double, gram, trace
from ._shards import is_sharded

__all__ = [
    "ROUNDING",
    "Entry",
    "ProductSpectrum",
    "lost_of",
    "of_grams",
    "of_matrix",
    "product_spectrum",
    "smallest_rank",
    "spectrum_of_grams",
    "spectrum_of_products",
    "unreadable",
]


@dataclass(frozen=True, eq=False)
class ProductSpectrum:
    r"""The spectrum of A B, batched like its factors.

    Attributes
    ----------
    singular_values : Tensor of shape (..., min(n, r, m))
        Descending, float64; all 0 where A B is 0 up to rounding (below some ``1e-13 r |A| |B|``, of
        sharded factors below ``1e-6 |A| |B|``), NaN where a factor is not finite.
    gram_a, gram_b : Tensors of shape (..., r, r)
        ``A^T A`` and ``B B^T``, float64.
    """

    singular_values: Tensor
    gram_a: Tensor
    gram_b: Tensor

    @property
    def nuclear(self) -> Tensor:
        """The sum of the singular values."""
        return self.singular_values.sum(-1)

    @property
    def frobenius(self) -> Tensor:
        """The root of the sum of their squares."""
        return torch.linalg.vector_norm(self.singular_values, dim=-1)

    @property
    def defined(self) -> Tensor:
        """Whether A B is finite and not 0: elsewhere the ratios below are NaN (LoRA's start)."""
        return self.singular_values[..., 0] > 0

    @property
    def ratio(self) -> Tensor:
        """Nuclear over Frobenius norm, in [1, sqrt(rank)]; NaN where A B = 0."""
        return self.nuclear / self.frobenius

    @property
    def stable_rank(self) -> Tensor:
        """The squared Frobenius over the squared spectral norm, in [1, rank]; NaN where A B = 0."""
        return (self.frobenius / self.singular_values[..., 0]) ** 2

    @property
    def effective_rank(self) -> Tensor:
        """The exponential of the entropy of the normalized singular values; NaN where A B = 0."""
        p = self.singular_values / self.nuclear[..., None]  # p_i = s_i / sum s
        return torch.exp(-torch.xlogy(p, p).sum(-1))

    def rank_for(self, energy: float) -> Tensor:
        r"""Return the smallest rank that holds a share of the energy, the squared singular values.

        It is the least k with ``sum_{i > k} s_i^2 <= (1 - energy) sum_i s_i^2``: the rank that the
        truncated SVD keeps for a relative Frobenius error of ``sqrt(1 - energy)``. Singular values
        that are rounding, below some ``1e-13 r |A| |B|``, count as 0, so that ``rank_for(1)`` is
        the numerical rank.

        Parameters
        ----------
        energy : float
            In (0, 1], as 0.9, 0.95 and 0.99.

        Returns
        -------
        Tensor of shape (...)
            Float64: whole numbers; 0 where A B = 0, which nothing holds, and NaN where a factor is
            not finite.

        Raises
        ------
        ValueError
            If the energy is outside (0, 1].

        Examples
        --------
        >>> diagonal = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
        >>> spectrum = product_spectrum(diagonal, torch.eye(3))
        >>> [spectrum.rank_for(energy).item() for energy in (0.9, 0.95, 1)]
        [1.0, 2.0, 2.0]
        """
        if not 0 < energy <= 1:
            raise ValueError(
                f"energy must be in (0, 1], got {energy}. Name a share, as in rank_for(0.99)."
            )
        size = (trace(self.gram_a) * trace(self.gram_b)).sqrt()  # |A| |B|
        rounding = ROUNDING * self.gram_a.shape[-1] * size
        return smallest_rank(self.singular_values, lost_of(energy), rounding)

    @property
    def imbalance(self) -> Tensor:
        """``A^T A - B B^T``, of shape (..., r, r).

        Along the gradient flow with decay it is e^{2a} times its value at the start, for any loss.
        With minibatches, momentum or Adam it is not: `mirrorflow.balance` has the exact account.
        """
        return self.gram_a - self.gram_b

    @property
    def squared_norm(self) -> Tensor:
        """``(|A|_F^2 + |B|_F^2) / 2``, never less than the nuclear norm."""
        return (trace(self.gram_a) + trace(self.gram_b)) / 2  # |A|^2 = Tr A^T A

    @property
    def gap(self) -> Tensor:
        """``(|A|^2 + |B|^2)/2 - |AB|_*`` >= 0: 0 when the factors are balanced and aligned."""
        # |AB|_* = min (|A|^2 + |B|^2)/2 over all factors of the product.
        return (self.squared_norm - self.nuclear).clamp(min=0)


def product_spectrum(A: Tensor, B: Tensor, group: Any = None) -> ProductSpectrum:
    r"""Measure the spectrum of A B without forming it.

    With ``A^T A = L L^T`` the squared singular values of A B are the eigenvalues of the r x r
    matrix ``L^T (B B^T) L``. The Gram matrices are accumulated in float64 whatever the dtype of the
    factors, a chunk at a time. Where the squares lose too much (factors without full rank, spectra
    over more than five orders of magnitude, a product far smaller than its factors), the singular
    values of ``R_A R_B^T`` are taken, ``A = Q_A R_A`` and ``B^T = Q_B R_B``, with the error of
    the dense SVD. Sharded factors have no such second way: there a product below ``1e-6 |A| |B|``
    counts as 0.

    The cost is that of the Gram matrices, r^2 (n + m), and of r x r eigenvalues: a small part of a
    dense SVD where r is small beside n and m. Where it is not (r >= min(n, m)) the product is no
    larger than its factors: it is formed, and the cost is that of its dense SVD, about 0.8 times
    from a width of 768 on, and up to twice where its singular values spread over more than five
    orders of magnitude, so that their squares do not do.

    Parameters
    ----------
    A : Tensor of shape (..., n, r)
        The left factor, any floating dtype. For attention: Q-weights transposed, one batch entry
        per head. A ``DTensor`` is reduced over its mesh.
    B : Tensor of shape (..., r, m)
        The right factor; leading dimensions broadcast.
    group : ProcessGroup, optional
        If given, A and B are this rank's shards along n and m: the Gram matrices, and only they,
        are summed over the group. Every rank of it has to make the call, and gets the same result.

    Returns
    -------
    ProductSpectrum
        On the device of the factors, detached.

    Raises
    ------
    ValueError
        If the inner dimensions differ, or a factor is empty or holds NaN or infinite entries, no
        data (it is on the meta device) or integers (it is quantized).

    Examples
    --------
    >>> spectrum = product_spectrum(torch.eye(4)[:, :2], torch.eye(4)[:2])
    >>> round(spectrum.ratio.item() ** 2, 6), round(spectrum.stable_rank.item(), 6)
    (2.0, 2.0)

    At the start of LoRA one factor is 0, and the ratio is undefined:

    >>> start = product_spectrum(torch.zeros(4, 2), torch.eye(4)[:2])
    >>> start.nuclear.item(), start.ratio.item(), start.defined.item()
    (0.0, nan, False)
    """
    if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2] or A.shape[-1] == 0:
        shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
        raise ValueError(
            f"product_spectrum: A and B must have shapes (..., n, r) and (..., r, m), got {shapes}"
        )
    for name, factor in (("A", A), ("B", B)):
        if trouble := unreadable(factor):
            raise ValueError(f"product_spectrum: {name} {trouble}")
    left, right = _detached(A).mT, _detached(B)
    with few_threads(left.numel() + right.numel()):
        return _spectrum(left, right, group)


def lost_of(energy: float) -> float:
    """Return the share of the energy that may be lost, with the rounding of ``1 - energy`` on top.

    So 0.9 of 9 + 1 is held by the 9.
    """
    return 1 - energy + EPS if energy < 1 else 0.0


def smallest_rank(values: Tensor, lost: float, rounding: Tensor) -> Tensor:
    """Return how many singular values to keep, that no more than a share of the energy is lost.

    ``values`` (..., k) descend; those up to ``rounding`` (...) count as 0. What is kept of NaN is
    NaN.
    """
    squares = torch.where(values > rounding[..., None], values / values[..., :1], 0.0) ** 2
    tails = squares.flip(-1).cumsum(-1).flip(-1)  # tails[k]: what a rank of k loses
    # The tails fall: the least rank that loses no more is the number of those that are above.
    kept = (tails > lost * (1 + 1e-12) * tails[..., :1]).sum(-1).to(torch.float64)
    return torch.where(torch.isnan(values[..., 0]), torch.nan, kept)


def _detached(factor: Tensor) -> Tensor:
    """Return a factor without its graph; most have none, and a view takes time."""
    return factor.detach() if factor.requires_grad else factor


def _spectrum(left: Tensor, right: Tensor, group: Any) -> ProductSpectrum:
    """Measure A B from the rows A^T (..., r, n) and B (..., r, m)."""
    r, n, m = left.shape[-2], left.shape[-1], right.shape[-1]
    gram_a, gram_b = gram(left, group), gram(right, group)
    if group is not None or is_sharded(left) or is_sharded(right):
        n, m = _sizes(n, m, group)
        if min(n, m) == 0:
            raise ValueError(f"product_spectrum: A B must not be empty, got {n} x {m}")
        return spectrum_of_grams(gram_a, gram_b, min(n, r, m), strict=True)
    if min(n, m) == 0:
        raise ValueError(f"product_spectrum: A B must not be empty, got {n} x {m}")
    if r >= min(n, m):
        return spectrum_of_products(left, right, gram_a, gram_b, strict=True)

    def entry(index: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        return left.expand(*batch, r, n)[index], right.expand(*batch, r, m)[index]

    return spectrum_of_grams(gram_a, gram_b, r, entry, strict=True)


def unreadable(factor: Tensor) -> str:
    """Say why a factor has no spectrum; an empty string if it has one."""
    if factor.is_meta:
        return "is on the meta device, it has no data: load or initialize the weights first"
    if not factor.is_floating_point():
        return f"is {str(factor.dtype)[6:]}, not floating: dequantize it first"
    return ""


def spectrum_of_grams(
    gram_a: Tensor,
    gram_b: Tensor,
    rank: int,
    entry: Entry | None = None,
    strict: bool = False,
) -> ProductSpectrum:
    """Measure A B from A^T A and B B^T; entries that are not finite have NaN singular values.

    ``entry`` gives the factors of those products that their Gram matrices do not determine;
    ``strict`` refuses entries that are not finite.
    """
    r, size = gram_a.shape[-1], _norm(gram_a) * _norm(gram_b)
    if isfinite(size):
        values = of_grams(gram_a, gram_b, size, entry)
    else:  # LAPACK refuses what is not finite
        finite = _finite(gram_a, gram_b, strict)[..., None, None]
        kept_a, kept_b = torch.where(finite, gram_a, 0.0), torch.where(finite, gram_b, 0.0)
        values = of_grams(kept_a, kept_b, _norm(kept_a) * _norm(kept_b), entry)
        values = torch.where(finite[..., 0], values, torch.nan)
    return ProductSpectrum(values[..., :rank] if rank < r else values, gram_a, gram_b)


def _finite(gram_a: Tensor, gram_b: Tensor, strict: bool) -> Tensor:
    """Return which entries of a batch are finite; refuse the others if strict."""
    finite_a, finite_b = (torch.isfinite(trace(found)) for found in (gram_a, gram_b))
    finite = finite_a & finite_b
    if strict and not finite.all():
        broken = "B" if finite_a.all() else "A"
        raise ValueError(f"product_spectrum: {broken} must be finite, got NaN or infinite entries")
    return finite


def _norm(grams: Tensor) -> float:
    """Return the Frobenius norm of a whole batch: no less than the norm of any of it."""
    return torch.linalg.vector_norm(grams).item()


def spectrum_of_products(
    left: Tensor, right: Tensor, gram_a: Tensor, gram_b: Tensor, strict: bool = False
) -> ProductSpectrum:
    """Measure A B by forming it, from A^T (..., r, n) and B (..., r, m): where r >= min(n, m)."""
    size = trace(gram_a) * trace(gram_b)
    finite = _finite(gram_a, gram_b, strict)
    product = double(left).mT @ double(right)
    if not finite.all():  # LAPACK refuses what is not finite
        product = torch.where(finite[..., None, None], product, 0.0)
    values = of_matrix(product, gram_a.shape[-1] * size.sqrt())
    return ProductSpectrum(torch.where(finite[..., None], values, torch.nan), gram_a, gram_b)


def _sizes(n: int, m: int, group: Any) -> tuple[int, int]:
    """Return the long dimensions, summed over the group's shards."""
    if group is None:
        return n, m
    sizes: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(sizes, (n, m), group=group)
    return sum(s[0] for s in sizes), sum(s[1] for s in sizes)


# The singular values of a product: from Gram matrices where they are exact enough.
#
# Squaring costs half of the digits. The error is bounded each time, and what has lost too much is
# computed again, more slowly, with the error of a dense SVD.

EPS = torch.finfo(torch.float64).eps
TRUSTED = 1e-10  # the relative error of the nuclear norm that the fast ways may have
ROUNDING = 256 * EPS  # A B below r times this much of |A| |B| is rounding
UNKNOWN = 64 * EPS**0.5  # A B below this much of |A| |B| cannot be known from Gram matrices alone

# Gives (A^T, B) of one product of a batch, as rows (r, n) and (r, m).
Entry = Callable[[tuple[int, ...]], tuple[Tensor, Tensor]]


def of_matrix(product: Tensor, scale: Tensor) -> Tensor:
    """Return the singular values of formed products (..., n, m), of factors with scale = r |A| |B|.

    Half the work of the SVD is saved where the eigenvalues of P P^T are exact enough.
    """
    wide = product.mT if product.shape[-2] > product.shape[-1] else product
    # s_i^2 has the error EPS s_1^2, so that s_i has EPS s_1^2 / s_i.
    values = torch.linalg.eigvalsh(wide @ wide.mT).flip(-1).clamp_(min=0).sqrt_()
    error = EPS * (values[..., :1] ** 2 / values).sum(-1)
    exact = error < TRUSTED * values.sum(-1)
    if not exact.all():
        values[~exact] = torch.linalg.svdvals(wide[~exact])
    return torch.where((values[..., 0] > ROUNDING * scale)[..., None], values, 0.0)


def of_grams(gram_a: Tensor, gram_b: Tensor, size: float, entry: Entry | None) -> Tensor:
    """Return the singular values of A B: the fast way, and where it was too inexact again.

    The eigenvalues of the squared core have the error EPS size, size >= |A^T A| |B B^T|, so that
    s_i has EPS size / s_i: none is looked at singly where the smallest of all is large enough.
    """
    lower, failed = torch.linalg.cholesky_ex(gram_a)
    times = torch.bmm if gram_a.ndim == 3 and gram_a.shape == gram_b.shape else torch.matmul
    # A^T A = L L^T: the nonzero eigenvalues of A B B^T A^T are those of L^T (B B^T) L.
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
    error = EPS * (norms[..., None] / values).sum(-1)  # of the nuclear norm: sum of EPS size / s_i
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
    """Return the singular values of A B from A^T (r, n) and B (r, m), as exact as the dense SVD."""
    # A = Q_A R_A and B^T = Q_B R_B: A B = Q_A (R_A R_B^T) Q_B^T.
    return torch.linalg.svdvals(_triangle(left) @ _triangle(right).mT)


def _triangle(rows: Tensor) -> Tensor:
    """Return R of rows^T = Q R, or rows^T itself where it is at least as wide as tall."""
    tall = double(rows).mT
    return torch.linalg.qr(tall, mode="r").R if len(tall) > tall.shape[1] else tall


def _from_roots(gram_a: Tensor, gram_b: Tensor, which: Tensor) -> Tensor:
    """Return the singular values of L^T M with L L^T = A^T A and M M^T = B B^T."""
    shape = (*which.shape, *gram_a.shape[-2:])
    root_a, root_b = (_root(g.expand(shape)[which]) for g in (gram_a, gram_b))
    return torch.linalg.svdvals(root_a.mT @ root_b)  # A = Q_A L^T, B = M Q_B^T


def _root(gram: Tensor) -> Tensor:
    """Return L with L L^T = gram, for a semi-definite gram; rounding counts as 0."""
    values, vectors = torch.linalg.eigh(gram)
    # The root of what is rounding in the Gram matrix would be 1e-8 of the largest.
    zero = values <= EPS * gram.shape[-1] * values[..., -1:]
    return vectors * torch.where(zero, 0.0, values).sqrt()[..., None, :]
