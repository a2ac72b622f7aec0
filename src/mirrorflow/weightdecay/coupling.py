"""How an optimizer's weight decay enters its step, found by trying it.

The ledger needs to know it: a decay of the weights adds up, an L2 term in the gradient goes
through whatever the optimizer does with gradients.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

__all__ = [
    "COUNTED",
    "KINDS",
    "LR_AND_DECAY",
    "CoupledDecayWarning",
    "asks_again",
    "coupling",
    "in_two_runs",
    "moves_back",
    "without_gradient",
]

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


# An optimizer tried out on one small weight, to see what it does with a decay.
#
# A twin of the same class and settings steps instead of it; neither the optimizer nor its
# parameters
# are touched.

LR_AND_DECAY = (0.25, 0.5)
_WEIGHTS = ((1.0, 2.0), (3.0, 5.0))
_GRADIENT = ((0.3, -0.2), (0.1, 0.4))
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, type)
_LONG = 12  # steps, more than what averages weights now and then waits for


def without_gradient(optimizer: Optimizer, group: Mapping[str, Any]) -> torch.Tensor:
    """Give the factors on the weights of steps at gradient 0, of which the second has decay.

    The second, because what averages weights has nothing to average with in the first.

    Returns
    -------
    Tensor of shape (4, 4)
        How each of the four steps has scaled each of four weights.
    """
    weight = _weight(torch.float32)
    twin = _twin(optimizer, group, weight)
    factors = []
    for decay in (0.0, LR_AND_DECAY[1], 0.0, 0.0):
        before = weight.detach().clone()
        _step(twin, weight, torch.zeros_like(weight), decay)
        factors.append((weight.detach() / before).ravel())
    return torch.stack(factors)


def in_two_runs(optimizer: Optimizer, group: Mapping[str, Any]) -> torch.Tensor:
    """Give what a step with decay, and one without after it, take from the weights.

    For optimizers that do nothing where there is no gradient: the difference of two runs, of which
    one never has decay.

    Returns
    -------
    Tensor of shape (2, 4)
        The difference so far, relative to the weights before.
    """
    runs = []
    for first in (LR_AND_DECAY[1], 0.0):
        weight = _weight(torch.float64)
        twin = _twin(optimizer, group, weight)
        path = []
        for decay in (first, 0.0):
            _step(twin, weight, torch.tensor(_GRADIENT, dtype=torch.float64), decay)
            path.append(weight.detach().clone().ravel())
        runs.append(torch.stack(path))
    return (runs[1] - runs[0]) / torch.tensor(_WEIGHTS, dtype=torch.float64).ravel()


def moves_back(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Tell whether weights that are shrunk from outside move back, as to an average of their own.

    False also where it could not be tried.
    """
    try:
        weight = _weight(torch.float32)
        twin = _twin(optimizer, group, weight)
        _step(twin, weight, torch.zeros_like(weight), 0.0)
        with torch.no_grad():
            weight.mul_(0.5)
        shrunk = weight.detach().clone()
        for _ in range(_LONG):
            _step(twin, weight, torch.zeros_like(weight), 0.0)
    except Exception:  # as in `coupling`: any class may be tried, and may fail in any way
        return False
    return bool((weight.detach() > shrunk * 1.001).any())  # a few shrink them further


def asks_again(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Tell whether a step calls its closure more than once, as a line search does."""
    if isinstance(optimizer, LBFGS):  # a twin of it would hold the optimizer's own parameters
        return True
    calls = []
    try:
        weight = _weight(torch.float32)
        twin = _twin(optimizer, group, weight)

        def closure() -> Any:
            calls.append(1)
            twin.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            return loss

        twin.step(closure)
    except Exception:  # as above
        return False
    return len(calls) > 1


def _weight(dtype: torch.dtype) -> torch.nn.Parameter:
    """Make the small weight."""
    return torch.nn.Parameter(torch.tensor(_WEIGHTS, dtype=dtype))


def _step(
    twin: Optimizer, weight: torch.nn.Parameter, gradient: torch.Tensor, decay: float
) -> None:
    """Let the twin take a step."""
    twin.param_groups[0]["weight_decay"] = decay

    def closure() -> Any:
        weight.grad = gradient.clone()
        return weight.new_zeros(())

    closure()
    given = inspect.signature(twin.step).parameters.get("closure")
    twin.step(*([closure] if given and given.default is given.empty else []))  # few require one


def _twin(optimizer: Optimizer, group: Mapping[str, Any], weight: torch.nn.Parameter) -> Optimizer:
    """Make an optimizer of the same class and settings, without hooks, for one small weight."""
    settings = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
    settings |= {k: False for k in ("capturable", "fused", "foreach") if k in settings}
    settings |= {
        k: True for k in ("train_mode",) if k in settings
    }  # schedule-free ones refuse else
    settings |= {"params": [weight], "lr": LR_AND_DECAY[0], "weight_decay": LR_AND_DECAY[1]}
    cls = type(optimizer)
    twin = cls.__new__(cls)
    # What covers a method is left out: an LR scheduler puts a `step` there that steps the original.
    own = {k: v for k, v in vars(optimizer).items() if not callable(getattr(cls, k, None))}
    twin.__dict__.update({k: copy.deepcopy(v) for k, v in own.items() if _is_plain(v)})
    defaults = dict(optimizer.defaults)
    twin.__setstate__(
        {"defaults": defaults, "state": defaultdict(dict), "param_groups": [settings]}
    )
    return twin


def _is_plain(value: Any) -> bool:
    """Tell whether a value can belong to two optimizers: it holds nothing of the first.

    A function that closes over something may hold it, and an object of an unknown class, too.
    """
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        holder = getattr(value, "__self__", None)
        return not getattr(value, "__closure__", None) and isinstance(
            holder, (types.ModuleType, type(None))
        )
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return isinstance(value, _PLAIN)
