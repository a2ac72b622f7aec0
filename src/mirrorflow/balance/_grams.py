"""Gram matrices of factors before and after a step, in float64, over all processes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Layout",
    "Number",
    "accumulate",
    "check_pair",
    "finite",
    "gram",
    "is_sharded",
    "layout",
    "norm",
    "zeros",
]

Number = float | tuple[float, float]  # one for both factors, or one for A and one for B

CHUNK = 1 << 18  # elements that are float64 at a time: 2 MB, which stays in a core's cache
CHUNK_ON_DEVICE = 1 << 24  # an accelerator wants few and large products


@dataclass(frozen=True)
class Layout:
    """How factors of one kind lie in memory and over processes, seen as rows (..., r, n).

    Attributes
    ----------
    shape : tuple of int
        Of the rows of all processes.
    tall : bool
        Whether they are the columns of what is in memory, as those of ``lora_B.weight`` (n, r).
    mesh : DeviceMesh or None
        None for a plain tensor.
    dims : tuple of int or None
        For each axis of the mesh the dimension of the rows that it divides, if any.
    """

    shape: tuple[int, ...]
    tall: bool
    mesh: Any = None
    dims: tuple[int | None, ...] = ()

    def take(self, factors: list[Tensor], axes: list[int]) -> Tensor:
        """Copy factors into rows (count, ..., r, n), what is here of them.

        Small ones become float64 at once; large ones keep their dtype and their order in memory.
        """
        if self.mesh is not None:
            factors = [_plain(f, axis).to_local() for f, axis in zip(factors, axes, strict=True)]
        # A (n, r) is tall as it is, and B (r, m) is not; others are views of what is in memory.
        turned = [self.tall != (axis == -2) for axis in axes]
        found = torch.stack([f.mT if t else f for f, t in zip(factors, turned, strict=True)])
        found = found.mT if self.tall else found
        if len(self.shape) - 2 in self.dims:
            found = self._exchanged(found)
        found = found.cpu() if found.is_mps else found  # which has no float64
        return found.to(torch.float64) if found.numel() <= CHUNK else found

    def whole(self, local: Tensor) -> Tensor:
        """Return matrices (..., r, r) of all processes from this one's, in one collective.

        ``rows rows^T`` is a sum over n, so that nothing else travels.
        """
        if self.mesh is None:
            return local
        from torch.distributed.tensor import Partial

        lead, long = local.ndim - len(self.shape), len(self.shape) - 1
        shape = (*local.shape[:lead], *self.shape[:-1], self.shape[-2])
        # Shards along n hold summands of the Gram matrix, others whole entries of it.
        places = [Partial() if dim == long else _place(dim, lead) for dim in self._kept()]
        return self._spread(local, shape, places).full_tensor()

    def _kept(self) -> list[int | None]:
        """Return which dimensions the axes of the mesh divide once rows are whole along r."""
        inner, long = len(self.shape) - 2, len(self.shape) - 1
        kept = [None if dim == inner else dim for dim in self.dims]
        if inner in self.dims and long not in self.dims:
            kept[self.dims.index(inner)] = long
        return kept

    def _exchanged(self, rows: Tensor) -> Tensor:
        """Give each process its share of n of all r rows, where it has all n of some."""
        places = [_place(dim, 1) for dim in self.dims]
        spread = self._spread(rows.contiguous(), (len(rows), *self.shape), places)
        return spread.redistribute(placements=[_place(dim, 1) for dim in self._kept()]).to_local()

    def _spread(self, local: Tensor, shape: tuple[int, ...], places: list[Any]) -> Any:
        """Return the DTensor of which this process has ``local``."""
        from torch.distributed.tensor import DTensor

        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(
            local, self.mesh, places, run_check=False, shape=torch.Size(shape), stride=stride
        )


def layout(factor: Tensor, axis: int) -> Layout:
    """Return the layout of a factor whose long dimension is ``axis``: -2 for A, -1 for B."""
    inner = -3 - axis
    # Of the whole factor: the order of collectives hangs on it, and has to be the same everywhere.
    tall = factor.stride(axis) > factor.stride(inner)
    shape = (*factor.shape[:-2], factor.shape[inner], factor.shape[axis])
    if not is_sharded(factor):
        return Layout(shape, tall)
    found = _plain(factor, axis)
    swap = {found.ndim + axis: found.ndim - 1, found.ndim + inner: found.ndim - 2}
    dims = [getattr(placement, "dim", None) for placement in found.placements]
    return Layout(shape, tall, found.device_mesh, tuple(swap.get(dim, dim) for dim in dims))


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor; nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _plain(factor: Any, axis: int) -> Any:
    """Return a DTensor with sums and interleaved shards gathered, unless they divide n."""
    from torch.distributed.tensor import Replicate, Shard

    places = [
        p if getattr(p, "dim", None) == factor.ndim + axis or type(p) is Shard else Replicate()
        for p in factor.placements
    ]
    return factor if places == list(factor.placements) else factor.redistribute(placements=places)


def _place(dim: int | None, lead: int) -> Any:
    """Return the placement of an axis that divides a dimension, behind ``lead`` others."""
    from torch.distributed.tensor import Replicate, Shard

    return Replicate() if dim is None else Shard(dim + lead)


def accumulate(total: Tensor, before: Tensor, after: Tensor, s: float | Tensor) -> None:
    """Let sums of s A^T C and C^T C, C = A_next - s A, shrink by s^2, and add those of a step.

    The rows are A^T (count, ..., r, n), the sums (2, count, ..., r, r). C is formed before it is
    squared: from Gram matrices of A and A_next alone, ``C^T C`` would have the error of ``A^T A``,
    which is 1e8 times larger if a step changes a factor by 1e-4 of itself.
    """
    old, new = _flat(before), _flat(after)
    if isinstance(s, Tensor):
        s = s.expand(*before.shape[:-2], 1, 1).reshape(-1, 1, 1)
    sums = total.view(2, *old.shape[:2], old.shape[1])
    # A_next = s A + C with C = -P: A^T A <- s^2 A^T A + s (A^T C + C^T A) + C^T C.
    sums *= s * s
    for entries, columns in _pieces(old):
        kept = _wide(old, entries, columns) * (s[entries] if isinstance(s, Tensor) else s)
        change = _wide(new, entries, columns) - kept
        sums[0, entries].baddbmm_(kept, change.mT)  # s A^T C
        sums[1, entries].baddbmm_(change, change.mT)  # C^T C


def gram(rows: Tensor) -> Tensor:
    """Return rows rows^T, (..., r, r), in float64."""
    flat, total = _flat(rows), zeros((), rows)
    sums = total.view(-1, *total.shape[-2:])
    for entries, columns in _pieces(flat):
        wide = _wide(flat, entries, columns)
        sums[entries].baddbmm_(wide, wide.mT)
    return total


def zeros(lead: tuple[int, ...], rows: Tensor) -> Tensor:
    """Return room for sums (*lead, ..., r, r) over rows (..., r, n)."""
    shape = (*lead, *rows.shape[:-1], rows.shape[-2])
    return torch.zeros(shape, dtype=torch.float64, device=rows.device)


def norm(matrices: Tensor) -> Tensor:
    """Return the Frobenius norms of a batch."""
    return torch.linalg.matrix_norm(matrices)


def _flat(rows: Tensor) -> Tensor:
    """Return rows (..., r, n) as (count, r, n)."""
    return rows.reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:]) if rows.ndim > 3 else rows


def _pieces(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Divide rows (count, r, n) into what is float64 at a time: entries, and columns of them."""
    count, r, n = rows.shape
    chunk = CHUNK if rows.device.type == "cpu" else CHUNK_ON_DEVICE
    entries, width = max(1, chunk // max(1, r * n)), max(1, chunk // r)
    for first in range(0, count, entries):
        for left in range(0, n, width):
            yield slice(first, first + entries), slice(left, left + width)


def _wide(rows: Tensor, entries: slice, columns: slice) -> Tensor:
    """Return a piece in float64."""
    return rows[entries, :, columns].to(torch.float64)


def check_pair(A: Tensor, B: Tensor, name: str) -> tuple[torch.Size, torch.Size]:
    """Return the shapes of two factors that fit and have floating-point data."""
    for factor in (A, B):
        if not isinstance(factor, Tensor):
            raise TypeError(
                f"{name} must be tensors, got {type(factor).__name__}. Give torch.as_tensor(...)"
            )
    if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2] or A.shape[-1] == 0:
        raise ValueError(
            f"{name} must be A (..., n, r) and B (..., r, m), got {tuple(A.shape)} and "
            f"{tuple(B.shape)}. Transpose the factors."
        )
    for factor in (A, B):
        if factor.is_meta or not factor.is_floating_point():
            found = "the meta device" if factor.is_meta else str(factor.dtype)
            raise ValueError(
                f"{name} must have floating-point data, got {found}. Load or dequantize the "
                "weights first."
            )
    return A.shape, B.shape


def finite(value: float, name: str) -> float:
    """Return a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}. Pass the number that acted.")
    return float(value)
