r"""Runge-Kutta-Chebyshev steps: explicit, and stable over a stretch that grows like s^2.

A gradient flow in dual coordinates has a Jacobian with real, negative eigenvalues, stiff once
coordinates have grown: s stages reach about 0.65 s^2 / lambda, where s Runge-Kutta steps of order
4 reach 0.7 s / lambda. Formulas: Sommeijer, Shampine and Verwer, "RKC: an explicit solver for
parabolic PDEs", J. Comp. Appl. Math. 88 (1998), order 2, damping 2/13.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

__all__ = ["MAX_STAGES", "Stages", "stages", "stages_for"]

MAX_STAGES = 25
DAMPING = 2 / 13


@dataclass(frozen=True)
class Stages:
    """The coefficients of s stages.

    Attributes
    ----------
    first : float
        Of the first stage.
    rest : tuple of (mu, nu, mu_tilde, gamma_tilde)
        Of the stages 2 to s.
    times : tuple of float
        The times of the stages 1 to s, as fractions of the step.
    reach : float
        The largest stable h * lambda.
    """

    first: float
    rest: tuple[tuple[float, float, float, float], ...]
    times: tuple[float, ...]
    reach: float


@cache
def stages(s: int) -> Stages:
    """Give the coefficients for s >= 2 stages."""
    w0 = 1 + DAMPING / s**2
    T, D, D2 = _chebyshev(s, w0)
    w1 = D[s] / D2[s]
    b = [0.0, 0.0, *(D2[j] / D[j] ** 2 for j in range(2, s + 1))]
    b[0] = b[1] = b[2]
    rest = []
    for j in range(2, s + 1):
        mu, nu, mu_tilde = 2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2], 2 * b[j] * w1 / b[j - 1]
        rest.append((mu, nu, mu_tilde, -(1 - b[j - 1] * T[j - 1]) * mu_tilde))
    first = b[1] * w1
    return Stages(first, tuple(rest), _times(first, rest), (w0 + 1) * D2[s] / D[s])


def stages_for(stretch: float) -> Stages:
    """Give the fewest stages that are stable for h * lambda = ``stretch``, up to MAX_STAGES."""
    s = 2
    while s < MAX_STAGES and stages(s).reach < stretch:
        s += 1
    return stages(s)


def _chebyshev(s: int, w: float) -> tuple[list[float], list[float], list[float]]:
    """Give the Chebyshev polynomials T_0 to T_s at w, and their first two derivatives."""
    T, D, D2 = [1.0, w], [0.0, 1.0], [0.0, 0.0]
    for _ in range(2, s + 1):
        D2.append(2 * w * D2[-1] - D2[-2] + 4 * D[-1])
        D.append(2 * w * D[-1] - D[-2] + 2 * T[-1])
        T.append(2 * w * T[-1] - T[-2])
    return T, D, D2


def _times(first: float, rest: list[tuple[float, float, float, float]]) -> tuple[float, ...]:
    """Apply the stages to y' = 1: the times at which they evaluate."""
    times = [0.0, first]
    for mu, nu, mu_tilde, gamma in rest:
        times.append(mu * times[-1] + nu * times[-2] + mu_tilde + gamma)
    return tuple(times[1:])
