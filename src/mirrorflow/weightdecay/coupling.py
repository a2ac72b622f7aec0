"""The way in which the weight decay of an optimizer enters its step.

The ledger depends on it: a decay of the weights adds up, an L2 term in the gradient goes through
whatever the optimizer does with gradients. A table knows the optimizers of torch; a probe tries
the others on a small weight.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

__all__ = [
    "COUNTED",
    "COUPLINGS",
    "CoupledDecayWarning",
    "OptimizerProbe",
    "asks_again",
    "coupling",
    "known_coupling",
    "needs_no_gradient",
]

COUPLINGS = {
    "decoupled": "the weights shrink by lr x decay",
    "fixed": "the weights shrink by the decay, whatever the learning rate",
    "scaled": "the weights shrink by the decay times a step size that the optimizer finds itself",
    "masked": "the weights shrink where the gradient allows it, as in cautious decay",
    "sgd": "L2 in the gradient of SGD, spread over later steps by its momentum",
    "coupled": "L2 in a gradient that is rescaled: no sum of lr x decay describes it",
    "averaged": "the weights follow copies or averages that the optimizer keeps, and decays",
    "unknown": "the probe of the optimizer failed: name the coupling with coupling=...",
}
COUNTED = ("decoupled", "fixed", "sgd")  # those that a sum of lr x decay, or of decay, describes


class CoupledDecayWarning(UserWarning):
    """A decay that lives in the gradient is not off when its number is 0."""


def coupling(optimizer: Optimizer, group: Mapping[str, Any]) -> str:
    """Return the name of the way in which the decay of a group acts.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimizer; neither it nor its parameters are touched.
    group : mapping
        One of its parameter groups.

    Returns
    -------
    str
        A key of ``COUPLINGS``.

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
    return known_coupling(optimizer, group) or OptimizerProbe(optimizer, group).coupling()


# The optimizers of torch: the coupling, or where it lies in the group the default of its flag.
_FLAG = "decoupled_weight_decay"
_TABLE: dict[str, str | bool] = {
    "SGD": "sgd",
    "AdamW": True,
    "Adam": False,
    "NAdam": False,
    "RAdam": False,
    "Muon": "decoupled",
    "Adafactor": "decoupled",
    "Adamax": "coupled",
    "Adagrad": "coupled",
    "Adadelta": "coupled",
    "RMSprop": "coupled",
    "ASGD": "coupled",
    "Rprop": "unknown",  # this one and the next two have no decay
    "SparseAdam": "unknown",
    "LBFGS": "unknown",
}


def known_coupling(optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
    """Return what the table of torch's own optimizers says; None for others.

    A subclass that keeps the step of its class decays as the class does.

    Examples
    --------
    >>> optimizer = torch.optim.NAdam([torch.zeros(1)], decoupled_weight_decay=True)
    >>> known_coupling(optimizer, optimizer.param_groups[0])
    'decoupled'
    """
    step = _step_of(type(optimizer))
    for cls in type(optimizer).__mro__:
        entry = _TABLE.get(cls.__name__)
        if entry is None or cls is not getattr(torch.optim, cls.__name__, None):
            continue
        if step is not _step_of(cls):  # its own step may do anything: the probe tells
            return None
        if isinstance(entry, str):
            return entry
        return "decoupled" if group.get(_FLAG, entry) else "coupled"
    return None


def _step_of(cls: type[Optimizer]) -> Callable[..., Any]:
    """Return the step of a class, out of what torch wraps around each class's once more."""
    return inspect.unwrap(cls.step)


def asks_again(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether a step calls its closure more than once, as a line search does."""
    if known_coupling(optimizer, group) is not None:
        return isinstance(optimizer, LBFGS)
    return OptimizerProbe(optimizer, group).asks_again()


def needs_no_gradient(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether a step decays weights that have no gradient as well; torch's own do not."""
    if known_coupling(optimizer, group) is not None:
        return False
    return OptimizerProbe(optimizer, group).needs_no_gradient()


_LR, _DECAY = 0.25, 0.5
_WEIGHTS = ((2.0, -3.0, 5.0, -7.0), (4.0, 9.0, -6.0, 3.0), (-8.0, 2.5, -4.5, 6.5))
_GRADIENT = ((0.3, -0.2, -0.5, 0.1), (0.4, 0.7, -0.6, -0.9), (0.8, 0.25, -0.35, -0.15))
_SIZES = (1.0, 0.01, 30.0, 1.0)  # of the gradient in a run
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, type)
_LONG = 12  # steps, more than an optimizer waits for that averages weights now and then
_CLOSE = 1e-3  # relative, of two effects that are taken for equal


class OptimizerProbe:
    """An optimizer tried out on one small weight, to see what it does with a decay.

    A twin of the same class and settings steps instead of the optimizer, with real gradients: of
    both signs and changing size, so that a decay shows up that depends on them. Neither the
    optimizer nor its parameters are touched, nor the state of the random numbers.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimizer.
    group : mapping
        One of its parameter groups.

    Examples
    --------
    >>> class Cautious(torch.optim.SGD):
    ...     def step(self, closure=None):
    ...         for group in self.param_groups:
    ...             for p in group["params"]:
    ...                 mask = (p.grad * p >= 0).to(p.dtype)
    ...                 p.data.mul_(1 - group["lr"] * group["weight_decay"] * mask)
    >>> optimizer = Cautious([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    >>> OptimizerProbe(optimizer, optimizer.param_groups[0]).coupling()
    'masked'
    """

    def __init__(self, optimizer: Optimizer, group: Mapping[str, Any]) -> None:
        self._optimizer, self._group = optimizer, group

    def coupling(self) -> str:
        """Return the coupling that the twins show; "unknown" where they fail."""
        if self.moves_back():
            return "averaged"
        for dtype in (torch.float64, torch.float32):  # few take the second only
            try:
                return self._coupling(dtype)
            except Exception:
                # Any class may be tried, on groups and state that it did not make itself, and may
                # fail in any way. Nothing is hidden: the user reads of "unknown", and what to do.
                continue
        return "unknown"

    def _coupling(self, dtype: torch.dtype) -> str:
        """Return the coupling, from weights of a precision."""
        rest = self._at_rest()
        base = self._path(dtype, decay_at=None)
        paths = [self._path(dtype, decay_at=t) for t in range(len(_SIZES))]
        if _same(rest, 1.0):  # some do nothing at all where there is no gradient
            # Decay in the first step alone: L2 that lives on in moments acts in the second as well.
            taken, later = base[1] - paths[0][1], base[2] - paths[0][2]
            remembers = not _close(taken, later)
        else:
            # At gradient 0 the weights move in the step with decay only, or something remembers it.
            remembers = not _same(rest[[0, 2, 3]], 1.0)
        if remembers:
            return "coupled"
        taken = torch.stack([base[t + 1] - path[t + 1] for t, path in enumerate(paths)])
        # As a part of the weights before the step, or of those after it, for those that decay last
        return _shape(taken / base[:-1]) or _shape(taken / base[1:]) or "coupled"

    def _at_rest(self) -> torch.Tensor:
        """Return the factors on the weights of four steps at gradient 0, the second with decay.

        The second, because what averages weights has nothing to average with in the first.
        """
        weight, twin = self._twin(torch.float32)
        factors = []
        for decay in (0.0, _DECAY, 0.0, 0.0):
            before = weight.detach().clone()
            _step(twin, weight, torch.zeros_like(weight), decay)
            factors.append((weight.detach() / before).ravel())
        return torch.stack(factors)

    def _path(self, dtype: torch.dtype, decay_at: int | None) -> torch.Tensor:
        """Return the weights of a run with real gradients, and with decay in one step at most."""
        weight, twin = self._twin(dtype)
        gradient, path = torch.tensor(_GRADIENT, dtype=dtype), [weight.detach().clone().ravel()]
        for t, size in enumerate(_SIZES):
            _step(twin, weight, size * gradient, _DECAY if t == decay_at else 0.0)
            path.append(weight.detach().clone().ravel())
        return torch.stack(path)

    def moves_back(self) -> bool:
        """Return whether weights shrunk from outside move back, as to an average of their own.

        False also where the twin fails.
        """
        try:
            weight, twin = self._twin(torch.float32)
            _step(twin, weight, torch.zeros_like(weight), 0.0)
            with torch.no_grad():
                weight.mul_(0.5)
            shrunk = weight.detach().abs()
            for _ in range(_LONG):
                _step(twin, weight, torch.zeros_like(weight), 0.0)
        except Exception:  # as above
            return False
        return bool((weight.detach().abs() > shrunk * 1.001).any())  # a few shrink them further

    def asks_again(self) -> bool:
        """Return whether a step calls its closure more than once; False where the twin fails."""
        calls = []
        try:
            weight, twin = self._twin(torch.float32)

            def closure() -> Any:
                calls.append(1)
                twin.zero_grad()
                loss = weight.square().sum()
                loss.backward()
                return loss

            with _own_random_numbers():
                twin.step(closure)
        except Exception:  # as above
            return False
        return len(calls) > 1

    def needs_no_gradient(self) -> bool:
        """Return whether a weight without a gradient decays; False where the twin fails."""
        try:
            ends = []
            for decay in (0.0, _DECAY):
                weight, twin = self._twin(torch.float32)
                _step(twin, weight, None, decay)
                ends.append(weight.detach().clone())
        except Exception:  # as above
            return False
        return not torch.equal(*ends)

    def rounds_together(self) -> bool:
        """Return whether a decay too weak for a multiplication in bfloat16 acts nevertheless.

        It does where it is rounded together with the update. False where the twin fails.
        """
        try:
            ends = []
            for decay in (0.0, 2**-9):  # times _LR it is a quarter of what acts by itself
                weight, twin = self._twin(torch.bfloat16)
                for size in _SIZES * 8:
                    gradient = size * torch.tensor(_GRADIENT, dtype=torch.bfloat16)
                    _step(twin, weight, gradient, decay)
                ends.append(weight.detach().clone())
        except Exception:  # as above
            return False
        return not torch.equal(*ends)

    def twin_of(
        self, params: Sequence[tuple[torch.nn.Parameter, dict[str, Any]]], decay: float
    ) -> Optimizer:
        """Return an optimizer of the same class, settings and kernels for other parameters.

        Parameters
        ----------
        params : sequence of (Parameter, dict)
            The parameters, and the state of each.
        decay : float
            Their decay.
        """
        twin = self._made({"params": [p for p, _ in params], "weight_decay": decay})
        twin.state.update({p: dict(state) for p, state in params if state})
        return twin

    def _twin(self, dtype: torch.dtype) -> tuple[torch.nn.Parameter, Optimizer]:
        """Return the small weight, and an optimizer of the same class and settings for it."""
        weight = torch.nn.Parameter(torch.tensor(_WEIGHTS, dtype=dtype))
        settings: dict[str, Any] = {
            k: False for k in ("capturable", "fused", "foreach") if k in self._group
        }
        settings |= {"params": [weight], "lr": _LR, "weight_decay": _DECAY}
        return weight, self._made(settings)

    def _made(self, settings: Mapping[str, Any]) -> Optimizer:
        """Return an optimizer of the same class with one group, in which some settings differ."""
        left_out = ("params", "param_names", *settings)
        group = {k: copy.deepcopy(v) for k, v in self._group.items() if k not in left_out}
        # Schedule-free optimizers refuse to step otherwise
        group |= {k: True for k in ("train_mode",) if k in group} | dict(settings)
        cls = type(self._optimizer)
        # Not by its constructor, whose arguments a class is free to choose.
        twin = cls.__new__(cls)
        # What covers a method stays out: an LR scheduler puts a `step` there that steps the
        # original.
        own = {
            k: v for k, v in vars(self._optimizer).items() if not callable(getattr(cls, k, None))
        }
        twin.__dict__.update({k: copy.deepcopy(v) for k, v in own.items() if _is_plain(v)})
        defaults = dict(self._optimizer.defaults)
        twin.__setstate__(
            {"defaults": defaults, "state": defaultdict(dict), "param_groups": [group]}
        )
        return twin


def _step(
    twin: Optimizer, weight: torch.nn.Parameter, gradient: torch.Tensor | None, decay: float
) -> None:
    """Let the twin take a step."""
    twin.param_groups[0]["weight_decay"] = decay

    def closure() -> Any:
        weight.grad = None if gradient is None else gradient.clone()
        return weight.new_zeros(())

    closure()
    given = inspect.signature(twin.step).parameters.get("closure")
    needed = given is not None and given.default is given.empty  # few require one
    with _own_random_numbers():
        twin.step(*([closure] if needed else []))


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Draw the same random numbers in each step of a twin, and leave the program's alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs as well
        yield


def _shape(effects: torch.Tensor) -> str | None:
    """Return the coupling by the part of each weight that each step's decay took; None if none.

    Parameters
    ----------
    effects : Tensor of shape (steps, weights)
        1 - w_decayed / w_free.
    """
    top = effects.abs().amax(dim=1, keepdim=True)
    if float(top.max()) < 1e-12:
        return "unknown"  # a decay that does nothing here
    slack = _CLOSE * top.clamp(min=1e-6 * float(top.max()))  # relative to the step's own effect
    if bool(((effects - effects.mean(dim=1, keepdim=True)).abs() <= slack).all()):
        by_step = effects.mean(dim=1)
        if _close(by_step, torch.full_like(by_step, _LR * _DECAY)):
            return "decoupled"
        return "fixed" if _close(by_step, torch.full_like(by_step, _DECAY)) else "scaled"
    # lambda_i in {0, lambda}: a mask from the gradient
    masked = (effects.abs() <= slack) | ((effects - top).abs() <= slack)
    return "masked" if bool(masked.all()) else None


def _same(factors: torch.Tensor, value: float) -> bool:
    """Return whether all factors have the value, up to rounding."""
    return torch.allclose(factors, torch.full_like(factors, value), rtol=0, atol=1e-6)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two effects are the same, up to a small part of the largest."""
    return torch.allclose(one, other, rtol=0, atol=_CLOSE * float(other.abs().max()))


def _is_plain(value: Any) -> bool:
    """Return whether a value can belong to two optimizers: it holds nothing of the first.

    A function that closes over something may hold it, as may an object of an unknown class.
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
