r"""Decay from outside that acts on a part of the weights: ``w <- (1 - s m) w``, m in [0, 1].

What acts on a tensor is ``s <w, m w> / <w, w>``, with the mean of m over its entries, weighted with
w^2: as everywhere else, the part of w that a step takes away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._rounding import HALF, in_memory_order
from ._stochastic import shrink_stochastically

__all__ = ["NAMED", "check_mask", "check_shapes", "mask_of", "shrink_each", "shrink_masked"]

NAMED = ("cautious", "touched-rows")


def check_mask(mask: Any) -> None:
    """Raise unless this is a mask.

    Raises
    ------
    TypeError, ValueError
        If it is neither a name, nor a tensor, nor a mapping of parameters to tensors, or if its
        values do not lie in [0, 1].
    """
    if isinstance(mask, str):
        if mask not in NAMED:
            raise ValueError(f"mask must be one of {', '.join(NAMED)}, got {mask!r}")
        return
    tensors = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    if not all(isinstance(one, torch.Tensor) for one in tensors):
        raise TypeError(
            f"mask must be one of {', '.join(NAMED)}, a tensor, or a mapping of parameters to "
            f"tensors, got {type(mask).__name__}"
        )
    for one in tensors:
        if not bool(((one >= 0) & (one <= 1)).all()):
            raise ValueError(
                f"the values of a mask must lie in [0, 1], got {float(one.min()):g} to "
                f"{float(one.max()):g}"
            )


def check_shapes(params: Sequence[torch.Tensor], mask: Any) -> None:
    """Raise unless a mask that consists of tensors fits the parameters.

    Raises
    ------
    ValueError
        If the shape of one cannot be expanded to the shape of its parameter.

    Examples
    --------
    >>> check_shapes([torch.ones(3, 3)], torch.ones(3, 1))
    """
    for place, p in enumerate(params):
        found = None if isinstance(mask, str) else mask_of(p, mask)
        if found is None or p.is_meta:
            continue
        ours, theirs = tuple(_local(p).shape), tuple(_local(found).shape)
        pairs = zip(ours[::-1], theirs[::-1], strict=False)
        if len(theirs) > len(ours) or any(m not in (1, n) for n, m in pairs):
            raise ValueError(
                f"mask must have a shape that expands to the shape of each parameter it masks, got "
                f"{theirs} for the parameter at place {place}, of shape {ours}. Give a mapping of "
                "parameters to tensors, or rules by groups="
            )


def mask_of(p: torch.Tensor, mask: Any) -> torch.Tensor | None:
    """Return the mask of a parameter, in a shape that fits its own; None if all of it decays.

    Parameters
    ----------
    p : Tensor
        The parameter; the named masks need its gradient.
    mask : str, Tensor or mapping
        "cautious": entries that decay does not move against the step, gradient x weight >= 0;
        "touched-rows": rows with a gradient that is not 0 somewhere, entries of a vector.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.tensor([[1.0, -1.0], [2.0, 3.0]]))
    >>> w.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    >>> mask_of(w, "cautious").tolist(), mask_of(w, "touched-rows").tolist()
    ([[True, False], [True, True]], [[True], [False]])
    """
    if isinstance(mask, Mapping):
        return mask.get(p)
    if isinstance(mask, torch.Tensor):
        return mask
    grad = p.grad
    if grad is None:
        return None
    if grad.is_sparse:
        return _of_sparse(p, grad.coalesce(), mask)
    if mask == "cautious":
        return grad * p >= 0
    moved = grad != 0
    return moved if p.dim() < 2 else moved.flatten(1).any(1).view(-1, *[1] * (p.dim() - 1))


def _of_sparse(p: torch.Tensor, grad: torch.Tensor, mask: str) -> torch.Tensor:
    """Return the mask of a parameter whose gradient is sparse, as an embedding's."""
    if mask == "cautious":
        return grad.to_dense() * p >= 0
    rows = torch.zeros(len(p), dtype=torch.bool, device=p.device)
    rows[grad.indices()[0]] = True
    return rows.view(-1, *[1] * (p.dim() - 1))


@torch.no_grad()
def shrink_masked(
    params: Sequence[torch.Tensor], mask: Any, strength: float, seed: int | None, step: int
) -> list[tuple[float, float]]:
    """Shrink parameters in place, and return the part of the decay that acted on each.

    Beside it stands the largest part that acted on one of its entries, NaN where it was rounded.

    Parameters
    ----------
    params : sequence of Tensor
        The weights.
    mask : str, Tensor or mapping
        As for `mask_of`.
    strength : float
        lr x decay.
    seed : int or None
        Round half precision by chance with this seed and the step; None rounds to nearest.
    step : int
        The step.

    Examples
    --------
    >>> w = torch.tensor([1.0, 3.0])
    >>> shrink_masked([w], torch.tensor([True, False]), 0.5, None, 0), w
    ([(0.1, 1.0)], tensor([0.5000, 3.0000]))
    """
    if strength == 0 or not params:
        return [(1.0, 1.0)] * len(params)
    masks, numbers = [], []
    for p in params:
        found = mask_of(p, mask)
        masks.append(None if found is None else _local(found).to(p.device).expand(_local(p).shape))
    if seed is None:
        numbers = [_multiply(_local(p), m, strength) for p, m in zip(params, masks, strict=True)]
    else:
        numbers = [_weighed(_local(p), m) for p, m in zip(params, masks, strict=True)]
        parts = [
            None if m is None else in_memory_order(m, _local(p)).reshape(-1)
            for p, m in zip(params, masks, strict=True)
        ]
        shrink_stochastically(params, strength, seed, step, parts)
    most = [_most(p, m, seed is not None) for p, m in zip(params, masks, strict=True)]
    known = [number for pair in numbers for number in pair]
    known += [one for one in most if isinstance(one, torch.Tensor)]
    values = iter(torch.stack(known).tolist())  # waits for the device, once
    parts = [_part(next(values), next(values)) for _ in params]
    largest = [next(values) if isinstance(one, torch.Tensor) else one for one in most]
    # Where a named mask chooses nothing, nothing acts.
    return [(part, one if part else 0.0) for part, one in zip(parts, largest, strict=True)]


def _most(p: torch.Tensor, mask: torch.Tensor | None, by_chance: bool) -> float | torch.Tensor:
    """Return the largest value of a mask, as a tensor where it has to be looked up."""
    if p.dtype in HALF and not by_chance:
        return math.nan
    if mask is None or mask.dtype == torch.bool or not mask.numel():
        return 1.0
    return mask.max().double()


def _local(tensor: Any) -> torch.Tensor:
    """Return this process's part of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _part(taken: float, square: float) -> float:
    """Return the part that acted; 1 where weights of 0, or not finite, have none."""
    return taken / square if square > 0 and math.isfinite(taken / square) else 1.0


def _weighed(p: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return <w, m w> and <w, w>."""
    square = p.float().square() if p.dtype in HALF else p.square()
    whole = square.sum().double()
    return (whole, whole) if mask is None else ((square * mask).sum().double(), whole)


def _multiply(
    p: torch.Tensor, mask: torch.Tensor | None, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shrink a tensor, and return <w, w - w'> / strength, as it was rounded, and <w, w>."""
    before = p.float() if p.dtype in HALF else None
    pair = _weighed(p, mask)
    if mask is None:
        p.mul_(1 - strength)
    else:
        p.mul_(1 - strength * mask.to(p.dtype if before is None else torch.float32))
    if before is None:
        return pair
    return ((before * (before - p.float())).sum() / strength).double(), pair[1]


def shrink_each(
    acts: Mapping[int, torch.Tensor], mask: Any, strength: float, seed: int | None, step: int
) -> tuple[tuple[float, float], dict[tuple[int, ...], tuple[float, float, float]]]:
    """Shrink parameters at places of a set, and return what entered and reached it, and each.

    As `Entry.record` takes them.
    """
    params = list(acts.values())
    pairs = shrink_masked(params, mask, strength, seed, step)
    each = {(place,): (1.0, *parts) for place, parts in zip(acts, pairs, strict=True)}
    return (1.0, _mean_over_entries([mean for mean, _ in pairs], params)), each


def _mean_over_entries(parts: Sequence[float], params: Sequence[torch.Tensor]) -> float:
    """Return the mean of what acted on tensors, over their entries."""
    total = sum(p.numel() for p in params)
    pairs = zip(parts, params, strict=True)
    return sum(part * p.numel() for part, p in pairs) / total if total else 1.0
