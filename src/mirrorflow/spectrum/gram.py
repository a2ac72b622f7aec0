"""Gram matrices rows rows^T in float64, also of rows that are sharded over processes."""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["CHUNK", "columns", "gram", "is_sharded", "trace"]

CHUNK = 1 << 18  # elements that are float64 at a time: 2 MB, which stays in a core's cache


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


def trace(gram: Tensor) -> Tensor:
    """Give the traces of a batch."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _local_gram(rows: Tensor) -> Tensor:
    """Give rows rows^T in float64 without a float64 copy of all rows."""
    if rows.device.type == "mps":  # it has no float64
        rows = rows.cpu()
    if rows.dtype == torch.float64 or rows.numel() <= CHUNK:
        wide = rows.to(torch.float64)
        return wide @ wide.mT
    return _in_chunks(rows)


def _in_chunks(rows: Tensor) -> Tensor:
    """Convert chunk after chunk into the same memory: new one would cost as much as the product."""
    *batch, r, n = rows.shape
    flat = rows.reshape(prod(batch), r, n)
    total = torch.zeros(len(flat), r, r, dtype=torch.float64, device=rows.device)
    scratch = total.new_empty(max(CHUNK, r))
    entries, width = max(1, CHUNK // (r * n)), max(1, min(n, CHUNK // r))
    for grams, part in zip(total.split(entries), flat.split(entries), strict=True):
        for piece in part.split(width, -1):
            wide = scratch[: piece.numel()].view(piece.shape).copy_(piece)
            grams.baddbmm_(wide, wide.mT)
    return total.view(*batch, r, r)


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
