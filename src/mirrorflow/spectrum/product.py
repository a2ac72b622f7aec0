r"""Spectra of products A B from their factors: r x r Gram matrices, never the product itself.

LoRA's update B A and attention's Q K^T are products through a small inner dimension r. Their
singular values are those of an r x r core, so that the quantities that weight decay moves (the
ratio of the nuclear to the Frobenius norm above all) cost next to nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod
from operator import sub
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ProductSpectrum", "gram", "product_spectrum", "spectrum_of_grams", "trace"]

NATIVE = (torch.float64, torch.float32, torch.float16)  # dtypes that NumPy has
CHUNK = 1 << 18  # elements that are float64 at a time: 2 MB, which stays in a core's cache
EPS = torch.finfo(torch.float64).eps
TRUSTED = 1e-10  # the relative error of the nuclear norm that the fast path may have


@dataclass(frozen=True, eq=False)
class ProductSpectrum:
    r"""The spectrum of A B, batched like its factors.

    Attributes
    ----------
    singular_values : Tensor of shape (..., min(n, r, m))
        Descending, float64; all 0 where A B is 0 up to rounding, NaN where a factor is not finite.
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
    if not torch.isfinite(spectrum.squared_norm).all():
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


def gram(rows: Tensor, group: Any = None) -> Tensor:
    """Give rows rows^T in float64, of shape (..., r, r), for rows of shape (..., r, n).

    A ``DTensor`` gives its whole Gram matrix as a plain tensor on every rank. Only Gram matrices
    travel, unless it is sharded over its r rows: those are turned into columns first (an
    all-to-all, in which each rank sends what it holds).
    """
    rows = rows.detach()
    if is_sharded(rows):
        return _sharded_gram(rows)
    total = _local_gram(rows)
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def columns(rows: Any) -> Any:
    """Give a DTensor (..., r, n) sharded over its columns where it was over its r rows."""
    from torch.distributed.tensor import Replicate, Shard

    inner, last = rows.ndim - 2, rows.ndim - 1
    wanted = [
        Shard(last) if p.is_shard(inner) else Replicate() if p.is_partial() else p
        for p in rows.placements
    ]
    return rows.redistribute(placements=wanted)


def spectrum_of_grams(gram_a: Tensor, gram_b: Tensor, rank: int) -> ProductSpectrum:
    """Measure A B from A^T A and B B^T; entries that are not finite have NaN singular values."""
    imbalance = _by_numpy(sub, gram_a, gram_b)
    squares_a, squares_b = trace(gram_a), trace(gram_b)
    squares = squares_a + squares_b  # not finite exactly where an entry of a factor is not
    broken = ~torch.isfinite(squares)
    if any_broken := bool(broken.any()):  # LAPACK refuses them
        gram_a, gram_b = (torch.where(broken[..., None, None], 0.0, g) for g in (gram_a, gram_b))
    values = _singular_values(gram_a, gram_b, (squares_a * squares_b).sqrt())[..., :rank]
    if any_broken:
        values = torch.where(broken[..., None], torch.nan, values)
    return ProductSpectrum(values, imbalance, squares / 2)


def _singular_values(gram_a: Tensor, gram_b: Tensor, size: Tensor) -> Tensor:
    """Give the singular values of A B, |A||B| = size: the fast way, and again where it lost some.

    Eigenvalues of the squared core have the error EPS s_1^2, so that s_i has EPS s_1^2 / s_i.
    """
    lower, failed = _cholesky(gram_a)
    core = _by_numpy(lambda L, G: L.swapaxes(-1, -2) @ (G @ L), lower, gram_b)
    squares = _by_numpy(np.linalg.eigvalsh, core) if core.is_cpu else torch.linalg.eigvalsh(core)
    values = squares.flip(-1).clamp_(min=0).sqrt_()
    largest = values[..., 0]
    exact = (values[..., -1] > 1e-5 * largest) & (largest > 1e-5 * size) & (failed == 0)
    if exact.all():
        return values
    error = EPS * (largest[..., None] ** 2 / values).sum(-1)
    exact = (error < TRUSTED * values.sum(-1)) & (largest > 1e-5 * size) & (failed == 0)
    if not exact.all():
        shape = (*values.shape[:-1], *gram_a.shape[-2:])
        root_a, root_b = (_root(g.expand(shape)[~exact]) for g in (gram_a, gram_b))
        values[~exact] = torch.linalg.svdvals(root_a.mT @ root_b)
    rounding = 8 * EPS * gram_a.shape[-1] * size
    return torch.where((values[..., 0] > rounding)[..., None], values, 0.0)


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Give L with L L^T = gram, and for each entry whether there is none (not 0)."""
    if gram.is_cpu:
        try:
            lower = _by_numpy(np.linalg.cholesky, gram)
        except np.linalg.LinAlgError:  # in one of them; torch says in which
            return torch.linalg.cholesky_ex(gram)
        return lower, torch.zeros(gram.shape[:-2], dtype=torch.int32)
    return torch.linalg.cholesky_ex(gram)


def _root(gram: Tensor) -> Tensor:
    """Give L with L L^T = gram, for a semi-definite gram; rounding counts as 0."""
    values, vectors = torch.linalg.eigh(gram)
    zero = values <= EPS * gram.shape[-1] * values[..., -1:]
    return vectors * torch.where(zero, 0.0, values).sqrt()[..., None, :]


def trace(gram: Tensor) -> Tensor:
    """Give the traces of a batch."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _local_gram(rows: Tensor, scratch: Any = None) -> Tensor:
    """Give rows rows^T in float64 without a float64 copy of all rows.

    On the CPU every chunk is converted into the same ``scratch``: new memory for each would cost as
    much as the product.
    """
    if rows.device.type == "mps":  # it has no float64
        rows = rows.cpu()
    if rows.dtype == torch.float64 or rows.numel() <= CHUNK:
        return _square(rows, scratch)
    scratch = np.empty(CHUNK) if scratch is None else scratch
    if rows.ndim == 2:
        parts = rows.split(max(1, CHUNK // len(rows)), -1)
        return _sum(_local_gram(part, scratch) for part in parts)
    if len(rows) == 1:
        return _local_gram(rows[0], scratch)[None]
    entries = max(1, CHUNK // prod(rows.shape[1:]))
    parts = [_local_gram(part, scratch) for part in rows.split(entries)]
    if rows.device.type != "cpu":
        return torch.cat(parts)
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))


def _square(wide: Tensor, scratch: Any = None) -> Tensor:
    """Give wide wide^T in float64.

    NumPy sees that it is symmetric (syrk), and needs half the time. It converts, too: torch and
    NumPy taking turns would wait for each other's threads (`_by_numpy`).
    """
    if wide.device.type != "cpu":
        wide = wide.to(torch.float64)
        return wide @ wide.mT
    wide = wide if wide.dtype in NATIVE else wide.to(torch.float32)  # bfloat16 fits into it
    array = wide.numpy()
    if scratch is not None and array.dtype != np.float64 and array.size <= scratch.size:
        double = scratch[: array.size].reshape(array.shape)
        np.copyto(double, array)
    else:
        double = array.astype(np.float64, copy=False)
    with np.errstate(all="ignore"):  # NaN and inf are reported by the callers
        return torch.from_numpy(double @ double.swapaxes(-1, -2))


def _by_numpy(compute: Any, *tensors: Tensor) -> Tensor:
    """Compute on the CPU by NumPy, as the Gram matrices before, elsewhere by torch."""
    if not tensors[0].is_cpu:
        return compute(*tensors)
    with np.errstate(all="ignore"):  # NaN and inf are reported by the callers
        return torch.from_numpy(compute(*(tensor.numpy() for tensor in tensors)))


def _sum(grams: Any) -> Tensor:
    """Add Gram matrices in place."""
    total = next(grams)
    for more in grams:
        total += more
    return total


def _sharded_gram(rows: Any) -> Tensor:
    """Give the Gram matrix of a DTensor, on every rank."""
    from torch.distributed.tensor import DTensor, Partial

    rows = columns(rows)
    shape = torch.Size((*rows.shape[:-1], rows.shape[-2]))
    parts = [Partial() if p.is_shard(rows.ndim - 1) else p for p in rows.placements]
    total = DTensor.from_local(
        _local_gram(rows.to_local()),
        rows.device_mesh,
        parts,
        shape=shape,
        stride=tuple(prod(shape[i + 1 :]) for i in range(len(shape))),
    )
    return total.full_tensor()


def _sizes(n: int, m: int, group: Any) -> tuple[int, int]:
    """Give the long dimensions, summed over the group's shards."""
    if group is None:
        return n, m
    sizes: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(sizes, (n, m), group=group)
    return sum(s[0] for s in sizes), sum(s[1] for s in sizes)
