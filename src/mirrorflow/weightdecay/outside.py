"""What is done to an optimizer from outside: its decay set, its weights shrunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["followed", "shrink", "skipped", "write"]

_HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def shrink(params: list[torch.Tensor], factor: float) -> None:
    """Multiply parameters, in place.

    Examples
    --------
    >>> w = torch.ones(2)
    >>> shrink([w], 0.5)
    >>> w
    tensor([0.5000, 0.5000])
    """
    if factor == 1:
        return
    # On a CPU foreach rounds the factor to the precision of the weights: in bfloat16 0.99 is
    # 0.98828, and decay is a sixth more than it should be. mul_ computes in float32.
    half, rest = [], []
    for p in params:
        (half if p.dtype in _HALF and p.device.type == "cpu" else rest).append(p)
    for p in half:
        p.mul_(factor)
    if rest:
        torch._foreach_mul_(rest, factor)  # pyright: ignore[reportPrivateImportUsage]


def skipped(optimizer: Optimizer) -> bool:
    """Tell whether a GradScaler makes a fused optimizer skip this step.

    Other optimizers it does not call at all then.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def followed(after: Callable[[], None], args: Any, kwargs: Any) -> Any:
    """Let something follow each call of the closure of a step, if it has one.

    Parameters
    ----------
    after : callable
        What follows: the gradients are there then.
    args, kwargs : tuple and dict
        Those of ``optimizer.step``, the optimizer first.

    Returns
    -------
    None or (args, kwargs)
        As a step hook of torch returns them, with the closure replaced.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None

    def closure_and_after() -> Any:
        loss = closure()
        after()
        return loss

    return (args[0], closure_and_after), {k: v for k, v in kwargs.items() if k != "closure"}


def write(group: dict[str, Any], decay: float) -> None:
    """Set the decay of a group that has one; a tensor in place, since a graph may hold it.

    Examples
    --------
    >>> group = {"weight_decay": torch.tensor(0.1)}
    >>> write(group, 0.5)
    >>> group
    {'weight_decay': tensor(0.5000)}
    """
    if isinstance(group.get("weight_decay"), torch.Tensor):
        group["weight_decay"].fill_(decay)
    elif "weight_decay" in group:
        group["weight_decay"] = decay
