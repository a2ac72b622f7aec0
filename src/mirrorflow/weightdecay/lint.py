"""What is wrong with the weight decay of a training run, before it is run or after it was saved."""

from __future__ import annotations

import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import (
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
    safe_globals,
)

from ..schedule import Constant
from ._checks import inner
from ._targets import names_of
from .coupling import coupling
from .scheduler import WeightDecayScheduler

__all__ = ["Finding", "decay_of", "lint", "lint_file", "of_groups"]

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


# `lint_file`: what the saved groups of an optimizer show, read without running what they hold.

# How torch, zip and pickle fail on bytes that are no checkpoint.
_DAMAGED = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    OSError,  # a seek to before the beginning
)
_FILES = ("optimizer*.pt", "optimizer*.bin")  # of the Trainer, and of accelerate
_NUMBERS = "?bhilqBHILQefdgFD"  # the codes of NumPy's types of numbers
_DEPTH = 4  # of the dicts and lists around an optimizer
_BLOCKED = re.compile(r"(?:Unsupported global: GLOBAL |but got <class ')([\w.]+)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

# The keys of a group by which an optimizer of torch is known, and those that others have: what has
# the first and none of the others decays like this.
_KINDS: tuple[tuple[set[str], set[str], str], ...] = (
    ({"dampening", "nesterov", "momentum"}, set(), "sgd"),
    ({"ns_coefficients", "ns_steps"}, set(), "decoupled"),  # Muon
    ({"beta2_decay", "d", "eps"}, set(), "decoupled"),  # Adafactor
    ({"clip_threshold", "scale_parameter", "relative_step"}, set(), "decoupled"),  # transformers'
    ({"alpha", "centered", "momentum"}, set(), "coupled"),  # RMSprop
    ({"lr_decay", "initial_accumulator_value"}, set(), "coupled"),  # Adagrad
    ({"rho", "eps", "maximize"}, {"betas", "adaptive"}, "coupled"),  # Adadelta
    ({"lambd", "alpha", "t0"}, set(), "coupled"),  # ASGD
    ({"betas", "eps", "foreach", "maximize"}, {"amsgrad", "momentum_decay"}, "coupled"),  # Adamax
    ({"train_mode", "weight_sum", "lr_max"}, set(), "averaged"),  # the schedule-free ones
)


def lint_file(path: str | Path) -> list[Finding]:
    """Look for mistakes in saved optimizers, in whatever dicts and lists they lie.

    Parameters
    ----------
    path : path
        A file of ``torch.save``: ``optimizer.pt``, a checkpoint of Lightning or of your own; or a
        folder with such a file, as the Trainer and accelerate write it. It is read with
        ``weights_only=True``, so that nothing in it is run.

    Returns
    -------
    list of Finding
        What the saved groups show. How a decay acts is known where the keys of a group tell whose
        it is; where they do not, a note says so.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or none in the folder.
    ValueError
        If a file is damaged, holds no state of an optimizer, or objects of other classes.
    """
    files = _files(Path(path))
    found = []
    for file in files:
        optimizers = dict(_optimizers(_read(file)))
        if not optimizers:
            raise ValueError(f"{file} holds no state of an optimizer: it has no param_groups")
        for place, groups in optimizers.items():
            names = [file.name] if len(files) > 1 else []
            names += [place] if len(optimizers) > 1 else []
            found += [replace(f, source=" ".join(names)) for f in _of_saved(file, place, groups)]
    return found


def _files(path: Path) -> list[Path]:
    """Find the files of a folder that hold an optimizer."""
    if not path.is_dir():
        return [path]
    files = sorted({file for pattern in _FILES for file in path.glob(pattern) if file.is_file()})
    if not files:
        raise FileNotFoundError(
            f"{path} is a folder without {' or '.join(_FILES)}: name the file that holds the "
            "optimizer, or a checkpoint folder of the Trainer"
        )
    return files


def _read(file: Path) -> Any:
    """Load a file without running anything in it; its tensors stay on the disk where they can."""
    with file.open("rb"):  # or an error that names it
        zipped = zipfile.is_zipfile(file)
    try:
        with _numbers_of_numpy(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Detected pickle protocol"
            )  # of what is no file of it
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except _DAMAGED as error:
        if foreign := _foreign(file, error, zipped):
            raise ValueError(
                f"{file} cannot be read with weights_only=True, because it holds "
                f"{', '.join(foreign)}: save plain numbers and optimizer.state_dict() only, or the "
                "optimizer in a file of its own"
            ) from error
        # Torch's own text goes on for lines, to advise weights_only=False.
        reason = _COLOUR.sub("", str(error)).partition("WeightsUnpickler error:")
        line = (reason[2] or reason[0]).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is damaged, or no file of torch.save: {line}") from error


def _numbers_of_numpy() -> AbstractContextManager[Any]:
    """Allow NumPy's scalars and arrays: dtypes and bytes, which are a finding and no danger."""
    scalar: Any
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    modules = ("numpy._core.multiarray", "numpy.core.multiarray")  # of NumPy 2 and 1
    made = [(scalar, f"{m}.scalar") for m in modules]
    made += [(array, f"{m}._reconstruct") for m in modules]
    dtypes = {type(np.dtype(code)) for code in _NUMBERS}
    # torch takes back at the end what it is given here, also what the user had allowed before.
    known = set(get_safe_globals())
    return safe_globals([o for o in (*made, np.dtype, np.ndarray, *dtypes) if o not in known])


def _foreign(file: Path, error: Exception, zipped: bool) -> list[str]:
    """Name the classes in a file that are not loaded with weights_only=True."""
    names = set(_BLOCKED.findall(str(error)))
    if zipped and isinstance(error, pickle.UnpicklingError):
        with _numbers_of_numpy():
            names |= set(get_unsafe_globals_in_checkpoint(file))
    plain = ("builtins.dict", "collections.defaultdict")  # what other objects are made with
    return sorted(names.difference(plain) or names)


def _optimizers(loaded: Any, place: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Find what has param_groups, with the place where it lies."""
    if isinstance(loaded, Mapping) and "param_groups" in loaded:
        yield place, loaded["param_groups"]
    elif isinstance(loaded, Mapping) and depth:
        for key, value in loaded.items():
            yield from _optimizers(value, f"{place}.{key}".lstrip("."), depth - 1)
    elif isinstance(loaded, (list, tuple)) and depth:
        for index, value in enumerate(loaded):
            yield from _optimizers(value, f"{place}[{index}]", depth - 1)


def _of_saved(file: Path, place: str, groups: Any) -> Iterable[Finding]:
    """Look at the groups of a saved optimizer."""
    where = f"{file}: {place}.param_groups" if place else f"{file}: param_groups"
    if not isinstance(groups, Sequence) or not all(isinstance(g, Mapping) for g in groups):
        raise ValueError(f"{where} is no list of parameter groups: {str(groups)[:60]}")
    try:
        kinds = {i: _kind(g) for i, g in enumerate(groups) if decay_of(g, i) > 0}
        return list(of_groups(groups, kinds, outside=False))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _kind(group: Mapping[str, Any]) -> str:
    """Tell from the keys of a saved group how its decay acts."""
    if "decoupled_weight_decay" in group and "betas" in group:
        return "decoupled" if group["decoupled_weight_decay"] else "coupled"
    keys = set(group)
    for present, absent, kind in _KINDS:
        if present <= keys and not absent & keys:
            return kind
    return "unknown"
