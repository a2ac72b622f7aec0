"""Parameter selectors: the tensors of an optimizer that follow a schedule."""

from __future__ import annotations

import numbers
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..schedule import Schedule
from .controllers import PerLayer
from .conventions import tensors

__all__ = [
    "WHAT",
    "Rule",
    "Target",
    "as_selector",
    "check_schedule",
    "cleaned",
    "labels",
    "names_of",
    "parameter_names",
    "rules",
    "selected",
    "settled",
    "targets",
    "warn_if_unused",
]

Rule = tuple[Any, Any]


@dataclass(frozen=True)
class Target:
    """A group, or some of the tensors in it, with the schedule of their decay.

    Parameters
    ----------
    group : int
        The index of the group.
    positions : tuple of int or None
        The places of the tensors within the group; None for all of them.
    schedule : Schedule, callable or None
        None leaves the decay that the group has.
    asked : bool
        Whether a rule chose it, so that it is scheduled even if its own decay is 0.
    """

    group: int
    positions: tuple[int, ...] | None
    schedule: Any
    asked: bool

    def params(self, group: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the tensors, from the live group."""
        return tensors(group, self.positions)

    def count(self, group: Mapping[str, Any]) -> int:
        """Return the number of tensors, in the live group."""
        return len(group["params"] if self.positions is None else self.positions)


def rules(groups: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the (what, schedule) pairs of a user, checked.

    Raises
    ------
    TypeError, ValueError
        If they are not pairs, or a pair has no selector or no schedule.
    """
    if isinstance(groups, (Mapping, str)) or not isinstance(groups, Iterable):
        raise TypeError(
            f"groups must be a list of (what, schedule) pairs, got {groups!r}"
            + (". Use list(groups.items())" if isinstance(groups, Mapping) else "")
        )
    found = []
    for pair in groups:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise TypeError(
                f"groups must be a list of (what, schedule) pairs, what being {WHAT}, got {pair!r}"
            )
        what, schedule = pair
        check_schedule(schedule, optional=True)
        found.append((as_selector(what), schedule))
    return tuple(found)


def check_schedule(schedule: Any, optional: bool = False) -> None:
    """Raise unless this is a schedule, or a function of the step."""
    known = isinstance(schedule, Schedule) or callable(schedule)
    if (known and not isinstance(schedule, type)) or (optional and schedule is None):
        return
    raise TypeError(no_schedule(schedule))


def targets(
    index: int,
    group: Mapping[str, Any],
    chosen: Sequence[Rule],
    default: Any,
    names: Mapping[int, str],
    per_tensor: bool,
) -> list[Target]:
    """Return the parts of a group, divided by the first rule that chooses each tensor.

    Parameters
    ----------
    index : int
        The place of the group in the optimizer.
    group : mapping
        The live group.
    chosen : sequence of (what, schedule)
        The rules, the first that fits counts.
    default : Schedule, callable or None
        For what no rule chooses.
    names : mapping of id to str
        Names of parameters beyond those in the group.
    per_tensor : bool
        Whether a rule may choose a part of the group.

    Raises
    ------
    ValueError
        If a rule chooses a part of the group, and decay cannot differ within it.
    """
    left = set(range(len(group["params"])))
    found = []
    for what, schedule in chosen:
        # Of what no rule before this one has chosen.
        mine = tuple(sorted(selected(what, index, group, names) & left))
        if mine or (what == index and isinstance(what, int)):
            left -= set(mine)
            found.append(Target(index, mine, schedule, asked=True))
    if left or not found:
        found.append(Target(index, tuple(sorted(left)), default, asked=False))
    if len(found) == 1:
        return [replace(found[0], positions=None)]  # all of it, and what is appended later
    if not per_tensor:
        raise ValueError(
            f"a rule of groups= chooses {len(found[0].positions or ())} of the "
            f"{len(group['params'])} tensors of parameter group {index}, which has one "
            "weight_decay: split the group when making the optimizer, or use decoupled=True, "
            "which decays tensor by tensor"
        )
    return found


def settled(target: Target, group: Mapping[str, Any], own: float, relative: bool) -> Target:
    """Return the target, without its schedule if the group has no decay and no rule asks for it.

    Raises
    ------
    ValueError
        If the group's own decay, which is 0, was to be multiplied.
    """
    if own != 0 or target.schedule is None or ("weight_decay" not in group and not relative):
        return target
    if not target.asked:
        return replace(target, schedule=None)
    if relative:
        raise ValueError(
            f"relative=True multiplies the decay of group {target.group}, which is 0: "
            "give the group a weight_decay > 0, or use relative=False"
        )
    return target


def labels(
    divided: Sequence[Target], group: Mapping[str, Any], names: Mapping[int, str]
) -> list[str]:
    """Return the names of the sets of tensors that a group is divided into.

    Returns
    -------
    list of str
        The group's name or index for all of it; for a part, in brackets, its parameter, the module
        of its parameters, or their first and how many there are; places where they have none.

    Examples
    --------
    >>> group = {"params": [torch.ones(1)] * 4,
    ...          "param_names": ["a.q", "a.k", "module.b.weight", "c.weight"]}
    >>> parts = [Target(0, (0, 1), None, True), Target(0, (2,), None, True),
    ...          Target(0, (3,), None, False)]
    >>> labels(parts, group, {})
    ['0[a]', '0[b.weight]', '0[c.weight]']
    """
    name = str(group.get("name", divided[0].group))
    if len(divided) == 1 and divided[0].positions is None:
        return [name]
    known = parameter_names(group, names)
    parts = [[known[i] for i in t.positions or ()] for t in divided]
    if any(one is None for part in parts for one in part):
        return [f"{name}[{','.join(map(str, t.positions or ()))}]" for t in divided]
    cleaner = [[cleaned(str(one)) for one in part] for part in parts]
    modules = [_module(p) if t.asked else "" for t, p in zip(divided, cleaner, strict=True)]
    unique = [m if modules.count(m) == 1 else "" for m in modules]
    return [f"{name}[{m or _listed(p)}]" for m, p in zip(unique, cleaner, strict=True)]


def _module(names: Sequence[str]) -> str:
    """Return the innermost module that several parameters lie in; the name of a single one."""
    if len(names) == 1:
        return names[0]
    common: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _listed(names: Sequence[str]) -> str:
    """Return the first of several names, which no other set has, and the number of the others."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)


# Which tensors of a group a user means: by index, name, module or the tensor itself.

WHAT = "an index, a regular expression of names, a module, parameters, or a list of them"
_SINGLE = (int, str, re.Pattern, torch.nn.Module, torch.Tensor)
_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def as_selector(what: Any) -> Any:
    """Return a selector in the form that `selected` takes; what is iterated once is kept as a list.

    Raises
    ------
    TypeError, ValueError
        If it chooses nothing that there can be.

    Examples
    --------
    >>> import numpy as np
    >>> as_selector(np.int64(2)), as_selector(iter(["query", "key"]))
    (2, [re.compile('query'), re.compile('key')])
    """
    if isinstance(what, numbers.Integral):
        if what < 0:
            raise ValueError(f"groups: the index of a parameter group must be >= 0, got {what}")
        return int(what)
    if isinstance(what, str):
        try:
            return re.compile(what)
        except re.error as error:
            raise ValueError(
                f"groups: a pattern must be a regular expression, got {what!r}: {error}"
            ) from error
    if isinstance(what, _SINGLE):
        return what
    if isinstance(what, Iterable) and not isinstance(what, Mapping):
        return [as_selector(one) for one in what]
    raise TypeError(f"groups: a selector must be {WHAT}, got {what!r}")


def selected(what: Any, index: int, group: Mapping[str, Any], names: Mapping[int, str]) -> set[int]:
    """Return the places of the tensors of a group that a selector chooses.

    Parameters
    ----------
    what : int, re.Pattern, Module, Tensor or list of them
        As `as_selector` gives it.
    index : int
        The place of the group in the optimizer.
    group : mapping
        The live group.
    names : mapping of id to str
        Names of parameters beyond those in the group.
    """
    params = group["params"]
    if isinstance(what, int):
        return set(range(len(params))) if what == index else set()
    if isinstance(what, re.Pattern):
        return _named(what, group, names)
    if isinstance(what, list):
        return set().union(*(selected(one, index, group, names) for one in what))
    wanted = {id(p) for p in (what.parameters() if isinstance(what, torch.nn.Module) else [what])}
    return {i for i, p in enumerate(params) if id(p) in wanted}


def cleaned(name: str) -> str:
    """Return a name without what torch.compile, DDP, FSDP and checkpointing insert.

    Examples
    --------
    >>> cleaned("module._orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    bare = _WRAPPERS.sub("", name).removeprefix(".")
    return cleaned(bare.removeprefix("module.")) if bare.startswith("module.") else bare


def names_of(model: torch.nn.Module | None) -> dict[int, str]:
    """Return the names of the parameters of a model by their ids."""
    if not isinstance(model, (torch.nn.Module, type(None))):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    return {} if model is None else {id(p): name for name, p in model.named_parameters()}


def parameter_names(group: Mapping[str, Any], names: Mapping[int, str]) -> list[str | None]:
    """Return the names of the tensors of a group, as far as they are known."""
    known = list(group.get("param_names") or [])
    rest = group["params"][len(known) :]  # what was appended to the group has no name there
    return known + [names.get(id(p)) for p in rest]


def warn_if_unused(
    chosen: Sequence[tuple[Any, Any]],
    groups: Sequence[Mapping[str, Any]],
    model: torch.nn.Module | None,
) -> None:
    """Warn of a rule that chooses nothing: it may be misspelt, or wait for a later group."""
    names = names_of(model)
    for what, _ in chosen:
        if any(selected(what, i, group, names) or what == i for i, group in enumerate(groups)):
            continue
        tied = _tied(what, names, model)
        warnings.warn(
            f"groups: {_shown(what)} chooses no parameter of the optimizer yet{tied}", stacklevel=5
        )


def _tied(what: Any, names: Mapping[int, str], model: torch.nn.Module | None) -> str:
    """Return that a pattern fits the second name of a weight, which counts by its first."""
    if model is None or not isinstance(what, re.Pattern):
        return ""
    for name, p in model.named_parameters(remove_duplicate=False):
        first = cleaned(names[id(p)])
        if cleaned(name) != first and what.search(cleaned(name)):
            return f": {cleaned(name)} is tied to {first}. Choose it by that name"
    return ""


def _shown(what: Any) -> str:
    """Return a selector as the user wrote it, or the name of its type."""
    if isinstance(what, re.Pattern):
        return repr(what.pattern)
    if isinstance(what, list):
        return f"[{', '.join(map(_shown, what))}]"
    return repr(what) if isinstance(what, int) else type(what).__name__


def _named(
    pattern: re.Pattern[str], group: Mapping[str, Any], names: Mapping[int, str]
) -> set[int]:
    """Return the places of the tensors whose name, or whose group's name, has the pattern in it."""
    params = group["params"]
    if "name" in group and pattern.search(str(group["name"])):
        return set(range(len(params)))
    own = parameter_names(group, names)
    if "name" not in group and any(name is None for name in own):
        raise ValueError(
            f"groups: {pattern.pattern!r} chooses by name, and not all parameters have one: give "
            "model=, make the optimizer from model.named_parameters(), or name its groups"
        )
    # In both forms: a wrapper must not hide a name, and a module of a user may be called "module".
    return {
        i
        for i, name in enumerate(own)
        if name is not None and (pattern.search(name) or pattern.search(cleaned(name)))
    }


def no_schedule(value: Any) -> str:
    """Return why something is not a schedule of decay, and what to write instead."""
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
    return (
        f"schedule must be a mirrorflow Schedule or a function step -> float, got {shown}: {hint}"
    )
