"""Which tensors of a group a user means: by index, name, module or the tensor itself."""

from __future__ import annotations

import numbers
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["WHAT", "checked", "cleaned", "names_of", "parameter_names", "places", "warn_if_unused"]

WHAT = "an index, a regular expression of names, a module, parameters, or a list of them"
_SINGLE = (int, str, re.Pattern, torch.nn.Module, torch.Tensor)
_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def checked(what: Any) -> Any:
    """Give a selector in the form that `places` takes; what is iterated once is kept as a list.

    Raises
    ------
    TypeError, ValueError
        If it chooses nothing that there can be.

    Examples
    --------
    >>> import numpy as np
    >>> checked(np.int64(2)), checked(iter(["query", "key"]))
    (2, [re.compile('query'), re.compile('key')])
    """
    if isinstance(what, numbers.Integral):
        if what < 0:
            raise ValueError(f"groups: the index of a parameter group is >= 0, got {what}")
        return int(what)
    if isinstance(what, str):
        try:
            return re.compile(what)
        except re.error as error:
            raise ValueError(f"groups: {what!r} is no regular expression: {error}") from error
    if isinstance(what, _SINGLE):
        return what
    if isinstance(what, Iterable) and not isinstance(what, Mapping):
        return [checked(one) for one in what]
    raise TypeError(f"groups: expected {WHAT}, got {what!r}")


def places(what: Any, index: int, group: Mapping[str, Any], names: Mapping[int, str]) -> set[int]:
    """Give the places of the tensors of a group that a checked selector chooses.

    Parameters
    ----------
    what : int, re.Pattern, Module, Tensor or list of them
        As `checked` gives it.
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
        return set().union(*(places(one, index, group, names) for one in what))
    wanted = {id(p) for p in (what.parameters() if isinstance(what, torch.nn.Module) else [what])}
    return {i for i, p in enumerate(params) if id(p) in wanted}


def cleaned(name: str) -> str:
    """Drop what torch.compile, DDP, FSDP and checkpointing insert into names.

    Examples
    --------
    >>> cleaned("module._orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    bare = _WRAPPERS.sub("", name).removeprefix(".")
    return cleaned(bare.removeprefix("module.")) if bare.startswith("module.") else bare


def names_of(model: torch.nn.Module | None) -> dict[int, str]:
    """Name the parameters of a model by their ids."""
    if not isinstance(model, (torch.nn.Module, type(None))):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    return {} if model is None else {id(p): name for name, p in model.named_parameters()}


def parameter_names(group: Mapping[str, Any], names: Mapping[int, str]) -> list[str | None]:
    """Give the names of the tensors of a group, as far as they are known."""
    known = list(group.get("param_names") or [])
    rest = group["params"][len(known) :]  # what was appended to the group has no name there
    return known + [names.get(id(p)) for p in rest]


def warn_if_unused(
    chosen: Sequence[tuple[Any, Any]], groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> None:
    """Warn of a rule that chooses nothing: it may be misspelt, or wait for a later group."""
    for what, _ in chosen:
        if any(places(what, i, group, names) or what == i for i, group in enumerate(groups)):
            continue
        warnings.warn(
            f"groups: {_shown(what)} chooses no parameter of the optimizer yet", stacklevel=5
        )


def _shown(what: Any) -> str:
    """Write a selector as the user did, or name its type."""
    if isinstance(what, re.Pattern):
        return repr(what.pattern)
    if isinstance(what, list):
        return f"[{', '.join(map(_shown, what))}]"
    return repr(what) if isinstance(what, int) else type(what).__name__


def _named(
    pattern: re.Pattern[str], group: Mapping[str, Any], names: Mapping[int, str]
) -> set[int]:
    """Give the places of the tensors whose name, or whose group's name, has the pattern in it."""
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
