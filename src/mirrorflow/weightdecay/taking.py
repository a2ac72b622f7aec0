"""One step of an optimizer: what acts in it is noted beforehand, and done from outside if asked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .acting import Acting, noted, strength
from .ledger import Entry
from .outside import shrink
from .selection import Target

__all__ = ["Taking"]


class Taking:
    """A step that an optimizer is about to take.

    What acts is read before it, and once more when the closure has computed the gradients, if
    there is one; never after it, when hooks of others may have changed the learning rate, or have
    set the gradients to None. What pre-step hooks of others change later is not seen.

    Parameters
    ----------
    ledgers : sequence of (Target, Entry)
        The sets of tensors.
    groups : sequence of mapping
        The live groups.
    decays : sequence of float, optional
        The decay of each set, from outside; without it, it is the optimizer's own.

    Examples
    --------
    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.zeros(2)
    >>> entry, groups = Entry("decoupled"), [{"params": [w], "lr": 0.5}]
    >>> taking = Taking([(Target(0, None, None, True), entry)], groups, [0.5])
    >>> taking.shrink()
    >>> taking.record(0)
    >>> w.detach(), entry.accumulated
    (tensor([0.7500, 0.7500]), -0.25)
    """

    def __init__(
        self,
        ledgers: Sequence[tuple[Target, Entry]],
        groups: Sequence[Mapping[str, Any]],
        decays: Sequence[float] | None = None,
    ) -> None:
        self._ledgers, self._groups = ledgers, groups
        self._decays = [None] * len(ledgers) if decays is None else decays
        self.note()

    def note(self) -> None:
        """Read what acts now."""
        self.acting: list[Acting] = []
        for (target, _), decay in zip(self._ledgers, self._decays, strict=True):
            group = self._groups[target.group]
            self.acting.append(noted(decay, group, target.params(group)))

    def shrink(self, everything: bool = False) -> None:
        """Shrink the weights that have a gradient, or ``everything`` that may get one yet."""
        for (target, entry), acting in zip(self._ledgers, self.acting, strict=True):
            params = target.params(self._groups[target.group])
            moved = [p for p in params if p.grad is not None or (everything and p.requires_grad)]
            shrink(moved, 1 - strength(acting.decay, acting.settings, entry.kind))

    def record(self, step: int) -> None:
        """Enter the step into the ledgers of what it has moved."""
        for (_, entry), acting in zip(self._ledgers, self.acting, strict=True):
            if acting.moved:
                entry.record(step, acting.decay, acting.settings)

    def rest(self) -> None:
        """Take note of a step that moves nothing and does not count."""
        for (_, entry), acting in zip(self._ledgers, self.acting, strict=True):
            entry.rest(acting.settings)

    def warn_if_too_much(self, step: int) -> bool:
        """Warn of a decay that takes weights through 0; tell whether there was one."""
        for (target, entry), acting in zip(self._ledgers, self.acting, strict=True):
            taken = strength(acting.decay, acting.settings, entry.kind)
            if taken >= 1 and target.params(self._groups[target.group]):
                warnings.warn(_TOO_MUCH.format(target.group, step, taken, 1 - taken), stacklevel=4)
                return True
        return False


_TOO_MUCH = (
    "the decay of group {} at step {} takes {:g} times the weights away, so that {:g} times them "
    "are left: lr x decay >= 1. The optimizer multiplies a decay by the learning rate: give a "
    "smaller rate, or say with convention= what it means"
)
