"""A parametrization of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .model import Parameters, Reparam, factors

__all__ = ["CustomReparam"]


class CustomReparam(Reparam):
    """x = fn(w) for a torch function that torch.func can trace.

    Parameters
    ----------
    fn : callable
        Takes what is passed as w0 (a tensor or a tuple of tensors) and returns a tensor.
    elementwise : bool
        Promise that x_i depends on the i-th entries of the factors only; `check` tests it.
        It makes R_a available for many coordinates.
    """

    def __init__(self, fn: Callable[[Any], Tensor], elementwise: bool = False) -> None:
        if not callable(fn):
            raise TypeError(f"CustomReparam: fn must be callable, got {type(fn).__name__}")
        self.fn = fn
        self.elementwise = elementwise

    def __call__(self, w: Parameters) -> Tensor:
        """Call fn."""
        return self.fn(w)

    def why_not_elementwise(self) -> str:
        """Return what to promise."""
        return (
            f"{self} is not marked elementwise. Pass elementwise=True to CustomReparam if x_i "
            "depends on the i-th entries of the factors only"
        )

    def validate(self, w: Parameters) -> None:
        """Take any number of factors."""
        self.names = tuple(f"w{i + 1}" for i in range(len(factors(w))))
        super().validate(w)
        x = self.fn(w)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{self}: fn(w) must be a torch tensor, got {type(x).__name__}. Compute it from w "
                "with torch operations."
            )
        if self.elementwise and x.shape != factors(w)[0].shape:
            got = f"{tuple(x.shape)} for {tuple(factors(w)[0].shape)}"
            raise ValueError(
                f"{self}: fn(w) must have the shape of the factors, got {got}. Leave "
                "elementwise=True out."
            )

    def __repr__(self) -> str:
        """Show the function's name."""
        return f"CustomReparam({getattr(self.fn, '__name__', 'fn')})"
