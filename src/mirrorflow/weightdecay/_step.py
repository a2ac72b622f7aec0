"""What goes on at an optimizer's steps and loads: the decay is written or applied, and noted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ._checks import check_not_captured
from ._coverage import Coverage, Plan
from ._group_state import INITIAL, followed, recall, remember, separated, shrink, skipped, write
from ._ledger import TOTALS, Account, Entry
from ._momentum import follow, forget, keep_apart
from ._targets import NoValueError, Target, rate_at
from .conventions import Acting, UnknownPeakError, decay_of, lr_of, noted, strength
from .feedback import Feedback, OffAtBudget

__all__ = ["Clock", "Stepping", "Taking", "only_makes_state", "stands"]


class Stepping:
    """The work of a `WeightDecayScheduler`, in the hooks of its optimizer.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Whose groups are written to.
    plan : Plan
        What was asked for.
    """

    def __init__(self, optimizer: Optimizer, plan: Plan) -> None:
        self.optimizer, self.plan = optimizer, plan
        self.coverage, self.account = Coverage(plan), Account()
        self.clock = Clock(optimizer)
        self.rates: list[float | None] = []
        self.last: list[float] = []
        self._taking: Taking | None = None  # the step that has begun
        self._acted = False  # from outside, in a step that has not been taken yet
        self._rests = False  # a step that does not count has begun
        self._warned = False

    @property
    def ledgers(self) -> list[tuple[Target, Entry]]:
        """Pair each set of tensors with its ledger."""
        return list(zip(self.coverage.targets, self.account.entries, strict=True))

    def begin(self) -> None:
        """Continue from what the optimizer knows; a schedule has to have a first value."""
        self.account.agree(self.optimizer.param_groups)
        recall(self.coverage.targets, self.optimizer.param_groups)
        try:
            self.write(strict=self.account.steps == 0)
        except UnknownPeakError:  # a learning-rate scheduler that is made later says it
            self.write()
        if not self.plan.exact_off:
            forget(self.optimizer)  # what nobody follows from here on would be wrong later

    # The decay of a step

    def write(self, strict: bool = False) -> None:
        """Write the decay of the step that comes next.

        Parameters
        ----------
        strict : bool
            Whether that step will be taken: a schedule that has no value there is an error then,
            and leaves everything as it is otherwise, since the run may end before.
        """
        self.coverage.update(self.optimizer, self.account)
        tell(self.ledgers, self.account.steps)
        groups = self.optimizer.param_groups
        remember(self.coverage.targets, groups)
        try:
            rates = self.rates_at(self.account.steps)
            last = self.decays(rates, groups)
        except (NoValueError, UnknownPeakError):
            if strict:
                raise
            self._keep(groups)
            return
        self.rates, self.last = rates, last
        for target, rate, decay in zip(self.coverage.targets, self.rates, self.last, strict=True):
            if self.plan.decoupled:
                write(groups[target.group], 0.0)
            elif rate is not None:
                write(groups[target.group], decay)

    def _keep(self, groups: Sequence[dict[str, Any]]) -> None:
        """Leave the decay as it is, where none is known of a step that may never come."""
        self.rates = [None] * len(self.coverage.targets)
        now = self.decays(self.rates, groups)
        if self.plan.decoupled:
            for group in groups:
                write(group, 0.0)
            now = [*self.last, *now[len(self.last) :]]
        self.last = now

    def rates_at(self, step: int) -> list[float | None]:
        """Give the rate of each set of tensors at a step; None where nothing schedules it."""
        targets = self.coverage.targets
        schedules = {id(t.schedule): t.schedule for t in targets if t.schedule is not None}
        found = {key: rate_at(schedule, step) for key, schedule in schedules.items()}
        return [found.get(id(t.schedule)) for t in targets]

    def decays(
        self, rates: Sequence[float | None], groups: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """Turn rates into decays, for the settings of the groups."""
        pairs = zip(rates, self.ledgers, strict=True)
        return [self._decay(rate, groups[t.group], entry.kind) for rate, (t, entry) in pairs]

    def _decay(self, rate: float | None, group: Mapping[str, Any], kind: str) -> float:
        """Turn a rate into the decay of a group; without a rate it keeps its own."""
        own = float(group.get(INITIAL, 0.0))
        if rate is None:
            return own if self.plan.decoupled else float(group["weight_decay"])
        value = rate * own if self.plan.relative else rate
        return decay_of(value, group, kind, self.plan.convention, self.plan.peak)

    # A step

    def before_step(self, args: Any, kwargs: Any) -> Any:
        """Write the decay that acts in this step, or apply it."""
        check_not_captured()
        groups = self.optimizer.param_groups
        self.coverage.update(self.optimizer, self.account)
        self.account.agree(groups)
        # The step of a superclass, called within it, is not told that there is no closure.
        within = self._rests and stands(self.optimizer)
        self._rests = within or only_makes_state(self.optimizer, kwargs)
        if self._rests:
            return self._rest()
        self.account.warn_if_missing()
        self.write(strict=True)
        self.clock.begins(self.optimizer)
        self._taking = Taking(self.ledgers, groups, self.last if self.plan.decoupled else None)
        self._warned = self._warned or self._taking.warn_if_too_much(self.account.steps)
        changed = followed(self._gradients_are_there, args, kwargs)
        if changed is None or self.coverage.asks_again:
            self._act()
        return changed

    def _gradients_are_there(self) -> None:
        """Note what acts by the gradients that the closure has computed."""
        assert self._taking is not None
        self._taking.note()
        self._act()

    def _act(self) -> None:
        """Do before the update, once in a step, what the optimizer's own decay does not do."""
        if self._acted or not (self.plan.decoupled or self.plan.exact_off):
            return
        if skipped(self.optimizer):
            return
        assert self._taking is not None
        self._acted = True
        if self.plan.decoupled:
            self._taking.shrink(everything=self.coverage.asks_again)
        else:
            keep_apart(self.optimizer, self.ledgers, self.rates)

    def after_step(self) -> None:
        """Enter the step into the ledger, if it was taken.

        A class whose step calls that of its superclass runs the hooks of both.
        """
        taking = self._taking
        if taking is None or skipped(self.optimizer):
            return
        self._taking, self._acted = None, False
        if self._rests:
            self._rests = False
            taking.rest()
            self.clock.rested()
            self.write()
            return
        taking.record(self.account.steps)
        self.account.close_step(self.optimizer.param_groups)
        self.clock.ends(self.optimizer, self.account)

    def _rest(self) -> None:
        """Keep decay out of a step that only makes the optimizer's state, and does not count."""
        groups = self.optimizer.param_groups
        for target, entry in self.ledgers:
            group = groups[target.group]
            if target.schedule is not None:
                write(group, 0.0)
            if self.plan.exact_off and entry.kind == "sgd":  # its state has a part that is ours
                follow(self.optimizer, group, target.params(group), 0.0)
        self._taking = Taking(self.ledgers, groups, [0.0] * len(self.ledgers))

    # A load

    def before_load(self, state: Mapping[str, Any]) -> None:
        """Refuse, before anything is changed, what these ledgers cannot go on from."""
        saved = state["param_groups"]
        if len(saved) != len(self.optimizer.param_groups):
            return  # which torch refuses itself
        self.account.check(saved)
        recall(self.coverage.targets, saved, only_try=True)
        said = [
            f"group {index} had {group[INITIAL]:g} and has {own:g}"
            for index, (group, own) in enumerate(zip(saved, self.coverage.own, strict=False))
            if self._matters(index) and float(group.get(INITIAL, own)) != own
        ]
        if said and self.plan.on_change != "program":
            self.object_to(
                f"the groups' own decay is not that of the checkpoint: {'; '.join(said)}",
                "That of the checkpoint counts",
            )

    def object_to(self, change: str, effect: str) -> None:
        """Say that the program is not what the checkpoint was written by, or refuse it."""
        if self.plan.on_change == "error":
            raise ValueError(f'{change}. It is refused because of on_change="error"')
        if self.plan.on_change == "warn":
            warnings.warn(
                f'{change}. {effect}; on_change="error" refuses this, on_change="program" takes '
                "what the program says, and says nothing",
                stacklevel=3,
            )

    def _matters(self, index: int) -> bool:
        """Tell whether a group's own decay acts."""
        own = [t for t in self.coverage.targets if t.group == index]
        if self.plan.relative:
            return any(t.schedule is not None for t in own)
        return self.plan.decoupled and any(t.schedule is None for t in own)

    def after_load(self) -> None:
        """Take over what the loaded groups know."""
        groups = self.optimizer.param_groups
        for group, own in zip(groups, self.coverage.own, strict=False):
            if self.plan.on_change == "program" or INITIAL not in group:
                group[INITIAL] = own
        separated(groups, self.optimizer.defaults)
        self.clock.loaded(self.optimizer)
        self.account.alone = self.account.alone and not any(TOTALS in group for group in groups)
        self.account.agree(groups)
        recall(self.coverage.targets, groups)
        self.write()
        if not self.plan.exact_off:
            forget(self.optimizer)


# One step of an optimizer: what acts in it is noted beforehand, and done from outside if asked.


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


# Whether a call of ``optimizer.step`` is a step, and whether the optimizer counts as many.


def only_makes_state(optimizer: Optimizer, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a step is the one by which torch.distributed.checkpoint makes the state.

    It calls ``step(closure=None)`` with learning rates of 0 and gradients of 0, before it reads or
    loads an optimizer that has no state yet. The weights stay what they are, so nothing counts.
    """
    if "closure" not in kwargs or kwargs["closure"] is not None or not stands(optimizer):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return not any(_moves(p.grad) for p in params if p.grad is not None)


def stands(optimizer: Optimizer) -> bool:
    """Tell whether all learning rates that there are are 0."""
    return all(lr_of(group) == 0 for group in optimizer.param_groups if "lr" in group)


class Clock:
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
    """Name the class."""
    return type(optimizer).__name__


def _moves(gradient: Any) -> bool:
    """Tell whether a gradient is not 0; of a sharded one this process's part, without data no."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return not local.is_meta and bool(local.any())


def _own_count(optimizer: Optimizer) -> int | None:
    """Give the number of steps that the optimizer has counted, if it does."""
    states = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
    counts = [state["step"] for state in states if "step" in state]
    known = [int(count) for count in counts if isinstance(count, (int, float, torch.Tensor))]
    return max(known, default=None)


def tell(ledgers: Iterable[tuple[Target, Entry]], step: int) -> None:
    """Tell the loops what the account of their decay says, before the step that comes next."""
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


def over(targets: Iterable[Target]) -> None:
    """Tell the loops that the run is over."""
    loops = [t.schedule for t in targets if isinstance(t.schedule, Feedback)]
    for loop in {id(loop): loop for loop in loops}.values():
        loop.over()
