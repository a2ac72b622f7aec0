"""Points along the flow of a pair, and random directions, for the tests of conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import DOP853
from torch import Tensor

from ..regularizer import Regularizer, detached_gradient
from ..reparam import Parameters, Reparam, flatten, unflatten

__all__ = ["Probe", "lengths", "norm"]

MAX_EVALUATIONS = 600  # a flow that needs more is about to blow up, or chatters at a kink


class Probe:
    """A pair with random combinations of g, and points along its flow."""

    def __init__(
        self, g: Reparam, h: Regularizer, w0: Parameters, sensing: Tensor | None, seed: int
    ) -> None:
        self.g, self.h, self.w0 = g, h, w0
        self.random = torch.Generator().manual_seed(seed)
        self.sensing = None if sensing is None else g.project(sensing.to(torch.float64))
        self.shape = g(w0).shape
        self.elementwise = g.elementwise and h.elementwise
        self.points = [w0, *self._reached()]

    def direction(self) -> Tensor:
        """Draw a direction in x that a gradient can have."""
        if self.sensing is None:
            return self.g.project(self.normal(self.shape))
        return torch.einsum("i,i...->...", self.normal((len(self.sensing),)), self.sensing)

    def normal(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def field(self, p: Tensor) -> Callable[[Parameters], Parameters]:
        """Return the vector field grad (p . g)."""
        return torch.func.grad(lambda w: (p * self.g(w)).sum())

    def penalty(self) -> Callable[[Parameters], Parameters]:
        """Return the vector field grad h."""
        return lambda w: self.h.gradient(w, self.g)

    def steps(self, scale: float) -> tuple[Tensor, float]:
        """Draw (mu, a), a < 0, that move w by about ``scale`` times its size."""
        p, size = self.direction(), norm(self.w0)
        speed, decay = norm(self.g.pullback(self.w0, p)), norm(self.penalty()(self.w0))
        a = -0.5 * scale * size / decay if decay > 0 else -scale
        return p * (scale * size / speed if speed > 0 else 1.0), a

    def near(self, w: Parameters) -> Parameters:
        """Return a random point near w, at a distance of about a third of its size."""
        flat = flatten(w)
        size = norm(w) / len(flat) ** 0.5 or 1.0
        return unflatten(flat + 0.3 * size * self.normal(flat.shape), self.w0)

    def move(self, w: Parameters, mu: Tensor, a: float) -> Parameters | None:
        """Follow dw = J^T mu + a grad h over unit time; None if the flow ends before."""
        pulled, decays = bool(mu.any()), a != 0  # derivatives of what does not act cost as much

        def velocity(_: float, flat: np.ndarray) -> np.ndarray:
            here, speed = unflatten(torch.from_numpy(flat), self.w0), torch.zeros(len(flat))
            if pulled:
                speed = flatten(self.g.pullback(here, mu))
            if decays:
                speed = speed + a * flatten(detached_gradient(self.h, here, self.g))
            return speed.to(torch.float64).numpy()

        if not np.isfinite(velocity(0.0, flatten(w).numpy())).all():
            return None  # SciPy's first step would be NaN, and never end
        with np.errstate(all="ignore"):
            atol = 1e-12 * (min(1.0, norm(w)) or 1.0)  # tiny weights are followed as well
            solver = DOP853(
                velocity, 0.0, flatten(w).numpy(), 1.0, rtol=1e-10, atol=max(atol, 1e-140)
            )
            while solver.status == "running" and solver.nfev < MAX_EVALUATIONS:
                solver.step()
        end = torch.from_numpy(solver.y.copy())
        there = solver.status == "finished" and bool(torch.isfinite(end).all())
        return unflatten(end, self.w0) if there else None

    def _reached(self) -> list[Parameters]:
        """Return points that the flow reaches, near and farther away."""
        moved = [self.move(self.w0, *self.steps(scale)) for scale in (0.1, 0.3, 1.0)]
        return [w for w in moved if w is not None]


def norm(w: Parameters) -> float:
    """Return the Euclidean norm of all factors."""
    return float(lengths(flatten(w)))


def lengths(v: Tensor) -> Tensor:
    """Return Euclidean norms over the first dimension, also where squares would underflow."""
    peak = v.abs().amax(0)
    return peak * torch.linalg.vector_norm(v / torch.where(peak > 0, peak, 1.0), dim=0)
