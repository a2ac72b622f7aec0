"""The scheduler: the decay of a schedule, at every step that an optimizer really takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch.optim import Optimizer

from .._html import html_table
from ._agreement import load
from ._checks import (
    check_decay,
    check_exact_off,
    check_free,
    check_rounding,
    check_schedules,
    inner,
    warn_if_coupled,
)
from ._coverage import CoveragePlan
from ._fingerprint import Fingerprints
from ._group_state import cleared, undone_if_it_fails
from ._ledger import Account
from ._ledger_state import account_state
from ._load import object_to
from ._momentum import forget
from ._step import Stepping
from ._targets import Rule, Target, cleaned, names_of, parameter_names, rules
from .feedback import Feedback

__all__ = ["WeightDecayScheduler"]


class WeightDecayScheduler:
    r"""A weight decay that follows a schedule, with the account of what it has absorbed.

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
        Multiply each group's own decay by rate(t), instead of replacing it. After a load it is
        the one of the checkpoint, see ``on_change``.
    groups : sequence of (what, schedule)
        Own schedules: ``what`` is the index of a group, a regular expression to find in the names
        of parameters or groups, a module, a parameter, or a list of them. The first rule that fits
        counts; None as schedule leaves the decay alone. What is named here is scheduled even if
        its own decay is 0.
    decoupled : bool
        Set the optimizer's decay to 0 and multiply the weights by 1 - lr x decay here, before the
        step, as AdamW does: tensor by tensor, with an exact end. An optimizer that asks its closure
        again within a step (LBFGS) decays before the first time. Refused where it would not do:
        for optimizers that keep averages of the weights, or that find their own step size.
    rounding : {"stochastic"}, optional
        With ``decoupled=True``, for weights in bfloat16 or float16: round what decay leaves up or
        down by chance, so that lr x decay acts as a whole however small it is. Weights in other
        precisions decay as without it; where there are no others, it is refused.
    seed : int
        Of the stochastic rounding, whose random numbers depend on it and on the step alone. All
        processes that hold the same weights need the same. It travels in `state_dict`.
    mask : {"cautious", "touched-rows"}, Tensor or mapping of parameters to Tensor, optional
        With ``decoupled=True``: where decay acts, ``w <- (1 - lr x decay x mask) w``. "cautious":
        where gradient x weight >= 0; "touched-rows": rows with a gradient that is not 0, as of an
        embedding. A tensor in [0, 1] fits the shape of each parameter; what a mapping lacks decays
        as a whole. What acts is counted, tensor by tensor: the mean of the mask over the entries,
        weighted with their squares, in the order of `by_tensor`.
    exact_off : bool
        For SGD with momentum, which takes L2 into its buffer: follow the decay's part of each
        buffer, and take it out when the rate becomes 0, so that the next steps are as with a
        buffer that never saw decay. It costs as much memory as the momentum, and is saved with
        the optimizer's state.
    convention : str, optional
        What the rate means, however the optimizer counts its decay, one of
        ``mirrorflow.weightdecay.conventions.CONVENTIONS``: with "follow-lr" lr x rate acts; with
        "fixed" the rate itself; with "adamc" lr^2 / peak x rate; with "schedule-only"
        lr / peak x rate, as in the AdamW paper. Without it the rate is the optimizer's own number,
        which most multiply by the learning rate.
    peak : float, optional
        The highest learning rate of the run, for "adamc" and "schedule-only", where it is not what
        the learning-rate scheduler has written to the groups: ``max(learning_rates(lr, steps))``.
    model : torch.nn.Module, optional
        Names the parameters, if the optimizer was not made from ``named_parameters()``.
    coupling : str, optional
        How the optimizer's decay acts, where a trial step on a small weight fails: "decoupled", the
        weights shrink by lr x decay; "fixed", by the decay; "scaled", by a step size of its own
        times the decay; "masked", where the gradient allows it; "sgd", as in torch.optim.SGD;
        "coupled", in a rescaled gradient; "averaged", on what the weights are an average of.
    on_change : {"warn", "error", "program"}
        What to do about a checkpoint that was written with another schedule, or with another decay
        of groups where ``relative`` multiplies it. The schedule is always the program's, the
        groups' own decay the checkpoint's; "program" takes the program's for both, without a
        warning.

    Attributes
    ----------
    steps : int
        The number of steps that the optimizer has taken.
    accumulated : list of float
        a_T = -sum of lr x decay, one per group; of weights in half precision what acted of it.
    acting_parts : list of float
        The part of lr x decay that the precision of the weights let act, one per group.

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
    has the totals; the record of `audit` is in `state_dict`. The schedule is in neither: the
    program that resumes gives it. A pre-step hook reads what acts, with a closure after it has
    given the gradients; it does not see what later pre-step hooks of others change in that step.
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
        convention: str | None = None,
        peak: float | None = None,
        model: torch.nn.Module | None = None,
        coupling: str | None = None,
        on_change: str = "warn",
        rounding: str | None = None,
        seed: int = 0,
        mask: Any = None,
    ) -> None:
        self.optimizer = inner(optimizer)
        check_free(self.optimizer, Stepping)
        chosen = rules(groups)
        self.plan = CoveragePlan(
            schedule,
            relative,
            chosen,
            decoupled,
            exact_off,
            convention,
            peak,
            model,
            coupling,
            on_change,
            rounding,
            seed,
            mask,
        )
        self._fingerprints = Fingerprints()
        with undone_if_it_fails(self.optimizer):
            self._stepping = Stepping(self.optimizer, self.plan)
            self._begin()
        self._attach()

    def _begin(self) -> None:
        """Take the optimizer over."""
        coverage = self._stepping.coverage
        coverage.warn_if_unused(self.optimizer)
        self._stepping.cover()
        couplings = [entry.coupling for entry in self.account.entries]
        check_decay(self.optimizer, self.targets, self.decoupled, self.plan.relative)
        check_schedules(self.optimizer, self.targets, couplings)
        if self.plan.rounding is not None:
            check_rounding(self.optimizer)
        if self.exact_off:
            check_exact_off(self.optimizer, self.targets, couplings)
        warn_if_coupled(self.optimizer, self.targets, couplings, self.exact_off)
        coverage.warn_if_scaled(self.optimizer, self.account)
        self._stepping.begin()

    # What a user calls

    def step(self) -> None:
        """Write the decay of the step that comes next; it does not count steps.

        Where the schedule has ended, the last decay stays: only a step that is taken needs one.
        """
        self._stepping.write()

    def __repr__(self) -> str:
        """Say which schedule it follows, and how far it is."""
        form = type(self).__name__
        return f"{form}({self.schedule!r}, step {self.steps}, {len(self.targets)} groups)"

    def _repr_html_(self) -> str:
        """Show each group's decay, and what it has absorbed."""
        rows = zip(self.targets, self.get_last_weight_decay(), self.accumulated, strict=True)
        shown = [(self.name(target), decay, a) for target, decay, a in rows]
        return html_table(repr(self), ("group", "next decay", "a absorbed"), shown)

    def get_last_weight_decay(self) -> list[float]:
        """Return the decay of the step that comes next, in the order of ``accumulated``."""
        return list(self._stepping.last)

    @property
    def account(self) -> Account:
        """The count of steps and the ledgers."""
        return self._stepping.account

    @property
    def targets(self) -> list[Target]:
        """The sets of tensors, in the order of ``accumulated``."""
        return self._stepping.coverage.targets

    @property
    def schedule(self) -> Any:
        """The schedule of what no rule chooses."""
        return self.plan.schedule

    @property
    def decoupled(self) -> bool:
        """Whether the decay comes from outside."""
        return self.plan.decoupled

    @property
    def exact_off(self) -> bool:
        """Whether L2 is taken out of momentum when the rate becomes 0."""
        return self.plan.exact_off

    @property
    def steps(self) -> int:
        """The number of steps that the optimizer has taken."""
        return self.account.steps

    @property
    def accumulated(self) -> list[float]:
        """Return a_T, one number per group; NaN where L2 is rescaled by the optimizer.

        With rules within groups (``decoupled=True``), one number for each set of tensors. Where
        tensors of a set had no gradient in some of its steps, it is the mean over the entries of
        those that have been stepped; `by_tensor` has the accounts of each.
        """
        pairs = zip(self.targets, self.account.entries, strict=True)
        return [entry.mean(self._sizes(target)) for target, entry in pairs]

    def _sizes(self, target: Target) -> list[int]:
        """Return the number of entries of each tensor of a set."""
        return [p.numel() for p in target.params(self.optimizer.param_groups[target.group])]

    def by_tensor(self) -> list[dict[str, Any]]:
        """Return the account of each tensor.

        Returns
        -------
        list of dict
            group, tensor (its name, or its place in the group), steps in which it was updated, and
            a, what it has absorbed.

        Examples
        --------
        >>> from mirrorflow import Constant
        >>> early, late = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        >>> optimizer = torch.optim.AdamW([early, late], lr=0.5, weight_decay=0.125)
        >>> scheduler = WeightDecayScheduler(optimizer, Constant(0.125))
        >>> for step in range(4):
        ...     early.grad = torch.zeros(2)
        ...     late.grad = torch.zeros(2) if step >= 2 else None
        ...     optimizer.step()
        >>> [(row["tensor"], row["steps"], row["a"]) for row in scheduler.by_tensor()]
        [(0, 4, -0.25), (1, 2, -0.125)]
        """
        rows, known = [], names_of(self.plan.model)
        for target, entry in zip(self.targets, self.account.entries, strict=True):
            group = self.optimizer.param_groups[target.group]
            names, name = parameter_names(group, known), self.name(target)
            places = target.positions or range(len(group["params"]))
            for i, place in enumerate(places):
                own = entry.others.get(i, entry)
                tensor = place if names[place] is None else cleaned(str(names[place]))
                rows.append({"group": name, "tensor": tensor} | own.summary())
        return rows

    @property
    def acting_parts(self) -> list[float]:
        """Return the part of lr x decay that acted, in the order of ``accumulated``.

        1 but for weights in bfloat16 or float16; NaN before any decay, or where it is not known.
        """
        return [entry.acting_part for entry in self.account.entries]

    @property
    def pending(self) -> list[float]:
        """Return what momentum would still absorb of the past decay, if it were 0 from now on."""
        groups, exact = self.optimizer.param_groups, self.exact_off
        return [0.0 - entry.pending(groups[t.group], exact) for t, entry in self._stepping.ledgers]

    def audit(self) -> list[dict[str, Any]]:
        """Return what really acted, as rows: a run of steps of one group each.

        Returns
        -------
        list of dict
            group, kind, start, stop, decay, decay_end, lr, lr_end, absorbed, and a, the
            accumulated sum at the end of the row. `table` makes text of them. NaN stands for
            what is not known: of some steps only the sum.
        """
        names = self._stepping.coverage.names(self.optimizer)
        pairs = zip(names, self.account.entries, strict=True)
        return [row for name, entry in pairs for row in entry.rows(name)]

    def name(self, target: Target) -> str:
        """Return the name of a set of tensors: its group, and what is in it if it is a part."""
        names = self._stepping.coverage.names(self.optimizer)
        return names[self.targets.index(target)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain numbers; safe under ``torch.load(weights_only=True)``."""
        state = account_state(self.account) | self._fingerprints.state(self.targets)
        return state if self.plan.rounding is None else state | {"seed": self._stepping.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, before or after the optimizer has loaded its own.

        If the two are of different steps, the optimizer's counts: it belongs to the weights.

        Raises
        ------
        ValueError
            If it is the state of other groups, rules or couplings, or with
            ``on_change="error"`` of another schedule; nothing is changed then.
        """
        self._stepping.cover()  # a group added since the last step has its ledger in the state
        change = self._fingerprints.change(state, self.targets)
        effect = "The program's counts from here on"
        if change and self.plan.on_change == "error":
            object_to(self._stepping.plan, change, effect)
        load(self.account, state, self.optimizer.param_groups)
        self._stepping.seed = int(state.get("seed", self._stepping.seed))
        if change:
            object_to(self._stepping.plan, change, effect)
        self.step()

    def close(self) -> None:
        """Let the optimizer go: its hooks and the count are removed, its decay stays as it is."""
        for handle in self._handles:
            handle.remove()
        cleared(self.optimizer.param_groups)
        forget(self.optimizer)
        for loop in {id(t.schedule): t.schedule for t in self.targets}.values():
            if isinstance(loop, Feedback):
                loop.over()

    def __enter__(self) -> Self:
        """Close at the end of a with block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    # What a preview asks

    def rates(self, step: int) -> list[float | None]:
        """Return the rate of each set of tensors at a step; None where nothing schedules it."""
        return self._stepping.rates_at(step)

    def decays(
        self, rates: Sequence[float | None], groups: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """Return the decays that rates come to, for the settings of the groups."""
        return self._stepping.decays(rates, groups)

    # The hooks of the optimizer

    def _attach(self) -> None:
        """Register the hooks, outside what torch.compile traces."""
        opaque: Any = torch.compiler.disable
        stepping = self._stepping
        self._handles = [
            self.optimizer.register_step_pre_hook(opaque(stepping.before_step)),
            self.optimizer.register_step_post_hook(opaque(stepping.after_step)),
            self.optimizer.register_load_state_dict_pre_hook(stepping.before_load),
            self.optimizer.register_load_state_dict_post_hook(stepping.after_load),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the hooks, as the optimizer leaves its own."""
        return {key: value for key, value in vars(self).items() if key != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the hooks into the copied optimizer."""
        self.__dict__.update(state)
        self._attach()
