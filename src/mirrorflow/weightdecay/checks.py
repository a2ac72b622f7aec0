"""What is refused or warned of before a schedule takes an optimizer over."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..schedule import Constant
from .coupling import CoupledDecayWarning
from .layers import PerLayer

if TYPE_CHECKING:
    from .selection import Target

__all__ = [
    "check_decay",
    "check_exact_off",
    "check_free",
    "check_not_captured",
    "inner",
    "no_schedule",
    "one_of",
    "warn_if_coupled",
]

Groups = Sequence[Mapping[str, Any]]


def inner(optimizer: Any) -> Optimizer:
    """Give the optimizer inside the wrappers of accelerate and Lightning."""
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = wrapped
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Raise unless the value is known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def no_schedule(value: Any) -> str:
    """Say why something is no schedule of decay, and what to write instead."""
    if isinstance(value, Real):
        hint = f"for a number use Constant({value!r})"
    elif isinstance(value, str):
        hint = "make it from its settings: SwitchOff(0.1, at=600), Cosine(0.1, 0.0, duration=1000)"
    elif isinstance(value, LRScheduler):
        hint = (
            "a decay that follows the learning rate has convention=, one of its own a Schedule: "
            "Cosine(0.1, 0.0, duration=1000)"
        )
    elif isinstance(value, type):
        hint = f"make one of the class, {value.__name__}(...)"
    elif isinstance(value, PerLayer):
        hint = (
            "PerLayer has a loop for each layer: groups=loops.rules(layers), decoupled=True, or "
            "give it to ControlledDecay, which finds the layers"
        )
    elif isinstance(value, (Sequence, Mapping)):
        hint = "for values step by step give a function, such as lambda step: values[step]"
    else:
        hint = "Constant, SwitchOff, Linear, Cosine, Piecewise, or lambda step: 0.1 * 0.99**step"
    shown = repr(value) if isinstance(value, (Real, str, type)) else f"a {type(value).__name__}"
    return f"a schedule is a mirrorflow Schedule or a function step -> float, got {shown}: {hint}"


def check_free(optimizer: Optimizer, kind: type) -> None:
    """Raise if an object of this kind has its hooks in the optimizer already."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if isinstance(getattr(inspect.unwrap(hook), "__self__", None), kind):
            raise ValueError(
                f"this {type(optimizer).__name__} has a {kind.__name__} already: close() it first, "
                "or give one scheduler several schedules with groups="
            )


def check_decay(
    optimizer: Optimizer, targets: Sequence[Target], decoupled: bool, relative: bool = False
) -> None:
    """Raise if there is nothing to schedule, and say how to change that."""
    groups = optimizer.param_groups
    if not decoupled and not all("weight_decay" in group for group in groups):
        raise ValueError(
            f"{type(optimizer).__name__} has no weight_decay in its parameter groups: "
            "decoupled=True decays its weights from outside"
        )
    if relative and not any("weight_decay" in group for group in groups):
        raise ValueError(
            f"relative=True multiplies the decay of each group, and {type(optimizer).__name__} has "
            "no weight_decay: with relative=False the schedule gives the decay itself"
        )
    if not any(t.schedule is not None and t.params(groups[t.group]) for t in targets):
        raise ValueError(
            "nothing to schedule: every parameter group has weight_decay 0, the default of "
            "TrainingArguments and of most optimizers, and such groups stay without decay. Make "
            "the optimizer with weight_decay > 0 (TrainingArguments(weight_decay=0.1); for LoRA+ "
            "loraplus_weight_decay=0.1), or name what shall decay: groups=[(0, schedule)]"
        )


def check_exact_off(optimizer: Optimizer, targets: Sequence[Target], kinds: Sequence[str]) -> None:
    """Raise where the decay cannot be taken out of what the optimizer remembers."""
    for target, kind in zip(targets, kinds, strict=True):
        if target.schedule is not None and kind == "averaged":
            raise ValueError(
                "exact_off takes L2 out of the momentum of torch.optim.SGD, and "
                f"{type(optimizer).__name__} moves the weights to copies or averages that it keeps "
                "of them, which have absorbed the decay, too: leave exact_off out"
            )
        if target.schedule is not None and kind in ("coupled", "unknown"):
            raise ValueError(
                f"exact_off takes L2 out of the momentum of torch.optim.SGD, which is linear in "
                f"it. That of {type(optimizer).__name__} is not known to be (Adam's moments are "
                "not), and what it holds of the decay cannot be told from the gradients then. "
                "decoupled=True keeps the decay out of them from the start"
            )


def check_not_captured() -> None:
    """Raise while a CUDA graph records, which would keep the decay of this moment."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer.step() is being captured in a CUDA graph: a replay would repeat the decay "
            "of this moment for ever. Capture forward and backward, and step outside of the graph"
        )


def warn_if_coupled(
    optimizer: Optimizer, targets: Sequence[Target], kinds: Sequence[str], exact_off: bool
) -> None:
    """Warn of a decay that a schedule cannot switch off, or that no ledger can count."""
    name = type(optimizer).__name__
    found = set()
    for target, kind in zip(targets, kinds, strict=True):
        if target.schedule is None or kind not in _ADVICE:
            continue
        if kind == "sgd" and exact_off:
            continue
        momentum = optimizer.param_groups[target.group].get("momentum", 0)
        if kind != "sgd" or (momentum != 0 and not isinstance(target.schedule, Constant)):
            found.add(kind)
    for kind in sorted(found):
        warnings.warn(_ADVICE[kind].format(name=name), CoupledDecayWarning, stacklevel=4)


_ADVICE = {
    "sgd": (
        "{name} with momentum takes weight decay into the gradient: its buffer goes on decaying "
        "after the schedule has reached 0 (`pending` says how much). exact_off=True takes it out "
        "of the buffer then; decoupled=True decays from outside and never puts it there"
    ),
    "coupled": (
        "{name} takes weight decay into the gradient, which it rescales and may remember: a decay "
        "of 0 need not be off, and no sum of lr x decay describes it, so `accumulated` is NaN. "
        "decoupled=True decays from outside and ends exactly"
    ),
    "unknown": (
        "how {name} decays could not be found out, so `accumulated` is NaN: say it with "
        'coupling="decoupled", "fixed", "scaled", "averaged" or "coupled", or use decoupled=True'
    ),
}
