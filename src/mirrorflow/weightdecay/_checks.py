"""Checks and warnings before a schedule takes an optimizer over."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.optim import Optimizer

from ..schedule import Constant, Schedule
from ._group_state import INITIAL
from ._rounding import half
from ._targets import Target
from .coupling import COUNTED, CoupledDecayWarning
from .feedback import Feedback, OffAtBudget

__all__ = [
    "check_decay",
    "check_exact_off",
    "check_free",
    "check_momentum",
    "check_rounding",
    "check_schedules",
    "inner",
    "one_of",
    "warn_if_coupled",
]

Groups = Sequence[Mapping[str, Any]]

ROUNDING = 1e-12  # of the largest rate: a ramp that ends at 0 may end a little below


def inner(optimizer: Any) -> Optimizer:
    """Return the optimizer inside the wrappers of accelerate, Lightning and DeepSpeed.

    DeepSpeed's ZeRO optimizers are not torch optimizers, but hold one.

    Raises
    ------
    TypeError
        If there is none that steps, and calls hooks.
    """
    found, seen = optimizer, [optimizer]
    while (wrapped := getattr(seen[-1], "optimizer", None)) is not None and len(seen) < _DEEPEST:
        seen.append(wrapped)
        found = wrapped if isinstance(wrapped, Optimizer) else found
    if isinstance(found, Optimizer) and hasattr(found, "_optimizer_step_pre_hooks"):
        return found
    if isinstance(found, Optimizer):
        raise TypeError(
            f"optimizer must be one that calls step hooks, got a {type(found).__name__} around "
            f"{type(seen[-1]).__name__}, which holds no torch.optim.Optimizer. Give the optimizer "
            "that takes the steps"
        )
    raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")


_DEEPEST = 8  # wrappers, around one another


def one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raise unless the value is known."""
    known = tuple(known)  # in which a list can be looked for as well
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")


def check_momentum(momentum: Any, kind: str) -> None:
    """Raise unless it is the momentum of SGD, or 0."""
    if not (isinstance(momentum, (int, float)) and 0 <= momentum < 1):
        raise ValueError(f"momentum must be a number >= 0 and < 1, got {momentum!r}")
    if momentum and kind != "sgd":
        raise ValueError(
            f'momentum must be 0 unless kind="sgd", where decay acts through it, got '
            f"momentum={momentum} with kind={kind!r}"
        )


def check_free(optimizer: Optimizer, owner: type) -> None:
    """Raise if a scheduler has its hooks, methods of ``owner``, in the optimizer already."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if isinstance(getattr(inspect.unwrap(hook), "__self__", None), owner):
            raise ValueError(
                f"this {type(optimizer).__name__} must have one WeightDecayScheduler at most, got "
                "a second one. Close the first by close(), or pass several schedules by groups="
            )


def check_rounding(optimizer: Optimizer) -> None:
    """Raise if stochastic rounding has nothing to round."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if params and not half(params):
        found = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in params}))
        raise ValueError(
            f'rounding="stochastic" must have weights in bfloat16 or float16, got {found}. Leave '
            "rounding= out: decay acts as a whole there"
        )


def check_decay(
    optimizer: Optimizer, targets: Sequence[Target], decoupled: bool, relative: bool = False
) -> None:
    """Raise if there is nothing to schedule, and say how to change that."""
    groups = optimizer.param_groups
    _check_trained(optimizer)
    if not decoupled and not all("weight_decay" in group for group in groups):
        raise ValueError(
            f"each parameter group of {type(optimizer).__name__} must have weight_decay, got one "
            "without. Pass decoupled=True, which decays the weights from outside"
        )
    if relative and not any("weight_decay" in group for group in groups):
        raise ValueError(
            f"relative=True multiplies the decay of each group, and {type(optimizer).__name__} has "
            "no weight_decay: with relative=False the schedule gives the decay itself"
        )
    _check_scheduled(groups, targets)


def _check_trained(optimizer: Optimizer) -> None:
    """Raise if an optimizer without decay holds nothing that is trained: it is a stand-in."""
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    if any("weight_decay" in group for group in groups) or any(p.requires_grad for p in params):
        return
    if params:
        raise ValueError(
            f"optimizer must hold tensors that are trained, got a {type(optimizer).__name__} whose "
            "tensors need no gradient. If it stands in for others that step in the backward pass, "
            "as the Trainer's layer-wise optimizers do, give each of those its scheduler"
        )


def _check_scheduled(groups: Groups, targets: Sequence[Target]) -> None:
    """Raise if no tensor follows a schedule, and say why; ZeRO-3 fills the groups step by step."""
    scheduled = {t.group for t in targets if t.schedule is not None}
    if any(groups[i]["params"] for i in scheduled):
        return
    if scheduled and not any(group["params"] for group in groups):
        return
    decays = [float(group.get(INITIAL, 0.0)) for group in groups]
    if scheduled:
        reason = (
            f"no tensor is in the parameter groups that have a schedule, {sorted(scheduled)}, "
            "and the others have weight_decay 0"
        )
    elif any(decays):
        raise ValueError(
            "nothing to schedule: schedule is None, and no rule of groups= chooses a parameter "
            f"whose decay may be scheduled. The parameter groups have weight_decay {decays}. Give "
            "a schedule, or rules that choose parameters by their index, name or module"
        )
    else:
        reason = (
            "every parameter group has weight_decay 0, the default of TrainingArguments and of "
            "most optimizers, and such groups stay without decay"
        )
    raise ValueError(
        f"nothing to schedule: {reason}. Make the optimizer with weight_decay > 0 "
        "(TrainingArguments(weight_decay=0.1); for LoRA+ loraplus_weight_decay=0.1), or name what "
        "shall decay: groups=[(0, schedule)]"
    )


def check_exact_off(
    optimizer: Optimizer, targets: Sequence[Target], couplings: Sequence[str]
) -> None:
    """Raise where the decay cannot be taken out of what the optimizer remembers."""
    for target, coupling in zip(targets, couplings, strict=True):
        if target.schedule is not None and coupling == "averaged":
            raise ValueError(
                "exact_off takes L2 out of the momentum of torch.optim.SGD, and "
                f"{type(optimizer).__name__} moves the weights to copies or averages of them, "
                "which have absorbed the decay as well: leave exact_off out"
            )
        if target.schedule is not None and coupling in ("coupled", "unknown"):
            raise ValueError(
                "exact_off takes L2 out of the momentum of torch.optim.SGD, which is linear in it. "
                f"The state of {type(optimizer).__name__} is not (Adam's moments are not), so its "
                "decay cannot be separated from its gradients. decoupled=True keeps the decay out "
                "from the start"
            )


def warn_if_coupled(
    optimizer: Optimizer, targets: Sequence[Target], couplings: Sequence[str], exact_off: bool
) -> None:
    """Warn of a decay that a schedule cannot switch off, or that no ledger can count."""
    name = type(optimizer).__name__
    found = set()
    for target, coupling in zip(targets, couplings, strict=True):
        if target.schedule is None or coupling not in _ADVICE:
            continue
        if coupling == "sgd" and exact_off:
            continue
        momentum = optimizer.param_groups[target.group].get("momentum", 0)
        if coupling != "sgd" or (momentum != 0 and not isinstance(target.schedule, Constant)):
            found.add(coupling)
    for coupling in sorted(found):
        warnings.warn(_ADVICE[coupling].format(name=name), CoupledDecayWarning, stacklevel=4)


_ADVICE = {
    "sgd": (
        "{name} with momentum takes weight decay into the gradient: its buffer goes on decaying "
        "after the schedule has reached 0 (by `pending`). exact_off=True takes it out "
        "of the buffer then; decoupled=True decays from outside and never puts it there"
    ),
    "coupled": (
        "{name} takes weight decay into the gradient, which it rescales and may remember: a decay "
        "of 0 need not be off, and no sum of lr x decay describes it, so `accumulated` is NaN. "
        "decoupled=True decays from outside and ends exactly"
    ),
    "unknown": (
        "a trial step of {name} failed, so its coupling is unknown and `accumulated` is NaN. Set "
        'coupling="decoupled", "fixed", "scaled", "averaged" or "coupled", or use decoupled=True'
    ),
}


def check_schedules(
    optimizer: Optimizer, targets: Sequence[Target], couplings: Sequence[str]
) -> None:
    """Raise or warn where a schedule cannot do what it was made for.

    Raises
    ------
    ValueError
        If a budget is to be kept of which no account exists, or a schedule is negative anywhere.
    """
    for target, coupling in zip(targets, couplings, strict=True):
        if isinstance(target.schedule, OffAtBudget) and coupling not in COUNTED:
            raise ValueError(
                f"OffAtBudget counts lr x decay, and no such sum describes the decay of "
                f"{type(optimizer).__name__}, which is {coupling}: "
                f"{_INSTEAD.get(coupling, _OUTSIDE)}"
            )
    for schedule in {id(t.schedule): t.schedule for t in targets}.values():
        if isinstance(schedule, Schedule):
            _check_never_negative(schedule)
            _warn_if_over_at_once(schedule)
        if isinstance(schedule, Feedback) and schedule.log:
            last = schedule.log[-1]
            warnings.warn(
                f"this {type(schedule).__name__} has decided before, at step {last['step']} last "
                f"({last['reason']}), and continues with a rate of {schedule.current:g}. Make a "
                "new one for a new run",
                stacklevel=4,
            )


def _warn_if_over_at_once(schedule: Schedule) -> None:
    """Warn where times seem to be fractions of the run, not steps."""
    if schedule.breakpoints and schedule.breakpoints[-1] < 1:
        warnings.warn(
            f"{schedule!r} is over before the first step has ended: its clock is the number of "
            "the optimizer's steps, not a fraction of the run. Multiply its times by the "
            "number of steps, as in SwitchOff(0.1, at=0.6 * total)",
            stacklevel=5,
        )


def _check_never_negative(schedule: Schedule) -> None:
    """Raise if a schedule gives a negative rate at any time, also one late in the run.

    Between breakpoints rates are monotone, so that the lowest is at one of them or just before it,
    where the schedule jumps. A class whose rates are not is found at the step at which it happens.
    """
    points = np.array([0.0, *schedule.breakpoints])
    times = np.concatenate([points, np.nextafter(points[1:], 0.0)])
    rates = schedule.rate(times)
    lowest = int(np.argmin(rates))
    if rates[lowest] < -ROUNDING * np.abs(rates).max():
        raise ValueError(
            f"a weight decay must be >= 0 at all steps, got {rates[lowest]:.4g} at step "
            f"{times[lowest]:.10g} of {schedule!r}. Correct its rates"
        )


_OUTSIDE = "decoupled=True decays from outside, and is counted"
_INSTEAD = {
    "scaled": f'convention="fixed", {_OUTSIDE}',
    "averaged": "SwitchOff(rate, at=...) is off at a step, OffWhenLevel by a measurement",
}
