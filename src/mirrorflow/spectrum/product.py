r"""Spectra of products A B from their factors: r x r Gram matrices, never the product itself.

LoRA's update B A and attention's Q K^T are products through a small inner dimension r. Their
singular values are those of an r x r core, so that the quantities that weight decay moves (the
ratio of the nuclear to the Frobenius norm above all) cost next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, isnan
from typing import Any

import torch
from torch import Tensor

from .gram import gram, trace

__all__ = ["ProductSpectrum", "product_spectrum", "spectrum_of_grams", "unreadable"]

EPS = torch.finfo(torch.float64).eps
TRUSTED = 1e-10  # the relative error of the nuclear norm that the fast path may have


@dataclass(frozen=True, eq=False)
class ProductSpectrum:
    r"""The spectrum of A B, batched like its factors.

    Attributes
    ----------
    singular_values : Tensor of shape (..., min(n, r, m))
        Descending, float64; all 0 where A B is 0 up to rounding, NaN where a factor is not finite.
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
        return self._or_nan(self.nuclear / self.frobenius)

    @property
    def stable_rank(self) -> Tensor:
        """The squared Frobenius over the squared spectral norm, in [1, rank]; NaN where A B = 0."""
        return self._or_nan((self.frobenius / self.singular_values[..., 0]) ** 2)

    @property
    def effective_rank(self) -> Tensor:
        """The exponential of the entropy of the normalized singular values; NaN where A B = 0."""
        p = self.singular_values / self.nuclear[..., None]
        return self._or_nan(torch.exp(-torch.xlogy(p, p).sum(-1)))

    @property
    def imbalance(self) -> Tensor:
        """``A^T A - B B^T``, of shape (..., r, r).

        Under gradient flow with decay it is e^{2a} times its value at the start, for any loss, so
        that its size says how much decay has been absorbed.
        """
        return self.gram_a - self.gram_b

    @property
    def squared_norm(self) -> Tensor:
        """``(|A|_F^2 + |B|_F^2) / 2``, never less than the nuclear norm."""
        return (trace(self.gram_a) + trace(self.gram_b)) / 2

    @property
    def gap(self) -> Tensor:
        """``(|A|^2 + |B|^2)/2 - |AB|_*`` >= 0: 0 when the factors are balanced and aligned."""
        return (self.squared_norm - self.nuclear).clamp(min=0)

    def _or_nan(self, value: Tensor) -> Tensor:
        return torch.where(self.defined, value, torch.nan)


def product_spectrum(A: Tensor, B: Tensor, group: Any = None) -> ProductSpectrum:
    r"""Measure the spectrum of A B without forming it.

    With ``A^T A = L L^T`` the squared singular values of A B are the eigenvalues of the r x r
    matrix ``L^T (B B^T) L``. The Gram matrices are accumulated in float64 whatever the dtype of the
    factors, a chunk at a time. Where the squares lose too much (factors without full rank, spectra
    over more than six orders of magnitude), the singular values of ``L^T M``, ``B B^T = M M^T``,
    are taken.

    The cost is that of the Gram matrices, r^2 (n + m), and of r x r eigenvalues: a small part of a
    dense SVD where r is small beside n and m, and about that of one where it is not.

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
        If the inner dimensions differ, or a factor holds NaN or infinite entries, no data (it is on
        the meta device) or integers (it is quantized).

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
            f"product_spectrum: A (..., n, r) and B (..., r, m) are needed, got {shapes}"
        )
    for name, factor in (("A", A), ("B", B)):
        if trouble := unreadable(factor):
            raise ValueError(f"product_spectrum: {name} {trouble}")
    gram_a, gram_b = gram(A.mT, group), gram(B, group)
    n, m = _sizes(A.shape[-2], B.shape[-1], group)
    spectrum = spectrum_of_grams(gram_a, gram_b, min(n, A.shape[-1], m))
    if isnan(spectrum.singular_values.sum()):
        broken = "B" if torch.isfinite(trace(gram_a)).all() else "A"
        raise ValueError(f"product_spectrum: {broken} holds NaN or infinite entries")
    return spectrum


def unreadable(factor: Tensor) -> str:
    """Say why a factor has no spectrum; an empty string if it has one."""
    if factor.device.type == "meta":
        return "is on the meta device, it has no data: load or initialize the weights first"
    if not factor.is_floating_point():
        return f"is {str(factor.dtype)[6:]}, not floating: dequantize it first"
    return ""


def spectrum_of_grams(gram_a: Tensor, gram_b: Tensor, rank: int) -> ProductSpectrum:
    """Measure A B from A^T A and B B^T; entries that are not finite have NaN singular values."""
    squares_a, squares_b = trace(gram_a), trace(gram_b)
    product, total = squares_a * squares_b, squares_a + squares_b
    if isfinite(total.sum()):  # one number, to look at it quickly
        values = _singular_values(gram_a, gram_b, product)
    else:  # LAPACK refuses what is not finite
        finite = torch.isfinite(total)
        kept = (torch.where(finite[..., None, None], g, 0.0) for g in (gram_a, gram_b))
        values = _singular_values(*kept, torch.where(finite, product, 0.0))
        values = torch.where(finite[..., None], values, torch.nan)
    return ProductSpectrum(values[..., :rank], gram_a, gram_b)


def _singular_values(gram_a: Tensor, gram_b: Tensor, size: Tensor) -> Tensor:
    """Give the singular values of A B, |A|^2 |B|^2 = size: the fast way, and where it failed again.

    Eigenvalues of the squared core have the error EPS s_1^2, so that s_i has EPS s_1^2 / s_i.
    """
    lower, failed = torch.linalg.cholesky_ex(gram_a)
    squares = torch.linalg.eigvalsh(lower.mT @ (gram_b @ lower))
    values = squares.flip(-1).clamp_(min=0).sqrt_()
    if (squares[..., 0] > 1e-10 * size).all() and not failed.any():  # s_1^2 <= size
        return values
    return _repaired(values, gram_a, gram_b, size.sqrt(), failed)


def _repaired(
    values: Tensor, gram_a: Tensor, gram_b: Tensor, size: Tensor, failed: Tensor
) -> Tensor:
    """Compute those singular values again that have lost too much, from roots of both factors."""
    largest = values[..., 0]
    error = EPS * (largest[..., None] ** 2 / values).sum(-1)
    exact = (error < TRUSTED * values.sum(-1)) & (largest > 1e-5 * size) & (failed == 0)
    if not exact.all():
        shape = (*values.shape[:-1], *gram_a.shape[-2:])
        root_a, root_b = (_root(g.expand(shape)[~exact]) for g in (gram_a, gram_b))
        values[~exact] = torch.linalg.svdvals(root_a.mT @ root_b)
    rounding = 8 * EPS * gram_a.shape[-1] * size
    return torch.where((values[..., 0] > rounding)[..., None], values, 0.0)


def _root(gram: Tensor) -> Tensor:
    """Give L with L L^T = gram, for a semi-definite gram; rounding counts as 0."""
    values, vectors = torch.linalg.eigh(gram)
    zero = values <= EPS * gram.shape[-1] * values[..., -1:]
    return vectors * torch.where(zero, 0.0, values).sqrt()[..., None, :]


def _sizes(n: int, m: int, group: Any) -> tuple[int, int]:
    """Give the long dimensions, summed over the group's shards."""
    if group is None:
        return n, m
    sizes: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(sizes, (n, m), group=group)
    return sum(s[0] for s in sizes), sum(s[1] for s in sizes)
