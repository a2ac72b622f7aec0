r"""The part of SGD's momentum buffers that L2 has put there, followed and taken out.

SGD's buffer is linear in what enters it, gradient + decay x w, so that it is the sum of two
buffers, of the gradients and of the decay. The second is kept beside the first, by the
same recursion ``s <- momentum s + (1 - dampening) decay w``, and subtracted when the decay ends.
It lies in the state of the optimizer, because it has to be saved, loaded and sharded with the
buffer that it is a part of.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ._group_state import INITIAL
from ._ledger import Entry
from .conventions import shrink
from .coupling import CoupledDecayWarning

__all__ = ["STORED", "follow", "forget", "keep_apart", "remove"]

_NOTHING = 1e-12  # the coefficient of a decay that momentum has forgotten
STORED = "stored_decay"  # the key in the state of a tensor, beside momentum_buffer


def keep_apart(
    optimizer: Optimizer,
    sets: Iterable[tuple[int, Entry, list[torch.Tensor]]],
    rates: Sequence[float | None],
    again: bool = False,
) -> None:
    """Before a step: follow the decay where there is some, and take it out where it is off.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Its groups hold the decay of the step.
    sets : iterable of (group, Entry, tensors)
        The index of the group, the ledger and the tensors of each set; only SGD's momentum is
        followed, and emptied in the ledger as well.
    rates : sequence of float or None
        Off is a rate of 0, not a decay that is 0 for a while because the learning rate is.
    again : bool
        Whether other tensors of the same step went before.
    """
    for (index, entry, params), rate in zip(sets, rates, strict=True):
        if entry.coupling != "sgd":
            continue
        group = optimizer.param_groups[index]
        if rate != 0:
            new = follow(optimizer, group, params, float(group["weight_decay"]))
            held = entry.held or 0.0
            if new and (held > _NOTHING or (entry.taken == 0 and group.get(INITIAL, 0.0) != 0)):
                _warn_of_unknown(new)
        elif entry.held or again:  # the rate is off: what the buffers hold of decay goes
            remove(optimizer, params)
            entry.empty()


@torch.no_grad()
def follow(
    optimizer: Optimizer, group: Mapping[str, Any], params: Iterable[torch.Tensor], decay: float
) -> int:
    """Let the decay of the coming step enter the stored part, with the weights before the step.

    Parameters
    ----------
    optimizer : torch.optim.SGD
        Its step enters the same decay into the buffer afterwards.
    group : mapping
        The group of the tensors.
    params : iterable of Tensor
        Those without a gradient are left alone, as the optimizer leaves them.
    decay : float
        The decay of the step.

    Returns
    -------
    int
        The number of buffers that were filled before they were followed: what they held of decay
        then is not known.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.ones(1))
    >>> w.grad = torch.zeros(1)
    >>> optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=0.5)
    >>> follow(optimizer, optimizer.param_groups[0], [w], 0.5)
    0
    >>> optimizer.step()
    >>> optimizer.state[w]["stored_decay"], optimizer.state[w]["momentum_buffer"]
    (tensor([0.5000]), tensor([0.5000]))
    """
    momentum, passed = float(group["momentum"]), 1 - float(group["dampening"])
    moved, stored, unknown = [], [], 0
    if momentum == 0:
        return unknown
    for p in params:
        if p.grad is None:
            continue
        state = optimizer.state[p]
        if state.get("momentum_buffer") is None:  # torch takes the first gradient in whole
            state[STORED] = p.detach() * decay
            continue
        if STORED not in state:
            state[STORED] = torch.zeros_like(p)
            unknown += 1
        moved.append(p)
        stored.append(state[STORED])
    if moved:
        shrink(stored, momentum)  # s <- momentum s + (1 - dampening) decay w
        torch._foreach_add_(stored, moved, alpha=passed * decay)  # pyright: ignore[reportPrivateImportUsage]
    return unknown


@torch.no_grad()
def remove(optimizer: Optimizer, params: Iterable[torch.Tensor]) -> None:
    """Take the stored part out of the buffers: they hold gradients alone then.

    Warns
    -----
    CoupledDecayWarning
        If some of the buffers have no stored part: they were filled without it.
    """
    unknown = 0
    for p in params:
        state = optimizer.state.get(p, {})
        if state.get("momentum_buffer") is None:
            continue
        if STORED in state:
            state["momentum_buffer"].sub_(state[STORED])  # the buffer is linear in what entered it
            state[STORED].zero_()
        else:
            unknown += 1
    if unknown:
        _warn_of_unknown(unknown)


def _warn_of_unknown(count: int) -> None:
    """Warn of buffers that hold decay which was not followed."""
    warnings.warn(
        f"exact_off: {count} momentum buffers were filled without exact_off=True, so their decay "
        "cannot be separated from their gradients, and stays",
        CoupledDecayWarning,
        stacklevel=3,
    )


def forget(optimizer: Optimizer) -> None:
    """Stop following: drop the stored parts, and leave the buffers as they are."""
    for state in optimizer.state.values():
        state.pop(STORED, None)
