r"""Spectra of products A B from their factors: r x r Gram matrices, never the product itself.

LoRA's update B A and attention's Q K^T are products through a small inner dimension r. Their
singular values are those of an r x r core, so that the quantities that weight decay moves (the
ratio of the nuclear to the Frobenius norm above all) cost next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ProductSpectrum", "product_spectrum"]


@dataclass(frozen=True, eq=False)
class ProductSpectrum:
    r"""The spectrum of A B, batched like its factors.

    Attributes
    ----------
    singular_values : Tensor of shape (..., min(n, r, m))
        Descending, float64.
    imbalance : Tensor of shape (..., r, r)
        ``A^T A - B B^T``. Under gradient flow with decay it is e^{2a} times its value at the start,
        for any loss, so that its size says how much decay has been absorbed.
    squared_norm : Tensor of shape (...)
        ``(|A|_F^2 + |B|_F^2) / 2``, never less than the nuclear norm.
    """

    singular_values: Tensor
    imbalance: Tensor
    squared_norm: Tensor

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
        """Whether A B is not 0: the ratios below are NaN where it is (LoRA at its start)."""
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
    def gap(self) -> Tensor:
        """``(|A|^2 + |B|^2)/2 - |AB|_*`` >= 0: 0 when the factors are balanced and aligned."""
        return (self.squared_norm - self.nuclear).clamp(min=0)

    def _or_nan(self, value: Tensor) -> Tensor:
        return torch.where(self.defined, value, torch.nan)


def product_spectrum(A: Tensor, B: Tensor) -> ProductSpectrum:
    r"""Measure the spectrum of A B without forming it.

    With ``A^T A = V_a S_a^2 V_a^T`` and ``B B^T = V_b S_b^2 V_b^T``, the singular values of A B are
    those of the r x r matrix ``S_a V_a^T V_b S_b``. The Gram matrices are accumulated in float64
    whatever the dtype of the factors.

    Parameters
    ----------
    A : Tensor of shape (..., n, r)
        The left factor, any floating dtype. For attention: Q-weights transposed, one batch entry
        per head.
    B : Tensor of shape (..., r, m)
        The right factor; leading dimensions broadcast.

    Returns
    -------
    ProductSpectrum
        On the device of the factors, detached.

    Raises
    ------
    ValueError
        If the inner dimensions differ, or a factor holds NaN or infinite entries.

    Examples
    --------
    >>> spectrum = product_spectrum(torch.eye(4)[:, :2], torch.eye(4)[:2])
    >>> round(spectrum.ratio.item() ** 2, 6), round(spectrum.stable_rank.item(), 6)
    (2.0, 2.0)
    """
    if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
        shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
        raise ValueError(
            f"product_spectrum: A (..., n, r) and B (..., r, m) are needed, got {shapes}"
        )
    gram_a, gram_b = _gram(A.detach().mT, "A"), _gram(B.detach(), "B")
    core = _root(gram_a).mT @ _root(gram_b)
    traces = gram_a.diagonal(dim1=-2, dim2=-1).sum(-1) + gram_b.diagonal(dim1=-2, dim2=-1).sum(-1)
    rank = min(A.shape[-2], A.shape[-1], B.shape[-1])  # the others are rounding
    return ProductSpectrum(torch.linalg.svdvals(core)[..., :rank], gram_a - gram_b, traces / 2)


def _gram(rows: Tensor, name: str) -> Tensor:
    """Give rows rows^T in float64, of size r x r."""
    wide = rows.to(torch.float64)
    gram = wide @ wide.mT
    if not torch.isfinite(gram).all():
        raise ValueError(f"product_spectrum: {name} holds NaN or infinite entries")
    return gram


def _root(gram: Tensor) -> Tensor:
    """Give L with L L^T = gram, for a semi-definite gram; rounding below 0 counts as 0."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]
