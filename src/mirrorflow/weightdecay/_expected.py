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
    from ._ledger import Entry
    from ._targets import Target
    from .scheduler import WeightDecayScheduler

__all__ = ["ExpectedPart"]

_SAMPLE = 16384  # entries, evenly over the tensors
_LEAST = 256  # of each tensor, so that the largest part of many is not that of their noise


class ExpectedPart:
    """What rounding and a mask will let through of the decay of one set of tensors.

    Two numbers: the mean over entries, which the ledger counts, and the most on any tensor, of a
    mask where it is largest, by which a product can shrink.

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
    (0.0, 0.0)
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
        found = None if self._joint else mask
        self._masked = 1.0 if found is None else _masked(params, found)
        # Of those in half precision the most is tried; the others decay as far as the mask lets
        self._most = max((_largest(p, found) for p in params if self._decays_whole(p)), default=0.0)
        total = sum(p.numel() for p in params)
        self._share = sum(p.numel() for p in halves) / total if total else 0.0
        tried = [] if self._whole or self._joint else halves
        self._samples = _samples(tried, [_largest(p, found) for p in tried])
        self._known: dict[float, tuple[float, float]] = {}

    def _decays_whole(self, p: torch.Tensor) -> bool:
        """Return whether no rounding swallows the decay of a tensor."""
        return self._whole or p.dtype not in HALF

    def __call__(self, decay: float, lr: float) -> tuple[float, float]:
        """Return the parts that act in a step; NaN where that depends on the gradients."""
        strength = decay if self._coupling == "fixed" else lr * decay
        if not strength or math.isnan(strength):
            return 1.0, 1.0
        if self._joint:
            return math.nan, math.nan
        if self._whole:
            return self._masked, self._most
        if strength not in self._known:
            self._known[strength] = self._tried(strength)
        return self._known[strength]

    def most_so_far(self, entry: Entry) -> float:
        """Return what the tensor on which most acted has absorbed, as far as that is known."""
        if self._coupling == "sgd":  # what is asked of it waits in momentum
            return entry.absorbed
        # What was asked may be NaN, which max leaves aside as the second of two.
        return max(entry.absorbed, self._most * entry.asked)

    def _tried(self, strength: float) -> tuple[float, float]:
        """Return the parts that act where some tensors are in half precision."""
        taken = [self._taken(sample, strength) for sample in self._samples]
        square = sum(float(sample.squares.sum()) for sample in self._samples)
        mean = sum(float(one.sum()) for one in taken) / square / strength
        most = [
            float((sample.largest * one / sample.squares).max()) / strength
            for sample, one in zip(self._samples, taken, strict=True)
        ]
        return self._masked * (1 + self._share * (mean - 1)), max(self._most, *most)

    def _taken(self, sample: _Sample, strength: float) -> torch.Tensor:
        """Return <w, w - fl((1 - s) w)> of each tensor, multiplied as it will be."""
        after = sample.weights.clone()
        if self._outside:
            shrink([after], 1 - strength)
        elif self._foreach:  # on a CPU it rounds the factor as well
            torch._foreach_mul_([after], 1 - strength)  # pyright: ignore[reportPrivateImportUsage]
        else:
            after.mul_(1 - strength)
        w = sample.weights.double()
        return sample.by_tensor(w * (w - after.double()))


class _Sample:
    """Some entries of each of several tensors in one precision, in a row.

    Parameters
    ----------
    parts : sequence of Tensor
        The entries of each, on the CPU.
    largest : sequence of float
        The largest value of the mask of each.
    """

    def __init__(self, parts: Sequence[torch.Tensor], largest: Sequence[float]) -> None:
        self.weights = torch.cat(list(parts))
        lengths = torch.tensor([len(part) for part in parts])
        self._places = torch.arange(len(parts)).repeat_interleave(lengths)
        self.largest = torch.tensor(largest, dtype=torch.float64)
        self.squares = self.by_tensor(self.weights.double().square())

    def by_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the entries of each tensor."""
        return values.new_zeros(len(self.largest)).index_add_(0, self._places, values)


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


def _largest(p: torch.Tensor, mask: torch.Tensor | Mapping[Any, Any] | None) -> float:
    """Return the largest value of the mask of a parameter; 1 if all of it decays."""
    found = None if mask is None else mask_of(p, mask)
    return 1.0 if found is None or not found.numel() else float(found.max())


def _samples(params: Sequence[torch.Tensor], largest: Sequence[float]) -> list[_Sample]:
    """Return some entries of each tensor; normal ones where they cannot be read."""
    each = max(_LEAST, _SAMPLE // max(1, len(params)))
    found: dict[torch.dtype, tuple[list[torch.Tensor], list[float]]] = {}
    for p, top in zip(params, largest, strict=True):
        if (part := _entries(p, each)) is not None:
            parts, tops = found.setdefault(p.dtype, ([], []))
            parts.append(part)
            tops.append(top)
    if params and not found:
        quantiles = (torch.arange(_SAMPLE, dtype=torch.float64) + 0.5) / _SAMPLE
        normal = torch.special.ndtri(quantiles).to(params[0].dtype)
        return [_Sample([normal], [max(largest)])]
    return [_Sample(*pair) for pair in found.values()]


def _entries(p: torch.Tensor, count: int) -> torch.Tensor | None:
    """Return some entries of a tensor, on the CPU; None where they cannot be read, or are 0."""
    if not p.numel() or p.is_meta or hasattr(p, "to_local"):
        return None
    flat = p.reshape(-1)
    part = flat[:: max(1, len(flat) // count)][:count].cpu()
    return part if bool(part.any()) and bool(torch.isfinite(part).all()) else None
