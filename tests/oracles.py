"""What the tests trust instead of the package: NumPy, SciPy, and loops written out.

Nothing here imports mirrorflow. Parameters are one flat NumPy vector ``w``; a `Field` gives g(w),
J_g(w)^T s and grad h(w) as the papers write them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.integrate import solve_ivp

RTOL, ATOL = 1e-11, 1e-14


@dataclass(frozen=True)
class Field:
    """g, J_g^T and grad h on flat vectors; ``x`` is flat too."""

    g: Callable
    pull: Callable
    decay: Callable

    def jacobian(self, w):
        """Return J_g^T as a matrix, column by column."""
        return np.stack([self.pull(w, e) for e in np.eye(len(self.g(w)))], axis=1)


def elementwise(count, g, slopes, coefficients=None):
    """x = g(*factors) entry by entry, whose derivatives are slopes(*factors).

    h is weight decay, or has the terms of g, each times one of the coefficients.
    """

    def pull(w, s):
        return np.concatenate([slope * s for slope in slopes(*np.split(w, count))])

    def terms(w):
        parts = slopes(*np.split(w, count))
        return np.concatenate([c * slope for c, slope in zip(coefficients, parts, strict=True)])

    decay = (lambda w: w) if coefficients is None else terms
    return Field(lambda w: g(*np.split(w, count)), pull, decay)


def hadamard():
    return elementwise(2, lambda m, v: m * v, lambda m, v: (v, m))


def power(k, up=1.0, down=1.0, plain=False):
    """u^{2k} - v^{2k} with h = up u^{2k} + down v^{2k}, or plain weight decay."""
    n = int(2 * k)
    return elementwise(
        2,
        lambda u, v: u**n - v**n,
        lambda u, v: (n * u ** (n - 1), -n * v ** (n - 1)),
        None if plain else (up, -down),
    )


def log_ratio(plain=False):
    coefficients = None if plain else (1, -1)
    return elementwise(
        2, lambda u, v: np.log(u) - np.log(v), lambda u, v: (1 / u, -1 / v), coefficients
    )


def identity(linear):
    """x = w with h = sum w (linear) or 1/2 |w|^2."""
    return Field(lambda w: w, lambda w, s: s, np.ones_like if linear else (lambda w: w))


def exponential():
    """x = exp(w) with h = sum exp(w)."""
    return Field(np.exp, lambda w, s: s * np.exp(w), np.exp)


def quadratic(A):
    """x_i = 1/2 w^T A_i w with weight decay."""

    def matrix(s):
        return np.tensordot(s, A, axes=1)

    return Field(lambda w: 0.5 * (A @ w) @ w, lambda w, s: matrix(s) @ w, lambda w: w)


def squares(Q):
    """x = Q (w^2 / 2): every coordinate of x uses every parameter; weight decay."""
    return Field(lambda w: Q @ (w * w) / 2, lambda w, s: (Q.T @ s) * w, lambda w: w)


def symmetric(n):
    """X = U U^T with the paper's flow dU = -grad f(X) U - alpha U."""

    def pull(w, s):
        S = s.reshape(n, n)
        return ((S + S.T) / 2 @ w.reshape(n, -1)).ravel()

    def g(w):
        U = w.reshape(n, -1)
        return (U @ U.T).ravel()

    return Field(g, pull, lambda w: w)


def product(n, r, m):
    """X = A B with weight decay on both."""

    def cut(w):
        return w[: n * r].reshape(n, r), w[n * r :].reshape(r, m)

    def pull(w, s):
        (A, B), S = cut(w), s.reshape(n, m)
        return np.concatenate([(S @ B.T).ravel(), (A.T @ S).ravel()])

    return Field(lambda w: (cut(w)[0] @ cut(w)[1]).ravel(), pull, lambda w: w)


def depth(k):
    """x = w_1 * ... * w_k with weight decay."""

    def pull(w, s):
        parts = np.split(w, k)
        others = [np.prod([p for j, p in enumerate(parts) if j != i], axis=0) for i in range(k)]
        return np.concatenate([o * s for o in others])

    return Field(lambda w: np.prod(np.split(w, k), axis=0), pull, lambda w: w)


def integrate(velocity, state, start, end, breakpoints=(), times=None):
    """Integrate d state = velocity(t, state) dt, stopping at breakpoints; give rows at times."""
    edges = [start, *(b for b in breakpoints if start < b < end), end]
    wanted = np.array([end]) if times is None else np.asarray(times)
    rows = {}
    for left, right in pairwise(edges):
        at = wanted[(wanted >= left) & (wanted <= right)]

        def inside(t, y, left=left, right=right):
            return velocity(min(max(t, left), np.nextafter(right, left)), y)

        done = solve_ivp(
            inside, (left, right), state, method="DOP853", rtol=RTOL, atol=ATOL,
            t_eval=np.union1d(at, [right]),
        )  # fmt: skip
        assert done.success, done.message
        rows.update(zip(done.t, done.y.T, strict=True))
        state = done.y[:, -1]
    return np.array([rows[t] for t in wanted])


def train(field, w0, slope, rate, until, breakpoints=(), times=None):
    """Integrate dw = -(J^T grad f + alpha grad h) dt with mu and a; give rows (w, x, mu, a).

    ``a`` is integrated too, so that the schedule's own integral is not trusted.
    """
    size, d = len(w0), len(field.g(w0))

    def velocity(t, y):
        w, alpha = y[:size], rate(t)
        s = slope(field.g(w))
        return -np.concatenate([field.pull(w, s) + alpha * field.decay(w), s, [alpha]])

    start = np.concatenate([w0, np.zeros(d + 1)])
    rows = integrate(velocity, start, 0.0, until, breakpoints, times)
    w, mu, a = rows[:, :size], rows[:, size : size + d], rows[:, -1]
    return w, np.array([field.g(v) for v in w]), mu, a


def move(field, w, dmu, da):
    """Follow dw = J^T dmu + grad h da for unit time."""
    return integrate(lambda t, v: field.pull(v, dmu) + da * field.decay(v), w, 0.0, 1.0)[0]


def descent(field, w, slope, rate, lr, steps, momentum=0.0):
    """Gradient descent with heavy-ball momentum, as a loop; gives every w."""
    rows, buffer = [w], np.zeros_like(w)
    for k in range(steps):
        buffer = (
            momentum * buffer + field.pull(w, slope(field.g(w))) + rate(k * lr) * field.decay(w)
        )
        w = w - lr * buffer
        rows.append(w)
    return np.array(rows)
