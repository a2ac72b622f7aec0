r"""End points of training, computed without training: argmin {R_a(x) : Zx = y} (Theorem 3.6)."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._devices import CPU, device_of, moved
from .._solution import Solution, Status
from .._threads import few_threads, one_pool, small_on_one_thread
from ..legendre import LegendreFunction
from ..legendre._kernels import duality_gap
from ._constraints import Constraints, length, orthonormal
from ._continuation import DualPoint
from ._problems import solve_problem

__all__ = ["SMALL", "LimitStats", "finite_array", "limit", "measurements"]

Array = NDArray[np.float64]
SMALL = 450_000  # numbers of Z up to which a second thread gains nothing, beside others it waits
# From harmless to bad: a path has the status of its worst point.
SEVERITY = (
    Status.vertex,
    Status.converged,
    Status.surrogate,
    Status.stalled,
    Status.max_steps,
    Status.left_domain,
    Status.inconsistent,
)


@dataclass(frozen=True)
class LimitStats:
    """Measurements of `limit`; for several points, arrays with an entry for each (except seconds).

    Attributes
    ----------
    kkt : float or array
        max |mirror(x, a) - Z^T theta|: how far x is from optimal, in units of the dual variable,
        without coordinates that underflow. NaN where the flow has left the domain.
        For `MatrixEntropy` and `QuadraticEntropy`, whose mirror maps lose the small eigenvalues
        of X, or squares of w, to rounding, and for `Inversion`, whose mirror map costs more than
        the solution, |x - primal(Z^T theta, a)| / |x| instead.
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


def limit(
    R: LegendreFunction,
    Z: Any,
    y: Any,
    a: Any,
    max_steps: int = 2000,
    per_coordinate: bool | None = None,
) -> Solution:
    r"""Compute where training ends: the x of least R_a among those that fit the data.

    .. math:: \min_x R_a(x) \quad \text{subject to} \quad Z x = y

    This is where the flow converges once the decay is switched off, if the loss depends on Z x only
    and the end fits y, a being what has accumulated by then (Theorem 3.6). It is solved by its
    dual, x = primal(Z^T theta, a), in as many unknowns as Z has independent rows; nothing is
    trained.

    Parameters
    ----------
    R : LegendreFunction
        From `legendre`.
    Z : Tensor or array of shape ``(n, *R.shape)``
        The measurements, on any device; rows may be dependent. For `MatrixEntropy` their symmetric
        parts count.
    y : Tensor or array of shape (n,) or (n, m)
        The targets; a column for each of m problems, which are solved one by one.
    a : float, 1-d sequence of k floats, or array of shape R.shape
        The accumulated regularization, -int alpha dt, <= 0 for decay; > 0 stands for a larger
        initialization. Several make a path, in any order, for
        the cost of a few single solves where all coordinates decay at the same rate. With
        `WeightDecay` and a homogeneous g, a is also the logarithm of the initialization scale: the
        end is the end of training from e^a w0 without decay.
    max_steps : int
        The limit on Newton steps, for a whole path or for one point.
    per_coordinate : bool, optional
        Whether ``a`` holds one number for each coordinate, as discrete training stores them, for an
        R that is a sum over coordinates. R_a is then the R_0 of a start that is scaled per
        coordinate; ``(k, *R.shape)`` makes a path. By default a sequence is a path of single
        numbers; one of the length of x must say which it is.

    Returns
    -------
    Solution
        ``value`` x, of shape R.shape, or ``(k, *R.shape)`` for a path and ``(m, *R.shape)`` for m
        columns, on the device of Z; ``stats`` a `LimitStats`; ``aux["theta"]`` the dual variable,
        (n,), (k, n) or (m, n); for several points ``aux["status"]`` is the list of statuses and
        ``status`` is the worst of them.

        - ``converged``: x solves the problem.
        - ``vertex``: so it does, and it is the limit for a -> -inf, to 1e-13 if no coordinate of it
          is smaller than ``1e-9 |y|``: such a one may be left out, which ``stats.residual`` shows.
        - ``surrogate``: solved, but the sensing matrices do not commute, so that training U U^T
          ends elsewhere, or R is a `SignEntropy`. Not an error and no warning; ``status.ok`` is
          false.
        - ``inconsistent``: no x in the domain has Zx = y. If none at all has, ``value`` solves the
          problem for the y nearest to it in the range of Z, which is where training ends.
        - ``left_domain``: on the way to y a coordinate comes to an edge where g is not smooth, as
          0 for x = ``|u|``; training gets there, and R_a says nothing of what follows.
        - ``max_steps``, ``stalled``: ``value`` is the last iterate.

    Warns
    -----
    RuntimeWarning
        For the last three kinds of status, and for ``inconsistent``.

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
    >>> mf.limit(R, Z, y, a=[0.0, -5.0], per_coordinate=False).value  # decay makes it sparse
    tensor([[0.3421, 0.8290],
            [0.0034, 0.9983]], dtype=torch.float64)
    """
    started = time.perf_counter()
    if not isinstance(R, LegendreFunction):
        raise TypeError(f"R must be a LegendreFunction, got {type(R)}. Make one by mf.legendre.")
    if max_steps < 1:
        raise ValueError(f"max_steps must be >= 1, got {max_steps}")
    R = moved(R, CPU)
    Zs, ys = measurements(R, Z, y, several=True)
    at, single = _amounts(R, a, per_coordinate)
    if ys.ndim == 2 and not single:
        raise ValueError(
            f"a must be one number, or one for each coordinate, for y of shape {ys.shape}, got "
            f"{len(at)} of them. Call once for each a."
        )
    columns = [ys] if ys.ndim == 1 else list(ys.T)
    # Trial points may overflow; what is kept is checked.
    with (
        np.errstate(all="ignore"),
        one_pool(),
        small_on_one_thread(Zs.size, SMALL),
        few_threads(Zs.size, SMALL),
    ):
        # One a per coordinate: the R_0 of the start w(0, a) (errata 10).
        states = [(R.folded(ai), 0.0) if isinstance(ai, torch.Tensor) else (R, ai) for ai in at]
        exact = R.describes_training(Zs)
        ends = [_ends(states, Zs, column, max_steps, exact) for column in columns]
    return moved(_solution(R, ends, single and ys.ndim == 1, started), device_of(Z))


@dataclass(frozen=True)
class _Ends:
    """The end points of one right-hand side, a row for each a."""

    x: Array
    theta: Array
    statuses: list[Status]
    measured: dict[str, Array]


def _ends(
    states: Sequence[tuple[LegendreFunction, float]],
    Z: Array,
    y: Array,
    max_steps: int,
    exact: bool,
) -> _Ends:
    """Solve and measure for one right-hand side."""
    points, constraints = _solve(states, Z, y, max_steps)
    x, theta = (np.stack(rows) for rows in ([p.x for p in points], [p.theta for p in points]))
    statuses = [_status(p, constraints.consistent, not exact) for p in points]
    measured = _measure(states, Z, y, constraints, points)
    return _Ends(x, theta @ constraints.back.T, statuses, measured)  # for the rows of Z as given


def _solution(R: LegendreFunction, ends: list[_Ends], single: bool, started: float) -> Solution:
    """Return the end points as a result, with a warning where some are not what was asked for."""
    statuses = [status for end in ends for status in end.statuses]
    measured = {key: np.concatenate([e.measured[key] for e in ends]) for key in ends[0].measured}
    if single:
        measured = {key: values[0].item() for key, values in measured.items()}
    stats = LimitStats(**measured, seconds=time.perf_counter() - started)
    _warn(statuses, stats)
    x, theta = (np.concatenate(rows) for rows in ([e.x for e in ends], [e.theta for e in ends]))
    value = torch.from_numpy(x.reshape(len(x), *R.shape)).to(R.dtype)
    dual = torch.from_numpy(theta).to(R.dtype)
    if single:
        return Solution(value[0], statuses[0], stats, aux={"theta": dual[0]})
    worst = max(statuses, key=SEVERITY.index)
    return Solution(value, worst, stats, aux={"theta": dual, "status": statuses})


def measurements(R: LegendreFunction, Z: Any, y: Any, several: bool = False) -> tuple[Array, Array]:
    """Return Z (n, d) and y (n,), or (n, m) if it may hold ``several`` right-hand sides."""
    Zs, ys = finite_array("Z", Z), finite_array("y", y)
    if Zs.ndim == 0 or Zs.shape[1:] != tuple(R.shape):
        dims = "".join(f", {m}" for m in R.shape)
        raise ValueError(f"Z must have shape (n{dims}) to fit R, got {Zs.shape}")
    columns = several and ys.ndim == 2 and ys.size
    if ys.shape[:1] != Zs.shape[:1] or not (ys.ndim == 1 or columns):
        also = f" or ({len(Zs)}, m)" if several else ""
        raise ValueError(f"y must have shape {Zs.shape[:1]}{also} to fit Z, got {ys.shape}")
    return Zs.reshape(len(ys), R.shape.numel()), ys


def _amounts(
    R: LegendreFunction, a: Any, per_coordinate: bool | None
) -> tuple[list[float] | list[torch.Tensor], bool]:
    """Return the list of all ``a``, and whether only one was given."""
    at, shape = finite_array("a", a), tuple(R.shape)
    if per_coordinate:
        if (at.shape not in ((), shape) and at.shape[1:] != shape) or not at.size:
            dims = ", ".join(map(str, ("k", *shape)))
            raise ValueError(
                f"a must have shape {shape} or ({dims}) with per_coordinate=True, got {at.shape}. "
                "Pass one number for each coordinate."
            )
        rows = np.broadcast_to(at, shape)[None] if at.shape in ((), shape) else at
        return [torch.tensor(row, dtype=R.dtype) for row in rows], len(at.shape) <= len(shape)
    if per_coordinate is None and at.shape == shape and at.ndim == 1:
        raise ValueError(
            f"a must say what it holds where it is as long as x, got a vector of length {len(at)}. "
            "Pass per_coordinate=True for one number per coordinate, or per_coordinate=False for a "
            "path of single numbers."
        )
    if at.ndim > 1 or at.size == 0:
        raise ValueError(
            f"a must be a number or a non-empty 1-d sequence, got shape {at.shape}. Pass "
            "per_coordinate=True for one number per coordinate."
        )
    return [float(v) for v in at.reshape(-1)], at.ndim == 0


def finite_array(name: str, value: Any) -> Array:
    """Return finite float64 numbers, or an error that names the argument."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()  # bfloat16, too
    if hasattr(value, "toarray"):
        raise TypeError(f"{name} must be an array, got a sparse one. Give {name}.toarray()")
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} must be an array of numbers: {error}") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    array = array.astype(np.float64, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    return array


def _solve(
    states: Sequence[tuple[LegendreFunction, float]], Z: Array, y: Array, max_steps: int
) -> tuple[list[DualPoint], Constraints]:
    """Solve the dual problem of every R_a; those of one R together."""
    points: list[DualPoint] = []
    shared = len({id(R) for R, _ in states}) == 1
    groups = [states] if shared else [[state] for state in states]
    constraints = None
    for group in groups:
        problem = group[0][0].dual_problem(Z)
        constraints = constraints or orthonormal(problem.Z, y)
        points += solve_problem(problem, constraints, [a for _, a in group], max_steps)
    assert constraints is not None
    return points, constraints


def _status(point: DualPoint, consistent: bool, surrogate: bool) -> Status:
    """Return the status of one point."""
    if point.infeasible or not consistent:
        return Status.inconsistent
    if point.left:
        return Status.left_domain
    if not point.solved:
        return Status.max_steps if point.exhausted else Status.stalled
    if surrogate:
        return Status.surrogate
    return Status.vertex if point.vertex else Status.converged


def _measure(
    states: Sequence[tuple[LegendreFunction, float]],
    Z: Array,
    y: Array,
    constraints: Constraints,
    points: list[DualPoint],
) -> dict[str, Array]:
    """Measure every point against the problem as it was given."""
    size = length(y) or 1.0
    mus = [(constraints.back @ p.theta) @ Z for p in points]  # mu = Z^T theta
    kkt = [
        math.nan if p.left else _kkt(*s, p.x, mu)
        for s, p, mu in zip(states, points, mus, strict=True)
    ]
    return {
        "kkt": np.array(kkt),
        "residual": np.array([length(Z @ p.x - y) / size for p in points]),
        "gap": np.array(
            [_gap(R, Z, p, constraints) for (R, _), p in zip(states, points, strict=True)]
        ),
        "steps": np.array([p.steps for p in points]),
    }


def _kkt(R: LegendreFunction, a: float, x: Array, mu: Array) -> float:
    """Compare x and mu by the maps of R, which the solvers of the closed forms do not use."""
    if not (np.isfinite(x).all() and np.isfinite(mu).all()):
        return np.inf
    point, dual = (torch.from_numpy(v).to(R.dtype).reshape(R.shape) for v in (x, mu))
    return R.kkt_residual(point, dual, a)


def _gap(R: LegendreFunction, Z: Array, point: DualPoint, constraints: Constraints) -> float:
    """Return the relative duality gap of the smallest norm, with the better of two witnesses.

    Any v proves that every solution has norm >= <v, b> / ceiling(Q^T v). theta becomes optimal like
    1/|log A|, and its slope in log A, where R_a has one, like a power of A.
    """
    norm, gaps = R.sparsity_norm(point.x), []
    for witness in (point.theta, -point.slope):
        ceiling = R.sparsity_ceiling((constraints.back @ witness) @ Z)
        # <v, b> = <Q^T v, x> <= ceiling |x| for every solution x.
        gaps.append(duality_gap(norm, float(witness @ constraints.b), ceiling))
    return min(gaps)


def _warn(statuses: list[Status], stats: LimitStats) -> None:
    """Warn of every kind of failure once."""
    harmless = (Status.vertex, Status.converged, Status.surrogate)
    for status, count in Counter(s for s in statuses if s not in harmless).items():
        worst = float(np.max(stats.residual))
        which = f" ({count} of {len(statuses)} points)" if len(statuses) > 1 else ""
        message = f"limit: {status.value}{which}; relative residual {worst:.1e}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
