"""Gram matrices rows rows^T in float64, also of rows that are sharded over processes."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._shards import Rows, is_sharded

__all__ = ["CHUNK", "double", "gram", "trace"]

CHUNK = 1 << 18  # elements that are float64 at a time: 2 MB, which stays in a core's cache

# glibc gives back at once what is larger than any block it has seen freed, and new pages cost more
# than a product: a block larger than ours, once, lets it keep ours.
torch.empty(2 * CHUNK, dtype=torch.float64, device="cpu")


def gram(rows: Tensor | Rows, group: Any = None) -> Tensor:
    """Return rows rows^T in float64, of shape (..., r, r), for rows of shape (..., r, n), detached.

    A ``DTensor``, or `Rows` of one, gives its whole Gram matrix as a plain tensor on every rank.
    Only Gram matrices travel where the columns are sharded, and where each process holds whole
    heads. Other rows that are sharded meet in an all-to-all first; see `shards`.
    """
    if isinstance(rows, Rows):
        return rows.gram(_local_gram)
    if is_sharded(rows):
        return Rows(rows).gram(_local_gram)
    total = _local_gram(rows)
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total


def double(rows: Tensor) -> Tensor:
    """Return rows in float64, on the CPU where the device has no float64 (mps)."""
    return (rows.cpu() if rows.is_mps else rows).to(torch.float64)


def trace(gram: Tensor) -> Tensor:
    """Return the traces of a batch."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _local_gram(rows: Tensor) -> Tensor:
    """Return rows rows^T in float64 without a float64 copy of all rows."""
    if rows.is_mps:  # it has no float64
        rows = rows.cpu()
    if rows.dtype == torch.float64:
        return rows @ rows.mT
    if rows.numel() <= CHUNK:
        wide = rows.to(torch.float64)
        # Of small matrices, matmul takes as long to look at the shapes as to multiply.
        return torch.bmm(wide, wide.mT) if wide.ndim == 3 else wide @ wide.mT
    return _in_chunks(rows)


def _in_chunks(rows: Tensor) -> Tensor:
    """Convert chunk after chunk into the same memory: new one would cost as much as the product."""
    *batch, r, n = rows.shape
    flat = rows.reshape(prod(batch), r, n)
    total = torch.zeros(len(flat), r, r, dtype=torch.float64, device=rows.device)
    scratch = total.new_empty(max(CHUNK, r))
    # Whole matrices at a time where they are small, else columns of one.
    entries, width = max(1, CHUNK // (r * n)), max(1, min(n, CHUNK // r))
    tall = rows.stride(-2) < rows.stride(-1)  # as lora_B, whose r columns are the rows here
    for grams, part in zip(total.split(entries), flat.split(entries), strict=True):
        for piece in part.split(width, -1):
            stored = piece.mT if tall else piece
            wide = scratch[: piece.numel()].view(stored.shape).copy_(stored)
            wide = wide.mT if tall else wide
            grams.baddbmm_(wide, wide.mT)  # rows rows^T is a sum over columns
    return total.view(*batch, r, r)
