r"""The Legendre function R_a of a commuting pair (g, h) started at w0."""

from __future__ import annotations

from typing import Any

import torch

from .._devices import CPU, moved
from ..conditions import Report, check
from ..regularizer import Regularizer, Separable, WeightDecay, require_pair
from ..reparam import (
    CommutingQuadratic,
    Depth,
    Hadamard,
    LogRatio,
    Parameters,
    PowerDifference,
    Reparam,
    SymmetricFactor,
    factors,
)
from .base import LegendreFunction
from .homogeneous import RescaledFunction
from .hyperbolic import HyperbolicEntropy, OneSidedEntropy
from .logcosh import LogCoshEntropy
from .matrix import MatrixEntropy
from .numerical import Inversion
from .power import PowerEntropy
from .product import ProductEntropy
from .quadratic import QuadraticEntropy, in_double

__all__ = ["IncompatiblePair", "legendre"]


class IncompatiblePair(ValueError):
    """A pair (g, h) that fails the conditions of Theorem 3.2; ``report`` says which one."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.explain())
        self.report = report


def legendre(g: Reparam, h: Regularizer, w0: Parameters) -> LegendreFunction:
    r"""Return the Legendre function R_a of a commuting pair started at w0 (Theorem 3.2).

    Parameters
    ----------
    g : Reparam
        The parametrization x = g(w).
    h : Regularizer
        The penalty.
    w0 : Tensor or tuple of Tensor
        The start.

    Returns
    -------
    LegendreFunction
        In closed form where there is one, else `Inversion`; `RescaledFunction` for `WeightDecay`
        and a g that is homogeneous of another degree than 2, whose dual variable runs on the clock
        nu = -int e^{(k-2) a} grad f dt. It is on the CPU, and so are the tensors of its maps;
        `limit` and `flow` take those of any device. For `SymmetricFactor` it is the R_a of sensing
        matrices that commute, which is not checked here: `limit` returns the status surrogate where
        they do not, and ``check(g, h, w0, sensing=...)`` decides it.

    Raises
    ------
    IncompatiblePair
        If g and h do not commute or g is not regular, with the condition that failed and, where
        there is one, the penalty that would work.
    ValueError
        If w0 does not fit g.

    Examples
    --------
    >>> import torch, mirrorflow as mf
    >>> w0 = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    >>> R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), w0)
    >>> R.log_A(-5.0)
    tensor([-10.6931, -10.6931, -10.6931], dtype=torch.float64)
    """
    require_pair("legendre", g, h, w0)
    g, h, w0 = (moved(value, CPU) for value in (g, h, w0))
    own = g.closed_form(h, w0)
    if own is not None:
        return own
    if isinstance(h, WeightDecay) and (known := _undecayed(g)) is not None:
        start, degree = known
        # R_0 is read at a = 0, where it does not matter that `Separable` is another penalty.
        return RescaledFunction(start.start(g, Separable(), w0), degree, _energy(h, g, w0))
    closed = _closed_form(g, h, w0)
    if closed is None or closed is QuadraticEntropy:  # the others always commute
        report = check(in_double(g), h, w0)
        if not report.applies:
            raise IncompatiblePair(report)
        if report.degree not in (None, 2.0):  # commutes up to the clock e^{(k-2) a}, k the degree
            return RescaledFunction(Inversion(g, h, w0), report.degree, _energy(h, g, w0))
    return Inversion(g, h, w0) if closed is None else closed.start(g, h, w0)


def _closed_form(g: Reparam, h: Regularizer, w0: Parameters) -> Any:
    """Return the class of R_a where it has a closed form; the start is for the class to check."""
    decay, separable = isinstance(h, WeightDecay), isinstance(h, Separable)
    match g:
        case Hadamard() | Depth(k=2) if decay:
            # Eq. (9) with errata 1; Eq. (10) with errata 9 where |m0| = |w0|.
            return _entropy_of(factors(w0)[0].abs() == factors(w0)[1].abs())
        case PowerDifference(k=1) if decay or separable:
            # The same two entropies, with s = 4.
            return _entropy_of((factors(w0)[0] == 0) | (factors(w0)[1] == 0))
        case PowerDifference() if separable:
            return PowerEntropy  # Eq. (11) with errata 2
        case LogRatio() if separable:
            return LogCoshEntropy  # Appendix E with errata 3
        case CommutingQuadratic() if decay:
            return QuadraticEntropy  # Theorem 3.10 with B = I
        case SymmetricFactor() if decay:
            return MatrixEntropy  # Corollary C.3, Eq. (17) with errata 9
        case _:
            return None


def _undecayed(g: Reparam) -> Any:
    """Return the class of R_0 and the degree of a g that weight decay only rescales."""
    match g:
        case Depth() if g.k > 2:
            return ProductEntropy, float(g.k)  # g(c w) = c^k g(w)
        case PowerDifference() if g.k > 1:
            return PowerEntropy, float(g.power)  # u^{2k} - v^{2k}: degree 2k
        case LogRatio():
            return LogCoshEntropy, 0.0  # log(c u) - log(c v) = log u - log v
        case _:
            return None


def _energy(h: Regularizer, g: Reparam, w0: Parameters) -> float:
    """Return h(w0)."""
    return float(h.value(w0, g))


def _entropy_of(one_sided: torch.Tensor) -> Any:
    """Choose between the two entropies of quadratic models; their starts check the rest."""
    return OneSidedEntropy if bool(one_sided.all()) else HyperbolicEntropy
