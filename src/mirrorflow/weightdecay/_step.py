"""The hooks of an optimizer: its decay is written or applied before a step, and noted after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ._coverage import Coverage, CoveragePlan
from ._group_state import INITIAL, MEMORY, recall, separated
from ._ledger import TOTALS, Account, Entry
from ._momentum import follow, forget, keep_apart
from ._targets import Target
from .conventions import (
    EffectiveDecay,
    NoValueError,
    UnknownPeakError,
    decay_of,
    lr_of,
    rate_at,
    read_effective,
    shrink,
    strength,
)
from .feedback import Feedback, OffAtBudget

__all__ = ["StepContext", "StepCounter", "Stepping", "stands_still"]


class Stepping:
    """The work of a `WeightDecayScheduler`, in the hooks of its optimizer.

    One step enters this file, `_ledger`, `conventions` and the schedule's own, and no other unless
    the groups of the optimizer have changed.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The optimizer whose groups are written to.
    plan : CoveragePlan
        The settings of the scheduler.
    """

    def __init__(self, optimizer: Optimizer, plan: CoveragePlan) -> None:
        self.optimizer, self.plan = optimizer, plan
        self.coverage, self.account = Coverage(plan), Account()
        self.counter = StepCounter(optimizer)
        self.ledgers: list[tuple[Target, Entry]] = []
        self.rates: list[float | None] = []
        self.last: list[float] = []
        self._context: StepContext | None = None  # of the step that has begun
        self._acted = False  # from outside, in a step that has not been taken yet
        self._rests = False  # a step that does not count has begun
        self._warned = False

    def cover(self) -> None:
        """Take over what is new in the optimizer's groups."""
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        if sizes == self.coverage.sizes and self.ledgers:
            return
        self.coverage.update(self.optimizer, self.account)
        self.ledgers = list(zip(self.coverage.targets, self.account.entries, strict=True))

    def begin(self) -> None:
        """Continue from what the optimizer knows; a schedule needs a first value."""
        self.account.agree(self.optimizer.param_groups)
        recall(self.coverage.loops, self.optimizer.param_groups)
        try:
            self.write(strict=self.account.steps == 0)
        except UnknownPeakError:  # a learning-rate scheduler that is made later writes it
            self.write()
        if not self.plan.exact_off:
            forget(self.optimizer)  # a part that is not followed from here on would be wrong later

    # The decay of a step

    def write(self, strict: bool = False) -> None:
        """Write the decay of the step that comes next.

        Parameters
        ----------
        strict : bool
            Whether that step will be taken: a schedule without a value there is an error then,
            and leaves everything as it is otherwise, since the run may end before.
        """
        self.cover()
        if self.coverage.loops:
            self._feed()
        self._write(self.account.steps, strict)

    def _feed(self) -> None:
        """Give the loops the account of their decay, and the groups what the loops remember."""
        feed(self.ledgers, self.account.steps)
        for index, loops in self.coverage.loops.items():
            memory = tuple(loop.memory() for loop in loops)
            self.optimizer.param_groups[index][MEMORY] = memory

    def _write(self, step: int, strict: bool) -> None:
        """Write the decay of a step to the groups."""
        groups = self.optimizer.param_groups
        try:
            rates = self.rates_at(step)
            last = self.decays(rates, groups)
        except (NoValueError, UnknownPeakError):
            if strict:
                raise
            self._keep(groups)
            return
        self.rates, self.last = rates, last
        outside = self.plan.decoupled
        for (target, _), rate, decay in zip(self.ledgers, rates, last, strict=True):
            if outside or rate is not None:
                _set_decay(groups[target.group], 0.0 if outside else decay)

    def _keep(self, groups: Sequence[dict[str, Any]]) -> None:
        """Leave the decay as it is, where none is known of a step that may never come."""
        self.rates = [None] * len(self.ledgers)
        now = self.decays(self.rates, groups)
        if self.plan.decoupled:
            for group in groups:
                _set_decay(group, 0.0)
            now = [*self.last, *now[len(self.last) :]]
        self.last = now

    def rates_at(self, step: int) -> list[float | None]:
        """Return the rate of each set of tensors at a step; None where nothing schedules it."""
        found = {key: rate_at(schedule, step) for key, schedule in self.coverage.schedules.items()}
        return [found.get(id(target.schedule)) for target, _ in self.ledgers]

    def decays(
        self, rates: Sequence[float | None], groups: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """Return the decays that the rates come to, with the settings of the groups."""
        pairs = zip(rates, self.ledgers, strict=True)
        return [self._decay(rate, groups[t.group], entry.kind) for rate, (t, entry) in pairs]

    def _decay(self, rate: float | None, group: Mapping[str, Any], kind: str) -> float:
        """Return the decay that a rate comes to in a group; without a rate it keeps its own."""
        own = float(group.get(INITIAL, 0.0))
        if rate is None:
            return own if self.plan.decoupled else float(group["weight_decay"])
        value = rate * own if self.plan.relative else rate
        if self.plan.convention is None:
            return value
        return decay_of(value, group, kind, self.plan.convention, self.plan.peak)

    # A step

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Write the decay that acts in this step, or apply it."""
        _check_not_captured()
        groups = self.optimizer.param_groups
        self.cover()
        self.account.agree(groups)
        # The step of a superclass, called within it, does not pass closure=None on.
        within = self._rests and stands_still(self.optimizer)
        self._rests = within or _only_makes_state(self.optimizer, kwargs)
        if self._rests:
            return self._rest()
        self.account.warn_if_missing()
        self.write(strict=True)
        self.counter.begins(self.optimizer)
        outside = self.last if self.plan.decoupled else None
        self._context = StepContext(self.ledgers, groups, outside)
        self._warned = self._warned or self._context.warn_if_too_much(self.account.steps)
        changed = _followed(self._gradients_are_there, args, kwargs)
        if changed is None or self.coverage.asks_again:
            self._act()
        return changed

    def _gradients_are_there(self) -> None:
        """Read what acts by the gradients that the closure has computed."""
        assert self._context is not None
        self._context.read()
        self._act()

    def _act(self) -> None:
        """Do before the update, once in a step, what the optimizer's own decay does not do."""
        if self._acted or not (self.plan.decoupled or self.plan.exact_off):
            return
        if _skipped(self.optimizer):
            return
        assert self._context is not None
        self._acted = True
        if self.plan.decoupled:
            self._context.shrink(everything=self.coverage.asks_again)
        else:
            keep_apart(self.optimizer, self._context.pairs(), self.rates)

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Enter the step into the ledger, if it was taken.

        A class whose step calls that of its superclass runs the hooks of both.
        """
        context = self._context
        if context is None or _skipped(self.optimizer):
            return
        self._context, self._acted = None, False
        if self._rests:
            self._rests = False
            context.rest()
            self.counter.rested()
            self.write()
            return
        context.record(self.account.steps)
        self.account.close_step(self.optimizer.param_groups)
        self.counter.ends(self.optimizer, self.account)

    def _rest(self) -> None:
        """Keep decay out of a step that only makes the optimizer's state, and does not count."""
        groups = self.optimizer.param_groups
        for target, entry in self.ledgers:
            group = groups[target.group]
            if target.schedule is not None:
                _set_decay(group, 0.0)
            if self.plan.exact_off and entry.kind == "sgd":  # its state has a part that is ours
                follow(self.optimizer, group, target.params(group), 0.0)
        self._context = StepContext(self.ledgers, groups, [0.0] * len(self.ledgers))

    # A load

    def before_load(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Refuse, before anything is changed, what these ledgers cannot go on from."""
        saved = state["param_groups"]
        if len(saved) != len(self.optimizer.param_groups):
            return  # which torch refuses itself
        self.account.check(saved)
        recall(self.coverage.loops, saved, only_try=True)
        notes = [
            f"group {index} had {group[INITIAL]:g} and has {own:g}"
            for index, (group, own) in enumerate(zip(saved, self.coverage.own, strict=False))
            if self._matters(index) and float(group.get(INITIAL, own)) != own
        ]
        if notes and self.plan.on_change != "program":
            self.object_to(
                f"the groups' own decay is not that of the checkpoint: {'; '.join(notes)}",
                "That of the checkpoint counts",
            )

    def object_to(self, change: str, effect: str) -> None:
        """Warn that another program wrote the checkpoint, or raise, as ``on_change`` asks."""
        if self.plan.on_change == "error":
            raise ValueError(f'{change}. It is refused because of on_change="error"')
        if self.plan.on_change == "warn":
            warnings.warn(
                f'{change}. {effect}; on_change="error" refuses this, on_change="program" takes '
                "what the program says, and says nothing",
                stacklevel=3,
            )

    def _matters(self, index: int) -> bool:
        """Return whether a group's own decay acts."""
        own = [t for t in self.coverage.targets if t.group == index]
        if self.plan.relative:
            return any(t.schedule is not None for t in own)
        return self.plan.decoupled and any(t.schedule is None for t in own)

    def after_load(self, optimizer: Optimizer) -> None:
        """Take over what the loaded groups know."""
        groups = self.optimizer.param_groups
        for group, own in zip(groups, self.coverage.own, strict=False):
            if self.plan.on_change == "program" or INITIAL not in group:
                group[INITIAL] = own
        separated(groups, self.optimizer.defaults)
        self.counter.loaded(self.optimizer)
        self.account.alone = self.account.alone and not any(TOTALS in group for group in groups)
        self.account.agree(groups)
        recall(self.coverage.loops, groups)
        self.write()
        if not self.plan.exact_off:
            forget(self.optimizer)


class StepContext:
    """A step that an optimizer is about to take, with what acts in it.

    The context is read before the step, and once more when the closure has computed the gradients,
    if there is one; never after it, when hooks of others may have changed the learning rate, or
    have set the gradients to None. It does not see what later pre-step hooks of others change.

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
    >>> context = StepContext([(Target(0, None, None, True), entry)], groups, [0.5])
    >>> context.shrink()
    >>> context.record(0)
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
        self.read()

    def read(self) -> None:
        """Read what acts now."""
        self._effective: list[EffectiveDecay] = [
            read_effective(decay, self._groups[target.group], target.positions)
            for (target, _), decay in zip(self._ledgers, self._decays, strict=True)
        ]

    def pairs(self) -> list[tuple[int, Entry, list[torch.Tensor]]]:
        """Return the group, the ledger and the tensors of each set."""
        pairs = zip(self._ledgers, self._effective, strict=True)
        return [(target.group, entry, found.params) for (target, entry), found in pairs]

    def shrink(self, everything: bool = False) -> None:
        """Shrink the weights that have a gradient, or ``everything`` that may get one yet."""
        for (_, entry), found in zip(self._ledgers, self._effective, strict=True):
            moved = [
                p for p in found.params if p.grad is not None or (everything and p.requires_grad)
            ]
            # w <- (1 - lr lambda) w, before the step, as AdamW does
            shrink(moved, 1 - strength(found.decay, found.settings, entry.kind))

    def record(self, step: int) -> None:
        """Enter the step into the ledgers of what it has moved."""
        for (_, entry), found in zip(self._ledgers, self._effective, strict=True):
            if found.moved:
                entry.record(step, found.decay, found.settings)

    def rest(self) -> None:
        """Take note of a step that moves nothing and does not count."""
        for (_, entry), found in zip(self._ledgers, self._effective, strict=True):
            entry.rest(found.settings)

    def warn_if_too_much(self, step: int) -> bool:
        """Warn of a decay that takes weights through 0, and return whether there was one."""
        for (target, entry), found in zip(self._ledgers, self._effective, strict=True):
            taken = strength(found.decay, found.settings, entry.kind)
            if taken >= 1 and found.params:
                warnings.warn(_TOO_MUCH.format(target.group, step, taken, 1 - taken), stacklevel=4)
                return True
        return False


_TOO_MUCH = (
    "the decay of group {} at step {} takes {:g} times the weights away, so that {:g} times them "
    "are left: lr x decay >= 1. The optimizer multiplies a decay by the learning rate: give a "
    "smaller rate, or say with convention= what it means"
)


class StepCounter:
    """Compares the scheduler's count with the optimizer's own, where they can have come apart.

    Once; where the optimizer's groups say which step they are of, there is nothing to compare.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Many count the steps of each tensor in their state.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._uncounted = 0  # steps that the optimizer has counted and the scheduler has not
        self._before: int | None = None
        self._empty = False  # the optimizer's state, before a step
        self.loaded(optimizer)

    def loaded(self, optimizer: Optimizer) -> None:
        """Take note of what the optimizer has loaded."""
        self._uncounted = 0
        self._compare = not any(TOTALS in group for group in optimizer.param_groups)

    def rested(self) -> None:
        """Take note of a step that does not count."""
        self._uncounted += 1

    def begins(self, optimizer: Optimizer) -> None:
        """Look at the optimizer's count before a step."""
        self._empty = not optimizer.state
        self._before = _own_count(optimizer) if self._compare else None

    def ends(self, optimizer: Optimizer, account: Account) -> None:
        """Compare after a step, and warn if the counts are not the same."""
        if self._compare:
            self._compare = False
            count = _own_count(optimizer)
            counts = count is not None and count == (self._before or 0) + 1
            if counts and count != account.steps + self._uncounted:
                account.alone = False
                warnings.warn(_APART.format(_name(optimizer), count, account.steps), stacklevel=4)
        alone, account.alone = account.alone, False
        if alone and self._empty and optimizer.state:  # its momentum began anew
            warnings.warn(_ALONE.format(_name(optimizer), account.steps - 1), stacklevel=4)


_APART = (
    "{} has taken {} steps by its own count, the decay schedule is at step {}: one of the two was "
    "not loaded, or the scheduler is new. To begin a schedule here as if at another step, shift "
    "it: lambda step: schedule.rate(step + ...)"
)
_ALONE = (
    "the state of WeightDecayScheduler was loaded at step {1}, and that of {0} was not: what it "
    "remembers of the gradients has begun anew. If it was saved, load it, too"
)


def _name(optimizer: Optimizer) -> str:
    """Return the name of the class."""
    return type(optimizer).__name__


def _own_count(optimizer: Optimizer) -> int | None:
    """Return the number of steps that the optimizer has counted, if it does."""
    states = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
    counts = [state["step"] for state in states if "step" in state]
    known = [int(count) for count in counts if isinstance(count, (int, float, torch.Tensor))]
    return max(known, default=None)


# Whether a call of ``optimizer.step`` is a step


def _check_not_captured() -> None:
    """Raise while a CUDA graph records, which would keep the decay of this moment."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer.step() is being captured in a CUDA graph: a replay would repeat the decay "
            "of this moment for ever. Capture forward and backward, and step outside of the graph"
        )


def _skipped(optimizer: Optimizer) -> bool:
    """Return whether a GradScaler makes a fused optimizer skip this step.

    Other optimizers it does not call at all then.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _only_makes_state(optimizer: Optimizer, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a step is the one by which torch.distributed.checkpoint makes the state.

    It calls ``step(closure=None)`` with learning rates of 0 and gradients of 0, before it reads or
    loads an optimizer that has no state yet. The weights stay what they are, so nothing counts.
    """
    if "closure" not in kwargs or kwargs["closure"] is not None or not stands_still(optimizer):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return not any(_moves(p.grad) for p in params if p.grad is not None)


def stands_still(optimizer: Optimizer) -> bool:
    """Return whether all learning rates that there are are 0."""
    return all(lr_of(group) == 0 for group in optimizer.param_groups if "lr" in group)


def _moves(gradient: Any) -> bool:
    """Return whether this process's part of a gradient is not 0; False without data."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return not local.is_meta and bool(local.any())


def _followed(after: Callable[[], None], args: Any, kwargs: Any) -> Any:
    """Let something follow each call of the closure of a step, if it has one.

    Parameters
    ----------
    after : callable
        What follows: the gradients are there then.
    args, kwargs : tuple and dict
        Those of ``optimizer.step``, the optimizer first.

    Returns
    -------
    None or (args, kwargs)
        As a step hook of torch returns them, with the closure replaced.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None

    def closure_and_after() -> Any:
        loss = closure()
        after()
        return loss

    return (args[0], closure_and_after), {k: v for k, v in kwargs.items() if k != "closure"}


def _set_decay(group: dict[str, Any], decay: float) -> None:
    """Set the decay of a group that has one; a tensor in place, since a graph may hold it.

    Examples
    --------
    >>> group = {"weight_decay": torch.tensor(0.1)}
    >>> _set_decay(group, 0.5)
    >>> group
    {'weight_decay': tensor(0.5000)}
    """
    if isinstance(group.get("weight_decay"), torch.Tensor):
        group["weight_decay"].fill_(decay)
    elif "weight_decay" in group:
        group["weight_decay"] = decay


# Loops


def feed(ledgers: Iterable[tuple[Target, Entry]], step: int) -> None:
    """Give the loops the account of their decay, before the step that comes next."""
    absorbed: dict[int, tuple[Feedback, float]] = {}
    for target, entry in ledgers:
        if isinstance(loop := target.schedule, Feedback):
            most = max(entry.absorbed, absorbed.get(id(loop), (loop, 0.0))[1])
            absorbed[id(loop)] = loop, most
    for loop, most in absorbed.values():
        if not isinstance(loop, OffAtBudget):
            loop.acts_at(step)
        elif loop.current and loop.spent_by(most):
            loop.update(step, most)
