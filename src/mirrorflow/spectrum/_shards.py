"""Rows that are sharded over processes: which of them are here, and how rows become columns.

``rows rows^T`` is a sum over columns: where processes hold columns, their Gram matrices add up.
Where they hold rows (FSDP2 shards a weight (r, n) so), every two rows have to meet: an all-to-all
turns rows into columns, in which each of P processes receives r n (P - 1) / P^2 elements, a P-th of
what an all-gather moves. Heads that a process holds whole meet nobody, and only their Gram matrices
travel.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rows", "is_sharded"]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(frozen=True)
class Rows:
    """Rows of a DTensor (..., R, n): all, or those that are chosen, whole or head by head.

    Attributes
    ----------
    tensor : DTensor
    chosen : Tensor of int64 or None
        Which of the R rows, ascending; None for all.
    heads : int or None
        Divides the chosen rows, (r, n), into (heads, r / heads, n).
    """

    tensor: Any
    chosen: Tensor | None = None
    heads: int | None = None

    def by_head(self, heads: int | None) -> Rows:
        """Divide the rows into heads."""
        return replace(self, heads=heads)

    def gram(self, local_gram: Any) -> Tensor:
        """Return rows rows^T on every process, of shape (..., r, r) or (heads, width, width).

        ``local_gram`` gives a plain tensor's. All processes have to call.
        """
        rows = _one_axis(self.tensor.detach())
        axis, blocks = _blocks(rows)
        here, held = _chosen(rows, self.chosen, axis, blocks)
        r = sum(held)
        if self.heads and axis is not None and not any(size % (r // self.heads) for size in held):
            total = self._whole_heads(here, rows.device_mesh.get_local_rank(axis), held, local_gram)
        else:
            if axis is not None:
                here = _to_columns(here, held, rows.device_mesh.get_group(axis))
            total = local_gram(here.unflatten(0, (self.heads, -1)) if self.heads else here)
        return _summed(total, rows, (*rows.shape[:-2], r, r) if self.heads is None else total.shape)

    def _whole_heads(self, here: Tensor, rank: int, held: list[int], local_gram: Any) -> Tensor:
        """Return the Gram matrices of the heads that are here, and 0 for the others."""
        heads = self.heads or 1
        width = sum(held) // heads
        total = torch.zeros(heads, width, width, dtype=torch.float64, device=here.device)
        first = sum(held[:rank]) // width
        if len(here):
            mine = local_gram(here.unflatten(0, (-1, width)))
            total[first : first + len(mine)] = mine
        return total


def _one_axis(rows: Any) -> Any:
    """Leave the r rows sharded over one axis of the mesh at most, and nothing as partial sums."""
    from torch.distributed.tensor import Replicate, Shard

    inner = rows.ndim - 2
    cut = [i for i, p in enumerate(rows.placements) if getattr(p, "dim", None) == inner]
    kept = cut[-1] if cut and type(rows.placements[cut[-1]]) is Shard else None
    wanted = [
        Replicate() if p.is_partial() or (i in cut and i != kept) else p
        for i, p in enumerate(rows.placements)
    ]
    return rows if wanted == list(rows.placements) else rows.redistribute(placements=wanted)


def _blocks(rows: Any) -> tuple[int | None, list[int]]:
    """Return the axis of the mesh over which the rows are sharded, and the edges of the blocks."""
    size, inner = rows.shape[-2], rows.ndim - 2
    for axis, placement in enumerate(rows.placements):
        if getattr(placement, "dim", None) == inner:
            count = rows.device_mesh.size(axis)
            step = -(-size // count)  # as torch.chunk divides
            return axis, [min(size, step * i) for i in range(count + 1)]
    return None, [0, size]


def _chosen(
    rows: Any, chosen: Tensor | None, axis: int | None, blocks: list[int]
) -> tuple[Tensor, list[int]]:
    """Return the chosen rows that are here, and how many each process of the axis has."""
    here = rows.to_local()
    if chosen is None:
        return here, [b - a for a, b in pairwise(blocks)]
    edges = torch.searchsorted(chosen, torch.tensor(blocks)).tolist()
    rank = 0 if axis is None else rows.device_mesh.get_local_rank(axis)
    mine = chosen[edges[rank] : edges[rank + 1]] - blocks[rank]
    return here[mine.to(here.device)], [b - a for a, b in pairwise(edges)]


def _to_columns(here: Tensor, held: list[int], group: Any) -> Tensor:
    """Turn this process's rows (..., held[rank], n) into all rows of its share of the columns.

    This is not DTensor's redistribute, which gathers everything on the CPU.
    """
    rank = torch.distributed.get_rank(group)
    pieces = here.tensor_split(len(held), -1)
    sent = torch.cat([piece.reshape(-1) for piece in pieces])
    batch, width = here.shape[:-2], pieces[rank].shape[-1]
    sizes = [prod(batch) * size * width for size in held]
    received = sent.new_empty(sum(sizes))
    torch.distributed.all_to_all_single(
        received, sent, sizes, [piece.numel() for piece in pieces], group=group
    )
    parts = zip(received.split(sizes), held, strict=True)
    return torch.cat([part.view(*batch, size, width) for part, size in parts], -2)


def _summed(total: Tensor, rows: Any, shape: tuple[int, ...]) -> Tensor:
    """Add up the Gram matrices of all processes, which hold columns or heads."""
    from torch.distributed.tensor import DTensor, Partial

    last = (rows.ndim - 2, rows.ndim - 1)
    places = [Partial() if getattr(p, "dim", None) in last else p for p in rows.placements]
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    whole = DTensor.from_local(
        total, rows.device_mesh, places, shape=torch.Size(shape), stride=stride
    )
    return whole.full_tensor()
