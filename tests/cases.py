"""The case table: every public pair (g, h) with a start and an oracle. A new g costs a row here."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit

import mirrorflow as mf
import oracles
from mirrorflow.legendre import (
    HyperbolicEntropy,
    Inversion,
    LogCoshEntropy,
    MatrixEntropy,
    OneSidedEntropy,
    PowerEntropy,
    QuadraticEntropy,
    RescaledFunction,
)


@dataclass(frozen=True)
class Case:
    """A pair with its start and the same flow written in NumPy.

    Attributes
    ----------
    start : callable
        Returns w0 for a seed.
    form : type
        The class of R_a that `legendre` makes; `Inversion` integrates at every call.
    span : array
        For matrices: the gradients for which the theory holds are those that share eigenvectors,
        the range of ``span``.
    lowest_a : float
        The a below which R_a has no centre.
    largest_x : float
        The |x| up to which the mirror map by integration resolves mu.
    start_decides : bool
        Whether `legendre` refuses the start, and not the pair.
    """

    id: str
    g: mf.Reparam
    h: mf.Regularizer
    start: Callable
    field: oracles.Field
    form: type = Inversion
    commutes: bool = True
    degree: float | None = None  # of a g that commutes with weight decay up to a change of clock
    span: np.ndarray | None = None
    lowest_a: float = -np.inf
    largest_x: float = np.inf
    start_decides: bool = False

    @property
    def slow(self):
        return self.form is Inversion

    def __str__(self):
        return self.id

    def flat(self, seed):
        """Return w0 as one NumPy vector."""
        w0 = self.start(seed)
        parts = (w0,) if isinstance(w0, torch.Tensor) else w0
        return torch.cat([p.reshape(-1) for p in parts]).numpy()


def uniform(*ranges, shape=(3,)):
    """Draw one factor per (low, high)."""

    def start(seed):
        rng = np.random.default_rng(seed)
        return tuple(torch.from_numpy(rng.uniform(lo, hi, shape)) for lo, hi in ranges)

    return start


def single(low, high, size):
    def start(seed):
        return torch.from_numpy(np.random.default_rng(seed).uniform(low, high, size))

    return start


def unbalanced(seed):
    """Return m0, w0 with |m0| != |w0|, in either order and with either sign."""
    rng = np.random.default_rng(seed)
    big, small = rng.uniform(0.7, 1.2, 3), rng.uniform(-0.5, 0.5, 3)
    swap, sign = rng.integers(0, 2, 3).astype(bool), rng.choice([-1.0, 1.0], 3)
    m, w = np.where(swap, big * sign, small), np.where(swap, small, big * sign)
    return torch.from_numpy(m), torch.from_numpy(w)


def balanced(seed):
    """Return m0 = +-w0: x0 != 0 keeps its sign."""
    rng = np.random.default_rng(seed)
    m, sign = rng.uniform(0.6, 1.2, 3), rng.choice([-1.0, 1.0], 3)
    return torch.from_numpy(m), torch.from_numpy(m * sign)


def one_vanishes(seed):
    """Return u0, v0 of which one is 0."""
    rng = np.random.default_rng(seed)
    size, up = rng.uniform(0.6, 1.2, 3), rng.integers(0, 2, 3)
    return torch.from_numpy(size * up), torch.from_numpy(size * (1 - up))


def scaled_orthogonal(n, beta):
    def start(seed):
        Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
        return torch.from_numpy(np.sqrt(beta) * Q)

    return start


def gaussian(*shapes):
    def start(seed):
        rng = np.random.default_rng(seed)
        w0 = tuple(torch.from_numpy(0.7 * rng.standard_normal(s)) for s in shapes)
        return w0 if len(w0) > 1 else w0[0]

    return start


_rng = np.random.default_rng(7)
_V, _ = np.linalg.qr(_rng.standard_normal((3, 3)))
EIGEN = np.stack([np.outer(v, v).ravel() for v in _V.T], axis=1)  # matrices that commute
_P, _ = np.linalg.qr(_rng.standard_normal((4, 4)))
COMMUTING = np.stack([_P @ np.diag(_rng.uniform(-1, 1, 4)) @ _P.T for _ in range(3)])
COMMUTING = (COMMUTING + np.swapaxes(COMMUTING, 1, 2)) / 2
_B = _rng.standard_normal((3, 4, 4))
GENERAL = (_B + np.swapaxes(_B, 1, 2)) / 2
MIX = np.array([[1.0, 0.4], [-0.3, 0.8]])


def half_square(w):
    return sum((f * f).sum() for f in w) / 2


def product_of_two(w):
    return w[0] * w[1]


def mixed_squares(w):
    return torch.from_numpy(MIX) @ (w * w) / 2


def total_exponential(w):
    return torch.exp(w).sum()


DECAY, TERMS = mf.WeightDecay(), mf.Separable()
PLANE = uniform((0.7, 1.1), (0.7, 1.1))
POSITIVE = uniform((1.6, 2.0), (1.6, 2.0))
NARROW = uniform((0.5, 0.7), (0.5, 0.7))  # u^6 - v^6 soon reaches infinity from larger starts
EVERY = (
    Case("hadamard", mf.Hadamard(), DECAY, unbalanced, oracles.hadamard(), HyperbolicEntropy),
    Case("hadamard-balanced", mf.Hadamard(), DECAY, balanced, oracles.hadamard(), OneSidedEntropy),
    Case("depth-2", mf.Depth(2), DECAY, unbalanced, oracles.depth(2), HyperbolicEntropy),
    Case("power-1", mf.PowerDifference(1), TERMS, PLANE, oracles.power(1), HyperbolicEntropy),
    Case(
        "power-1-decay",
        mf.PowerDifference(1),
        DECAY,
        PLANE,
        oracles.power(1, plain=True),
        HyperbolicEntropy,
    ),
    Case(
        "power-1-zero",
        mf.PowerDifference(1),
        TERMS,
        one_vanishes,
        oracles.power(1),
        OneSidedEntropy,
    ),
    Case("power-2", mf.PowerDifference(2), TERMS, PLANE, oracles.power(2), PowerEntropy),
    Case("power-3", mf.PowerDifference(3), TERMS, NARROW, oracles.power(3), PowerEntropy),
    Case(
        "power-1-drift",
        mf.PowerDifference(1),
        mf.Separable((0.7, -1.3)),
        PLANE,
        oracles.power(1, 0.7, 1.3),
        HyperbolicEntropy,
    ),
    Case(
        "power-2-drift",
        mf.PowerDifference(2),
        mf.Separable((0.7, -1.3)),
        PLANE,
        oracles.power(2, 0.7, 1.3),
        PowerEntropy,
    ),
    Case(
        "log-ratio",
        mf.LogRatio(),
        TERMS,
        POSITIVE,
        oracles.log_ratio(),
        LogCoshEntropy,
        lowest_a=-1.28,
        largest_x=10.0,
    ),
    Case(
        "quadratic",
        mf.CommutingQuadratic(torch.from_numpy(COMMUTING)),
        DECAY,
        single(0.6, 1.2, 4),
        oracles.quadratic(COMMUTING),
        QuadraticEntropy,
    ),
    Case(
        "symmetric-commuting",
        mf.SymmetricFactor(),
        DECAY,
        scaled_orthogonal(3, 0.5),
        oracles.symmetric(3),
        MatrixEntropy,
        span=EIGEN,
    ),
    Case("identity-linear", mf.Identity(), TERMS, single(-1, 1, 3), oracles.identity(True)),
    Case(
        "custom",
        mf.CustomReparam(product_of_two, elementwise=True),
        mf.CustomRegularizer(half_square, elementwise=True),
        unbalanced,
        oracles.hadamard(),
    ),
    Case(
        "custom-exponential",
        mf.CustomReparam(torch.exp, elementwise=True),
        mf.CustomRegularizer(total_exponential, elementwise=True),
        single(-0.5, 0.5, 3),
        oracles.exponential(),
    ),
    Case(
        "custom-dense",
        mf.CustomReparam(mixed_squares),
        DECAY,
        single(0.6, 1.2, 2),
        oracles.squares(MIX),
    ),
    # What commutes up to a change of clock.
    Case(
        "depth-3",
        mf.Depth(3),
        DECAY,
        gaussian(3, 3, 3),
        oracles.depth(3),
        RescaledFunction,
        False,
        3.0,
    ),
    Case(
        "identity",
        mf.Identity(),
        DECAY,
        gaussian(3),
        oracles.identity(False),
        RescaledFunction,
        False,
        1.0,
    ),
    Case(
        "power-2-decay",
        mf.PowerDifference(2),
        DECAY,
        PLANE,
        oracles.power(2, plain=True),
        RescaledFunction,
        False,
        4.0,
    ),
    Case(
        "log-ratio-decay",
        mf.LogRatio(),
        DECAY,
        POSITIVE,
        oracles.log_ratio(plain=True),
        RescaledFunction,
        False,
        0.0,
    ),
    # What the theory does not cover.
    Case(
        "quadratic-general",
        mf.CommutingQuadratic(torch.from_numpy(GENERAL)),
        DECAY,
        gaussian(4),
        oracles.quadratic(GENERAL),
        commutes=False,
    ),
    Case(
        "symmetric",
        mf.SymmetricFactor(),
        DECAY,
        gaussian((3, 3)),
        oracles.symmetric(3),
        commutes=False,
        start_decides=True,
    ),
    Case(
        "product",
        mf.Product(),
        DECAY,
        gaussian((3, 2), (2, 3)),
        oracles.product(3, 2, 3),
        commutes=False,
    ),
)
COMMUTE = [c for c in EVERY if c.commutes]
FAST = [c for c in COMMUTE if not c.slow]
CLOCKED = [c for c in EVERY if c.degree is not None]
FAIL = [c for c in EVERY if not c.commutes and c.degree is None]

SCHEDULES = {
    "constant": mf.Constant(0.2),
    "linear": mf.Linear(0.4, 0.05, 1.2),
    "cosine": mf.Cosine(0.5, 0.0, 1.0),
    "off-on-off": mf.Piecewise((0.5, 1.0), (0.0, 0.6, 0.0)),
    "negative": mf.Piecewise((0.4, 1.0), (0.4, -0.15, 0.1)),
    "joined": mf.join(
        [(mf.Linear(0.0, 0.3, 0.6), 0.6), (mf.Constant(0.3), 0.4), (mf.Constant(0), None)]
    ),
    "cyclic": mf.Cyclic(mf.Cosine(0.5, 0.0, 0.3), 0.4, 3),
}


@dataclass(frozen=True)
class Loss:
    """A loss in torch and its gradient in NumPy, on the coordinates of a case."""

    torch: Callable
    slope: Callable


def loss(case, name, n=2):
    """Make the least squares, logistic or quartic loss of a case, with fixed random data.

    For matrices the data are combinations of the commuting ones.
    """
    d = len(case.field.g(case.flat(0)))
    rng = np.random.default_rng(11)
    free = d if case.span is None else case.span.shape[1]
    Z = rng.standard_normal((n, free)) / np.sqrt(free)
    Z = Z if case.span is None else Z @ case.span.T
    # X = U U^T is positive: only such measurements can be met.
    y = 0.6 * rng.standard_normal(n) if case.span is None else Z @ (case.span @ [0.3, 0.8, 0.5])
    shape = case.g(case.start(0)).shape
    T = torch.from_numpy(Z)
    if name == "least-squares":
        linear = mf.LeastSquares(T.reshape(n, *shape), torch.from_numpy(y))
        return Loss(linear, lambda x: Z.T @ (Z @ x - y) / n)
    sign = torch.from_numpy(np.sign(y))
    if name == "logistic":

        def logistic(x):
            return torch.nn.functional.softplus(-sign * (T @ x.reshape(-1))).mean()

        s = np.sign(y)
        return Loss(logistic, lambda x: -Z.T @ (s * expit(-s * (Z @ x))) / n)
    assert name == "quartic"

    def quartic(x):
        return ((T @ x.reshape(-1) - torch.from_numpy(y)) ** 4).sum() / 4

    return Loss(quartic, lambda x: Z.T @ (Z @ x - y) ** 3)


LOSSES = ("least-squares", "logistic", "quartic")
