"""No-decay policies: which parameters of a model do not decay, and why.

A policy is a value. It makes the groups of a new optimizer, or the rules by which a scheduler
decays tensor by tensor within groups that stay as they are; `lint` compares an optimizer with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module, Parameter

from ..schedule import Constant
from ._targets import cleaned

__all__ = ["PRESETS", "NoDecayPolicy", "no_decay_policy"]

Predicate = Callable[[str, Parameter, Module], bool]


@dataclass(frozen=True)
class NoDecayPolicy:
    """The parameters that do not decay: those for which any of the fields says so.

    Parameters
    ----------
    modules : tuple of type
        The parameters of modules of these types, and of all modules in them.
    class_names : str
        A regular expression, found in the name of the class of the module that has the parameter.
    names : tuple of str
        Regular expressions, found in the parameter's full name in lower case.
    max_dim : int
        Parameters of no more dimensions than this; -1 for none.
    channels : bool
        One number for each channel in more dimensions, as in the shape (C, 1, 1).
    embeddings : bool
        The weights of ``torch.nn.Embedding`` and ``EmbeddingBag``, a head that is tied to them
        included.
    marks : bool
        Parameters with ``_no_weight_decay = True``, as in Mamba, and those that a module names by
        ``no_weight_decay()`` or ``no_weight_decay_keywords()``, as in timm and Swin.
    predicate : callable (name, parameter, module) -> bool, optional
        Whether a parameter of a module does not decay.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    >>> policy = NoDecayPolicy(max_dim=1)
    >>> policy.exempt(model)
    {'0.bias': 'dimensions', '1.weight': 'dimensions', '1.bias': 'dimensions'}
    >>> groups = policy.groups(model, weight_decay=0.1)
    >>> [(group["weight_decay"], len(group["params"])) for group in groups]
    [(0.1, 1), (0.0, 3)]
    """

    modules: tuple[type[Module], ...] = ()
    class_names: str = ""
    names: tuple[str, ...] = ()
    max_dim: int = -1
    channels: bool = False
    embeddings: bool = False
    marks: bool = True
    predicate: Predicate | None = None

    def __post_init__(self) -> None:
        """Raise unless the fields can choose parameters."""
        for kind in self.modules:
            if not (isinstance(kind, type) and issubclass(kind, Module)):
                raise TypeError(f"modules must be classes of torch.nn.Module, got {kind!r}")
        for pattern in (self.class_names, *self.names):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"names must be regular expressions, got {pattern!r}: {error}"
                ) from error

    def exempt(self, model: Module) -> dict[str, str]:
        """Return the names of the parameters that do not decay, each with the field that says so.

        A parameter that several modules share stands under its first name.
        """
        found = self._reasons(model)
        return {
            cleaned(name): found[id(p)] for name, p in model.named_parameters() if id(p) in found
        }

    def groups(self, model: Module, weight_decay: float, **settings: Any) -> list[dict[str, Any]]:
        """Return the groups for a new optimizer: what decays, and what does not.

        Parameters
        ----------
        model : torch.nn.Module
            Of its parameters those that are trained.
        weight_decay : float
            The decay of the first group.
        **settings : Any
            More settings of both groups, such as ``lr``.

        Returns
        -------
        list of dict
            With names, so that `WeightDecayScheduler` and `lint` can name them; without the groups
            that would be empty.
        """
        found = self._reasons(model)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        parts = [(n, p) for n, p in trained if id(p) not in found]
        rest = [(n, p) for n, p in trained if id(p) in found]
        both = ((parts, weight_decay), (rest, 0.0))
        return [{"params": ps, "weight_decay": d} | settings for ps, d in both if ps]

    def rules(self, model: Module) -> list[tuple[Any, Any]]:
        """Return the rules by which a scheduler leaves the parameters without decay.

        For an optimizer whose groups stay whole, ``WeightDecayScheduler(optimizer, schedule,
        groups=policy.rules(model), decoupled=True)``, which decays tensor by tensor.

        Examples
        --------
        >>> from mirrorflow.weightdecay import WeightDecayScheduler
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        >>> rules = no_decay_policy("nanogpt").rules(model)
        >>> scheduler = WeightDecayScheduler(optimizer, Constant(0.5), groups=rules, decoupled=True)
        >>> scheduler.get_last_weight_decay()
        [0.0, 0.5]
        """
        found = self._reasons(model)
        chosen = [p for p in model.parameters() if id(p) in found]
        return [(chosen, Constant(0.0))] if chosen else []

    def _reasons(self, model: Module) -> dict[int, str]:
        """Return the field that exempts each parameter, by the parameter's id."""
        if not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
        found: dict[int, str] = {}
        listed = _marked(model) if self.marks else {}
        for prefix, module, within in _walk(model, self.modules):
            for short, p in module.named_parameters(recurse=False, remove_duplicate=False):
                name = cleaned(f"{prefix}.{short}" if prefix else short)
                reason = self._reason(name, p, module, within) or listed.get(id(p))
                if reason:
                    found.setdefault(id(p), reason)
        return found

    def _reason(self, name: str, p: Parameter, module: Module, within: bool) -> str | None:
        """Return the field that exempts a parameter of a module; None if it decays."""
        if within:
            return "modules"
        if self.class_names and re.search(self.class_names, type(module).__name__):
            return "class_names"
        if any(re.search(pattern, name.lower()) for pattern in self.names):
            return "names"
        if p.ndim <= self.max_dim:
            return "dimensions"
        if self.channels and p.ndim > 2 and p.shape[-1] == 1 and p.numel() == max(p.shape):
            return "channels"
        if self.embeddings and isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
            return "embeddings"
        return "predicate" if self.predicate and self.predicate(name, p, module) else None


def _walk(model: Module, kinds: tuple[type[Module], ...]) -> Iterator[tuple[str, Module, bool]]:
    """Return each module with its name, and whether it is, or lies in, one of these kinds."""
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        within = any(name == one or name.startswith(f"{one}.") or not one for one in inside)
        if not within and kinds and isinstance(module, kinds):
            inside.append(name)
            within = True
        yield name, module, within


def _marked(model: Module) -> dict[int, str]:
    """Return the parameters that carry a mark, or that a module names, by their ids."""
    found = {id(p): "marks" for p in model.parameters() if getattr(p, "_no_weight_decay", False)}
    for module in model.modules():
        asked: Any = getattr(module, "no_weight_decay", None)
        words: Any = getattr(module, "no_weight_decay_keywords", None)
        listed: Any = asked() if callable(asked) else ()
        keywords: Any = words() if callable(words) else ()
        names, parts = set(listed), set(keywords)
        if not names and not parts:
            continue
        for name, p in module.named_parameters(remove_duplicate=False):
            if cleaned(name) in names or any(part in name for part in parts):
                found[id(p)] = "marks"
    return found


_HF = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")

PRESETS: Mapping[str, NoDecayPolicy] = {
    "biases-and-norms": NoDecayPolicy(class_names="Norm", names=(r"(?:^|\.|_)bias(?:_|$)",)),
    "nanogpt": NoDecayPolicy(max_dim=1, marks=False),
    "timm": NoDecayPolicy(max_dim=1, names=(r"\.bias$",)),
    "hf": NoDecayPolicy(modules=(torch.nn.LayerNorm,), names=_HF, marks=False),
}


def no_decay_policy(name: str) -> NoDecayPolicy:
    """Return the policy of a preset.

    Parameters
    ----------
    name : {"biases-and-norms", "nanogpt", "timm", "hf"}
        "biases-and-norms": biases, parameters of modules whose class is called a norm, and marks;
        "nanogpt": all with fewer than two dimensions; "timm": these, biases and marks; "hf": as the
        Trainer of transformers, ``torch.nn.LayerNorm`` and what is called a bias or a norm.

    Raises
    ------
    ValueError
        If there is no such preset.

    Examples
    --------
    >>> sorted(no_decay_policy("hf").exempt(torch.nn.Linear(2, 2)))
    ['bias']
    """
    if name not in PRESETS:
        raise ValueError(f"a policy must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
