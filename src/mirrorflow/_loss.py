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
    y : Tensor of shape (n,), or (n, m) with Z of shape (n, d)
        The targets. m columns are m problems at once: x is then of shape (m, d), a row for each,
        and f is the sum of their losses, whose gradient takes two matrix products.

    Examples
    --------
    >>> Z, y = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[1.0, -1.0]])
    >>> LeastSquares(Z, y).gradient(torch.zeros(2, 3))
    tensor([[-1.0000, -2.0000, -0.5000],
            [ 1.0000,  2.0000,  0.5000]])
    """

    Z: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        """Check shapes and finiteness."""
        for name, value in (("Z", self.Z), ("y", self.y)):
            if not isinstance(value, Tensor):
                raise TypeError(f"LeastSquares: {name} must be a tensor, got {type(value)}")
        got = f"Z {tuple(self.Z.shape)} and y {tuple(self.y.shape)}"
        if (self.Z.ndim, self.y.ndim) == (3, 2):
            raise ValueError(
                f"LeastSquares: y must be (n,) for matrices x, got {got}. Make one for each column."
            )
        shapes = (self.Z.ndim, self.y.ndim) in ((2, 1), (3, 1), (2, 2))
        if not shapes or len(self.Z) != len(self.y) or (self.several and not self.y.shape[1]):
            raise ValueError(
                "LeastSquares: Z must be (n, d) or (n, p, q) and y (n,), or (n, m) with Z (n, d), "
                f"got {got}"
            )
        for name, value in (("Z", self.Z), ("y", self.y)):
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"LeastSquares: {name} must be finite, got NaN or infinite entries"
                )

    @property
    def several(self) -> bool:
        """Return whether y has columns, and x a row for each."""
        return self.y.ndim == 2

    def require(self, x: Tensor, caller: str) -> None:
        """Raise an error if Z does not measure x = g(w0), by shape and dtype."""
        rows = (self.y.shape[1], self.Z.shape[1]) if self.several else None
        if rows and x.shape != rows:
            raise ValueError(
                f"{caller}: g(w0) must be {rows}, a row for each column of y, got "
                f"{tuple(x.shape)}. Repeat one start by w0.expand({rows[0]}, -1)."
            )
        if not rows and self.Z.shape[1:] != x.shape:
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
        """Return Z x, with the shape of y."""
        if self.several:
            return self.Z @ x.mT
        return self.Z.reshape(len(self.y), -1) @ x.reshape(-1)

    def transpose(self, r: Tensor) -> Tensor:
        """Return Z^T r, with the shape of x."""
        if self.several:
            return r.mT @ self.Z
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
