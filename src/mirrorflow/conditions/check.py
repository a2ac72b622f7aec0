r"""The conditions of the theory for a pair (g, h): regular, commuting, well posed, contracting."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._devices import CPU, moved
from ..regularizer import Regularizer, WeightDecay, require_pair
from ..reparam import Parameters, Reparam, factors, flatten, unflatten
from ._homogeneity import homogeneity_degree
from ._probe import Probe, lengths, norm
from .report import Condition, Report, advice

__all__ = ["Condition", "Report", "check"]

BRACKET_TOLERANCE = 1e-8  # relative, in float64: rounding leaves about 1e-15
PATH_TOLERANCE = 1e-6  # relative difference of two flows integrated to 1e-10
NATURAL = 1e-4  # share of |X| |Y| / |w| in the scale of a bracket: far above rounding
RANK_TOLERANCE = 1e-10
SIZES = (1.0, 10.0, 100.0, 1e3, 1e6)  # of random w; h may overflow, and be NaN, at large ones
SAMPLED_COORDINATES = 256


def check(
    g: Reparam, h: Regularizer, w0: Parameters, sensing: Tensor | None = None, seed: int = 0
) -> Report:
    r"""Test the conditions under which (g, h) from w0 follows a mirror flow (Theorem 3.2).

    The Lie brackets ``[grad g_i, grad g_j]`` and ``[grad g_i, grad h]`` are bilinear, so that all
    of them vanish if and only if those of random combinations ``p . g``, ``q . g`` do (with
    probability one). They are computed by automatic differentiation at w0 and at points along the
    flow; penalties with kinks are caught by following the flow of g and of h in both orders.

    With `WeightDecay` and a g that is homogeneous of degree k, [grad g_i, w] = (2-k) grad g_i: the
    pair commutes up to a change of clock, and the law and the end point hold with nu = -int
    e^{(k-2) a} grad f dt for mu = -int grad f dt (see `RescaledFunction`). ``degree`` is k then.

    Parameters
    ----------
    g : Reparam
        The parametrization.
    h : Regularizer
        The penalty.
    w0 : Tensor or tuple of Tensor
        The start.
    sensing : Tensor of shape (m, n, n), optional
        For matrices: only gradients in the span of these matter, as for measurements <A_i, X>.
    seed : int
        Of the random combinations and directions.

    Returns
    -------
    Report
        With ``.regular``, ``.commuting``, ``.well_posed``, ``.contracting``, ``.applies``,
        ``.degree`` and ``.explain()``.

    Raises
    ------
    TypeError, ValueError
        If g, h or w0 is not of the expected kind, or they do not fit together.

    Examples
    --------
    >>> from mirrorflow import PowerDifference, Separable, WeightDecay
    >>> w0 = (torch.ones(3, dtype=torch.float64), 2 * torch.ones(3, dtype=torch.float64))
    >>> check(PowerDifference(2), Separable(), w0).applies
    True
    >>> report = check(PowerDifference(2), WeightDecay(), w0)
    >>> report.applies, report.degree
    (True, 4.0)
    """
    require_pair("check", g, h, w0)
    g, h, sensing = (moved(value, CPU) for value in (g, h, sensing))
    whole = _double(moved(w0, CPU))
    _require_derivative(g, whole)
    _require_finite(g, h, whole)
    _validate_sensing(sensing, g(whole).shape)
    probe = Probe(g, h, _sampled(g, h, whole), sensing, seed)
    degree = homogeneity_degree(g, probe.w0, seed) if isinstance(h, WeightDecay) else None
    turn = 0.0 if degree is None else 2.0 - degree  # [grad g_i, w] = turn grad g_i
    regular, promise = _regular(g, whole, probe), _promise(probe)
    commuting = [*promise, *_brackets(probe, turn), _paths(probe, turn)]
    conditions = [regular, *commuting, _well_posed(probe)]
    failed = not all(c.ok for c in (regular, *commuting))
    conditions.append(_contracting(probe, failed))
    remedy = advice(g, h, conditions, _ranks(probe)) if failed else ""
    return Report(f"{g} with {h}", tuple(conditions), remedy, None if failed else degree)


def _require_derivative(g: Reparam, w0: Parameters) -> None:
    """Raise an error where autograd cannot follow g(w0) back to w."""
    parts = tuple(f.detach().requires_grad_() for f in factors(w0))
    with torch.enable_grad():
        x = g(parts[0] if isinstance(w0, Tensor) else parts)
    if x.numel() and not x.requires_grad:
        raise ValueError(
            f"g(w) must depend on w, got a constant or detached tensor of {g}. Compute it from w "
            "with torch operations"
        )


def _require_finite(g: Reparam, h: Regularizer, w0: Parameters) -> None:
    """Raise ValueError where g or h has no value at w0."""
    for name, value in (("g(w0)", g(w0)), ("grad h(w0)", flatten(h.gradient(w0, g)))):
        if not value.numel():
            raise ValueError(f"{g} with {h}: {name} must hold numbers, got none: it is empty")
        if not torch.isfinite(value).all():
            raise ValueError(f"{g} with {h}: {name} must be finite, got NaN or infinite entries")


def _validate_sensing(sensing: Tensor | None, shape: torch.Size) -> None:
    """Raise an error that says what is wrong with the measurements."""
    if sensing is None:
        return
    if not isinstance(sensing, Tensor):
        raise TypeError(f"sensing must be a torch tensor, got {type(sensing).__name__}")
    if sensing.ndim == 0 or sensing.shape[1:] != shape or not len(sensing):
        dims = "".join(f", {n}" for n in shape)
        raise ValueError(f"sensing must have shape (m{dims}), m > 0, got {tuple(sensing.shape)}")
    if not torch.isfinite(sensing).all():
        raise ValueError("sensing must be finite, got NaN or infinite entries")


def _regular(g: Reparam, w0: Parameters, probe: Probe) -> Condition:
    """Find the smallest relative singular value of J_g, at w0 (all of it) and along the flow."""
    if g.elementwise:
        return _regular_rows(g, w0, probe)
    sizes = [_rank_size(g, w) for w in (w0, *probe.points[1:])]
    smallest = min(sizes)
    ok = bool(smallest > RANK_TOLERANCE)
    where = "w0" if sizes[0] == smallest else "a point of the flow"
    detail = "J_g has full rank" if ok else f"J_g loses rank at {where}"
    return Condition("regular", ok, smallest, f"{detail}; smallest over largest singular value")


def _regular_rows(g: Reparam, w0: Parameters, probe: Probe) -> Condition:
    """Find rows that vanish: those of an elementwise g share no parameter, whatever their sizes."""
    rows = torch.stack([_row_sizes(g, w) for w in probe.points])
    lost = bool((_row_sizes(g, w0) == 0).any())
    smallest = 0.0 if lost else float((rows / rows.max(dim=0).values).min())
    ok = smallest > RANK_TOLERANCE
    detail = "no row of J_g vanishes" if ok else "a row of J_g vanishes at w0 or along the flow"
    return Condition("regular", ok, smallest, f"{detail}; smallest relative to its largest size")


def _row_sizes(g: Reparam, w: Parameters) -> Tensor:
    """Return the norms of the rows of J_g for an elementwise g."""
    slopes = factors(g.pullback(w, torch.ones_like(g(w))))
    return lengths(torch.stack(torch.broadcast_tensors(*slopes)))


def _rank_size(g: Reparam, w: Parameters) -> float:
    """Return the smallest over the largest singular value of J_g."""
    s = g.singular_values(w)
    return float(s[-1] / s[0]) if s[0] > 0 else 0.0


def _ranks(probe: Probe) -> tuple[int, int]:
    """Return the smallest rank of J_g at w0 and along its flow, and that at random points.

    Where J_g is known to lose rank; a sample of many coordinates may not show which.
    """
    here = [_rank(probe.g, w) for w in probe.points]
    elsewhere = [_rank(probe.g, probe.near(w)) for w in probe.points for _ in range(2)]
    return min([*here, probe.shape.numel() - 1]), max([*here, *elsewhere])


def _rank(g: Reparam, w: Parameters) -> int:
    """Return the rank of J_g: for an elementwise g the number of rows that do not vanish."""
    if not torch.isfinite(g(w)).all():
        return 0
    s = _row_sizes(g, w).reshape(-1) if g.elementwise else g.singular_values(w)
    least = 0.0 if g.elementwise else RANK_TOLERANCE * float(s.max())
    return int((s > least).sum())


def _promise(probe: Probe) -> list[Condition]:
    """Test what elementwise=True promises, unless the class is known to keep it."""
    g, h, found = probe.g, probe.h, []
    for f in range(len(factors(probe.w0))):
        if g.elementwise and not g.alike:
            found.append(_crosstalk(probe, lambda w: g(w), f"J_g of {g}", f))
        if h.elementwise and not h.alike:
            found.append(
                _crosstalk(
                    probe, lambda w: torch.stack(factors(h.gradient(w, g))), f"grad of {h}", f
                )
            )
    return [c for c in found if not c.ok]


def _crosstalk(
    probe: Probe, function: Callable[[Parameters], Tensor], name: str, factor: int
) -> Condition:
    """Perturb half of the coordinates of a factor, and see whether the others respond."""
    parts = factors(probe.w0)
    size = 0.0
    for _ in range(8):  # random halves: a pair of coordinates is missed once in 256 times
        mask = (probe.normal(parts[factor].shape) > 0).to(torch.float64)
        change = [torch.zeros_like(p) for p in parts]
        change[factor] = mask * probe.normal(mask.shape)
        tangent = change[0] if isinstance(probe.w0, Tensor) else tuple(change)
        moved = torch.func.jvp(function, (probe.w0,), (tangent,))[1]
        size = max(size, float(((1 - mask) * moved).abs().max() / (moved.abs().max() + 1e-300)))
    detail = f"{name} mixes coordinates although elementwise=True was promised"
    return Condition("commuting", size < BRACKET_TOLERANCE, size, detail)


def _brackets(probe: Probe, turn: float) -> list[Condition]:
    """Measure [grad g_i, grad g_j] and [grad g_i, grad h] - turn grad g_i at every point."""
    found = []
    # Coordinates of an elementwise g have parameters of their own, so that [grad g, grad g] = 0.
    if not probe.g.elementwise and probe.shape.numel() > 1:
        pairs = [(probe.direction(), probe.direction()) for _ in range(2)]
        size = max(
            _bracket(probe, w, probe.field(p), probe.field(q))
            for w in probe.points
            for p, q in pairs
        )
        found.append(_condition("[grad g_i, grad g_j]", size, _worst_pair(probe, size)))
    size = max(
        _bracket(probe, w, probe.field(probe.direction()), probe.penalty(), turn)
        for w in probe.points
    )
    clock = f" {'-' if turn > 0 else '+'} {abs(turn):g} grad g_i" if turn else ""
    found.append(_condition(f"[grad g_i, grad h]{clock}", size, ""))
    return found


def _condition(name: str, size: float, worst: str) -> Condition:
    """Make the condition that a bracket vanishes."""
    ok = size < BRACKET_TOLERANCE
    detail = f"{name} {'vanishes' if ok else 'does not vanish'}, relative to its two terms{worst}"
    return Condition("commuting", ok, size, detail)


def _bracket(
    probe: Probe,
    w: Parameters,
    X: Callable[[Parameters], Parameters],
    Y: Callable[[Parameters], Parameters],
    turn: float = 0.0,
) -> float:
    """Return the size of [X, Y] - turn X, [X, Y] = DY X - DX Y, relative to its two terms.

    Both terms may be 0 up to rounding, as DX X is for g = |w|: then |X| |Y| / |w| is their scale.
    """
    at_x, at_y = X(w), Y(w)
    one = _stacked(probe, torch.func.jvp(Y, (w,), (at_x,))[1])
    two = _stacked(probe, torch.func.jvp(X, (w,), (at_y,))[1])
    rest = turn * _stacked(probe, at_x) if turn else torch.zeros_like(one)
    # Per coordinate if elementwise, so that many good coordinates do not hide a bad one.
    bracket, terms = lengths(one - two - rest), lengths(one) + lengths(two)
    sizes = [lengths(_stacked(probe, v)) for v in (at_x, at_y, w)]
    natural = torch.where(sizes[2] > 0, sizes[0] * (sizes[1] / sizes[2]), 0.0)
    scale = terms.max() * 1e-6 + torch.finfo(terms.dtype).tiny
    return float((bracket / (terms + NATURAL * natural + scale)).max())


def _stacked(probe: Probe, w: Parameters) -> Tensor:
    """Return a tangent vector with the dimension that is to be summed first."""
    return torch.stack(factors(w)) if probe.elementwise else flatten(w)


def _worst_pair(probe: Probe, size: float) -> str:
    """Name the pair (i, j) whose bracket is largest, if one does not vanish and d is small."""
    d = probe.shape.numel()
    if size < BRACKET_TOLERANCE or not 1 < d <= 30 or probe.sensing is not None:
        return ""
    units = [probe.g.project(e.reshape(probe.shape)) for e in torch.eye(d, dtype=torch.float64)]
    fields = [probe.field(e) for e in units]
    sizes = {
        (i, j): _bracket(probe, probe.w0, fields[i], fields[j]) for i in range(d) for j in range(i)
    }
    i, j = max(sizes, key=lambda pair: sizes[pair])
    return f"; largest at w0 for i = {j}, j = {i} ({sizes[i, j]:.2g})"


def _paths(probe: Probe, turn: float) -> Condition:
    """Follow g and h in both orders: the flows of commuting fields end in the same point.

    With a clock, mu before the decay does what e^{turn a} mu does after it.
    """
    gaps = []
    for scale in (0.01, 0.3, 2.0):
        step, a = probe.steps(scale)
        for mu in (step, -step):
            gaps.append(_gap_of_orders(probe, mu, a * min(1.0, 0.1 / scale), turn))
    sizes = [gap for gap in gaps if gap is not None]
    size = max(sizes, default=np.nan)
    ok = size < PATH_TOLERANCE  # if there is none to compare, nothing is known: not ok
    verdict = "agree" if ok else "differ" if sizes else "end before they can be compared"
    detail = f"the flows of g and h {verdict} in both orders ({len(sizes)} of {len(gaps)} exist)"
    return Condition("commuting", ok, size, detail)


def _gap_of_orders(probe: Probe, mu: Tensor, a: float, turn: float) -> float | None:
    """Return the relative distance of the two ends; None where one of the flows ends before."""
    zero, late, ends = torch.zeros_like(mu), mu * np.exp(turn * a), []
    for first, second in (((mu, 0.0), (zero, a)), ((zero, a), (late, 0.0))):
        middle = probe.move(probe.w0, *first)
        end = None if middle is None else probe.move(middle, *second)
        if end is None:
            return None
        ends.append(end)
    one, two = ends
    gap = norm(unflatten(flatten(one) - flatten(two), probe.w0))
    return gap / (norm(one) + norm(two) + norm(probe.w0) + 1e-300)


def _well_posed(probe: Probe) -> Condition:
    """Decide whether h is bounded below: by its form where that is known, else by sampling."""
    known = probe.h.bounded_below(probe.g)
    if known is not None:
        return Condition("well posed", known[0], np.nan, known[1])
    lows = [low for size in SIZES if not np.isnan(low := _lowest(probe, size))]
    # A bounded h has lows that differ by chance only.
    ok = -np.inf not in lows and not lows[-1] < 1.5 * min([0.0, *lows[:-1]])
    detail = "h stays bounded below" if ok else "h falls without bound"
    return Condition(
        "well posed", ok, lows[-1], f"{detail} on random w of size up to 1e6; lowest h"
    )


def _lowest(probe: Probe, size: float) -> float:
    """Return the lowest h over random parameters of the given size."""
    values = []
    for _ in range(64):
        flat = probe.normal(flatten(probe.w0).shape)
        w = unflatten(size * flat, probe.w0)
        values.append(float(probe.h.value(w, probe.g)))
    return min((v for v in values if not np.isnan(v)), default=np.nan)


def _contracting(probe: Probe, failed: bool) -> Condition:
    """Decide whether d R_a / d a = -h(w) <= 0 at the points of the flow."""
    if failed:
        return Condition(
            "contracting", False, np.nan, "there is no R_a, because the pair fails above"
        )
    values = [float(probe.h.value(w, probe.g)) for w in probe.points]
    lowest = min(values)
    ok = lowest >= -1e-12 * max(map(abs, values))
    relation = ">= 0" if ok else "negative"
    detail = f"d R_a/da = -h(w), and h is {relation} along the flow; lowest h"
    return Condition("contracting", ok, lowest, detail)


def _sampled(g: Reparam, h: Regularizer, w0: Parameters) -> Parameters:
    """Keep a few coordinates of a large elementwise start, where all are alike."""
    d = factors(w0)[0].numel()
    alike = g.elementwise and h.elementwise and g.alike and h.alike
    if d <= SAMPLED_COORDINATES or not alike:
        return w0
    keep = torch.randperm(d, generator=torch.Generator().manual_seed(0))[:SAMPLED_COORDINATES]
    parts = tuple(f.reshape(-1)[keep] for f in factors(w0))
    return parts[0] if isinstance(w0, Tensor) else parts


def _double(w: Parameters) -> Parameters:
    """Return w in float64, detached."""
    parts = tuple(f.detach().to(torch.float64) for f in factors(w))
    return parts[0] if isinstance(w, Tensor) else parts
