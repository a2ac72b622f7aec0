r"""The law of a product x = m w under each kind of optimizer, and where decay moves its geometry.

Gradient descent keeps ``m^2 - w^2`` up to decay, which lets it fall as ``e^{2a}``. With
``A_0 = |m_0^2 - w_0^2| / 2`` and ``A = A_0 e^{2a}`` it is ``R_a'' = 1 / (2 sqrt(x^2 + A^2))``, so
that R_a is like ``|x| log(|x| / A)`` where ``|x|`` exceeds A by far. Sign descent, to which Adam
and Lion are close, keeps ``delta = ||m| - |w||``, which falls as ``e^a``:
``R'' = 1 / sqrt(4 |x| + delta^2)``, and R tends to ``2/3 |x|^{3/2}``, whatever the decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from .feedback import number

__all__ = ["LAWS", "Geometry", "Law", "geometry", "law_of"]

MOVES = 0.05  # the least 1 - e^{2a} for which the geometry counts as moved
SMALL = 0.1  # what "exceeds by far" means: A <= SMALL |x|


@dataclass(frozen=True)
class Law:
    """What training by a kind of optimizer keeps of a product, and what decay can store in it.

    Parameters
    ----------
    name : str
        "gradient flow", "sign descent" or "not known".
    stores : str
        What decay can store at most, as the end of a sentence.
    """

    name: str
    stores: str


LAWS = {
    "flow": Law(
        "gradient flow",
        "decay stores R_a, which is L1-like where products exceed A = A0 e^{2a} by far; momentum "
        "and the noise of minibatches add to a (mirrorflow.balance measures how much)",
    ),
    "sign": Law(
        "sign descent",
        "decay stores |x|^{3/2} at most, never L1, whatever its strength",
    ),
    "unknown": Law("not known", "what decay stores under this optimizer has not been derived"),
}
# By the class or one that it derives from. Of Adafactor, Muon and the rest nothing is derived.
_BY_CLASS = {
    "MirrorAdam": "flow",  # one second moment for both factors: another time, the same R_a
    "SGD": "flow",
    "AdamW": "sign",
    "Adam": "sign",
    "NAdam": "sign",
    "RAdam": "sign",
    "Adamax": "sign",
    "Lion": "sign",
}


def law_of(optimizer: Optimizer, group: Mapping[str, Any]) -> Law:
    """Return the law that holds for products that an optimizer trains.

    Examples
    --------
    >>> import torch
    >>> w = [torch.nn.Parameter(torch.ones(2))]
    >>> [law_of(make(w, lr=0.1), {}).name for make in (torch.optim.SGD, torch.optim.AdamW)]
    ['gradient flow', 'sign descent']
    """
    names = [cls.__name__ for cls in type(optimizer).__mro__]
    known = next((_BY_CLASS[name] for name in names if name in _BY_CLASS), "unknown")
    if known == "sign" and group.get("eps", 0) >= 1:  # nearly SGD with momentum
        known = "unknown"
    return LAWS[known]


@dataclass(frozen=True)
class Geometry:
    """Where decay moves the preference of a product among the solutions.

    Parameters
    ----------
    state : str
        "still" (a changes it by less than 5%), "before" (it is L1-like, or |x|^{3/2}-like,
        without decay), "moving", "arrived", or "unknown".
    before, after : float
        What has to fall to 0.1: ``A / |x|`` under the law of the flow, ``delta^2 / (4 |x|)`` under
        that of sign descent; NaN where the size or the start of the product is not given.
    needed : float
        The a <= 0 at which it falls to 0.1; NaN if that is not known.
    """

    state: str
    before: float = math.nan
    after: float = math.nan
    needed: float = math.nan


def geometry(law: Law, a: float, size: float | None = None, start: float | None = None) -> Geometry:
    """Return where decay moves the geometry of products of a size, from a start.

    Parameters
    ----------
    law : Law
        Of the optimizer.
    a : float
        -sum of lr x decay, <= 0, as it will act; NaN if that is not known.
    size : float, optional
        ``|x|``, > 0: a typical entry of m * w, or singular value of A B.
    start : float, optional
        ``A_0 = |m_0^2 - w_0^2| / 2``, > 0, of A B half an eigenvalue of ``A^T A - B B^T``; of
        PEFT's LoRA 1/6. Sign descent is taken to start with one factor at 0: ``delta_0^2 = 2 A_0``.

    Examples
    --------
    >>> found = geometry(LAWS["flow"], a=-0.0015, size=0.1, start=1 / 6)
    >>> found.state, round(found.needed, 2)
    ('still', -1.41)
    >>> geometry(LAWS["flow"], a=-2.0, size=0.1, start=1 / 6).state
    'arrived'
    """
    before = needed = math.nan
    if size is not None and start is not None and law.name != "not known":
        size = number("size", size, 0.0, strict=True)
        start = number("start", start, 0.0, strict=True)
        # A_0 / |x|, or delta_0^2 / (4 |x|) with delta_0^2 = 2 A_0: one factor is 0.
        before = start / size if law.name == "gradient flow" else 2 * start / (4 * size)
        needed = min(0.0, -0.5 * math.log(before / SMALL))  # before e^{2a} = SMALL
    after = before * math.exp(2 * a)  # A falls as e^{2a}, delta as e^a and its square as A
    return Geometry(_state(a, before, after), before, after, needed)


def _state(a: float, before: float, after: float) -> str:
    """Return where the geometry is."""
    if before <= SMALL:
        return "before"
    if math.isnan(a):
        return "unknown"
    if 1 - math.exp(2 * a) < MOVES:  # the part of A, or of delta^2, that decay takes
        return "still"
    return "arrived" if after <= SMALL else "unknown" if math.isnan(after) else "moving"
