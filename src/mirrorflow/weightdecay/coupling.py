"""How an optimizer's weight decay enters its step, found by trying it on a gradient of zero.

The ledger needs to know it: a decay of the weights adds up, an L2 term in the gradient goes
through whatever the optimizer does with gradients.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["KINDS", "CoupledDecayWarning", "coupling"]

KINDS = {
    "decoupled": "the weights shrink by lr x decay",
    "fixed": "the weights shrink by the decay, whatever the learning rate",
    "sgd": "L2 in the gradient of SGD, spread over later steps by its momentum",
    "coupled": "L2 in a gradient that is rescaled: no sum of lr x decay describes it",
    "unknown": "the optimizer could not be tried: say which it is with coupling=...",
}

_LR, _DECAY = 0.25, 0.5
_WEIGHTS = ((1.0, 2.0), (3.0, 5.0))
_PLAIN = (bool, int, float, str, tuple, type(None))


class CoupledDecayWarning(UserWarning):
    """A decay that lives in the gradient is not off when its number is 0."""


def coupling(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> str:
    """Name the way in which the decay of a group acts.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimizer; neither it nor its parameters are touched.
    group : mapping
        One of its parameter groups.

    Returns
    -------
    str
        A key of ``KINDS``.

    Examples
    --------
    >>> w = [torch.nn.Parameter(torch.ones(2, 2))]
    >>> for make in (torch.optim.AdamW, torch.optim.Muon, torch.optim.SGD, torch.optim.Adam):
    ...     optimizer = make(w, lr=0.1)
    ...     print(make.__name__, coupling(optimizer, optimizer.param_groups[0]))
    AdamW decoupled
    Muon decoupled
    SGD sgd
    Adam coupled
    """
    if type(optimizer).step is torch.optim.SGD.step:
        return "sgd"
    try:
        factors = _try_decay(optimizer, group)
    except Exception:
        # Any class may be tried, on groups and state that it did not make itself, and may fail in
        # any way. Nothing is hidden by this: "unknown" is said to the user, with what to do.
        return "unknown"
    if not _same(factors[1:], 1.0):
        return "coupled"
    if _same(factors[0], 1 - _LR * _DECAY):
        return "decoupled"
    return "fixed" if _same(factors[0], 1 - _DECAY) else "coupled"


def _try_decay(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> torch.Tensor:
    """Give the factors on four weights of a step with decay, and of two without, at gradient 0."""
    weight = torch.nn.Parameter(torch.tensor(_WEIGHTS))
    twin = _twin(optimizer, group, weight)
    factors = []
    for decay in (_DECAY, 0.0, 0.0):
        twin.param_groups[0]["weight_decay"] = decay
        weight.grad = torch.zeros_like(weight)
        before = weight.detach().clone()
        twin.step()
        factors.append(weight.detach() / before)
    return torch.stack(factors)


def _twin(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], weight: torch.nn.Parameter
) -> torch.optim.Optimizer:
    """Make an optimizer of the same class and settings, without hooks, for one small weight."""
    settings = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
    settings |= {k: False for k in ("capturable", "fused", "foreach") if k in settings}
    settings |= {"params": [weight], "lr": _LR, "weight_decay": _DECAY}
    twin = type(optimizer).__new__(type(optimizer))
    # What is not plain is left out: an LR scheduler puts a `step` there that steps the original.
    twin.__dict__.update({k: v for k, v in vars(optimizer).items() if isinstance(v, _PLAIN)})
    defaults = dict(optimizer.defaults)
    twin.__setstate__(
        {"defaults": defaults, "state": defaultdict(dict), "param_groups": [settings]}
    )
    return twin


def _same(factors: torch.Tensor, value: float) -> bool:
    """Tell whether all factors have the value, up to rounding."""
    return torch.allclose(factors, torch.full_like(factors, value), rtol=0, atol=1e-6)
