r"""The degree of a homogeneous model, by automatic differentiation and by scaling."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reparam import Parameters, Reparam, flatten, unflatten

__all__ = ["homogeneity_degree"]

TOLERANCE = 1e-9  # relative, in float64
POINTS = 6
SPREAD = 0.3  # of the points around w0, relative to its entries
STRETCH = (0.5, 1.25, 3.0)  # factors that confirm g(c w) = c^k g(w)


def homogeneity_degree(g: Reparam, w0: Parameters, seed: int = 0) -> float | None:
    r"""Return the k with g(c w) = c^k g(w) for c > 0, or None if there is none.

    Euler's relation <w, grad (p . g)> = k p . g gives k at random points and for random p; scaling
    the points confirms it.

    Parameters
    ----------
    g : Reparam
        The parametrization.
    w0 : Tensor or tuple of Tensor
        A point. Others are drawn around it, scaled to size 1, with the signs that it has.
    seed : int
        Of the random points.

    Returns
    -------
    float or None
        k, rounded to an integer where it is one to 1e-9. 0 for log u - log v, for instance.

    Examples
    --------
    >>> from mirrorflow import Depth, LogRatio
    >>> w0 = tuple(torch.rand(3, 4, dtype=torch.float64) + 0.5)
    >>> homogeneity_degree(Depth(3), w0), homogeneity_degree(LogRatio(), w0[:2])
    (3.0, 0.0)
    """
    flat = flatten(w0).detach().to(torch.float64)
    flat = flat / flat.abs().max().clamp(min=1e-300)  # powers of tiny weights would underflow
    random = torch.Generator().manual_seed(seed)
    left, right, size = [], [], []
    for _ in range(POINTS):
        w = _near(flat, random)
        p = torch.randn(g(unflatten(w, w0)).shape, generator=random, dtype=torch.float64)
        x, slope = _with_slope(g, w0, w, p)
        left.append(w @ slope)  # Euler: <w, J^T p> = k <p, x>
        right.append((p * x).sum())
        size.append(torch.linalg.vector_norm(w) * torch.linalg.vector_norm(slope))
    euler, values, scale = (torch.stack(v) for v in (left, right, size))
    if not (torch.isfinite(euler).all() and torch.isfinite(values).all() and values.any()):
        return None
    k = _rounded(float((euler @ values) / (values @ values)))
    off = (euler - k * values).abs() <= TOLERANCE * scale
    return k if bool(off.all()) and _confirmed(g, w0, _near(flat, random), k) else None


def _with_slope(g: Reparam, w0: Parameters, w: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return g(w), and J^T p of automatic differentiation (the class may define half of it)."""
    with torch.enable_grad():
        at = w.clone().requires_grad_()
        x = g(unflatten(at, w0))
        (slope,) = torch.autograd.grad((p * x).sum(), at, materialize_grads=True)
    return x.detach(), slope


def _near(flat: Tensor, random: torch.Generator) -> Tensor:
    """Return a point near w0 with its signs; entries that are 0 move as well."""
    noise = torch.randn(flat.shape, generator=random, dtype=torch.float64)
    moved = flat * torch.exp(SPREAD * noise)
    return torch.where(flat == 0, SPREAD * flat.abs().mean() * noise, moved)


def _rounded(k: float) -> float:
    """Return the integer next to k, if rounding explains the difference."""
    return float(round(k)) if abs(k - round(k)) < TOLERANCE else k


def _confirmed(g: Reparam, w0: Parameters, w: Tensor, k: float) -> bool:
    """Return whether g(c w) = c^k g(w)."""
    x = g(unflatten(w, w0))
    for c in STRETCH:
        scaled = g(unflatten(c * w, w0))
        size = torch.linalg.vector_norm(scaled) + c**k * torch.linalg.vector_norm(x)
        if not torch.linalg.vector_norm(scaled - c**k * x) <= TOLERANCE * size:
            return False
    return True
