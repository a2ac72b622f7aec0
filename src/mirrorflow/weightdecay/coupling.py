"""How an optimizer's weight decay enters its step, found by trying it.

The ledger needs to know it: a decay of the weights adds up, an L2 term in the gradient goes
through whatever the optimizer does with gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from .trial import LR_AND_DECAY, in_two_runs, moves_back, without_gradient

__all__ = ["COUNTED", "KINDS", "CoupledDecayWarning", "coupling"]

KINDS = {
    "decoupled": "the weights shrink by lr x decay",
    "fixed": "the weights shrink by the decay, whatever the learning rate",
    "scaled": "the weights shrink by the decay times a step size that the optimizer finds itself",
    "sgd": "L2 in the gradient of SGD, spread over later steps by its momentum",
    "coupled": "L2 in a gradient that is rescaled: no sum of lr x decay describes it",
    "averaged": "the weights follow copies or averages that the optimizer keeps, and decays",
    "unknown": "the optimizer could not be tried: say which it is with coupling=...",
}
COUNTED = ("decoupled", "fixed", "sgd")  # those that a sum of lr x decay, or of decay, describes


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
    if _steps_as_sgd(optimizer):
        return "sgd"
    own = f"{type(optimizer).__module__}.".startswith("torch.optim.")  # which average nothing
    if not own and moves_back(optimizer, group):
        return "averaged"
    try:
        factors = without_gradient(optimizer, group)
        if _same(factors, 1.0):  # some do nothing at all where there is no gradient
            return _kind(*in_two_runs(optimizer, group))
    except Exception:
        # Any class may be tried, on groups and state that it did not make itself, and may fail in
        # any way. Nothing is hidden by this: "unknown" is said to the user, with what to do.
        return "unknown"
    taken = 1 - factors[1]
    return _kind(taken, taken) if _same(factors[[0, 2, 3]], 1.0) else "coupled"


def _steps_as_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a step is that of torch's SGD: it wraps each class's once more."""
    return inspect.unwrap(type(optimizer).step) is inspect.unwrap(torch.optim.SGD.step)


def _kind(taken: torch.Tensor, later: torch.Tensor) -> str:
    """Name the kind by what a step takes from four weights, and by what is gone a step later."""
    size = taken.abs().max()
    if size < 1e-12:
        return "unknown"  # a decay that does nothing here
    if not torch.allclose(taken, taken.mean().expand_as(taken), rtol=0, atol=1e-3 * float(size)):
        return "coupled"
    if not torch.allclose(later, taken, rtol=0, atol=1e-3 * float(size)):
        return "coupled"
    lr, decay = LR_AND_DECAY
    if _same(taken, lr * decay):
        return "decoupled"
    return "fixed" if _same(taken, decay) else "scaled"


def _same(factors: torch.Tensor, value: float) -> bool:
    """Tell whether all factors have the value, up to rounding."""
    return torch.allclose(factors, torch.full_like(factors, value), rtol=0, atol=1e-6)
