"""Arguments and results moved between devices: flows and end points are computed on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._loss import LeastSquares

__all__ = ["CPU", "device_of", "loss_on", "moved"]

CPU = torch.device("cpu")


def device_of(value: Any) -> torch.device:
    """Return where the first tensor of ``value``, a tensor or a tuple of them, is."""
    if isinstance(value, tuple | list):
        value = next((v for v in value if isinstance(v, Tensor)), None)
    return value.device if isinstance(value, Tensor) else CPU


def moved(value: Any, device: torch.device) -> Any:
    """Return ``value`` with all its tensors on a device; itself if they are there already.

    Tensors, tuples, lists and dicts of them, and the attributes of this package's objects and of
    those derived from them; tensors that a function of the user's own has captured stay.

    Examples
    --------
    >>> from mirrorflow import LeastSquares
    >>> loss = LeastSquares(torch.ones(1, 2), torch.ones(1))
    >>> moved(loss, torch.device("cpu")) is loss, moved(loss, torch.device("meta")).Z.device.type
    (True, 'meta')
    """
    if isinstance(value, Tensor):
        return value if value.device == device else _to(value, device)
    if type(value) in (tuple, list):
        made = [moved(item, device) for item in value]
        same = all(new is old for new, old in zip(made, value, strict=True))
        return value if same else type(value)(made)
    if type(value) is dict:
        made = {key: moved(item, device) for key, item in value.items()}
        return value if all(made[key] is value[key] for key in value) else made
    if not any(c.__module__.partition(".")[0] == "mirrorflow" for c in type(value).__mro__):
        return value
    fields = getattr(value, "__dict__", {})
    made = moved(fields, device)
    if made is fields:
        return value
    copied = copy.copy(value)
    copied.__dict__.update(made)  # frozen dataclasses as well
    return copied


def loss_on(loss: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a loss of x on the CPU; a function of the user's own is called where w0 is."""
    if device == CPU or isinstance(loss, LeastSquares):
        return moved(loss, CPU)
    return lambda x: moved(loss(moved(x, device)), CPU)


def _to(value: Tensor, device: torch.device) -> Tensor:
    """Move one tensor."""
    return value.cpu() if device == CPU else value.to(device)
