"""The groups of an optimizer that a scheduler has taken over, each divided by the rules."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.optim import Optimizer

from ._checks import one_of
from ._group_state import INITIAL, own_decay, separated
from ._ledger import Account, Entry
from ._masks import check_mask, check_shapes
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
from .coupling import COUPLINGS, asks_again, coupling, needs_no_gradient
from .feedback import Feedback

__all__ = ["Coverage", "CoveragePlan"]

_ON_CHANGE = ("warn", "error", "program")
_SGD = ("momentum", "dampening", "nesterov")


@dataclass(frozen=True)
class CoveragePlan:
    """The settings of a `WeightDecayScheduler`, checked."""

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
    rounding: str | None = None
    seed: int = 0
    mask: Any = None

    def __post_init__(self) -> None:
        """Raise unless all of it can be done."""
        check_schedule(self.schedule, optional=True)
        for name in ("relative", "decoupled", "exact_off"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.convention is not None:
            one_of("convention", self.convention, CONVENTIONS)
        if self.coupling is not None:
            one_of("coupling", self.coupling, COUPLINGS)
        one_of("on_change", self.on_change, _ON_CHANGE)
        if self.mask is not None:
            check_mask(self.mask)
            if not self.decoupled:
                raise ValueError(
                    "mask= chooses where the decay from outside acts, got decoupled=False. Use "
                    "decoupled=True"
                )
        if self.rounding is not None:
            one_of("rounding", self.rounding, ("stochastic",))
            if not self.decoupled:
                raise ValueError(
                    f"rounding={self.rounding!r} rounds the decay that comes from outside, got "
                    "decoupled=False. Use decoupled=True"
                )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Say which schedule or rule another process cannot get."""
        for name, given in (("schedule", self.schedule), ("groups", self.rules)):
            try:
                pickle.dumps(given)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise TypeError(
                    f"{name} must consist of what pickle can write to give the scheduler to "
                    f"another process, got {given!r} ({error}). Define functions and classes at "
                    "the top of a module, or leave the scheduler out of what the process gets."
                ) from None
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> CoveragePlan:
        """Copy the fields; functions, which pickle cannot write, copy as they are."""
        return CoveragePlan(
            **{f.name: copy.deepcopy(getattr(self, f.name), memo) for f in fields(self)}
        )


class Coverage:
    """The schedule of each tensor, kept up to date with the optimizer's groups.

    Parameters
    ----------
    plan : CoveragePlan
        The settings of the scheduler.

    Attributes
    ----------
    targets : list of Target
        The sets of tensors, in the order of the account's entries.
    own : list of float
        The decay of each group before it was taken over.
    sizes : list of int
        The number of tensors in each group, by which a change is noticed.
    schedules : dict of int to schedule
        The schedules, each once, by their ids.
    loops : dict of int to list of Feedback
        The loops that act on each group, in the order of its sets of tensors.
    asks_again : bool
        Whether decay from outside has to come before the step, not after the closure's gradient.
    ungated : set of int
        The groups whose optimizer decays weights without a gradient as well.

    Examples
    --------
    >>> from mirrorflow import Constant
    >>> plan = CoveragePlan(Constant(0.1), relative=False, rules=())
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.3)
    >>> coverage, account = Coverage(plan), Account()
    >>> coverage.update(optimizer, account)
    >>> coverage.own, coverage.targets[0].schedule, account.entries[0].coupling
    ([0.3], Constant(0.1), 'decoupled')
    """

    def __init__(self, plan: CoveragePlan) -> None:
        self.plan = plan
        self.targets: list[Target] = []
        self.own: list[float] = []
        self.asks_again = False
        self.ungated: set[int] = set()
        self.sizes: list[int] = []
        self.loops: dict[int, list[Feedback]] = {}
        self.schedules: dict[int, Any] = {}
        self.groups: list[dict[str, Any]] = []  # the live ones, when they were seen last

    def warn_if_unused(self, optimizer: Optimizer) -> None:
        """Warn of a rule that chooses nothing."""
        warn_if_unused(self.plan.rules, optimizer.param_groups, self.plan.model)

    def warn_if_scaled(self, optimizer: Optimizer, account: Account) -> None:
        """Warn of a decay that the schedule rules, but whose strength no sum describes."""
        pairs = zip(self.targets, account.entries, strict=True)
        found = {entry.coupling for t, entry in pairs if t.schedule is not None}
        for name in sorted(found & set(_NO_SUM)):
            warnings.warn(_NO_SUM[name].format(type(optimizer).__name__), stacklevel=4)

    def update(self, optimizer: Optimizer, account: Account) -> None:
        """Take over the groups, and the tensors in them, that are new.

        Raises
        ------
        RuntimeError
            If a group is gone: what is left cannot be matched to the ledgers.
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
            elif len(group["params"]) != self.sizes[index]:
                self._grow(index, group)
        self._index()

    def _index(self) -> None:
        """Collect the schedules, and the loops among them by group, once for all steps."""
        scheduled = [target for target in self.targets if target.schedule is not None]
        self.schedules = {id(target.schedule): target.schedule for target in scheduled}
        self.loops = {}
        for target in scheduled:
            if isinstance(target.schedule, Feedback):
                self.loops.setdefault(target.group, []).append(target.schedule)

    def whole(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """Return all groups where some of them are stepped alone, the others without tensors.

        None where others than the known ones are there.
        """
        here, known = set(map(id, groups)), set(map(id, self.groups))
        if not here <= known:
            return None
        # Places of groups stay what they are in the ledgers; the others have nothing to step.
        return [g if id(g) in here else {**g, "params": []} for g in self.groups]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the live groups, which a copy finds in its own optimizer."""
        return {**self.__dict__, "groups": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Collect the schedules of a copy, which have ids of their own."""
        self.__dict__.update(state)
        self._index()

    def names(self, optimizer: Optimizer) -> list[str]:
        """Return the names of the sets of tensors; with the group where two have the same."""
        known, found = names_of(self.plan.model), []
        for index, group in enumerate(optimizer.param_groups[: len(self.own)]):
            found += labels([t for t in self.targets if t.group == index], group, known)
        order = sorted(range(len(self.targets)), key=lambda i: self.targets[i].group)
        by_target = dict(zip(order, found, strict=True))
        plain = [by_target[i] for i in range(len(self.targets))]
        return [
            name if plain.count(name) == 1 else f"{name} (group {target.group})"
            for name, target in zip(plain, self.targets, strict=True)
        ]

    def _open(self, index: int, optimizer: Optimizer, account: Account) -> None:
        """Take over a group; nothing is changed if that fails."""
        group, plan = optimizer.param_groups[index], self.plan
        own = own_decay(group)
        found = [settled(t, group, own, plan.relative) for t in self._divided(index, group)]
        self._check_masked(found, group, own)
        how = self._outside(optimizer, group) if plan.decoupled else plan.coupling
        how = how or coupling(optimizer, group)
        # The ledger follows the recursion of the buffer, which these three determine.
        if how == "sgd" and not all(key in group for key in _SGD):
            raise ValueError(
                f'coupling="sgd" needs the settings of torch.optim.SGD, {", ".join(_SGD)}, in the '
                f"groups, and {type(optimizer).__name__} does not have them all"
            )
        entries = [begin_entry(optimizer, group, how) for _ in found]
        if not plan.decoupled and needs_no_gradient(optimizer, group):
            self.ungated.add(index)
        group[INITIAL] = own
        separated(optimizer.param_groups, optimizer.defaults)
        self.own.append(own)
        self.sizes.append(len(group["params"]))
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
                f"the tensors of parameter group {index} were {self.sizes[index]} and are "
                f"{len(group['params'])}, which the rules of groups= divide in another way: add "
                "them as a group of their own, with optimizer.add_param_group"
            )
        self._check_masked(now, group, self.own[index])
        for i, old, new in zip(places, before, now, strict=True):
            self.targets[i] = Target(index, new.positions, old.schedule, old.asked)
        self.sizes[index] = len(group["params"])

    def _check_masked(self, found: list[Target], group: Mapping[str, Any], own: float) -> None:
        """Raise unless the mask fits what decays."""
        if self.plan.mask is not None:
            for target in found:
                if target.schedule is not None or own != 0:
                    check_shapes(target.params(group), self.plan.mask)

    def _divided(self, index: int, group: dict[str, Any]) -> list[Target]:
        """Divide a group by the rules."""
        plan = self.plan
        names = names_of(plan.model)
        return targets(index, group, plan.rules, plan.schedule, names, plan.decoupled)

    def _outside(self, optimizer: Optimizer, group: dict[str, Any]) -> str:
        """Return how decay from outside acts on a group.

        Raises
        ------
        ValueError
            If the weights would move back, or lr x rate is not what such an optimizer steps by.
        """
        name, fixed = type(optimizer).__name__, self.plan.convention == "fixed"
        how = coupling(optimizer, group)
        if how == "averaged":
            raise ValueError(
                f"decoupled=True would shrink the weights, and {name} moves them back to copies or "
                "averages that it keeps of them: use its own weight_decay, and decoupled=False"
            )
        if not fixed and how == "scaled":
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
        if self.asks_again and isinstance(self.plan.mask, str):
            raise ValueError(
                f"mask={self.plan.mask!r} needs the gradient of the step, got a {name}, which asks "
                "its closure again and decays before. Give a tensor as mask"
            )
        return "fixed" if math.isnan(lr_of(group)) else "decoupled"


_NO_SUM = {
    "scaled": (
        "{} shrinks weights by the decay times a step size that it finds itself: the schedule "
        "acts, and 0 is off, but no sum of lr x decay describes it, so `accumulated` is NaN"
    ),
    "masked": (
        "{} decays a weight only where its gradient allows it, as cautious decay does: the "
        "schedule acts, and 0 is off, but no sum of lr x decay describes it, so `accumulated` is "
        "NaN. decoupled=True decays all weights from outside, and is counted"
    ),
    "averaged": (
        "{} moves the weights to copies or averages that it keeps of them: the schedule rules its "
        "own weight_decay, and at 0 no more decay comes in, but what has come in still reaches the "
        "weights through what is kept. No sum of lr x decay describes that, so `accumulated` is NaN"
    ),
}


def _rule(target: Target) -> tuple[bool, bool]:
    """Return what stays the same where a set of tensors has only grown."""
    return target.asked, target.positions is None


def begin_entry(optimizer: Optimizer, group: Mapping[str, Any], coupling: str) -> Entry:
    """Return the new ledger of a group; a buffer that SGD has filled already holds no decay."""
    buffers = any("momentum_buffer" in optimizer.state.get(p, ()) for p in group["params"])
    return Entry(coupling, held=0.0 if buffers else None)
