r"""The smallest factor of a deep product as a function of the dual variable, and back, in NumPy.

Along the flow of x = w_1 ... w_k the differences w_i^2 - w_j^2 stay. With q the smallest factor,
turned so that it has the sign of x, and c_i = w_i^2 - q^2 >= 0 of the others,

.. math:: x = q \prod_{i \ge 2} \sqrt{q^2 + c_i}, \qquad
          \frac{dq}{d\nu} = \prod_{i \ge 2} \sqrt{q^2 + c_i},

smooth also where q crosses 0. All maps here follow from the integral `tail` of the second equation
and from addition formulas in t with q = sqrt(c_2) sinh(t), or q = e^t where c_2 = 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import elliprf

__all__ = [
    "advance",
    "factor_from_product",
    "factor_from_tail",
    "factors_at",
    "tail",
    "trapezoid",
]

Array = NDArray[np.float64]
STEPS = 100  # Newton's methods below take 3 to 9, from whatever start
SPACING = 0.4  # of the trapezoidal rule in log s: its error is about exp(-2 pi^2 / SPACING) = 4e-22
LOST = 37.0  # log of the relative size at which the ends of an integrand are cut off


def factors_at(q: Array, c: Array) -> Array:
    """Return the sizes of all factors, ascending; ``c`` (k, ...) begins with a row of zeros."""
    # w_i = sqrt(q^2 + c_i)
    return np.hypot(q, np.sqrt(c.reshape(len(c), *[1] * (q.ndim - c.ndim + 1), *c.shape[1:])))


def tail(w: Array) -> Array:
    r"""Return int_q^inf dq / prod_{i >= 2} sqrt(q^2 + c_i) for q >= 0, from the factors w (k, ...).

    The substitution s = q'^2 - q^2 makes it the symmetric integral
    1/2 int_0^inf ds / prod_i sqrt(s + w_i^2), Carlson's R_F for three factors (DLMF 19.16.1) and,
    by DLMF 19.29.4, for four. Infinite where two factors are 0.
    """
    w = np.sort(w, axis=0)
    size = np.where(w[-1] > 0, w[-1], 1.0)
    return size ** (2.0 - len(w)) * _unit_tail(w / size)  # s -> size^2 s in the integral


def _unit_tail(w: Array) -> Array:
    """Return the integral for factors whose largest is 1."""
    if len(w) == 3:
        return elliprf(*(w * w))  # DLMF 19.16.1
    if len(w) == 4:
        pairs = ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))
        # DLMF 19.29.4 over (0, inf): U_ij = w_i w_j + w_m w_n for the three pairings of four.
        return elliprf(*((w[i] * w[j] + w[m] * w[n]) ** 2 for i, j, m, n in pairs))
    return trapezoid(w)


def trapezoid(w: Array) -> Array:
    r"""Return 1/2 int e^y / prod sqrt(e^y + w_i^2) dy over all y = log s.

    The integrand is analytic for |Im y| < pi, whatever the factors are, so that the trapezoidal
    rule converges like exp(-2 pi^2 / h) (Trefethen and Weideman 2014).
    """
    with np.errstate(divide="ignore"):
        logs = 2 * np.log(w[:2])
    # It rises like e^y below w_1^2 and like e^{y/2} below w_2^2; it falls like e^{(1 - k/2) y}.
    low = np.maximum(logs[0] - LOST, logs[1] - 2 * LOST)
    finite = np.isfinite(low)  # w_1 = w_2 = 0: the integrand tends to a constant, not to 0
    low = np.where(finite, low, -1.0)
    high = LOST / (len(w) / 2 - 1)  # the fall begins at the largest factor, which is 1
    count = int(np.ceil(np.max(high - low, initial=1.0) / SPACING))
    step = (high - low) / count
    s = np.exp(low + step * np.arange(count + 1).reshape(-1, *[1] * low.ndim))
    root = np.ones_like(s)
    for wi in w:
        root *= s + wi * wi
    return np.where(finite, 0.5 * step * (s / np.sqrt(root)).sum(0), np.inf)  # ds = s dy


def factor_from_tail(target: Array, c: Array) -> Array:
    r"""Return q >= 0 with the given `tail`, at most that of q = 0.

    In t the tail is a survival function with a log-concave density, therefore log-concave itself:
    Newton's method for log tail = log target comes down monotonically from the right, where
    q = ((k-2) target)^{-1/(k-2)} lies, since prod sqrt(q^2 + c_i) >= q^{k-1}.
    """
    power = len(c) - 2
    q = (power * target) ** (-1 / power)  # the tail for c = 0 is q^{2-k} / (k - 2)
    for _ in range(STEPS):
        w = factors_at(q, c)
        now = tail(w)
        # d tail / dt = -1 / prod_{i >= 3} w_i
        # (log now - log target) / |d log tail / dt|
        step = np.log(now / target) * now * _product(w[2:])
        step = np.where(np.isfinite(step), step, 0.0)  # q = inf, or 0 from both sides
        q = np.maximum(advance(q, w[1], step), 0.0)
        if not np.abs(step).max(initial=0.0) > 1e-7:  # the next would be its square
            break
    return q


def factor_from_product(x: Array, c: Array) -> Array:
    r"""Return q with q prod sqrt(q^2 + c_i) = x.

    log |x| is convex and increasing in log q, with slopes from 1 to k: Newton's method comes down
    monotonically from the right, where the smaller of |x|^{1/k} and |x| / prod sqrt(c_i) lies.
    """
    k, size = len(c), np.abs(x)
    wide = c.reshape(k, *[1] * (x.ndim - c.ndim + 1), *c.shape[1:])
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        straight = size / np.sqrt(_product(wide[1:]))  # x = q prod sqrt(c_i) for small q
        q = np.where(size > 0, np.fmin(size ** (1 / k), straight), 0.0)
        for _ in range(STEPS):
            w = np.maximum(factors_at(q, c), 1e-320)
            slope = 1 + ((q / w[1:]) ** 2).sum(0)  # d log|x| / d log q = 1 + sum q^2 / w_i^2
            step = (np.log(w).sum(0) - np.log(size)) / slope
            step = np.where(np.isfinite(step), step, 0.0)  # x = 0 or infinite
            q = q * np.exp(-step)
            if not np.abs(step).max(initial=0.0) > 1e-8:
                break
    return np.copysign(q, x)


def advance(q: Array, second: Array, step: Array) -> Array:
    """Return q after ``step`` in t: sqrt(c_2) sinh(t + step), or q e^{+-step} where c_2 = 0.

    ``second`` is sqrt(q^2 + c_2), so that the addition formula of sinh serves both cases.
    """
    # For c_2 = 0 the sign is that of q: x and nu rise with t in both cases.
    return q * np.cosh(step) + second * np.sinh(step)


def _product(w: Array) -> Array:
    """Return the product over the first dimension."""
    return np.multiply.reduce(w, axis=0)
