r"""What a run's decay comes to, before the run: how much, how much of it acts, and is it enough.

A product of two factors that shrink by ``1 - s_t`` each, ``s_t`` = lr x decay as it acts, keeps
``prod (1 - s_t)^2`` of its size where training does not move it, ``e^{2a}`` up to ``O(sum s_t^2)``.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ._laws import Geometry, Law, geometry, law_of
from ._rounding import HALF, too_weak
from .conventions import lr_of
from .coupling import COUNTED
from .feedback import Feedback, number

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ._targets import Target
    from .scheduler import WeightDecayScheduler

__all__ = [
    "Outlook",
    "Product",
    "outlook",
    "outlook_table",
    "sentences",
    "wrapped",
]

WIDTH = 80
_NO_SUM = "no sum of lr x decay describes L2 in a rescaled gradient: decoupled=True makes it one"
_GRADIENT = (
    "what {} lets through depends on the gradients: decoupled=True with rounding='stochastic' "
    "makes all of it act"
)
_NO_LR = "{} makes its own step size (lr=None): no sum of lr x decay is known before the run"
_NO_START = "what was absorbed before is not known"
_BY_GRADIENT = "mask={!r} lets decay act where the gradients of the run say"
_BY_MASK = "the mask leaves the rest alone"
_SWALLOWED = (
    "{} swallows lr x decay below {:.2g}, and distorts it up to ten times that: keep the "
    "weights in float32, or use decoupled=True, rounding='stochastic'"
)


@dataclass(frozen=True)
class Product:
    """The scale of the products that decay is meant to change.

    Parameters
    ----------
    size : float, optional
        ``|x|``, > 0: a typical entry of m * w, or singular value of A B.
    start : float, optional
        ``A_0 = |m_0^2 - w_0^2| / 2``, > 0, of A B half an eigenvalue of ``A^T A - B B^T``: 1/6 for
        PEFT's LoRA.
    target : float
        The part by which decay shall shrink products, in (0, 1).
    """

    size: float | None = None
    start: float | None = None
    target: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what no product has."""
        for name in ("size", "start"):
            if (value := getattr(self, name)) is not None:
                number(name, value, 0.0, strict=True)
        if not 0 < number("target", self.target, 0.0, strict=True) < 1:
            raise ValueError(
                f"target must be a part between 0 and 1, got {self.target!r}. Give 0.5 to halve "
                "a product"
            )


@dataclass(frozen=True)
class Outlook:
    """What the decay of one set of tensors comes to in a run.

    Parameters
    ----------
    group : str
        The name of the set.
    optimizer, kind, dtype : str
        The class; how its decay acts, one of ``COUPLINGS``; the precision of the weights.
    steps : int
        The steps of the run.
    decay, strength : float
        The largest decay, and the largest lr x decay, of a step.
    asked, a : float
        -sum of lr x decay, <= 0, as the schedule asks, and as it will act; NaN where no such number
        exists, or where only the run can tell.
    part : float
        a / asked: the part that acts in this precision; NaN if it is not known, or nothing is
        asked.
    shrink : float
        The most by which decay makes a product smaller: ``1 - prod (1 - s)^2``, in [0, 1], s of
        the tensor on which most acts, of a mask where it is largest. Where all tensors decay
        alike it is 1 - e^{2a} up to the squares of s; NaN if it is not known, or s >= 1.
    law : Law
        What training by this optimizer keeps of a product.
    geometry : Geometry
        Whether decay changes which solution is preferred.
    target, needed : float
        A part, and the largest decay that makes products shrink by it at this schedule and these
        learning rates, where all of it acts; NaN if no decay does.
    factor : float
        needed / decay.
    notes : tuple of str
        The reasons for NaN, and what to do.
    """

    group: str
    optimizer: str
    kind: str
    dtype: str
    steps: int
    decay: float
    strength: float
    asked: float
    a: float
    part: float
    shrink: float
    law: Law
    geometry: Geometry
    target: float
    needed: float
    factor: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is NaN is None, as JSON has no NaN."""
        return _plain(asdict(self))


def outlook(
    scheduler: WeightDecayScheduler,
    index: int,
    name: str,
    curve: tuple[Sequence[float], Sequence[float], Sequence[float]],
    bounds: tuple[float, Sequence[float]],
    product: Product,
) -> Outlook:
    """Return what the decay of a set of tensors comes to.

    Parameters
    ----------
    scheduler : WeightDecayScheduler
        Whose targets have it in place ``index``.
    index : int
        The place.
    name : str
        Of the set.
    curve : (lr, decay, a)
        The learning rate, the decay, and a after each of the steps.
    bounds : (asked, most)
        -sum of lr x decay over these steps and before, if all of it acted; and, before them and
        after each, that of the tensor on which most of it acts.
    product : Product
        The scale of the products, and the target.
    """
    target, entry = scheduler.targets[index], scheduler.account.entries[index]
    group, (lrs, decays, sums) = scheduler.optimizer.param_groups[target.group], curve
    (asked, most), before = bounds, entry.accumulated
    a = sums[-1] if sums else before
    law = law_of(scheduler.optimizer, group)
    decay = max(decays, default=0.0)
    factor = _factor(before, asked, product.target)  # a is linear in the decay where all of it acts
    if isinstance(target.schedule, Feedback):
        factor = math.nan  # the loop decides: no multiple of its first decay says
    strengths = _strengths(lrs, decays, entry.coupling)
    return Outlook(
        name,
        type(scheduler.optimizer).__name__,
        "decoupled, from outside" if scheduler.decoupled else entry.coupling,
        _dtypes(target.params(group)),
        len(decays),
        decay,
        max(strengths, default=0.0),
        asked,
        a,
        # Of this run alone: both sums begin at what is there already.
        abs(a - before) / (before - asked) if asked < before else math.nan,
        _shrink(most),
        law,
        geometry(law, a, product.size, product.start),
        product.target,
        decay * factor,
        factor,
        _notes(scheduler, target, entry.coupling, (asked, a)),
    )


def _factor(before: float, asked: float, part: float) -> float:
    """Return the multiple of the decay that shrinks products by a part; NaN if none does."""
    wanted = 0.5 * math.log1p(-part)  # e^{2a} = 1 - part
    if not asked < before:
        return math.nan
    return max(0.0, (wanted - before) / (asked - before))  # a is linear in the decay


def _strengths(lrs: Sequence[float], decays: Sequence[float], coupling: str) -> list[float]:
    """Return lr x decay of each step, or the decay itself where that acts."""
    if coupling == "fixed":
        return list(decays)
    return [lr * decay for lr, decay in zip(lrs, decays, strict=True)]


def _shrink(sums: Sequence[float]) -> float:
    """Return 1 - e^{2 a_before} prod (1 - s)^2, of a before the steps and after each.

    NaN if a step takes weights to 0 or beyond, s >= 1.
    """
    left = math.exp(sums[0])
    for last, a in pairwise(sums):
        if (s := last - a) >= 1:  # the fall of a in a step
            return math.nan
        left *= 1 - s
    return 1 - left**2  # two factors


def _dtypes(params: Sequence[torch.Tensor]) -> str:
    """Return the names of the precisions."""
    return ", ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in params)) or "none"


def _notes(
    scheduler: WeightDecayScheduler,
    target: Target,
    coupling: str,
    sums: tuple[float, float],
) -> tuple[str, ...]:
    """Return why a number is not known, or not what was asked."""
    asked, a = sums
    if coupling not in COUNTED:
        return (_NO_SUM if coupling == "coupled" else f"its decay is {coupling}: no sum says it",)
    group = scheduler.optimizer.param_groups[target.group]
    params = target.params(group)
    halves = [p.dtype for p in params if p.dtype in HALF]
    name = str(halves[0]).removeprefix("torch.") if halves else ""
    mask = scheduler.plan.mask
    if mask is not None and a != asked:
        return (_BY_GRADIENT.format(mask) if isinstance(mask, str) else _BY_MASK,)
    if math.isnan(a):
        return (_why_unknown(scheduler.optimizer, group, name),)
    if halves and abs(a - asked) > 0.01 * abs(asked):
        return (_SWALLOWED.format(name, too_weak(halves[0])),)
    return ()


def _why_unknown(optimizer: Optimizer, group: Mapping[str, Any], half: str) -> str:
    """Return why a is not known, though a sum describes it; half is a precision, or empty."""
    if math.isnan(lr_of(group)):
        return _NO_LR.format(type(optimizer).__name__)
    return _GRADIENT.format(half) if half else _NO_START


# In words, and as a table


def sentences(outlooks: Sequence[Outlook]) -> tuple[str, str, str] | tuple[()]:
    """Return in three sentences what decay comes to in the set where it does most.

    Examples
    --------
    >>> sentences([])
    ()
    """
    if not outlooks:
        return ()
    first = max(outlooks, key=lambda found: (abs(found.asked) if found.asked else 0.0, found.decay))
    return _amount(first, len(outlooks)), _effect(first), _need(first)


def _amount(found: Outlook, sets: int) -> str:
    """Return how much decay there is, and how much of it acts."""
    where = f"Group {_cut(found.group, 40)}: " if sets > 1 else ""
    head = f"{where}{found.optimizer}'s decay of {found.decay:.3g} over {found.steps:,} steps"
    if math.isnan(found.a):
        return f"{head} has no a that is known before the run: {'; '.join(found.notes)}."
    total = f"{head} comes to a = {found.a:.3g} (-sum of lr x decay)"
    if math.isnan(found.part) or abs(found.part - 1) < 1e-3:
        return f"{total}; all of it acts in {found.dtype}."
    why = f": {found.notes[0]}" if found.notes else ""
    return f"{total}, {100 * found.part:.3g}% of what is asked{why}."


_MOVES = {
    "still": "its geometry does not move",
    "before": "its geometry is there without decay, at this size and start",
    "moving": "its geometry moves, and not far enough for this size and start",
    "arrived": "its geometry moves as far as this law lets it, at this size and start",
    "unknown": "whether its geometry moves enough depends on the product's size and start",
}


def _effect(found: Outlook) -> str:
    """Return what that does to a product, and by which law."""
    law = f"the law of {found.law.name} holds: " if found.law.name != "not known" else ""
    if found.law.name == "sign descent":
        law = f"at best {law}"  # Adam is near it, and stores less: docs/beyond.md
    size = f"A product of two weights shrinks by {_percent(found.shrink)} at most"
    if math.isnan(found.shrink):
        size = "How far a product shrinks is not known"
    if found.strength >= 1:
        size = (
            f"A step with lr x decay = {found.strength:.3g} takes weights to 0 or beyond, so that "
            "it has to stay below 1"
        )
    moves = _MOVES[found.geometry.state]
    return f"{size}, and {moves}; under {found.optimizer} {law}{found.law.stores}."


def _need(found: Outlook) -> str:
    """Return which decay would do what is aimed at."""
    aim = f"For a product to shrink by {_percent(found.target)}"
    if math.isnan(found.needed):
        return f"{aim} no decay can be named before the run: {_why_not(found)}."
    if found.factor <= 1:
        return f"{aim} a decay of {found.needed:.3g} is enough, {found.factor:.2g} of this one."
    text = f"{aim} the decay has to be {found.needed:.3g}, {found.factor:,.3g} times this one"
    if not math.isnan(found.geometry.needed) and found.geometry.state != "before":
        text += f" (for the geometry a = {found.geometry.needed:.2g} is needed)"
    return f"{text}, if all of it acts." if found.part <= 0.9 else f"{text}."


def _why_not(found: Outlook) -> str:
    """Return why no decay is known to reach the target."""
    if math.isnan(found.asked):
        return "no a is known that it could be read from"
    return "nothing decays here" if found.strength == 0 else "its closed loop decides in the run"


def _percent(part: float) -> str:
    """Return a part in percent, of three digits."""
    return "nan" if math.isnan(part) else f"{100 * part:.3g}%"


_HEAD = ("group", "dtype", "lr*decay", "acts", "a", "shrink", "geometry", "needed")


def outlook_table(outlooks: Sequence[Outlook], width: int = WIDTH) -> str:
    """Return a row for each set of tensors, no wider than a terminal.

    Long names of groups lose their middle.

    Examples
    --------
    >>> print(outlook_table([]))
    group  dtype  lr*decay  acts  a  shrink  geometry  needed
    """
    cells = [_HEAD, *(_row(found) for found in outlooks)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    room = width - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(room, 5))
    lines = (
        "  ".join(_cut(c, w).ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _row(found: Outlook) -> tuple[str, ...]:
    """Return the cells of a row."""
    dtype = found.dtype.replace("bfloat", "bf").replace("float", "fp")
    return (
        found.group,
        _cut(dtype, 10),
        f"{found.strength:.3g}",
        _percent(found.part),
        f"{found.a:.3g}",
        _percent(found.shrink),
        found.geometry.state,
        f"{found.needed:.3g}",
    )


def _cut(text: str, width: int) -> str:
    """Return a text with its middle left out where it is too long."""
    if len(text) <= width:
        return text
    keep = width - 2
    return f"{text[: keep - keep // 2]}..{text[len(text) - keep // 2 :]}"


def wrapped(lines: Sequence[str], width: int = WIDTH) -> str:
    r"""Return sentences as lines of a terminal, each beginning a new one.

    Examples
    --------
    >>> wrapped(["One sentence.", "Two."])
    'One sentence.\nTwo.'
    """
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in lines)


def _plain(value: Any) -> Any:
    """Return a value for JSON."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
