"""The groups of an optimizer that a scheduler has taken over, each divided by the rules."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ._checks import one_of
from ._group_state import INITIAL, own_decay, separated
from ._ledger import Account, begun
from ._targets import (
    Rule,
    Target,
    check_schedule,
    labels,
    names_of,
    settled,
    targets,
    warn_if_unused,
)
from .conventions import CONVENTIONS, lr_of
from .coupling import KINDS, asks_again, coupling

__all__ = ["Coverage", "Plan"]

_ON_CHANGE = ("warn", "error", "program")
_SGD = ("momentum", "dampening", "nesterov")


@dataclass(frozen=True)
class Plan:
    """What was asked for, as for `WeightDecayScheduler`."""

    schedule: Any
    relative: bool
    rules: tuple[Rule, ...]
    decoupled: bool = False
    exact_off: bool = False
    convention: str | None = None
    peak: float | None = None
    model: torch.nn.Module | None = None
    coupling: str | None = None
    on_change: str = "warn"

    def __post_init__(self) -> None:
        """Raise unless all of it can be done."""
        check_schedule(self.schedule, optional=True)
        for name in ("relative", "decoupled", "exact_off"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.convention is not None:
            one_of("convention", self.convention, CONVENTIONS)
        if self.coupling is not None:
            one_of("coupling", self.coupling, KINDS)
        one_of("on_change", self.on_change, _ON_CHANGE)


class Coverage:
    """Which tensors follow which schedule, kept up to date with the optimizer's groups.

    Parameters
    ----------
    plan : Plan
        What was asked for.

    Attributes
    ----------
    targets : list of Target
        The sets of tensors, in the order of the account's entries.
    own : list of float
        The decay of each group before it was taken over.
    asks_again : bool
        Whether decay from outside has to come before the step, not after the closure's gradient.

    Examples
    --------
    >>> from mirrorflow import Constant
    >>> plan = Plan(Constant(0.1), relative=False, rules=())
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.3)
    >>> coverage, account = Coverage(plan), Account()
    >>> coverage.update(optimizer, account)
    >>> coverage.own, coverage.targets[0].schedule, account.entries[0].kind
    ([0.3], Constant(0.1), 'decoupled')
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.targets: list[Target] = []
        self.own: list[float] = []
        self.asks_again = False
        self._sizes: list[int] = []

    def warn_if_unused(self, optimizer: Optimizer) -> None:
        """Warn of a rule that chooses nothing."""
        warn_if_unused(self.plan.rules, optimizer.param_groups, names_of(self.plan.model))

    def warn_if_scaled(self, optimizer: Optimizer, account: Account) -> None:
        """Warn of a decay that the schedule rules, but whose strength no sum describes."""
        pairs = zip(self.targets, account.entries, strict=True)
        found = {entry.kind for t, entry in pairs if t.schedule is not None}
        for kind in sorted(found & set(_NO_SUM)):
            warnings.warn(_NO_SUM[kind].format(type(optimizer).__name__), stacklevel=4)

    def update(self, optimizer: Optimizer, account: Account) -> None:
        """Take over the groups, and the tensors in them, that are new.

        Raises
        ------
        RuntimeError
            If a group is gone: what is left cannot be told from what was there.
        """
        groups = optimizer.param_groups
        if len(groups) < len(self.own):
            raise RuntimeError(
                f"{type(optimizer).__name__} has {len(groups)} parameter groups and had "
                f"{len(self.own)}: the ledgers cannot be matched to what is left. close() the "
                "scheduler before a group is removed, and make a new one afterwards"
            )
        for index, group in enumerate(groups):
            if index >= len(self.own):
                self._open(index, optimizer, account)
            elif len(group["params"]) != self._sizes[index]:
                self._grow(index, group)

    def names(self, optimizer: Optimizer) -> list[str]:
        """Name the sets of tensors."""
        known, found = names_of(self.plan.model), []
        for index, group in enumerate(optimizer.param_groups[: len(self.own)]):
            found += labels([t for t in self.targets if t.group == index], group, known)
        order = sorted(range(len(self.targets)), key=lambda i: self.targets[i].group)
        by_target = dict(zip(order, found, strict=True))
        return [by_target[i] for i in range(len(self.targets))]

    def _open(self, index: int, optimizer: Optimizer, account: Account) -> None:
        """Take over a group; nothing is changed if that fails."""
        group, plan = optimizer.param_groups[index], self.plan
        own = own_decay(group)
        found = [settled(t, group, own, plan.relative) for t in self._divided(index, group)]
        kind = self._outside(optimizer, group) if plan.decoupled else plan.coupling
        if kind == "sgd" and not all(key in group for key in _SGD):
            raise ValueError(
                f'coupling="sgd" is that of torch.optim.SGD, with {", ".join(_SGD)} in its groups; '
                f"{type(optimizer).__name__} has not all of them there"
            )
        entries = [begun(optimizer, group, kind) for _ in found]
        group[INITIAL] = own
        separated(optimizer.param_groups, optimizer.defaults)
        self.own.append(own)
        self._sizes.append(len(group["params"]))
        self.targets += found
        for entry in entries:
            account.open(entry, index)

    def _grow(self, index: int, group: dict[str, Any]) -> None:
        """Take over tensors that were appended to a group."""
        places = [i for i, target in enumerate(self.targets) if target.group == index]
        now = self._divided(index, group)
        before = [self.targets[i] for i in places]
        if [_rule(t) for t in now] != [_rule(t) for t in before]:
            raise RuntimeError(
                f"the tensors of parameter group {index} were {self._sizes[index]} and are "
                f"{len(group['params'])}, which the rules of groups= divide in another way: add "
                "them as a group of their own, with optimizer.add_param_group"
            )
        for i, old, new in zip(places, before, now, strict=True):
            self.targets[i] = Target(index, new.positions, old.schedule, old.asked)
        self._sizes[index] = len(group["params"])

    def _divided(self, index: int, group: dict[str, Any]) -> list[Target]:
        """Divide a group by the rules."""
        plan = self.plan
        names = names_of(plan.model)
        return targets(index, group, plan.rules, plan.schedule, names, plan.decoupled)

    def _outside(self, optimizer: Optimizer, group: dict[str, Any]) -> str:
        """Say how decay from outside acts on a group, or that it would not do.

        Raises
        ------
        ValueError
            If the weights would move back, or lr x rate is not what such an optimizer steps by.
        """
        name, fixed = type(optimizer).__name__, self.plan.convention == "fixed"
        kind = coupling(optimizer, group)
        if kind == "averaged":
            raise ValueError(
                f"decoupled=True would shrink the weights, and {name} moves them back to copies or "
                "averages that it keeps of them: use its own weight_decay, and decoupled=False"
            )
        if not fixed and kind == "scaled":
            raise ValueError(
                f"decoupled=True shrinks by lr x rate, and {name} steps by a size of its own, to "
                "which lr is a factor: its own weight_decay follows that size and ends exactly, so "
                'use decoupled=False; or convention="fixed", by which the rate itself acts'
            )
        if not fixed and math.isnan(lr_of(group)):
            raise ValueError(
                f"decoupled=True shrinks by lr x rate, and a parameter group of {name} has no "
                'learning rate: use convention="fixed", by which the rate itself acts'
            )
        self.asks_again = self.asks_again or asks_again(optimizer, group)
        return "fixed" if math.isnan(lr_of(group)) else "decoupled"


_NO_SUM = {
    "scaled": (
        "{} shrinks weights by the decay times a step size that it finds itself: the schedule "
        "acts, and 0 is off, but no sum of lr x decay describes it, so `accumulated` is NaN"
    ),
    "averaged": (
        "{} moves the weights to copies or averages that it keeps of them: the schedule rules its "
        "own weight_decay, and at 0 no more decay comes in, but what has come in still reaches the "
        "weights through what is kept. No sum of lr x decay describes that, so `accumulated` is NaN"
    ),
}


def _rule(target: Target) -> tuple[bool, bool]:
    """Give what has to be the same for a set of tensors to be the same set, grown."""
    return target.asked, target.positions is None
