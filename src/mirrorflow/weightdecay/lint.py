"""Mistakes in the weight decay of a training run, found in its optimizer and model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..schedule import Constant
from ._checks import inner
from ._group_state import INITIAL
from ._rounding import STRAYED, RoundedSet, half, rounds_together, too_weak
from ._targets import Target, cleaned, names_of
from .conventions import lr_of, strength
from .coupling import COUNTED, coupling
from .policy import NoDecayPolicy, no_decay_policy
from .scheduler import WeightDecayScheduler

__all__ = ["Finding", "decay_of", "lint", "of_groups"]

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or that deserves a look.

    Attributes
    ----------
    code : str
        Its name: zero-decay, overwritten, coupled, averaged, masked, unknown-coupling,
        numpy-scalar, frozen-in-graph, unscheduled, double-stepping, decayed-vectors,
        decayed-marked, decayed-embedding, flat-parameter, rounded, against-policy.
    group : int or None
        The parameter group, or None for all of them.
    message, remedy : str
        What it is, and what to do.
    level : {"warning", "note"}
        A note is not a mistake by itself: it names a risk, or what lint cannot know.
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
        """Return it in one line."""
        places = [self.source] if self.source else []
        places += [] if self.group is None else [f"group {self.group}"]
        where = f" ({', '.join(places)})" if places else ""
        name = self.code if self.level == "warning" else f"{self.level}: {self.code}"
        return f"{name}{where}: {self.message}. {self.remedy}."


def lint(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module | None = None,
    scheduler: WeightDecayScheduler | None = None,
    *,
    policy: NoDecayPolicy | str | None = None,
) -> list[Finding]:
    """Return the mistakes in how an optimizer decays weights.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The optimizer, as it will train or has trained, or accelerate's or Lightning's wrapper of
        it; it is not touched.
    model : torch.nn.Module, optional
        Names the parameters.
    scheduler : WeightDecayScheduler, optional
        What schedules the decay, if something does.
    policy : NoDecayPolicy or str, optional
        What shall not decay, or the name of a preset: what differs is listed. It needs ``model``.

    Returns
    -------
    list of Finding
        Empty if nothing was found.

    Raises
    ------
    TypeError
        If it is not an optimizer, or not a `WeightDecayScheduler`.
    ValueError
        If the scheduler belongs to another optimizer, a weight_decay is not a number, or a policy
        is given without a model.

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
    couplings = {i: coupling(optimizer, g) for i, g in enumerate(groups) if decay_of(g, i) > 0}
    if scheduler is not None and scheduler.exact_off:  # it ends as if it had not been coupled
        couplings = {i: how for i, how in couplings.items() if how != "sgd"}
    found = list(of_groups(groups, couplings, outside=bool(scheduler and scheduler.decoupled)))
    overwritten = {finding.group for finding in found if finding.code == "overwritten"}
    return [
        *found,
        *_vectors(groups, names, leave_out=overwritten),
        *_marked(groups, names, model),
        *_embeddings(groups, names, model),
        *_flat(groups, names),
        *_rounded(optimizer, couplings, scheduler),
        *_against(policy, groups, model, scheduler),
        *_scheduled(groups, scheduler),
        *_double_stepping(optimizer, scheduler),
    ]  # fmt: skip


def decay_of(group: Mapping[str, Any], index: int) -> float:
    """Return the decay of a group; a group without one has 0.

    Raises
    ------
    ValueError
        If it is not a finite number >= 0.
    """
    value = group.get("weight_decay", 0.0)
    try:
        decay = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch's of several elements
        decay = math.nan
    if not (math.isfinite(decay) and decay >= 0):
        raise ValueError(f"group {index}: weight_decay must be a finite number >= 0, got {value!r}")
    return decay


def _check_scheduler(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Raise unless the scheduler is a WeightDecayScheduler of this optimizer."""
    if scheduler is None:
        return
    if not isinstance(scheduler, WeightDecayScheduler):
        raise TypeError(
            "lint: scheduler must be the WeightDecayScheduler of this optimizer, got "
            f"{type(scheduler).__name__}"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            "lint: the scheduler must belong to this optimizer, got one of another "
            f"{type(scheduler.optimizer).__name__}. Use the optimizer that it was made with (after "
            "a copy, the copy's own)"
        )


def of_groups(groups: Groups, couplings: Mapping[int, str], outside: bool) -> Iterable[Finding]:
    """Look at the numbers of the groups, of an optimizer or as they were saved.

    Parameters
    ----------
    groups : sequence of mapping
        The parameter groups.
    couplings : mapping of int to str
        How the decay of a group acts, one of ``coupling.COUPLINGS``, for those that decay.
    outside : bool
        Whether the decay is applied from outside, so that a 0 in the groups means nothing.
    """
    decays = [decay_of(group, i) for i, group in enumerate(groups)]
    # What a group was made with, kept beside its decay as torch keeps initial_lr.
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
        if i in couplings and not outside:
            yield from _of_coupling(i, group, couplings[i])
        if isinstance(value := group.get("weight_decay"), np.generic):
            yield Finding(
                "numpy-scalar", i, f"weight_decay is a NumPy {type(value).__name__}",
                "Write float(value): torch.load refuses it with weights_only=True, and "
                "torch.compile recompiles",
            )  # fmt: skip


def _of_coupling(i: int, group: Mapping[str, Any], how: str) -> Iterable[Finding]:
    """Look at how the decay of a group acts."""
    if how == "coupled" or (how == "sgd" and (group.get("momentum") or 0) != 0):
        yield Finding(
            "coupled", i, "the decay is added to the gradient and lives on in the moments",
            "Use AdamW, or WeightDecayScheduler(..., decoupled=True), or exact_off=True for SGD",
        )  # fmt: skip
    elif how == "averaged":
        yield Finding(
            "averaged", i, "the weights follow copies or averages that the optimizer keeps of them",
            "Schedule its own decay, as decoupled=True would be undone; decay that has come in "
            "still reaches the weights after it is 0",
            level="note",
        )  # fmt: skip
    elif how == "masked":
        yield Finding(
            "masked", i, "a weight decays only where its gradient allows it",
            "No sum of lr x decay describes that: use decoupled=True to count what acts",
            level="note",
        )  # fmt: skip
    elif how == "unknown":
        yield Finding(
            "unknown-coupling", i, "the coupling of this decay is unknown",
            "If it is added to the gradient (L2), it is not off when its number is 0: look it up, "
            "or try the optimizer itself with mirrorflow.lint(optimizer)",
            level="note",
        )  # fmt: skip


def _vectors(
    groups: Groups, names: Mapping[int, str], leave_out: set[int | None]
) -> Iterable[Finding]:
    """Look for biases and scales of norms that decay, in a model that also has matrices."""
    if all(_is_vector(p) for group in groups for p in group["params"]):
        return  # vectors are all there is, and what is meant
    for i, group in enumerate(groups):
        vectors = [p for p in group["params"] if _is_vector(p) and not _is_flat(p, names)]
        if not vectors or decay_of(group, i) == 0 or i in leave_out:
            continue
        alone = len(vectors) == len(group["params"])
        what = "it holds nothing but biases or scales" if alone else "biases or scales among others"
        yield Finding(
            "decayed-vectors", i,
            f"{what}, {len(vectors)} of them{_shown(vectors, names)}, and decays by "
            f"{decay_of(group, i):g}",
            "Was its decay of 0 overwritten? Such a group has weight_decay=0, unless decay is meant"
            if alone else "Put them into a group with weight_decay=0, unless decay is meant",
        )  # fmt: skip


def _is_vector(p: torch.Tensor) -> bool:
    """Return whether a tensor is a bias or a scale: one number for each channel, as (C, 1, 1)."""
    # (C, 1, 1) scales channels; (1, C) and (C, 1) may be matrices of a linear layer.
    return p.ndim < 2 or (p.numel() == max(p.shape) and p.shape[-1] == 1 and p.ndim > 2)


def _is_flat(p: torch.Tensor, names: Mapping[int, str]) -> bool:
    """Return whether a tensor is FSDP1's flat parameter, of many that it has joined."""
    return getattr(p, "_is_flat_param", False) or names.get(id(p), "").endswith("_flat_param")


def _marked(
    groups: Groups, names: Mapping[int, str], model: torch.nn.Module | None
) -> Iterable[Finding]:
    """Look for tensors that decay though their model asks for none, as timm and Mamba do."""
    asked: Any = getattr(model, "no_weight_decay", None)
    named: Any = asked() if callable(asked) else ()
    listed = {cleaned(str(name)) for name in named}
    for i, group in enumerate(groups):
        if decay_of(group, i) == 0:
            continue
        found = [
            p
            for p in group["params"]
            if getattr(p, "_no_weight_decay", False) or cleaned(names.get(id(p), "")) in listed
        ]
        if found:
            yield Finding(
                "decayed-marked", i,
                f"the model asks for no decay of {len(found)} tensors{_shown(found, names)} "
                f"(_no_weight_decay or no_weight_decay()), and they decay by "
                f"{decay_of(group, i):g}",
                "Put them into a group with weight_decay=0",
            )  # fmt: skip


def _embeddings(
    groups: Groups, names: Mapping[int, str], model: torch.nn.Module | None
) -> Iterable[Finding]:
    """Look for embeddings that decay: each row by every step, also where no token has used it."""
    modules = [] if model is None else [m for m in model.modules() if isinstance(m, _EMBEDDINGS)]
    tables = {id(module.weight) for module in modules}
    for i, group in enumerate(groups):
        found = [p for p in group["params"] if id(p) in tables]
        if found and decay_of(group, i) > 0:
            yield Finding(
                "decayed-embedding", i,
                f"{len(found)} embeddings{_shown(found, names)} decay by {decay_of(group, i):g}, "
                "also the rows of tokens that a batch does not have",
                "Put them into a group with weight_decay=0, unless decay is meant",
                level="note",
            )  # fmt: skip


_EMBEDDINGS = (torch.nn.Embedding, torch.nn.EmbeddingBag)


def _flat(groups: Groups, names: Mapping[int, str]) -> Iterable[Finding]:
    """Look for flat parameters, which join biases and scales with matrices."""
    for i, group in enumerate(groups):
        found = [p for p in group["params"] if _is_flat(p, names)]
        if found and decay_of(group, i) > 0:
            yield Finding(
                "flat-parameter", i,
                f"{len(found)} flat parameters of FSDP{_shown(found, names)} decay by "
                f"{decay_of(group, i):g} as a whole, biases and scales of norms in them as well",
                "Wrap with use_orig_params=True, and make a group without decay",
                level="note",
            )  # fmt: skip


def _shown(params: Sequence[torch.Tensor], names: Mapping[int, str]) -> str:
    """Return the first names of tensors, in brackets, as far as they have any."""
    named = [names[id(p)] for p in params if id(p) in names]
    return f" ({', '.join(named[:3])}{', ...' if len(named) > 3 else ''})" if named else ""


def _against(
    policy: NoDecayPolicy | str | None,
    groups: Groups,
    model: torch.nn.Module | None,
    scheduler: WeightDecayScheduler | None,
) -> Iterable[Finding]:
    """Look for what decays and shall not, and for the reverse."""
    if policy is None:
        return
    if model is None:
        raise ValueError("lint: policy= must come with model=, got no model. Give the model")
    policy = no_decay_policy(policy) if isinstance(policy, str) else policy
    exempt, names = policy.exempt(model), names_of(model)
    for i, group in enumerate(groups):
        decaying = _decaying(i, group, scheduler)
        named = [(p, cleaned(names.get(id(p), ""))) for p in group["params"]]
        wrong = [p for p, name in named if name in exempt and id(p) in decaying]
        if wrong:
            yield Finding(
                "against-policy", i,
                f"{len(wrong)} tensors decay that the policy exempts{_shown(wrong, names)}",
                "Make the groups with policy.groups(model, weight_decay), or the scheduler with "
                "groups=policy.rules(model), decoupled=True",
            )  # fmt: skip
        missed = [p for p, name in named if name and name not in exempt and id(p) not in decaying]
        if missed:
            yield Finding(
                "against-policy", i,
                f"{len(missed)} tensors do not decay, and the policy has them decay"
                f"{_shown(missed, names)}",
                "Make the groups with policy.groups(model, weight_decay), unless that is meant",
                level="note",
            )  # fmt: skip


def _decaying(
    index: int, group: Mapping[str, Any], scheduler: WeightDecayScheduler | None
) -> set[int]:
    """Return the ids of the tensors of a group that decay, now or when their schedule says so."""
    if scheduler is None:
        return {id(p) for p in group["params"]} if decay_of(group, index) > 0 else set()
    return {
        id(p)
        for target in scheduler.targets
        if target.group == index and _acts(target, group, scheduler)
        for p in target.params(group)
    }


def _acts(target: Target, group: Mapping[str, Any], scheduler: WeightDecayScheduler) -> bool:
    """Return whether a set of tensors decays at some time, as far as its schedule is known."""
    if target.schedule is None:
        own = group.get(INITIAL, 0.0) if scheduler.decoupled else group.get("weight_decay", 0.0)
        return float(own) > 0
    return target.schedule != Constant(0.0)


def _rounded(
    optimizer: torch.optim.Optimizer,
    couplings: Mapping[int, str],
    scheduler: WeightDecayScheduler | None,
) -> Iterable[Finding]:
    """Look for decay that the precision of the weights swallows, or changes."""
    groups = optimizer.param_groups
    for i, part in _acting_parts(optimizer, couplings, scheduler):
        dtypes = {p.dtype for p in groups[i]["params"] if half([p])}
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        if math.isnan(part):
            weak = _weakest(groups[i])
            yield Finding(
                "rounded", i,
                f"weights in {names}, and lr x decay below {weak:.2g}: the gradients decide how "
                "much of it acts",
                "Read acting_parts of its WeightDecayScheduler after some steps",
                level="note",
            )  # fmt: skip
        elif not 1 / STRAYED <= part <= STRAYED:
            yield Finding(
                "rounded", i,
                f"weights in {names}: rounding lets {part:.3g} times the decay act",
                "Keep the weights that the optimizer steps in float32, or use "
                'WeightDecayScheduler(..., decoupled=True, rounding="stochastic"), or a larger '
                "lr x decay",
            )  # fmt: skip


def _acting_parts(
    optimizer: torch.optim.Optimizer,
    couplings: Mapping[int, str],
    scheduler: WeightDecayScheduler | None,
) -> Iterable[tuple[int, float]]:
    """Return the part of the decay that acts on groups in half precision; NaN where it depends."""
    if scheduler is not None and scheduler.steps:
        groups = optimizer.param_groups
        for target, part in zip(scheduler.targets, scheduler.acting_parts, strict=True):
            rounded = scheduler.plan.mask is None and half(target.params(groups[target.group]))
            if rounded and not math.isnan(part):
                yield target.group, part
        return
    for i, how in couplings.items():
        group = optimizer.param_groups[i]
        if how not in COUNTED or not half(group["params"]):
            continue
        decay, lr = decay_of(group, i), lr_of(group)
        if how != "sgd" and not rounds_together(optimizer, group):
            tried = RoundedSet(how, False, optimizer, i)
            yield i, tried.passed(group["params"], decay, lr, step=0).reached
        # Rounded with the gradient or the update: what acts hangs on the gradients of the run.
        elif strength(decay, group, how) < _weakest(group):
            yield i, math.nan


def _weakest(group: Mapping[str, Any]) -> float:
    """Return the lr x decay below which rounding may swallow the decay of a group."""
    return max(too_weak(p.dtype) for p in group["params"] if half([p]))


def _scheduled(groups: Groups, scheduler: WeightDecayScheduler | None) -> Iterable[Finding]:
    """Look for groups that decay without a schedule, and for schedules that a graph could hold."""
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
