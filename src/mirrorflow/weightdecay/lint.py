"""What is wrong with the weight decay of a training run, before it is run or after it was saved."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .coupling import coupling
from .scheduler import WeightDecayScheduler

__all__ = ["Finding", "lint", "lint_file"]

INITIAL = "initial_weight_decay"
# How torch, zip and pickle fail on bytes that are no checkpoint.
_DAMAGED = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
)
Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or that deserves a look.

    Attributes
    ----------
    code : str
        Its name: zero-decay, overwritten, coupled, numpy-scalar, frozen-in-graph, unscheduled,
        double-stepping, decayed-vectors.
    group : int or None
        The parameter group, or None for all of them.
    message, remedy : str
        What it is, and what to do.
    """

    code: str
    group: int | None
    message: str
    remedy: str

    def __str__(self) -> str:
        """Write it in one line."""
        where = "" if self.group is None else f" (group {self.group})"
        return f"{self.code}{where}: {self.message}. {self.remedy}."


def lint(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module | None = None,
    scheduler: WeightDecayScheduler | None = None,
) -> list[Finding]:
    """Look for mistakes in how an optimizer decays weights.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The optimizer, as it will train or has trained; it is not touched.
    model : torch.nn.Module, optional
        Names the parameters.
    scheduler : WeightDecayScheduler, optional
        What schedules the decay, if something does.

    Returns
    -------
    list of Finding
        Empty if nothing was found.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.ones(2, 2))
    >>> for finding in lint(torch.optim.Adam([w], weight_decay=0.1)):
    ...     print(finding.code)
    coupled
    """
    groups = optimizer.param_groups
    kinds = {i: coupling(optimizer, g) for i, g in enumerate(groups) if _decay(g) > 0}
    if scheduler is not None and scheduler.exact_off:  # it ends as if it had not been coupled
        kinds = {i: kind for i, kind in kinds.items() if kind != "sgd"}
    scheduled = None if scheduler is None else {t.group for t in scheduler.targets if t.schedule}
    return [
        *_of_groups(groups, kinds, outside=bool(scheduler and scheduler.decoupled)),
        *_vectors(groups, {id(p): n for n, p in model.named_parameters()} if model else {}),
        *_unscheduled(groups, scheduled),
        *_double_stepping(optimizer, scheduler),
    ]


def lint_file(path: str | Path) -> list[Finding]:
    """Look for mistakes in a saved optimizer: ``optimizer.pt``, or a checkpoint that holds one.

    Parameters
    ----------
    path : path
        A file of ``torch.save``; it is read with ``weights_only=True``.

    Returns
    -------
    list of Finding
        What the saved groups show. How a decay acts is known only where they say so.

    Raises
    ------
    ValueError
        If the file holds no state of an optimizer.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged, or no file of torch.save: {error}") from error
    groups = _groups_of(loaded)
    if groups is None:
        raise ValueError(f"{path} holds no state of an optimizer: it has no param_groups")
    kinds = {i: _saved_kind(g) for i, g in enumerate(groups) if _decay(g) > 0}
    return list(_of_groups(groups, kinds, outside=False))


def _groups_of(loaded: Any) -> Groups | None:
    """Find the parameter groups in what was loaded."""
    if not isinstance(loaded, Mapping):
        return None
    if isinstance(groups := loaded.get("param_groups"), list):
        return groups
    for key in ("optimizer", "optimizer_state_dict", "optimizer_states"):
        inner = loaded.get(key)
        inner = inner[0] if isinstance(inner, list) and inner else inner
        if (found := _groups_of(inner)) is not None:
            return found
    return None


def _saved_kind(group: Mapping[str, Any]) -> str:
    """Tell from a saved group how its decay acts, where it says so."""
    if "decoupled_weight_decay" in group and "betas" in group:
        return "decoupled" if group["decoupled_weight_decay"] else "coupled"
    if "dampening" in group and float(group.get("momentum", 0)) != 0:
        return "sgd"
    return "unknown"


def _decay(group: Mapping[str, Any]) -> float:
    """Give the decay of a group; a group without one has 0."""
    return float(group.get("weight_decay", 0.0))


def _of_groups(groups: Groups, kinds: Mapping[int, str], outside: bool) -> Iterable[Finding]:
    """Look at the numbers of the groups."""
    if not outside and not any(_decay(g) > 0 or float(g.get(INITIAL, 0)) > 0 for g in groups):
        yield Finding(
            "zero-decay", None, "no group decays, and a schedule leaves such groups alone",
            "Make the optimizer with weight_decay > 0 (TrainingArguments(weight_decay=0.1))",
        )  # fmt: skip
    for i, group in enumerate(groups):
        value = group.get("weight_decay", 0.0)
        if float(group.get(INITIAL, _decay(group))) == 0 and _decay(group) > 0:
            yield Finding(
                "overwritten", i, f"a group made without decay has {_decay(group):g} now",
                "Schedule only groups whose own decay is not 0, as WeightDecayScheduler does",
            )  # fmt: skip
        if kinds.get(i) in ("coupled", "sgd") and not outside:
            momentum = kinds[i] == "coupled" or float(group.get("momentum", 0)) != 0
            if momentum:
                yield Finding(
                    "coupled", i, "the decay is added to the gradient and lives on in the moments",
                    "Use AdamW, or WeightDecayScheduler(..., decoupled=True), or exact_off=True "
                    "for SGD",
                )  # fmt: skip
        if isinstance(value, np.generic):
            yield Finding(
                "numpy-scalar", i, f"weight_decay is a {type(value).__name__}",
                "Write float(value): weights_only loading and torch.compile refuse or recompile",
            )  # fmt: skip
        if group.get("capturable") and not isinstance(value, torch.Tensor):
            yield Finding(
                "frozen-in-graph", i, "a captured step repeats the decay of its recording for ever",
                "Step outside of the CUDA graph, or do not change the decay",
            )  # fmt: skip


def _vectors(groups: Groups, names: Mapping[int, str]) -> Iterable[Finding]:
    """Look for biases and scales of norms among weights that decay."""
    for i, group in enumerate(groups):
        vectors = [p for p in group["params"] if p.ndim < 2]
        matrices = len(group["params"]) - len(vectors)
        if _decay(group) > 0 and vectors and matrices:
            named = ", ".join(names.get(id(p), "?") for p in vectors[:3]) if names else ""
            yield Finding(
                "decayed-vectors", i,
                f"{len(vectors)} biases or scales decay with the matrices"
                + (f" ({named}{', ...' if len(vectors) > 3 else ''})" if named else ""),
                "Put them into a group with weight_decay=0, unless that is meant",
            )  # fmt: skip


def _unscheduled(groups: Groups, scheduled: set[int] | None) -> Iterable[Finding]:
    """Look for groups that decay beside the schedule."""
    for i, group in enumerate(groups):
        if scheduled is not None and i not in scheduled and _decay(group) > 0:
            yield Finding(
                "unscheduled", i, f"nothing schedules its decay of {_decay(group):g}",
                "Give it a rule in groups=, or a decay of 0",
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
