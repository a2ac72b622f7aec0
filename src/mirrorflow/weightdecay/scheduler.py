"""`WeightDecayScheduler`: the decay of a schedule, at every step that an optimizer really takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch.optim import Optimizer

from .account import TOTALS, Account, begun
from .checks import (
    check_decay,
    check_exact_off,
    check_free,
    check_not_captured,
    inner,
    one_of,
    warn_if_apart,
    warn_if_coupled,
)
from .coupling import KINDS
from .ledger import Entry
from .memory import MEMORY, recall, remember
from .momentum import forget, keep_apart
from .outside import decaying, shrink, skipped, write
from .schedules import check_schedules, tell
from .selection import (
    Rule,
    Target,
    check_schedule,
    names_of,
    rate_at,
    rules,
    settled,
    targets,
    warn_if_unused,
)
from .units import CONVENTIONS

__all__ = ["WeightDecayScheduler"]

INITIAL = "initial_weight_decay"  # the key in a group, as LR schedulers keep initial_lr


class WeightDecayScheduler:
    r"""Give an optimizer the weight decay of a schedule, and keep the account of it.

    Before each ``optimizer.step()`` the decay ``rate(t)`` is written to every parameter group
    whose own decay is not 0, ``t`` being the number of steps that the optimizer has really taken:
    accumulated gradients, and steps that a GradScaler skips, do not count. The work is done by
    hooks of the optimizer, so ``step()`` only shows the next decay early; calling it twice, in
    another order than a learning-rate scheduler, or not at all, changes nothing.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimizer; of a wrapper (accelerate, Lightning) the optimizer inside.
    schedule : Schedule, callable step -> float, or None
        The decay at optimizer step t; None leaves what no rule of ``groups`` chooses as it is.
    relative : bool
        Multiply each group's own decay by rate(t), instead of replacing it.
    groups : sequence of (what, schedule)
        Own schedules: ``what`` is the index of a group, a regular expression to find in the names
        of parameters or groups, a module, a parameter or several. The first rule that fits
        counts; None as schedule leaves the decay alone. What is named here is scheduled even if
        its own decay is 0.
    decoupled : bool
        Set the optimizer's decay to 0 and shrink the weights by 1 - lr x decay here, before the
        step, as AdamW does: for any optimizer, tensor by tensor, with an exact end.
    exact_off : bool
        For SGD with momentum, which takes L2 into its buffer: follow the decay's part of each
        buffer, and take it out when the rate becomes 0, so that the next steps are those of a
        buffer that never saw decay. It costs as much memory as the momentum, and is saved with
        the optimizer's state.
    convention : {"follow-lr", "fixed", "adamc"}
        What the rate means: the optimizer's decay, so that lr x rate acts; what acts itself,
        whatever the learning rate; or lr^2 / lr_max x rate, as in AdamC.
    model : torch.nn.Module, optional
        Names the parameters, if the optimizer was not made from ``named_parameters()``.
    coupling : str, optional
        How the optimizer's decay acts ("decoupled", "fixed", "coupled"), where trying it on a
        small weight fails.

    Attributes
    ----------
    steps : int
        The number of steps that the optimizer has taken.
    accumulated : list of float
        a_T = -sum of lr x decay, one per group.

    Examples
    --------
    >>> from mirrorflow import SwitchOff
    >>> w = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = torch.optim.AdamW([w], lr=0.5, weight_decay=0.1)
    >>> scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.1, at=2))
    >>> for _ in range(5):
    ...     w.grad = torch.zeros_like(w)
    ...     optimizer.step()
    ...     scheduler.step()
    >>> scheduler.get_last_weight_decay(), scheduler.accumulated, w[0].item()
    ([0.0], [-0.1], 0.9024999737739563)

    Notes
    -----
    A small summary travels in the parameter groups (``initial_weight_decay``,
    ``weight_decay_ledger``), so that the optimizer's checkpoint knows the step it belongs to and
    has the totals; the record of `audit` is in `state_dict`. The schedule is in neither: it is
    that of the program which resumes.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Any,
        relative: bool = False,
        *,
        groups: Iterable[Rule] = (),
        decoupled: bool = False,
        exact_off: bool = False,
        convention: str = "follow-lr",
        model: torch.nn.Module | None = None,
        coupling: str | None = None,
    ) -> None:
        check_schedule(schedule, optional=True)
        one_of("convention", convention, CONVENTIONS)
        if coupling is not None:
            one_of("coupling", coupling, KINDS)
        self.optimizer = inner(optimizer)
        check_free(self.optimizer, WeightDecayScheduler)
        self.schedule, self.relative = schedule, relative
        self.groups, self.model = rules(groups), model
        self.decoupled, self.exact_off = decoupled, exact_off
        self.convention, self.coupling = convention, coupling
        self.targets: list[Target] = []
        self.account = Account()
        self._initial: list[float] = []
        self._begun = self._decayed = False  # within a step
        self._compared = False  # with the optimizer's own count
        self._begin()

    def _begin(self) -> None:
        """Take the optimizer over."""
        warn_if_unused(self.groups, self.optimizer.param_groups, names_of(self.model))
        self._cover_groups()
        kinds = [entry.kind for entry in self.account.entries]
        check_decay(self.optimizer, self.targets, self.decoupled)
        check_schedules(self.optimizer, self.targets, kinds)
        if self.exact_off:
            check_exact_off(self.optimizer, self.targets, kinds)
        warn_if_coupled(self.optimizer, self.targets, kinds, self.exact_off)
        self.account.agree(self.optimizer.param_groups)
        recall(self.targets, self.optimizer.param_groups)
        self.step()
        self._attach()  # last, so that nothing is left in the optimizer if any of this fails

    # What a user calls

    def step(self) -> None:
        """Write the decay of the step that comes next; it does not count steps."""
        self._cover_groups()
        tell(self._ledgers(), self.steps)
        groups = self.optimizer.param_groups
        self._rates = self.rates(self.steps)
        self._last = self.decays(self._rates, groups)
        for target, decay in zip(self.targets, self._last, strict=True):
            group = groups[target.group]
            if self.decoupled:
                write(group, 0.0)
            elif target.schedule is not None:
                write(group, decay)
        remember(self.targets, groups)

    def get_last_weight_decay(self) -> list[float]:
        """Give the decay of the step that comes next, in the order of ``accumulated``."""
        return list(self._last)

    @property
    def steps(self) -> int:
        """The number of steps that the optimizer has taken."""
        return self.account.steps

    @property
    def accumulated(self) -> list[float]:
        """Give a_T, one number per group; NaN where L2 is rescaled by the optimizer.

        With rules within groups (``decoupled=True``), one number for each set of tensors.
        """
        return [entry.accumulated for entry in self.account.entries]

    @property
    def pending(self) -> list[float]:
        """Give what momentum would still absorb of the past decay, if it were 0 from now on."""
        groups, exact = self.optimizer.param_groups, self.exact_off
        return [0.0 - entry.pending(groups[t.group], exact) for t, entry in self._ledgers()]

    def audit(self) -> list[dict[str, Any]]:
        """Give what was really applied, as rows: a run of steps of one group each.

        Returns
        -------
        list of dict
            group, kind, start, stop, decay, decay_end, lr, lr_end, absorbed, and a, the
            accumulated sum at the end of the row. `table` makes text of them. NaN stands for
            what is not known: of some steps only the sum.
        """
        return [row for t, entry in self._ledgers() for row in entry.rows(self.name(t))]

    def name(self, target: Target) -> str:
        """Name a set of tensors by its group, and by its place in it if it is not all of it."""
        name = str(self.optimizer.param_groups[target.group].get("name", target.group))
        places = target.positions
        return name if places is None else f"{name}[{','.join(map(str, places))}]"

    def state_dict(self) -> dict[str, Any]:
        """Give the state in plain numbers; safe under ``torch.load(weights_only=True)``."""
        return self.account.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, before or after the optimizer has loaded its own.

        If the two are of different steps, the optimizer's counts: it belongs to the weights.
        """
        self.account.load(state, self.optimizer.param_groups)
        self.step()

    def close(self) -> None:
        """Let the optimizer go: its hooks and the count are removed, its decay stays as it is."""
        for handle in self._handles:
            handle.remove()
        for group in self.optimizer.param_groups:
            group.pop(TOTALS, None)
            group.pop(MEMORY, None)
        forget(self.optimizer)

    def __enter__(self) -> Self:
        """Close at the end of a with block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def rates(self, step: int) -> list[float | None]:
        """Give the rate of each set of tensors at a step; None where nothing schedules it."""
        schedules = {id(t.schedule): t.schedule for t in self.targets if t.schedule is not None}
        found = {key: rate_at(schedule, step) for key, schedule in schedules.items()}
        return [found.get(id(t.schedule)) for t in self.targets]

    def decays(
        self, rates: Sequence[float | None], groups: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """Turn rates into decays, for the settings of the groups."""
        pairs = zip(rates, self.targets, strict=True)
        return [self._decay(rate, groups[target.group]) for rate, target in pairs]

    def _decay(self, rate: float | None, group: Mapping[str, Any]) -> float:
        """Turn a rate into the decay of a group; without a rate it keeps its own."""
        own = group.get(INITIAL, 0.0)
        if rate is None:
            return own if self.decoupled else float(group["weight_decay"])
        peak = group.get("max_lr", group.get("initial_lr", group["lr"]))
        value = rate * own if self.relative else rate
        return CONVENTIONS[self.convention](value, float(group["lr"]), float(peak))

    # The hooks of the optimizer

    def _attach(self) -> None:
        """Register the hooks, outside what torch.compile traces."""
        opaque: Any = torch.compiler.disable
        self._handles = [
            self.optimizer.register_step_pre_hook(opaque(self._before_step)),
            self.optimizer.register_step_post_hook(opaque(self._after_step)),
            self.optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Write the decay that acts in this step, or apply it."""
        check_not_captured()
        self.account.agree(optimizer.param_groups)
        self.account.warn_if_missing()
        self.step()
        self._begun = True
        if not (self.decoupled or self.exact_off) or skipped(optimizer):
            return None
        return decaying(self._decay_outside, args, kwargs)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Enter the step into the ledger, if it was taken.

        A class whose step calls that of its superclass runs the hooks of both.
        """
        if not self._begun or skipped(optimizer):
            return
        self._begun = self._decayed = False
        for (target, entry), decay in zip(self._ledgers(), self._last, strict=True):
            group = optimizer.param_groups[target.group]
            if any(p.grad is not None for p in target.params(group)):
                acted = decay if self.decoupled else float(group["weight_decay"])
                entry.record(self.steps, acted, group)
        self.account.close_step(optimizer.param_groups)
        if not self._compared:
            self._compared = True
            warn_if_apart(optimizer, self.steps)

    def _after_load(self, optimizer: Optimizer) -> None:
        """Take over what the loaded groups know."""
        for group, initial in zip(optimizer.param_groups, self._initial, strict=False):
            group.setdefault(INITIAL, initial)
        self.account.agree(optimizer.param_groups)
        recall(self.targets, optimizer.param_groups)
        self.step()

    def _decay_outside(self) -> None:
        """Do before the update, once in a step, what the optimizer's own decay does not do."""
        if self._decayed:
            return
        self._decayed = True
        if not self.decoupled:
            keep_apart(self.optimizer, self._ledgers(), self._rates)
            return
        for target, decay in zip(self.targets, self._last, strict=True):
            group = self.optimizer.param_groups[target.group]
            shrink(target.params(group), 1 - float(group["lr"]) * decay)

    # The groups

    def _ledgers(self) -> list[tuple[Target, Entry]]:
        """Pair each set of tensors with its ledger."""
        return list(zip(self.targets, self.account.entries, strict=True))

    def _cover_groups(self) -> None:
        """Take over the groups that are new."""
        for index in range(len(self._initial), len(self.optimizer.param_groups)):
            group = self.optimizer.param_groups[index]
            own = group.setdefault(INITIAL, float(group.get("weight_decay", 0.0)))
            self._initial.append(own)
            found = targets(
                index, group, self.groups, self.schedule, names_of(self.model), self.decoupled
            )
            kind = "decoupled" if self.decoupled else self.coupling
            for target in found:
                self.targets.append(settled(target, group, own, self.relative))
                self.account.open(begun(self.optimizer, group, kind), index)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the hooks, as the optimizer leaves its own."""
        return {key: value for key, value in vars(self).items() if key != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the hooks into the copied optimizer."""
        self.__dict__.update(state)
        self._attach()
