"""What the stored experiments show, in numbers that a recommendation rests on."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

__all__ = [
    "Arm",
    "Curve",
    "CutArm",
    "Fall",
    "Recovery",
    "RecoveryArm",
    "Study",
    "curves",
    "falls",
    "recoveries",
    "studies",
]


@dataclass(frozen=True)
class Arm:
    """A run of a study, by its means over the seeds.

    Parameters
    ----------
    run : str
        Its name on the page of results.
    off : float
        The part of the run after which decay was off, in (0, 1]; 1 where it was kept.
    a : float
        -sum of lr x decay, <= 0.
    ratio : float
        Nuclear over Frobenius norm of the products at the end; NaN where it was not measured.
    loss : float
        Of validation, at the end.
    gap, interval : float
        Loss minus the loss without decay, within a seed, and its 95% interval; NaN of one seed.
    """

    run: str
    off: float
    a: float
    ratio: float
    loss: float
    gap: float
    interval: float

    @property
    def dearest(self) -> float:
        """The largest gap that the seeds allow for; infinite of one seed."""
        return math.inf if math.isnan(self.interval) else self.gap + self.interval


@dataclass(frozen=True)
class Study:
    """Trainings of one network under several decays.

    Parameters
    ----------
    result : str
        The folder of results.
    title, product, optimizer : str
        What was trained, which products were measured ("lora" or "attention"), and by what.
    steps, seeds : int
        The steps of a run, and how many seeds there are.
    arms : tuple of Arm
        The runs.
    """

    result: str
    title: str
    product: str
    optimizer: str
    steps: int
    seeds: int
    arms: tuple[Arm, ...]

    @property
    def none(self) -> Arm:
        """The runs without decay."""
        return next(arm for arm in self.arms if arm.a == 0)


@dataclass(frozen=True)
class CutArm(Arm):
    """A run whose products were truncated at its end.

    Parameters
    ----------
    run, off, a, ratio, loss, gap, interval
        As of `Arm`, before the truncation.
    cut, after : tuple of float
        The loss as truncated, and after more steps, for each part of the ranks that is kept.
    cost, spread : tuple of float
        By how much truncation raised the loss of a model, and its 95% interval.
    """

    cut: tuple[float, ...]
    after: tuple[float, ...]
    cost: tuple[float, ...]
    spread: tuple[float, ...]


@dataclass(frozen=True)
class Curve(Study):
    """A study whose runs were truncated at their ends.

    Parameters
    ----------
    result, title, product, optimizer, steps, seeds
        As of `Study`.
    arms : tuple of CutArm
        The runs.
    kept : tuple of float
        The parts of the ranks that were kept, in (0, 1).
    """

    arms: tuple[CutArm, ...]
    kept: tuple[float, ...]

    @property
    def none(self) -> CutArm:
        """The runs without decay."""
        return next(arm for arm in self.arms if arm.a == 0)

    def nearest(self, part: float) -> int:
        """Return the place of the stored part that is nearest to one."""
        return min(range(len(self.kept)), key=lambda place: abs(self.kept[place] - part))


@dataclass(frozen=True)
class RecoveryArm:
    """A run that recovers a known truth: the median of |x - x*| over the seeds, at the end."""

    run: str
    off: float
    a: float
    error: float


@dataclass(frozen=True)
class Recovery:
    """Trainings whose solution is known.

    Parameters
    ----------
    result, title : str
        The folder of results, and what was trained.
    product : str
        "m*w", or "factor" (U U^T).
    seeds : int
        How many problems there are.
    arms : tuple of RecoveryArm
        The runs.
    """

    result: str
    title: str
    product: str
    seeds: int
    arms: tuple[RecoveryArm, ...]


@dataclass(frozen=True)
class Fall:
    """How far decay lowered the ratio of a model that was trained before.

    Parameters
    ----------
    result, title, product, optimizer, seeds
        As of `Study`.
    a : float
        -sum of lr x decay of the strongest decay, <= 0.
    fall, interval : float
        Of the ratio, from the weakest decay to that one, and its 95% interval.
    """

    result: str
    title: str
    product: str
    optimizer: str
    seeds: int
    a: float
    fall: float
    interval: float


@cache
def _tables() -> dict[str, Any]:
    """Return the tables of evidence.toml."""
    text = resources.files(__package__ or "").joinpath("evidence.toml")
    return tomllib.loads(text.read_text(encoding="utf-8"))


def studies(product: str) -> tuple[Study, ...]:
    """Return the studies of a kind of product, those of several seeds first.

    Examples
    --------
    >>> [study.seeds for study in studies("lora")]
    [5, 5, 1]
    """
    found = [
        Study(**{**table, "arms": tuple(Arm(**arm) for arm in table["arms"])})
        for table in _tables()["study"]
        if table["product"] == product
    ]
    return tuple(sorted(found, key=lambda study: -study.seeds))


def curves(product: str) -> tuple[Curve, ...]:
    """Return the curves of truncation of a kind of product.

    Examples
    --------
    >>> [curve.kept for curve in curves("attention")]
    [(0.75, 0.5, 0.25), (0.75, 0.5, 0.25)]
    """
    found = []
    for table in _tables()["curve"]:
        arms = tuple(CutArm(**_frozen(arm)) for arm in table["arms"])
        if table["product"] == product:
            found.append(Curve(**{**_frozen(table), "arms": arms}))
    return tuple(found)


def _frozen(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table with tuples for its lists."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}


def recoveries(product: str) -> tuple[Recovery, ...]:
    """Return the recoveries by a kind of product.

    Examples
    --------
    >>> [found.seeds for found in recoveries("m*w")]
    [3]
    """
    return tuple(
        Recovery(**{**table, "arms": tuple(RecoveryArm(**arm) for arm in table["arms"])})
        for table in _tables()["recovery"]
        if table["product"] == product
    )


def falls(product: str, optimizer: str) -> tuple[Fall, ...]:
    """Return what is stored of models that were trained before.

    Examples
    --------
    >>> [found.seeds for found in falls("attention", "AdamW")]
    [3]
    """
    found = [Fall(**table) for table in _tables()["fall"]]
    return tuple(f for f in found if (f.product, f.optimizer) == (product, optimizer))
