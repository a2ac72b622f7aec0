r"""End points of training, computed without training: argmin {R_a(x) : Zx = y} (Theorem 3.6)."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._solution import Solution, Status
from ..legendre import (
    HyperbolicEntropy,
    LegendreFunction,
    MatrixEntropy,
    OneSidedEntropy,
    QuadraticEntropy,
    RangeError,
)
from ._constraints import Rows, length, orthonormal
from ._continuation import Point
from ._dense_newton import solve_general
from ._duals import commutator
from ._newton import one_pool
from ._problems import family

__all__ = ["LimitStats", "limit"]

Array = NDArray[np.float64]
FAINT = 1e-290  # an x that decays below it loses its digits, and then is 0
COMMUTING = 1e-10  # relative size of commutators below which sensing matrices commute
# From harmless to bad: a path has the status of its worst point.
SEVERITY = (
    Status.vertex,
    Status.converged,
    Status.surrogate,
    Status.stalled,
    Status.max_steps,
    Status.inconsistent,
)


@dataclass(frozen=True)
class LimitStats:
    """What `limit` measured; along a path, arrays with one entry per ``a`` (except seconds).

    Attributes
    ----------
    kkt : float or array
        max |mirror(x, a) - Z^T theta|: how far x is from optimal, in units of the dual variable,
        without coordinates that underflow.
        For `MatrixEntropy` and `QuadraticEntropy`, whose mirror maps lose the small eigenvalues
        of X, or squares of w, to rounding, |x - primal(Z^T theta, a)| / |x| instead.
    residual : float or array
        |Zx - y| / |y| (|Zx| for y = 0).
    gap : float or array
        The certificate of how far x is from the L1 minimizer: its norm exceeds the smallest norm
        of any solution of Zx = y in the domain by at most the fraction ``gap`` of itself. L1 for
        vectors, trace norm for matrices.
    steps : int or array
        Newton steps; along a path those since the point before it on the path.
    seconds : float
        Wall time of the call.
    """

    kkt: Any
    residual: Any
    gap: Any
    steps: Any
    seconds: float


def limit(R: LegendreFunction, Z: Any, y: Any, a: Any, max_steps: int = 2000) -> Solution:
    r"""Compute where training ends: the x of least R_a among those that fit the data.

    .. math:: \min_x R_a(x) \quad \text{subject to} \quad Z x = y

    This is the limit of the flow once the decay is switched off, a being what has accumulated by
    then (Theorem 3.6). It is solved by its dual, x = primal(Z^T theta, a), in as many unknowns
    as Z has independent rows; nothing is trained.

    Parameters
    ----------
    R : LegendreFunction
        From `legendre`.
    Z : Tensor or array of shape ``(n, *R.shape)``
        The measurements; rows may be dependent. For `MatrixEntropy` their symmetric parts count.
    y : Tensor or array of shape (n,)
        The targets.
    a : float, or 1-d sequence of k floats
        The accumulated regularization, -int alpha dt <= 0. Several make a path, in any order, for
        the cost of a few single solves where all coordinates decay at the same rate.
    max_steps : int
        The limit on Newton steps, for a whole path or for one point.

    Returns
    -------
    Solution
        ``value`` x, of shape R.shape, or ``(k, *R.shape)`` for a path; ``stats`` a `LimitStats`;
        ``aux["theta"]`` the dual variable, (n,) or (k, n); for a path ``aux["status"]`` is the
        list of statuses and ``status`` is the worst of them.

        - ``converged``: x solves the problem.
        - ``vertex``: so it does, and it is the limit for a -> -inf, to 1e-13 if no coordinate of it
          is smaller than ``1e-9 |y|``: such a one may be left out, which ``stats.residual`` shows.
        - ``surrogate``: solved, but the sensing matrices do not commute, so that training U U^T
          ends elsewhere. Not an error and no warning; ``status.ok`` is false.
        - ``inconsistent``: no x in the domain has Zx = y. If none at all has, ``value`` solves the
          problem for the y nearest to it in the range of Z, which is where training ends.
        - ``max_steps``, ``stalled``: ``value`` is the last iterate.

    Warns
    -----
    RuntimeWarning
        For the last two kinds of status.

    Raises
    ------
    ValueError
        If a shape does not fit or something is NaN or infinite.
    TypeError
        If an argument cannot be read as real numbers.
    RangeError
        If R_a has no centre at this ``a``: the flow has left the domain before. Or if ``a`` is so
        large (> 300, say) that x would be beyond float64.

    Examples
    --------
    >>> import torch, mirrorflow as mf
    >>> w0 = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    >>> R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), w0)
    >>> Z, y = torch.tensor([[1.0, 2.0]]), torch.tensor([2.0])
    >>> mf.limit(R, Z, y, a=5.0).value  # no effect of sparsity: the shortest solution
    tensor([0.4000, 0.8000], dtype=torch.float64)
    >>> mf.limit(R, Z, y, a=[0.0, -5.0]).value  # decay makes it sparse
    tensor([[0.3421, 0.8290],
            [0.0034, 0.9983]], dtype=torch.float64)
    """
    started = time.perf_counter()
    if not isinstance(R, LegendreFunction):
        raise TypeError(f"R must be a LegendreFunction (mf.legendre makes one), got {type(R)}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be >= 1, got {max_steps}")
    rows_of, targets, scalar, steps = _checked(R, Z, y, a)
    # Trial points may overflow; what is kept is checked.
    with np.errstate(all="ignore"), one_pool():
        points, rows = _solve(R, rows_of, targets, steps, max_steps)
        statuses = _statuses(R, rows_of, rows, points)
        stats = _measure(R, rows_of, targets, steps, rows, points, scalar, started)
    _warn(statuses, stats)
    x = np.stack([p.x for p in points]).reshape(len(steps), *R.shape)
    theta = np.stack([rows.back @ p.theta for p in points])
    value, dual = torch.from_numpy(x).to(R.dtype), torch.from_numpy(theta).to(R.dtype)
    if scalar:
        return Solution(value[0], statuses[0], stats, aux={"theta": dual[0]})
    worst = max(statuses, key=SEVERITY.index)
    return Solution(value, worst, stats, aux={"theta": dual, "status": statuses})


def _checked(R: LegendreFunction, Z: Any, y: Any, a: Any) -> tuple[Array, Array, bool, list[float]]:
    """Give Z (n, d), y (n,), whether ``a`` is one number, and the list of them."""
    Zs, ys, at = _array("Z", Z), _array("y", y), _array("a", a)
    if Zs.ndim == 0 or Zs.shape[1:] != tuple(R.shape):
        dims = "".join(f", {m}" for m in R.shape)
        raise ValueError(f"Z must have shape (n{dims}) to fit R, got {Zs.shape}")
    if ys.shape != Zs.shape[:1]:
        raise ValueError(f"y must have shape {Zs.shape[:1]} to fit Z, got {ys.shape}")
    if at.ndim > 1 or at.size == 0:
        raise ValueError(f"a must be a number or a non-empty 1-d sequence, got shape {at.shape}")
    steps = [float(v) for v in at.reshape(-1)]
    return Zs.reshape(len(ys), R.shape.numel()), ys, at.ndim == 0, steps


def _array(name: str, value: Any) -> Array:
    """Give finite float64 numbers, or an error that names the argument."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} is not an array of numbers: {error}") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    array = array.astype(np.float64, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite entries")
    return array


def _solve(
    R: LegendreFunction, Z: Array, y: Array, a: Sequence[float], max_steps: int
) -> tuple[list[Point], Rows]:
    """Solve for every ``a`` by the method for R."""
    known = family(R, Z)
    if known is not None:
        rows = orthonormal(known.Z, y)
        return known.solve(rows, a, max_steps), rows
    rows = orthonormal(Z, y)
    points: dict[int, Point] = {}
    theta = None
    for i in np.argsort(-np.asarray(a), kind="stable"):  # each starts from its neighbour
        points[i] = solve_general(R, rows, a[i], theta, max_steps)
        theta = points[i].theta if points[i].solved else None
    return [points[i] for i in range(len(a))], rows


def _statuses(R: LegendreFunction, Z: Array, rows: Rows, points: list[Point]) -> list[Status]:
    """Say how each point was left."""
    surrogate = False
    if isinstance(R, MatrixEntropy):
        full = Z.reshape(-1, R.n, R.n)
        surrogate = commutator((full + full.transpose(0, 2, 1)) / 2) > COMMUTING
    return [_status(p, rows.consistent, surrogate) for p in points]


def _status(point: Point, consistent: bool, surrogate: bool) -> Status:
    """Say how one point was left."""
    if point.infeasible or not consistent:
        return Status.inconsistent
    if not point.solved:
        return Status.max_steps if point.exhausted else Status.stalled
    if surrogate:
        return Status.surrogate
    return Status.vertex if point.vertex else Status.converged


def _measure(
    R: LegendreFunction,
    Z: Array,
    y: Array,
    a: list[float],
    rows: Rows,
    points: list[Point],
    scalar: bool,
    started: float,
) -> LimitStats:
    """Measure every point against the problem as it was given."""
    size = length(y) or 1.0
    residual = np.array([length(Z @ p.x - y) / size for p in points])
    mus = [(rows.back @ p.theta) @ Z for p in points]
    kkt = np.array([_kkt(R, p.x, mu, ai) for p, mu, ai in zip(points, mus, a, strict=True)])
    gap = np.array([_gap(R, Z, p, rows) for p in points])
    steps = np.array([p.steps for p in points])
    seconds = time.perf_counter() - started
    if scalar:
        return LimitStats(float(kkt[0]), float(residual[0]), float(gap[0]), int(steps[0]), seconds)
    return LimitStats(kkt, residual, gap, steps, seconds)


def _kkt(R: LegendreFunction, x: Array, mu: Array, a: float) -> float:
    """Compare x and mu by the maps of R, which the solvers of the closed forms do not use."""
    if not (np.isfinite(x).all() and np.isfinite(mu).all()):
        return np.inf
    point, dual = (torch.from_numpy(v).to(R.dtype).reshape(R.shape) for v in (x, mu))
    if isinstance(R, MatrixEntropy | QuadraticEntropy):
        image = R.primal((dual + dual.mT) / 2 if dual.ndim == 2 else dual, a)
        unit = image.abs().max().clamp(min=1e-300)
        return float(((point - image) / unit).norm() / (image / unit).norm().clamp(min=1e-300))
    held = torch.ones_like(point, dtype=torch.bool)
    if isinstance(R, HyperbolicEntropy | OneSidedEntropy):  # x that underflows has no mu left
        held = torch.maximum(point.abs(), R.primal(dual, a).abs()) > FAINT
        point = torch.where(held, point, R.primal(torch.zeros_like(dual), 0.0))
    try:
        error = (R.mirror(point, a) - dual)[held].abs()
    except RangeError:
        return np.inf
    return float(error.max()) if error.numel() else 0.0


def _gap(R: LegendreFunction, Z: Array, point: Point, rows: Rows) -> float:
    """Give the relative duality gap of the smallest norm, with the better of two witnesses.

    Any v proves that every solution has norm >= <v, b> / ceiling(Q^T v). theta becomes optimal like
    1/|log A|, and its slope in log A, where R_a has one, like a power of A.
    """
    size = float(np.abs(_entries(R, point.x)).sum())
    if size == 0:
        return 0.0
    bounds = []
    for witness in (point.theta, -point.slope):
        height = _ceiling(R, (rows.back @ witness) @ Z)
        bounds.append(float(witness @ rows.b) / height if height > 0 else 0.0)
    return min(1.0, max(0.0, 1 - max(bounds) / size))


def _entries(R: LegendreFunction, v: Array) -> Array:
    """Give the entries of a vector, or the eigenvalues of a matrix."""
    if isinstance(R, MatrixEntropy):
        M = v.reshape(R.n, R.n)
        return np.asarray(np.linalg.eigvalsh((M + M.T) / 2), dtype=np.float64)
    return v


def _ceiling(R: LegendreFunction, mu: Array) -> float:
    """Give sup <mu, x> over x of norm 1 in the domain of R, whose signs may be fixed."""
    entries = _entries(R, mu)
    match R:
        case OneSidedEntropy():
            return float((R.sign.numpy().reshape(-1) * entries).max(initial=0.0))
        case MatrixEntropy():
            return float(entries.max(initial=0.0))
        case _:
            return float(np.abs(entries).max(initial=0.0))


def _warn(statuses: list[Status], stats: LimitStats) -> None:
    """Warn of every kind of failure once."""
    harmless = (Status.vertex, Status.converged, Status.surrogate)
    for status, count in Counter(s for s in statuses if s not in harmless).items():
        worst = float(np.max(stats.residual))
        which = f" ({count} of {len(statuses)} points)" if len(statuses) > 1 else ""
        message = f"limit: {status.value}{which}; relative residual {worst:.1e}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
