r"""Decay from outside that is rounded up or down by chance, so that all of it acts.

The weights stay in place, and in bfloat16 or float16; parts of them are worked on in float32, one
after the other. The random numbers depend on a seed and on the step alone: there is no state to
save but these two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from ._rounding import HALF, in_memory_order

__all__ = ["shrink_stochastically"]


@torch.no_grad()
def shrink_stochastically(
    params: Sequence[torch.Tensor],
    strength: float,
    seed: int,
    step: int,
    masks: Sequence[torch.Tensor | None] | None = None,
) -> None:
    """Multiply parameters by 1 - strength, in place, rounded up or down by chance.

    ``w - strength w`` lies between two numbers of the weights' precision, and becomes each with
    the probability by which the mean is right. Other precisions are multiplied as they are.

    Parameters
    ----------
    params : sequence of Tensor
        The weights, worked on in parts.
    strength : float
        lr x decay.
    seed, step : int
        The random numbers depend on both, and on nothing else.
    masks : sequence of Tensor or None, optional
        A factor on the strength for each entry, in the order of the weights' memory.

    Examples
    --------
    >>> w = torch.ones(100_000, dtype=torch.bfloat16)
    >>> shrink_stochastically([w], 1e-4, seed=0, step=0)
    >>> round(1 - w.double().mean().item(), 5)
    0.0001
    """
    if strength == 0:
        return
    factors = masks or [None] * len(params)
    dithers: dict[torch.device, _Dither] = {}
    for p, mask in zip(params, factors, strict=True):
        sharded: Any = p
        local = sharded.to_local() if hasattr(p, "to_local") else p
        flat = in_memory_order(local.detach(), local).view(-1)
        if p.dtype not in HALF:
            flat.mul_(1 - strength * (1.0 if mask is None else mask.to(p.dtype)))
            continue
        if local.device not in dithers:
            dithers[local.device] = _Dither(local.device, _mixed(seed, step))
        dither = dithers[local.device]
        for start in range(0, len(flat), dither.most):
            part = slice(start, start + dither.most)
            _shrink_part(flat[part], strength, dither, None if mask is None else mask[part])


def _mixed(seed: int, step: int) -> int:
    """Return a seed of its own for each step (splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 1) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63


class _Dither:
    """Random numbers in [-1/2, 1/2) for the parts of the weights, pairwise independent.

    Each part takes the same numbers, turned by a random angle of its own: (u_i + v) mod 1.

    Parameters
    ----------
    device : torch.device
        Of the weights.
    seed : int
        Of all the numbers.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device)
        generator.manual_seed(seed)
        self.most = 1 << (16 if device.type == "cpu" else 22)  # the length of a part
        self._base = torch.rand(self.most, generator=generator, device=device)
        self._angles = random.Random(seed)

    def __call__(self, length: int) -> torch.Tensor:
        """Return numbers for the next part."""
        return self._base[:length].add(self._angles.random()).frac_().sub_(0.5)


def _shrink_part(
    w: torch.Tensor, strength: float, dither: _Dither, mask: torch.Tensor | None
) -> None:
    """Shrink a part of the weights, in place, by whole gaps whose number is right in the mean."""
    finfo, exact = torch.finfo(w.dtype), w.float()
    taken = exact * strength
    if mask is not None:
        taken.mul_(mask)
    # The gap between numbers at (1 - s) w: eps 2^e, with 2^e the float32 without its mantissa
    power = (exact - taken).view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    least = max(finfo.smallest_normal * finfo.eps, torch.finfo(torch.float32).tiny)
    gap = power.mul_(finfo.eps).clamp_(min=least)
    # P(k gaps) is such that E[k] = -s w / gap: a small s w is not added to w, next to which
    # float32 would lose it
    gaps = dither(len(w)).sub_(taken.div_(gap)).round_()
    w.copy_(exact.addcmul_(gaps, gap))
