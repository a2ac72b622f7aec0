"""The shapes of R_a as decay accumulates, from the formulas that hold beside the printed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from scipy.special import expit

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

__all__ = [
    "NAME",
    "PAPER",
    "TITLE",
    "Config",
    "charts",
    "draw",
    "printed_hadamard",
    "printed_log",
    "printed_one_sided",
    "printed_power",
    "run",
    "table",
    "verdicts",
]

NAME = "fig09_fig11_fig14_legendre"
TITLE = "The shapes of Rₐ: what accumulated decay does to centre, type and speed"
PAPER = "Figures 9, 11 and 14 (Appendices E and F); Equations (9), (10) and (11)"

Array = NDArray[np.float64]
Pair = tuple[float, float]


class Config(contract.Config):
    """The starts of one coordinate, and the values of a.

    Attributes
    ----------
    power_start : pair of float
        u0 and v0 of u^4 - v^4.
    log_start : pair of float
        u0 and v0 of log u - log v.
    hadamard_start : pair of float
        m0 and w0 of m * w, different in size.
    one_sided_start : float
        m0 = w0 of m * w.
    power_a, log_a, hadamard_a : tuple of float
        The accumulated regularization, <= 0.
    window : float
        The curves are drawn for x in [-window, window].
    points : int
        Points of a curve.
    """

    power_start: Pair = (0.8, 0.6)
    log_start: Pair = (1.0, 0.9)
    hadamard_start: Pair = (1.0, 0.5)
    one_sided_start: float = Field(default=1.0, gt=0)
    power_a: tuple[float, ...] = (0.0, -0.1, -1.0, -10.0)
    log_a: tuple[float, ...] = (0.0, -0.15, -0.3, -0.4)
    hadamard_a: tuple[float, ...] = (0.0, -0.5, -1.5, -5.0)
    window: float = Field(default=2.0, gt=0)
    points: int = Field(default=201, ge=5)

    @field_validator("power_a", "log_a", "hadamard_a")
    @classmethod
    def _negative(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        """Require at least one a, and none above 0."""
        if not values or max(values) > 0:
            raise ValueError("a must be <= 0: decay that has accumulated")
        return values

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (41 points); cpu and full are the same."""
        return cls(points=41) if name == "smoke" else cls()


# --- The printed formulas: mu as a function of x --------------------------------------------------


def printed_hadamard(x: Array, a: float, start: Pair) -> Array:
    """Eq. (9): the gradient with the prefactor 1/4 and A = 2 e^{2a} u0 v0 (errata 1)."""
    u0, v0 = (start[0] + start[1]) / 2**0.5, (start[0] - start[1]) / 2**0.5
    return 0.25 * (np.arcsinh(x / (2 * np.exp(2 * a) * u0 * v0)) - np.log(u0 / v0))


def printed_one_sided(x: Array, a: float, start: Pair) -> Array:
    """Eq. (10): the gradient log x - log B, twice the one that holds (errata 9)."""
    return np.log(x) - np.log(start[0] * start[1]) - 2 * a


def printed_log(x: Array, a: float, start: Pair) -> Array:
    """Appendix E: the gradient with u0^2 - 2a and v0^2 - 2a (errata 3)."""
    U, V = start[0] ** 2 - 2 * a, start[1] ** 2 - 2 * a
    return 0.5 * (V * expit(2 * x) - U * expit(-2 * x))


def printed_power(x: Array, a: float, start: Pair, k: int = 2) -> Array:
    """Eq. (11) with its signs of mu and a, inverted by bisection (errata 2).

    x = (c (c_u + mu + a))^{-q} - (c (c_v - mu + a))^{-q}: the exponent of d_k is the one that
    gives x(0, 0) = x0. It falls with mu, on the printed interval (-c_u - a, c_v + a), which is
    empty for a <= -(c_u + c_v)/2: NaN then.
    """
    q, c = k / (k - 1), 2 * k * (2 * k - 2)
    cu, cv = start[0] ** (2 - 2 * k) / c, start[1] ** (2 - 2 * k) / c
    low, high = np.full_like(x, -cu - a), np.full_like(x, cv + a)
    if not (low < high).all():
        return np.full_like(x, np.nan)
    for _ in range(100):
        mu = (low + high) / 2
        above = (c * (cu + mu + a)) ** -q - (c * (cv - mu + a)) ** -q > x
        low, high = np.where(above, mu, low), np.where(above, high, mu)
    return (low + high) / 2


@dataclass(frozen=True)
class Case:
    """One figure: a pair (g, h) by name, its start, and the printed gradient."""

    key: str
    label: str
    start: Pair
    a: tuple[float, ...]
    printed: Callable[[Array, float, Pair], Array]
    positive: bool = False  # x > 0 only

    def grid(self, config: Config) -> Array:
        """Return the x of the curves, dense near 0, where little A bends them."""
        low = 1 / (config.points - 1) if self.positive else -1.0
        return config.window * np.linspace(low, 1.0, config.points) ** 3


def _cases(config: Config) -> list[Case]:
    both = (config.one_sided_start, config.one_sided_start)
    return [
        Case("power", "u⁴ − v⁴", config.power_start, config.power_a, printed_power),
        Case("log", "log u − log v", config.log_start, config.log_a, printed_log),
        Case(
            "hadamard", "m·w, |m0| ≠ |w0|", config.hadamard_start, config.hadamard_a,
            printed_hadamard,
        ),
        Case("one_sided", "m·w, m0 = w0", both, config.hadamard_a, printed_one_sided, True),
    ]  # fmt: skip


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Evaluate R_a, its gradient and its metric for each case and a."""
    return recorder.records(
        [(case.key, case.label, partial(_case, config, case)) for case in _cases(config)]
    )


def _pair(case: Case) -> tuple[Any, Any]:
    """Return g and h of a case."""
    import mirrorflow as mf

    match case.key:
        case "power":
            return mf.PowerDifference(2), mf.Separable()
        case "log":
            return mf.LogRatio(), mf.Separable()
        case _:
            return mf.Hadamard(), mf.WeightDecay()


def _case(config: Config, case: Case) -> Part:
    """Compute the curves and numbers of one case."""
    import torch

    import mirrorflow as mf
    from mirrorflow.legendre import Inversion

    w0 = tuple(torch.tensor(s, dtype=torch.float64) for s in case.start)
    R, flow = mf.legendre(*_pair(case), w0), Inversion(*_pair(case), w0)
    x = case.grid(config)
    curves = [_curves(R, flow, case, x, a) for a in case.a]
    arrays = {key: np.stack([c[key] for c in curves]) for key in curves[0]}
    inside = {name: np.nan_to_num(v, nan=0.0) for name, v in arrays.items()}
    inside["printed_exists"] = np.isfinite(arrays["printed"])
    records = [_numbers(R, case, a, c) for a, c in zip(case.a, curves, strict=True)]
    return Part(records, {"x": x, "a": np.array(case.a), **inside})


def _curves(R: Any, flow: Any, case: Case, x: Array, a: float) -> dict[str, Array]:
    """Return R_a less its minimum, gradient and inverse metric on a grid, and the flow's points."""
    import torch

    points, centre = torch.from_numpy(x), R.centre(a)
    mirror = R.mirror(points, a).numpy()
    # The same relation from integrating dw = J^T dmu + grad h da: it knows no closed form.
    mu = np.interp(x[0] + (x[-1] - x[0]) * np.linspace(0.1, 0.9, 7), x, mirror)
    reached = flow.primal(torch.from_numpy(mu), a).numpy()
    with np.errstate(all="ignore"):
        printed = case.printed(x, a, case.start)
    return {
        "value": (R.value(points, a) - R.value(centre, a)).numpy(),
        "gradient": mirror,
        "inverse_metric": (1 / R.metric(points, a)).numpy(),
        "printed": printed,
        "flow_mu": mu,
        "flow_x": reached,
    }


def _numbers(R: Any, case: Case, a: float, curves: dict[str, Array]) -> Record:
    """Return the numbers of one a: centre, speed there, type, and the printed formula's error."""
    import torch

    centre = R.centre(a)
    rise = [(R.value(centre + d, a) - R.value(centre, a)).item() for d in (1.0, 2.0)]
    x0 = R.centre(0.0)
    missed = np.abs(curves["printed"] - curves["gradient"])
    scale = np.abs(curves["gradient"]).max()
    exists = bool(np.isfinite(missed).all())
    back = R.primal(torch.from_numpy(curves["flow_mu"]), a).numpy()
    return {
        "case": case.key,
        "label": case.label,
        "a": a,
        "centre": centre.item(),
        "inverse_metric": (1 / R.metric(centre, a)).item(),
        "gradient_at_start": R.mirror(x0, a).item(),
        "growth": float(np.log2(rise[1] / rise[0])),
        "printed_off": float(missed.max() / scale) if exists else None,
        "flow_off": float(np.abs(back - curves["flow_x"]).max()),
    }


# --- What the page shows of it --------------------------------------------------------------------


def _of(records: list[Record], case: str) -> list[Record]:
    return [r for r in records if r["case"] == case]


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the run shows, with its numbers."""
    power, log, wide = (_of(records, case) for case in ("power", "log", "hadamard"))
    worst = max(r["flow_off"] for r in records)
    speed, growth = [r["inverse_metric"] for r in power], [r["growth"] for r in wide]
    return [
        (
            "m·w: decay changes the growth of Rₐ (2 is L2, 1 is L1)",
            f"x^{growth[0]:.2f} → x^{growth[-1]:.2f}",
        ),
        ("m·w: its centre", f"{wide[0]['centre']:.2g} → {wide[-1]['centre']:.1e}"),
        (
            "u⁴ − v⁴: the speed at its centre, while its range does not shrink",
            f"{speed[0]:.2g} → {speed[-1]:.1e}",
        ),
        (
            "log u − log v: its centre, which moves away from 0",
            f"{log[0]['centre']:.2g} → {log[-1]['centre']:.2g}",
        ),
        (
            "The corrected formulas and the integrated flow agree to",
            f"{worst:.0e}; the printed ones do not, once decay has accumulated",
        ),
    ]


def table(records: list[Record]) -> list[Record]:
    """Return a row for each case and a."""
    return [
        {
            "model": r["label"],
            "a": r["a"],
            "centre": r["centre"],
            "inverse metric at the centre": r["inverse_metric"],
            "gradient at the start": r["gradient_at_start"],
            "growth exponent (2: L2, 1: L1)": r["growth"],
            "printed gradient off by (relative)": (
                "empty range" if r["printed_off"] is None else f"{r['printed_off']:.2g}"
            ),
            "off the integrated flow": r["flow_off"],
        }
        for r in records
    ]


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw shape, gradient and speed of each case."""
    from ._figures import draw_figure

    return draw_figure(records, trajectory)


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive versions."""
    from ._figures import make_charts

    return make_charts(records, trajectory)
