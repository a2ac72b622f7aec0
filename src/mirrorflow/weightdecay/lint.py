"""What is wrong with the weight decay of a training run, before it is run or after it was saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..schedule import Constant
from .checks import inner
from .choosing import names_of
from .coupling import coupling
from .scheduler import WeightDecayScheduler

__all__ = ["Finding", "decay_of", "lint", "of_groups"]

INITIAL = "initial_weight_decay"  # where a scheduler keeps the decay that a group was made with
Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or that deserves a look.

    Attributes
    ----------
    code : str
        Its name: zero-decay, overwritten, coupled, averaged, unknown-coupling,
        numpy-scalar, frozen-in-graph, unscheduled, double-stepping, decayed-vectors.
    group : int or None
        The parameter group, or None for all of them.
    message, remedy : str
        What it is, and what to do.
    level : {"warning", "note"}
        A note is no mistake by itself: it says what is at stake, or what could not be found out.
    source : str
        The place in a file of several optimizers.
    """

    code: str
    group: int | None
    message: str
    remedy: str
    level: str = "warning"
    source: str = ""

    def __str__(self) -> str:
        """Write it in one line."""
        places = [self.source] if self.source else []
        places += [] if self.group is None else [f"group {self.group}"]
        where = f" ({', '.join(places)})" if places else ""
        name = self.code if self.level == "warning" else f"{self.level}: {self.code}"
        return f"{name}{where}: {self.message}. {self.remedy}."


def lint(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module | None = None,
    scheduler: WeightDecayScheduler | None = None,
) -> list[Finding]:
    """Look for mistakes in how an optimizer decays weights.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The optimizer, as it will train or has trained, or accelerate's or Lightning's wrapper of
        it; it is not touched.
    model : torch.nn.Module, optional
        Names the parameters.
    scheduler : WeightDecayScheduler, optional
        What schedules the decay, if something does.

    Returns
    -------
    list of Finding
        Empty if nothing was found.

    Raises
    ------
    TypeError
        If it is no optimizer, or no `WeightDecayScheduler`.
    ValueError
        If the scheduler is that of another optimizer, or a weight_decay is no number.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.ones(2, 2))
    >>> for finding in lint(torch.optim.Adam([w], weight_decay=0.1)):
    ...     print(finding.code)
    coupled
    """
    optimizer = inner(optimizer)
    _check_scheduler(optimizer, scheduler)
    groups, names = optimizer.param_groups, names_of(model)
    kinds = {i: coupling(optimizer, g) for i, g in enumerate(groups) if decay_of(g, i) > 0}
    if scheduler is not None and scheduler.exact_off:  # it ends as if it had not been coupled
        kinds = {i: kind for i, kind in kinds.items() if kind != "sgd"}
    found = list(of_groups(groups, kinds, outside=bool(scheduler and scheduler.decoupled)))
    overwritten = {finding.group for finding in found if finding.code == "overwritten"}
    return [
        *found,
        *_vectors(groups, names, leave_out=overwritten),
        *_scheduled(groups, scheduler),
        *_double_stepping(optimizer, scheduler),
    ]  # fmt: skip


def decay_of(group: Mapping[str, Any], index: int) -> float:
    """Give the decay of a group; a group without one has 0.

    Raises
    ------
    ValueError
        If it is no number that is finite and >= 0.
    """
    value = group.get("weight_decay", 0.0)
    try:
        decay = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):  # torch's of a tensor with several elements
        decay = math.nan
    if not (math.isfinite(decay) and decay >= 0):
        raise ValueError(f"group {index}: weight_decay must be a finite number >= 0, got {value!r}")
    return decay


def _check_scheduler(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Raise unless the scheduler is one, and that of the optimizer."""
    if scheduler is None:
        return
    if not isinstance(scheduler, WeightDecayScheduler):
        raise TypeError(
            "lint: scheduler must be the WeightDecayScheduler of this optimizer, got "
            f"{type(scheduler).__name__}"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            f"lint: the scheduler is that of another {type(scheduler.optimizer).__name__}; give "
            "the optimizer that it was made with (after a copy, the copy's own)"
        )


def of_groups(groups: Groups, kinds: Mapping[int, str], outside: bool) -> Iterable[Finding]:
    """Look at the numbers of the groups, of an optimizer or as they were saved.

    Parameters
    ----------
    groups : sequence of mapping
        The parameter groups.
    kinds : mapping of int to str
        How the decay of a group acts, one of ``coupling.KINDS``, for those that decay.
    outside : bool
        Whether the decay is applied from outside, so that a 0 in the groups means nothing.
    """
    decays = [decay_of(group, i) for i, group in enumerate(groups)]
    started = [float(g.get(INITIAL, decay)) for g, decay in zip(groups, decays, strict=True)]
    if not outside and not any(decays) and not any(started):
        yield Finding(
            "zero-decay", None, "no group decays, and a schedule leaves such groups alone",
            "Make the optimizer with weight_decay > 0 (TrainingArguments(weight_decay=0.1))",
        )  # fmt: skip
    for i, group in enumerate(groups):
        if started[i] == 0 and decays[i] > 0:
            yield Finding(
                "overwritten", i, f"a group made without decay has {decays[i]:g} now",
                "Schedule only groups whose own decay is not 0, as WeightDecayScheduler does",
            )  # fmt: skip
        if i in kinds and not outside:
            yield from _of_kind(i, group, kinds[i])
        if isinstance(value := group.get("weight_decay"), np.generic):
            yield Finding(
                "numpy-scalar", i, f"weight_decay is a NumPy {type(value).__name__}",
                "Write float(value): torch.load refuses it with weights_only=True, and "
                "torch.compile recompiles",
            )  # fmt: skip


def _of_kind(i: int, group: Mapping[str, Any], kind: str) -> Iterable[Finding]:
    """Look at how the decay of a group acts."""
    if kind == "coupled" or (kind == "sgd" and (group.get("momentum") or 0) != 0):
        yield Finding(
            "coupled", i, "the decay is added to the gradient and lives on in the moments",
            "Use AdamW, or WeightDecayScheduler(..., decoupled=True), or exact_off=True for SGD",
        )  # fmt: skip
    elif kind == "averaged":
        yield Finding(
            "averaged", i, "the weights follow copies or averages that the optimizer keeps of them",
            "Schedule its own decay, as decoupled=True would be undone; what has come in reaches "
            "the weights after it is 0, too",
            level="note",
        )  # fmt: skip
    elif kind == "unknown":
        yield Finding(
            "unknown-coupling", i, "how this decay acts could not be found out",
            "If it is added to the gradient (L2), it is not off when its number is 0: look it up, "
            "or try the optimizer itself with mirrorflow.lint(optimizer)",
            level="note",
        )  # fmt: skip


def _vectors(
    groups: Groups, names: Mapping[int, str], leave_out: set[int | None]
) -> Iterable[Finding]:
    """Look for biases and scales of norms that decay, in a model that has matrices too."""
    if not any(p.ndim > 1 for group in groups for p in group["params"]):
        return  # vectors are all there is, and what is meant
    for i, group in enumerate(groups):
        vectors = [p for p in group["params"] if p.ndim < 2]
        if not vectors or decay_of(group, i) == 0 or i in leave_out:
            continue
        alone = len(vectors) == len(group["params"])
        named = [names[id(p)] for p in vectors if id(p) in names]
        shown = f" ({', '.join(named[:3])}{', ...' if len(named) > 3 else ''})" if named else ""
        what = "it holds nothing but biases or scales" if alone else "biases or scales among others"
        yield Finding(
            "decayed-vectors", i,
            f"{what}, {len(vectors)} of them{shown}, and decays by {decay_of(group, i):g}",
            "Was its decay of 0 overwritten? Such a group has weight_decay=0, unless decay is meant"
            if alone else "Put them into a group with weight_decay=0, unless decay is meant",
        )  # fmt: skip


def _scheduled(groups: Groups, scheduler: WeightDecayScheduler | None) -> Iterable[Finding]:
    """Look for groups that decay beside the schedule, and for schedules that a graph could hold."""
    if scheduler is None:
        return
    schedules: dict[int, list[Any]] = {}
    for target in scheduler.targets:
        if target.schedule is not None:
            schedules.setdefault(target.group, []).append(target.schedule)
    for i, group in enumerate(groups):
        if i not in schedules and (decay := decay_of(group, i)) > 0:
            yield Finding(
                "unscheduled", i, f"nothing schedules its decay of {decay:g}",
                "Give it a rule in groups=, or a decay of 0",
            )  # fmt: skip
        changes = any(not isinstance(schedule, Constant) for schedule in schedules.get(i, ()))
        if group.get("capturable") and changes:
            yield Finding(
                "frozen-in-graph", i,
                "capturable=True, and its decay changes: a CUDA graph of optimizer.step() would "
                "repeat the decay of its recording for ever, so that the scheduler refuses it",
                "Capture forward and backward, and step outside of the graph",
                level="note",
            )  # fmt: skip


def _double_stepping(
    optimizer: torch.optim.Optimizer, scheduler: WeightDecayScheduler | None
) -> Iterable[Finding]:
    """Look for a count that is not the optimizer's own."""
    counts = [int(s["step"]) for s in optimizer.state.values() if "step" in s]
    if scheduler is not None and counts and scheduler.steps != max(counts):
        yield Finding(
            "double-stepping", None,
            f"the schedule is at step {scheduler.steps}, the optimizer at {max(counts)}",
            "Make the scheduler before training, or load its state beside the optimizer's",
        )  # fmt: skip
