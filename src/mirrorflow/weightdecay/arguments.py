"""Numbers among the arguments: as Python has them, and refused where they cannot be meant."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

__all__ = ["as_float", "number", "whole"]


def whole(name: str, value: Any, low: int = 1) -> int:
    """Give a whole number that is not too small.

    Examples
    --------
    >>> whole("steps", 1e3)
    1000
    """
    number: Any = value
    known = isinstance(value, Real) and not isinstance(value, bool)
    if known and number >= low and float(number).is_integer():
        return int(number)
    raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")


def number(name: str, value: Any, low: float, strict: bool = False) -> float:
    """Give a finite number that is not too small."""
    number = as_float(name, value)
    if not math.isfinite(number) or number < low or (strict and number == low):
        raise ValueError(
            f"{name} must be a number {'>' if strict else '>='} {low:g}, got {value!r}"
        )
    return number


def as_float(name: str, value: Any) -> float:
    """Give a Python float."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # of a tensor with several elements
        raise TypeError(f"{name} must be a number, got {value!r}") from error
