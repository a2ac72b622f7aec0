"""Measuring pairs of factors, those of equal shapes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor

from .._threads import few_threads
from ._grams import CHUNK, double, gram
from ._shards import Rows
from .pairs import Factor, Pair
from .product import ProductSpectrum, spectrum_of_grams, spectrum_of_products
from .records import Record

__all__ = ["measure"]

ENERGIES = (0.9, 0.95, 0.99)
MEMORY = 1 << 24  # elements of factors and Gram matrices that a batch holds at most


def measure(
    pairs: Sequence[Pair], load: Callable[[Factor], Tensor | Rows], level: str, batch: int = MEMORY
) -> tuple[Record, ...]:
    """Measure pairs; those of equal shapes together, as many as ``batch`` elements allow.

    Parameters
    ----------
    pairs : sequence of Pair
    load : callable
        Gives the rows of a factor, (r, long dimension).
    level : str
        "layer" or "head"; what has no heads is measured whole.
    batch : int
        The number of elements that factors and Gram matrices of a batch have at most; 0 takes pair
        by pair.
    """
    records: dict[int, list[Record]] = {}
    for chosen in _batches(pairs, level, batch):
        group = [pairs[i] for i in chosen]
        for i, found in zip(chosen, _measure_alike(group, load, level), strict=True):
            records[i] = found
    return tuple(record for i in range(len(pairs)) for record in records[i])


def _batches(pairs: Sequence[Pair], level: str, batch: int) -> Iterator[list[int]]:
    """Divide the indices of pairs into groups of the same shape and of limited size."""
    alike: dict[Any, list[int]] = {}
    for i, pair in enumerate(pairs):
        alike.setdefault((pair.shape, pair.heads, pair.key_heads), []).append(i)
    for (shape, *_), members in alike.items():
        n, r, m = shape
        size = r * (n + m) + 4 * r * r  # the factors, and Gram matrices beside their copies
        count = max(1, batch // size)
        yield from (members[start : start + count] for start in range(0, len(members), count))


def _measure_alike(
    pairs: list[Pair], load: Callable[[Factor], Tensor | Rows], level: str
) -> list[list[Record]]:
    """Measure pairs of the same shape."""
    first = pairs[0]
    heads, key_heads = (first.heads, first.key_heads) if level == "head" else (None, None)
    left = [_by_head(load(pair.left), heads) for pair in pairs]
    right = [_by_head(load(pair.right), key_heads) for pair in pairs]
    n, r, m = first.shape
    with few_threads(len(pairs) * r * (n + m)):
        if r // (heads or 1) > n + m and not _sharded(left, right):
            spectrum = _tall(left, right, first)
        elif heads is None and first.heads != first.key_heads:
            spectrum = _grouped(left, right, first)
        elif heads is None:
            spectrum = _whole(left, right, first)
        else:
            spectrum = _heads(left, right, first)
        rows = _numbers(spectrum)
    return [
        _records(pair, found, (n, r // heads if heads else r, m))
        for pair, found in zip(pairs, rows, strict=True)
    ]


def _whole(left: list[Any], right: list[Any], pair: Pair) -> ProductSpectrum:
    """Measure products over their whole width."""
    n, r, m = pair.shape
    gram_a = _grams(left)
    gram_b = _grams(right).to(gram_a.device)
    if _sharded(left, right):
        return spectrum_of_grams(gram_a, gram_b, min(n, r, m))
    if r < min(n, m):
        return spectrum_of_grams(gram_a, gram_b, r, lambda i: (left[i[0]], right[i[0]]))
    values = []
    for i, a in enumerate(left):  # wherever each is
        grams = gram_a[i].to(a.device), gram_b[i].to(a.device)
        values.append(spectrum_of_products(a, right[i].to(a.device), *grams).singular_values)
    return ProductSpectrum(
        torch.stack([found.to(gram_a.device) for found in values]), gram_a, gram_b
    )


def _tall(left: list[Any], right: list[Any], pair: Pair) -> ProductSpectrum:
    """Measure products whose inner dimension r is above n + m, without r x r matrices.

    With the rows ``[A^T, B] = Q [R_A, R_B]``, A B is R_A^T R_B, and A^T A - B B^T has the norm of
    R_A R_A^T - R_B R_B^T: the inner dimension is n + m then.
    """
    n = pair.shape[0]
    heads, key_heads = (pair.heads or 1), (pair.key_heads or 1)
    cores = []
    for a, b in zip(left, right, strict=True):
        queries = double(a)
        keys = double(b).to(queries.device)
        if heads != key_heads:  # each row of K meets a row of each query head that shares it
            grouped = keys if keys.ndim > 2 else keys.unflatten(0, (key_heads, -1))
            keys = grouped.repeat_interleave(heads // key_heads, 0).view(*queries.shape[:-1], -1)
        cores.append(torch.linalg.qr(torch.cat((queries, keys), -1), mode="r").R)
    core = torch.stack(cores)
    a, b = core[..., :n], core[..., n:]
    return spectrum_of_products(a, b, gram(a), gram(b))


def _heads(left: list[Any], right: list[Any], pair: Pair) -> ProductSpectrum:
    """Measure head by head, from rows (heads, width, n) and (key heads, width, m)."""
    heads, key_heads = pair.heads or 1, pair.key_heads or 1
    n, r, m = pair.shape
    shared = heads // key_heads

    def entry(index: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        i, head = index
        return left[i][head], right[i][head // shared].to(left[i].device)

    gram_a = _grams(left)
    gram_b = _grams(right).to(gram_a.device).repeat_interleave(shared, dim=1)
    rank = min(n, r // heads, m)
    return spectrum_of_grams(gram_a, gram_b, rank, None if _sharded(left, right) else entry)


def _sharded(*factors: list[Any]) -> bool:
    return any(isinstance(rows, Rows) for matrices in factors for rows in matrices)


def _by_head(rows: Tensor | Rows, heads: int | None) -> Tensor | Rows:
    """View (heads * width, n) as (heads, width, n)."""
    if heads is None:
        return rows
    return rows.by_head(heads) if isinstance(rows, Rows) else rows.unflatten(0, (heads, -1))


def _grams(matrices: list[Tensor | Rows]) -> Tensor:
    """Return the stacked Gram matrices of matrices of one shape, few of them stacked at a time."""
    plain = [matrix for matrix in matrices if not isinstance(matrix, Rows)]
    if len(plain) < len(matrices) or len({(m.device, m.dtype) for m in plain}) > 1:
        grams = [gram(matrix) for matrix in matrices]
        return torch.stack([found.to(grams[0].device) for found in grams])
    count = max(1, CHUNK // max(1, plain[0].numel()))
    parts = [plain[start : start + count] for start in range(0, len(plain), count)]
    return torch.cat(
        [gram(torch.stack(part) if len(part) > 1 else part[0].unsqueeze(0)) for part in parts]
    )


def _grouped(left: list[Any], right: list[Any], pair: Pair) -> ProductSpectrum:
    """Measure layers whose query heads share key heads.

    The product is Q's with K repeated for each query head. As the query heads of a group meet
    the same key head, it is also that of their sum with K, which has a smaller inner dimension.
    """
    heads, key_heads = pair.heads or 1, pair.key_heads or 1
    n, r, m = pair.shape
    group, width = heads // key_heads, r // heads

    def entry(index: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        queries = double(left[index[0]]).unflatten(0, (key_heads, group, width))
        # sum_h Q_h^T K = (sum_h Q_h)^T K
        return queries.sum(1).flatten(0, 1), right[index[0]].to(queries.device)

    gram_a = _grams(left)
    gram_b = _grams(right).to(gram_a.device)
    split = gram_a.unflatten(-1, (key_heads, group, width))
    split = split.unflatten(-4, (key_heads, group, width))
    # (sum_h Q_h)(sum_h Q_h)^T = sum_{h, h'} Q_h Q_h'^T, within and between groups.
    summed = split.sum((-5, -2)).flatten(-4, -3).flatten(-2, -1)
    rank = min(n, key_heads * width, m)
    spectrum = spectrum_of_grams(summed, gram_b, rank, None if _sharded(left, right) else entry)
    rows = torch.arange(key_heads * width, device=gram_a.device).view(key_heads, 1, width)
    shared = rows.expand(-1, group, -1).flatten()  # which row of K each row of Q meets
    repeated = gram_b[..., shared, :][..., shared]
    return ProductSpectrum(spectrum.singular_values, gram_a, repeated)


def _numbers(spectrum: ProductSpectrum) -> list[Any]:
    """Return (pairs, [heads,] numbers) as lists, in one transfer."""
    numbers = (
        spectrum.nuclear,
        spectrum.frobenius,
        spectrum.singular_values[..., 0],
        spectrum.ratio,
        spectrum.effective_rank,
        spectrum.stable_rank,
        spectrum.gap,
        torch.linalg.matrix_norm(spectrum.imbalance),
        *(spectrum.rank_for(energy) for energy in ENERGIES),
    )
    return torch.stack(numbers, -1).tolist()


def _records(pair: Pair, rows: list[Any], shape: tuple[int, int, int]) -> list[Record]:
    """Make the records of a pair: one, or one per head."""
    if isinstance(rows[0], float):
        return [_record(pair, None, rows, shape)]
    return [_record(pair, head, row, shape) for head, row in enumerate(rows)]


def _record(
    pair: Pair, head: int | None, numbers: Iterable[float], shape: tuple[int, int, int]
) -> Record:
    """Make a record."""
    nuclear, frobenius, spectral, ratio, effective, stable, gap, imbalance, *shares = numbers
    ranks = [rank if isnan(rank) else int(rank) for rank in shares]
    status = "not finite" if isnan(gap) else "undefined" if isnan(ratio) else "ok"
    size = abs(pair.scale)
    return Record(
        name=pair.name,
        kind=pair.kind,
        head=head,
        adapter=pair.adapter,
        shape=shape,
        status=status,
        nuclear=nuclear * size,
        frobenius=frobenius * size,
        spectral=spectral * size,
        ratio=ratio,
        effective_rank=effective,
        stable_rank=stable,
        gap=gap,
        imbalance=imbalance,
        rank_90=ranks[0],
        rank_95=ranks[1],
        rank_99=ranks[2],
        scale=pair.scale,
        notes=pair.notes,
    )
