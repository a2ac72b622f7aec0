"""The hooks of an optimizer: its decay is written or applied before a step, and noted after it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ._agreement import settle, warn_if_missing
from ._coverage import Coverage, CoveragePlan
from ._group_state import INITIAL, MEMORY, recall
from ._ledger import Account, Entry, Part, with_all_groups
from ._load import check_load, take_loaded
from ._masks import shrink_each
from ._momentum import follow, forget, keep_apart
from ._rounded_sets import let_through, rounded_sets, warn_of_rounding
from ._rounding import RoundedSet
from ._stochastic import shrink_stochastically
from ._targets import Target
from ._watchdogs import (
    CountComparison,
    GradientWatchdog,
    check_not_captured,
    only_makes_state,
    stands_still,
    warn_of_too_much,
)
from .conventions import (
    EffectiveDecay,
    NoValueError,
    UnknownPeakError,
    decay_of,
    rate_at,
    read_effective,
    set_decay,
    shrink,
    strength,
)
from .feedback import feed

__all__ = ["StepContext", "StepCounter", "Stepping"]


class Stepping:
    """The work of a `WeightDecayScheduler`, in the hooks of its optimizer.

    One step enters this file, `_ledger`, `conventions` and the schedule's own.

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
        self.counter, self.counts = StepCounter(), CountComparison(optimizer)
        self.ledgers: list[tuple[Target, Entry]] = []
        self.rates: list[float | None] = []
        self.last: list[float] = []
        self._context: StepContext | None = None  # of the step that has begun
        self._acted = False  # from outside, in a step that has not been taken yet
        self._rests = False  # a step that does not count has begun
        self._again = False  # the call steps other tensors of the step that was counted last
        self._recorded: set[int] = set()  # the places of the ledgers that have this step
        self._watchdog: GradientWatchdog | None = GradientWatchdog()
        self._warned, self.seed = False, plan.seed
        self._rounded: dict[int, RoundedSet] | None = None  # by place; None until they are known
        self._strayed = False  # a warning of what rounding does has been given

    def cover(self) -> None:
        """Take over what is new in the optimizer's groups."""
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        self.coverage.groups = self.optimizer.param_groups
        if sizes == self.coverage.sizes and self.ledgers:
            return
        self.coverage.update(self.optimizer, self.account)
        self.ledgers = list(zip(self.coverage.targets, self.account.entries, strict=True))
        self._rounded = None

    def begin(self) -> None:
        """Continue from what the optimizer knows; a schedule needs a first value."""
        settle(self.account, self.optimizer.param_groups)
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
        """Feed the loops the account of their decay, and save what they remember in the groups."""
        groups = self.optimizer.param_groups
        most = (
            entry.foremost(target.count(groups[target.group])) if entry.others else entry
            for target, entry in self.ledgers
        )
        pairs = zip(self.ledgers, most, strict=True)
        feed(((t.schedule, entry.absorbed) for (t, _), entry in pairs), self.account.steps)
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
                set_decay(groups[target.group], 0.0 if outside else decay)

    def _keep(self, groups: Sequence[dict[str, Any]]) -> None:
        """Leave the decay as it is, where none is known of a step that may never come."""
        self.rates = [None] * len(self.ledgers)
        now = self.decays(self.rates, groups)
        if self.plan.decoupled:
            for group in groups:
                set_decay(group, 0.0)
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
        return [self._decay(rate, groups[t.group], entry.coupling) for rate, (t, entry) in pairs]

    def _decay(self, rate: float | None, group: Mapping[str, Any], coupling: str) -> float:
        """Return the decay that a rate comes to in a group; without a rate it keeps its own."""
        own = float(group.get(INITIAL, 0.0))
        if rate is None:
            return own if self.plan.decoupled else float(group["weight_decay"])
        value = rate * own if self.plan.relative else rate
        if self.plan.convention is None:
            return value
        return decay_of(value, group, coupling, self.plan.convention, self.plan.peak)

    # A step

    @with_all_groups
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Write the decay that acts in this step, or apply it."""
        if torch.cuda.is_initialized():
            check_not_captured()
        groups = self.optimizer.param_groups
        self.cover()
        if not self.account.agrees(groups):
            settle(self.account, groups)
        # The step of a superclass, called within it, does not pass closure=None on.
        within = self._rests and stands_still(self.optimizer)
        self._rests = within or ("closure" in kwargs and only_makes_state(self.optimizer, kwargs))
        if self._rests:
            return self._rest()
        if self.account.missing:
            warn_if_missing(self.account)
        self._again = self.counter.continues(groups, self.optimizer.state)
        if self._again:
            self._write(self.account.steps - 1, strict=True)
        else:
            self.write(strict=True)
            if self.counts.due or self.account.alone:
                self.counts.begins(self.optimizer)
        outside = self.last if self.plan.decoupled else None
        self._context = StepContext(self.ledgers, groups, outside, self.coverage.ungated)
        self._warned = self._warned or self._context.warn_if_too_much(self.account.steps)
        if self._rounded is None:
            self._rounded = rounded_sets(self.plan, self.optimizer, self.ledgers)
        changed = _followed(self._gradients_are_there, args, kwargs)
        if changed is None or self.coverage.asks_again:
            if self._rounded:
                self._context.round(self._rounded, self.account.steps)
            self._act()
        return changed

    def _gradients_are_there(self) -> None:
        """Read what acts by the gradients that the closure has computed."""
        assert self._context is not None
        self._context.read()
        if self._rounded and not self._acted:
            self._context.round(self._rounded, self.account.steps)
        self._act()

    def _act(self) -> None:
        """Do before the update, once in a step, what the optimizer's own decay does not do."""
        acts = self.plan.decoupled or self.plan.exact_off
        if self._acted or not acts or _skipped(self.optimizer):
            return
        assert self._context is not None
        self._acted = True
        if self.plan.decoupled:
            seed = None if self.plan.rounding is None else self.seed
            mask, again = self.plan.mask, self.coverage.asks_again
            self._context.shrink(self.account.steps, again, seed, mask)
        else:
            keep_apart(self.optimizer, self._context.pairs(), self.rates, self._again)

    @with_all_groups
    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Enter the step into the ledger, if it was taken.

        A class whose step calls its superclass's step runs the hooks of both.
        """
        context = self._context
        if context is None or _skipped(self.optimizer):
            return
        self._context, self._acted = None, False
        if self._rests:
            self._rests = False
            context.rest()
            self.counts.rested()
            self.write()
            return
        groups = self.optimizer.param_groups
        if self._again:
            context.record(self.account.steps - 1, self._recorded)
            self.account.share(groups)
        else:
            self._recorded = set()
            context.record(self.account.steps, self._recorded)
            self.account.close_step(groups)
            if self.counts.due or self.account.alone:
                self.counts.ends(self.optimizer, self.account)
        self.counter.counted(groups)
        if self._rounded and not self._strayed:
            self._strayed = warn_of_rounding(self.ledgers, groups)
        if self._watchdog and self._watchdog.sees(self._recorded, context.idle, self._again):
            self._watchdog = None

    def _rest(self) -> None:
        """Keep decay out of a step that only makes the optimizer's state, and does not count."""
        groups = self.optimizer.param_groups
        for target, entry in self.ledgers:
            group = groups[target.group]
            if target.schedule is not None:
                set_decay(group, 0.0)
            if self.plan.exact_off and entry.coupling == "sgd":  # its state has a part that is ours
                follow(self.optimizer, group, target.params(group), 0.0)
        self._context = StepContext(self.ledgers, groups, [0.0] * len(self.ledgers))

    def before_load(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Refuse, before anything is changed, what these ledgers cannot go on from."""
        saved = state["param_groups"]
        if len(saved) == len(self.optimizer.param_groups):  # torch itself refuses another number
            self.cover()  # a group added since the last step has its ledger in the checkpoint
            check_load(self.plan, self.coverage, self.account, saved)

    def after_load(self, optimizer: Optimizer) -> None:
        """Take over what the loaded groups know."""
        self.counts.loaded(self.optimizer)
        take_loaded(self.plan, self.coverage, self.account, self.optimizer)
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
    ungated : collection of int
        The groups that decay without a gradient as well.

    Examples
    --------
    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.zeros(2)
    >>> entry, groups = Entry("decoupled"), [{"params": [w], "lr": 0.5}]
    >>> context = StepContext([(Target(0, None, None, True), entry)], groups, [0.5])
    >>> context.shrink(step=0)
    >>> context.record(0, set())
    >>> w.detach(), entry.accumulated
    (tensor([0.7500, 0.7500]), -0.25)
    """

    def __init__(
        self,
        ledgers: Sequence[tuple[Target, Entry]],
        groups: Sequence[Mapping[str, Any]],
        decays: Sequence[float] | None = None,
        ungated: Collection[int] = (),
    ) -> None:
        self._ledgers, self._groups, self._ungated = ledgers, groups, ungated
        self._decays = [None] * len(ledgers) if decays is None else decays
        self._passed: dict[int, tuple[float, float]] = {}  # by place, where weights are rounded
        # By place and tensors, where these differ
        self._parts: dict[int, dict[tuple[int, ...], Part]] = {}
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

    def round(self, rounded: Mapping[int, RoundedSet], step: int) -> None:
        """Find out what the precision of the weights will let through."""
        passed, parts = let_through(rounded, self._ledgers, self._effective, self._ungated, step)
        self._passed |= passed
        self._parts |= parts

    def shrink(
        self, step: int, everything: bool = False, seed: int | None = None, mask: Any = None
    ) -> None:
        """Shrink the weights that have a gradient, or ``everything`` that may get one yet.

        With a seed what is in half precision is rounded by chance; a mask chooses entries.
        """
        places = enumerate(zip(self._ledgers, self._effective, strict=True))
        for place, ((_, entry), found) in places:
            each = enumerate(found.params)
            acts = {i: p for i, p in each if p.grad is not None or (everything and p.requires_grad)}
            moved = list(acts.values())
            # w <- (1 - lr lambda) w, before the step, as AdamW does
            part = strength(found.decay, found.settings, entry.coupling)
            if mask is not None:
                own = None if seed is None else seed + place
                self._passed[place], self._parts[place] = shrink_each(acts, mask, part, own, step)
            elif seed is None:
                shrink(moved, 1 - part)
            else:
                shrink_stochastically(moved, part, seed + place, step)

    def record(self, step: int, done: set[int]) -> None:
        """Enter the step into the ledgers of what it has moved, and their places into ``done``.

        Those whose place is there already have the step.
        """
        pairs = zip(self._ledgers, self._effective, strict=True)
        for place, ((target, entry), found) in enumerate(pairs):
            moved = found.moved or (target.group in self._ungated and found.params)
            if moved and place not in done:
                passed, parts = self._passed.get(place, (1.0, 1.0)), self._parts.get(place)
                still = () if target.group in self._ungated else found.still
                entry.record(step, found.decay, found.settings, *passed, still=still, parts=parts)
                done.add(place)

    def idle(self, seen: Collection[int]) -> list[int]:
        """Return the groups with a schedule and tensors of which no place was ever seen."""
        pairs = zip(self._ledgers, self._effective, strict=True)
        return [
            target.group
            for place, ((target, _), found) in enumerate(pairs)
            if target.schedule is not None and found.params and place not in seen
        ]

    def rest(self) -> None:
        """Take note of a step that moves nothing and does not count."""
        for (_, entry), found in zip(self._ledgers, self._effective, strict=True):
            entry.rest(found.settings)

    def warn_if_too_much(self, step: int) -> bool:
        """Warn of a decay that takes weights through 0, and return whether there was one."""
        for (target, entry), found in zip(self._ledgers, self._effective, strict=True):
            taken = strength(found.decay, found.settings, entry.coupling)
            if taken >= 1 and found.params:
                warn_of_too_much(target.group, entry.coupling, taken, step)
                return True
        return False


class StepCounter:
    """Tells one step from the next, also where a step takes several calls.

    A call of ``optimizer.step`` may step a part of the tensors only, as ZeRO-3 does: it puts each
    sub-group into the parameter groups in turn.
    """

    def __init__(self) -> None:
        self._lists: list[list[torch.Tensor]] = []  # the groups' tensors in the last call
        # All tensors of the step, where they were not those of one call; and with the call begun
        self._stepped: dict[int, torch.Tensor] | None = None
        self._begun: dict[int, torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tensors, which a copy does not step."""
        return {"_lists": [], "_stepped": None, "_begun": None}

    def continues(
        self, groups: Sequence[Mapping[str, Any]], state: Mapping[torch.Tensor, Any]
    ) -> bool:
        """Return whether a call goes on with the last step: with none of its tensors, but others.

        It does not where these replace the last ones, which have left no state then. Nor where one
        group begins with the tensor of the last call, and that is all that an ordinary step costs.
        """
        lists = [group["params"] for group in groups]
        if self._begin_alike(lists):
            self._begun = None
            return False
        stepped = self._by_id(self._lists) if self._stepped is None else self._stepped
        now = self._by_id(lists)
        again = bool(now and stepped) and not now.keys() & stepped.keys()
        if again and not any(p in state for p in stepped.values()):
            # ZeRO-3 keeps the tensors and their state; who splits Gaussians moves the state.
            moved = any(p in state for p in now.values())
            stepped = {} if moved else self._kept_elsewhere(stepped)
            again = bool(stepped)
        self._begun = stepped | now if again else now
        return again

    def _begin_alike(self, lists: list[list[torch.Tensor]]) -> bool:
        """Return whether a group begins with the tensor of the last call."""
        pairs = zip(lists, self._lists, strict=False)
        return any(now and before and now[0] is before[0] for now, before in pairs)

    def _kept_elsewhere(self, stepped: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the tensors that are kept by others than this; it keeps none of them then."""
        known = {key: weakref.ref(p) for key, p in stepped.items()}
        stepped.clear()
        self._lists, self._stepped, self._begun = [], None, None
        return {key: p for key, one in known.items() if (p := one()) is not None}

    def _by_id(self, lists: list[list[torch.Tensor]]) -> dict[int, torch.Tensor]:
        """Return the tensors by their ids, which they keep as long as they are kept."""
        return {id(p): p for params in lists for p in params}

    def counted(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Keep the tensors of a call that was counted."""
        self._lists, self._stepped = [group["params"] for group in groups], self._begun


# Whether a call of ``optimizer.step`` is a step


def _skipped(optimizer: Optimizer) -> bool:
    """Return whether a GradScaler makes a fused optimizer skip this step; others it never calls."""
    return bool(getattr(optimizer, "found_inf", None))


def _followed(after: Callable[[], None], args: Any, kwargs: Any) -> Any:
    """Let something follow each call of the closure of a step, when the gradients are there.

    Return the arguments of ``optimizer.step`` with the closure replaced; None if there is none.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None

    def closure_and_after() -> Any:
        loss = closure()
        after()
        return loss

    return (args[0], closure_and_after), {k: v for k, v in kwargs.items() if k != "closure"}
