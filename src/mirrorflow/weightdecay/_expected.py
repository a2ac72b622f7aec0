"""The part of a decay that rounding and masks will let act, as far as it is known before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ._masks import mask_of
from ._rounding import HALF, rounds_together
from .conventions import shrink

if TYPE_CHECKING:
    from ._targets import Target
    from .scheduler import WeightDecayScheduler

__all__ = ["ExpectedPart"]

_SAMPLE = 16384  # entries, evenly over the tensors


class ExpectedPart:
    """What rounding and a mask will let through of the decay of one set of tensors.

    It is tried on entries of the weights as they are now: a decay near the threshold acts on some
    mantissas only, and differs by a factor of 2 between normal and uniform weights.

    Parameters
    ----------
    scheduler : WeightDecayScheduler
        Neither it nor the weights are changed.
    target : Target
        The set of tensors.
    coupling : str
        How their decay acts.

    Examples
    --------
    >>> from mirrorflow.schedule import Constant
    >>> from mirrorflow.weightdecay import WeightDecayScheduler
    >>> w = torch.nn.Parameter(torch.randn(100).bfloat16())
    >>> scheduler = WeightDecayScheduler(torch.optim.AdamW([w], lr=1e-3), Constant(1.0))
    >>> ExpectedPart(scheduler, scheduler.targets[0], "decoupled")(decay=1.0, lr=1e-3)
    0.0
    """

    def __init__(self, scheduler: WeightDecayScheduler, target: Target, coupling: str) -> None:
        group = scheduler.optimizer.param_groups[target.group]
        params = target.params(group)
        halves = [p.detach() for p in params if p.dtype in HALF]
        self._coupling, self._outside = coupling, scheduler.decoupled
        self._foreach = bool(group.get("foreach"))
        self._whole = not halves or scheduler.plan.rounding is not None
        # Decay and update share a rounding there: only the gradients say what passes
        self._joint = bool(halves) and not scheduler.decoupled
        if self._joint and coupling != "sgd":
            self._joint = rounds_together(scheduler.optimizer, group)
        mask = scheduler.plan.mask
        self._joint |= isinstance(mask, str)  # by the gradients of each step
        self._masked = 1.0 if mask is None or self._joint else _masked(params, mask)
        total = sum(p.numel() for p in params)
        self._share = sum(p.numel() for p in halves) / total if total else 0.0
        self._weights = [] if self._whole or self._joint else _entries(halves)
        self._known: dict[float, float] = {}

    def __call__(self, decay: float, lr: float) -> float:
        """Return the part that acts in a step; NaN where that depends on the gradients."""
        strength = decay if self._coupling == "fixed" else lr * decay
        if not strength or math.isnan(strength):
            return 1.0
        if self._joint:
            return math.nan
        if self._whole:
            return self._masked
        if strength not in self._known:
            part = self._fraction(strength) / strength
            self._known[strength] = self._masked * (1 + self._share * (part - 1))
        return self._known[strength]

    def _fraction(self, strength: float) -> float:
        """Return <w, w - fl((1 - s) w)> / <w, w>, multiplied as it will be."""
        after = [w.clone() for w in self._weights]
        if self._outside:
            shrink(after, 1 - strength)
        elif self._foreach:  # on a CPU it rounds the factor as well
            torch._foreach_mul_(after, 1 - strength)  # pyright: ignore[reportPrivateImportUsage]
        else:
            for w in after:
                w.mul_(1 - strength)
        pairs = [(w.double(), v.double()) for w, v in zip(self._weights, after, strict=True)]
        square = sum(float(w @ w) for w, _ in pairs)
        return sum(float(w @ (w - v)) for w, v in pairs) / square


@torch.no_grad()
def _masked(params: Sequence[torch.Tensor], mask: torch.Tensor | Mapping[Any, Any]) -> float:
    """Return the mean over entries of <w, m w> / <w, w> of each tensor, as the weights are now."""
    acting, total = 0.0, 0
    for p in params:
        found, square = mask_of(p, mask), p.double().square()
        whole, part = float(square.sum()), 1.0
        if found is not None and whole > 0:
            part = float((square * found.to(p.device)).sum()) / whole
        acting, total = acting + part * p.numel(), total + p.numel()
    return acting / total if total else 1.0


def _entries(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return some entries of each tensor, on the CPU; normal ones where they cannot be read."""
    each = max(1, _SAMPLE // len(params))
    found = []
    for p in params:
        if not p.numel() or p.is_meta or hasattr(p, "to_local"):
            continue
        flat = p.reshape(-1)
        part = flat[:: max(1, len(flat) // each)][:each].cpu()
        if bool(part.any()) and bool(torch.isfinite(part).all()):
            found.append(part)
    if found:
        return found
    quantiles = (torch.arange(_SAMPLE, dtype=torch.float64) + 0.5) / _SAMPLE
    return [torch.special.ndtri(quantiles).to(params[0].dtype)]
