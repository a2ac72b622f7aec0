"""What goes on at an optimizer's steps and loads: the decay is written or applied, and noted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from .account import TOTALS, Account
from .acting import decay_of
from .checks import check_not_captured
from .clock import Clock, only_makes_state, stands
from .conventions import UnknownPeakError
from .coverage import Coverage, Plan
from .imprint import INITIAL, separated
from .ledger import Entry
from .memory import recall, remember
from .momentum import follow, forget, keep_apart
from .outside import followed, skipped, write
from .schedules import tell
from .selection import NoValueError, Target, rate_at
from .taking import Taking

__all__ = ["Stepping"]


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
