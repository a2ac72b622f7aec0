"""The loss of linear measurements, which flows and end points can treat in n dual numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LeastSquares", "slope"]


@dataclass(frozen=True, eq=False)
class LeastSquares:
    r"""f(x) = ``|Z x - y|^2 / (2n)``, for vectors x, or matrices with Z of shape (n, p, q).

    Parameters
    ----------
    Z : Tensor of shape (n, d) or (n, p, q)
        The measurements; <Z_i, x> is the i-th prediction.
    y : Tensor of shape (n,)
        The targets.
    """

    Z: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        """Check shapes and finiteness."""
        for name, value in (("Z", self.Z), ("y", self.y)):
            if not isinstance(value, Tensor):
                raise TypeError(f"LeastSquares: {name} must be a tensor, got {type(value)}")
        if self.Z.ndim not in (2, 3) or self.y.ndim != 1 or len(self.Z) != len(self.y):
            got = f"Z {tuple(self.Z.shape)} and y {tuple(self.y.shape)}"
            raise ValueError(f"LeastSquares: Z must be (n, d) or (n, p, q) and y (n,), got {got}")
        for name, value in (("Z", self.Z), ("y", self.y)):
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"LeastSquares: {name} must be finite, got NaN or infinite entries"
                )

    def require(self, x: Tensor, caller: str) -> None:
        """Raise an error if Z does not measure x = g(w0), by shape and dtype."""
        if self.Z.shape[1:] != x.shape:
            raise ValueError(
                f"{caller}: Z must be (n, {', '.join(map(str, x.shape))}) to measure g(w0), "
                f"got {tuple(self.Z.shape)}"
            )
        if not self.Z.dtype == self.y.dtype == x.dtype:
            raise TypeError(
                f"{caller}: w0, Z and y must have one dtype, got {x.dtype}, {self.Z.dtype}, "
                f"{self.y.dtype}"
            )

    def predict(self, x: Tensor) -> Tensor:
        """Return Z x, of shape (n,)."""
        return self.Z.reshape(len(self.y), -1) @ x.reshape(-1)

    def transpose(self, r: Tensor) -> Tensor:
        """Return Z^T r, with the shape of x."""
        return (r @ self.Z.reshape(len(self.y), -1)).reshape(self.Z.shape[1:])

    def dual_gradient(self, prediction: Tensor) -> Tensor:
        """Return the derivative of the loss in the predictions, (Zx - y)/n."""
        return (prediction - self.y) / len(self.y)

    def gradient(self, x: Tensor) -> Tensor:
        """Return grad f(x) = Z^T (Zx - y) / n."""
        return self.transpose(self.dual_gradient(self.predict(x)))

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate f(x)."""
        r = self.predict(x) - self.y
        return (r * r).sum() / (2 * len(self.y))


def slope(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return grad f(x) by automatic differentiation, of a loss that returns one number."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        value = loss(point)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss must return a tensor of one number, got {got}")
        if not value.requires_grad:
            raise ValueError(
                "loss must return a number with a gradient in x, got one without. Compute it with "
                "torch, without detach or item; for no loss at all write 0 * x.sum()."
            )
        (gradient,) = torch.autograd.grad(value.sum(), point, materialize_grads=True)
    return gradient
